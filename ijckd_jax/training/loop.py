"""The loop over steps: count, evaluate, save, stop."""

from collections.abc import Iterator
import dataclasses
import functools
import logging
import os
import signal
import threading
import time
from typing import Any

import jax
from jax.experimental import multihost_utils
import numpy as np

from ijckd_jax.data import datasets
from ijckd_jax.distillation import distiller as distiller_lib
from ijckd_jax.distillation import train_state
from ijckd_jax.evaluation import evaluator
from ijckd_jax.runtime import hosts
from ijckd_jax.runtime import progress as progress_lib
from ijckd_jax.training import checkpoints as checkpoints_lib
from ijckd_jax.training import experiment as experiment_lib
from ijckd_jax.training import feeding
from ijckd_jax.training import head_fitting
from ijckd_jax.training import metric_writer
from ijckd_jax.training import output_recorder

STOPPED = (
  'training stops. Lower the learning rate, or clip the gradient '
  '(optimizer.clip_norm)'
)
PERIODS = ('log', 'eval', 'checkpoint')
SAVED = 'it is saved, and the same command continues from there'

logger = logging.getLogger('ijckd_jax')


class Interrupted(KeyboardInterrupt):
  """A run was asked to stop; the same command continues it.

  It has saved, unless the message says otherwise.

  Attributes:
    where: what stopped, and after which step.
    number: of the signal.
  """

  def __init__(self, where: str, number: int, kept: str = SAVED):
    super().__init__(f'{where}; {kept}')
    self.where = where
    self.number = number


class Diverged(RuntimeError):
  """A metric of training, or a parameter, is not finite.

  Attributes:
    step: the first step with a number that is not finite, counted from 1.
    what: the names of these numbers, and their values.
  """

  def __init__(self, step: int, what: list[str], kept: str = ''):
    kept = kept and f'; {kept}'
    super().__init__(f'step {step}: {", ".join(what)}; {STOPPED}{kept}')
    self.step = step
    self.what = what


class StopSignals:
  """Turns SIGINT and SIGTERM into a request that the loop looks at.

  A second signal is no longer caught. Where there are several processes, JAX
  has taken SIGTERM over, and has all of them stop after the same step; SIGINT
  is handed on as that.
  """

  def __init__(self) -> None:
    self.number = signal.SIGTERM  # Of the signal that came.
    self._requested = False
    self._came = time.monotonic()
    self._looks = 0
    self._before: dict[int, Any] = {}

  def __enter__(self):
    caught = [signal.SIGINT, signal.SIGTERM]
    if jax.process_count() > 1:
      caught.remove(signal.SIGTERM)
    if threading.current_thread() is threading.main_thread():
      for number in caught:
        self._before[number] = signal.signal(number, self._request)
    return self

  def __exit__(self, *_):
    self._restore()

  def reached(self) -> bool:
    """Returns whether to stop now; to be asked after each call of steps."""
    self._looks += 1
    if jax.process_count() > 1:
      return multihost_utils.reached_preemption_sync_point(self._looks)
    return self._requested

  @property
  def seconds(self) -> float | None:
    """How long ago the signal came; None where it came to another process."""
    return time.monotonic() - self._came if self._requested else None

  def _request(self, number, frame):
    del frame
    self._requested, self._came = True, time.monotonic()
    self._restore()
    if jax.process_count() > 1:
      os.kill(os.getpid(), signal.SIGTERM)
    else:
      self.number = number

  def _restore(self):
    while self._before:
      signal.signal(*self._before.popitem())


@dataclasses.dataclass
class Progress:
  """What a loop remembers beside the state; a checkpoint's memo.

  Attributes:
    sums: [sum, count] of each metric since the last row was written.
    examples: trained on while `seconds` were counted.
    seconds: spent in training steps, without those that compile (the first one
      of a process, the first one with stored outputs), evaluations and saves.
    wall_seconds: spent in all, up to the last save.
    damaged: indices of training images that could not be decoded.
    rows: of metrics, written so far.
  """

  sums: dict[str, list[float]] = dataclasses.field(default_factory=dict)
  examples: int = 0
  seconds: float = 0.0
  wall_seconds: float = 0.0
  damaged: list[int] = dataclasses.field(default_factory=list)
  rows: int = 0

  @property
  def images_per_second(self) -> float | None:
    """Training speed; None where none was measured."""
    return self.examples / self.seconds if self.seconds else None


