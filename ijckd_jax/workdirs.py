"""A run's folder: whose it is, what lies in it, and when it is finished."""

from collections.abc import Sequence
import json
from typing import Any
import uuid

from etils import epath
import ml_collections

from ijckd_jax import config_utils

CONFIG = 'config.json'
CHECKPOINTS = 'checkpoints'
METRICS = 'metrics.jsonl'
TENSORBOARD = 'tensorboard'
SUMMARY = 'summary.json'
REPORT = 'report.md'
PLOTS = 'plots'
BUNDLE = 'bundle'
CONTENTS = (
  CHECKPOINTS,
  METRICS,
  TENSORBOARD,
  SUMMARY,
  REPORT,
  PLOTS,
  BUNDLE,
  CONFIG,
)
# What may differ between the parts of one run: where and how it is computed.
RUNTIME_FIELDS = ('mapper', 'num_cpu_devices', 'writers')


def claim(
  runs: Sequence[tuple[epath.Path, ml_collections.ConfigDict]],
  *,
  overwrite: bool,
) -> None:
  """Makes folders ready for the runs of these configs; all of them or none.

  Args:
    runs: folder and config of each run; the last is the one asked for, those
      before it are what it needs.
    overwrite: remove what the last run left, and what the others left under
      another config.

  Raises:
    config_utils.UserError: a folder holds a run of another config, or cannot be
      written.
  """
  changes = [_changes(*run) for run in runs]
  for (folder, _), changed in reversed(list(zip(runs, changes, strict=True))):
    if changed and not overwrite:
      raise config_utils.UserError(
        f'{folder} holds a run of another config ({"; ".join(changed)}): take '
        'another --workdir, or start anew with --overwrite'
      )
  try:
    for (folder, config), changed in zip(runs, changes, strict=True):
      if changed or (overwrite and folder == runs[-1][0]):
        _clear(folder)
      folder.mkdir(parents=True, exist_ok=True)
      write_text(folder / CONFIG, config_utils.to_json(config))
  except OSError as error:
    raise config_utils.UserError(
      f'the folder {runs[-1][0]} cannot be written: {error}'
    ) from error


def is_finished(folder: epath.Path) -> bool:
  """Returns whether the run in the folder has come to its end."""
  return (folder / SUMMARY).exists()  # Written last.


def read_json(path: epath.Path) -> Any:
  """Returns what a JSON file holds.

  Raises:
    config_utils.UserError: it is not JSON.
  """
  try:
    return json.loads(path.read_text())
  except ValueError as error:
    raise config_utils.UserError(f'{path} is not JSON: {error}') from error


def write_text(path: epath.Path, text: str) -> None:
  """Writes a file that is never seen half written."""
  partial = path.with_name(f'.{path.name}.{uuid.uuid4().hex}')
  partial.write_text(text)
  partial.replace(path)


def _changes(folder, config) -> list[str]:
  """Returns the fields in which a folder's run differs from the config."""
  try:
    there = (folder / CONFIG).exists()
    if not there and (folder / CHECKPOINTS).exists():
      return [f'its {CONFIG} is missing']
  except OSError:
    there = False  # Writing will say what is wrong with the folder.
  if not there:
    return []
  old = read_json(folder / CONFIG)
  new = config.to_dict()
  return [
    line
    for line in config_utils.differences(old, new)
    if line.partition(':')[0] not in RUNTIME_FIELDS
  ]


def _clear(folder) -> None:
  """Removes what a run left, and nothing else."""
  for name in CONTENTS:  # The config last: until then it is still a run's.
    path = folder / name
    if path.is_dir():
      path.rmtree()
    elif path.exists():
      path.unlink()
