"""A run's folder: whose it is, what lies in it, and when it is finished."""

from collections.abc import Collection
from collections.abc import Sequence
import importlib.metadata
import json
import logging
from typing import Any

from etils import epath
import ml_collections

from ijckd_jax.runtime import config_utils
from ijckd_jax.runtime import disk

CONFIG = 'config.json'
RECORD = 'run.json'
CHECKPOINTS = 'checkpoints'
DIVERGED = 'diverged.json'
METRICS = 'metrics.jsonl'
TENSORBOARD = 'tensorboard'
TRACKED = 'tracked.json'  # What trackers were given of it.
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
  TRACKED,
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
  'feed',
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
  'augment.label_smoothing': 0.0,
  'augment.mixup_alpha': 0.0,
  'augment.randaugment_layers': 0,
  'augment.randaugment_magnitude': 9,
  'augment.trivialaugment': False,
  'optimizer.layer_decay': 1.0,
  'student.drop_path': 0.0,
  'student.dropout': 0.0,
  'student.freeze_statistics': False,
  'student.init_from': '',
  'student.init_parts': ('backbone',),
  'student.max_growth': 1.5,
  'teacher.classes_by_number': False,
  'teacher.freeze_statistics': False,
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
# The same of fields that a method has got since.
ADDED_METHOD_FIELDS = {
  'at': {'method.pairing': 'last'},
  'crd': {'method.queue': 0},
  'kd': {'method.logit_weight': 0.0},
  'reviewkd': {'method.width': 512, 'method.before_relu': False},
  'simkd': {'method.tap': 'stage'},
  'srrl': {'method.tap': 'final'},
  'vid': {'method.pairing': 'last'},
  'vkd': {'method.tap': 'final'},
}
MAX_CHANGES = 5
REMEDY = 'take another --workdir, or start anew with --overwrite'

logger = logging.getLogger('ijckd_jax')

Runs = Sequence[tuple[epath.Path, ml_collections.ConfigDict]]


def check(runs: Runs, *, overwrite: bool, remedy: str = REMEDY) -> None:
  """Raises where a folder cannot be used for the run of a config.

  Args:
    runs: folder and config of each run; the last is the one asked for, those
      before it are what it needs.
    overwrite: whether a run of another config may be removed.
    remedy: what the user is told to do about such a run.

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
        + f'): {remedy}'
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
        if disk.PARTIAL.fullmatch(path.name):
          path.unlink()
      if not is_finished(folder):
        (folder / DIVERGED).unlink(missing_ok=True)  # Of an earlier start.
        mark = {MARK: importlib.metadata.version('ijckd_jax')}
        content = json.loads(config_utils.to_json(config)) | mark
        text = json.dumps(content, indent=2, sort_keys=True)
        disk.write_text(folder / CONFIG, text + '\n')
  except OSError as error:
    raise config_utils.UserError(
      f'the folder {runs[-1][0]} cannot be written: '
      f'{config_utils.reason(error)}'
    ) from error


def is_finished(folder: epath.Path) -> bool:
  """Returns whether the run in the folder has come to its end."""
  try:
    summary = disk.read_json(folder / SUMMARY)
  except (OSError, ValueError):
    return False
  return isinstance(summary, dict) and (folder / BUNDLE).exists()


def is_run(folder: epath.Path) -> bool:
  """Returns whether a folder holds a run, finished or not."""
  return MARK in (_old_config(folder) or {}) or bool(_recorded(folder))


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
    content = disk.read_json(folder / CONFIG)
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
  added = ADDED_FIELDS | ADDED_METHOD_FIELDS.get(config.method.name, {})
  return [
    line
    for line in config_utils.differences({**added, **old}, config.to_dict())
    if line.partition(':')[0] not in RUNTIME_FIELDS
  ]


def _recorded(folder) -> list[str]:
  """Returns what a folder's record lists of CONTENTS; nothing without one."""
  try:
    listed = disk.read_json(folder / RECORD)['files']
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
