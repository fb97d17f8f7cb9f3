"""Compiled programs on the disk, so that a second start is quick."""

import logging
import os
import pathlib
import stat
import tempfile

import jax

from ijckd_jax.runtime import config_utils

DEFAULT = 'default'
# Beneath it, compiling is as quick as reading.
MIN_COMPILE_SECONDS = 0.1
# A program takes about 0.2 MB on CPU, a few MB on GPU.
MAX_BYTES = 2 * 2**30

logger = logging.getLogger('ijckd_jax')


def enable(folder: str, *, max_bytes: int = MAX_BYTES) -> None:
  """Keeps what this process compiles, and takes what is there already.

  JAX's key of a program covers its versions, the devices and the CPU's
  features, so that machines may share a folder. Where it cannot be used, or
  others could put programs into it, a line says so and everything is compiled.
  Also for a folder that was named: a run does not need it.

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
    # What is checked is what is used, whoever may change a link on the way.
    path = path.resolve()
    _make(path)
    danger = _danger(path)
    if danger:
      logger.warning('programs are compiled at every start: %s', danger)
      return
    tempfile.TemporaryFile(dir=path).close()
    _prune(path, max_bytes)
  except (OSError, RuntimeError) as error:  # The latter: links in a circle.
    logger.warning('programs are compiled at every start: %s', error)
    return
  jax.config.update('jax_compilation_cache_dir', str(path))
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


def _make(path: pathlib.Path) -> None:
  """Makes a folder, and those above it, for the user alone."""
  if not path.is_dir():
    # With parents=True, those above would get what the umask leaves.
    _make(path.parent)
    path.mkdir(mode=0o700, exist_ok=True)


def _danger(folder: pathlib.Path) -> str:
  """Returns why others could put programs into a folder; '' if they cannot.

  Whoever can do that has code run by those who take programs from there: who
  owns the folder or a program in it, may write to it, or may rename a folder
  above it and put another in its place.
  """
  trusted = (0, os.geteuid())
  for path in (folder, *folder.parents):
    found = path.stat()
    if found.st_uid not in trusted:
      return f'{path} belongs to another user: name another folder'
    # In a sticky folder, only what is one's own can be renamed.
    renamed_by_owner = path != folder and found.st_mode & stat.S_ISVTX
    if found.st_mode & 0o022 and not renamed_by_owner:
      return (
        f'other users can write to {path}, and so run code here: chmod go-w '
        'it, or name another folder'
      )
  for path in folder.glob('*-cache'):
    if path.lstat().st_uid not in trusted:
      return f'{path} belongs to another user: remove it'
  return ''


def _prune(folder: pathlib.Path, max_bytes: int) -> None:
  """Removes the oldest programs; JAX's own limit needs one package more."""
  files = [(path, path.stat()) for path in folder.glob('*-cache')]
  size = sum(found.st_size for _, found in files)
  for path, found in sorted(files, key=lambda file: file[1].st_mtime_ns):
    if size <= max_bytes:
      break
    path.unlink(missing_ok=True)
    size -= found.st_size
