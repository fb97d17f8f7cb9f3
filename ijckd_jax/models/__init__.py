"""Backbones by their published names, and losses on arrays.

A module of each family has its `Backbone`, built from `layers` and `folding`.
`cpu_conv` replaces Linen's convolutions on CPUs, by `winograd` and
`kernel_gradient`, inside the steps that it decorates. `outputs` is what a
backbone gives, and `losses` what methods are made of. A `converted` backbone is
made of `programs`, in place of layers; one from `adapters` is made of plain
functions, or of a module of Flax NNX. No connectors and no teachers here.
"""

from functools import partial
import re
import sys
from typing import Any

from ijckd_jax.models import efficientnet
from ijckd_jax.models import mobilenet_v4
from ijckd_jax.models.backbone import Backbone
from ijckd_jax.models.convnext import ConvNeXt
from ijckd_jax.models.deit import DeiT
from ijckd_jax.models.mobilenet_v1 import MobileNetV1
from ijckd_jax.models.mobilenet_v2 import MobileNetV2
from ijckd_jax.models.mobilenet_v3 import MobileNetV3Small
from ijckd_jax.models.regnet import RegNetY
from ijckd_jax.models.resnet import ResNet
from ijckd_jax.models.resnet_cifar import CifarResNet
from ijckd_jax.models.shufflenet_v1 import ShuffleNetV1
from ijckd_jax.models.shufflenet_v2 import ShuffleNetV2
from ijckd_jax.models.vgg import Vgg
from ijckd_jax.models.wrn import WideResNet
from ijckd_jax.runtime import config_utils

X1 = (16, 16, 32, 64)
X2 = (16, 32, 64, 128)
X4 = (32, 64, 128, 256)

# Blocks of each stage.
BASIC_18 = (2, 2, 2, 2)
BASIC_34 = (3, 4, 6, 3)
deep_resnet = partial(ResNet, bottleneck=True)
cifar_mobilenet = partial(MobileNetV2, cifar=True)
cifar_shufflenet = partial(ShuffleNetV2, cifar=True)
torchdistill_wrn = partial(WideResNet, torchdistill=True)
efficientnet_lite = partial(
  efficientnet.EfficientNet,
  activation='relu6',
  same_padding=True,
  epsilon=efficientnet.TF_EPSILON,
)

