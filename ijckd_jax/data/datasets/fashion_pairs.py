"""Fashion pairs: a hundred classes out of Fashion-MNIST's ten.

An image is two garments side by side; the class 10 a + b says which kind is on
the left (a) and which on the right (b). It is small enough to train on a CPU
and still has a hundred-way head, and a gap between a large and a small net.
"""

import dataclasses

import numpy as np

from ijckd_jax.data import datasets
from ijckd_jax.data.datasets import fashion_mnist
from ijckd_jax.runtime import config_utils


@dataclasses.dataclass(frozen=True)
class Dataset:
  """Pairs of garments, as many of every class.

  Each split draws its pairs from garments of its own: test pairs from
  Fashion-MNIST's test images, training pairs from its training images less
  those that `validation_fraction` holds out for the validation pairs.

  Attributes:
    num_train, num_test: pairs, multiples of 100. Validation has
      `validation_fraction * num_train` of them, rounded to such a multiple and
      at least 100, which do not lessen `num_train`.
    resolution: 'full' for 28x56, or 'half' for 14x28, by averaging 2x2 blocks.
    pairs_seed: the pairs are a pure function of it.
    data_dir, validation_fraction, crop_padding, flip: see `TfdsDataset`.
  """

  num_train: int = 50_000
  num_test: int = 10_000
  resolution: str = 'full'
  pairs_seed: int = 0
  data_dir: str = ''
  validation_fraction: float = 0.0
  crop_padding: int = 0
  flip: bool = False

  tfds_name = 'fashion_mnist'
  class_names = tuple(
    f'{left} + {right}'
    for left in fashion_mnist.Dataset.class_names
    for right in fashion_mnist.Dataset.class_names
  )
  # At half resolution the std is 0.330: near enough for one constant.
  mean = fashion_mnist.Dataset.mean
  std = fashion_mnist.Dataset.std

  def __post_init__(self):
    for field in ('num_train', 'num_test'):
      num = getattr(self, field)
      if num <= 0 or num % 100:
        raise config_utils.UserError(
          f'{field}={num}: give a positive multiple of 100, as many pairs of '
          'every class'
        )
    if self.resolution not in ('full', 'half'):
      raise config_utils.unknown(
        'resolution', self.resolution, ['full', 'half']
      )
    if not 0 <= self.pairs_seed < 2**32:
      raise config_utils.UserError(
        f'pairs_seed={self.pairs_seed}: give a number from 0 to 2**32 - 1'
      )
    datasets.check_crop_padding(self.crop_padding)
    self._garments()

  @property
  def image_shape(self) -> tuple[int, int, int]:
    """(H, W, C)."""
    return (28, 56, 1) if self.resolution == 'full' else (14, 28, 1)

  def _garments(self):
    return fashion_mnist.Dataset(
      data_dir=self.data_dir, validation_fraction=self.validation_fraction
    )

  def load(self, split: str) -> datasets.Arrays:
    """Returns the images and labels of a split.

    Raises:
      UserError: there is no such split, or Fashion-MNIST is not prepared.
    """
    garments = self._garments().load(split)
    num = self.num_test if split == 'test' else self.num_train
    if split == 'validation':
      num = 100 * round(self.validation_fraction * num / 100)
      num = max(num, 100) if len(garments) else 0
    # One stream for each split: its pairs do not depend on the others' sizes.
    # RandomState's streams, unlike Generator's, are promised never to change.
    random = np.random.RandomState(
      [self.pairs_seed, datasets.SPLITS.index(split)]
    )
    labels = random.permutation(np.repeat(np.arange(100), num // 100))
    images = garments.images
    if self.resolution == 'half':
      blocks = images.reshape(-1, 14, 2, 14, 2, 1).astype(np.uint16)
      images = ((blocks.sum(axis=(2, 4)) + 2) // 4).astype(np.uint8)
    sides = [
      images[_draw(random, garments.labels, kinds)]
      for kinds in (labels // 10, labels % 10)
    ]
    return datasets.Arrays(
      np.concatenate(sides, axis=2), labels.astype(np.int32)
    )


def _draw(random, labels, kinds):
  """Returns for each of `kinds` the index of a garment with that label."""
  indices = np.zeros(len(kinds), int)
  for kind in np.unique(kinds):
    members = np.flatnonzero(labels == kind)
    wanted = kinds == kind
    indices[wanted] = members[random.randint(len(members), size=wanted.sum())]
  return indices
