"""A run's folder: whose it is, what lies in it, and when it is finished."""

from collections.abc import Callable
from collections.abc import Collection
from collections.abc import Mapping
from collections.abc import Sequence
import contextlib
import errno
import importlib.metadata
import json
import logging
import os
import re
import time
from typing import Any
import uuid

from etils import epath
import ml_collections

from ijckd_jax import config_utils

CONFIG = 'config.json'
RECORD = 'run.json'
CHECKPOINTS = 'checkpoints'
DIVERGED = 'diverged.json'
METRICS = 'metrics.jsonl'
TENSORBOARD = 'tensorboard'
SUMMARY = 'summary.json'
REPORT = 'report.md'
WEB_REPORT = 'report.html'  # The same, as one file.
PLOTS = 'plots'
BUNDLE = 'bundle'
CONNECTED = 'connected'  # A student with its own head, by the teacher's.
HEADS = 'heads'
TEACHER_OUTPUTS = 'teacher_outputs'
CONTENTS = (
  CHECKPOINTS,
  DIVERGED,
  METRICS,
  TENSORBOARD,
  SUMMARY,
  REPORT,
  WEB_REPORT,
  PLOTS,
  BUNDLE,
  CONNECTED,
  HEADS,
  TEACHER_OUTPUTS,
  RECORD,
  CONFIG,
)
# A file of `write_files` that is not whole yet.
_PARTIAL = re.compile(r'\..*\.[0-9a-f]{32}\.partial')
# By this field of the config's file a folder is known to be a run's.
MARK = 'ijckd_jax'
# What may differ between the parts of one run: where and how it is computed.
RUNTIME_FIELDS = (
  MARK,
  'bounds.delta',
  'bounds.fit_examples',
  'checkpoint_epochs',
  'checkpoint_examples',
  'checkpoint_steps',
  'compilation_cache',
  'dataset.data_dir',
  'dtype',
  'heartbeat_timeout_seconds',
  'keep_checkpoints',
  'mapper',
  'num_cpu_devices',
  'num_workers',
  'teacher.store.directory',
  'teacher.store.limit_gib',
  'writers',
)
# Fields that configs of older versions lack, with what was done then.
ADDED_FIELDS = {
  'augment.cutmix_alpha': 0.0,
  'augment.erasing_probability': 0.0,
  'augment.inception_area': (0.08, 1.0),
  'augment.inception_aspect': (3 / 4, 4 / 3),
  'augment.inception_crop': False,
  'augment.mixup_alpha': 0.0,
  'augment.randaugment_layers': 0,
  'augment.randaugment_magnitude': 9,
  'student.init_from': '',
  'teacher.classes_by_number': False,
  'teacher.head': '',
  'teacher.head_views': 0,
  'teacher.init_from': '',
  'teacher.joint': 0,
  'teacher.others': (),
  'teacher.refit': '',
  'teacher.refit_epochs': (),
  'teacher.store.dtype': 'float16',
  'teacher.store.views': 0,
  'teacher.weights': (),
  'unbiased_variance': False,
}
MAX_CHANGES = 5
# How long to wait before each further try to write: two minutes in all, as a
# file server may take to come back, or somebody to make room on a disk.
RETRY_SECONDS = (1, 2, 4, 8, 16, 32, 64)

logger = logging.getLogger('ijckd_jax')

Runs = Sequence[tuple[epath.Path, ml_collections.ConfigDict]]


def check(runs: Runs, *, overwrite: bool) -> None:
  """Raises where a folder cannot be used for the run of a config.

  Args:
    runs: folder and config of each run; the last is the one asked for, those
      before it are what it needs.
    overwrite: whether a run of another config may be removed.

  Raises:
    config_utils.UserError: a folder holds a run of another config, or what is
      not a run's.
  """
  for folder, config in reversed(runs):
    try:
      folder.exists()
    except ImportError as error:  # epath's, of a file system.
      raise config_utils.UserError(
        f'{folder} cannot be opened: {config_utils.short(error)}; for gs://, '
        "pip install 'ijckd_jax[gcs]'"
      ) from error
    _check_owner(folder)
    changes = _changes(folder, config)
    if changes and not overwrite:
      more = len(changes) - MAX_CHANGES
      shown = '; '.join(changes[:MAX_CHANGES])
      raise config_utils.UserError(
        f'{folder} holds a run of another config ({shown}'
        + (f'; and {more} more' if more > 0 else '')
        + '): take another --workdir, or start anew with --overwrite'
      )