# For CIFAR first, then for ImageNet.
BACKBONES = {
  'resnet8': partial(CifarResNet, depth=8, widths=X1),
  'resnet14': partial(CifarResNet, depth=14, widths=X1),
  'resnet20': partial(CifarResNet, depth=20, widths=X1),
  'resnet32': partial(CifarResNet, depth=32, widths=X1),
  'resnet38': partial(CifarResNet, depth=38, widths=X1),
  'resnet44': partial(CifarResNet, depth=44, widths=X1),
  'resnet56': partial(CifarResNet, depth=56, widths=X1),
  'resnet110': partial(CifarResNet, depth=110, widths=X1),
  'resnet116': partial(CifarResNet, depth=116, widths=X1),
  'resnet14x2': partial(CifarResNet, depth=14, widths=X2),
  'resnet38x2': partial(CifarResNet, depth=38, widths=X2),
  'resnet110x2': partial(CifarResNet, depth=110, widths=X2),
  'resnet8x4': partial(CifarResNet, depth=8, widths=X4),
  'resnet14x4': partial(CifarResNet, depth=14, widths=X4),
  'resnet32x4': partial(CifarResNet, depth=32, widths=X4),
  'resnet38x4': partial(CifarResNet, depth=38, widths=X4),
  'wrn_16_1': partial(WideResNet, depth=16, widen=1),
  'wrn_16_2': partial(WideResNet, depth=16, widen=2),
  'wrn_16_4': partial(WideResNet, depth=16, widen=4),
  'wrn_28_2': partial(WideResNet, depth=28, widen=2),
  'wrn_28_4': partial(WideResNet, depth=28, widen=4),
  'wrn_40_1': partial(WideResNet, depth=40, widen=1),
  'wrn_40_2': partial(WideResNet, depth=40, widen=2),
  'torchdistill_wrn_16_8': partial(torchdistill_wrn, depth=16, widen=8),
  'torchdistill_wrn_28_10': partial(torchdistill_wrn, depth=28, widen=10),
  'torchdistill_wrn_40_4': partial(torchdistill_wrn, depth=40, widen=4),
  'vgg8': partial(Vgg, num_convs=(1, 1, 1, 1, 1)),
  'vgg11': partial(Vgg, num_convs=(1, 1, 2, 2, 2)),
  'vgg13': partial(Vgg, num_convs=(2, 2, 2, 2, 2)),
  'vgg16': partial(Vgg, num_convs=(2, 2, 3, 3, 3)),
  'vgg19': partial(Vgg, num_convs=(2, 2, 4, 4, 4)),
  'resnet18_cifar': partial(ResNet, num_blocks=BASIC_18, cifar=True),
  'resnet50_cifar': partial(deep_resnet, num_blocks=BASIC_34, cifar=True),
  'mobilenet_v2_cifar_x0_5': partial(cifar_mobilenet, width=0.5),
  'mobilenet_v2_cifar_x1_0': cifar_mobilenet,
  'shufflenet_v1_cifar': ShuffleNetV1,
  'shufflenet_v2_cifar_x0_5': partial(
    cifar_shufflenet, widths=(48, 96, 192, 1024)
  ),
  'shufflenet_v2_cifar_x1_0': partial(
    cifar_shufflenet, widths=(116, 232, 464, 1024)
  ),
  'shufflenet_v2_cifar_x1_5': partial(
    cifar_shufflenet, widths=(176, 352, 704, 1024)
  ),
  # As in the paper; the peers' code has 224 for 244, which is a slip.
  'shufflenet_v2_cifar_x2_0': partial(
    cifar_shufflenet, widths=(244, 488, 976, 2048)
  ),
  'resnet18': partial(ResNet, num_blocks=BASIC_18),
  'resnet34': partial(ResNet, num_blocks=BASIC_34),
  'resnet50': partial(deep_resnet, num_blocks=BASIC_34),
  'resnet101': partial(deep_resnet, num_blocks=(3, 4, 23, 3)),
  'resnet152': partial(deep_resnet, num_blocks=(3, 8, 36, 3)),
  'wide_resnet50_2': partial(deep_resnet, num_blocks=BASIC_34, inner_width=2),
  'resnext50_32x4d': partial(
    deep_resnet, num_blocks=BASIC_34, inner_width=2, groups=32
  ),
  'mobilenet_v1': MobileNetV1,
  'mobilenet_v2': MobileNetV2,
  'mobilenet_v3_small': MobileNetV3Small,
  'mobilenetv3_large_100': efficientnet.MobileNetV3Large,
  'mobilenetv4_conv_small': mobilenet_v4.MobileNetV4,
  'mobilenetv4_conv_medium': partial(
    mobilenet_v4.MobileNetV4, blocks=mobilenet_v4.MEDIUM, usual_size=256
  ),
  'tf_efficientnet_lite0': partial(
    efficientnet_lite, groups=efficientnet.groups_of(lite=True)
  ),
  'tf_efficientnet_lite1': partial(
    efficientnet_lite,
    groups=efficientnet.groups_of(depth=1.1, lite=True),
    usual_size=240,
  ),
  'tf_efficientnet_lite2': partial(
    efficientnet_lite,
    groups=efficientnet.groups_of(width=1.1, depth=1.2, lite=True),
    usual_size=260,
  ),
  'efficientnet_b0': efficientnet.EfficientNet,
  'shufflenet_v2_x0_5': partial(ShuffleNetV2, widths=(48, 96, 192, 1024)),
  'shufflenet_v2_x1_0': partial(ShuffleNetV2, widths=(116, 232, 464, 1024)),
  'convnext_atto': ConvNeXt,
  'convnext_femto': partial(ConvNeXt, widths=(48, 96, 192, 384)),
  'regnety_004': RegNetY,
  'deit_small_patch16_224': DeiT,
  # The same network, which its weights take other images of.
  'deit_tiny_patch16_224': partial(DeiT, width=192, num_heads=3),
  'vit_tiny_patch16_224': partial(DeiT, width=192, num_heads=3),
}


