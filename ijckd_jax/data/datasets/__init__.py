"""The data sets by name, and what each must be.

A data set is a frozen dataclass, in a module of its own as `Dataset`, whose
fields can be set in a config. It has these attributes:

  image_shape: (H, W, C) of its uint8 images.
  class_names: K names.
  mean, std: C numbers each, of pixels scaled to [0, 1].
  crop_padding: zero padding in pixels of the training crop; 0 for none.
  flip: whether training images are mirrored at random.

and one function, `load(split) -> Arrays`, for 'train', 'validation' and 'test'
('validation' is held out of 'train', and empty where no part is asked for).

What tfds knows under a name is a `TfdsDataset` with those attributes filled in,
which lies in memory, or a `photos.PhotoDataset`, whose images are decoded when
they are asked for; arrays from Python are an `ArrayDataset`.
"""

from collections.abc import Mapping
from collections.abc import Sequence
import contextlib
import dataclasses
import hashlib
import io
import json
import os
import pathlib
import tempfile
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

  def __post_init__(self):
    for name in ('images', 'labels'):
      values = getattr(self, name)
      if type(values) is not np.ndarray:
        object.__setattr__(self, name, _as_numpy(name, values))

  def __len__(self):
    return len(self.labels)

  def take(self, indices: np.ndarray) -> 'Arrays':
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
      digest.update(np.ascontiguousarray(array))
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


@dataclasses.dataclass(frozen=True)
class TfdsDataset:
  """A data set of tfds, once prepared; subclasses fill in the attributes.

  Attributes:
    data_dir: tfds's data directory; '' is tfds's default.
    validation_fraction: part of every class's training images to hold out.
    crop_padding, flip: see the module's docstring.
    tfds_name: the name under which tfds stores it.
  """

  data_dir: str = ''
  validation_fraction: float = 0.0
  crop_padding: int = 0
  flip: bool = False

  def __post_init__(self):
    if not 0 <= self.validation_fraction < 1:
      raise config_utils.UserError(
        f'validation_fraction={self.validation_fraction}: give a part of the '
        'training images, at least 0 and less than 1'
      )
    check_crop_padding(self.crop_padding)

  def load(self, split: str) -> Arrays:
    """Returns the images and labels of a split.

    Raises:
      UserError: there is no such split, or the data set is not prepared.
    """
    check_split(split)
    if split == 'validation' and not self.validation_fraction:
      # At once: the training images would be decoded only to be dropped.
      return Arrays(
        np.zeros((0, *self.image_shape), np.uint8), np.zeros(0, np.int32)
      )
    if split == 'test':
      return from_tfds(self.tfds_name, self.data_dir, 'test', self.image_shape)
    arrays = from_tfds(self.tfds_name, self.data_dir, 'train', self.image_shape)
    train, validation = hold_out(arrays, self.validation_fraction)
    return train if split == 'train' else validation


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class ArrayDataset:
  """A data set from arrays. Labels of -1, in `train` only, mean unlabelled.

  Attributes:
    train, test, validation: images and labels of each split.
    class_names: K names; what is no text becomes one.
    mean, std: C numbers each, of pixels scaled to [0, 1].
    crop_padding, flip: see the module's docstring.

  Raises:
    UserError: they do not fit together.
  """

  train: Arrays
  test: Arrays
  validation: Arrays | None = None
  class_names: Sequence[str]
  mean: Sequence[float]
  std: Sequence[float]
  crop_padding: int = 0
  flip: bool = False

  def __post_init__(self):
    check_crop_padding(self.crop_padding)
    names = tuple(str(name) for name in self.class_names)
    object.__setattr__(self, 'class_names', names)
    for split in SPLITS:
      arrays = getattr(self, split)
      if arrays is None and split == 'validation':
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
    return tuple(self.train.images.shape[1:])

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
        checksum = zlib.crc32(np.ascontiguousarray(array), checksum)
    return checksum

  def load(self, split: str) -> Arrays:
    """Returns the images and labels of a split."""
    check_split(split)
    arrays = getattr(self, split) or self.train.take(slice(0))
    return Arrays(arrays.images, arrays.labels.astype(np.int32))


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


