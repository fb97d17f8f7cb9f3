"""What is known of the published PyTorch weights beside their arrays.

How their images were prepared, what their classes are called, and which of
torchvision's files is which. Sources: RepDistiller and torchdistill for CIFAR,
torchvision and timm for ImageNet.
"""

from collections.abc import Mapping
from typing import Any

from ijckd_jax import models
from ijckd_jax.data import augment
from ijckd_jax.data.datasets import cifar
from ijckd_jax.runtime import config_utils

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
HALF = 3 * (0.5,)


def _square(mean, std, size, interpolation='bilinear'):
  return augment.Preprocessing(mean, std, (size, size), interpolation)


PREPROCESSING = {
  'cifar10': _square(cifar.Cifar10.mean, cifar.Cifar10.std, 32),
  # RepDistiller, mdistiller and SimKD.
  'cifar100': _square(cifar.Cifar100.mean, cifar.Cifar100.std, 32),
  # torchdistill's sample configs for CIFAR-100.
  'torchdistill_cifar100': _square(
    (0.5070754, 0.48655024, 0.44091907), (0.26733398, 0.25643876, 0.2761503), 32
  ),
  # torchvision, and all that start from it.
  'imagenet': _square(IMAGENET_MEAN, IMAGENET_STD, 224),
  # Most of timm's networks.
  'imagenet_bicubic': _square(IMAGENET_MEAN, IMAGENET_STD, 224, 'bicubic'),
}
# timm's networks, by their names there. Source: their default_cfg in timm 1.0.
TIMM = {
  **dict.fromkeys(
    (
      *('mobilenetv3_large_100', 'mobilenetv4_conv_small', 'efficientnet_b0'),
      *('convnext_atto', 'convnext_femto', 'regnety_004'),
      *('deit_small_patch16_224', 'deit_tiny_patch16_224'),
    ),
    PREPROCESSING['imagenet_bicubic'],
  ),
  'mobilenetv4_conv_medium': _square(
    IMAGENET_MEAN, IMAGENET_STD, 256, 'bicubic'
  ),
  'vit_tiny_patch16_224': _square(HALF, HALF, 224, 'bicubic'),
  'tf_efficientnet_lite0': _square(HALF, HALF, 224, 'bicubic'),
  'tf_efficientnet_lite1': _square(HALF, HALF, 240, 'bicubic'),
  'tf_efficientnet_lite2': _square(HALF, HALF, 260, 'bicubic'),
}
CLASS_NAMES = {
  'cifar10': cifar.Cifar10.class_names,
  'cifar100': cifar.Cifar100.class_names,
  'torchdistill_cifar100': cifar.Cifar100.class_names,
}

# torchvision ends the names of its files with the start of their SHA-256.
TORCHVISION = {
  'resnet18 V1': ('5c106cde', 'f37072fd'),
  'resnet34 V1': ('333f7ec4', 'b627a593'),
  'resnet50 V1': ('19c8e357', '0676ba61'),
  'resnet50 V2': ('11ad3fa6',),
  'resnet101 V1': ('5d3b4d8f', '63fe2227'),
  'resnet101 V2': ('cd907fc2',),
  'resnet152 V1': ('b121ed2d', '394f9c45'),
  'resnet152 V2': ('f82ba261',),
  'wide_resnet50_2 V1': ('95faca4d',),
  'wide_resnet50_2 V2': ('9ba9bcbe',),
  'resnext50_32x4d V1': ('7cdf4587',),
  'resnext50_32x4d V2': ('1a0047aa',),
  'mobilenet_v2 V1': ('b0353104',),
  'mobilenet_v2 V2': ('7ebf99e0',),
  'mobilenet_v3_small V1': ('047dcff4',),
  'shufflenet_v2_x0_5 V1': ('f707e712',),
  'shufflenet_v2_x1_0 V1': ('5666bf0f',),
}


def usual_preprocessing(
  name: str, channels: int, num_classes: int
) -> tuple[str, augment.Preprocessing | None]:
  """Returns what the published networks of a name were trained with.

  That is a key of PREPROCESSING or 'timm', and what it stands for; '' and None
  where nothing is known.
  """
  if channels != 3:
    return '', None
  if name in TIMM:
    return 'timm', TIMM[name]
  key = {10: 'cifar10', 100: 'cifar100'}.get(num_classes, '')
  if models.build(name).usual_size == 224:
    key = 'imagenet'
  elif num_classes == 100 and name.startswith('torchdistill'):
    key = 'torchdistill_cifar100'
  return key, PREPROCESSING.get(key)


def timm_preprocessing(name: str, config: Mapping[str, Any]):
  """Returns what timm's config.json says of it, or None."""
  config = config.get('pretrained_cfg')
  if not isinstance(config, dict):
    return None
  try:
    _, height, width = config['input_size']
    made = augment.Preprocessing(
      tuple(map(float, config['mean'])),
      tuple(map(float, config['std'])),
      (int(height), int(width)),
      config['interpolation'],
    )
  except (KeyError, TypeError, ValueError) as error:
    raise config_utils.UserError(
      f'{name}: its config.json does not say how images are prepared: {error!r}'
    ) from error
  if made.interpolation not in augment.INTERPOLATIONS:
    raise config_utils.UserError(
      f'{name} resizes its images by {made.interpolation!r}, which is '
      f'none of {", ".join(augment.INTERPOLATIONS)}'
    )
  return made


def recognise(name: str, sha256: str) -> list[str]:
  """Returns what is known of one of torchvision's files."""
  for weights, hashes in TORCHVISION.items():
    backbone, version = weights.split()
    by_content = any(sha256.startswith(start) for start in hashes)
    if not (by_content or any(start in name for start in hashes)):
      continue
    how = 'SHA-256' if by_content else 'name'
    notes = [
      f"torchvision's {backbone}, weights IMAGENET1K_{version} (by its {how})"
    ]
    if version == 'V2':
      notes.append(
        f'warning: the tables of distillation papers mean IMAGENET1K_V1 of '
        f'{backbone}; these weights are better, and make another teacher'
      )
    return notes
  return []
