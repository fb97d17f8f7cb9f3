"""Unpacks the pictures of Parquet and NumPy files into single files.

The pictures are written beside the data set's place, with a table of them, and
then prepared as any table is. An interrupted call continues with the first
source file that is not complete.
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
import shutil

import numpy as np

from ijckd_jax.data.datasets import image_layout
from ijckd_jax.data.datasets import image_splits
from ijckd_jax.data.datasets import image_table
from ijckd_jax.runtime import config_utils
from ijckd_jax.runtime import disk

PARQUET, NUMPY = '.parquet', '.npz'
SUFFIXES = {'parquet': PARQUET, 'npz': NUMPY}
TABLE = 'pictures.csv'
DONE = 'done.json'
# Names of images and labels in NumPy files: of one split, and without splits.
ARRAYS = ('{}_images', '{}_labels'), ('x_{}', 'y_{}')
WHOLE = ('images', 'labels')
CLASS_NAMES = 'class_names'
BATCH = 256  # Rows that are read at a time.


def find(source: str, suffix: str = '') -> list[pathlib.Path]:
  """Returns the Parquet or NumPy files that a source names, sorted.

  Args:
    source: such a file, a pattern of files, or a folder that holds Parquet
      files and no pictures. Anything else gives an empty list.
    suffix: PARQUET or NUMPY if files of that kind must be there; a folder may
      then hold pictures too. '': no file need be there.

  Raises:
    UserError: nothing fits a pattern, or there are no such files.
  """
  path = pathlib.Path(source).expanduser()
  kinds = (suffix,) if suffix else (PARQUET, NUMPY)
  if path.is_dir():
    kinds = (suffix or PARQUET,)
    found = [
      file
      for file in sorted(path.rglob('*'))
      if file.suffix.lower() in kinds
      and file.is_file()
      # As of pictures, what is hidden is left out.
      and not any(part[0] == '.' for part in file.relative_to(path).parts)
    ]
    if found and not suffix and image_layout.walk(path)[0]:
      return []
  elif path.is_file():
    found = [path] if path.suffix.lower() in kinds else []
  else:
    named = sorted(map(pathlib.Path, glob.glob(str(path), recursive=True)))
    found = [file for file in named if file.suffix.lower() in kinds]
    suffix = suffix or (path.suffix if path.suffix.lower() in kinds else '')
  if suffix and not found:
    raise config_utils.UserError(
      f'--source {source}: there is no {suffix} file'
    )
  return found


def check(files: Sequence[pathlib.Path], columns: image_table.Columns) -> None:
  """Raises UserError unless all files hold pictures and labels alike.

  Args:
    files: as `find` returns them.
    columns: as `unpack` takes them.
  """
  _splits(files)
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
      the one that its name, or its folder's, has; 'train' where none has one.

  Raises:
    UserError: a file is damaged, or lacks something.
    OSError: reading or writing failed; the same call continues.
  """
  above, lines = _above(files), []
  for path, split in _splits(files).items():
    name = path.relative_to(above).as_posix()
    lines += _unpack_file(path, folder, name, split, columns)
  header = [field.name for field in dataclasses.fields(image_table.Columns)]
  table = io.StringIO()
  csv.writer(table).writerows([header, *lines])
  disk.write_text(folder / TABLE, table.getvalue())
  return folder / TABLE


def origin(files: Sequence[pathlib.Path], columns: image_table.Columns) -> list:
  """Cache key of the unpacked pictures, as JSON."""
  return [
    [[str(path.resolve()), *_stamp(path)] for path in files],
    dataclasses.asdict(columns),
  ]


def _above(files) -> pathlib.Path:
  """Returns the folder that holds all files, or the folders that do."""
  return pathlib.Path(os.path.commonpath([path.parent for path in files]))


def _splits(files) -> dict[pathlib.Path, str]:
  """Returns the split that the name of each file, or its folder's, has.

  Raises:
    UserError: one has several, or none where others have one.
  """
  above, found = _above(files), {}
  for path in files:
    *folders, name = path.relative_to(above).parts
    parts = [*folders, name.removesuffix(path.suffix)]
    splits = {image_splits.split_of_name(part) for part in parts} - {None}
    if len(splits) > 1:
      raise config_utils.UserError(
        f'{path}: its name says {" and ".join(sorted(splits))}: rename it'
      )
    found[path] = splits.pop() if splits else ''
  without = [path.name for path, split in found.items() if not split]
  if len(without) == len(found):
    return dict.fromkeys(files, 'train')
  if without:
    raise config_utils.UserError(
      f'{image_splits.some(without)}: the name says no split (train, val or '
      'test), as those of other files do: rename it'
    )
  return found