# What is said of a network that is no backbone.
ADAPT = (
  'a backbone is a subclass of ijckd_jax.Backbone; for Flax NNX and for plain '
  'functions there are ijckd_jax.NnxBackbone and ijckd_jax.FunctionBackbone'
)

# Before the colon of a name that is PyTorch's; such a network is not imported.
PYTORCH = ('hf', 'timm', 'torch', 'torchvision', 'transformers')


def _is_pytorch(cls: object) -> bool:
  """Returns whether a class is one of PyTorch's modules."""
  bases = cls.__mro__ if isinstance(cls, type) else ()
  return any(base.__module__.startswith('torch.nn.') for base in bases)


def _not_built(name: str) -> config_utils.UserError:
  """Returns the error for a network of PyTorch, which is not built here."""
  # hf:timm/resnet18.a1_in1k@COMMIT is a resnet18.
  own = re.split('[:/]', name.partition('@')[0])[-1].partition('.')[0]
  other = ''
  if own in BACKBONES:
    other = (
      f'. Or take {own}, the same network here, which starts at random, or by '
      "the weights that 'ijckd weights import' reads"
    )
  return config_utils.UserError(
    f"{name!r} is a network of PyTorch: 'ijckd convert' writes it with its "
    'weights as a bundle, which teaches (teacher.checkpoint=DIR) or is trained '
    f'further (student.init_from=DIR, teacher.init_from=DIR){other}'
  )


def is_name(text: str) -> bool:
  """Returns whether a text names a backbone, rather than a path."""
  return text in BACKBONES or (':' in text and '/' not in text)


def name_of(backbone: str | type[Backbone]) -> str:
  """Returns the name by which `build` finds a backbone again.

  Args:
    backbone: its name, or the class, which a module must have by its name.

  Raises:
    config_utils.UserError: it is something else, or cannot be found by a name.
  """
  if isinstance(backbone, str):
    return backbone
  if not isinstance(backbone, type):
    raise config_utils.UserError(
      f'the student is an object of type {type(backbone).__name__}: give '
      "the name of a backbone, 'package.module:Name', or a backbone's class; "
      f'{ADAPT}'
    )
  if not issubclass(backbone, Backbone):
    raise config_utils.UserError(
      f'the student, class {backbone.__name__}, is no backbone: {ADAPT}'
    )
  module, name = backbone.__module__, backbone.__qualname__
  found = getattr(sys.modules.get(module), name, None)
  if module == '__main__' or found is not backbone:
    raise config_utils.UserError(
      f'the student {name} of {module} cannot be imported by that name, which '
      'its bundle needs: define it at the top level of a module, in a file of '
      'its own, and import it from there'
    )
  return f'{module}:{name}'


def build(name: str, **settings: Any) -> Backbone:
  """Returns the backbone called `name`, or the one at `package.module:Name`.

  Args:
    name: a key of BACKBONES, or a reference to a constructor outside.
    **settings: fields of Backbone.

  Raises:
    config_utils.UserError: there is no such backbone, or it is something else.
  """
  if name.partition(':')[0].partition('.')[0] in PYTORCH:
    raise _not_built(name)
  constructor = config_utils.resolve('backbone', name, BACKBONES)
  if _is_pytorch(constructor):
    raise _not_built(name)
  try:
    backbone = constructor(**settings)
  except TypeError as error:
    raise config_utils.UserError(
      f'{name!r} does not make a backbone: {error}; {ADAPT}'
    ) from error
  if _is_pytorch(type(backbone)):
    raise _not_built(name)
  if not isinstance(backbone, Backbone):
    raise config_utils.UserError(
      f'{name!r} makes a {type(backbone).__name__}: {ADAPT}'
    )
  return backbone
