"""Reads the original files of data sets, with neither TensorFlow nor network.

Fashion-MNIST's four IDX files, gzipped or not; CIFAR's binary or Python
version, as its archive or unpacked, or its parquet files of Hugging Face's hub.
READERS has a function for each data set, from a folder (or an archive) to what
`prepared.write` takes.
"""

from collections.abc import Callable
from collections.abc import Mapping
from collections.abc import Sequence
import dataclasses
import gzip
import io
import math
import pathlib
import pickle
import struct
import tarfile
import zlib

import numpy as np

from ijckd_jax.data import datasets
from ijckd_jax.data.datasets import parquet_files
from ijckd_jax.data.datasets import prepared
from ijckd_jax.runtime import config_utils

DAMAGED = (EOFError, OSError, tarfile.TarError, zlib.error)


def _incomplete(source, expected):
  """Returns the error for a folder without a complete set of files."""
  found = 'nothing'
  if source.is_dir():
    names = sorted(path.name for path in source.iterdir())
    found = ', '.join(names[:12]) + (', ...' if names[12:] else '') or found
  elif source.is_file():
    found = f'a file, {source.name}, that is not one of those archives'
  wanted = '; or '.join(', '.join(names) for names in expected)
  return config_utils.UserError(
    f'{source}: no complete set of the original files. Looked for {wanted}. '
    f'Found {found}'
  )


def _read_idx(path, num_dims):
  """Returns the array in an IDX file, checked against the file's header."""
  try:
    raw = path.read_bytes()
    if path.suffix == '.gz':
      raw = gzip.decompress(raw)
  except DAMAGED as error:
    raise config_utils.UserError(
      f'{path} is damaged or truncated: {error}'
    ) from error
  # The magic number: two zeros, 8 for unsigned bytes, the number of dimensions.
  start = 4 + 4 * num_dims
  if raw[:4] != bytes([0, 0, 8, num_dims]) or len(raw) < start:
    raise config_utils.UserError(
      f'{path} is not an IDX file of {num_dims} dimension(s) of unsigned bytes'
    )
  shape = struct.unpack(f'>{num_dims}I', raw[4:start])
  if len(raw) != start + math.prod(shape):
    raise config_utils.UserError(
      f'{path} is damaged or truncated: its header declares {shape}, which is '
      f'{start + math.prod(shape)} bytes; it has {len(raw)}'
    )
  return np.frombuffer(raw, np.uint8, offset=start).reshape(shape)


def read_fashion_mnist(source: pathlib.Path):
  """Returns what `prepared.write` takes of a folder with the IDX files."""
  kinds = (('images-idx3-ubyte', 3), ('labels-idx1-ubyte', 1))
  splits = {}
  for split, prefix in (('train', 'train'), ('test', 't10k')):
    arrays = []
    for kind, num_dims in kinds:
      path = source / f'{prefix}-{kind}'
      if not path.is_file():
        path = path.with_name(path.name + '.gz')
      if not path.is_file():
        names = [f'{p}-{k}[.gz]' for p in ('train', 't10k') for k, _ in kinds]
        raise _incomplete(source, [names])
      arrays.append(_read_idx(path, num_dims))
    images, labels = arrays
    if images.shape != (len(labels), 28, 28) or not len(labels):
      raise config_utils.UserError(
        f'{source}: the {prefix} files hold images {images.shape} and labels '
        f'{labels.shape}; they must be (N, 28, 28) and (N,)'
      )
    _check_labels(source, labels, 10)
    splits[split] = {'image': images[..., None], 'label': labels}
  return splits, {}


def _check_labels(place, labels, num_classes):
  if labels.min() < 0 or labels.max() >= num_classes:
    raise config_utils.UserError(
      f'{place}: labels go from {labels.min()} to {labels.max()}; of '
      f'{num_classes} classes they must lie in [0, {num_classes - 1}]'
    )


def _latin1(text, encoding):
  """Returns the bytes that Python 3 wrote as text, where pickles have none."""
  if encoding != 'latin1':
    raise ValueError(f'bytes written as {encoding}')
  return text.encode('latin1')


def _scalar(dtype, raw):
  """Returns a number of numpy's."""
  return np.frombuffer(raw, dtype)[0]


