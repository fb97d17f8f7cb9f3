"""Printed characters: a class for each glyph, fonts of their own in each split.

What prepare.py has written; `dataset.path` names its folder.
"""

import dataclasses
import pathlib
import string

import numpy as np

from ijckd_jax.data import datasets
from ijckd_jax.data.datasets import prepared
from ijckd_jax.runtime import config_utils

FILE = 'glyphs.npz'
DRAWN = string.digits + string.ascii_letters + '&@#%?!$+=<>*'
# Many fonts draw these alike: a character is of the class of the other.
ALIKE = {'O': '0', 'I': '1', 'l': '1'}
CLASSES = tuple(c for c in DRAWN if c not in ALIKE)


def class_of(character: str) -> int:
  """Returns the number of a character's class."""
  return CLASSES.index(ALIKE.get(character, character))


@dataclasses.dataclass(frozen=True)
class Dataset:
  """Grey pictures of characters, in the fonts of one machine.

  Attributes:
    path: the folder that prepare.py has written.
    resolution: 'full' for 32x32, or 'half' for 16x16, by averaging 2x2 blocks.
    num_train, num_test: how many images there are; 0: all. They are the same
      for every run.
    validation_fraction: part of every class's training images to hold out.
    num_labelled: how many training images have a label; 0: all. They are the
      same for every run, and as many of each class as can be.
    keep_unlabelled: whether the other training images stay, without a label.
    crop_padding, flip: see `datasets`.
  """

  path: str = 'data/glyphs'
  resolution: str = 'full'
  num_train: int = 0
  num_test: int = 0
  validation_fraction: float = 0.0
  num_labelled: int = 0
  keep_unlabelled: bool = True
  crop_padding: int = 0
  flip: bool = False

  class_names = CLASSES
  # Over all pixels of 105,000 training images, of the fonts of 447 packages.
  mean = (0.088,)
  std = (0.262,)

  def __post_init__(self):
    if self.resolution not in ('full', 'half'):
      raise config_utils.unknown(
        'resolution', self.resolution, ['full', 'half']
      )
    for field in ('num_train', 'num_test', 'num_labelled'):
      if getattr(self, field) < 0:
        raise config_utils.UserError(f'{field}: give 0 for all, or a number')
    datasets.check_crop_padding(self.crop_padding)

  @property
  def image_shape(self) -> tuple[int, int, int]:
    """(H, W, C)."""
    return (32, 32, 1) if self.resolution == 'full' else (16, 16, 1)

  def load(self, split: str) -> datasets.Arrays:
    """Returns the images and labels of a split."""
    datasets.check_split(split)
    path = pathlib.Path(config_utils.expand(self.path)) / FILE
    if not path.exists():
      raise config_utils.UserError(
        f'{path} is not there: python -m experiments.glyphs.prepare --source '
        f'/usr/share/fonts {path.parent}'
      )
    part = 'test' if split == 'test' else 'train'
    with np.load(path) as arrays:
      found = datasets.Arrays(
        arrays[f'{part}_images'], arrays[f'{part}_labels']
      )
    found = sample(found, self.num_test if part == 'test' else self.num_train)
    found = datasets.Arrays(self._resized(found.images), found.labels)
    if part == 'test':
      return found
    train, validation = prepared.hold_out(found, self.validation_fraction)
    if split == 'validation':
      return validation
    return label_few(train, self.num_labelled, keep=self.keep_unlabelled)

  def _resized(self, images: np.ndarray) -> np.ndarray:
    """Returns images of `image_shape`."""
    if self.resolution == 'full':
      return images
    blocks = images.reshape(len(images), 16, 2, 16, 2, 1)
    return np.round(blocks.mean(axis=(2, 4))).astype(np.uint8)


def sample(arrays: datasets.Arrays, number: int) -> datasets.Arrays:
  """Returns a fixed random sample of `number` examples; 0 returns all."""
  _check_number(arrays, number)
  order = np.random.RandomState(0).permutation(len(arrays))
  chosen = np.sort(order[: number or len(arrays)])
  return datasets.Arrays(arrays.images[chosen], arrays.labels[chosen])


def label_few(
  arrays: datasets.Arrays, number: int, *, keep: bool
) -> datasets.Arrays:
  """Returns the examples with the labels of all but `number` removed.

  The counts of two classes differ by at most one, where a class has enough.

  Args:
    arrays: all of them with their labels.
    number: how many keep their label; 0: all.
    keep: whether the unlabelled examples stay, with the label -1.
  """
  _check_number(arrays, number)
  if not number:
    return arrays
  order = np.random.RandomState(0).permutation(len(arrays))
  # Class by class in turn: first one of each, then a second one of each.
  rank = np.zeros(len(arrays), int)
  seen = np.zeros(1 + arrays.labels.max(), int)
  for index in order:
    rank[index] = seen[arrays.labels[index]]
    seen[arrays.labels[index]] += 1
  chosen = np.sort(order[np.argsort(rank[order], kind='stable')][:number])
  if not keep:
    return datasets.Arrays(arrays.images[chosen], arrays.labels[chosen])
  labels = np.full_like(arrays.labels, -1)
  labels[chosen] = arrays.labels[chosen]
  return datasets.Arrays(arrays.images, labels)


def _check_number(arrays, number):
  if number > len(arrays):
    raise config_utils.UserError(
      f'there are {len(arrays):,} images, not {number:,}: ask for fewer'
    )
