"""The training set on the devices, and many steps in a call."""

import json

import jax
import numpy as np
import pytest

from ijckd_jax.bundles import bundles
from ijckd_jax.data import datasets
from ijckd_jax.data import input_pipeline
from ijckd_jax.distillation import methods
from ijckd_jax.distillation import train_state
from ijckd_jax.runtime import backend
from ijckd_jax.runtime import config_utils
from ijckd_jax.training import experiment
from ijckd_jax.training import feeding
from ijckd_jax.training import loop
from ijckd_jax.training import train
from tests import marks
from tests import test_train


@pytest.fixture
def config_of(finished_run, small_config):
  """Returns a function that gives the config of a student of a given teacher.

  Of 1437 examples: step 30 has some of the first epoch and of the second.
  """

  def make(method='ijckd', **fields):
    teacher = {'teacher.checkpoint': str(finished_run[0] / 'teacher')}
    return small_config(method, **{'total_steps': 34, **teacher, **fields})

  return make


def trained(config, workdir, **options):
  """Returns the state and the rows, without times, of a run."""
  result = train.train_and_evaluate(config, workdir, **options)
  return result.state, test_train.rows_without_times(workdir)


def advanced(exp, feed, lengths, cast=jax.tree.map):
  """Returns the state and the losses after calls of so many steps each."""
  arrays, key = exp.dataset.load('train'), jax.random.key(0)
  tx, _ = exp.optimizer(len(arrays))
  # Copies: the state is donated.
  state = train_state.create(
    cast(np.array, exp.init(jax.random.key(1))),
    tx,
    with_ema=exp.config.ema_decay > 0,
    memory=exp.memory(key, len(arrays)),
  )
  state, frozen, key = map(
    exp.mapper.replicate, (state, cast(np.array, exp.frozen), key)
  )
  feed = feed(exp, tx, arrays, key, start=0)
  feed.set_pace(0)
  step, losses = 0, []
  for length in lengths:
    until = step + length
    while step < until:
      state, step, sums = feed.advance(state, frozen, step, until)
      total, count = map(np.ravel, jax.device_get(sums['loss']))
      # After the last step of a call there are zeros.
      assert not total[count == 0].any() and not count[length:].any()
      losses += list(total[count > 0] / count[count > 0])
  assert len(losses) == step
  return jax.device_get(state), np.array(losses)


def host_feed(*arguments, **fields):
  return feeding.HostFeed(*arguments, recorder=None, damaged=[], **fields)


CASES = {
  **{name: {'method': name} for name in methods.METHODS},
  'parts': {
    'accumulation': 2,
    'ema_decay': 0.9,
    'augment.mixup_alpha': 0.4,
    'dataset.crop_padding': 1,
  },
}


@pytest.mark.parametrize('case', marks.slow_but(['ijckd'], CASES))
def test_either_feed_makes_the_same_steps(
  config_of, finished_run, monkeypatch, case
):
  """In float64, to what its rounding is; an epoch ends on the way."""
  teacher = bundles.load(finished_run[0] / 'teacher').teacher()

  def wide(_, tree):
    return jax.tree.map(
      lambda x: np.array(x, 'f8' if x.dtype == 'f4' else x.dtype), tree
    )

  monkeypatch.setitem(experiment.DTYPES, 'float32', 'float64')
  with jax.enable_x64(True):
    config = config_of(**CASES[case], batch_size=200, total_steps=9)
    config.teacher.checkpoint = ''
    exp = experiment.build(config, teacher=teacher)
    state, losses = advanced(exp, feeding.DeviceFeed, [1, 5, 3], wide)
    wanted, wanted_losses = advanced(exp, host_feed, [9], wide)
  np.testing.assert_allclose(losses, wanted_losses, rtol=1e-9)
  wanted = test_train.leaves(wanted)
  assert {x.dtype.name for x in wanted.values()} >= {'float64'}
  for name, value in test_train.leaves(state).items():
    scale = np.abs(wanted[name]).max() if value.size else 0
    # A bias before a batch norm has no gradient, and is rounding alone.
    atol = 1e-8 * scale + 1e-14
    np.testing.assert_allclose(
      value, wanted[name], rtol=0, atol=atol, err_msg=name
    )