def _stamp(path):
  status = path.stat()
  return [status.st_size, status.st_mtime_ns]


def _unpack_file(path, folder, name, split, columns):
  """Writes the pictures of one file; returns their lines of the table."""
  target = folder / name
  stamp = [*_stamp(path), split, dataclasses.asdict(columns)]
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
    for number, row in enumerate(read(path, columns)):
      data, label, own_split = row
      picture = target / f'{number:07}'
      picture.write_bytes(data)
      # Times are part of the plan's digest: unpacking again must not change it.
      os.utime(picture, ns=(stamp[1], stamp[1]))
      lines.append([f'{name}/{picture.name}', label, own_split or split])
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
  """Describes what a file holds; all files must give the same description."""
  try:
    if path.suffix.lower() == PARQUET:
      return _describe_parquet(path, columns)
    with np.load(path) as arrays:
      _pairs(path, arrays)
      if CLASS_NAMES in arrays:
        _check_names(path, arrays[CLASS_NAMES].tolist())
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
  image_table.check_columns(path, schema.names, columns)
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
  _check_names(path, names)
  has_split = ' and splits' if columns.split in schema.names else ''
  classes = f' of the classes {", ".join(names)}' if names else ''
  return f'pictures in {kind}{has_split} and labels in {label}{classes}'


def _check_names(path, names) -> None:
  """Raises unless the names of classes are texts of one line, all different."""
  if names is None:
    return
  good = isinstance(names, list) and all(
    isinstance(name, str) and name.strip().splitlines() == [name]
    for name in names
  )
  if not good or len(set(names)) < len(names):
    raise config_utils.UserError(
      f'{path}: its class names are {config_utils.short(names)}; give one text '
      'for each class, all different'
    )


def _class_names(schema, label) -> Sequence[str] | None:
  """Returns the names that the hub's metadata give to whole numbers."""
  try:
    described = json.loads((schema.metadata or {})[b'huggingface'])
    return described['info']['features'][label]['names']
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
        split = row[columns.split] if has_split else ''
        if has_split and str(split).casefold() not in image_splits.SPLIT_OF:
          raise config_utils.UserError(
            f'{place}: {split!r} is none of the splits '
            f'{", ".join(sorted(image_splits.SPLIT_OF))}'
          )
        yield picture, _label(place, row[columns.label], names), split


def _label(place, value, names) -> str:
  """Returns the name of a class."""
  if value is None or (isinstance(value, int) and value < 0):
    raise config_utils.UserError(
      f'{place} has the label {value}, which is no class: leave out the files '
      'without labels'
    )
  if isinstance(value, str) and value.strip().splitlines() != [value.strip()]:
    raise config_utils.UserError(f'{place}: the label {value!r} is no name')
  if names is None or isinstance(value, str):
    return str(value)
  if value >= len(names):
    raise config_utils.UserError(
      f'{place} has the label {value}, of {len(names)} classes'
    )
  return names[value]


def _pairs(path, arrays) -> dict[str, tuple[str, str]]:
  """Returns the names of images and labels by split."""
  found = {
    split: (images.format(split), labels.format(split))
    for images, labels in ARRAYS
    for split in image_splits.SPLIT_OF
    if images.format(split) in arrays and labels.format(split) in arrays
  }
  if all(name in arrays for name in WHOLE):
    found[''] = WHOLE
  used = {name for pair in found.values() for name in pair}
  splits = {image_splits.SPLIT_OF.get(split, '') for split in found}
  others = set(arrays) - used - {CLASS_NAMES}
  twice = len(splits) < len(found) or ('' in splits and len(found) > 1)
  if not found or others or twice:
    raise config_utils.UserError(
      f'{path} holds {", ".join(sorted(arrays))}: call the arrays images and '
      'labels, or train_images, train_labels, test_images and test_labels, and '
      f'leave out all others but {CLASS_NAMES}'
    )
  return found


def _numpy(path, columns) -> Iterator[tuple[bytes, str, str]]:
  """Gives the bytes, the label and the split of each image, as PNG."""
  from PIL import Image

  del columns
  with np.load(path) as arrays:  # Without pickles, which run programs.
    names = arrays[CLASS_NAMES].tolist() if CLASS_NAMES in arrays else None
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
        yield data.getvalue(), _label(place, label, names), split


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