def claim(
  runs: Runs, *, overwrite: bool, stale: Collection[epath.Path] = ()
) -> None:
  """Makes folders that `check` has passed ready for their runs.

  Args:
    runs: as `check` takes them.
    overwrite: remove what the last run left, and what the others left under
      another config.
    stale: folders whose runs are to be removed as well, if `overwrite` is set.

  Raises:
    config_utils.UserError: a folder cannot be written.
  """
  try:
    for folder, config in runs:
      last = folder == runs[-1][0]
      if overwrite and (last or folder in stale or _changes(folder, config)):
        _clear(folder)
      folder.mkdir(parents=True, exist_ok=True)
      for path in folder.iterdir():  # Left by a process that was killed.
        if _PARTIAL.fullmatch(path.name):
          path.unlink()
      if not is_finished(folder):
        (folder / DIVERGED).unlink(missing_ok=True)  # Of an earlier start.
        mark = {MARK: importlib.metadata.version('ijckd_jax')}
        content = json.loads(config_utils.to_json(config)) | mark
        text = json.dumps(content, indent=2, sort_keys=True)
        write_text(folder / CONFIG, text + '\n')
  except OSError as error:
    raise config_utils.UserError(
      f'the folder {runs[-1][0]} cannot be written: '
      f'{config_utils.reason(error)}'
    ) from error


def is_remote(path: epath.PathLike) -> bool:
  """Returns whether a path is of a bucket, such as gs://..., not of a disk."""
  return '://' in os.fspath(path)


def is_finished(folder: epath.Path) -> bool:
  """Returns whether the run in the folder has come to its end."""
  try:
    summary = read_json(folder / SUMMARY)
  except (OSError, ValueError):
    return False
  return isinstance(summary, dict) and (folder / BUNDLE).exists()


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
  """Waits until a file, or which names a folder holds, is on the disk.

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
  """Writes files of which none is seen before all of them could be written.

  None is ever seen half written, and all of them outlive a power cut.
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
    contents: of the files by their names.
  """
  name = f'.{folder.name}.{uuid.uuid4().hex}'
  partial, old = folder.parent / name, folder.parent / f'{name}.old'
  try:
    folder.parent.mkdir(parents=True, exist_ok=True)
    _remove_partial(folder)
    partial.mkdir()
    for name, data in contents.items():
      _write(partial / name, data)
    sync(partial)
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


def _check_owner(folder) -> None:
  """Raises where a folder holds what a run would take for its own."""
  there = [name for name in CONTENTS if (folder / name).exists()]
  content = _old_config(folder)
  if content is None and not _recorded(folder):
    raise config_utils.UserError(
      f'the {CONFIG} in {folder} is damaged, and there is no {RECORD}, so that '
      'it cannot be told what a run may remove there: take another --workdir, '
      'or remove the folder by hand'
    )
  if there and content is not None and MARK not in content:
    raise config_utils.UserError(
      f'{folder} holds what is not of a run ({", ".join(there)}): take another '
      '--workdir'
    )


def _old_config(folder) -> dict[str, Any] | None:
  """Returns what a folder's config.json holds, {} without; None if damaged."""
  if not (folder / CONFIG).exists():
    return {}
  try:
    content = read_json(folder / CONFIG)
  except (OSError, ValueError):
    return None
  return content if isinstance(content, dict) else {}


def _changes(folder, config) -> list[str]:
  """Returns the fields in which a folder's run differs from the config."""
  old = _old_config(folder)
  if old is None:
    return [f'its {CONFIG} is damaged']
  if not old:
    return []
  return [
    line
    for line in config_utils.differences(
      {**ADDED_FIELDS, **old}, config.to_dict()
    )
    if line.partition(':')[0] not in RUNTIME_FIELDS
  ]


def _recorded(folder) -> list[str]:
  """Returns what a folder's record lists of CONTENTS; nothing without one."""
  try:
    listed = read_json(folder / RECORD)['files']
    return [name for name in CONTENTS if name in listed]
  except (OSError, ValueError, TypeError, KeyError):
    return []


def _clear(folder) -> None:
  """Removes what a run left, and nothing else."""
  # Runs of older versions have no record. The config is the last: until it is
  # removed, the folder is still a run's.
  for name in _recorded(folder) or CONTENTS:
    path = folder / name
    if path.is_dir():
      path.rmtree()
    elif path.exists():
      path.unlink()
