"""Many runs as one: each in a process and a folder of its own, and a table.

Runs that would each train the same teacher first share one, which is trained
before them. What was stopped goes on when the same runs are asked for again,
and several machines may share the folder, because each run locks its own.
"""

from collections.abc import Callable
from collections.abc import Mapping
import dataclasses
import json
import logging
import os
import pathlib
import re
from typing import Any
import zlib

from etils import epath
import ml_collections

from ijckd_jax.distillation import methods
from ijckd_jax.reports import sweep_table
from ijckd_jax.runtime import config_utils
from ijckd_jax.runtime import disk
from ijckd_jax.runtime import workdirs
from ijckd_jax.training import config_checks
from ijckd_jax.training import experiment
from ijckd_jax.training import sweep_processes

TABLE = 'sweep.md'
NUMBERS = 'sweep.json'
TEACHER = 'teacher'
# A part of a run's name, which is a folder on any system.
NAME_PART = re.compile(r'(?!\.)[\w.,=+~-]{1,200}', re.ASCII)
# What the sweep itself has in its folder.
RESERVED = re.compile(
  rf'sweep(\.md|\.json)?|{TEACHER}_[0-9a-f]{{8}}(\.log|\.json)?'
)
# Fields that may differ between runs that share a teacher. The others change
# the data or the bits of the teacher.
FREE_OF_TEACHERS = {*workdirs.RUNTIME_FIELDS} - {
  *('dataset.data_dir', 'dtype', 'feed', 'mapper', 'num_cpu_devices')
}
REMEDY = 'take another --workdir, or remove that folder'

logger = logging.getLogger('ijckd_jax')


@dataclasses.dataclass(frozen=True)
class Outcome:
  """What a sweep came to.

  Attributes:
    summaries: what `summary.json` of each run holds, by the run's name; None
      where the run is not finished.
    failed: why each run that failed did, by its name.
    held: names of the runs that other processes are at work on.
    rows: a row for each setting, see sweep_table.rows.
  """

  summaries: dict[str, dict[str, Any] | None]
  failed: dict[str, str]
  held: tuple[str, ...]
  rows: list[dict[str, Any]]

  @property
  def table(self) -> str:
    """The rows as Markdown."""
    return sweep_table.text(self.rows)


def run(
  configs: Mapping[str, ml_collections.ConfigDict],
  workdir: os.PathLike | str,
  *,
  jobs: int = 1,
  finished: Callable[[str, dict[str, Any], float | None], None] | None = None,
) -> Outcome:
  """Makes the runs that are not finished yet, and a table of all of them.

  A run that fails does not stop the others. The table goes to `sweep.md` in
  the folder, and its numbers to `sweep.json`.

  Args:
    configs: the config of each run (see experiment.default_config) by the run's
      name, which is also its folder below `workdir`. Another process must be
      able to import the code that a config names.
    workdir: of the sweep, on a disk. Machines that share it must see it at the
      same path.
    jobs: how many runs are made side by side.
    finished: is called for each run that is finished, with its name, its
      summary, and the seconds that it took here; None for those seconds if it
      was finished before.

  Raises:
    config_utils.UserError: a config, a name or the folder is not right, or the
      memory does not suffice; nothing was started.
    loop.Interrupted: SIGINT or SIGTERM came; the message says whether every
      run has saved.
  """
  workdir = _folder(workdir)
  sweep_processes.check_jobs(jobs)
  _check_names(configs)
  tasks = _tasks(configs, workdir)
  for task in tasks:
    task.summary = sweep_processes.summary_of(task.folder)
    _check_folder(task)
  waiting = {task.name: configs[task.name] for task in tasks if task.is_open}
  if waiting:
    sweep_processes.check_runs(_one_of_each_setting(waiting), jobs)
  tasks = _with_teachers(tasks)
  _write_configs(tasks, workdir)
  _say_shared(tasks)
  try:
    sweep_processes.make(tasks, jobs=jobs, finished=finished)
  finally:
    outcome = _outcome(configs, tasks)
    _write_table(outcome, configs, workdir)
  return outcome


def _folder(workdir) -> pathlib.Path:
  """Returns a sweep's folder as an absolute path.

  Raises:
    config_utils.UserError: it cannot be one.
  """
  if not str(workdir):
    raise config_utils.UserError('no workdir is given')
  if disk.is_remote(workdir):
    raise config_utils.UserError(
      f'{workdir} is in a bucket: the folder of a sweep must be on a disk'
    )
  workdir = pathlib.Path(os.path.abspath(config_utils.expand(workdir)))
  for folder in (workdir, *workdir.parents):
    if folder.exists() and not folder.is_dir():
      raise config_utils.UserError(f'{folder} is not a folder')
    if workdirs.is_run(epath.Path(folder)):
      raise config_utils.UserError(
        f'{folder} holds a run of its own: take another --workdir for the sweep'
      )
  return workdir


