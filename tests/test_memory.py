"""CRD's memory: what it holds, on any number of devices, and after a stop."""

import jax
import numpy as np
import pytest

from ijckd_jax.bundles import bundles
from ijckd_jax.distillation import methods
from ijckd_jax.distillation.methods import crd
from ijckd_jax.models import outputs
from ijckd_jax.runtime import config_utils
from ijckd_jax.training import experiment
from ijckd_jax.training import loop
from ijckd_jax.training import train
from tests import steps_on_devices
from tests import test_train

NUM = 40


def make(num_negatives, known=None):
  """Returns a method, and a batch of rows whose memory knows some labels."""
  method = methods.get('crd')(num_negatives=num_negatives)
  memory = method.memory(jax.random.key(0), NUM)
  if known is not None:
    memory['label'] = np.array(known, np.int32)
  index = np.array([3, 11, 0, 25, 39], np.int32)
  return method, {
    'memory': memory,
    'key': jax.random.key(1),
    'index': index,
    'label': np.array([1, 0, 1, 2, -1], np.int32),
    'epoch': np.full(5, 2, np.int32),
  }


KNOWN = [i % 3 for i in range(30)] + [-1] * 10  # The last ten are not seen yet.


@pytest.mark.parametrize('num_negatives', [12, 30, 1000])
def test_negatives_are_of_other_classes(num_negatives):
  """12 without replacement; of 30 there are not enough, nor of 1,000."""
  method, batch = make(num_negatives, KNOWN)
  chosen = np.asarray(method._negatives(batch))
  assert chosen.shape == (5, num_negatives)
  for row, label, index in zip(
    chosen, batch['label'], batch['index'], strict=True
  ):
    allowed = {
      i
      for i, known in enumerate(KNOWN)
      if i != index and (label < 0 or known != label)
    }
    assert set(row) <= allowed
    if num_negatives == 12:
      assert len(set(row)) == 12
    if num_negatives == 1000:
      assert set(row) == allowed


def test_negatives_are_drawn_evenly():
  for num_negatives in (4, 4 * NUM):
    method, batch = make(num_negatives, KNOWN)
    counts, draw = np.zeros(NUM), jax.jit(method._negatives)
    for epoch in range(300):
      rows = {**batch, 'epoch': np.full(5, epoch, np.int32)}
      np.add.at(counts, np.asarray(draw(rows))[0], 1)
    allowed = [i for i in range(NUM) if i != 3 and KNOWN[i] != 1]
    assert not counts[[i for i in range(NUM) if i not in allowed]].any()
    mean = 300 * num_negatives / len(allowed)
    # Five standard deviations of a binomial count.
    assert np.all(np.abs(counts[allowed] - mean) < 5 * np.sqrt(mean))


def test_negatives_belong_to_the_example_not_to_its_row():
  method, batch = make(6, KNOWN)
  chosen = np.asarray(method._negatives(batch))
  order = [4, 2, 0, 1, 3]
  rows = {name: batch[name][order] for name in ('index', 'label', 'epoch')}
  np.testing.assert_array_equal(
    method._negatives({**batch, **rows}), chosen[order]
  )
  later = {**batch, 'epoch': batch['epoch'] + 1}
  assert np.any(np.asarray(method._negatives(later)) != chosen)
  other = {**batch, 'key': jax.random.key(2)}
  assert np.any(np.asarray(method._negatives(other)) != chosen)


