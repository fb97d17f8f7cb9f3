"""Compiled programs on the disk, so that a second start is quick."""

import logging
import os
import pathlib
import tempfile

import jax

from ijckd_jax import config_utils

DEFAULT = 'default'
# Beneath it, compiling is as quick as reading.
MIN_COMPILE_SECONDS = 0.1
# A program takes about 0.2 MB on CPU, a few MB on GPU.
MAX_BYTES = 2 * 2**30

logger = logging.getLogger('ijckd_jax')


def enable(folder: str, *, max_bytes: int = MAX_BYTES) -> None:
  """Keeps what this process compiles, and takes what is there already.

  JAX's key of a program covers its versions, the devices and the CPU's
  features, so that machines may share a folder. Where it cannot be used, that
  is said, and everything is compiled.

  Args:
    folder: DEFAULT for one in the user's cache directory; '' for none. Where
      JAX_COMPILATION_CACHE_DIR is set, JAX has followed that, and this is left
      aside.
    max_bytes: what was written first is removed until no more than this is
      there.
  """
  if not folder or 'JAX_COMPILATION_CACHE_DIR' in os.environ:
    return
  path = default_folder()
  if folder != DEFAULT:
    path = pathlib.Path(config_utils.expand(folder))
  try:
    # Whoever writes to it has code run by those who read it.
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    tempfile.TemporaryFile(dir=path).close()
    _prune(path, max_bytes)
  except OSError as error:
    logger.warning('programs are compiled at every start: %s', error)
    return
  jax.config.update('jax_compilation_cache_dir', str(path.absolute()))
  jax.config.update(
    'jax_persistent_cache_min_compile_time_secs', MIN_COMPILE_SECONDS
  )


def user_folder() -> pathlib.Path:
  """Returns this package's folder in the user's cache directory."""
  home = os.environ.get('XDG_CACHE_HOME') or '~/.cache'
  return pathlib.Path(home).expanduser() / 'ijckd_jax'


def default_folder() -> pathlib.Path:
  """Returns where programs are kept in the user's cache directory."""
  return user_folder() / 'compiled'


def _prune(folder: pathlib.Path, max_bytes: int) -> None:
  """Removes the oldest programs; JAX's own limit needs one package more."""
  files = [(path, path.stat()) for path in folder.glob('*-cache')]
  size = sum(stat.st_size for _, stat in files)
  for path, stat in sorted(files, key=lambda file: file[1].st_mtime_ns):
    if size <= max_bytes:
      break
    path.unlink(missing_ok=True)
    size -= stat.st_size