def test_calls_of_any_length_end_with_the_same_bits(config_of):
  exp = experiment.build(config_of(feed='device', total_steps=12))
  state, losses = advanced(exp, feeding.DeviceFeed, [12])
  for lengths in ([1] * 12, [5, 1, 6]):
    other, other_losses = advanced(exp, feeding.DeviceFeed, lengths)
    test_train.assert_same_bits(other, state)
    np.testing.assert_array_equal(other_losses, losses)
  assert len(set(losses)) == 12


@pytest.mark.parametrize(
  'refit', [False, pytest.param(True, marks=pytest.mark.slow)]
)
def test_runs_by_either_feed_agree(config_of, tmp_path, refit):
  """All that they write, but for what a few steps in float32 round away."""
  fields, found = {}, {}
  if refit:
    fields = {'teacher.refit': 'joint', 'teacher.refit_epochs': (0.2,)}
  for feed in ('host', 'device'):
    config = config_of(feed=feed, total_steps=12, **fields)
    found[feed] = trained(config, tmp_path / feed)[1]
  heads = [
    sorted(path.name for path in (tmp_path / feed).glob('heads/*'))
    for feed in found
  ]
  assert heads == [['step_00000006.safetensors'] if refit else []] * 2
  assert len(found['device']) == 6
  for row, other in zip(found['device'], found['host'], strict=True):
    assert row.keys() == other.keys()
    if refit and row['step'] > 6:
      # Behind the new head the loss is thousands of times as large, and
      # rounding grows fast.
      if row['step'] == 10:
        loss = other['train/loss']
        assert loss > 1000
        np.testing.assert_allclose(row['train/loss'], loss, rtol=0.2)
      continue
    for name in row:
      # An image on the border may fall to the other side, of 240 or of 360.
      atol = 0.005 if 'top' in name or 'accuracy' in name else 1e-5
      np.testing.assert_allclose(
        row[name], other[name], rtol=1e-2, atol=atol, err_msg=name
      )


def test_each_step_sees_the_examples_of_the_stream(config_of, monkeypatch):
  """In its order, and by the rows of each process."""
  exp = experiment.build(config_of(feed='device'))
  arrays = exp.dataset.load('train')
  feed = feeding.DeviceFeed(exp, exp.optimizer(10)[0], arrays, None, start=0)
  of_stream = [
    input_pipeline.examples(
      step, batch_size=48, seed=0, num_examples=len(arrays)
    )
    for step in range(27, 33)
  ]
  assert {0, 1} == {*np.concatenate([epochs for _, epochs in of_stream])}
  monkeypatch.setattr(jax, 'process_count', lambda: 2)
  parts = []
  for process in range(2):
    monkeypatch.setattr(jax, 'process_index', lambda: process)  # noqa: B023
    parts.append(feed._plan(27, 6))
  for number, name in enumerate(('index', 'epoch')):
    rows = np.concatenate([part[name] for part in parts])
    assert rows.shape == (48, 34)
    np.testing.assert_array_equal(
      rows[:, :6], np.stack([batch[number] for batch in of_stream], axis=1)
    )


def test_a_run_that_was_stopped_ends_with_the_same_bits(
  config_of, tmp_path, monkeypatch
):
  """Stopped after a call, at a step where there was nothing else to do."""
  monkeypatch.setattr(feeding, 'MAX_STEPS_A_CALL', 2)
  config = config_of(feed='device', total_steps=12, eval_steps=12)
  wanted = trained(config, tmp_path / 'alone')
  with pytest.raises(loop.Interrupted, match='stopped after step 7 of 12'):
    trained(config, tmp_path / 'run', writers=[test_train.StopAt(5)])
  found = trained(config, tmp_path / 'run')
  test_train.assert_same_bits(found[0], wanted[0])
  assert found[1] == wanted[1]


