"""Reads CIFAR from the parquet files of Hugging Face's hub.

A file has a column of pictures, as bytes of PNG, and one of each kind of label.
The names of the classes stand in its metadata.
"""

from collections.abc import Mapping
from collections.abc import Sequence
import io
import json
import pathlib

import numpy as np

from ijckd_jax.runtime import config_utils

SPLITS = ('train', 'test')
IMAGE = 'img'


def find(source: pathlib.Path) -> dict[str, list[pathlib.Path]]:
  """Returns the files of each split below a folder; {} where one has none.

  A split's files have its name, or are in a folder of its name.
  """
  if not source.is_dir():
    return {}
  paths = sorted(source.rglob('*.parquet'))
  found = {
    split: [
      path
      for path in paths
      if path.name.startswith(split) or path.parent.name == split
    ]
    for split in SPLITS
  }
  return found if all(found.values()) else {}


def read(
  files: Mapping[str, Sequence[pathlib.Path]], columns: Sequence[str]
) -> tuple[dict[str, tuple[np.ndarray, np.ndarray]], list[list[str]]]:
  """Returns images (N, H, W, 3) and labels (N, C) by split, and class names.

  Args:
    files: of each split, as `find` gives them.
    columns: the C kinds of labels.

  Raises:
    config_utils.UserError: a file is damaged, or has other columns.
  """
  splits, names = {}, None
  for split, paths in files.items():
    parts = []
    for path in paths:
      try:
        images, labels, names = _read(path, columns)
      except Exception as error:  # Arrow and Pillow raise whatever they like.
        config_utils.raise_outside(error)
        raise config_utils.UserError(
          f'{path} is damaged, truncated or not of this data set: it must have '
          f'the columns {", ".join((IMAGE, *columns))} '
          f'({config_utils.short(error)})'
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
  pictures = table[IMAGE].to_pylist()
  images = [_decode(picture['bytes']) for picture in pictures]
  labels = [table[column].to_numpy() for column in columns]
  described = json.loads(table.schema.metadata[b'huggingface'])
  features = described['info']['features']
  names = [list(features[column]['names']) for column in columns]
  return np.stack(images), np.stack(labels, axis=1), names


def _decode(data: bytes) -> np.ndarray:
  from PIL import Image

  with Image.open(io.BytesIO(data)) as picture:
    return np.asarray(picture.convert('RGB'))
