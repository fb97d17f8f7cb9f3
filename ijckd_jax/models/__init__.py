"""Backbones by their published names."""

from functools import partial

from ijckd_jax import config_utils
from ijckd_jax.models.backbone import Backbone
from ijckd_jax.models.resnet_cifar import ResNet
from ijckd_jax.models.wrn import WideResNet

X1 = (16, 16, 32, 64)
X2 = (16, 32, 64, 128)
X4 = (32, 64, 128, 256)

BACKBONES = {
  'resnet8': partial(ResNet, depth=8, widths=X1),
  'resnet14': partial(ResNet, depth=14, widths=X1),
  'resnet20': partial(ResNet, depth=20, widths=X1),
  'resnet32': partial(ResNet, depth=32, widths=X1),
  'resnet38': partial(ResNet, depth=38, widths=X1),
  'resnet44': partial(ResNet, depth=44, widths=X1),
  'resnet56': partial(ResNet, depth=56, widths=X1),
  'resnet110': partial(ResNet, depth=110, widths=X1),
  'resnet116': partial(ResNet, depth=116, widths=X1),
  'resnet14x2': partial(ResNet, depth=14, widths=X2),
  'resnet38x2': partial(ResNet, depth=38, widths=X2),
  'resnet110x2': partial(ResNet, depth=110, widths=X2),
  'resnet8x4': partial(ResNet, depth=8, widths=X4),
  'resnet14x4': partial(ResNet, depth=14, widths=X4),
  'resnet32x4': partial(ResNet, depth=32, widths=X4),
  'resnet38x4': partial(ResNet, depth=38, widths=X4),
  'wrn_16_1': partial(WideResNet, depth=16, widen=1),
  'wrn_16_2': partial(WideResNet, depth=16, widen=2),
  'wrn_40_1': partial(WideResNet, depth=40, widen=1),
  'wrn_40_2': partial(WideResNet, depth=40, widen=2),
}


def is_name(text: str) -> bool:
  """Returns whether a text names a backbone, rather than a path."""
  return text in BACKBONES or (':' in text and '/' not in text)


def build(name: str, **settings) -> Backbone:
  """Returns the backbone called `name`, or the one at `package.module:Name`.

  Args:
    name: a key of BACKBONES, or a reference to a constructor outside.
    **settings: `truncated`, `axis_name` and `dtype`, see Backbone.

  Raises:
    config_utils.UserError: there is no such backbone, or it is something else.
  """
  constructor = config_utils.resolve('backbone', name, BACKBONES)
  try:
    backbone = constructor(**settings)
  except TypeError as error:
    raise config_utils.UserError(
      f'{name!r} does not make a backbone: {error}'
    ) from error
  if not isinstance(backbone, Backbone):
    raise config_utils.UserError(
      f'{name!r} makes a {type(backbone).__name__}, which is not a '
      'models.Backbone'
    )
  return backbone
