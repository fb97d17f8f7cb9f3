"""Backbones as PyTorch modules: the expression that makes one, as text.

It uses what `blocks` defines. Layers have their published names.
"""

from collections.abc import Callable
from collections.abc import Sequence
import itertools
import textwrap

from ijckd_jax import models
from ijckd_jax.models import mobilenet_v1
from ijckd_jax.models import mobilenet_v2
from ijckd_jax.models import mobilenet_v3
from ijckd_jax.models import shufflenet_v1
from ijckd_jax.models import shufflenet_v2
from ijckd_jax.runtime import config_utils


def write(
  backbone: models.Backbone, size: tuple[int, int], channels: int
) -> str:
  """Returns the expression that makes a backbone in PyTorch.

  Args:
    backbone: of this package.
    size: (H, W) of its images.
    channels: of its images.

  Raises:
    config_utils.UserError: it cannot be written.
  """
  kind = type(backbone)
  if kind not in WRITERS:
    known = ', '.join(cls.__name__ for cls in WRITERS)
    raise config_utils.UserError(
      f'a {kind.__name__} cannot be written as a PyTorch module: that is for '
      f'{known}; give ijckd export the format onnx or stablehlo'
    )
  if kind in (models.DeiT, models.MobileNetV3Small) and not backbone.truncated:
    raise config_utils.UserError(
      f'a {kind.__name__} student is written as a PyTorch module where it ends '
      "at a stage (method.tap='stage', or one by its number)"
    )
  return WRITERS[kind](backbone, size, channels)


def sequential(layers: list[str] | dict[str, str]) -> str:
  """Returns the call of nn.Sequential on layers, which may have names."""
  if isinstance(layers, list):
    return _call('nn.Sequential', layers)
  named = [f'{name}={layer}' for name, layer in layers.items()]
  return _call('nn.Sequential', [_call('OrderedDict', named)])


def _call(function, arguments):
  """Returns a call with a line for each argument."""
  lines = ''.join(f'{argument},\n' for argument in arguments)
  start = '\n' if lines else ''
  return f'{function}({start}{textwrap.indent(lines, "  ")})'


def _stem(channels, width, kernel, stride=1):
  """Returns a first convolution, its batch norm and ReLU."""
  return {
    'conv1': f'conv({channels}, {width}, {kernel}, stride={stride})',
    'bn1': f'nn.BatchNorm2d({width})',
    'relu': 'nn.ReLU()',
  }


def _stage(block, num_blocks, channels, width, stride, options=''):
  """Returns a stage of blocks, of which the first has the stride."""
  numbers = f'{num_blocks}, {channels}, {width}, stride={stride}'
  return f'stage({block}, {numbers}{options})'


def _stages(block, num_blocks, widths, first_stride=1, options=''):
  """Returns stages by name, one for each two widths that stand side by side.

  `widths` starts with what the first one takes.
  """
  pairs = itertools.pairwise(widths)
  numbers = zip(num_blocks, pairs, (first_stride, 2, 2, 2), strict=False)
  return {
    f'layer{i}': _stage(block, num, *pair, stride, options)
    for i, (num, pair, stride) in enumerate(numbers, 1)
  }


def _up_to_tap(backbone, layers: Sequence, ends: Sequence[int]) -> Sequence:
  """Returns the layers that a backbone has.

  Args:
    backbone: ends at a stage, or is whole.
    layers: of the whole backbone, from the first one after its stem.
    ends: how many of the layers there are up to the end of each stage.
  """
  if backbone.num_stages is None:
    return layers
  return layers[: ends[backbone.num_stages - 1]]


