"""From picture files to the uint8 images that a shipped classifier takes."""

from collections.abc import Iterator
from collections.abc import Sequence
import glob
import io
import pathlib

import numpy as np

from ijckd_jax import config_utils
from ijckd_jax.datasets import image_files


def find(patterns: Sequence[str]) -> list[pathlib.Path]:
  """Returns the picture files that paths, folders and globs name.

  Args:
    patterns: files; folders, of which all pictures below are taken; globs.

  Raises:
    config_utils.UserError: one of them names none.
  """
  found = {}
  for pattern in map(config_utils.expand, patterns):
    path = pathlib.Path(pattern)
    if path.is_dir():
      paths = _below(path)
    elif path.exists() or not glob.has_magic(pattern):
      paths = [path]
    else:
      paths = []
      for match in sorted(glob.glob(pattern, recursive=True)):
        match = pathlib.Path(match)
        paths += _below(match) if match.is_dir() else [match]
    if not paths:
      raise config_utils.UserError(
        f'{pattern} names no pictures '
        f'({" ".join(sorted(image_files.EXTENSIONS))})'
      )
    found |= dict.fromkeys(paths)
  return list(found)


def _below(folder: pathlib.Path) -> list[pathlib.Path]:
  return sorted(
    path
    for path in folder.rglob('*')
    if path.suffix.lower() in image_files.EXTENSIONS and path.is_file()
  )


def read(
  path: pathlib.Path, shape: tuple[int, int, int], resize: int | None
) -> np.ndarray:
  """Returns a picture as an image of that shape, uint8 (H, W, C).

  One of that size is taken as it is. Any other is turned upright, resized
  until it just covers the size, and cut out of its centre.

  Args:
    path: of the file.
    shape: (H, W, C), with 1 channel for grey or 3 for colour.
    resize: pixels to which what covers the height is resized before it is cut;
      None: the height.

  Raises:
    config_utils.UserError: it is no picture, or cannot be read.
  """
  import PIL.Image

  height, width, channels = shape
  if channels not in (1, 3):
    raise config_utils.UserError(
      f'the classifier takes images of {channels} channels, as no picture has'
    )
  try:
    picture = image_files.read(path.read_bytes())
  except (OSError, image_files.Unreadable) as error:
    raise config_utils.UserError(f'{path} cannot be read: {error}') from error
  image = PIL.Image.open(io.BytesIO(picture.data))
  image = image.convert('L' if channels == 1 else 'RGB')
  if image.size != (width, height):
    scale = max(height / image.height, width / image.width)
    scale *= (resize or height) / height
    size = (int(image.width * scale + 1e-6), int(image.height * scale + 1e-6))
    image = image.resize(size, PIL.Image.Resampling.BILINEAR)
    left, top = round((size[0] - width) / 2), round((size[1] - height) / 2)
    image = image.crop((left, top, left + width, top + height))
  return np.asarray(image).reshape(shape)


def batches(
  paths: Sequence[pathlib.Path],
  shape: tuple[int, int, int],
  resize: int | None,
  batch_size: int,
) -> Iterator[tuple[list[pathlib.Path], np.ndarray]]:
  """Yields the files and images (b, H, W, C) of each batch."""
  for start in range(0, len(paths), batch_size):
    chosen = list(paths[start : start + batch_size])
    yield chosen, np.stack([read(path, shape, resize) for path in chosen])
