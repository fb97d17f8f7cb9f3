"""Data sets of encoded images of any size, decoded when they are asked for."""

from collections.abc import Sequence
import dataclasses
import functools
import hashlib
import json
import pathlib
from typing import Any

import numpy as np

from ijckd_jax.data import datasets
from ijckd_jax.data import images
from ijckd_jax.data.datasets import prepared
from ijckd_jax.data.datasets import tfds_folder
from ijckd_jax.runtime import config_utils

# Entropy of the streams, beside the run's seed; the order of the examples has
# none.
VIEWS_STREAM = 1
REPLACEMENT_ATTEMPTS = 100
DIGESTS = 'digests.json'  # Beside a data set: a hash of each split.
NUM_HASHED = 256  # Examples of a data set that has none.


@dataclasses.dataclass(frozen=True)
class Source:
  """A split of a prepared tfds data set, opened where it is first read.

  Attributes:
    name: tfds's name.
    data_dir: tfds's data directory; '' is tfds's default.
    split: tfds's name of the split.
  """

  name: str
  data_dir: str
  split: str

  def __reduce__(self):
    # Another process opens it anew.
    return type(self), (self.name, self.data_dir, self.split)

  @functools.cached_property
  def builder(self):
    """The builder of tfds.

    Raises:
      UserError: it is not prepared, or without such a split.
    """
    builder = prepared.require(self.name, self.data_dir)
    tfds_folder.check_shards(builder, self.split)
    return builder

  @functools.cached_property
  def _examples(self):
    import tensorflow_datasets as tfds

    return self.builder.as_data_source(
      self.split, decoders={'image': tfds.decode.SkipDecoding()}
    )

  @functools.cached_property
  def _num_examples(self):
    return self.builder.info.splits[self.split].num_examples

  def __len__(self):
    return self._num_examples

  def __getitem__(self, index: int) -> dict[str, Any]:
    """Returns 'image' (bytes), 'label' and 'file_name', where it has them."""
    return self._examples[index]

  def describe(self) -> list:
    """Returns what tells it from other data, without reading it all."""
    info = self.builder.info
    split = info.splits[self.split]
    names = info.features['label'].names if 'label' in info.features else []
    return [
      *(info.name, str(info.version), self.split),
      *(split.num_bytes, list(split.shard_lengths)),
      *(list(names), self._content()),
    ]

  def _content(self) -> str:
    """Returns the hash that `prepare` wrote, or one of a sample of examples."""
    path = pathlib.Path(self.builder.data_dir) / DIGESTS
    if path.exists():
      try:
        return json.loads(path.read_text())[self.split]
      except (KeyError, OSError, TypeError, ValueError) as error:
        raise config_utils.UserError(
          f'{path} is damaged ({config_utils.short(error)}): prepare the data '
          'set again'
        ) from error
    digest = hashlib.sha256()
    count = min(len(self), NUM_HASHED)
    for row in np.linspace(0, len(self) - 1, count).astype(int):
      example = self[int(row)]
      digest.update(example['image'])
      digest.update(str(example.get('label')).encode())
    return digest.hexdigest()


@dataclasses.dataclass(frozen=True)
class Photos:
  """Examples of one or several sources, in place of datasets.Arrays.

  Attributes:
    sources: where they are read, one after the other.
    rows: (N,) int32, which of all the sources' examples they are.
    views: what is seen of them.
    max_bad_fraction: part of them that may be damaged and is replaced.
    is_sample: they are a sample, in which a damaged one is black, and has no
      label.
  """

  sources: Sequence[Source]
  rows: np.ndarray
  views: images.Views
  max_bad_fraction: float
  is_sample: bool = False

  in_memory = False

  def __len__(self):
    return len(self.rows)

  def take(self, indices: np.ndarray) -> datasets.Arrays:
    """Returns evaluation's view of the examples at `indices`, in their order.

    Raises:
      UserError: one of them cannot be decoded, and `is_sample` is not set.
    """
    pixels, labels = [], []
    for index in indices:
      example = self.read(index)
      try:
        pixels.append(self.views.evaluation(example['image']))
      except images.BadImage as error:
        if self.is_sample:
          size = self.views.size
          pixels.append(np.zeros((size, size, 3), np.uint8))
          labels.append(-1)
          continue
        raise config_utils.UserError(
          f'{self.name_of(index)} cannot be decoded ({error}), and every image '
          'counts in evaluation: mend it, or prepare the data without it'
        ) from error
      labels.append(example.get('label', -1))
    shape = (0, self.views.size, self.views.size, 3)
    return datasets.Arrays(
      np.stack(pixels) if pixels else np.zeros(shape, np.uint8),
      np.array(labels, np.int32),
    )

  def subset(self, indices: np.ndarray) -> 'Photos':
    """Returns the examples at `indices`, as a sample of them; none is read."""
    return dataclasses.replace(self, rows=self.rows[indices], is_sample=True)

  def train_views(
    self, indices: np.ndarray, epochs: np.ndarray, seed: int
  ) -> dict[str, np.ndarray]:
    """Returns a random view of each example; a pure function.

    In place of one that cannot be decoded comes the next one that can.

    Args:
      indices: (B,) of the examples.
      epochs: (B,) to which the views belong.
      seed: the run's.

    Returns:
      'image' uint8 (B, size, size, 3), 'label' int32 (B,), and 'bad' bool (B,):
      which were replaced.
    """
    rows = [
      self._train_view(int(index), int(epoch), seed)
      for index, epoch in zip(indices, epochs, strict=True)
    ]
    pixels, labels, bad = zip(*rows, strict=True)
    return {
      'image': np.stack(pixels),
      'label': np.array(labels, np.int32),
      'bad': np.array(bad),
    }

  def _train_view(self, index, epoch, seed):
    for attempt in range(REPLACEMENT_ATTEMPTS):
      # As fast to start as any, and RandomState's streams are promised never to
      # change.
      entropy = np.random.SeedSequence((seed, VIEWS_STREAM, epoch, index))
      random = np.random.RandomState(np.random.Philox(entropy))
      example = self.read((index + attempt) % len(self))
      try:
        pixels = self.views.train(example['image'], random)
      except images.BadImage:
        continue
      return pixels, example.get('label', -1), attempt > 0
    raise config_utils.UserError(
      f'{REPLACEMENT_ATTEMPTS} images one after the other, from '
      f'{self.name_of(index)} on, cannot be decoded'
    )

  def read(self, index: int) -> dict[str, Any]:
    """Returns an example as it is stored; see Source."""
    row = int(self.rows[index])
    for source in self.sources:
      if row < len(source):
        return source[row]
      row -= len(source)
    raise IndexError(index)

  def name_of(self, index: int) -> str:
    """Returns what a reader would look for to find an example."""
    name = self.read(index).get('file_name', b'').decode(errors='replace')
    return name or f'example {self.rows[index]} of {self.sources[0].name}'

  def digest(self) -> str:
    """Returns a hash of them and of their views; see Source.describe."""
    described = [source.describe() for source in self.sources]
    digest = hashlib.sha256(json.dumps([described, str(self.views)]).encode())
    digest.update(self.rows)
    return digest.hexdigest()[:16]