def _cifar_resnet(backbone, size, channels):
  del size
  widths = backbone.widths[: backbone.num_stages]
  stages = _stages('BasicBlock', 3 * [(backbone.depth - 2) // 6], widths)
  return sequential(_stem(channels, widths[0], 3) | stages)


def _resnet(backbone, size, channels):
  del size
  block, widths, options = 'BasicBlock', (64, 64, 128, 256, 512), ''
  if backbone.bottleneck:
    block, widths = 'Bottleneck', (64, 256, 512, 1024, 2048)
    options = f', inner_width={backbone.inner_width}, groups={backbone.groups}'
  layers = _stem(channels, 64, 3)
  if not backbone.cifar:
    layers = _stem(channels, 64, 7, 2) | {'maxpool': 'nn.MaxPool2d(3, 2, 1)'}
  widths = widths[: backbone.num_stages]
  stages = _stages(block, backbone.num_blocks, widths, options=options)
  return sequential(layers | stages)


def _wide_resnet(backbone, size, channels):
  del size
  widths = [16, *(base * backbone.widen for base in (16, 32, 64))]
  block = 'TorchdistillWideBlock' if backbone.torchdistill else 'WideBlock'
  widths = widths[: backbone.num_stages]
  layers = _stages(block, 3 * [(backbone.depth - 4) // 6], widths)
  if not backbone.torchdistill:
    layers = {
      name.replace('layer', 'block'): sequential({'layer': stage})
      for name, stage in layers.items()
    }
  if not backbone.truncated:
    layers |= {'bn1': f'nn.BatchNorm2d({widths[-1]})', 'relu': 'nn.ReLU()'}
  return sequential({'conv1': f'conv({channels}, 16, 3)'} | layers)


def _vgg(backbone, size, channels):
  layers, widths = {}, (64, 128, 256, 512, 512)
  for i, width in enumerate(widths[: backbone.num_stages]):
    if 0 < i < 4 or (i == 4 and min(size) >= 64):
      layers[f'pool{i}'] = 'nn.MaxPool2d(2)'
    numbers = f'{channels}, {width}, {backbone.num_convs[i]}'
    layers[f'block{i}'] = f'vgg_block({numbers})'
    channels = width
  return sequential(layers)


def _mobilenet_v1(backbone, size, channels):
  del size
  layers, width = [f'conv_act({channels}, 32, 3, stride=2)'], 32
  blocks, ends = mobilenet_v1.BLOCKS, mobilenet_v1.STAGE_ENDS
  for wider, stride in _up_to_tap(backbone, blocks, ends):
    layers.append(f'separable({width}, {wider}, stride={stride})')
    width = wider
  return sequential({'model': sequential(layers)})


def _mobilenet_v2(backbone, size, channels):
  del size
  block, act = 'InvertedResidual', ''
  if not backbone.cifar:
    block, act = 'TorchvisionInvertedResidual', ', act=nn.ReLU6'
  width, stages = int(32 * backbone.width), []
  stem = f'conv_act({channels}, {width}, 3, stride=2{act})'
  ends = (0, *(group + 1 for group in mobilenet_v2.STAGE_ENDS))
  groups = _up_to_tap(backbone, mobilenet_v2.GROUPS, ends)
  for i, (expansion, base, num, stride) in enumerate(groups):
    stride = 1 if backbone.cifar and i == 1 else stride
    wider, options = int(base * backbone.width), f', expansion={expansion}'
    stages.append(_stage(block, num, width, wider, stride, options))
    width = wider
  last = f'conv_act({width}, {mobilenet_v2.LAST_WIDTH}{act})'
  if backbone.cifar:
    layers = {'conv1': stem, 'blocks': sequential(stages), 'conv2': last}
    if backbone.truncated:
      del layers['conv2']
    return sequential(layers)
  layers = [stem, *(f'*{stage}' for stage in stages), last]
  if backbone.truncated:
    layers.pop()
  return sequential({'features': sequential(layers)})


def _mobilenet_v3(backbone, size, channels):
  del size
  layers, width = [f'conv_act_v3({channels}, 16, 3, 2, act=nn.Hardswish)'], 16
  ends = (0, *mobilenet_v3.STAGE_ENDS)
  blocks = _up_to_tap(backbone, mobilenet_v3.BLOCKS, ends)
  for kernel, inner, wider, squeezes, swishes, stride in blocks:
    numbers = f'{width}, {inner}, {wider}, {kernel}, stride={stride}'
    squeeze = mobilenet_v3.round_to_eight(inner / 4) if squeezes else 0
    act = 'nn.Hardswish' if swishes else 'nn.ReLU'
    layers.append(
      f'InvertedResidualV3({numbers}, squeeze={squeeze}, act={act})'
    )
    width = wider
  return sequential({'features': sequential(layers)})


def _shufflenet_v1(backbone, size, channels):
  del size
  widths, num_units = zip(*shufflenet_v1.STAGES, strict=True)
  widths = (shufflenet_v1.STEM_WIDTH, *widths)[: backbone.num_stages]
  stages = _stages('GroupedUnit', num_units, widths, first_stride=2)
  return sequential(_stem(channels, widths[0], 1) | stages)


def _shufflenet_v2(backbone, size, channels):
  del size
  widths, cifar = (shufflenet_v2.STEM_WIDTH, *backbone.widths), backbone.cifar
  block = 'SplitUnit' if cifar else 'BranchedUnit'
  built = widths[:4][: backbone.num_stages]
  stages = _stages(block, shufflenet_v2.NUM_UNITS, built, first_stride=2)
  if cifar:
    layers = _stem(channels, widths[0], 1) | stages
    last = {
      'conv2': f'conv({widths[3]}, {widths[4]})',
      'bn2': f'nn.BatchNorm2d({widths[4]})',
      'relu2': 'nn.ReLU()',
    }
  else:
    layers = {
      'conv1': f'conv_act({channels}, {widths[0]}, 3, stride=2)',
      'maxpool': 'nn.MaxPool2d(3, 2, 1)',
    }
    # torchvision counts the stem as its first stage.
    layers |= {f'stage{i}': s for i, s in enumerate(stages.values(), 2)}
    last = {'conv5': f'conv_act({widths[3]}, {widths[4]})'}
  return sequential(layers if backbone.truncated else layers | last)


def _deit(backbone, size, channels):
  fields = {'channels': channels, 'size': tuple(size)}
  for name in ('patch', 'width', 'depth', 'num_heads'):
    fields[name] = getattr(backbone, name)
  ends = [quarter * backbone.depth // 4 for quarter in (1, 2, 3, 4)]
  fields['depth'] = len(_up_to_tap(backbone, range(backbone.depth), ends))
  return _call('DeiT', [f'{name}={value}' for name, value in fields.items()])


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
