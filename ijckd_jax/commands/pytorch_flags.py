"""Flags of the commands that read PyTorch: of images and classes."""

import argparse
import codecs
import math
import re

from etils import epath

from ijckd_jax.data import datasets
from ijckd_jax.runtime import config_utils


def add_images(parser: argparse.ArgumentParser) -> None:
  """Adds the flags that say how images are prepared, and of classes."""
  parser.add_argument(
    '--preprocessing',
    help='a name such as cifar100 or imagenet; default: the usual one',
  )
  parser.add_argument('--mean', help='of pixels in [0, 1], by commas')
  parser.add_argument('--std', help='likewise')
  parser.add_argument('--image_size', help='side in pixels, or 14x28')
  parser.add_argument('--interpolation', help='bilinear (default) or bicubic')
  parser.add_argument(
    '--resize',
    type=int,
    help='pixels of the shorter side of a picture before the centre of '
    '--image_size is cut out of it; default: --image_size',
  )
  parser.add_argument(
    '--class_names',
    help='a file with a name a line; default: those that are known, and '
    "ImageNet's for 1,000 classes",
  )


def preprocessing(flags: argparse.Namespace):
  """Returns what the flags say of how images are prepared.

  That is a key of published_weights.PREPROCESSING, or a value as there; None if
  they say nothing.
  """
  own = (flags.mean, flags.std, flags.image_size)
  more = (flags.interpolation, flags.resize)
  if all(given is None for given in (*own, *more)):
    return flags.preprocessing
  if flags.preprocessing:
    raise config_utils.UserError(
      'give --preprocessing, or --mean, --std and --image_size, not both'
    )
  if any(given is None for given in own):
    raise config_utils.UserError('--mean, --std and --image_size go together')

  from ijckd_jax.data import augment
  from ijckd_jax.data import images
  from ijckd_jax.data.datasets import imagenet
  from ijckd_jax.pytorch import published_weights

  mean, std = (
    _numbers(name, text)
    for name, text in (('mean', flags.mean), ('std', flags.std))
  )
  try:
    datasets.check_statistics(mean, std, len(mean))
  except config_utils.UserError as error:
    raise config_utils.UserError(f'--mean and --std: {error}') from error
  interpolation = flags.interpolation or 'bilinear'
  if interpolation not in augment.INTERPOLATIONS:
    raise config_utils.unknown(
      'interpolation', interpolation, augment.INTERPOLATIONS
    )
  size = _size(flags.image_size)
  resize = size[0] if flags.resize is None else flags.resize
  if resize < size[0]:
    raise config_utils.UserError(
      f'--resize {resize}: give at least the {size[0]} pixels of --image_size, '
      'which are cut out of the centre'
    )
  return published_weights.Published(
    augment.Preprocessing(mean, std, size, interpolation),
    images.CentreCrop(resize, interpolation),
    imagenet.class_words,
  )


def _size(text: str) -> tuple[int, int]:
  """Returns (H, W) of `SIDE` or `HxW`."""
  found = re.fullmatch(r'([1-9]\d*)(?:x([1-9]\d*))?', text)
  if not found:
    raise config_utils.UserError(
      f'--image_size {text}: give a side in pixels, or HEIGHTxWIDTH'
    )
  return int(found[1]), int(found[2] or found[1])


def _numbers(name: str, text: str) -> tuple[float, ...]:
  try:
    numbers = tuple(map(float, text.split(',')))
  except ValueError:
    numbers = ()
  if not (numbers and all(map(math.isfinite, numbers))):
    raise config_utils.UserError(
      f'--{name} {text}: give a number for each channel, by commas'
    )
  return numbers


def class_names(flags: argparse.Namespace) -> tuple[str, ...]:
  """Returns the lines of the file of names; none without one."""
  path = flags.class_names
  if path is None:
    return ()
  try:
    data = epath.Path(config_utils.expand(path)).read_bytes()
    # Windows puts a mark before a text, and may write UTF-16.
    marks = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
    encoding = 'utf-16' if data.startswith(marks) else 'utf-8-sig'
    lines = data.decode(encoding).splitlines()
  except (OSError, UnicodeDecodeError) as error:
    raise config_utils.UserError(
      f'--class_names {path} cannot be read: {error}'
    ) from error
  names = tuple(line.strip() for line in lines if line.strip())
  if not names:
    raise config_utils.UserError(f'--class_names {path} is empty')
  return names