def _check_names(configs: Mapping[str, ml_collections.ConfigDict]) -> None:
  """Raises UserError where runs cannot have their names, or are the same."""
  if not configs:
    raise config_utils.UserError('there is nothing to run')
  seen: dict[str, str] = {}
  for name, config in configs.items():
    parts = name.split('/')
    if not all(map(NAME_PART.fullmatch, parts)):
      raise config_utils.UserError(
        f'a run cannot be called {name!r}: give letters, digits and any of '
        '.,=+~-_, with / between folders'
      )
    if RESERVED.fullmatch(parts[0]):
      raise config_utils.UserError(
        f'a run cannot be called {name!r}: {parts[0]} is of the sweep itself'
      )
    for file in (f'{name}.json', f'{name}.log'):
      if file in configs:
        raise config_utils.UserError(
          f'a run cannot be called {file!r}: the run {name!r} has a file there'
        )
    for i in range(1, len(parts)):
      outer = '/'.join(parts[:i])
      if outer in configs:
        raise config_utils.UserError(
          f'the run {name!r} cannot lie in the folder of the run {outer!r}'
        )
    same = seen.setdefault(config_utils.to_json(config), name)
    if same != name:
      raise config_utils.UserError(
        f'{same} and {name} are the same run twice: give each setting once'
      )
    try:
      config_checks.check_seeds(config)
    except config_utils.UserError as error:
      raise config_utils.UserError(f'{name}: {error}') from error


def _tasks(configs, workdir) -> list[sweep_processes.Task]:
  """Returns the runs, each with the teacher that it shares, if any."""
  shared, tasks = {}, []
  for name, config in configs.items():
    config = config.copy_and_resolve_references()
    teacher = None
    if own := _own_teacher(name, config):
      fields = config_utils.flatten(own.to_dict())
      key = json.dumps(
        {k: v for k, v in fields.items() if k not in FREE_OF_TEACHERS},
        sort_keys=True,
      )
      if key not in shared:
        folder = workdir / f'{TEACHER}_{zlib.crc32(key.encode()):08x}'
        shared[key] = sweep_processes.Task(
          folder.name, own, folder, is_teacher=True
        )
      teacher = shared[key]
      config.teacher.checkpoint = str(teacher.folder)
      config.teacher.init_from = ''  # The teacher's own run has it.
      begun_with = _recorded_teacher(workdir / name)
      if (
        begun_with is not None
        and begun_with.parent == workdir
        and workdirs.is_finished(epath.Path(begun_with))
      ):
        # Also where another feed or dtype would now train another teacher.
        config.teacher.checkpoint, teacher = str(begun_with), None
    tasks.append(
      sweep_processes.Task(name, config, workdir / name, teacher=teacher)
    )
  return tasks


def _own_teacher(name: str, config) -> ml_collections.ConfigDict | None:
  """Returns the config of the teacher that a run would train first, if any."""
  try:
    needs_one = methods.build(config.method).needs_teacher
    if not needs_one or config.teacher.checkpoint:
      return None
    return experiment.teacher_config(config)
  except config_utils.UserError as error:
    raise config_utils.UserError(f'{name}: {error}') from error


def _recorded_teacher(folder: pathlib.Path) -> pathlib.Path | None:
  """Returns the folder of the sweep's teacher with which a run has begun.

  None where the run has not begun, or with a teacher that the config named.
  """
  path = pathlib.Path(_recorded(folder, 'checkpoint') or '')
  return path if RESERVED.fullmatch(path.name) else None


def _recorded(folder: pathlib.Path, field: str):
  """Returns a field of the `teacher` section that a run's folder records."""
  try:
    return disk.read_json(epath.Path(folder) / workdirs.CONFIG)['teacher'][
      field
    ]
  except (OSError, ValueError, TypeError, KeyError):
    return None


def _check_folder(task) -> None:
  """Raises UserError where a run's folder holds what is not of that run."""
  config = task.config.copy_and_resolve_references()
  # A run that was given its teacher has filled this in.
  fingerprint = _recorded(task.folder, 'fingerprint')
  if fingerprint is not None:
    config.teacher.fingerprint = fingerprint
  begun_with = _recorded_teacher(task.folder)
  if task.teacher is not None and not task.is_open and begun_with is not None:
    # The whole sweep may have been moved since, with its teachers.
    config.teacher.checkpoint = str(begun_with)
  folder = epath.Path(task.folder)
  workdirs.check([(folder, config)], overwrite=False, remedy=REMEDY)


