"""The processes of a sweep: checked, started side by side, watched, stopped.

Each is the ordinary training command, on a config that was written as JSON.
"""

from collections.abc import Callable
from collections.abc import Mapping
from collections.abc import Sequence
import contextlib
import dataclasses
import json
import logging
import math
import os
import pathlib
import signal
import subprocess
import threading
import time
from typing import Any

from etils import epath
import ml_collections
import numpy as np

from ijckd_jax.reports import report
from ijckd_jax.runtime import children
from ijckd_jax.runtime import config_utils
from ijckd_jax.runtime import disk
from ijckd_jax.runtime import hosts
from ijckd_jax.runtime import locks
from ijckd_jax.runtime import progress
from ijckd_jax.runtime import workdirs
from ijckd_jax.training import loop

# Between two looks at the processes.
POLL_SECONDS = 0.1
# Between two attempts to take a teacher that another process trains.
TEACHER_SECONDS = 30
# Processes that share a GPU cannot each take most of its memory at the start.
PREALLOCATE = 'XLA_PYTHON_CLIENT_PREALLOCATE'
GB = 1e9
# Exit codes of a run that was stopped and has saved.
SAVED = (128 + signal.SIGINT, 128 + signal.SIGTERM)

logger = logging.getLogger('ijckd_jax')

Finished = Callable[[str, dict[str, Any], float | None], None]


@dataclasses.dataclass(eq=False)
class Task:
  """A run that a sweep makes.

  Attributes:
    name: of the run.
    config: of the run.
    folder: of the run.
    teacher: the task that trains its teacher; None where it takes none, or one
      that is there.
    is_teacher: whether it is the teacher of others.
    summary: what `summary.json` holds; None while the run is not finished.
    failure: why it failed; empty if it did not.
    is_held: whether another process was at work on it.
    not_before: time (time.monotonic) at which it may be started.
  """

  name: str
  config: ml_collections.ConfigDict
  folder: pathlib.Path
  teacher: 'Task | None' = None
  is_teacher: bool = False
  summary: dict[str, Any] | None = None
  failure: str = ''
  is_held: bool = False
  not_before: float = 0.0

  @property
  def is_open(self) -> bool:
    """Whether the run is not finished."""
    return self.summary is None

  @property
  def file(self) -> pathlib.Path:
    """The file of the config."""
    return self.folder.with_name(f'{self.folder.name}.json')

  @property
  def log(self) -> pathlib.Path:
    """The file to which the process prints."""
    return self.folder.with_name(f'{self.folder.name}.log')


@dataclasses.dataclass
class _Running:
  """A process at work on a task; `slot` is one of 0 ... jobs - 1."""

  task: Task
  process: subprocess.Popen
  slot: int
  begun: float


def summary_of(folder: pathlib.Path) -> dict[str, Any] | None:
  """Returns the summary of a finished run; None where there is none.

  Arrays and data are not read. A summary without the numbers that a table shows
  is none: the run then makes it again.
  """
  folder = epath.Path(folder)
  if not (workdirs.is_finished(folder) and report.is_complete(folder)):
    return None
  summary = disk.read_json(folder / workdirs.SUMMARY)
  try:
    report.table(summary)
  except Exception:  # Damaged numbers raise errors of any type.
    return None
  return summary


def check_jobs(jobs: int) -> None:
  """Raises UserError where the number of jobs is below 1."""
  if jobs < 1:
    raise config_utils.UserError(f'--jobs {jobs}: give at least 1')


def check_runs(
  configs: Mapping[str, ml_collections.ConfigDict], jobs: int
) -> None:
  """Builds runs in another process, which ends before the first run starts.

  Args:
    configs: by the runs' names.
    jobs: how many are to run side by side. If several are, the memory of the
      run that looks largest is estimated.

  Raises:
    config_utils.UserError: a config cannot be run, or the memory does not
      suffice.
  """
  texts = {k: config_utils.to_json(config) for k, config in configs.items()}
  process = children.start(
    'ijckd_jax.training.sweep_check',
    user_path=config_utils.user_path,
    env=_environment(share=True),
    stdin=subprocess.PIPE,
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  )
  try:
    out, err = process.communicate(
      json.dumps({'configs': texts, 'memory': jobs > 1})
    )
  except BaseException:
    process.kill()
    raise
  if process.returncode:
    raise config_utils.UserError(
      _last_line(err).removeprefix('error: ')
      or f'the check of the runs ended with exit code {process.returncode}'
    )
  if jobs > 1:
    _check_memory(json.loads(out.splitlines()[-1]), jobs)


