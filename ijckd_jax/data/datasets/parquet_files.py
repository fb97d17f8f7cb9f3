"""Reads CIFAR from the parquet files of Hugging Face's hub.

A file has a column of pictures, as bytes of PNG, and one of each kind of label.
The names of the classes stand in its metadata.
"""

from collections.abc import Mapping
from collections.abc import Sequence
import io
import json
import pathlib
import re

import numpy as np

from ijckd_jax.runtime import config_utils

# train-00000-of-00001.parquet, or train/0000.parquet.
NAME = re.compile(r'(train|test)-\d+-of-(\d+)\.parquet')
NUMBERED = re.compile(r'\d+\.parquet')
SPLITS = ('train', 'test')
IMAGE = 'img'
SHAPE = (32, 32, 3)


def find(source: pathlib.Path) -> dict[str, list[pathlib.Path]]:
  """Returns the files of each split below a folder; {} where there are none.

  Raises:
    config_utils.UserError: a file is missing, or there are two sets of files.
  """
  if not source.is_dir():
    return {}
  found = {}
  for path in sorted(source.rglob('*.parquet')):
    named = NAME.fullmatch(path.name)
    if named:
      place, split = path.parent, named[1]
    elif NUMBERED.fullmatch(path.name) and path.parent.name in SPLITS:
      place, split = path.parent.parent, path.parent.name
    else:
      continue
    found.setdefault(place, {}).setdefault(split, []).append(path)
  if not found:
    return {}
  if len(found) > 1:
    raise config_utils.UserError(
      f'{source}: there are parquet files in {len(found)} folders; give one of '
      f'them: {", ".join(map(str, found))}'
    )
  (files,) = found.values()
  for split in SPLITS:
    paths = files.get(split, [])
    named = NAME.fullmatch(paths[0].name) if paths else None
    if not paths or (named and len(paths) != int(named[2])):
      raise config_utils.UserError(
        f'{source}: the parquet files of the split {split} are not all there'
      )
  return files


def read(
  files: Mapping[str, Sequence[pathlib.Path]], columns: Sequence[str]
) -> tuple[dict[str, tuple[np.ndarray, np.ndarray]], list[list[str]]]:
  """Returns images (N, 32, 32, 3) and labels (N, C) by split, and class names.

  Args:
    files: of each split, as `find` gives them.
    columns: the C kinds of labels.

  Raises:
    config_utils.UserError: a file is damaged, or not of this data set.
  """
  splits, names = {}, []
  for split, paths in files.items():
    parts = []
    for path in paths:
      try:
        images, labels, said = _read(path, columns)
        names = names or said
        if said != names:
          raise ValueError('its class names are not those of the other files')
      except Exception as error:  # Arrow and Pillow raise whatever they like.
        config_utils.raise_outside(error)
        raise config_utils.UserError(
          f'{path} is damaged, truncated or not of this data set, which has '
          f'the columns {", ".join((IMAGE, *columns))}: '
          f'{config_utils.short(error)}'
        ) from error
      parts.append((images, labels))
    splits[split] = tuple(
      np.concatenate(arrays) for arrays in zip(*parts, strict=True)
    )
  return splits, names


def _read(path: pathlib.Path, columns: Sequence[str]):
  """Returns the images, the labels and the class names of one file."""
  from pyarrow import parquet

  table = parquet.read_table(path, columns=[IMAGE, *columns])
  images = np.stack(
    [_decode(picture['bytes']) for picture in table[IMAGE].to_pylist()]
  )
  if images.shape[1:] != SHAPE:
    raise ValueError(f'its pictures are {images.shape[1:]}, and not {SHAPE}')
  labels = np.stack([table[column].to_numpy() for column in columns], axis=1)
  if not np.issubdtype(labels.dtype, np.integer):
    raise ValueError('its labels are no integers, or some are missing')
  described = json.loads(table.schema.metadata[b'huggingface'])
  features = described['info']['features']
  names = [list(features[column]['names']) for column in columns]
  return images, labels, names


def _decode(data: bytes) -> np.ndarray:
  from PIL import Image

  with Image.open(io.BytesIO(data)) as picture:
    return np.asarray(picture.convert('RGB'))