@dataclasses.dataclass(frozen=True)
class PhotoDataset:
  """A data set of tfds with images of any size; subclasses fill in the rest.

  Attributes:
    data_dir: tfds's data directory; '' is tfds's default.
    size: height and width of the views, in pixels.
    resize: pixels of the shorter side before evaluation's centre crop.
    min_area: of a training crop, as a part of the image.
    validation_fraction: part of the training images to hold out.
    max_bad_fraction: part of the training images that may be damaged; such
      ones are replaced by others, and named. In evaluation there may be none.
    tfds_name: the name under which tfds stores it.
    test_split: what tfds calls the images that are evaluated on.
  """

  data_dir: str = ''
  size: int = 224
  resize: int = 256
  min_area: float = 0.08
  validation_fraction: float = 0.0
  max_bad_fraction: float = 0.001
  flip: bool = True

  crop_padding = 0
  # Of ImageNet's training images; torchvision's, as its weights expect them.
  mean = (0.485, 0.456, 0.406)
  std = (0.229, 0.224, 0.225)

  def __post_init__(self):
    whole = type(self.size) is int and type(self.resize) is int
    if not (whole and 0 < self.size <= self.resize):
      raise config_utils.UserError(
        f'size={self.size}, resize={self.resize}: give whole pixels, a size of '
        'at least 1, and a resize that is no smaller'
      )
    if not 0 < self.min_area <= 1:
      raise config_utils.UserError(
        f'min_area={self.min_area}: give a part of the image, above 0 and at '
        'most 1'
      )
    for field in ('validation_fraction', 'max_bad_fraction'):
      if not 0 <= getattr(self, field) < 1:
        raise config_utils.UserError(
          f'{field}={getattr(self, field)}: give a part of the training '
          'images, at least 0 and less than 1'
        )

  @property
  def image_shape(self) -> tuple[int, int, int]:
    """(H, W, C)."""
    return self.size, self.size, 3

  def load(self, split: str) -> Photos:
    """Returns the examples of a split; none is read yet.

    Raises:
      UserError: there is no such split, or the data set is not prepared.
    """
    datasets.check_split(split)
    sources = self.sources(self.test_split if split == 'test' else 'train')
    whole = self.photos(sources)
    rows = whole.rows
    if split != 'test':
      # By chance, not by class: to know the classes is to read everything. A
      # source of unlabelled images stands behind the first, and is not held
      # out.
      num_images = len(sources[0])
      num_held = round(self.validation_fraction * num_images)
      if self.validation_fraction and not 0 < num_held < num_images:
        raise config_utils.UserError(
          f'validation_fraction={self.validation_fraction} of {num_images} '
          'training images leaves none to train on or none to validate on'
        )
      # RandomState's streams, unlike Generator's, are promised never to change.
      order = np.random.RandomState(0).permutation(num_images)
      held = np.zeros(len(rows), bool)
      held[order[:num_held]] = True
      rows = rows[held if split == 'validation' else ~held]
    return dataclasses.replace(whole, rows=rows)

  def photos(self, sources: Sequence[Source]) -> Photos:
    """Returns all examples of some sources."""
    return Photos(
      sources,
      np.arange(sum(map(len, sources)), dtype=np.int32),
      images.Views(self.size, self.resize, (self.min_area, 1.0)),
      self.max_bad_fraction,
    )

  def sources(self, split: str) -> tuple[Source, ...]:
    """Returns where tfds's split `split` is read."""
    return (Source(self.tfds_name, self.data_dir, split),)
