"""How a run's batches reach the devices: one by one, or as indices of many.

`HostFeed` sends each step its images. `DeviceFeed` puts the whole training set
on the devices once; a call then makes many steps on two small arrays of indices
and epochs. A small network on an accelerator otherwise waits for Python, which
starts its steps. The two round differently, because the compiler sees a step
alone or inside of a loop; either of them is exact when a run continues.
"""

import collections
from collections.abc import Iterator
import logging
from typing import Any

import jax
import numpy as np
import optax

from ijckd_jax.data import datasets
from ijckd_jax.data import input_pipeline
from ijckd_jax.distillation import distiller as distiller_lib
from ijckd_jax.distillation import train_state
from ijckd_jax.runtime import backend
from ijckd_jax.runtime import config_utils
from ijckd_jax.runtime import hosts
from ijckd_jax.runtime import parallel
from ijckd_jax.training import output_recorder

# How far the host may run ahead of the devices: each step holds its batch.
MAX_STEPS_AHEAD = 8
# With fewer, small networks would wait for Python between the calls; more would
# gain nothing.
MAX_STEPS_A_CALL = 256
# A stop waits for the calls that were dispatched before it: at most two.
MAX_SECONDS_A_CALL = 2.0
# Largest share of the device memory available to JAX that the training set may
# take; the step needs the rest.
MAX_MEMORY_FRACTION = 0.25
GIB = 2**30

logger = logging.getLogger('ijckd_jax')


def check(exp, arrays) -> None:
  """Raises UserError where the config asks for a feed that is not possible.

  Args:
    exp: experiment.Experiment.
    arrays: datasets.Arrays that it trains on, or photos.Photos.
  """
  obstacle = _obstacle(exp, arrays)
  if obstacle and exp.config.feed == 'device':
    raise config_utils.UserError(
      f"feed='device': {obstacle}; set --config.feed=host, or auto"
    )


def is_on_device(exp, arrays) -> bool:
  """Returns whether a run's training set lies on the devices; see `check`."""
  return _wants_device(exp.config) and not _obstacle(exp, arrays)


def _wants_device(config) -> bool:
  """Returns whether the training set lies on the devices if it can."""
  # On a CPU a call of many steps is slower; see the benchmarks.
  on_accelerator = jax.default_backend() != 'cpu'
  return config.feed == 'device' or (config.feed == 'auto' and on_accelerator)


def _obstacle(exp, arrays) -> str:
  """Returns why a training set cannot lie on the devices; '' if it can."""
  if not isinstance(arrays, datasets.Arrays):
    return 'the images are decoded as the run goes on'
  if type(arrays).train_views is not datasets.Arrays.train_views:
    return 'the data set makes its training views on the host'
  if exp.stored is not None:
    return "the teacher's outputs are stored (teacher.store.views)"
  needed = arrays.images.nbytes
  memory = backend.memory_limit(jax.local_devices()[0])
  if memory is None or needed <= MAX_MEMORY_FRACTION * memory:
    return ''
  return (
    f'the training images take {needed / GIB:.3g} GiB of each device, more '
    f'than {MAX_MEMORY_FRACTION:.0%} of the {memory / GIB:.3g} GiB that JAX '
    'may use'
  )


class HostFeed:
  """Sends each step its images.

  Attributes:
    compiling: the steps whose calls compile a program.
    timed: the steps after which the loop takes the time: those before and in
      which a program is compiled.
  """

  def __init__(
    self, exp, tx, arrays, key, *, recorder, start: int, damaged: list[int]
  ):
    """Prepares the steps after `start`.

    Args:
      exp: experiment.Experiment.
      tx: its optimizer.
      arrays: datasets.Arrays that it trains on.
      key: the run's, placed.
      recorder: output_recorder.Recorder; None where no outputs are stored.
      start: steps made before.
      damaged: the indices of images that could not be decoded; those that are
        found are appended.
    """
    self._exp = exp
    self._arrays = arrays
    self._key = key
    self._recorder = recorder
    self._damaged = damaged
    self._step = exp.map_train_step(exp.train_step(tx))
    self._filling_step = exp.map_train_step(
      exp.train_step(tx, returns_rows=True), rows_out=True
    )
    self._last_filling_step = recorder.last_filling_step if recorder else 0
    self._batches = self._placed(start, exp.total_steps(len(arrays)))
    self._under_way = collections.deque()
    self.compiling = {start + 1}
    if recorder is not None:
      self.compiling.add(self._last_filling_step + 1)
    self.timed = {step - n for step in self.compiling for n in (0, 1)}

  def advance(self, state, frozen, step: int, until: float):
    """Makes the step after `step`; see DeviceFeed.advance."""
    del until  # One step is never too many.
    step, batch = step + 1, next(self._batches)
    if step <= self._last_filling_step:
      (state, sums), rows = self._filling_step(state, frozen, batch, self._key)
      self._recorder.add(step, rows)
    else:
      state, sums = self._step(state, frozen, batch, self._key)
    _wait_for_earlier(self._under_way, sums, MAX_STEPS_AHEAD)
    return state, step, sums

  def set_pace(self, seconds: float) -> None:
    """Ignores the seconds of a step: a call makes a single step anyway."""

  def _placed(self, start: int, stop: int) -> Iterator[Any]:
    """Yields the placed batches of the steps after `start`, up to `stop`.

    Where teacher outputs are stored, ask for each batch only after the step
    before: the first one with stored outputs opens the store, which must be
    full then.
    """
    config = self._exp.config
    rows = hosts.rows_of_process(config.batch_size)
    stages = [(start, stop, None)]
    if self._recorder is not None:
      full = max(start, self._last_filling_step)
      stages = [(start, full, None), (full, stop, self._recorder.reader)]
    for first, last, reader in stages:
      if first < last:
        batches = input_pipeline.train_batches(
          self._arrays,
          batch_size=config.batch_size,
          seed=config.seed,
          start_step=first,
          stop_step=last,
          rows=rows,
          views=config.teacher.store.views,
          num_workers=config.num_workers,
          teacher=reader and reader(),
        )
        yield from parallel.ahead(map(self._place, batches))

  def _place(self, batch) -> Any:
    """Returns a batch on the devices, once what is damaged in it is noted."""
    bad = batch.pop('bad', None)
    if bad is not None:
      arrays = self._arrays
      new = set(batch['index'][bad].tolist()) - set(self._damaged)
      for index in sorted(new):
        logger.warning(
          '%s cannot be decoded; another image takes its place',
          arrays.name_of(index),
        )
        self._damaged.append(index)
      if len(self._damaged) > arrays.max_bad_fraction * len(arrays):
        names = [arrays.name_of(index) for index in self._damaged]
        raise config_utils.UserError(
          f'{len(names)} training images cannot be decoded, more than '
          f'max_bad_fraction={arrays.max_bad_fraction} of {len(arrays)}: '
          f'{", ".join(names[:20])}{", ..." if names[20:] else ""}; prepare '
          'the data without them, or allow more'
        )
    return self._exp.mapper.shard(batch)


