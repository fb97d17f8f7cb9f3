"""Files and folders on a disk: they appear whole, and outlive a power cut."""

from collections.abc import Callable
from collections.abc import Mapping
import contextlib
import errno
import json
import logging
import os
import re
import time
from typing import Any
import uuid

from etils import epath

from ijckd_jax.runtime import config_utils

# A file of `write_files` that is not whole yet.
PARTIAL = re.compile(r'\..*\.[0-9a-f]{32}\.partial')
# How long to wait before each further try to write: two minutes in all, as a
# file server may take to come back, or somebody to make room on a disk.
RETRY_SECONDS = (1, 2, 4, 8, 16, 32, 64)
logger = logging.getLogger('ijckd_jax')


def is_remote(path: epath.PathLike) -> bool:
  """Returns whether a path is of a bucket, such as gs://..., not of a disk."""
  return '://' in os.fspath(path)


def read_json(path: epath.Path) -> Any:
  """Returns what a JSON file holds.

  Raises:
    OSError: it cannot be read.
    ValueError: it is no JSON, or too deep.
  """
  try:
    return json.loads(path.read_bytes())
  except RecursionError as error:
    raise ValueError('nested too deep') from error


def sync(path: epath.PathLike) -> None:
  """Waits until a file, or a folder's list of names, is on the disk.

  A rename alone may be on the disk before what was written to the file, so that
  a power cut leaves an empty one. Objects in a bucket are there once written.
  """
  if is_remote(path):
    return
  file = os.open(path, os.O_RDONLY)
  try:
    os.fsync(file)
  except OSError as error:  # Some file systems cannot, of folders.
    if error.errno not in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):
      raise
  finally:
    os.close(file)


def write_text(path: epath.Path, text: str) -> None:
  """Writes a file as `write_files` does."""
  write_bytes(path, text.encode())


def write_bytes(path: epath.Path, data: bytes) -> None:
  """Writes a file as `write_files` does."""
  write_files({path: data})


def write_files(contents: Mapping[epath.Path, bytes]) -> None:
  """Writes several files; none gets its name before all are written.

  No file is ever seen half written, and all of them outlive a power cut.
  """
  partials = {
    path: path.with_name(f'.{path.name}.{uuid.uuid4().hex}.partial')
    for path in contents
  }
  try:
    for path, data in contents.items():
      _write(partials[path], data)
    for path, partial in partials.items():
      partial.replace(path)
    for folder in {path.parent for path in contents}:
      sync(folder)
  except BaseException:
    for partial in partials.values():
      with contextlib.suppress(OSError):
        partial.unlink(missing_ok=True)
    raise


def write_folder(folder: epath.Path, contents: Mapping[str, bytes]) -> None:
  """Writes a folder of files; it appears whole or not at all.

  It takes the place of one that is there, and outlives a power cut.

  Args:
    folder: where; its parents are made.
    contents: of the files by their paths in the folder.
  """
  name = f'.{folder.name}.{uuid.uuid4().hex}'
  partial, old = folder.parent / name, folder.parent / f'{name}.old'
  try:
    folder.parent.mkdir(parents=True, exist_ok=True)
    _remove_partial(folder)
    partial.mkdir()
    for name, data in contents.items():
      (partial / name).parent.mkdir(parents=True, exist_ok=True)
      _write(partial / name, data)
    for made in {partial, *((partial / name).parent for name in contents)}:
      sync(made)
    if folder.exists():
      # Set aside first: an interrupt loses neither the old nor the new one.
      folder.rename(old)
    partial.rename(folder)
    sync(folder.parent)
    if old.exists():
      old.rmtree()
  except BaseException:
    if old.exists() and not folder.exists():
      old.rename(folder)
    if partial.exists():
      partial.rmtree()
    raise


def _remove_partial(folder) -> None:
  """Removes what writers of this folder left beside it when killed.

  A folder that was set aside, and whose place is empty, is put back.
  """
  pattern = re.compile(rf'\.{re.escape(folder.name)}\.[0-9a-f]{{32}}(\.old)?')
  for path in list(folder.parent.iterdir()):
    found = pattern.fullmatch(path.name)
    if found and found[1] and not folder.exists():
      path.rename(folder)
    elif found:
      path.rmtree()


def _write(path: epath.Path, data: bytes) -> None:
  """Writes a file, and waits until it is on the disk."""
  path.write_bytes(data)
  sync(path)


def retry(action: Callable[[], None], what: str) -> None:
  """Calls an action that writes, again and again where that fails.

  Args:
    action: may be called anew after an OSError.
    what: it writes, for the messages.

  Raises:
    OSError: it failed each time, after RETRY_SECONDS.
  """
  for seconds in RETRY_SECONDS:
    try:
      return action()
    except OSError as error:
      logger.warning(
        '%s could not be written (%s); next try in %d s',
        what,
        config_utils.short(error),
        seconds,
      )
    time.sleep(seconds)
  try:
    action()
  except OSError as error:
    raise OSError(
      f'{what} could not be written, over {len(RETRY_SECONDS) + 1} tries in '
      f'{sum(RETRY_SECONDS)} s: {config_utils.short(error)}'
    ) from error


def safetensors_metadata(data: bytes) -> dict[str, str]:
  """Returns the strings in the header of a safetensors file that was read.

  `safetensors` itself gives them of a path only, and buckets have none.

  Raises:
    Exception: it is no such file; of any type.
  """
  size = int.from_bytes(data[:8], 'little')
  return dict(json.loads(data[8 : 8 + size]).get('__metadata__') or {})
