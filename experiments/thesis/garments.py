"""Fashion-MNIST in three channels, as pretrained networks read images."""

import dataclasses

import numpy as np

from experiments.glyphs import dataset as glyphs
from ijckd_jax.data import datasets
from ijckd_jax.data.datasets import fashion_mnist


@dataclasses.dataclass(frozen=True)
class Dataset(fashion_mnist.Dataset):
  """Fashion-MNIST, optionally reduced and partly unlabelled.

  Attributes:
    num_train, num_test: how many images there are; 0: all. They are the same
      for every run.
    num_labelled: how many training images have a label; 0: all.
    keep_unlabelled: whether the other training images stay, without a label.
  """

  num_train: int = 0
  num_test: int = 0
  num_labelled: int = 0
  keep_unlabelled: bool = True

  image_shape = (28, 28, 3)
  mean = fashion_mnist.Dataset.mean * 3
  std = fashion_mnist.Dataset.std * 3

  def load(self, split: str) -> datasets.Arrays:
    """Returns the images and labels of a split."""
    grey = fashion_mnist.Dataset(self.data_dir, self.validation_fraction)
    found = grey.load(split)
    if split == 'train':
      found = glyphs.sample(found, self.num_train)
      found = glyphs.label_few(
        found, self.num_labelled, keep=self.keep_unlabelled
      )
    elif split == 'test':
      found = glyphs.sample(found, self.num_test)
    return datasets.Arrays(np.repeat(found.images, 3, axis=3), found.labels)
