"""PyTorch definitions that student_source copies into exported files.

No module imports this one, because PyTorch is optional: student_source reads
its text. A definition may use only those above it. Attributes have the names of
the published networks, so that state dicts have them too.
"""

from collections import OrderedDict

import torch
from torch import nn


def conv(channels, width, kernel=1, stride=1, groups=1):
  """Returns a convolution without bias, padded by half of its kernel."""
  return nn.Conv2d(
    channels, width, kernel, stride, kernel // 2, groups=groups, bias=False
  )


def conv_norm(channels, width, kernel=1, stride=1, groups=1):
  """Returns a convolution and its batch norm."""
  return conv(channels, width, kernel, stride, groups), nn.BatchNorm2d(width)


def conv_act(channels, width, kernel=1, stride=1, groups=1, act=nn.ReLU):
  """Returns a convolution, its batch norm and an activation."""
  return nn.Sequential(
    *conv_norm(channels, width, kernel, stride, groups), act()
  )


def stage(block, num_blocks, channels, width, stride=1, **options):
  """Returns blocks of which the first changes the channels and the size."""
  return nn.Sequential(
    block(channels, width, stride, **options),
    *(block(width, width, **options) for _ in range(num_blocks - 1)),
  )


class BasicBlock(nn.Module):
  """Two 3x3 convolutions, and a shortcut around them."""

  def __init__(self, channels, width, stride=1):
    super().__init__()
    self.conv1, self.bn1 = conv_norm(channels, width, 3, stride)
    self.conv2, self.bn2 = conv_norm(width, width, 3)
    self.downsample = nn.Sequential()
    if stride > 1 or channels != width:
      self.downsample = nn.Sequential(*conv_norm(channels, width, 1, stride))

  def forward(self, x):
    y = self.bn1(self.conv1(x)).relu()
    y = self.bn2(self.conv2(y))
    return (y + self.downsample(x)).relu()


class Bottleneck(nn.Module):
  """1x1, 3x3 and 1x1 convolutions, and a shortcut around them."""

  def __init__(self, channels, width, stride=1, inner_width=1, groups=1):
    super().__init__()
    inner = width // 4 * inner_width
    self.conv1, self.bn1 = conv_norm(channels, inner)
    self.conv2, self.bn2 = conv_norm(inner, inner, 3, stride, groups)
    self.conv3, self.bn3 = conv_norm(inner, width)
    self.downsample = nn.Sequential()
    if stride > 1 or channels != width:
      self.downsample = nn.Sequential(*conv_norm(channels, width, 1, stride))

  def forward(self, x):
    y = self.bn1(self.conv1(x)).relu()
    y = self.bn2(self.conv2(y)).relu()
    y = self.bn3(self.conv3(y))
    return (y + self.downsample(x)).relu()


class WideBlock(nn.Module):
  """Two 3x3 convolutions after batch norms, and a shortcut from the first."""

  def __init__(self, channels, width, stride=1):
    super().__init__()
    self.bn1 = nn.BatchNorm2d(channels)
    self.conv1, self.bn2 = conv_norm(channels, width, 3, stride)
    self.conv2 = conv(width, width, 3)
    self.convShortcut = None
    if channels != width:
      self.convShortcut = conv(channels, width, 1, stride)

  def forward(self, x):
    y = self.bn1(x).relu()
    if self.convShortcut is not None:
      x = self.convShortcut(y)
    y = self.bn2(self.conv1(y)).relu()
    return x + self.conv2(y)


class TorchdistillWideBlock(nn.Module):
  """Two 3x3 convolutions after batch norms, and a shortcut from the input."""

  def __init__(self, channels, width, stride=1):
    super().__init__()
    self.bn1 = nn.BatchNorm2d(channels)
    self.conv1, self.bn2 = conv_norm(channels, width, 3, stride)
    self.conv2 = conv(width, width, 3)
    self.shortcut = nn.Sequential()
    if channels != width:
      self.shortcut = nn.Sequential(conv(channels, width, 1, stride))

  def forward(self, x):
    y = self.conv1(self.bn1(x).relu())
    y = self.conv2(self.bn2(y).relu())
    return self.shortcut(x) + y


def vgg_block(channels, width, num_convs):
  """Returns 3x3 convolutions, each with bias, batch norm and ReLU."""
  layers = []
  for _ in range(num_convs):
    layers.append(nn.Conv2d(channels, width, 3, padding=1))
    layers.append(nn.BatchNorm2d(width))
    layers.append(nn.ReLU())
    channels = width
  return nn.Sequential(*layers)