def _without_seed(config) -> str:
  """Returns what the runs of a setting have in common."""
  content = config.to_dict()
  del content['seed']
  return json.dumps(content, sort_keys=True)


def _one_of_each_setting(configs):
  """Returns the first run of each setting, by name."""
  first: dict[str, tuple[str, ml_collections.ConfigDict]] = {}
  for name, config in configs.items():
    first.setdefault(_without_seed(config), (name, config))
  return dict(first.values())


def _with_teachers(tasks) -> list[sweep_processes.Task]:
  """Returns the tasks, and before them the teachers that they wait for."""
  teachers: dict[str, sweep_processes.Task] = {}
  for task in tasks:
    if task.is_open and task.teacher is not None:
      teachers.setdefault(task.teacher.name, task.teacher)
  for teacher in teachers.values():
    _check_folder(teacher)
    teacher.summary = sweep_processes.summary_of(teacher.folder)
  return [*teachers.values(), *tasks]


def _write_configs(tasks, workdir) -> None:
  """Writes the config of each task that is still to be run, beside its folder.

  Raises:
    config_utils.UserError: the sweep's folder cannot be written.
  """
  try:
    workdir.mkdir(parents=True, exist_ok=True)
    for task in tasks:
      if task.is_open:
        task.file.parent.mkdir(parents=True, exist_ok=True)
        text = config_utils.to_json(task.config)
        disk.write_text(epath.Path(task.file), text)
  except OSError as error:
    raise config_utils.UserError(
      f'the folder {workdir} cannot be written: {config_utils.reason(error)}'
    ) from error


def _say_shared(tasks) -> None:
  """Logs which teachers are trained first, and for how many runs."""
  for teacher in tasks:
    if teacher.is_teacher and teacher.is_open:
      students = [task for task in tasks if task.teacher is teacher]
      logger.info(
        '%s: the teacher is trained once, for %d run%s',
        teacher.folder,
        len(students),
        's' if len(students) > 1 else '',
      )


def _outcome(configs, tasks) -> Outcome:
  """Returns what a sweep came to, when all of its tasks have ended."""
  tasks = [task for task in tasks if not task.is_teacher]
  for task in tasks:
    if task.is_open:  # Another process may have finished it by now.
      task.summary = sweep_processes.summary_of(task.folder)
  settings = setting_names(configs)
  rows = sweep_table.rows(
    [
      sweep_table.Run(settings[task.name], task.config.seed, task.summary)
      for task in tasks
    ]
  )
  return Outcome(
    summaries={task.name: task.summary for task in tasks},
    failed={
      task.name: task.failure for task in tasks if task.failure and task.is_open
    },
    held=tuple(task.name for task in tasks if task.is_held and task.is_open),
    rows=rows,
  )


def setting_names(
  configs: Mapping[str, ml_collections.ConfigDict],
) -> dict[str, str]:
  """Returns the name of each run's setting, by the name of the run.

  Runs have the same setting if they differ in their seed only. The name of the
  setting is that of its runs without the seed.
  """
  groups: dict[str, list[str]] = {}
  for name, config in configs.items():
    groups.setdefault(_without_seed(config), []).append(name)
  found: dict[str, str] = {}
  for names in groups.values():
    stems = {_stem(name, configs[name].seed, len(names) > 1) for name in names}
    called = stems.pop() if len(stems) == 1 else names[0]
    if called in found.values():
      called = names[0]
    found |= dict.fromkeys(names, called)
  return found


def _stem(name: str, seed: int, several: bool) -> str:
  """Returns a run's name without its seed.

  Args:
    name: of the run.
    seed: of the run; where the name does not state it, the name stays.
    several: whether the setting has further runs. Then a name may also end with
      the plain number of the seed.
  """
  stem = re.sub(rf'[,/_-]seed={seed}(?=,|$)', '', name)
  if stem == name and several:
    stem = re.sub(rf'[,/_-]{seed}$', '', name)
  return stem


def _write_table(outcome: Outcome, configs, workdir) -> None:
  """Writes the table, and its numbers with those of each run."""
  settings = setting_names(configs)
  runs = {
    name: {
      'setting': settings[name],
      'seed': configs[name].seed,
      'finished': summary is not None,
      'student': summary and summary['student'],
      'teacher': summary and summary['teacher'],
    }
    for name, summary in outcome.summaries.items()
  }
  numbers = {'settings': outcome.rows, 'runs': runs, 'failed': outcome.failed}
  text = json.dumps(numbers, indent=2) + '\n'
  try:
    disk.write_text(epath.Path(workdir / TABLE), outcome.table)
    disk.write_text(epath.Path(workdir / NUMBERS), text)
  except OSError as error:
    why = config_utils.reason(error)
    logger.warning('%s: the table cannot be written: %s', workdir, why)
