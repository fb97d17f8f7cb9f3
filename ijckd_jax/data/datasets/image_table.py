"""Reads a table of pictures: their files, classes and splits."""

from collections.abc import Sequence
import csv
import dataclasses
import os
import pathlib
import re
import unicodedata

from ijckd_jax.data.datasets import image_layout
from ijckd_jax.data.datasets import image_splits
from ijckd_jax.runtime import config_utils

SUFFIX = '.csv'


@dataclasses.dataclass(frozen=True)
class Columns:
  """Names of a table's columns.

  Attributes:
    image: the column of paths, relative to the table's folder or absolute.
    label: the column of class names.
    split: the column of splits, named as in image_splits.SPLIT_OF. The default
      column may be missing. If all pictures are for training, a part of every
      class is held out.
  """

  image: str = 'image'
  label: str = 'label'
  split: str = 'split'


def read(
  source: pathlib.Path,
  *,
  columns: Columns = Columns(),  # noqa: B008
  validation_fraction: float | None = None,
  called: str = '',
) -> image_layout.Layout:
  """Returns the splits, classes and files of a table.

  Args:
    source: a CSV file whose first line names its columns.
    columns: which of them to read.
    validation_fraction: as image_layout.read takes it, where all is for
      training.
    called: name of the table in messages; '': its file.

  Raises:
    UserError: a column, a file or a label is missing, or two are alike.
    OSError: it cannot be read.
  """
  rows = _rows(source)
  names = list(rows[0][1])
  check_columns(source, names, columns)
  members, files, missing = {}, {}, []
  for line, row in rows:
    place = f'{source}, line {line}'
    path, label = (_cell(place, row, c) for c in (columns.image, columns.label))
    path = os.path.normpath(path)
    label = unicodedata.normalize('NFC', label)
    split = 'train'
    if columns.split in names:
      split = _split(place, row[columns.split])
    if path in files:
      raise config_utils.UserError(f'{place}: {path} is in an earlier row too')
    try:
      status = os.stat(source.parent / path)
      files[path] = status.st_size, status.st_mtime_ns
    except (FileNotFoundError, NotADirectoryError, ValueError):
      files[path] = None
      missing.append(path)
    members.setdefault(split, {}).setdefault(label, []).append(path)
  if missing:
    raise config_utils.UserError(
      f'{source}: {len(missing)} of {len(rows)} files are not there '
      f'({image_splits.some(missing)}): paths are relative to '
      f'{source.parent}, or absolute'
    )
  return _layout(called or source, members, files, validation_fraction)


def check_columns(source, names: Sequence[str], columns: Columns) -> None:
  """Raises UserError unless a table has the columns that are to be read.

  Args:
    source: the table's file.
    names: of its columns.
    columns: which of them to read.
  """
  wanted = [columns.image, columns.label]
  if columns.split != Columns.split:
    wanted.append(columns.split)
  for column in wanted:
    if column not in names:
      known = ', '.join(map(repr, names))
      remedy = 'name them by --image, --label and --split'
      if len(names) == 1 and re.search(r'[;|\t]', names[0]):
        remedy = 'separate columns by commas'
      raise config_utils.UserError(
        f'{source} has no column {column!r}, but {known}: {remedy}'
      )


def _rows(source) -> list[tuple[int, dict[str, str]]]:
  """Returns the rows of a CSV file by their columns' names, and their lines."""
  if not source.is_file():
    what = 'is no file' if source.exists() else 'does not exist'
    raise config_utils.UserError(f'--source {source} {what}')
  try:
    with source.open(newline='', encoding='utf-8-sig') as file:
      reader = csv.reader(file, strict=True, skipinitialspace=True)
      lines = [(reader.line_num, cells) for cells in reader if cells]
  except (csv.Error, UnicodeDecodeError) as error:
    raise config_utils.UserError(
      f'{source} is no CSV file in UTF-8 ({config_utils.short(error)})'
    ) from error
  if len(lines) < 2:
    raise config_utils.UserError(f'{source} has no rows below its first line')
  (_, names), *rows = lines
  for line, cells in rows:
    if len(cells) != len(names):
      raise config_utils.UserError(
        f'{source}, line {line}: {len(cells)} cells for {len(names)} columns; '
        'put cells with commas in quotes'
      )
  names = [name.strip() for name in names]
  if len(set(names)) < len(names):
    raise config_utils.UserError(
      f'{source}: two of its columns have one name ({", ".join(names)})'
    )
  return [(line, dict(zip(names, cells, strict=True))) for line, cells in rows]


def _cell(place, row, column) -> str:
  """Returns a cell without outer spaces; it must hold one line of text."""
  value = row[column].strip()
  if value.splitlines() != [value]:
    what = 'more than one line' if value else 'empty'
    raise config_utils.UserError(f'{place}: {column!r} is {what}')
  return value


def _split(place, value) -> str:
  """Returns the split that a cell names."""
  split = image_splits.SPLIT_OF.get(value.strip().casefold())
  if split is None:
    raise config_utils.UserError(
      f'{place}: {value!r} is none of the splits '
      f'{", ".join(sorted(image_splits.SPLIT_OF))}'
    )
  return split


def _layout(source, members, files, validation_fraction):
  """Returns the Layout of classes' files by split."""
  train = members.get('train', {})
  if len(train) < 2:
    raise config_utils.UserError(
      f'{source} has {len(train)} classes to train on: a classifier needs two'
    )
  folded = {}
  for name in sorted(train):
    other = folded.setdefault(name.casefold(), name)
    if other != name:
      raise config_utils.UserError(
        f'{source}: the labels {other!r} and {name!r} are the same but for '
        'case: give one of them'
      )
  for split, classes in members.items():
    other = sorted(classes.keys() ^ train.keys())
    if other:
      raise config_utils.UserError(
        f'{source}: of the splits train and {split}, one has no picture of '
        f'{image_splits.some(other)}'
      )
  if members.keys() == {'train'}:
    fraction = validation_fraction
    if fraction is None:
      fraction = image_layout.HELD_OUT
    members = image_layout.hold_out(train, fraction)
  elif validation_fraction is not None:
    raise config_utils.UserError(
      f'{source} says which pictures are of which split: leave out '
      '--validation_fraction'
    )
  elif 'test' not in members:  # A run needs one.
    members['test'] = members.pop('validation')
  class_names = sorted(train, key=_in_order)
  labels = {name: label for label, name in enumerate(class_names)}
  examples = [
    image_layout.Example(path, *files[path], split, labels[name])
    for split, classes in members.items()
    for name, paths in classes.items()
    for path in paths
  ]
  return image_layout.Layout(class_names, sorted(examples), {})


def _in_order(name: str):
  """Sort key: numbers by their value, before all other names."""
  return (0, int(name), name) if name.isdecimal() else (1, 0, name)
