"""ImageNet's 1,281,167 training images of 1,000 classes, and a small part.

Source: Russakovsky et al. 2015, "ImageNet Large Scale Visual Recognition
Challenge", https://arxiv.org/abs/1409.0575; Imagenette, ten classes that are
easily told apart: https://github.com/fastai/imagenette.
"""

import dataclasses
import functools

from ijckd_jax.data.datasets import photos


@functools.cache
def _class_names(path: str) -> tuple[str, ...]:
  """Returns the lines of a file that tfds brings along."""
  from tensorflow_datasets.core import tfds_path

  return tuple(tfds_path(path).read_text().split())


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
