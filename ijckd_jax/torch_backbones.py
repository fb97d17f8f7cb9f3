"""Backbones as PyTorch modules: their text, with their numbers in it.

Layers have their published names. What is written for a backbone, in the fewest
lines that are easy to read, is part of a file of torch_students.
"""

from collections.abc import Callable
import itertools
import re

from ijckd_jax import config_utils
from ijckd_jax import models
from ijckd_jax.models import mobilenet_v1
from ijckd_jax.models import mobilenet_v2
from ijckd_jax.models import mobilenet_v3
from ijckd_jax.models import shufflenet_v1
from ijckd_jax.models import shufflenet_v2

MAX_COLUMNS = 88
INDENTED = MAX_COLUMNS - 4  # Inside of a method.

# The first of a backbone's lines; those after it name its children.
START = 'b = self.backbone = nn.Sequential()'
STEP = """
def step(c, width, kernel=1, stride=1, groups=1):
  conv = nn.Conv2d(c, width, kernel, stride, kernel // 2, 1, groups, bias=False)
  return conv, nn.BatchNorm2d(width)
"""
BASIC_BLOCK = """
class Block(nn.Module):
  def __init__(self, c, width, stride=1):
    super().__init__()
    self.conv1, self.bn1 = step(c, width, 3, stride)
    self.conv2, self.bn2 = step(width, width, 3)
    change = step(c, width, 1, stride) if stride > 1 or c != width else ()
    self.downsample = nn.Sequential(*change)

  def forward(self, x):
    y = self.bn1(self.conv1(x)).relu()
    return (self.bn2(self.conv2(y)) + self.downsample(x)).relu()
"""
BOTTLENECK = """
class Block(nn.Module):
  def __init__(self, c, inner, width, stride=1):
    super().__init__()
    self.conv1, self.bn1 = step(c, inner)
    self.conv2, self.bn2 = step(inner, inner, 3, stride, GROUPS)
    self.conv3, self.bn3 = step(inner, width)
    change = step(c, width, 1, stride) if stride > 1 or c != width else ()
    self.downsample = nn.Sequential(*change)

  def forward(self, x):
    y = self.bn1(self.conv1(x)).relu()
    y = self.bn2(self.conv2(y)).relu()
    return (self.bn3(self.conv3(y)) + self.downsample(x)).relu()
"""
WIDE_BLOCK = """
class Block(nn.Module):
  def __init__(self, c, width, stride=1):
    super().__init__()
    self.bn1 = nn.BatchNorm2d(c)
    self.conv1, self.bn2 = step(c, width, 3, stride)
    self.conv2 = step(width, width, 3)[0]
    SHORTCUT

  def forward(self, x):
    y = self.bn1(x).relu()
    x = SHORTCUT_OF_X
    return x + self.conv2(self.bn2(self.conv1(y)).relu())
"""
# What a wide block has instead of SHORTCUT and SHORTCUT_OF_X.
WIDE_SHORTCUT = (
  'self.convShortcut = step(c, width, 1, stride)[0] if c != width else None',
  'self.convShortcut(y) if self.convShortcut else x',
)
TORCHDISTILL_SHORTCUT = (
  'change = step(c, width, 1, stride)[:1] if c != width else ()\n'
  '    self.shortcut = nn.Sequential(*change)',
  'self.shortcut(x)',
)
VGG_BLOCK = """
def block(c, width, num):
  layers = []
  for i in range(num):
    conv = nn.Conv2d(c if i == 0 else width, width, 3, padding=1)
    layers += [conv, nn.BatchNorm2d(width), nn.ReLU()]
  return nn.Sequential(*layers)
"""
SEPARABLE = """
def block(c, width, stride=1):
  depthwise = *step(c, c, 3, stride, c), nn.ReLU()
  return nn.Sequential(*depthwise, *step(c, width), nn.ReLU())
"""
RESIDUAL = """
class Residual(nn.Sequential):
  def forward(self, x):
    return x + super().forward(x)
"""
INVERTED = """
def block(c, width, stride=1, expansion=6):
  inner = c * expansion
  layers = [*step(c, inner), nn.ReLU(), *step(inner, inner, 3, stride, inner)]
  layers += [nn.ReLU(), *step(inner, width)]
  kind = Residual if stride == 1 and c == width else nn.Sequential
  return kind(OrderedDict(conv=nn.Sequential(*layers)))
"""
TORCHVISION_INVERTED = """
def block(c, width, stride=1, expansion=6):
  inner = c * expansion
  wide = [nn.Sequential(*step(c, inner), nn.ReLU6())] if expansion > 1 else []
  deep = nn.Sequential(*step(inner, inner, 3, stride, inner), nn.ReLU6())
  kind = Residual if stride == 1 and c == width else nn.Sequential
  layers = nn.Sequential(*wide, deep, *step(inner, width))
  return kind(OrderedDict(conv=layers))
"""
GATE = """
class Gate(nn.Sequential):
  def forward(self, x):
    return x * nn.functional.hardsigmoid(super().forward(x.mean((2, 3), True)))
"""
STEP_V3 = """
def step(c, width, act=nn.Identity, k=1, stride=1, groups=1, norm=(1e-3, 0.01)):
  conv = nn.Conv2d(c, width, k, stride, k // 2, 1, groups, bias=False)
  return nn.Sequential(conv, nn.BatchNorm2d(width, *norm), act())
"""
BLOCK_V3 = """
def block(c, inner, width, narrow=0, stride=1, kernel=5, act=nn.Hardswish):
  layers = [step(c, inner, act)] if inner != c else []
  layers += [step(inner, inner, act, kernel, stride, inner)]
  if narrow:
    fc1, fc2 = nn.Conv2d(inner, narrow, 1), nn.Conv2d(narrow, inner, 1)
    layers += [Gate(OrderedDict(fc1=fc1, relu=nn.ReLU(), fc2=fc2))]
  kind = Residual if stride == 1 and c == width else nn.Sequential
  return kind(OrderedDict(block=nn.Sequential(*layers, step(inner, width))))
"""
GROUPED_UNIT = """
class Unit(nn.Module):
  def __init__(self, c, width, stride=1, groups=3):
    super().__init__()
    width -= c if stride == 2 else 0
    inner = width // 4
    self.conv1, self.bn1 = step(c, inner, 1, 1, groups)
    self.conv2, self.bn2 = step(inner, inner, 3, stride, inner)
    self.conv3, self.bn3 = step(inner, width, 1, 1, 3)

  def forward(self, x):
    y = self.bn1(self.conv1(x)).relu().unflatten(1, (self.conv1.groups, -1))
    y = self.bn2(self.conv2(y.transpose(1, 2).flatten(1, 2))).relu()
    y = self.bn3(self.conv3(y))
    if self.conv2.stride == (1, 1):
      return (x + y).relu()
    return torch.cat([y, nn.functional.avg_pool2d(x, 3, 2, 1)], 1).relu()
"""
SPLIT_UNIT = """
class Unit(nn.ModuleDict):
  def __init__(self, c, width, stride=1):
    super().__init__()
    half, self.halves = width // 2, stride == 2
    c = c if self.halves else half
    both = [step(c, c, 3, 2, c), step(c, half)] if self.halves else []
    both += [step(c, half), step(half, half, 3, stride, half), step(half, half)]
    for i, (conv, norm) in enumerate(both, 1):
      act = nn.ReLU() if conv.groups == 1 else nn.Identity()
      self.update({f"conv{i}": conv, f"bn{i}": norm, f"act{i}": act})

  def forward(self, x):
    x, y = (x, x) if self.halves else x.chunk(2, 1)
    for i, layer in enumerate(self.values(), 9 - len(self)):
      x, y = (layer(x), y) if i < 0 else (x, layer(y))
    return torch.stack([x, y], 2).flatten(1, 2)
"""
BRANCHED_UNIT = """
class Unit(nn.Module):
  def __init__(self, c, width, stride=1):
    super().__init__()
    half, self.branch1, relu = width // 2, None, nn.ReLU()
    if stride == 2:
      self.branch1 = nn.Sequential(*step(c, c, 3, 2, c), *step(c, half), relu)
    first = *step(c if stride == 2 else half, half), relu
    middle = step(half, half, 3, stride, half)
    self.branch2 = nn.Sequential(*first, *middle, *step(half, half), relu)

  def forward(self, x):
    x, y = (self.branch1(x), x) if self.branch1 else x.chunk(2, 1)
    return torch.stack([x, self.branch2(y)], 2).flatten(1, 2)
"""
ATTENTION_BLOCK = """
class Block(nn.Module):
  def __init__(self):
    super().__init__()
    self.norm1, self.norm2 = nn.LayerNorm(W, 1e-6), nn.LayerNorm(W, 1e-6)
    self.attn = nn.ModuleDict(dict(qkv=nn.Linear(W, 3W), proj=nn.Linear(W, W)))
    self.mlp = nn.ModuleDict(dict(fc1=nn.Linear(W, 4W), fc2=nn.Linear(4W, W)))

  def forward(self, x):
    y = self.attn.qkv(self.norm1(x)).unflatten(2, HEADS).transpose(1, 3)
    y = nn.functional.scaled_dot_product_attention(*y.unbind(2))
    x = x + self.attn.proj(y.transpose(1, 2).flatten(2))
    return x + self.mlp.fc2(nn.functional.gelu(self.mlp.fc1(self.norm2(x))))
"""
TOKENS = """
class Backbone(nn.Module):
  def __init__(self):
    super().__init__()
    self.cls_token = nn.Parameter(torch.zeros(1, 1, W))
    self.pos_embed = nn.Parameter(torch.zeros(1, POSITIONS, W))
    self.patch_embed = nn.ModuleDict(dict(proj=nn.Conv2d(C, W, P, P)))
    self.blocks = nn.Sequential(*(Block() for _ in range(DEPTH)))

  def forward(self, images):
    x = self.patch_embed.proj(images).flatten(2).mT
    x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1)
    return self.blocks(x + self.pos_embed)[:, 1:].mT.unflatten(2, SIZE)
"""


