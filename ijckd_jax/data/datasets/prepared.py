"""Data sets of tfds that were prepared: found, read, written, downloaded.

All but the download takes neither TensorFlow nor network.
"""

from collections.abc import Callable
from collections.abc import Mapping
from collections.abc import Sequence
import contextlib
import dataclasses
import importlib.util
import io
import os
import pathlib
import sys
import tempfile

import numpy as np

from ijckd_jax.data import datasets
from ijckd_jax.data.datasets import tfds_folder
from ijckd_jax.runtime import config_utils


@dataclasses.dataclass(frozen=True)
class TfdsDataset:
  """A data set of tfds, once prepared; subclasses fill in the attributes.

  Attributes:
    data_dir: tfds's data directory; '' is tfds's default.
    validation_fraction: part of every class's training images to hold out.
    crop_padding, flip: see `datasets`.
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
    datasets.check_crop_padding(self.crop_padding)

  def load(self, split: str) -> datasets.Arrays:
    """Returns the images and labels of a split.

    Raises:
      UserError: there is no such split, or the data set is not prepared.
    """
    datasets.check_split(split)
    if split == 'validation' and not self.validation_fraction:
      # At once: the training images would be decoded only to be dropped.
      return datasets.Arrays(
        np.zeros((0, *self.image_shape), np.uint8), np.zeros(0, np.int32)
      )
    if split == 'test':
      return read(self.tfds_name, self.data_dir, 'test', self.image_shape)
    arrays = read(self.tfds_name, self.data_dir, 'train', self.image_shape)
    train, validation = hold_out(arrays, self.validation_fraction)
    return train if split == 'train' else validation


def hold_out(
  arrays: datasets.Arrays, fraction: float
) -> tuple[datasets.Arrays, datasets.Arrays]:
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


def require(name: str, data_dir: str, hint: str = ''):
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
    if known not in datasets.DATASETS:
      known = f'image_folder --source DIR --name {name}'
    where = f' --data_dir {data_dir}' if data_dir else ''
    raise config_utils.UserError(
      f'{name} is not prepared in {data_root(data_dir)}; run: ijckd '
      f'prepare {known}{where}{hint}'
    )
  return builder


def read(
  name: str, data_dir: str, split: str, image_shape: Sequence[int]
) -> datasets.Arrays:
  """Reads a split of a prepared data set into memory.

  Args:
    name: tfds's name.
    data_dir: tfds's data directory; '' is tfds's default.
    split: 'train' or 'test'.
    image_shape: (H, W, C) that the images must have.

  Raises:
    UserError: it is not prepared, or is not what is expected.
  """
  builder = require(
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
  return datasets.Arrays(images, labels)


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
  import tqdm

  total = sum(len(columns['image']) for columns in splits.values())
  progress = tqdm.tqdm(total=total, desc=builder_cls.name, disable=None)
  writer_cls = _writer(builder_cls, splits, progress.update)
  root = data_root(data_dir)
  try:
    root.mkdir(parents=True, exist_ok=True)
    # tfds writes aside too, but under a name from Python's global generator:
    # two processes that seeded it alike would write into one folder.
    with (
      progress,
      tempfile.TemporaryDirectory(prefix='incomplete.', dir=root) as temporary,
    ):
      builder = writer_cls(data_dir=temporary, file_format='array_record')
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


def _writer(
  builder_cls: type,
  splits: Mapping[str, Mapping[str, Sequence]],
  update: Callable[[], object],
) -> type:
  """Returns a builder class whose examples are arrays; see `write`.

  Args:
    builder_cls: see `write`.
    splits: see `write`.
    update: is called after each example.
  """
  from PIL import Image
  import tensorflow_datasets as tfds

  with tfds.core.registered.skip_registration():

    class Builder(builder_cls):
      name = builder_cls.name
      # tfds writes this into dataset_info.json, as it stands in older files.
      __module__ = 'ijckd_jax.data.datasets'
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
          update()
          yield key, example

  return Builder


def download(name: str, data_dir: str, hint: str = '') -> None:
  """Lets tfds download and write a data set, which takes TensorFlow.

  Args:
    name: tfds's name.
    data_dir: tfds's data directory; '' is tfds's default.
    hint: what else can be done where it cannot be downloaded.

  Raises:
    UserError: a module is missing, or tfds cannot prepare the data set.
  """
  # tfds uses the second without installing it.
  for module in ('tensorflow', 'importlib_resources'):
    if importlib.util.find_spec(module) is None:
      raise config_utils.UserError(
        f'tfds needs {module} to download {name}: pip install '
        f"'ijckd_jax[prepare]'{hint}"
      )
  import tensorflow_datasets as tfds

  tfds.display_progress_bar(sys.stderr.isatty())
  try:
    tfds.builder(
      name, data_dir=data_dir or None, file_format='array_record'
    ).download_and_prepare()
  except (
    OSError,
    AssertionError,  # Archives that have to be put somewhere by hand.
    tfds.core.registered.DatasetNotFoundError,
    tfds.core.download.util.DownloadError,
    tfds.core.download.download_manager.NonMatchingChecksumError,
  ) as error:
    reason = ' '.join(str(error).split())[:300]
    raise config_utils.UserError(
      f'cannot prepare {name}: {reason}{hint}'
    ) from error
