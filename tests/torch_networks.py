"""The backbones in PyTorch, with the names that published weights have there.

Those of torchvision and timm are theirs. The others are written here from their
papers, in the layout of RepDistiller, mdistiller and torchdistill; they share
no code with ijckd_jax, which is tested against them.
"""

import collections
import functools

import pytest

NEEDS = "needs PyTorch: pip install -e '.[parity]'"
torch = pytest.importorskip('torch', reason=NEEDS)
nn = torch.nn
# The threads of two libraries wait for each other where processors are few.
torch.set_num_threads(1)


def _torchvision():
  """Returns torchvision, also where its operators do not fit this PyTorch."""
  try:
    return pytest.importorskip('torchvision', reason=NEEDS)
  except RuntimeError:  # The models need none of the operators.
    library = torch.library.Library('torchvision', 'DEF')
    for name in ('nms', 'qnms'):
      library.define(
        f'{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor'
      )
    return pytest.importorskip('torchvision', reason=NEEDS)


torchvision = _torchvision()
timm = pytest.importorskip('timm', reason=NEEDS)


def conv(channels, width, kernel=1, stride=1, groups=1, bias=False):
  """Returns a convolution that is padded by half of its kernel."""
  return nn.Conv2d(
    channels, width, kernel, stride, kernel // 2, groups=groups, bias=bias
  )