def write(
  backbone: models.Backbone, size: tuple[int, int], channels: int
) -> tuple[list[str], list[str], int]:
  """Returns what makes a backbone in PyTorch.

  Args:
    backbone: of this package.
    size: (H, W) of its images.
    channels: of its images.

  Returns:
    The classes and functions that it needs, the lines of a module's
    `__init__` that make it `self.backbone`, and the channels of its last map.

  Raises:
    config_utils.UserError: it cannot be written.
  """
  if type(backbone) not in WRITERS:
    known = ', '.join(cls.__name__ for cls in WRITERS)
    raise config_utils.UserError(
      f'a {type(backbone).__name__} cannot be written as a PyTorch module: '
      f'that is for the backbones of this package ({known})'
    )
  tapped_late = (models.DeiT, models.MobileNetV3Small)
  if type(backbone) in tapped_late and not backbone.truncated:
    raise config_utils.UserError(
      f'a {type(backbone).__name__} student is written as a PyTorch module '
      "where it ends at its last stage (method.tap='stage')"
    )
  return WRITERS[type(backbone)](backbone, size, channels)


def call(function: str, arguments: list[str], end: str = ')') -> list[str]:
  """Returns the lines of a call, which is cut before some of its arguments."""
  words = [f'{function}(', *(f'{text},' for text in arguments)]
  words[-1] = words[-1].removesuffix(',') + end
  lines = [words[0]]
  for i, word in enumerate(words[1:]):
    space = ' ' if i else ''
    if len(lines[-1] + space + word) <= INDENTED:
      lines[-1] += space + word
    else:
      lines.append(f'  {word}')
  return lines