def separable(channels, width, stride=1):
  """Returns a depthwise 3x3 convolution and a 1x1 convolution."""
  return nn.Sequential(
    *conv_norm(channels, channels, 3, stride, groups=channels),
    nn.ReLU(),
    *conv_norm(channels, width),
    nn.ReLU(),
  )


class InvertedResidual(nn.Module):
  """Convolutions that widen, filter each channel, and narrow."""

  def __init__(self, channels, width, stride=1, expansion=6):
    super().__init__()
    inner = channels * expansion
    self.conv = nn.Sequential(
      *conv_norm(channels, inner),
      nn.ReLU(),
      *conv_norm(inner, inner, 3, stride, groups=inner),
      nn.ReLU(),
      *conv_norm(inner, width),
    )
    self.has_shortcut = stride == 1 and channels == width

  def forward(self, x):
    y = self.conv(x)
    return x + y if self.has_shortcut else y


class TorchvisionInvertedResidual(nn.Module):
  """Convolutions that widen, filter each channel, and narrow."""

  def __init__(self, channels, width, stride=1, expansion=6):
    super().__init__()
    inner = channels * expansion
    layers = []
    if expansion > 1:
      layers.append(conv_act(channels, inner, act=nn.ReLU6))
    self.conv = nn.Sequential(
      *layers,
      conv_act(inner, inner, 3, stride, groups=inner, act=nn.ReLU6),
      *conv_norm(inner, width),
    )
    self.has_shortcut = stride == 1 and channels == width

  def forward(self, x):
    y = self.conv(x)
    return x + y if self.has_shortcut else y


def conv_act_v3(channels, width, kernel=1, stride=1, groups=1, act=nn.Identity):
  """Returns a convolution, MobileNetV3's batch norm, and an activation."""
  return nn.Sequential(
    conv(channels, width, kernel, stride, groups),
    nn.BatchNorm2d(width, eps=0.001, momentum=0.01),
    act(),
  )


class SqueezeExcitation(nn.Module):
  """Scales each channel by a function of all channels' averages."""

  def __init__(self, channels, inner):
    super().__init__()
    self.fc1 = nn.Conv2d(channels, inner, 1)
    self.fc2 = nn.Conv2d(inner, channels, 1)

  def forward(self, x):
    scale = self.fc1(x.mean((2, 3), keepdim=True)).relu()
    return x * nn.functional.hardsigmoid(self.fc2(scale))


class InvertedResidualV3(nn.Module):
  """Widens, filters each channel, scales by `squeeze` channels, narrows."""

  def __init__(self, channels, inner, width, kernel, stride, squeeze, act):
    super().__init__()
    layers = []
    if inner != channels:
      layers.append(conv_act_v3(channels, inner, act=act))
    layers.append(conv_act_v3(inner, inner, kernel, stride, inner, act))
    if squeeze:
      layers.append(SqueezeExcitation(inner, squeeze))
    layers.append(conv_act_v3(inner, width))
    self.block = nn.Sequential(*layers)
    self.has_shortcut = stride == 1 and channels == width

  def forward(self, x):
    y = self.block(x)
    return x + y if self.has_shortcut else y


def shuffle(x, groups):
  """Deals out the channels of the groups in turn."""
  return x.unflatten(1, (groups, -1)).transpose(1, 2).flatten(1, 2)


class GroupedUnit(nn.Module):
  """Grouped 1x1 convolutions around a depthwise one; joined to the average."""

  def __init__(self, channels, width, stride=1):
    super().__init__()
    if stride == 2:
      width -= channels
    inner = width // 4
    self.stride = stride
    self.groups = 1 if channels == 24 else 3
    self.conv1, self.bn1 = conv_norm(channels, inner, groups=self.groups)
    self.conv2, self.bn2 = conv_norm(inner, inner, 3, stride, groups=inner)
    self.conv3, self.bn3 = conv_norm(inner, width, groups=3)

  def forward(self, x):
    y = self.bn1(self.conv1(x)).relu()
    y = self.bn2(self.conv2(shuffle(y, self.groups))).relu()
    y = self.bn3(self.conv3(y))
    if self.stride == 1:
      return (x + y).relu()
    x = nn.functional.avg_pool2d(x, 3, stride=2, padding=1)
    return torch.cat([y, x], 1).relu()