def test_rows_are_noted_and_the_first_of_two_counts():
  method, batch = make(6)
  rng = np.random.default_rng(0)
  vectors = {n: rng.standard_normal((3, 128)) for n in ('student', 'teacher')}
  notes = {
    'index': np.array([5, 7, 5]),
    'label': np.array([1, -1, 2]),
    'vectors': vectors,
    'normaliser': {'student': np.full(3, 4.0), 'teacher': np.full(3, 6.0)},
  }
  before = batch['memory']
  after = method.remember(before, notes)
  for name, rows in vectors.items():
    expected = np.array(before['vectors'][name])
    for place, row in ((5, 0), (7, 1)):
      mixed = 0.5 * expected[place] + 0.5 * rows[row]
      expected[place] = mixed / np.linalg.norm(mixed)
    np.testing.assert_allclose(after['vectors'][name], expected, rtol=1e-5)
  assert after['label'][5] == 1 and after['label'][7] == -1
  assert set(np.flatnonzero(np.asarray(after['label']) != -1)) == {5}
  assert after['normaliser'] == {'student': 4.0, 'teacher': 6.0}
  # The normaliser is that of the first batch for good.
  notes['normaliser'] = {name: np.full(3, 9.0) for name in vectors}
  again = method.remember(after, notes)
  assert again['normaliser'] == {'student': 4.0, 'teacher': 6.0}


def queue_of(size):
  """Returns a method with a queue, and its memory at the start."""
  method = methods.get('crd')(num_negatives=3, queue=size, width=2)
  return method, method.memory(jax.random.key(0), NUM)


def notes_of(index, label):
  vectors = np.arange(2.0 * len(index)).reshape(-1, 2)
  return {
    'index': np.array(index),
    'label': np.array(label),
    'vectors': {'student': vectors, 'teacher': -vectors},
    'normaliser': dict.fromkeys(('student', 'teacher'), np.full(3, 4.0)),
  }


def test_a_queue_holds_the_latest_images_and_does_not_grow():
  method, memory = queue_of(5)
  assert memory['vectors']['student'].shape == (5, 2)
  first, second = (
    notes_of([7, 8, 9], [0, 1, -1]),
    notes_of([7, 3, 4], [2, 3, 4]),
  )
  after = method.remember(memory, first)
  np.testing.assert_array_equal(after['index'], [7, 8, 9, -1, -1])
  after = method.remember(after, second)
  # The oldest row is the first to go.
  np.testing.assert_array_equal(after['index'], [4, 8, 9, 7, 3])
  np.testing.assert_array_equal(after['label'], [4, 1, -1, 2, 3])
  for name, sign in (('student', 1), ('teacher', -1)):
    np.testing.assert_array_equal(
      after['vectors'][name],
      sign * np.array([[4, 5], [2, 3], [4, 5], [0, 1], [2, 3]]),
    )
  assert after['oldest'] == 1
  # Of more rows than it holds, the last ones stay.
  small, memory = queue_of(2)
  after = small.remember(memory, second)
  np.testing.assert_array_equal(after['index'], [3, 4])


def test_the_contrast_with_a_queue():
  """By hand: a positive of the same batch, negatives out of the queue."""
  method, memory = queue_of(4)
  memory |= {'index': np.array([0, 1, 2, 3]), 'label': np.array([0, 1, 1, -1])}
  rng = np.random.default_rng(0)
  vectors = {name: rng.standard_normal((2, 2)) for name in crd.NETWORKS}
  vectors = {
    n: v / np.linalg.norm(v, axis=1)[:, None] for n, v in vectors.items()
  }
  batch = {
    'memory': memory,
    'key': jax.random.key(1),
    'index': np.array([0, 9]),
    'label': np.array([1, -1]),
    'epoch': np.zeros(2, np.int32),
  }
  chosen = np.asarray(method._negatives(batch))
  # No picture of its own or of its class: 3, which has no label, is left.
  assert set(chosen[0]) == {3}

  def side(name, other, own, normaliser=None):
    """Returns one network's contrast, and its normaliser."""
    queue = np.asarray(memory['vectors'][other])
    scores = np.exp(
      [
        [own[b] @ x / 0.07 for x in (vectors[other][b], *queue[chosen[b]])]
        for b in range(2)
      ]
    )
    normaliser = normaliser or scores.mean() * 4
    total = 0.0
    for row in scores / normaliser:
      total -= np.log(row[0] / (row[0] + 3 / 4 + 1e-7)) / 2
      total -= np.log(3 / 4 / (row[1:] + 3 / 4 + 1e-7)).sum() / 2
    return total, normaliser

  def loss(vectors):
    student = outputs.Outputs((), None, None, np.zeros((2, 3)))
    student = student.replace(auxiliary=vectors)
    return method.loss(student, None, batch)[1]['contrast']

  value, gradient = jax.value_and_grad(loss)(jax.tree.map(np.float32, vectors))
  expected = 0.0
  for name, other in (crd.NETWORKS, crd.NETWORKS[::-1]):
    total, normaliser = side(name, other, vectors[name])
    expected += total
    # Of this side alone: nothing flows to a vector as the other's positive.
    for place in np.ndindex(2, 2):
      step = np.zeros((2, 2))
      step[place] = 1e-5
      above, below = (
        side(name, other, vectors[name] + move, normaliser)[0]
        for move in (step, -step)
      )
      np.testing.assert_allclose(
        gradient[name][place], (above - below) / 2e-5, rtol=1e-3, atol=1e-4
      )
  np.testing.assert_allclose(value, expected, rtol=1e-5)