def _check_memory(found: Mapping[str, Any], jobs: int) -> None:
  """Raises UserError where so many runs are estimated not to fit."""
  said, fits = [], jobs
  for where, words in (
    ('host', 'of memory that are free'),
    ('device', "of a device's memory that JAX may still use"),
  ):
    needed, free = found.get(where), found.get(f'{where}_free')
    if not needed or not free:
      continue
    fits = min(fits, math.floor(free / needed))
    said.append(f'about {needed / GB:.2f} of the {free / GB:.2f} GB {words}')
  if not said:
    return
  line = (
    f'a run takes {" and ".join(said)}, by the estimate for {found["name"]}'
  )
  if not fits:
    raise config_utils.UserError(
      f'--jobs {jobs}: {line}, so that not even one run fits: give smaller '
      'batches, or try --jobs 1, which starts without an estimate'
    )
  if fits < jobs:
    raise config_utils.UserError(
      f'--jobs {jobs}: {line}; give --jobs {fits} at most'
    )
  logger.info('%s', line)


def _environment(*, share: bool) -> dict[str, str]:
  """Returns the variables that a process of a sweep gets.

  Args:
    share: whether it shares its devices with others.
  """
  # Of a cluster's processes, each makes runs of its own.
  found = {count: '1' for count, _ in hosts.CLUSTERS if count in os.environ}
  if share and PREALLOCATE not in os.environ:
    found[PREALLOCATE] = 'false'
  return found


def _last_line(text: str) -> str:
  """Returns the last line that is not empty."""
  lines = [line.strip() for line in text.splitlines() if line.strip()]
  return lines[-1] if lines else ''


class _Signals:
  """Counts SIGINT and SIGTERM, and restores their handlers at the end."""

  def __init__(self):
    self.count = 0
    self.number = signal.SIGTERM  # Of the first signal that came.
    self._before = {}

  def __enter__(self):
    if threading.current_thread() is threading.main_thread():
      for number in (signal.SIGINT, signal.SIGTERM):
        self._before[number] = signal.signal(number, self._came)
    return self

  def __exit__(self, *_):
    for number, handler in self._before.items():
      signal.signal(number, handler)

  def _came(self, number, frame):
    del frame
    if not self.count:
      self.number = number
    self.count += 1


def make(
  tasks: Sequence[Task], *, jobs: int, finished: Finished | None = None
) -> None:
  """Makes the runs that are open, and notes in the tasks how they ended.

  Args:
    tasks: in the order in which they are begun; a teacher before its students.
    jobs: how many are made side by side.
    finished: see sweep.run.

  Raises:
    loop.Interrupted: SIGINT or SIGTERM came; the message says whether every
      run has saved.
  """
  pool = _Pool(tasks, jobs, finished)
  with _Signals() as signals:
    try:
      pool.run(signals)
    finally:
      pool.stop()