def _sequence(name, calls):
  """Returns the lines of an nn.Sequential; long runs in it become loops."""
  arguments = []
  for text, run in itertools.groupby(calls):
    num = len([*run])
    loop = [f'*({text} for _ in range({num}))']
    arguments += num * [text] if num < 3 else loop
  return call(f'{name} = nn.Sequential', arguments)


def _blocks(name, channels, width, stride, num, inner=''):
  """Returns the calls of a stage's blocks, of which the first may stride."""
  step = f', {stride}' if stride > 1 else ''
  first = f'{name}({channels}, {inner}{width}{step})'
  return [first, *(num - 1) * [f'{name}({width}, {inner}{width})']]


def _stem(channels, width, kernel):
  """Returns the lines that start a backbone with a convolution."""
  return [
    START,
    f'b.conv1, b.bn1, b.relu = *step({channels}, {width}, {kernel}), nn.ReLU()',
  ]


def _cifar_resnet(backbone, size, channels):
  del size
  width, *widths = backbone.widths
  lines = _stem(channels, width, 3)
  for i, wider in enumerate(widths, 1):
    stride, num = 1 if i == 1 else 2, (backbone.depth - 2) // 6
    lines += _sequence(
      f'b.layer{i}', _blocks('Block', width, wider, stride, num)
    )
    width = wider
  return [STEP, BASIC_BLOCK], lines, width