@dataclasses.dataclass
class Loop:
  """Trains from a step to the last one.

  Attributes:
    experiment: what is trained.
    splits: datasets.Arrays by 'train', 'validation' and 'test'.
    checkpoints: the saved states of the run.
    writer: of the metrics.
    frozen: the arrays that are not trained, placed.
    key: the run's key.
    recorder: of the teacher's outputs; None where they are not stored.
    refits: of the head; None where it stays as it is.
    name: what the progress line calls the run.
  """

  experiment: experiment_lib.Experiment
  splits: dict[str, Any]
  checkpoints: checkpoints_lib.Checkpoints
  writer: metric_writer.Writers
  frozen: distiller_lib.Frozen
  key: jax.Array
  recorder: output_recorder.Recorder | None
  refits: head_fitting.Refits | None
  name: str

  def run(
    self,
    state: train_state.TrainState,
    start: int,
    progress: Progress,
    stop: StopSignals,
  ) -> train_state.TrainState:
    """Returns the state after the last step.

    Args:
      state: after `start` steps, placed by the mapper; it is donated.
      start: steps made before.
      progress: what was remembered at that step; it is updated.
      stop: checked after each call of one or many steps.

    Raises:
      Diverged: a metric is not finite; nothing has been saved since.
      Interrupted: a stop was asked for; the state is saved.
      config_utils.UserError: too many images cannot be decoded.
    """
    # Long, and not to be split: its order is what makes resuming exact. Rows
    # and evaluation come before the save, because the checkpoint counts them;
    # the stop comes after it, so that no step is lost; the refit comes last,
    # because a run that continues repeats it.
    exp, config = self.experiment, self.experiment.config
    num_examples = len(self.splits['train'])
    total_steps = exp.total_steps(num_examples)
    tx, schedule = exp.optimizer(num_examples)
    recorder = self.recorder
    feed = feeding.make(
      exp,
      tx,
      self.splits['train'],
      self.key,
      recorder=recorder,
      start=start,
      damaged=progress.damaged,
    )
    split = self.ranking_split
    frozen = self.frozen
    began = time.perf_counter() - progress.wall_seconds
    if start and self.refits is not None:
      frozen = self.refits.after(start, state, frozen)
    pending, clock, counted = [], None, start
    step, pause = start, start
    with _ProgressLine(self.name, start, total_steps) as line:
      while step < total_steps:
        if step == pause:
          pause = self._next_pause(step, total_steps, feed.timed)
        first = step + 1
        state, step, sums = feed.advance(state, frozen, step, pause)
        pending.append((first, step, sums))
        line.advance(step - first + 1)
        stopping = stop.reached()
        if step < pause and not stopping:
          continue
        log, evaluation, save = (
          step in (total_steps, exp.next_due(what, step - 1, num_examples))
          for what in PERIODS
        )
        refit = self.refits is not None and self.refits.is_due(step)
        if recorder is not None:  # First: it knows why a loss is not finite.
          recorder.flush()
        before = dict(examples=progress.examples, seconds=progress.seconds)
        _add(progress.sums, pending)
        if clock is not None and step not in feed.compiling:
          seconds = time.perf_counter() - clock
          progress.examples += (step - counted) * config.batch_size
          progress.seconds += seconds
          feed.set_pace(seconds / (step - counted))
        pending, counted = [], step
        epoch = step * config.batch_size / num_examples
        if log:
          row = {
            'epoch': epoch,
            'train/learning_rate': float(schedule(step - 1)),
          }
          row |= {
            f'train/{name}': total / count
            for name, (total, count) in progress.sums.items()
            if count  # There is no accuracy without labels.
          }
          if progress.seconds > before['seconds']:
            row['train/images_per_second'] = (
              progress.examples - before['examples']
            ) / (progress.seconds - before['seconds'])
          self.writer.write(step, row)
          progress.rows += 1
          line.show(step, row)
          progress.sums = {}
        score = None
        if evaluation and datasets.has_classes(exp.dataset):
          result = self.evaluate(state.evaluated, frozen, split).metrics
          score = result['top1']
          row = {f'{split}/{name}': value for name, value in result.items()}
          self.writer.write(step, {'epoch': epoch, **row})
          progress.rows += 1
          line.show(step, row)
        if evaluation or save or stopping:
          progress.wall_seconds = time.perf_counter() - began
          self._save(step, jax.device_get(state), score, progress)
        if stopping and step < total_steps:
          self.checkpoints.wait()
          took = ''
          if stop.seconds is not None:
            took = f', {stop.seconds:.1f} s after the signal'
          raise Interrupted(
            f'{self.name} stopped after step {step} of {total_steps}{took}',
            stop.number,
          )
        if self.refits is not None and refit and step < total_steps:
          frozen = self.refits.after(step, state, frozen)
        clock = time.perf_counter()
    return state

  def evaluate(
    self, variables: Any, frozen: distiller_lib.Frozen, split: str
  ) -> evaluator.Evaluation:
    """Evaluates a state on a split, beside the teacher if there is one.

    Args:
      variables: 'params' and 'batch_stats' of the student.
      frozen: the arrays that are not trained, placed.
      split: of `splits`.
    """
    distiller = self.experiment.distiller
    return self._evaluator(
      distiller.deployed(variables, frozen),
      frozen.joint,
      self.splits[split],
      distiller.connected_variables(variables, frozen),
    )

  @functools.cached_property
  def _evaluator(self):
    exp = self.experiment
    return evaluator.make(
      exp.distiller.deployed_network,
      mapper=exp.mapper,
      batch_size=exp.config.eval_batch_size,
      teacher=exp.teacher,
      connected=exp.distiller.connected_network,
      num_workers=exp.config.num_workers,
    )

  def _save(self, step, state, score, progress) -> None:
    """Starts to save a state on the host, which is good, after its metrics."""
    _check_finite(step, state)
    if not self.splits['train'].in_memory:
      found = hosts.exchange(progress.damaged)
      progress.damaged[:] = sorted(set().union(*found))
    hosts.share(self.writer.flush)
    if self.recorder is not None:
      self.recorder.close_file()
      hosts.wait('teacher outputs closed')
    memo = dataclasses.asdict(progress)
    self.checkpoints.save(step, state, score=score, memo=memo)

  def _next_pause(self, step: int, total_steps: int, timed: set[int]) -> int:
    """Returns the next step after which there is something to do.

    Args:
      step: that was made.
      total_steps: of the run.
      timed: see feeding.HostFeed.
    """
    num_examples = len(self.splits['train'])
    due = [self.experiment.next_due(x, step, num_examples) for x in PERIODS]
    due += [other for other in timed if other > step]
    if self.refits is not None:
      due.append(self.refits.next_due(step))
    return int(min(total_steps, *due))

  def frozen_of(self, step: int) -> distiller_lib.Frozen:
    """Returns the arrays beside which a student of a step is evaluated."""
    if self.refits is None:
      return self.frozen
    return self.refits.before(step, self.frozen)

  @property
  def ranking_split(self) -> str:
    """The split whose accuracy ranks the checkpoints."""
    return 'validation' if len(self.splits['validation']) else 'test'