class SplitUnit(nn.Module):
  """Works on half of the channels, or on all and halves the map."""

  def __init__(self, channels, width, stride=1):
    super().__init__()
    half = width // 2
    self.stride = stride
    if stride == 1:
      self.conv1, self.bn1 = conv_norm(half, half)
      self.conv2, self.bn2 = conv_norm(half, half, 3, groups=half)
      self.conv3, self.bn3 = conv_norm(half, half)
    else:
      self.conv1, self.bn1 = conv_norm(channels, channels, 3, 2, channels)
      self.conv2, self.bn2 = conv_norm(channels, half)
      self.conv3, self.bn3 = conv_norm(channels, half)
      self.conv4, self.bn4 = conv_norm(half, half, 3, 2, half)
      self.conv5, self.bn5 = conv_norm(half, half)

  def forward(self, x):
    if self.stride == 1:
      x, y = x.chunk(2, 1)
      y = self.bn1(self.conv1(y)).relu()
      y = self.bn2(self.conv2(y))
      y = self.bn3(self.conv3(y)).relu()
    else:
      y = self.bn3(self.conv3(x)).relu()
      y = self.bn4(self.conv4(y))
      y = self.bn5(self.conv5(y)).relu()
      x = self.bn1(self.conv1(x))
      x = self.bn2(self.conv2(x)).relu()
    return shuffle(torch.cat([x, y], 1), 2)


class BranchedUnit(nn.Module):
  """Works on half of the channels, or on all and halves the map."""

  def __init__(self, channels, width, stride=1):
    super().__init__()
    half = width // 2
    self.stride = stride
    self.branch1 = nn.Sequential()
    if stride == 2:
      self.branch1 = nn.Sequential(
        *conv_norm(channels, channels, 3, 2, channels),
        *conv_norm(channels, half),
        nn.ReLU(),
      )
    self.branch2 = nn.Sequential(
      *conv_norm(half if stride == 1 else channels, half),
      nn.ReLU(),
      *conv_norm(half, half, 3, stride, half),
      *conv_norm(half, half),
      nn.ReLU(),
    )

  def forward(self, x):
    left, right = x.chunk(2, 1) if self.stride == 1 else (x, x)
    y = torch.cat([self.branch1(left), self.branch2(right)], 1)
    return shuffle(y, 2)


class Attention(nn.Module):
  """Self-attention of tokens (B, N, D)."""

  def __init__(self, width, num_heads):
    super().__init__()
    self.num_heads = num_heads
    self.qkv = nn.Linear(width, 3 * width)
    self.proj = nn.Linear(width, width)

  def forward(self, x):
    qkv = self.qkv(x).unflatten(2, (3, self.num_heads, -1))
    query, key, value = qkv.permute(2, 0, 3, 1, 4)
    y = nn.functional.scaled_dot_product_attention(query, key, value)
    return self.proj(y.transpose(1, 2).flatten(2))


class TransformerBlock(nn.Module):
  """Attention and two linear layers, each after a layer norm."""

  def __init__(self, width, num_heads):
    super().__init__()
    self.norm1 = nn.LayerNorm(width, eps=1e-6)
    self.attn = Attention(width, num_heads)
    self.norm2 = nn.LayerNorm(width, eps=1e-6)
    self.mlp = nn.Sequential(
      OrderedDict(
        fc1=nn.Linear(width, 4 * width),
        act=nn.GELU(),
        fc2=nn.Linear(4 * width, width),
      )
    )

  def forward(self, x):
    x = x + self.attn(self.norm1(x))
    return x + self.mlp(self.norm2(x))


class DeiT(nn.Module):
  """A vision transformer; returns the map of its patches' tokens."""

  def __init__(self, channels, size, patch, width, depth, num_heads):
    super().__init__()
    self.size = (size[0] // patch, size[1] // patch)
    num_tokens = 1 + self.size[0] * self.size[1]
    self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
    self.pos_embed = nn.Parameter(torch.zeros(1, num_tokens, width))
    self.patch_embed = nn.Sequential(
      OrderedDict(proj=nn.Conv2d(channels, width, patch, patch))
    )
    self.blocks = nn.Sequential(
      *(TransformerBlock(width, num_heads) for _ in range(depth))
    )

  def forward(self, images):
    x = self.patch_embed(images).flatten(2).transpose(1, 2)
    token = self.cls_token.expand(len(x), -1, -1)
    x = self.blocks(torch.cat([token, x], 1) + self.pos_embed)
    return x[:, 1:].transpose(1, 2).unflatten(2, self.size)
