"""What the loop costs beside its steps: nothing compiles twice or waits."""

import logging

import jax
import numpy as np
import pytest

from ijckd_jax.distillation import steps
from ijckd_jax.evaluation import evaluator
from ijckd_jax.runtime import parallel
from ijckd_jax.training import train
from tests import steps_on_devices

BY_EITHER_MAPPER = pytest.mark.parametrize(
  'mapper', ['pmap', pytest.param('shard_map', marks=pytest.mark.slow)]
)


@pytest.fixture
def traced(monkeypatch):
  """The names of the bodies that were traced, in order."""
  names = []

  def watch(module, name):
    body = getattr(module, name)

    def watched(*args, **kwargs):
      names.append(name)
      return body(*args, **kwargs)

    monkeypatch.setattr(module, name, watched)

  watch(steps, 'train_step')
  watch(evaluator, 'eval_step')
  return names


class CompilationsByStep(logging.Handler):
  """A writer that knows how many programs had been compiled by each row."""

  def __init__(self, stop_at=None):
    super().__init__()
    self.compiled = []
    self.rows = []
    self.stop_at = stop_at

  def emit(self, record):
    if record.getMessage().startswith('Compiling '):
      self.compiled.append(record.getMessage())

  def write(self, step, scalars):
    kind = 'eval' if 'test/top1' in scalars else 'train'
    self.rows.append((kind, step, len(self.compiled)))
    if step == self.stop_at:
      raise KeyboardInterrupt


# A run without a cache of compiled programs.
@pytest.mark.slow
@pytest.mark.parametrize('feed', ['host', 'device'])
@BY_EITHER_MAPPER
def test_each_step_is_compiled_once(
  finished_run, small_config, tmp_path, traced, mapper, feed
):
  """Over epochs, evaluations, checkpoints and a second start."""
  workdir, _ = finished_run
  # Of 1437 examples: two epochs, with batches that cross from one to the next.
  config = small_config(
    mapper=mapper,
    feed=feed,
    batch_size=240,
    total_steps=12,
    checkpoint_steps=3,
  )
  config.teacher.checkpoint = str(workdir / 'teacher')
  logger = logging.getLogger('jax')
  for first, last, stop_at in ((1, 8, 10), (9, 12, None)):
    watch = CompilationsByStep(stop_at)
    logger.addHandler(watch)
    try:
      with jax.log_compiles():
        train.train_and_evaluate(config, tmp_path, writers=[watch])
    except KeyboardInterrupt:
      assert stop_at
    finally:
      logger.removeHandler(watch)
    # The evaluation at the end is the same program.
    assert traced == ['train_step', 'eval_step']
    traced.clear()
    evaluations = [count for kind, _, count in watch.rows if kind == 'eval']
    assert evaluations[0] > 0
    assert watch.rows[0][1] > first - 1
    assert watch.rows[-1][1] >= last
    if stop_at:
      # Nothing at all compiles after the first evaluation and the first row.
      assert {kind for kind, *_ in watch.rows[:2]} == {'eval', 'train'}
      assert {count for _, _, count in watch.rows[2:]} == {watch.rows[1][2]}


@BY_EITHER_MAPPER
def test_the_state_is_donated_and_the_teacher_is_not(mapper):
  exp = steps_on_devices.make_experiment(mapper, sync_batch_norm=False)
  tx, _ = exp.optimizer(steps_on_devices.BATCH_SIZE)
  p_train_step = exp.map_train_step(exp.train_step(tx))
  state = exp.mapper.replicate(steps_on_devices.initial_state(exp))
  frozen = exp.mapper.replicate(exp.frozen)
  key = exp.mapper.replicate(jax.random.key(0))
  batch = exp.mapper.shard(steps_on_devices.make_batches()[0])
  after, _ = p_train_step(state, frozen, batch, key)
  assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state))
  for kept in (after, frozen, batch, key):
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(kept))


def test_a_fetched_state_outlives_its_donation():
  """On CPU it is a view, which a save in the background goes on reading."""
  mapper = parallel.Mapper()
  step = mapper.map(
    lambda state, rows: state + rows.sum(), rows_in=(False, True), donate=0
  )
  state = mapper.replicate(np.zeros(1000, np.float32))
  rows = mapper.shard(np.ones(1, np.float32))
  for value in range(5):
    fetched = jax.device_get(state)
    state = step(state, rows)
    np.testing.assert_array_equal(fetched, value)
    jax.block_until_ready(state)
    np.testing.assert_array_equal(fetched, value)


def test_ahead_keeps_the_order_and_asks_for_what_comes_next():
  asked = []
  results = parallel.ahead(map(lambda x: asked.append(x) or x, range(5)), num=2)
  assert asked == []
  assert next(results) == 0
  assert asked == [0, 1, 2]
  assert list(results) == [1, 2, 3, 4]
  assert list(parallel.ahead(range(1), num=2)) == [0]


def test_the_loop_fetches_only_where_something_is_due(
  finished_run, small_config, tmp_path, monkeypatch
):
  """No step but these, and the first, which is not timed, is waited for."""
  workdir, _ = finished_run
  config = small_config(total_steps=20)
  config.log_steps, config.eval_steps = 10, 20
  config.teacher.checkpoint = str(workdir / 'teacher')
  fetched = []
  device_get = jax.device_get

  def watched(tree):
    if isinstance(tree, list):  # Of (first step, last step, sums).
      fetched.append([(first, last) for first, last, _ in tree])
    return device_get(tree)

  monkeypatch.setattr(jax, 'device_get', watched)
  train.train_and_evaluate(config, tmp_path)
  assert fetched == [
    [(1, 1)],
    [(step, step) for step in range(2, 11)],
    [(step, step) for step in range(11, 21)],
  ]