def hold_out(arrays: Arrays, fraction: float) -> tuple[Arrays, Arrays]:
  """Splits off a fixed `fraction` of every class: (the rest, the held-out).

  The choice depends on the data alone, never on a run's seed, so that runs of
  different seeds are selected on the same images. Both keep their order.

  Raises:
    UserError: `fraction` is so small or large that one of the two is empty.
  """
  # RandomState's streams, unlike Generator's, are promised never to change.
  random = np.random.RandomState(0)
  held = np.zeros(len(arrays), bool)
  for label in np.unique(arrays.labels):
    members = random.permutation(np.flatnonzero(arrays.labels == label))
    held[members[: round(fraction * len(members))]] = True
  if fraction and (held.all() or not held.any()):
    raise config_utils.UserError(
      f'validation_fraction={fraction} of {len(arrays)} training images leaves '
      'none to train on or none to validate on'
    )
  return arrays.take(~held), arrays.take(held)


def data_root(data_dir: str) -> pathlib.Path:
  """Returns tfds's data directory; '' is tfds's default."""
  from tensorflow_datasets.core import constants

  return pathlib.Path(data_dir or constants.DATA_DIR).expanduser()


def find(name: str, data_dir: str):
  """Returns tfds's builder of a prepared data set, or None.

  Raises:
    UserError: it is there, but stored so that only TensorFlow can read it, or
      damaged, or names code or files that are not its own; or it would have to
      be read from a bucket.
  """
  import tensorflow_datasets as tfds

  from ijckd_jax.data.datasets import tfds_folder

  if data_dir.startswith('gs://'):
    raise config_utils.UserError(
      f'{data_dir}: ArrayRecord files are read from a file system; mount the '
      'bucket (gcsfuse) or copy the folder, and give that path as data_dir'
    )
  reader = tfds.core.read_only_builder
  # What tfds's builder_from_files does; between its two halves is the one
  # moment at which the folder is known and nothing of it has been imported.
  try:
    with tfds.core.utils.error_utils.record_error_context():
      folder = reader._find_builder_dir(
        name, data_dir=os.path.expanduser(data_dir) or None
      )
    if folder is None:
      return None
    tfds_folder.check(pathlib.Path(folder))
    builder = reader.builder_from_directory(folder)
  except config_utils.UserError:
    raise
  except Exception as error:  # Its files may be wrong in many ways.
    config_utils.raise_outside(error)
    raise config_utils.UserError(
      f'{name} in {data_root(data_dir)} cannot be read: '
      f'{config_utils.short(error)}'
    ) from error
  formats = [format.value for format in builder.info.available_file_formats()]
  if 'array_record' not in formats:
    raise config_utils.UserError(
      f'{name} is stored as {", ".join(formats)} in {builder.data_dir}, and '
      'only array_record is read without TensorFlow; choose another data_dir '
      'to prepare it in, or delete that folder'
    )
  return builder


def prepared(name: str, data_dir: str, hint: str = ''):
  """Returns tfds's builder of a data set that must be there.

  Args:
    name: tfds's name.
    data_dir: tfds's data directory; '' is tfds's default.
    hint: what else can be done where it is not there.

  Raises:
    UserError: it is not prepared; or see `find`.
  """
  builder = find(name, data_dir)
  if builder is None:
    known = name.partition('/')[0]
    if known not in DATASETS:
      known = f'image_folder --source DIR --name {name}'
    where = f' --data_dir {data_dir}' if data_dir else ''
    raise config_utils.UserError(
      f'{name} is not prepared in {data_root(data_dir)}; run: ijckd '
      f'prepare {known}{where}{hint}'
    )
  return builder