def _resnet(backbone, size, channels):
  del size
  block = BOTTLENECK if backbone.bottleneck else BASIC_BLOCK
  groups = f', {backbone.groups}' if backbone.groups > 1 else ''
  block = block.replace(', GROUPS', groups)
  lines, width = _stem(channels, 64, 3), 64
  if backbone.cifar:
    block = block.replace('downsample', 'shortcut')
  else:
    step = f'*step({channels}, 64, 7, 2), nn.ReLU(), nn.MaxPool2d(3, 2, 1)'
    lines = [START, f'b.conv1, b.bn1, b.act, b.max = {step}']
  for i, num in enumerate(backbone.num_blocks, 1):
    wider, inner, stride = 32 * 2**i, '', 1 if i == 1 else 2
    if backbone.bottleneck:
      inner, wider = f'{wider * backbone.inner_width}, ', 4 * wider
    calls = _blocks('Block', width, wider, stride, num, inner)
    lines += _sequence(f'b.layer{i}', calls)
    width = wider
  return [STEP, block], lines, width


def _wide_resnet(backbone, size, channels):
  del size
  num, width = (backbone.depth - 4) // 6, 16
  lines = [START, f'b.conv1 = step({channels}, 16, 3)[0]']
  for i, base in enumerate((16, 32, 64), 1):
    wider, stride = base * backbone.widen, 1 if i == 1 else 2
    name = f'b.layer{i}' if backbone.torchdistill else 'layer'
    lines += _sequence(name, _blocks('Block', width, wider, stride, num))
    if not backbone.torchdistill:
      lines.append(f'b.block{i} = nn.Sequential(OrderedDict(layer=layer))')
    width = wider
  if not backbone.truncated:
    lines.append(f'b.bn1, b.relu = nn.BatchNorm2d({width}), nn.ReLU()')
  made, used = TORCHDISTILL_SHORTCUT if backbone.torchdistill else WIDE_SHORTCUT
  block = WIDE_BLOCK.replace('SHORTCUT_OF_X', used).replace('SHORTCUT', made)
  return [STEP, block], lines, width


def _vgg(backbone, size, channels):
  lines = [START]
  widths = (64, 128, 256, 512, 512)
  for i, (width, num) in enumerate(
    zip(widths, backbone.num_convs, strict=True)
  ):
    name, block = f'b.block{i}', f'block({channels}, {width}, {num})'
    if 0 < i < 4 or (i == 4 and min(size) >= 64):
      name, block = f'b.pool{i}, {name}', f'nn.MaxPool2d(2), {block}'
    lines.append(f'{name} = {block}')
    channels = width
  return [VGG_BLOCK], lines, channels


def _mobilenet_v1(backbone, size, channels):
  del backbone, size
  calls, width = [f'nn.Sequential(*step({channels}, 32, 3, 2), nn.ReLU())'], 32
  for wider, stride in mobilenet_v1.BLOCKS:
    calls += _blocks('block', width, wider, stride, 1)
    width = wider
  return [STEP, SEPARABLE], [START, *_sequence('b.model', calls)], width


def _mobilenet_v2(backbone, size, channels):
  del size
  cifar, act = backbone.cifar, 'nn.ReLU()' if backbone.cifar else 'nn.ReLU6()'
  width = int(32 * backbone.width)
  stem = f'nn.Sequential(*step({channels}, {width}, 3, 2), {act})'
  groups = []
  for i, (expansion, base, num, stride) in enumerate(mobilenet_v2.GROUPS):
    wider = int(base * backbone.width)
    stride = 1 if cifar and i == 1 else stride
    groups.append(_blocks('block', width, wider, stride, num))
    if expansion == 1:
      groups[-1] = [f'block({width}, {wider}, {stride}, 1)']
    width = wider
  last = []
  if not backbone.truncated:
    wider = mobilenet_v2.LAST_WIDTH
    last = [f'nn.Sequential(*step({width}, {wider}), {act})']
    width = wider
  if not cifar:
    lines = _sequence('b.features', [stem, *itertools.chain(*groups), *last])
    return [STEP, RESIDUAL, TORCHVISION_INVERTED], [START, *lines], width
  groups = [f'nn.Sequential({", ".join(group)})' for group in groups]
  lines = [START, f'b.conv1 = {stem}', *_sequence('b.blocks', groups)]
  lines += [f'b.conv2 = {text}' for text in last]
  return [STEP, RESIDUAL, INVERTED], lines, width


