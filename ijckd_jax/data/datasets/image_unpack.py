"""Pictures out of Parquet's and NumPy's files, into files of their own.

They are written beside the data set's place with a table of them, and then
prepared as any table is. What was cut off is continued, file by file.
"""

from collections.abc import Iterator
from collections.abc import Mapping
from collections.abc import Sequence
import csv
import dataclasses
import glob
import io
import json
import os
import pathlib
import re
import shutil

import numpy as np

from ijckd_jax.data.datasets import image_layout
from ijckd_jax.data.datasets import image_splits
from ijckd_jax.data.datasets import image_table
from ijckd_jax.runtime import config_utils
from ijckd_jax.runtime import disk

PARQUET, NUMPY = '.parquet', '.npz'
TABLE = 'pictures.csv'
DONE = 'done.json'
# How NumPy's files call images and labels: of a split, or of all there are.
ARRAYS = ('{}_images', '{}_labels'), ('x_{}', 'y_{}')
WHOLE = ('images', 'labels')
BATCH = 256  # Rows that are read at a time.


def find(source: str) -> list[pathlib.Path]:
  """Returns the files of many pictures that a source names, in order.

  Args:
    source: such a file, a pattern of them, or a folder that holds Parquet files
      and no pictures; of anything else there are none.

  Raises:
    UserError: nothing fits a pattern.
  """
  path = pathlib.Path(source).expanduser()
  if path.suffix.lower() in (PARQUET, NUMPY) and path.is_file():
    return [path]
  if path.is_dir():
    files = sorted(path.rglob(f'*{PARQUET}'))
    return files if files and not image_layout.walk(path)[0] else []
  if path.suffix.lower() not in (PARQUET, NUMPY):
    return []
  files = sorted(map(pathlib.Path, glob.glob(str(path), recursive=True)))
  if not files:
    raise config_utils.UserError(f'--source {source}: there is no such file')
  return files


def check(files: Sequence[pathlib.Path], columns: image_table.Columns) -> None:
  """Raises UserError unless all files hold pictures and labels alike.

  Args:
    files: as `find` returns them.
    columns: as `unpack` takes them.
  """
  first = _describe(files[0], columns)
  for path in files[1:]:
    found = _describe(path, columns)
    if found != first:
      raise config_utils.UserError(
        f'{path} is not like {files[0]}: it holds {found}, and that {first}'
      )


def unpack(
  files: Sequence[pathlib.Path],
  folder: pathlib.Path,
  columns: image_table.Columns,
) -> pathlib.Path:
  """Writes the pictures of all files, and returns the table of them.

  Args:
    files: as `find` returns them.
    folder: where to; what is complete in it is kept.
    columns: of the Parquet files. The split of a file without such a column is
      what its name, or its folder's, begins with; 'train' if that is none.

  Raises:
    UserError: a file is damaged, or lacks something.
    OSError: reading or writing failed; the same call continues.
  """
  above = pathlib.Path(os.path.commonpath([path.parent for path in files]))
  lines = []
  for path in files:
    name = path.relative_to(above).with_suffix('').as_posix()
    lines += _unpack_file(path, folder, name, columns)
  header = [field.name for field in dataclasses.fields(image_table.Columns)]
  if all(line[-1] == 'train' for line in lines):  # A part will be held out.
    header, lines = header[:-1], [line[:-1] for line in lines]
  table = io.StringIO()
  csv.writer(table).writerows([header, *lines])
  disk.write_text(folder / TABLE, table.getvalue())
  return folder / TABLE


def origin(
  files: Sequence[pathlib.Path], columns: image_table.Columns | None
) -> list:
  """Returns by what unpacked pictures are known again, as JSON."""
  return [
    [[str(path), *_stamp(path)] for path in files],
    columns and dataclasses.asdict(columns),
  ]


def _stamp(path):
  status = path.stat()
  return [status.st_size, status.st_mtime_ns]


def _unpack_file(path, folder, name, columns):
  """Returns the lines of the table for a file, whose pictures are written."""
  target = folder / name
  stamp = [*_stamp(path), dataclasses.asdict(columns)]
  try:
    done = disk.read_json(target / DONE)
    if done['stamp'] == stamp:
      return done['lines']
  except (OSError, ValueError, KeyError):
    pass
  if target.exists():
    shutil.rmtree(target)
  target.mkdir(parents=True)
  read = _parquet if path.suffix.lower() == PARQUET else _numpy
  lines = []
  try:
    for number, (data, label, split) in enumerate(read(path, columns)):
      picture = target / f'{number:07}'
      picture.write_bytes(data)
      # That a second unpacking is the same to those who compare.
      os.utime(picture, ns=(stamp[1], stamp[1]))
      lines.append([f'{name}/{picture.name}', label, split])
  except (config_utils.UserError, OSError):
    raise
  except Exception as error:  # Arrow and NumPy raise whatever they like.
    config_utils.raise_outside(error)
    raise _damaged(path, error) from error
  disk.write_text(target / DONE, json.dumps({'stamp': stamp, 'lines': lines}))
  return lines


def _damaged(path, error):
  return config_utils.UserError(
    f'{path} is damaged or truncated: {config_utils.short(error)}'
  )


def _describe(path, columns) -> str:
  """Returns what a file holds, which its siblings must hold too."""
  try:
    if path.suffix.lower() == PARQUET:
      return _describe_parquet(path, columns)
    with np.load(path) as arrays:
      _pairs(path, arrays)
    return 'arrays'
  except (config_utils.UserError, OSError):
    raise
  except Exception as error:  # Arrow and NumPy raise whatever they like.
    config_utils.raise_outside(error)
    raise _damaged(path, error) from error


