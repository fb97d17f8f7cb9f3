"""The data sets by name, and what each must be.

A data set is a `Dataset`, in a module of its own under that name.

What tfds knows under a name is a `prepared.TfdsDataset` with those attributes
filled in, which lies in memory, or a `photos.PhotoDataset`, whose images are
decoded when they are asked for; arrays from Python are an `ArrayDataset`.
"""

from collections.abc import Mapping
from collections.abc import Sequence
import dataclasses
import hashlib
import json
from typing import Any
from typing import Protocol
import zlib

import numpy as np

from ijckd_jax.runtime import config_utils

DATASETS = {
  'cifar10': 'ijckd_jax.data.datasets.cifar:Cifar10',
  'cifar100': 'ijckd_jax.data.datasets.cifar:Cifar100',
  'digits': 'ijckd_jax.data.datasets.digits:Dataset',
  'fashion_mnist': 'ijckd_jax.data.datasets.fashion_mnist:Dataset',
  'fashion_pairs_100': 'ijckd_jax.data.datasets.fashion_pairs:Dataset',
  'image_folder': 'ijckd_jax.data.datasets.own_images:Dataset',
  'imagenet2012': 'ijckd_jax.data.datasets.imagenet:Imagenet',
  'imagenette': 'ijckd_jax.data.datasets.imagenet:Imagenette',
}

SPLITS = ('train', 'validation', 'test')


class Dataset(Protocol):
  """What a data set must offer; nothing needs to be inherited.

  It is a frozen dataclass, whose fields can be set in a config.

  Attributes:
    image_shape: (H, W, C) of its uint8 images.
    class_names: K names; () where the images have no classes, so that a student
      can learn features alone: then all labels are -1, and 'test' is empty.
    mean: C numbers, of pixels scaled to [0, 1].
    std: standard deviation, alike.
    crop_padding: zero padding in pixels of the training crop; 0 for none.
    flip: whether training images are mirrored at random.
  """

  @property
  def image_shape(self) -> tuple[int, int, int]: ...
  @property
  def class_names(self) -> Sequence[str]: ...
  @property
  def mean(self) -> Sequence[float]: ...
  @property
  def std(self) -> Sequence[float]: ...
  @property
  def crop_padding(self) -> int: ...
  @property
  def flip(self) -> bool: ...

  def load(self, split: str) -> Any:
    """Returns the Arrays of 'train', 'validation' or 'test'.

    'validation' is held out of 'train', and empty where no part is asked for.
    """


@dataclasses.dataclass(frozen=True)
class Arrays:
  """Images in memory: uint8 (N, H, W, C), and labels: int32 (N,).

  Lists, tensors and columns of a table become NumPy arrays.

  Raises:
    UserError: NumPy cannot read them.
  """

  images: np.ndarray
  labels: np.ndarray

  in_memory = True

  def __post_init__(self) -> None:
    for name in ('images', 'labels'):
      values = getattr(self, name)
      if type(values) is not np.ndarray:
        object.__setattr__(self, name, _as_numpy(name, values))

  def __len__(self) -> int:
    return len(self.labels)

  def take(self, indices: np.ndarray | slice) -> 'Arrays':
    """Returns the examples at `indices`, in their order."""
    return Arrays(self.images[indices], self.labels[indices])

  subset = take

  def train_views(
    self, indices: np.ndarray, epochs: np.ndarray, seed: int
  ) -> dict[str, np.ndarray]:
    """Returns 'image' and 'label' of the examples, which devices augment."""
    del epochs, seed
    chosen = self.take(indices)
    return {'image': chosen.images, 'label': chosen.labels.astype(np.int32)}

  def digest(self) -> str:
    """Returns a hash of images and labels."""
    digest = hashlib.sha256()
    for array in (self.images, self.labels):
      digest.update(f'{array.shape}{array.dtype}'.encode())
      digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()[:16]


def _as_numpy(what: str, values: object) -> np.ndarray:
  try:
    return np.asarray(values)
  except Exception as error:  # Tensors raise whatever they like.
    config_utils.raise_outside(error)
    raise config_utils.UserError(
      f'{what} are of type {type(values).__name__}, which NumPy cannot read '
      f'({config_utils.short(error)}): give NumPy arrays; of a tensor of '
      'PyTorch, tensor.detach().cpu().numpy()'
    ) from error