def from_tfds(
  name: str, data_dir: str, split: str, image_shape: Sequence[int]
) -> Arrays:
  """Reads a split of a prepared data set into memory.

  Args:
    name: tfds's name.
    data_dir: tfds's data directory; '' is tfds's default.
    split: 'train' or 'test'.
    image_shape: (H, W, C) that the images must have.

  Raises:
    UserError: it is not prepared, or is not what is expected.
  """
  from ijckd_jax.data.datasets import tfds_folder

  builder = prepared(
    name,
    data_dir,
    ' (or, with the original files in a folder DIR, the same by --source DIR)',
  )
  tfds_folder.check_shards(builder, split)
  source = builder.as_data_source(split)
  # One call for all of them: record by record, reading takes four times longer.
  examples = source.__getitems__(range(len(source)))
  images = np.stack([example['image'] for example in examples])
  if images.shape[1:] != tuple(image_shape):
    raise config_utils.UserError(
      f'{builder.data_dir} holds images of {images.shape[1:]}, not '
      f'{tuple(image_shape)}: it is another data set called {name}'
    )
  labels = np.array([example['label'] for example in examples], np.int32)
  return Arrays(images, labels)


def write(
  builder_cls: type,
  data_dir: str,
  splits: Mapping[str, Mapping[str, Sequence]],
  names: Mapping[str, Sequence[str]] | None = None,
) -> None:
  """Writes arrays as a tfds data set, with neither TensorFlow nor network.

  It is written aside and moved into place when complete, so that nothing half
  written is ever found; where another process was faster, its copy stays.

  Args:
    builder_cls: tfds's builder class, for name, version and features.
    data_dir: tfds's data directory; '' is tfds's default.
    splits: for each split its features by name, of N entries each; 'image' is
      uint8 (N, H, W, C), or holds encoded images.
    names: class names of those label features that have none yet.

  Raises:
    UserError: the directory cannot be written.
  """
  from PIL import Image
  import tensorflow_datasets as tfds
  import tqdm

  total = sum(len(columns['image']) for columns in splits.values())
  progress = tqdm.tqdm(total=total, desc=builder_cls.name, disable=None)

  with tfds.core.registered.skip_registration():

    class Builder(builder_cls):
      name = builder_cls.name
      # Nothing is downloaded; tfds's search for checksums beside this module
      # needs importlib_resources, which it does not install.
      url_infos = None

      def _split_generators(self, dl_manager):
        return {
          split: self._generate_examples(columns)
          for split, columns in splits.items()
        }

      def _generate_examples(self, columns):
        for key, row in enumerate(zip(*columns.values(), strict=True)):
          example = dict(zip(columns, row, strict=True))
          image = example['image']
          if isinstance(image, bytes):
            example['image'] = io.BytesIO(image)
          else:
            # tfds encodes arrays by TensorFlow, but PIL images without.
            example['image'] = Image.fromarray(
              image[..., 0] if image.shape[-1] == 1 else image
            )
          progress.update()
          yield key, example

  root = data_root(data_dir)
  try:
    root.mkdir(parents=True, exist_ok=True)
    # tfds writes aside too, but under a name from Python's global generator:
    # two processes that seeded it alike would write into one folder.
    with (
      progress,
      tempfile.TemporaryDirectory(prefix='incomplete.', dir=root) as temporary,
    ):
      builder = Builder(data_dir=temporary, file_format='array_record')
      for feature, values in (names or {}).items():
        builder.info.features[feature].names = values
      # It would tell of the folder written aside, and draw bars into logs.
      with (
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()),
      ):
        builder.download_and_prepare()
      final = root / pathlib.Path(builder.data_dir).relative_to(temporary)
      final.parent.mkdir(exist_ok=True)
      try:
        os.rename(builder.data_dir, final)
      except OSError:
        if not final.is_dir():
          raise
  except OSError as error:
    raise config_utils.UserError(
      f'cannot write {builder_cls.name} under {root}: {error}; give a '
      'directory that can be written as data_dir'
    ) from error