def test_calls_are_as_long_as_a_stop_may_wait(config_of):
  exp = experiment.build(config_of(feed='device', total_steps=5000))
  arrays = exp.dataset.load('train')
  feed = feeding.DeviceFeed(exp, exp.optimizer(10)[0], arrays, None, start=0)
  lengths = []
  for seconds in (0.0, 1e-4, 0.1, 0.7, 30.0):
    feed.set_pace(seconds)
    lengths.append(feed._steps_a_call)
  assert lengths == [256, 256, 20, 2, 1]


def test_divergence_within_a_call_names_its_step(config_of, tmp_path):
  """The same step as where each is fetched by itself."""
  said = []
  for feed in ('host', 'device'):
    config = config_of('ce', feed=feed, log_steps=34, eval_steps=34)
    config.optimizer.learning_rate = 1e7
    with pytest.raises(loop.Diverged) as error:
      train.train_and_evaluate(config, tmp_path / feed)
    kept = json.loads((tmp_path / feed / 'diverged.json').read_text())
    assert kept['step'] == error.value.step
    said.append((error.value.step, error.value.what))
  assert said[0] == said[1]
  assert 2 < said[0][0] < 34


class Photos:
  """Images that are decoded as they are asked for."""

  def __len__(self):
    return 100


class OwnViews(datasets.Arrays):
  """Images in memory, mirrored on the host."""

  def train_views(self, indices, epochs, seed):
    views = super().train_views(indices, epochs, seed)
    return {**views, 'image': views['image'][:, :, ::-1]}


def obstacles(config_of, monkeypatch):
  """Yields a run and a training set that cannot lie on a device, and why."""
  arrays = datasets.Arrays(np.zeros((100, 8, 8, 1), np.uint8), np.zeros(100))
  yield config_of(), Photos(), 'the images are decoded as the run goes on'
  yield config_of(), OwnViews(arrays.images, arrays.labels), 'views on the host'
  stored = config_of(**{'teacher.store.views': 1})
  yield stored, arrays, 'outputs are stored'
  monkeypatch.setattr(backend, 'memory_limit', lambda device: 4 * 6399)
  yield config_of(), arrays, 'the training images take 5.96e-06 GiB of each'


def test_what_cannot_lie_on_a_device_is_told_or_left(config_of, monkeypatch):
  for config, arrays, why in obstacles(config_of, monkeypatch):
    found = {}
    for feed in ('auto', 'host', 'device'):
      config.feed = feed
      exp = experiment.build(config)
      with monkeypatch.context() as patch:
        patch.setattr(jax, 'default_backend', lambda: 'gpu')
        if feed != 'device':
          feeding.check(exp, arrays)
          found[feed] = feeding.is_on_device(exp, arrays)
          continue
        with pytest.raises(config_utils.UserError, match=why):
          feeding.check(exp, arrays)
    assert found == {'auto': False, 'host': False}


def test_by_default_it_lies_on_accelerators_alone(config_of, monkeypatch):
  exp = experiment.build(config_of())
  arrays = exp.dataset.load('train')
  assert not feeding.is_on_device(exp, arrays)
  monkeypatch.setattr(jax, 'default_backend', lambda: 'gpu')
  assert feeding.is_on_device(exp, arrays)


def test_mistakes_are_told_before_anything_is_written(config_of, tmp_path):
  for fields, why in (
    ({'feed': 'devise'}, "unknown feed 'devise'; did you mean 'device'"),
    ({'feed': 'device', 'teacher.store.views': 1}, 'set --config.feed=host'),
  ):
    with pytest.raises(config_utils.UserError, match=why):
      train.train_and_evaluate(config_of(**fields), tmp_path / 'run')
    assert not (tmp_path / 'run').exists()
