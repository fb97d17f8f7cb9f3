"""ImageNet's 1,281,167 training images of 1,000 classes, and a small part.

Source: Russakovsky et al. 2015, "ImageNet Large Scale Visual Recognition
Challenge", https://arxiv.org/abs/1409.0575; Imagenette, ten classes that are
easily told apart: https://github.com/fastai/imagenette.
"""

import collections
from collections.abc import Sequence
import dataclasses
import functools
import re

from ijckd_jax.data.datasets import photos

IDENTIFIER = re.compile(r'n\d{8}')  # Of WordNet.


@functools.cache
def _class_names(path: str) -> tuple[str, ...]:
  """Returns the lines of a file that tfds brings along."""
  from tensorflow_datasets.core import tfds_path

  return tuple(tfds_path(path).read_text().split())


@functools.cache
def class_words() -> tuple[str, ...]:
  """Returns words for the 1,000 classes, in the order of their labels.

  Each is the first of WordNet's words for the class, or all of them where
  another class has the same first one.
  """
  from tensorflow_datasets.datasets.siscore import labels

  names = labels.IMAGENET_LABELS_LIST
  first = [name.partition(',')[0] for name in names]
  count = collections.Counter(map(str.casefold, first))
  return tuple(
    word if count[word.casefold()] == 1 else name
    for word, name in zip(first, names, strict=True)
  )


def in_words(names: Sequence[str]) -> list[str]:
  """Returns names with words for those that are WordNet's identifiers.

  Identifiers of other classes than ImageNet's are left as they are.
  """
  if not any(IDENTIFIER.fullmatch(str(name)) for name in names):
    return list(names)
  words = dict(zip(Imagenet().class_names, class_words(), strict=True))
  return [words.get(name, name) for name in names]


@dataclasses.dataclass(frozen=True)
class Imagenet(photos.PhotoDataset):
  """ILSVRC 2012; evaluated on its 50,000 validation images."""

  tfds_name = 'imagenet2012'
  train_split_size = 1_281_167
  test_split = 'validation'

  @property
  def class_names(self) -> tuple[str, ...]:
    """WordNet's identifiers, in the order of their labels."""
    return _class_names('datasets/imagenet2012/labels.txt')


@dataclasses.dataclass(frozen=True)
class Imagenette(photos.PhotoDataset):
  """9,469 training and 3,925 test images of ten classes, in their full size."""

  tfds_name = 'imagenette/full-size-v2'
  train_split_size = 9_469
  test_split = 'validation'

  @property
  def class_names(self) -> tuple[str, ...]:
    """WordNet's identifiers, in the order of their labels."""
    return _class_names('image_classification/imagenette_labels.txt')
