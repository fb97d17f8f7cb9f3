"""From picture files to the uint8 images that a shipped classifier takes."""

from collections.abc import Iterator
from collections.abc import Sequence
import glob
import os
import pathlib
from typing import Any
from typing import NamedTuple

import numpy as np

from ijckd_jax.data import images
from ijckd_jax.data.datasets import image_files
from ijckd_jax.data.datasets import image_layout
from ijckd_jax.deploy import checks
from ijckd_jax.deploy import sessions
from ijckd_jax.runtime import config_utils


class Read(NamedTuple):
  """A file that was read.

  Attributes:
    path: of the file.
    error: why it cannot be read; '' if it can.
    warning: what may be wrong with its pixels; '' if nothing is.
  """

  path: pathlib.Path
  error: str
  warning: str


def find(patterns: Sequence[str]) -> list[pathlib.Path]:
  """Returns the picture files that paths, folders and globs name.

  Args:
    patterns: files, with any name; folders, which are searched for the pictures
      that `ijckd prepare` would take; globs, whose matches are filtered alike.

  Raises:
    config_utils.UserError: one of them names none, or cannot be searched.
  """
  found = {}
  for pattern in map(config_utils.expand, patterns):
    is_folder = os.path.isdir(pattern)
    try:
      if is_folder:
        paths = _below(pathlib.Path(pattern))
      elif os.path.lexists(pattern):
        paths = [pathlib.Path(pattern)]
      else:
        paths = _matches(pattern)
    except OSError as error:
      raise config_utils.UserError(
        f'{pattern} cannot be searched: {error}'
      ) from error
    if not (paths or is_folder or glob.has_magic(pattern)):
      raise config_utils.UserError(
        f'{pattern} cannot be read: there is no such file or folder'
      )
    if not paths:
      raise config_utils.UserError(
        f'{pattern} names no pictures '
        f'({" ".join(sorted(image_files.EXTENSIONS))})'
      )
    found |= dict.fromkeys(paths)
  return list(found)


def _below(folder: pathlib.Path) -> list[pathlib.Path]:
  found, _, _ = image_layout.walk(folder)
  return [folder / path for path in sorted(found)]


def _matches(pattern: str) -> list[pathlib.Path]:
  """Returns the pictures that a glob names."""
  paths = []
  for match in sorted(glob.glob(pattern, recursive=True)):
    path = pathlib.Path(match)
    if image_layout.MACOS in path.parts:
      continue
    if path.is_dir():
      paths += _below(path)
    elif path.suffix.lower() in image_files.EXTENSIONS and path.is_file():
      paths.append(path)
  return paths


def read(
  path: pathlib.Path, shape: tuple[int, int, int], crop: images.CentreCrop
) -> tuple[np.ndarray, str]:
  """Returns a picture as an image of that shape, uint8 (H, W, C).

  Args:
    path: of the file; its picture is turned upright.
    shape: (H, W, C), with 1 channel for grey or 3 for colour.
    crop: how it gets that size.

  Returns:
    The image, and what may be wrong with its pixels, or ''.

  Raises:
    image_files.Unreadable: it is no picture, damaged or too large.
    OSError: it cannot be read.
  """
  height, width, channels = shape
  picture, warning = image_files.decode(image_files.load(path))
  picture = picture.convert('L' if channels == 1 else 'RGB')
  image = crop(picture, (width, height))
  return np.asarray(image).reshape(shape), warning


def classify(
  session: Any, paths: Sequence[pathlib.Path], batch_size: int
) -> Iterator[tuple[list[Read], np.ndarray]]:
  """Yields what was read and the probabilities (b, K) of each batch.

  Args:
    session: as sessions.load returns it.
    paths: of the pictures.
    batch_size: pictures of a batch.

  Raises:
    config_utils.UserError: see `batches`.
  """
  crop = sessions.crop_of(session)
  for read, batch in batches(paths, session.image_shape, crop, batch_size):
    _, probabilities = session(checks.as_taken(batch, session.takes))
    yield read, probabilities


def entry(
  picture: Read, row: np.ndarray, names: Sequence[str], top: int
) -> dict[str, Any]:
  """Returns a picture's path with its likeliest classes, or its error (JSON).

  Args:
    picture: as `classify` yields it.
    row: its probabilities (K,).
    names: of the K classes.
    top: how many classes are named.
  """
  if picture.error:
    return {'picture': str(picture.path), 'error': picture.error}
  classes = [
    {'class': int(i), 'name': names[i], 'probability': float(row[i])}
    for i in np.argsort(-row, kind='stable')[:top]
  ]
  return {'picture': str(picture.path), 'classes': classes}


def batches(
  paths: Sequence[pathlib.Path],
  shape: tuple[int, int, int],
  crop: images.CentreCrop,
  batch_size: int,
) -> Iterator[tuple[list[Read], np.ndarray]]:
  """Yields what was read and the images (b, H, W, C) of each batch.

  A black image stands for a file that cannot be read.

  Raises:
    config_utils.UserError: no picture has as many channels as the shape.
  """
  if shape[2] not in (1, 3):
    raise config_utils.UserError(
      f'the classifier takes images of {shape[2]} channels, as no picture has'
    )
  for start in range(0, len(paths), batch_size):
    chosen = []
    batch = np.zeros((len(paths[start : start + batch_size]), *shape), np.uint8)
    for path, place in zip(paths[start:], batch, strict=False):
      error = warning = ''
      try:
        place[:], warning = read(path, shape, crop)
      except (OSError, image_files.Unreadable) as reason:
        error = getattr(reason, 'strerror', None) or str(reason)
      chosen.append(Read(path, error, warning))
    yield chosen, batch


def examples(
  paths: Sequence[pathlib.Path],
  shape: tuple[int, int, int],
  crop: images.CentreCrop,
  count: int,
) -> Iterator[dict[str, np.ndarray]]:
  """Yields up to `count` of the pictures, as checks.images gives a data set's.

  They are taken evenly from all of them, and have no labels.

  Raises:
    config_utils.UserError: one of them cannot be read; see also `batches`.
  """
  chosen = [paths[row] for row in checks.evenly(len(paths), count)]
  for read, batch in batches(chosen, shape, crop, checks.BATCH_SIZE):
    for picture in read:
      if picture.error:
        raise config_utils.UserError(
          f'{picture.path} cannot be read: {picture.error}'
        )
    yield {'image': batch, 'label': np.full(len(batch), -1)}