@pytest.mark.parametrize('num_negatives', [2, 9])
def test_a_row_without_a_negative_is_told_from_any(num_negatives):
  """In a queue of its own class alone, which a small one may be."""
  method = methods.get('crd')(num_negatives=num_negatives, queue=4)
  memory = method.memory(jax.random.key(0), NUM)
  memory |= {'index': np.arange(4), 'label': np.array([1, 1, 1, 1])}
  batch = {
    'memory': memory,
    'key': jax.random.key(1),
    'index': np.array([0, 0]),
    'label': np.array([1, -1]),
    'epoch': np.zeros(2, np.int32),
  }
  drawn = [set(), set()]
  for epoch in range(20):
    batch['epoch'] = np.full(2, epoch, np.int32)
    for found, row in zip(drawn, method._negatives(batch), strict=True):
      found.update(np.asarray(row).tolist())
  # A row without a label has all but itself.
  assert drawn == [{0, 1, 2, 3}, {1, 2, 3}]


@pytest.mark.parametrize('momentum', [-0.1, 1.0, float('nan')])
def test_a_momentum_that_keeps_all_is_refused(momentum):
  with pytest.raises(config_utils.UserError, match='at least 0 and less than'):
    methods.get('crd')(momentum=momentum)


def test_a_negative_queue_is_refused():
  with pytest.raises(config_utils.UserError, match='queue=-1'):
    methods.get('crd')(queue=-1)


@pytest.mark.slow
def test_memory_is_the_same_on_any_number_of_devices():
  exp = steps_on_devices.make_experiment(
    'pmap', True, 'crd', **{'method.num_negatives': 20}
  )
  batch = steps_on_devices.make_batches()[:1]
  states = {
    count: steps_on_devices.vmapped_steps(exp, batch, count)[0]
    for count in (1, 4)
  }
  start = steps_on_devices.initial_state(exp).memory
  for name, rows in states[1].memory['vectors'].items():
    moved = np.any(np.asarray(rows) != start['vectors'][name], axis=1)
    assert set(np.flatnonzero(moved)) == set(batch[0]['index'])
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4),
    states[4].memory,
    states[1].memory,
  )


# Three whole runs; test_train.py stops and continues one without a memory.
@pytest.mark.slow
def test_stopped_run_continues_with_the_same_memory(
  finished_run, small_config, tmp_path
):
  teacher = bundles.load(finished_run[0] / 'teacher').teacher()
  config = small_config('crd', **{'method.num_negatives': 50})
  config.accumulation, config.total_steps, config.eval_steps = 2, 8, 8

  def run(name, *writers):
    return train.train_and_evaluate(
      config, tmp_path / name, teacher=teacher, writers=writers
    ).state

  with pytest.raises(loop.Interrupted):
    run('stopped', test_train.StopAt(5))
  stopped, straight = run('stopped'), run('straight')
  assert np.any(straight.memory['label'] >= 0)
  test_train.assert_same_bits(stopped, straight)


def test_a_compiled_step_holds_a_memory(small_config):
  exp = experiment.build(small_config('crd'))
  memory = jax.eval_shape(lambda: exp.memory(jax.random.key(0), 1000))
  assert memory['vectors']['teacher'].shape == (1000, 128)