def get(name: str) -> type:
  """Returns the data set class called `name`, or at `package.module:Name`."""
  return config_utils.resolve('dataset', name, DATASETS)


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class ArrayDataset:
  """A data set from arrays. Labels of -1, in `train` only, mean unlabelled.

  Attributes:
    train: images and labels to learn from.
    test: images and labels to judge by; only images without classes may lack
      them.
    validation: images and labels to choose the best step by.
    class_names: K names; what is no text becomes one. () for images without
      classes.
    mean: C numbers, of pixels scaled to [0, 1].
    std: standard deviation, alike.
    crop_padding: zero padding in pixels of the training crop; 0 for none.
    flip: whether training images are mirrored at random.

  Raises:
    UserError: they do not fit together.
  """

  train: Arrays
  test: Arrays | None = None
  validation: Arrays | None = None
  class_names: Sequence[str]
  mean: Sequence[float]
  std: Sequence[float]
  crop_padding: int = 0
  flip: bool = False

  def __post_init__(self) -> None:
    check_crop_padding(self.crop_padding)
    names = tuple(str(name) for name in self.class_names)
    object.__setattr__(self, 'class_names', names)
    for split in SPLITS:
      arrays = getattr(self, split)
      if arrays is None and (
        split == 'validation' or (split == 'test' and not names)
      ):
        continue
      if not isinstance(arrays, Arrays):
        raise config_utils.UserError(
          f'{split} is of type {type(arrays).__name__}: give '
          'ijckd_jax.Arrays(images, labels)'
        )
      images, labels = arrays.images, arrays.labels
      if images.dtype != np.uint8 or images.ndim != 4 or not images.size:
        raise config_utils.UserError(
          f'{split} images are {images.dtype} {images.shape}; they must be '
          'uint8 (N, H, W, C), each at least 1'
        )
      if images.shape[1:] != self.image_shape:
        raise config_utils.UserError(
          f'{split} images are {images.shape[1:]}, those of train are '
          f'{self.image_shape}'
        )
      if labels.shape != images.shape[:1] or labels.dtype.kind not in 'iu':
        raise config_utils.UserError(
          f'{split} labels are {labels.dtype} {labels.shape}; they must be '
          f'integers ({len(images)},), one for each image'
        )
      if images.shape[1] in (1, 3) and images.shape[3] > 4:
        raise config_utils.UserError(
          f'{split} images are {images.shape}, which looks like (N, C, H, W): '
          'give images.transpose(0, 2, 3, 1)'
        )
      lowest = -1 if split == 'train' else 0
      if not names and (split != 'train' or labels.max() >= 0):
        raise config_utils.UserError(
          'without class_names, images have no classes: give `train` alone, '
          'and -1 as each of its labels; or give class_names'
        )
      if labels.min() < lowest or labels.max() >= len(self.class_names):
        raise config_utils.UserError(
          f'{split} labels go from {labels.min()} to {labels.max()}; with '
          f'{len(self.class_names)} class_names they must lie in '
          f'[{lowest}, {len(self.class_names) - 1}]'
        )
    check_statistics(self.mean, self.std, self.image_shape[-1])

  @property
  def image_shape(self) -> tuple[int, int, int]:
    """(H, W, C)."""
    height, width, channels = self.train.images.shape[1:]
    return height, width, channels

  def fingerprint(self) -> int:
    """Returns a checksum of all that it is, by which a run knows it again."""
    splits = [self.load(split) for split in SPLITS]
    # The shapes: the same bytes, cut elsewhere, are another data set.
    described = {
      'shapes': [arrays.images.shape for arrays in splits],
      'class_names': [str(name) for name in self.class_names],
      'mean': [float(value) for value in self.mean],
      'std': [float(value) for value in self.std],
      'crop_padding': self.crop_padding,
      'flip': bool(self.flip),
    }
    checksum = zlib.crc32(json.dumps(described).encode())
    for arrays in splits:
      for array in (arrays.images, arrays.labels):
        checksum = zlib.crc32(np.ascontiguousarray(array).data, checksum)
    return checksum

  def load(self, split: str) -> Arrays:
    """Returns the images and labels of a split."""
    check_split(split)
    arrays = getattr(self, split) or self.train.take(slice(0))
    return Arrays(arrays.images, arrays.labels.astype(np.int32))


def has_classes(dataset: Dataset) -> bool:
  """Returns whether the images of a data set have classes."""
  return len(dataset.class_names) > 0


def check_labels(dataset: Dataset, splits: Mapping[str, Any]) -> None:
  """Raises UserError where there is nothing to train on, or labels are wrong.

  Those of images without classes must all be -1, where they lie in memory.

  Args:
    dataset: of the run.
    splits: its Arrays by name.
  """
  if not len(splits['train']):
    raise config_utils.UserError('the data set has no training images')
  if has_classes(dataset):
    return
  labels = getattr(splits['train'], 'labels', None)
  if labels is not None and labels.max() >= 0:
    raise config_utils.UserError(
      'the data set has labels, but no class_names: name its classes, or give '
      '-1 as each label, for images without classes'
    )


def check_split(split: str) -> None:
  """Raises UserError where there is no such split."""
  if split not in SPLITS:
    raise config_utils.unknown('split', split, SPLITS)


def check_crop_padding(crop_padding: int) -> None:
  """Raises UserError where it is no number of pixels."""
  if type(crop_padding) is not int or crop_padding < 0:
    raise config_utils.UserError(
      f'crop_padding={crop_padding!r}: give whole pixels, at least 0'
    )


def check_statistics(
  mean: Sequence[float], std: Sequence[float], num_channels: int
) -> None:
  """Raises UserError where images cannot be normalised by a mean and a std.

  Args:
    mean: a number per channel, of pixels scaled to [0, 1].
    std: likewise.
    num_channels: C of the images.
  """
  values = {'mean': mean, 'std': std}
  for name, numbers in values.items():
    shape = np.shape(numbers)
    if shape != (num_channels,):
      raise config_utils.UserError(
        f'{name}={numbers} for images of {num_channels} channels: give '
        f'{num_channels} numbers'
      )
    if not np.all(np.isfinite(np.asarray(numbers, float))):
      raise config_utils.UserError(f'{name}={numbers}: it must be finite')
  if min(std) <= 0:
    raise config_utils.UserError(f'std={std}: it must be positive')
  if max(*mean, *std) > 1 or min(mean) < 0:
    raise config_utils.UserError(
      f'mean={mean}, std={std}: they are of pixels scaled to [0, 1], so that '
      'none is negative or above 1; divide those of pixels from 0 to 255 by 255'
    )