class _Unpickler(pickle.Unpickler):
  """Loads numpy arrays and plain values; a pickle can run any code it names."""

  # By their names in Python 2 and 3, and in numpy 1 and 2.
  allowed = {
    ('_codecs', 'encode'): _latin1,
    ('numpy', 'dtype'): np.dtype,
    ('numpy', 'ndarray'): np.ndarray,
    **{
      (f'numpy.{core}.{module}', name): value
      for core in ('core', '_core')
      for module, name, value in (
        ('multiarray', '_reconstruct', np.empty(0).__reduce__()[0]),
        ('multiarray', 'scalar', _scalar),
        ('numeric', '_frombuffer', np.empty(0).__reduce_ex__(5)[0]),
      )
    },
  }

  def find_class(self, module, name):
    if (module, name) not in self.allowed:
      raise config_utils.UserError(
        f'refused: it asks for {module}.{name}, and CIFAR needs numpy arrays '
        'only'
      )
    return self.allowed[module, name]


def _text(value):
  return value.decode() if isinstance(value, bytes) else value


def _unpickle(raw):
  """Returns a dictionary by text, as which bytes are read as well."""
  content = _Unpickler(io.BytesIO(raw), encoding='latin1').load()
  return {_text(key): value for key, value in content.items()}


def _python_batch(raw, keys):
  batch = _unpickle(raw)
  return np.stack([batch[key] for key in keys], axis=1), batch['data']


def _python_names(files, keys):
  (raw,) = files.values()
  names = _unpickle(raw)
  return [[_text(name) for name in names[key]] for key in keys]


def _binary_batch(raw, keys):
  rows = np.frombuffer(raw, np.uint8).reshape(-1, len(keys) + 3072)
  return rows[:, : len(keys)], rows[:, len(keys) :]


def _binary_names(files, keys):
  del keys  # One file for each kind of label.
  return [raw.decode('utf-8-sig').split() for raw in files.values()]


@dataclasses.dataclass(frozen=True)
class _Version:
  """One of the forms in which CIFAR is published."""

  folder: str
  archive: str
  train: Sequence[str]
  test: str
  names: Sequence[str]  # The files with the class names.
  label_keys: Sequence[str]  # What the labels are called in it.
  name_keys: Sequence[str]
  batch_fn: Callable[[bytes, Sequence[str]], tuple[np.ndarray, np.ndarray]]
  names_fn: Callable[[Mapping[str, bytes], Sequence[str]], list[list[str]]]

  @property
  def files(self):
    return [*self.train, self.test, *self.names]


# For each data set tfds's label features, their sizes, and the two versions.
_CIFAR = {
  'cifar10': (
    {'label': 10},
    _Version(
      'cifar-10-batches-bin',
      'cifar-10-binary.tar.gz',
      [f'data_batch_{i}.bin' for i in range(1, 6)],
      'test_batch.bin',
      ['batches.meta.txt'],
      ['labels'],
      ['label_names'],
      _binary_batch,
      _binary_names,
    ),
    _Version(
      'cifar-10-batches-py',
      'cifar-10-python.tar.gz',
      [f'data_batch_{i}' for i in range(1, 6)],
      'test_batch',
      ['batches.meta'],
      ['labels'],
      ['label_names'],
      _python_batch,
      _python_names,
    ),
  ),
  'cifar100': (
    {'coarse_label': 20, 'label': 100},
    _Version(
      'cifar-100-binary',
      'cifar-100-binary.tar.gz',
      ['train.bin'],
      'test.bin',
      ['coarse_label_names.txt', 'fine_label_names.txt'],
      ['coarse_labels', 'fine_labels'],
      ['coarse_label_names', 'fine_label_names'],
      _binary_batch,
      _binary_names,
    ),
    _Version(
      'cifar-100-python',
      'cifar-100-python.tar.gz',
      ['train'],
      'test',
      ['meta'],
      ['coarse_labels', 'fine_labels'],
      ['coarse_label_names', 'fine_label_names'],
      _python_batch,
      _python_names,
    ),
  ),
}

# What its labels are called in Hugging Face's files, in the same order.
_PARQUET = {'cifar10': ['label'], 'cifar100': ['coarse_label', 'fine_label']}