def _describe_parquet(path, columns) -> str:
  import pyarrow
  from pyarrow import parquet

  schema = parquet.read_schema(path)
  for column in (columns.image, columns.label):
    if column not in schema.names:
      raise config_utils.UserError(
        f'{path} has no column {column!r}, but '
        f'{", ".join(map(repr, schema.names))}: name them by --image and '
        '--label'
      )
  kind = schema.field(columns.image).type
  if pyarrow.types.is_struct(kind):
    if kind.get_field_index('bytes') < 0:
      raise config_utils.UserError(
        f'{path}: the column {columns.image!r} holds no pictures but {kind}'
      )
  elif not (
    pyarrow.types.is_binary(kind) or pyarrow.types.is_large_binary(kind)
  ):
    raise config_utils.UserError(
      f'{path}: the column {columns.image!r} holds no pictures but {kind}; of '
      'paths, give a CSV file'
    )
  label = schema.field(columns.label).type
  if not (
    pyarrow.types.is_integer(label)
    or pyarrow.types.is_string(label)
    or pyarrow.types.is_large_string(label)
  ):
    raise config_utils.UserError(
      f'{path}: the column {columns.label!r} holds {label}: a class is a whole '
      'number or a name'
    )
  names = _class_names(schema, columns.label)
  classes = f' of {len(names)} classes' if names else ''
  return (
    f'pictures in {kind} and labels in {label}{classes} {names or ""}'.strip()
  )


def _class_names(schema, label) -> Sequence[str] | None:
  """Returns the names that the hub's metadata give to whole numbers."""
  try:
    described = json.loads((schema.metadata or {})[b'huggingface'])
    return list(described['info']['features'][label]['names'])
  except (KeyError, TypeError, ValueError):
    return None


def _parquet(
  path: pathlib.Path, columns: image_table.Columns
) -> Iterator[tuple[bytes, str, str]]:
  """Gives the bytes, the label and the split of each row."""
  from pyarrow import parquet

  with parquet.ParquetFile(path) as file:
    schema = file.schema_arrow
    names = _class_names(schema, columns.label)
    wanted = [columns.image, columns.label]
    has_split = columns.split in schema.names
    wanted += [columns.split] * has_split
    number = 0
    for batch in file.iter_batches(BATCH, columns=wanted):
      for row in batch.to_pylist():
        place, number = f'{path}, row {number}', number + 1
        picture = row[columns.image]
        if isinstance(picture, Mapping):
          picture = picture['bytes']
        if not picture:
          raise config_utils.UserError(f'{place} has no picture')
        split = row[columns.split] if has_split else _split_of(path)
        yield picture, _label(place, row[columns.label], names), split


def _label(place, value, names) -> str:
  """Returns the name of a class."""
  if value is None or (isinstance(value, int) and value < 0):
    raise config_utils.UserError(
      f'{place} has the label {value}, which is no class: leave out the files '
      'without labels'
    )
  if names is None or isinstance(value, str):
    return str(value)
  if value >= len(names):
    raise config_utils.UserError(
      f'{place} has the label {value}, of {len(names)} classes'
    )
  return names[value]


def _split_of(path: pathlib.Path) -> str:
  """Returns the split that the name of a file, or its folder, begins with."""
  for name in (path.name, path.parent.name):
    word = re.match('[A-Za-z]*', name)[0].casefold()
    if word in image_splits.SPLIT_OF:
      return word
  return 'train'


def _pairs(path, arrays) -> dict[str, tuple[str, str]]:
  """Returns the names of images and labels by split."""
  found = {
    split: (images.format(split), labels.format(split))
    for images, labels in ARRAYS
    for split in image_splits.SPLIT_OF
    if images.format(split) in arrays and labels.format(split) in arrays
  }
  if not found and all(name in arrays for name in WHOLE):
    found = {'': WHOLE}
  if not found:
    raise config_utils.UserError(
      f'{path} holds {", ".join(sorted(arrays))}: call the arrays images and '
      'labels, or train_images, train_labels, test_images and test_labels'
    )
  return found


def _numpy(path, columns) -> Iterator[tuple[bytes, str, str]]:
  """Gives the bytes, the label and the split of each image, as PNG."""
  from PIL import Image

  del columns
  with np.load(path) as arrays:  # Without pickles, which run programs.
    names = arrays['class_names'].tolist() if 'class_names' in arrays else None
    for split, (images_name, labels_name) in _pairs(path, arrays).items():
      images, labels = arrays[images_name], arrays[labels_name]
      _check_arrays(path, images_name, images, labels_name, labels)
      for number, image in enumerate(images):
        data = io.BytesIO()
        if image.shape[2:] == (1,):
          image = image[..., 0]
        Image.fromarray(image).save(data, 'PNG', compress_level=3)
        label = labels[number].item()
        place = f'{path}, {labels_name}[{number}]'
        yield data.getvalue(), _label(place, label, names), split or 'train'


def _check_arrays(path, images_name, images, labels_name, labels):
  """Raises unless there is a picture for each label."""
  channels = images.shape[3:] or (1,)
  if images.ndim not in (3, 4) or channels not in ((1,), (3,)):
    raise config_utils.UserError(
      f'{path}: {images_name} is {images.shape}; give (N, H, W) of grey '
      'pictures, or (N, H, W, C) with one channel or three'
    )
  if images.dtype != np.uint8:
    raise config_utils.UserError(
      f'{path}: {images_name} is {images.dtype}; give uint8, 0 to 255'
    )
  if labels.size != len(labels) or len(labels) != len(images):
    raise config_utils.UserError(
      f'{path}: {labels_name} is {labels.shape}, for {len(images)} pictures: '
      'give one label for each'
    )
  if labels.dtype.kind not in 'iuU':
    raise config_utils.UserError(
      f'{path}: {labels_name} is {labels.dtype}; a class is a whole number or '
      'a name'
    )
