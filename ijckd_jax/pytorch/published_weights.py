"""What is known of the published PyTorch weights beside their arrays.

How their images were prepared, what their classes are called, and which of
torchvision's files is which. Sources: RepDistiller and torchdistill for CIFAR,
torchvision and timm for ImageNet.
"""

from collections.abc import Callable
from collections.abc import Mapping
from collections.abc import Sequence
import dataclasses
import math
from typing import Any

from ijckd_jax import models
from ijckd_jax.data import augment
from ijckd_jax.data import classes
from ijckd_jax.data import images
from ijckd_jax.data.datasets import cifar
from ijckd_jax.data.datasets import imagenet
from ijckd_jax.runtime import config_utils

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
HALF = 3 * (0.5,)


# timm's, where a network names no other.
CROP_PCT = 0.875


@dataclasses.dataclass(frozen=True)
class Published:
  """What is known of a network beside its arrays.

  Attributes:
    preprocessing: of its images.
    crop: how pictures of any size become its images; None: nothing is cut off
      but what does not fit.
    class_names: gives its names, which count if the head has as many classes.
  """

  preprocessing: augment.Preprocessing
  crop: images.CentreCrop | None = None
  class_names: Callable[[], Sequence[str]] = tuple


def _cifar(data, mean=None, std=None):
  mean, std = mean or data.mean, std or data.std
  preprocessing = augment.Preprocessing(mean, std, (32, 32))
  return Published(preprocessing, class_names=lambda: data.class_names)


def _imagenet(
  size=224,
  interpolation='bilinear',
  crop_pct=CROP_PCT,
  *,
  resize=None,
  mean=IMAGENET_MEAN,
  std=IMAGENET_STD,
):
  return Published(
    augment.Preprocessing(mean, std, (size, size), interpolation),
    images.CentreCrop(resize or _resize(size, crop_pct), interpolation),
    imagenet.class_words,
  )


def _resize(size: int, crop_pct: float) -> int:
  """Returns what timm resizes the shorter side to, of which it cuts `size`."""
  return math.floor(size / crop_pct)


PREPROCESSING = {
  'cifar10': _cifar(cifar.Cifar10),
  # RepDistiller, mdistiller and SimKD.
  'cifar100': _cifar(cifar.Cifar100),
  # torchdistill's sample configs for CIFAR-100.
  'torchdistill_cifar100': _cifar(
    cifar.Cifar100,
    (0.5070754, 0.48655024, 0.44091907),
    (0.26733398, 0.25643876, 0.2761503),
  ),
  # torchvision, and all that start from it.
  'imagenet': _imagenet(),
  # torchvision's weights IMAGENET1K_V2 of the networks in TORCHVISION.
  'imagenet_v2': _imagenet(resize=232),
  # Most of timm's networks.
  'imagenet_bicubic': _imagenet(interpolation='bicubic'),
}
# timm's networks, by their names there. Source: their default_cfg in timm 1.0.
TIMM = {
  **dict.fromkeys(
    (
      *('mobilenetv3_large_100', 'mobilenetv4_conv_small', 'efficientnet_b0'),
      *('convnext_atto', 'convnext_femto'),
    ),
    PREPROCESSING['imagenet_bicubic'],
  ),
  'regnety_004': _imagenet(224, 'bicubic', 0.965),
  'deit_small_patch16_224': _imagenet(224, 'bicubic', 0.9),
  'deit_tiny_patch16_224': _imagenet(224, 'bicubic', 0.9),
  'mobilenetv4_conv_medium': _imagenet(256, 'bicubic', 0.95),
  'vit_tiny_patch16_224': _imagenet(224, 'bicubic', 0.9, mean=HALF, std=HALF),
  'tf_efficientnet_lite0': _imagenet(224, 'bicubic', mean=HALF, std=HALF),
  'tf_efficientnet_lite1': _imagenet(
    240, 'bicubic', 0.882, mean=HALF, std=HALF
  ),
  'tf_efficientnet_lite2': _imagenet(260, 'bicubic', 0.89, mean=HALF, std=HALF),
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
) -> tuple[str, Published | None]:
  """Returns what is known of the published networks of a name.

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


def of_timm(name: str, config: Mapping[str, Any]) -> Published | None:
  """Returns what timm's config.json says of a network; None: nothing.

  Args:
    name: of the network, for messages.
    config: what is in the file, or the same of timm's own networks.

  Raises:
    config_utils.UserError: it is damaged, or asks for what is not done here.
  """
  names = config.get('label_names')
  config = config.get('pretrained_cfg')
  if not isinstance(config, dict):
    return None
  try:
    _, height, width = map(int, config['input_size'])
    preprocessing = augment.Preprocessing(
      tuple(map(float, config['mean'])),
      tuple(map(float, config['std'])),
      (height, width),
      config['interpolation'],
    )
    crop_pct = config.get('crop_pct')
    crop_pct = CROP_PCT if crop_pct is None else float(crop_pct)
  except (KeyError, TypeError, ValueError) as error:
    raise config_utils.UserError(
      f'{name}: its config.json does not say how images are prepared: {error!r}'
    ) from error
  instead = 'give --mean, --std and --image_size of what comes near to it'
  if preprocessing.interpolation not in augment.INTERPOLATIONS:
    raise config_utils.UserError(
      f'{name} resizes its images by {preprocessing.interpolation!r}, which is '
      f'none of {", ".join(augment.INTERPOLATIONS)}: {instead}'
    )
  if not 0 < crop_pct <= 1:
    raise config_utils.UserError(
      f'{name} cuts {crop_pct} of a picture out of its centre, which must be '
      f'above 0 and at most 1: {instead}'
    )
  mode = config.get('crop_mode') or 'center'
  if mode != 'center':
    raise config_utils.UserError(
      f'{name} fits pictures to its size by {config_utils.short(mode)!r}; here '
      f"they are cut out of the centre ('center'): {instead}"
    )
  crop = images.CentreCrop(
    _resize(height, crop_pct), preprocessing.interpolation
  )
  if names is None:  # timm tells ImageNet by its number of classes as well.
    return Published(preprocessing, crop, imagenet.class_words)
  return Published(preprocessing, crop, lambda: _texts(names))


def _texts(names) -> Sequence[str]:
  """Returns what may be a list of names; () if it is none."""
  is_right = isinstance(names, list) and all(isinstance(x, str) for x in names)
  return names if is_right else ()


def of_torchvision(weights: Any) -> Published:
  """Returns what torchvision says of weights of its own.

  Args:
    weights: member of a torchvision.models.WeightsEnum; all of classifiers are
      of ImageNet.
  """
  made = weights.transforms()
  (size,), (resize,) = made.crop_size, made.resize_size
  interpolation = made.interpolation.value
  return Published(
    augment.Preprocessing(
      tuple(made.mean), tuple(made.std), (size, size), interpolation
    ),
    images.CentreCrop(resize, interpolation),
    imagenet.class_words,
  )


def describe_crop(crop: images.CentreCrop | None) -> str:
  """Returns a clause on a crop, to follow the size of the images."""
  if crop is None:
    return ''
  return f', from the centre of pictures whose shorter side is {crop.resize}'


def describe_classes(names: Sequence[str]) -> str:
  """Returns how many classes there are, and the names of the first ones."""
  known = f' ({", ".join(names[:2])}, ...)' if classes.are_names(names) else ''
  return f'{len(names)} classes{known}'


def recognise(name: str, sha256: str) -> tuple[str, list[str]]:
  """Returns the version of one of torchvision's files, and sentences on it.

  The version is '' and there are no sentences if it is none.
  """
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
    return version, notes
  return '', []