def shuffle(x, groups):
  """Deals out the channels of the groups in turn."""
  batch, channels, height, width = x.shape
  x = x.view(batch, groups, channels // groups, height, width)
  return x.transpose(1, 2).reshape(batch, channels, height, width)


def stack(block, num_blocks, channels, width, stride):
  """Returns blocks of which the first changes channels and size."""
  blocks = [block(channels, width, stride)]
  blocks += [block(width, width, 1) for _ in range(num_blocks - 1)]
  return nn.Sequential(*blocks)


class Net(nn.Module):
  """`maps(images)` gives the stages and the map that is averaged."""

  head = 'fc'

  def forward(self, images):
    _, final = self.maps(images)
    return self.get_submodule(self.head)(final.mean((2, 3)))

  def init_conv(self, std_of_head=None):
    """Draws convolutions from N(0, 2 / (k k C_out)), heads as said."""
    for module in self.modules():
      if isinstance(module, nn.Conv2d):
        nn.init.kaiming_normal_(module.weight, mode='fan_out')
        if module.bias is not None:
          nn.init.zeros_(module.bias)
    if std_of_head is not None:
      head = self.get_submodule(self.head)
      nn.init.normal_(head.weight, 0, std_of_head)
      nn.init.zeros_(head.bias)


class BasicBlock(nn.Module):
  """Two 3x3 convolutions; `shortcut` is the name of what changes shapes."""

  def __init__(self, channels, width, stride, shortcut='downsample'):
    super().__init__()
    self.conv1 = conv(channels, width, 3, stride)
    self.bn1 = nn.BatchNorm2d(width)
    self.conv2 = conv(width, width, 3)
    self.bn2 = nn.BatchNorm2d(width)
    change = []
    if stride != 1 or channels != width:
      change = [conv(channels, width, 1, stride), nn.BatchNorm2d(width)]
    self.name_of_shortcut = shortcut
    self.add_module(shortcut, nn.Sequential(*change))

  def forward(self, x):
    y = torch.relu(self.bn1(self.conv1(x)))
    y = self.bn2(self.conv2(y))
    return torch.relu(y + self.get_submodule(self.name_of_shortcut)(x))


class Bottleneck(nn.Module):
  """1x1, 3x3 and 1x1 convolutions, of which the 3x3 strides."""

  def __init__(self, channels, width, stride):
    super().__init__()
    inner = width // 4
    self.conv1, self.bn1 = conv(channels, inner), nn.BatchNorm2d(inner)
    self.conv2 = conv(inner, inner, 3, stride)
    self.bn2 = nn.BatchNorm2d(inner)
    self.conv3, self.bn3 = conv(inner, width), nn.BatchNorm2d(width)
    self.shortcut = nn.Sequential()
    if stride != 1 or channels != width:
      self.shortcut = nn.Sequential(
        conv(channels, width, 1, stride), nn.BatchNorm2d(width)
      )

  def forward(self, x):
    y = torch.relu(self.bn1(self.conv1(x)))
    y = torch.relu(self.bn2(self.conv2(y)))
    return torch.relu(self.bn3(self.conv3(y)) + self.shortcut(x))


RESIDUAL_BLOCKS = (
  BasicBlock,
  Bottleneck,
  torchvision.models.resnet.BasicBlock,
  torchvision.models.resnet.Bottleneck,
)


class CifarResNet(Net):
  """Three stages of basic blocks."""

  def __init__(self, num_classes, channels, depth, widths):
    super().__init__()
    self.conv1 = conv(channels, widths[0], 3)
    self.bn1 = nn.BatchNorm2d(widths[0])
    num = (depth - 2) // 6
    self.layer1 = stack(BasicBlock, num, widths[0], widths[1], 1)
    self.layer2 = stack(BasicBlock, num, widths[1], widths[2], 2)
    self.layer3 = stack(BasicBlock, num, widths[2], widths[3], 2)
    self.fc = nn.Linear(widths[3], num_classes)
    self.init_conv()

  def maps(self, images):
    stages = [torch.relu(self.bn1(self.conv1(images)))]
    for layer in (self.layer1, self.layer2, self.layer3):
      stages.append(layer(stages[-1]))
    return stages, stages[-1]


class FourStages(Net):
  """The ResNets with four stages for CIFAR."""

  head = 'linear'

  def __init__(self, num_classes, channels, block, num_blocks, expansion):
    super().__init__()
    self.conv1, self.bn1 = conv(channels, 64, 3), nn.BatchNorm2d(64)
    width = 64
    for stage, num in enumerate(num_blocks, 1):
      wider = 32 * 2**stage * expansion
      stride = 1 if stage == 1 else 2
      self.add_module(f'layer{stage}', stack(block, num, width, wider, stride))
      width = wider
    self.linear = nn.Linear(width, num_classes)
    self.init_conv()

  def maps(self, images):
    stages = [torch.relu(self.bn1(self.conv1(images)))]
    for layer in (self.layer1, self.layer2, self.layer3, self.layer4):
      stages.append(layer(stages[-1]))
    return stages, stages[-1]


class WideBlock(nn.Module):
  """Batch norm and ReLU before each convolution, the shortcut after them."""

  def __init__(self, channels, width, stride):
    super().__init__()
    self.bn1 = nn.BatchNorm2d(channels)
    self.conv1 = conv(channels, width, 3, stride)
    self.bn2 = nn.BatchNorm2d(width)
    self.conv2 = conv(width, width, 3)
    self.convShortcut = None
    if channels != width:
      self.convShortcut = conv(channels, width, 1, stride)

  def forward(self, x):
    activated = torch.relu(self.bn1(x))
    y = self.conv2(torch.relu(self.bn2(self.conv1(activated))))
    return y + (
      x if self.convShortcut is None else self.convShortcut(activated)
    )


class TorchdistillWideBlock(nn.Module):
  """The same with a shortcut that is not activated."""

  def __init__(self, channels, width, stride):
    super().__init__()
    self.bn1 = nn.BatchNorm2d(channels)
    self.conv1 = conv(channels, width, 3, stride)
    self.bn2 = nn.BatchNorm2d(width)
    self.conv2 = conv(width, width, 3)
    self.shortcut = nn.Sequential()
    if stride != 1 or channels != width:
      self.shortcut = nn.Sequential(conv(channels, width, 1, stride))

  def forward(self, x):
    y = self.conv1(torch.relu(self.bn1(x)))
    return self.conv2(torch.relu(self.bn2(y))) + self.shortcut(x)


class WideResNet(Net):
  """Stages are raw sums; the last batch norm and ReLU make the final map."""

  def __init__(self, num_classes, channels, depth, widen, torchdistill=False):
    super().__init__()
    self.conv1 = conv(channels, 16, 3)
    width, num = 16, (depth - 4) // 6
    self.names = []
    for stage, base in enumerate((16, 32, 64), 1):
      block = TorchdistillWideBlock if torchdistill else WideBlock
      stride = 1 if stage == 1 else 2
      layer = stack(block, num, width, base * widen, stride)
      if not torchdistill:
        layer = nn.Sequential(collections.OrderedDict(layer=layer))
      self.names.append(f'{"layer" if torchdistill else "block"}{stage}')
      self.add_module(self.names[-1], layer)
      width = base * widen
    self.bn1 = nn.BatchNorm2d(width)
    self.fc = nn.Linear(width, num_classes)
    self.init_conv()
    nn.init.zeros_(self.fc.bias)

  def maps(self, images):
    stages = [self.conv1(images)]
    for name in self.names:
      stages.append(self.get_submodule(name)(stages[-1]))
    return stages, torch.relu(self.bn1(stages[-1]))


class Vgg(Net):
  """Blocks without their last ReLU, which follows outside of them."""

  head = 'classifier'

  def __init__(self, num_classes, channels, num_convs):
    super().__init__()
    for block, (width, num) in enumerate(
      zip((64, 128, 256, 512, 512), num_convs, strict=True)
    ):
      layers = []
      for _ in range(num):
        layers += [conv(channels, width, 3, bias=True), nn.BatchNorm2d(width)]
        layers += [nn.ReLU()]
        channels = width
      self.add_module(f'block{block}', nn.Sequential(*layers[:-1]))
    self.classifier = nn.Linear(512, num_classes)
    self.init_conv(std_of_head=0.01)

  def maps(self, images):
    x = torch.relu(self.block0(images))
    stages = [x]
    for block in (self.block1, self.block2, self.block3, self.block4):
      if len(stages) < 4 or images.shape[2] >= 64:
        x = nn.functional.max_pool2d(x, 2, 2)
      x = torch.relu(block(x))
      stages.append(x)
    return stages, x


class InvertedResidual(nn.Module):
  """Widens, convolves each channel, narrows, without a last activation."""

  def __init__(self, channels, width, stride, expansion):
    super().__init__()
    inner = channels * expansion
    self.conv = nn.Sequential(
      conv(channels, inner),
      nn.BatchNorm2d(inner),
      nn.ReLU(),
      conv(inner, inner, 3, stride, inner),
      nn.BatchNorm2d(inner),
      nn.ReLU(),
      conv(inner, width),
      nn.BatchNorm2d(width),
    )
    self.adds = stride == 1 and channels == width

  def forward(self, x):
    return x + self.conv(x) if self.adds else self.conv(x)


class CifarMobileNetV2(Net):
  """Of the expansions, all but the first group's are six."""

  head = 'classifier.0'
  settings = ((1, 16, 1, 1), (6, 24, 2, 1), (6, 32, 3, 2), (6, 64, 4, 2))
  settings += ((6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))

  def __init__(self, num_classes, channels, width):
    super().__init__()
    features = int(32 * width)
    self.conv1 = nn.Sequential(
      conv(channels, features, 3, 2), nn.BatchNorm2d(features), nn.ReLU()
    )
    groups = []
    for expansion, base, num, stride in self.settings:
      block = functools.partial(InvertedResidual, expansion=expansion)
      groups.append(stack(block, num, features, int(base * width), stride))
      features = int(base * width)
    self.blocks = nn.Sequential(*groups)
    self.conv2 = nn.Sequential(
      conv(features, 1280), nn.BatchNorm2d(1280), nn.ReLU()
    )
    self.classifier = nn.Sequential(nn.Linear(1280, num_classes))
    self.init_conv(std_of_head=0.01)

  def maps(self, images):
    x = self.conv1(images)
    stages = [x]
    for index, group in enumerate(self.blocks):
      x = group(x)
      if index in (1, 2, 4, 6):
        stages.append(x)
    return stages, self.conv2(x)


class GroupedUnit(nn.Module):
  """A unit of ShuffleNetV1: joined to the average where it strides."""

  def __init__(self, channels, width, stride):
    super().__init__()
    self.stride = stride
    if stride == 2:
      width -= channels
    inner = width // 4
    self.groups = 1 if channels == 24 else 3
    self.conv1 = conv(channels, inner, groups=self.groups)
    self.bn1 = nn.BatchNorm2d(inner)
    self.conv2 = conv(inner, inner, 3, stride, inner)
    self.bn2 = nn.BatchNorm2d(inner)
    self.conv3, self.bn3 = conv(inner, width, groups=3), nn.BatchNorm2d(width)

  def forward(self, x):
    y = shuffle(torch.relu(self.bn1(self.conv1(x))), self.groups)
    y = self.bn3(self.conv3(torch.relu(self.bn2(self.conv2(y)))))
    if self.stride == 1:
      return torch.relu(x + y)
    x = nn.functional.avg_pool2d(x, 3, 2, 1)
    return torch.relu(torch.cat([y, x], 1))


class CifarShuffleNetV1(Net):
  """Units of three groups."""

  head = 'linear'

  def __init__(self, num_classes, channels):
    super().__init__()
    self.conv1, self.bn1 = conv(channels, 24), nn.BatchNorm2d(24)
    self.layer1 = stack(GroupedUnit, 4, 24, 240, 2)
    self.layer2 = stack(GroupedUnit, 8, 240, 480, 2)
    self.layer3 = stack(GroupedUnit, 4, 480, 960, 2)
    self.linear = nn.Linear(960, num_classes)

  def maps(self, images):
    stages = [torch.relu(self.bn1(self.conv1(images)))]
    for layer in (self.layer1, self.layer2, self.layer3):
      stages.append(layer(stages[-1]))
    return stages, stages[-1]


class SplitUnit(nn.Module):
  """A unit of ShuffleNetV2: half of the channels pass, but where it strides."""

  def __init__(self, channels, width, stride):
    super().__init__()
    half, self.stride = width // 2, stride
    if stride == 1:
      self.conv1, self.bn1 = conv(half, half), nn.BatchNorm2d(half)
      self.conv2 = conv(half, half, 3, 1, half)
      self.bn2 = nn.BatchNorm2d(half)
      self.conv3, self.bn3 = conv(half, half), nn.BatchNorm2d(half)
      return
    self.conv1 = conv(channels, channels, 3, 2, channels)
    self.bn1 = nn.BatchNorm2d(channels)
    self.conv2, self.bn2 = conv(channels, half), nn.BatchNorm2d(half)
    self.conv3, self.bn3 = conv(channels, half), nn.BatchNorm2d(half)
    self.conv4, self.bn4 = conv(half, half, 3, 2, half), nn.BatchNorm2d(half)
    self.conv5, self.bn5 = conv(half, half), nn.BatchNorm2d(half)

  def forward(self, x):
    if self.stride == 1:
      left, right = x.chunk(2, 1)
      right = torch.relu(self.bn1(self.conv1(right)))
      right = torch.relu(self.bn3(self.conv3(self.bn2(self.conv2(right)))))
    else:
      left = torch.relu(self.bn2(self.conv2(self.bn1(self.conv1(x)))))
      right = torch.relu(self.bn3(self.conv3(x)))
      right = torch.relu(self.bn5(self.conv5(self.bn4(self.conv4(right)))))
    return shuffle(torch.cat([left, right], 1), 2)


class CifarShuffleNetV2(Net):
  """Three stages and a last convolution."""

  head = 'linear'

  def __init__(self, num_classes, channels, widths):
    super().__init__()
    self.conv1, self.bn1 = conv(channels, 24), nn.BatchNorm2d(24)
    self.layer1 = stack(SplitUnit, 4, 24, widths[0], 2)
    self.layer2 = stack(SplitUnit, 8, widths[0], widths[1], 2)
    self.layer3 = stack(SplitUnit, 4, widths[1], widths[2], 2)
    self.conv2 = conv(widths[2], widths[3])
    self.bn2 = nn.BatchNorm2d(widths[3])
    self.linear = nn.Linear(widths[3], num_classes)

  def maps(self, images):
    stages = [torch.relu(self.bn1(self.conv1(images)))]
    for layer in (self.layer1, self.layer2, self.layer3):
      stages.append(layer(stages[-1]))
    return stages, torch.relu(self.bn2(self.conv2(stages[-1])))


class MobileNetV1(Net):
  """Thirteen separable convolutions after a stem."""

  def __init__(self, num_classes, channels):
    super().__init__()
    layers = [
      nn.Sequential(conv(channels, 32, 3, 2), nn.BatchNorm2d(32), nn.ReLU())
    ]
    channels = 32
    widths = (64, 128, 128, 256, 256, *[512] * 6, 1024, 1024)
    for index, width in enumerate(widths, 1):
      stride = 2 if index in (2, 4, 6, 12) else 1
      layers.append(
        nn.Sequential(
          conv(channels, channels, 3, stride, channels),
          nn.BatchNorm2d(channels),
          nn.ReLU(),
          conv(channels, width),
          nn.BatchNorm2d(width),
          nn.ReLU(),
        )
      )
      channels = width
    self.model = nn.Sequential(*layers)
    self.fc = nn.Linear(1024, num_classes)

  def maps(self, images):
    x, stages = images, []
    for index, layer in enumerate(self.model):
      x = layer(x)
      if index in (3, 5, 11, 13):
        stages.append(x)
    return stages, x


CIFAR_RESNETS = {
  '': ((8, 14, 20, 32, 38, 44, 56, 110, 116), (16, 16, 32, 64)),
  'x2': ((14, 38, 110), (16, 32, 64, 128)),
  'x4': ((8, 14, 32, 38), (32, 64, 128, 256)),
}
WIDE_RESNETS = ((16, 1), (16, 2), (16, 4), (28, 2), (28, 4), (40, 1), (40, 2))
VGGS = {
  8: (1, 1, 1, 1, 1),
  11: (1, 1, 2, 2, 2),
  13: (2, 2, 2, 2, 2),
  16: (2, 2, 3, 3, 3),
  19: (2, 2, 4, 4, 4),
}
SHUFFLENETS_V2 = {
  'x0_5': (48, 96, 192, 1024),
  'x1_0': (116, 232, 464, 1024),
  'x1_5': (176, 352, 704, 1024),
  'x2_0': (244, 488, 976, 2048),
}
# Constructors that take the numbers of classes and of channels.
OURS = {
  **{
    f'resnet{depth}{suffix}': functools.partial(
      CifarResNet, depth=depth, widths=widths
    )
    for suffix, (depths, widths) in CIFAR_RESNETS.items()
    for depth in depths
  },
  **{
    f'wrn_{depth}_{widen}': functools.partial(
      WideResNet, depth=depth, widen=widen
    )
    for depth, widen in WIDE_RESNETS
  },
  **{
    f'torchdistill_wrn_{depth}_{widen}': functools.partial(
      WideResNet, depth=depth, widen=widen, torchdistill=True
    )
    for depth, widen in ((16, 8), (28, 10), (40, 4))
  },
  **{
    f'vgg{depth}': functools.partial(Vgg, num_convs=num_convs)
    for depth, num_convs in VGGS.items()
  },
  'resnet18_cifar': functools.partial(
    FourStages,
    block=functools.partial(BasicBlock, shortcut='shortcut'),
    num_blocks=(2, 2, 2, 2),
    expansion=1,
  ),
  'resnet50_cifar': functools.partial(
    FourStages, block=Bottleneck, num_blocks=(3, 4, 6, 3), expansion=4
  ),
  'mobilenet_v2_cifar_x0_5': functools.partial(CifarMobileNetV2, width=0.5),
  'mobilenet_v2_cifar_x1_0': functools.partial(CifarMobileNetV2, width=1),
  'shufflenet_v1_cifar': CifarShuffleNetV1,
  **{
    f'shufflenet_v2_cifar_{scale}': functools.partial(
      CifarShuffleNetV2, widths=widths
    )
    for scale, widths in SHUFFLENETS_V2.items()
  },
  'mobilenet_v1': MobileNetV1,
}
# Of timm, the modules that end the stages of outputs.Features.
_EFFICIENTNET = ('bn1', 'blocks.1', 'blocks.2', 'blocks.4', 'blocks.6')
_MOBILENET_V4 = ('bn1', 'blocks.0', 'blocks.1', 'blocks.2', 'blocks.3')
_CONVNEXT = ('stages.0', 'stages.1', 'stages.2', 'stages.3')
TIMM_STAGES = {
  'mobilenetv3_large_100': (*_EFFICIENTNET[:-1], 'blocks.5'),
  'mobilenetv4_conv_small': _MOBILENET_V4,
  'mobilenetv4_conv_medium': _MOBILENET_V4,
  'tf_efficientnet_lite0': _EFFICIENTNET,
  'tf_efficientnet_lite1': _EFFICIENTNET,
  'tf_efficientnet_lite2': _EFFICIENTNET,
  'efficientnet_b0': _EFFICIENTNET,
  'convnext_atto': _CONVNEXT,
  'convnext_femto': _CONVNEXT,
  'regnety_004': ('stem', 's1', 's2', 's3', 's4'),
}
# Where torchvision's have the convolution that reads the images.
TORCHVISION_STEMS = {
  'mobilenet': 'features.0.0',
  'shufflenet': 'conv1.0',
  'res': 'conv1',
  'wide': 'conv1',
}


TRANSFORMERS = ('deit', 'vit')


def build(
  name: str, num_classes: int, channels: int = 3, image_size: int = 224
) -> nn.Module:
  """Returns the network that models.BACKBONES calls so, freshly drawn.

  Args:
    name: a key of models.BACKBONES.
    num_classes: of its head.
    channels: of the images.
    image_size: side of the images; only a DeiT or ViT depends on it.
  """
  if name in OURS:
    return OURS[name](num_classes, channels)
  if name in TIMM_STAGES:
    return timm.create_model(name, num_classes=num_classes, in_chans=channels)
  if name.startswith(TRANSFORMERS):
    return timm.create_model(
      name, num_classes=num_classes, in_chans=channels, img_size=image_size
    )
  net = torchvision.models.get_model(name, num_classes=num_classes)
  if channels != 3:
    path = TORCHVISION_STEMS[
      next(start for start in TORCHVISION_STEMS if name.startswith(start))
    ]
    old = net.get_submodule(path)
    new = nn.Conv2d(
      channels,
      old.out_channels,
      old.kernel_size,
      old.stride,
      old.padding,
      bias=False,
    )
    net.set_submodule(path, new)
  return net


def _resnet_maps(net, images):
  stages = [net.maxpool(torch.relu(net.bn1(net.conv1(images))))]
  for layer in (net.layer1, net.layer2, net.layer3, net.layer4):
    stages.append(layer(stages[-1]))
  return stages, stages[-1]


def _mobilenet_maps(net, images, ends):
  x, stages = images, []
  for index, layer in enumerate(net.features):
    x = layer(x)
    if index in ends:
      stages.append(x)
  return stages, x


def _shufflenet_maps(net, images):
  stages = [net.maxpool(net.conv1(images))]
  for layer in (net.stage2, net.stage3, net.stage4):
    stages.append(layer(stages[-1]))
  return stages, net.conv5(stages[-1])


def _timm_maps(net, name, images):
  stages = {}
  hooks = [
    net.get_submodule(path).register_forward_hook(
      lambda module, inputs, y, path=path: stages.__setitem__(path, y)
    )
    for path in TIMM_STAGES[name]
  ]
  final = net.forward_features(images)
  for hook in hooks:
    hook.remove()
  return [stages[path] for path in TIMM_STAGES[name]], final


def _maps(net, name, images):
  if name in OURS:
    return net.maps(images)
  if name in TIMM_STAGES:
    return _timm_maps(net, name, images)
  if name.startswith('mobilenet_v2'):
    return _mobilenet_maps(net, images, (0, 3, 6, 13, 17))
  if name.startswith('mobilenet_v3'):
    return _mobilenet_maps(net, images, (0, 1, 3, 8, 11))
  if name.startswith('shufflenet'):
    return _shufflenet_maps(net, images)
  return _resnet_maps(net, images)


@torch.no_grad()
def features(net: nn.Module, name: str, images) -> dict:
  """Returns what a network makes of images, in inference.

  Args:
    net: as `build` makes it.
    name: by which it was built.
    images: (B, C, H, W) float32.

  Returns:
    'stages', a list of maps (B, C, H, W) as those of outputs.Features; 'final',
    'pooled' and 'logits'. The logits are those of the network's own forward.
  """
  net.eval()
  if name.startswith(TRANSFORMERS):
    quarters = [len(net.blocks) * i // 4 - 1 for i in (1, 2, 3, 4)]
    tokens, stages = net.forward_intermediates(images, indices=quarters)
    pooled = tokens[:, 0]
    final = tokens[:, 1:].transpose(1, 2).reshape(stages[-1].shape)
  else:
    stages, final = _maps(net, name, images)
    pooled = final.mean((2, 3))
    if name in TIMM_STAGES:
      pooled = net.forward_head(final, pre_logits=True).flatten(1)
    elif name.startswith('mobilenet_v3'):
      pooled = net.classifier[1](net.classifier[0](pooled))
  return {
    'stages': stages,
    'final': final,
    'pooled': pooled,
    'logits': net(images),
  }


@torch.no_grad()
def randomize(net: nn.Module, seed: int) -> nn.Module:
  """Draws all that a network holds, so that no number of it is without effect.

  Batch norms get the statistics of noise that passes the network, and some
  noise upon them: the activations stay of order 1 in deep networks as well.

  Args:
    net: as `build` makes it; its batch norms follow 64 x 64 images.
    seed: of all that is drawn.

  Returns:
    The network itself, in inference mode.
  """
  generator = torch.Generator().manual_seed(seed)

  def noise(like, scale=1.0):
    return scale * torch.randn(like.shape, generator=generator)

  norms, branches, stem = [], [], None
  for module in net.modules():
    if isinstance(module, nn.Conv2d | nn.Linear):
      stem = stem or module
      # A network without batch norm adds up what its layers give.
      gain = 2 if isinstance(module, nn.Conv2d) else 1
      fan_in = module.weight[0].numel()
      module.weight.copy_(noise(module.weight, (gain / fan_in) ** 0.5))
      if module.bias is not None:
        module.bias.copy_(noise(module.bias, 0.1))
    elif isinstance(module, nn.BatchNorm2d | nn.LayerNorm):
      module.weight.copy_(1 + noise(module.weight, 0.2))
      module.bias.copy_(noise(module.bias, 0.2))
    if isinstance(module, nn.BatchNorm2d):
      norms.append(module)
    if isinstance(module, RESIDUAL_BLOCKS):
      branches.append(module)
  for block in branches:  # Rounding errors would grow from block to block.
    getattr(block, 'bn3', block.bn2).weight.mul_(0.3)
  for parameter in net.parameters(recurse=False):  # Tokens of a DeiT.
    parameter.copy_(noise(parameter))
  if norms:
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
      norm.momentum = 1.0
    images = torch.randn(4, stem.in_channels, 64, 64, generator=generator)
    net.train()(images)
    for norm, momentum in zip(norms, momenta, strict=True):
      norm.momentum = momentum
      std = norm.running_var.clamp(min=0.1).sqrt()
      norm.running_mean += std * noise(std, 0.2)
      norm.running_var.copy_((std * (1 + noise(std, 0.1).abs())) ** 2)
      norm.num_batches_tracked.zero_()
  return net.eval()