class _Pool:
  """The processes that are at work, and the tasks that wait for a slot."""

  def __init__(self, tasks, jobs, finished):
    self._runs = [task for task in tasks if not task.is_teacher]
    self._waiting = [task for task in tasks if task.is_open]
    self._jobs = jobs
    self._finished = finished
    self._running: list[_Running] = []
    self._seconds: list[float] = []  # Of the runs that were made.
    self._unsaved: list[str] = []  # Runs that ended without a save at a stop.
    there = [task for task in self._runs if not task.is_open]
    if there:
      logger.info('%d of %d runs are finished', len(there), len(self._runs))
    for task in there:
      self._tell(task, None)

  def run(self, signals: _Signals) -> None:
    """Returns when all tasks have ended.

    Raises:
      loop.Interrupted: see `make`.
    """
    passed_on = 0
    while self._running or (self._waiting and not passed_on):
      if signals.count > passed_on:
        # SIGTERM, whichever signal came: a process that has its handlers saves
        # and ends; one that does not have them yet ends.
        if not passed_on:
          number = len(self._running)
          logger.info(
            'waiting for %d run%s to save', number, 's' if number > 1 else ''
          )
        passed_on = signals.count
        for running in self._running:
          if signals.count > 1:
            running.process.kill()  # Nobody waits for a save.
          else:
            running.process.terminate()
      for running in list(self._running):
        if running.process.poll() is not None:
          self._running.remove(running)
          self._end(running, stopping=bool(passed_on))
      if not passed_on:
        self._start()
      time.sleep(POLL_SECONDS)
    if passed_on or signals.count:
      done = sum(not task.is_open for task in self._runs)
      kept = loop.SAVED
      if self._unsaved:
        kept = (
          f'ended without a save: {", ".join(self._unsaved)}; the same command '
          'continues from the checkpoints that are there'
        )
      raise loop.Interrupted(
        f'the sweep stopped with {done} of {len(self._runs)} runs finished',
        signals.number,
        kept,
      )

  def stop(self) -> None:
    """Has the processes that are left save and end, after an error."""
    for running in self._running:
      running.process.terminate()
    for running in self._running:
      running.process.wait()

  def _start(self) -> None:
    """Starts the tasks for which there is a slot."""
    for task in list(self._waiting):
      if task.teacher is not None and task.teacher.failure:
        task.failure = (
          f'its teacher failed: {task.teacher.failure} ({task.teacher.log})'
        )
        self._waiting.remove(task)
        logger.warning('%s: not made, because its teacher failed', task.name)
    now = time.monotonic()
    due = [
      task
      for task in self._waiting
      if (task.teacher is None or not task.teacher.is_open)
      and task.not_before <= now
    ]
    # The processes that will be at work share the cores.
    share = min(self._jobs, len(self._running) + len(due))
    for task in due[: self._jobs - len(self._running)]:
      self._waiting.remove(task)
      task.summary = summary_of(task.folder)
      if not task.is_open:
        self._tell(task, None)
        logger.info('%s: finished by another process', task.name)
        continue
      taken = {running.slot for running in self._running}
      slot = min({*range(self._jobs)} - taken)
      try:
        process = self._process(task, _cores(slot, share))
      except OSError as error:
        task.failure = f'cannot be started: {config_utils.reason(error)}'
        logger.warning('%s: %s', task.name, task.failure)
        continue
      self._running.append(_Running(task, process, slot, time.monotonic()))
      if not task.is_held:
        logger.info('%s: starts (%s)', task.name, task.log)

  def _process(self, task: Task, cores) -> subprocess.Popen:
    """Starts the process of a task."""
    with open(task.log, 'ab') as log:
      return children.start(
        'ijckd_jax.main',
        ['--config', f'{task.file}', '--workdir', f'{task.folder}'],
        cores=cores,
        user_path=config_utils.user_path,
        env=_environment(share=self._jobs > 1),
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=subprocess.STDOUT,
        # The terminal's Ctrl-C reaches this process alone, which passes it on.
        start_new_session=True,
      )

  def _end(self, running: _Running, *, stopping: bool) -> None:
    """Notes how a task's process ended, and says so."""
    task, code = running.task, running.process.returncode
    seconds = time.monotonic() - running.begun
    said = _last_line(_tail(task.log))
    if code == 0:
      task.summary = summary_of(task.folder)
      if task.is_open:
        said, code = f'{workdirs.SUMMARY} or the report is not whole', 1
    if code == 0:
      if not task.is_teacher:
        self._seconds.append(seconds)
      self._tell(task, seconds)
      self._say_finished(task, seconds)
    elif code == 2 and locks.HELD in said:
      self._set_aside(task)
    elif not (stopping and code in SAVED):
      if code < 0:
        said = f'killed by {signal.Signals(-code).name}'
      why = said.removeprefix('error: ') or f'exit code {code}'
      if stopping:
        self._unsaved.append(task.name)
      else:
        task.failure = why
      what = 'ended without a save' if stopping else 'failed'
      where = progress.duration(seconds), why, task.log
      logger.warning('%s: %s after %s: %s (%s)', task.name, what, *where)

  def _set_aside(self, task: Task) -> None:
    """Notes that another process is at work on a task."""
    if task.is_teacher:
      task.not_before = time.monotonic() + TEACHER_SECONDS
      self._waiting.insert(0, task)
    if not task.is_held:
      what = 'its students wait' if task.is_teacher else 'skipped'
      logger.info('%s: another process is at work on it: %s', task.name, what)
    task.is_held = True

  def _say_finished(self, task: Task, seconds: float) -> None:
    top1 = task.summary['student']['last']['top1']
    left = sum(
      task.is_open and not (task.failure or task.is_held) for task in self._runs
    )
    remaining = ''
    if left and self._seconds:
      rounds = math.ceil(left / self._jobs)
      mean = sum(self._seconds) / len(self._seconds)
      remaining = f', about {progress.duration(rounds * mean)}'
    logger.info(
      '%s: top-1 %.2f%%, %s; %d left%s',
      task.name,
      100 * top1,
      progress.duration(seconds),
      left,
      remaining,
    )

  def _tell(self, task: Task, seconds: float | None) -> None:
    if self._finished is not None and not task.is_teacher:
      self._finished(task.name, task.summary, seconds)


def _cores(slot: int, share: int) -> list[int]:
  """Returns the cores of one of `share` processes; empty: all there are."""
  if share < 2 or not hasattr(os, 'sched_getaffinity'):
    return []
  cores = sorted(os.sched_getaffinity(0))
  part = np.array_split(cores, share)[slot % share].tolist()
  return part or [cores[slot % len(cores)]]


def _tail(path: pathlib.Path) -> str:
  """Returns the end of a log; empty where it is gone."""
  with contextlib.suppress(OSError), open(path, 'rb') as file:
    file.seek(max(0, os.fstat(file.fileno()).st_size - 10_000))
    return file.read().decode(errors='replace')
  return ''