def _by_step(
  pending,
) -> Iterator[tuple[int, dict[str, tuple[np.ndarray, np.ndarray]]]]:
  """Yields each step, and (sum, count) of its metrics, which it waits for.

  Args:
    pending: first and last step of a call, and its metrics: numbers, or arrays
      with a number for each step first.
  """
  for first, last, metrics in jax.device_get(pending):
    columns = jax.tree.map(np.ravel, metrics)
    for number, step in enumerate(range(first, last + 1)):
      yield (
        step,
        {
          name: (totals[number], counts[number])
          for name, (totals, counts) in columns.items()
        },
      )


def _add(sums: dict[str, list[float]], pending) -> None:
  """Adds calls' metrics to the running sums; see _by_step."""
  for step, metrics in _by_step(pending):
    bad = [
      f'{name} = {total}'
      for name, (total, _) in metrics.items()
      if not np.isfinite(total)
    ]
    if bad:
      raise Diverged(step, bad)
    for name, (total, count) in metrics.items():
      running = sums.setdefault(name, [0.0, 0.0])
      running[0] += float(total)
      running[1] += float(count)


def _check_finite(step: int, state: train_state.TrainState) -> None:
  """Raises where a parameter is not finite: such a state must not be saved."""
  for path, leaf in jax.tree_util.tree_leaves_with_path(state.params):
    if not np.isfinite(leaf).all():
      name = jax.tree_util.keystr(path)
      raise Diverged(step, [f'params{name} is not finite'])


class _ProgressLine:
  """A tqdm line on a terminal, log lines elsewhere."""

  def __init__(self, name, start, total):
    self._name = name
    self._total = total
    self._bar = None
    self._step = start
    self._lines = progress_lib.Lines(name, 'steps', start, total)
    if progress_lib.has_bar():
      import tqdm

      self._bar = tqdm.tqdm(
        desc=name, initial=start, total=total, unit='step', dynamic_ncols=True
      )
    self._shown = {}
    progress_lib.say(f'{name}: compiling its training step')

  def __enter__(self):
    return self

  def __exit__(self, *_):
    if self._bar is not None:
      self._bar.close()

  def advance(self, num_steps):
    """Counts steps."""
    self._step += num_steps
    if self._bar is not None:
      self._bar.update(num_steps)
    else:
      self._lines.say(self._step)

  def show(self, step, row):
    """Shows the newest of a row's numbers that a reader watches."""
    names = {
      'epoch': ('epoch', '{:.1f}'),
      'train/loss': ('loss', '{:.4f}'),
      'train/accuracy': ('accuracy', '{:.4f}'),
      'validation/top1': ('validation top-1', '{:.4f}'),
      'test/top1': ('test top-1', '{:.4f}'),
      'train/images_per_second': ('images/s', '{:.0f}'),
    }
    new = {
      label: form.format(row[name])
      for name, (label, form) in names.items()
      if name in row
    }
    if self._bar is not None:
      self._shown |= new
      self._bar.set_postfix(self._shown)
    else:
      text = '  '.join(f'{label} {value}' for label, value in new.items())
      logger.info('%s step %d/%d  %s', self._name, step, self._total, text)