def _mobilenet_v3(backbone, size, channels):
  del backbone, size
  calls, width = [f'step({channels}, 16, nn.Hardswish, 3, 2)'], 16
  for kernel, inner, wider, squeezes, swishes, stride in mobilenet_v3.BLOCKS:
    # A quarter, rounded to a multiple of eight: upwards, for these widths.
    narrow = -(-inner // 32) * 8 if squeezes else 0
    numbers = ', '.join(map(str, (width, inner, wider, narrow, stride)))
    more = '' if swishes else f', {kernel}, nn.ReLU'
    calls.append(f'block({numbers}{more})')
    width = wider
  start = 'self.backbone = nn.Sequential(OrderedDict(features=nn.Sequential'
  helpers = [GATE, RESIDUAL, STEP_V3, BLOCK_V3]
  return helpers, call(start, calls, end=')))'), width


def _shufflenet_v1(backbone, size, channels):
  del backbone, size
  width = shufflenet_v1.STEM_WIDTH
  lines = _stem(channels, width, 1)
  for i, (wider, num) in enumerate(shufflenet_v1.STAGES, 1):
    calls = _blocks('Unit', width, wider, 2, num)
    if i == 1:  # The stem's channels are too few to be grouped.
      calls[0] = f'Unit({width}, {wider}, 2, 1)'
    lines += _sequence(f'b.layer{i}', calls)
    width = wider
  return [STEP, GROUPED_UNIT], lines, width


def _shufflenet_v2(backbone, size, channels):
  del size
  cifar, width = backbone.cifar, shufflenet_v2.STEM_WIDTH
  lines = _stem(channels, width, 1)
  if not cifar:
    stem = f'nn.Sequential(*step({channels}, {width}, 3, 2), nn.ReLU())'
    lines = [START, f'b.conv1 = {stem}', 'b.maxpool = nn.MaxPool2d(3, 2, 1)']
  *widths, last = backbone.widths
  for i, (wider, num) in enumerate(
    zip(widths, shufflenet_v2.NUM_UNITS, strict=True), 1
  ):
    name = f'b.layer{i}' if cifar else f'b.stage{i + 1}'
    lines += _sequence(name, _blocks('Unit', width, wider, 2, num))
    width = wider
  if not backbone.truncated:
    layers = f'*step({width}, {last}), nn.ReLU()'
    if cifar:
      lines.append(f'b.conv2, b.bn2, b.relu2 = {layers}')
    else:
      lines.append(f'b.conv5 = nn.Sequential({layers})')
    width = last
  return [STEP, SPLIT_UNIT if cifar else BRANCHED_UNIT], lines, width


def _deit(backbone, size, channels):
  width, heads = backbone.width, backbone.num_heads
  rows, columns = (side // backbone.patch for side in size)
  helpers = []
  for text in (ATTENTION_BLOCK, TOKENS):
    for name, value in {
      'HEADS': (3, heads, width // heads),
      'SIZE': (rows, columns),
      'POSITIONS': 1 + rows * columns,
      'C': channels,
      'P': backbone.patch,
      'DEPTH': backbone.depth,
      '4W': 4 * width,
      '3W': 3 * width,
      'W': width,
    }.items():
      text = re.sub(rf'\b{name}\b', str(value), text)
    helpers.append(text)
  return helpers, ['self.backbone = Backbone()'], width


WRITERS: dict[type, Callable] = {
  models.CifarResNet: _cifar_resnet,
  models.WideResNet: _wide_resnet,
  models.Vgg: _vgg,
  models.ResNet: _resnet,
  models.MobileNetV1: _mobilenet_v1,
  models.MobileNetV2: _mobilenet_v2,
  models.MobileNetV3Small: _mobilenet_v3,
  models.ShuffleNetV1: _shufflenet_v1,
  models.ShuffleNetV2: _shufflenet_v2,
  models.DeiT: _deit,
}