class DeviceFeed:
  """Makes many steps in a call, on images that lie on the devices.

  Attributes:
    compiling: the step whose call compiles the program, as a set.
    timed: the steps after which the loop takes the time: that step, and the
      first one that runs the compiled program alone.
  """

  def __init__(self, exp, tx, arrays, key, *, start: int):
    """Places the training set; see HostFeed for the arguments."""
    self._exp = exp
    self._key = key
    self._num_examples = len(arrays)
    self._data = exp.mapper.replicate(data_of(arrays.images, arrays.labels))
    self._steps = exp.map_train_steps(exp.train_step(tx))
    # The same however often the run was stopped: it is a shape of the program.
    self._max_steps = min(MAX_STEPS_A_CALL, exp.total_steps(len(arrays)))
    self._steps_a_call = 1  # Until the time of a step is known.
    self._under_way = collections.deque()
    self.compiling = {start + 1}
    self.timed = {start + 1, start + 2}

  def advance(
    self,
    state: train_state.TrainState,
    frozen: distiller_lib.Frozen,
    step: int,
    until: float,
  ):
    """Makes the steps after `step`, at most up to `until`.

    Returns once the call before is done; the steps of this one are under way.

    Args:
      state: after `step` steps, placed; it is donated.
      frozen: the arrays that are not trained, placed.
      step: steps made before.
      until: the next step after which the loop has something to do.

    Returns:
      The state, the last step that was made, and (sum, count) of each metric:
      arrays with a number for each step first, or the numbers of a single step.
    """
    count = int(min(until - step, self._steps_a_call))
    state, sums = self._steps(
      state,
      frozen,
      self._exp.mapper.shard(self._plan(step, count)),
      self._data,
      self._exp.mapper.replicate(np.int32(count)),
      self._key,
    )
    _wait_for_earlier(self._under_way, sums, 1)
    return state, step + count, sums

  def set_pace(self, seconds: float) -> None:
    """Limits calls to MAX_SECONDS_A_CALL, by the seconds that a step takes."""
    agreed = hosts.share(lambda: seconds)  # All hosts make the same calls.
    most = MAX_SECONDS_A_CALL / agreed if agreed else self._max_steps
    self._steps_a_call = max(1, int(min(self._max_steps, most)))

  def _plan(self, step: int, count: int) -> dict[str, np.ndarray]:
    """Returns steps.train_steps' plan of `count` steps: this process's rows."""
    config = self._exp.config
    rows = hosts.rows_of_process(config.batch_size)
    found = input_pipeline.examples(
      step,
      batch_size=config.batch_size,
      seed=config.seed,
      num_examples=self._num_examples,
      num_steps=count,
    )
    plan = {}
    for name, values in zip(('index', 'epoch'), found, strict=True):
      by_step = values.reshape(count, -1)[:, rows]
      plan[name] = np.zeros((by_step.shape[1], self._max_steps), np.int32)
      plan[name][:, :count] = by_step.T
    return plan


def data_of(images: np.ndarray, labels: np.ndarray) -> dict[str, np.ndarray]:
  """Returns a training set as steps.train_steps takes it."""
  return {
    'image': images.reshape(len(images), -1),
    'label': labels.astype(np.int32),
  }


def make(
  exp,
  tx: optax.GradientTransformation,
  arrays,
  key: jax.Array,
  *,
  recorder: output_recorder.Recorder | None,
  start: int,
  damaged: list[int],
) -> HostFeed | DeviceFeed:
  """Returns the feed of a run; see HostFeed for the arguments."""
  if is_on_device(exp, arrays):
    return DeviceFeed(exp, tx, arrays, key, start=start)
  if _wants_device(exp.config):
    logger.info(
      'each step is sent its images, because %s', _obstacle(exp, arrays)
    )
  return HostFeed(
    exp, tx, arrays, key, recorder=recorder, start=start, damaged=damaged
  )


def _wait_for_earlier(under_way, result, most: int) -> None:
  """Waits until at most `most` calls are under way; `result` is the last's."""
  under_way.append(result)
  if len(under_way) > most:
    jax.block_until_ready(under_way.popleft())