def _find_cifar(source, versions):
  """Returns the first complete version in `source`, and its files, or None."""
  for version in versions:
    for place in (source, source / version.folder):
      if all((place / name).is_file() for name in version.files):
        return version, {
          name: (place / name).read_bytes() for name in version.files
        }
    for place in (source, source / version.archive):
      if not place.is_file():
        continue
      try:
        with tarfile.open(place) as archive:
          files = {
            pathlib.PurePosixPath(member.name).name: archive.extractfile(member)
            for member in archive
            if member.isfile()
          }
          if all(name in files for name in version.files):
            return version, {name: files[name].read() for name in version.files}
      except DAMAGED as error:
        raise config_utils.UserError(
          f'{place} is damaged or truncated: {error}'
        ) from error
  return None


def _read_batches(source, name, version, files):
  """Returns images and labels by split, and class names, of one version."""
  splits = {}
  for split, batches in (('train', version.train), ('test', [version.test])):
    parts = []
    for file in batches:
      try:
        labels, pixels = version.batch_fn(files[file], version.label_keys)
        images = pixels.reshape(len(labels), 3, 32, 32).transpose(0, 2, 3, 1)
        if images.dtype != np.uint8 or not len(images):
          raise ValueError(f'{len(images)} images of {images.dtype}')
      except config_utils.UserError as error:
        raise config_utils.UserError(f'{source}: {file}: {error}') from error
      except Exception as error:  # Damaged pickles raise whatever they like.
        config_utils.raise_outside(error)
        raise config_utils.UserError(
          f'{source}: {file} is damaged, truncated or no file of {name}: '
          f'{error}'
        ) from error
      parts.append((images, labels))
    splits[split] = tuple(map(np.concatenate, zip(*parts, strict=True)))
  try:
    names = version.names_fn(
      {file: files[file] for file in version.names}, version.name_keys
    )
  except Exception as error:
    config_utils.raise_outside(error)
    raise config_utils.UserError(
      f'{source}: no class names in {", ".join(version.names)}: {error}'
    ) from error
  return splits, names


def read_cifar(name: str, source: pathlib.Path):
  """Returns what `prepared.write` takes of a folder or archive of CIFAR."""
  features, *versions = _CIFAR[name]
  if source.suffix == '.parquet':
    source = source.parent
  if version := _find_cifar(source, versions):
    arrays, values = _read_batches(source, name, *version)
  elif parquet := parquet_files.find(source):
    arrays, values = parquet_files.read(parquet, _PARQUET[name])
  else:
    raise _incomplete(
      source,
      [
        *([version.archive, *version.files] for version in versions),
        ['train-*.parquet', 'test-*.parquet'],
      ],
    )
  if [len(value) for value in values] != list(features.values()):
    raise config_utils.UserError(
      f'{source}: no class names: there are {[*map(len, values)]} of them, and '
      f'there should be {[*features.values()]}'
    )
  names = dict(zip(features, values, strict=True))
  known = datasets.get(name).class_names
  if tuple(names['label']) != known:
    raise config_utils.UserError(
      f'{source}: the classes are {names["label"][:3]}..., those of {name} are '
      f'{known[:3]}...'
    )
  splits = {}
  for split, (images, labels) in arrays.items():
    for column, num_classes in zip(labels.T, features.values(), strict=True):
      _check_labels(f'{source}: {split}', column, num_classes)
    ids = [f'{split}_{index:05d}' for index in range(len(images))]
    splits[split] = {'id': ids, 'image': images}
    splits[split] |= dict(zip(features, labels.T, strict=True))
  num_train, num_test = (len(splits[key]['id']) for key in ('train', 'test'))
  # No header tells how many there are, but this holds for both CIFARs and shows
  # files that end early between two images.
  if num_train != 5 * num_test:
    raise config_utils.UserError(
      f'{source}: {num_train} training and {num_test} test images; there must '
      'be five times as many for training, so a file is truncated'
    )
  return splits, names


READERS = {
  'cifar10': lambda source: read_cifar('cifar10', source),
  'cifar100': lambda source: read_cifar('cifar100', source),
  'fashion_mnist': read_fashion_mnist,
}


def write(name: str, source: str, data_dir: str) -> None:
  """Writes a data set of READERS as tfds stores it.

  Args:
    name: a key of READERS.
    source: the folder, or an archive, with its original files.
    data_dir: see `prepared.write`.

  Raises:
    UserError: the files are not those of the data set, or `data_dir` cannot be
      written.
  """
  import tensorflow_datasets as tfds

  splits, names = READERS[name](pathlib.Path(source).expanduser())
  prepared.write(tfds.builder_cls(name), data_dir, splits, names)
