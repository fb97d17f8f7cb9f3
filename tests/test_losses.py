"""Losses against numbers by hand, brute force and scipy."""

import math

import jax
import jax.numpy as jnp
import jax.test_util
import numpy as np
import pytest
import scipy.special

from ijckd_jax.data import mixing
from ijckd_jax.models import losses
from ijckd_jax.models import outputs

# Softmax gives (1/4, 3/4) and (1/2, 1/2).
LOGITS = np.array([[0.0, math.log(3.0)], [0.0, 0.0]], np.float32)


def normal(seed, *shape):
  return np.random.RandomState(seed).randn(*shape).astype(np.float32)


def pool_by_hand(x, size):
  """Averages input rows floor(i H/h) to ceil((i+1) H/h) - 1, bin by bin."""
  batch, old_h, old_w, channels = x.shape
  h, w = size
  result = np.zeros((batch, h, w, channels))
  for i in range(h):
    top, bottom = math.floor(i * old_h / h), math.ceil((i + 1) * old_h / h)
    for j in range(w):
      left, right = math.floor(j * old_w / w), math.ceil((j + 1) * old_w / w)
      result[:, i, j] = x[:, top:bottom, left:right].mean(axis=(1, 2))
  return result


def test_cross_entropy_by_hand():
  loss = losses.cross_entropy(LOGITS, jnp.array([1, 0]))
  expected = (-math.log(3 / 4) - math.log(1 / 2)) / 2
  np.testing.assert_allclose(loss, expected, rtol=1e-6)


@pytest.mark.parametrize(
  'labels, expected',
  [([1, -1], -math.log(3 / 4) / 2), ([-1, 0], math.log(2) / 2), ([-1, -1], 0)],
)
def test_cross_entropy_is_a_sum_over_labelled_rows_by_the_batch_size(
  labels, expected
):
  loss = losses.cross_entropy(LOGITS, jnp.array(labels))
  np.testing.assert_allclose(loss, expected, rtol=1e-6)


def test_cross_entropy_gradient_by_hand_and_none_of_unlabelled_rows():
  gradient = jax.grad(losses.cross_entropy)(LOGITS, jnp.array([1, -1]))
  expected = [[1 / 4 / 2, (3 / 4 - 1) / 2], [0, 0]]
  np.testing.assert_allclose(gradient, expected, rtol=1e-6)


@pytest.mark.parametrize(
  'own, other, expected',
  [
    ([1, 0], [0, 0], 0.75 * math.log(4 / 3) + 0.25 * math.log(4) + math.log(2)),
    ([1, -1], [1, 1], math.log(4 / 3) + 0.5 * math.log(2)),
    ([-1, -1], [0, -1], 0.25 * math.log(4)),
  ],
)
def test_cross_entropy_of_mixed_rows_is_that_of_either_label_by_its_weight(
  own, other, expected
):
  labels = mixing.MixedLabels(*map(jnp.array, (own, other, [0.75, 0.5])))
  loss = losses.cross_entropy(LOGITS, labels)
  np.testing.assert_allclose(loss, expected / 2, rtol=1e-6)
  gradient = jax.grad(losses.cross_entropy)(LOGITS, labels)
  weights = np.array([0.75, 0.5])
  by_row = np.zeros((2, 2))
  for row, (a, b, weight) in enumerate(zip(own, other, weights, strict=True)):
    for label, share in ((a, weight), (b, 1 - weight)):
      if label >= 0:
        softmax = scipy.special.softmax(LOGITS[row].astype(float))
        by_row[row] += share * (softmax - np.eye(2)[label]) / 2
  np.testing.assert_allclose(gradient, by_row, atol=1e-7)


def test_a_mixed_row_counts_as_its_larger_part():
  labels = mixing.MixedLabels(
    jnp.array([1, 2, 3, -1]),
    jnp.array([4, 5, 6, 7]),
    jnp.array([0.75, 0.25, 0.5, 0.9]),
  )
  np.testing.assert_array_equal(losses.single_labels(labels), [1, 5, 3, -1])
  np.testing.assert_array_equal(losses.single_labels(labels.own), labels.own)


def test_cross_entropy_of_shards_averages_to_that_of_the_batch():
  logits = normal(0, 8, 5)
  labels = np.array([0, -1, -1, -1, 4, 3, 2, -1])  # Shard 1 has no label.
  shards = [
    losses.cross_entropy(logits[rows], labels[rows])
    for rows in np.split(np.arange(8), 4)
  ]
  np.testing.assert_allclose(
    np.mean(shards), losses.cross_entropy(logits, labels), rtol=1e-6
  )


def test_mean_squared_error_by_hand():
  x, y = jnp.array([[1.0, 2.0], [3.0, 4.0]]), jnp.array([[1.0, 0.0], [0, 0]])
  assert losses.mean_squared_error(x, y) == (0 + 4 + 9 + 16) / 4


def test_mean_squared_error_averages_over_all_elements():
  x, y = normal(0, 2, 3, 3, 4), normal(1, 2, 3, 3, 4)
  np.testing.assert_allclose(
    losses.mean_squared_error(x, y), np.square(x - y).sum() / 72, rtol=1e-6
  )


@pytest.mark.parametrize('other', [(1, 2), (2, 1), (2,), (2, 2, 1)])
def test_mean_squared_error_does_not_broadcast(other):
  with pytest.raises(ValueError, match='shapes differ'):
    losses.mean_squared_error(jnp.ones((2, 2)), jnp.ones(other))


def test_distillation_by_hand():
  teacher, student = LOGITS[:1], LOGITS[1:]
  kl = 1 / 4 * math.log(1 / 4 / (1 / 2)) + 3 / 4 * math.log(3 / 4 / (1 / 2))
  one = losses.distillation(student, teacher, 1.0)
  np.testing.assert_allclose(one, kl, rtol=1e-5)
  # Logits twice as large at twice the temperature give the same predictions.
  two = losses.distillation(2 * student, 2 * teacher, 2.0)
  np.testing.assert_allclose(two, 4 * kl, rtol=1e-5)


@pytest.mark.parametrize('temperature', [0.5, 1.0, 4.0])
def test_distillation_against_scipy(temperature):
  student, teacher = 5 * normal(0, 6, 10), 5 * normal(1, 6, 10)
  p = scipy.special.softmax(teacher.astype(np.float64) / temperature, axis=1)
  q = scipy.special.softmax(student.astype(np.float64) / temperature, axis=1)
  expected = temperature**2 * scipy.special.rel_entr(p, q).sum() / 6
  np.testing.assert_allclose(
    losses.distillation(student, teacher, temperature), expected, rtol=1e-5
  )


def test_distillation_of_equals_is_zero():
  logits = normal(0, 4, 7)
  assert abs(losses.distillation(logits, logits, 4.0)) < 1e-6


def test_adaptive_average_pool_by_hand():
  x = jnp.arange(5.0).reshape(1, 5, 1, 1)
  pooled = losses.adaptive_average_pool(x, (3, 1))  # Rows 0-1, 1-3 and 3-4.
  np.testing.assert_allclose(pooled.ravel(), [0.5, 2.0, 3.5], rtol=1e-6)


@pytest.mark.parametrize(
  'old, new',
  [
    ((8, 8), (4, 4)),
    ((8, 4), (4, 4)),
    ((7, 7), (4, 4)),
    ((5, 7), (3, 2)),
    ((14, 14), (4, 7)),
    ((6, 6), (1, 1)),
    ((32, 32), (7, 5)),
    ((4, 4), (7, 7)),
    ((2, 3), (5, 4)),
    ((1, 1), (3, 3)),
    ((3, 8), (5, 3)),
  ],
)
def test_adaptive_average_pool_by_brute_force(old, new):
  x = normal(0, 2, *old, 3)
  np.testing.assert_allclose(
    losses.adaptive_average_pool(x, new),
    pool_by_hand(x, new),
    rtol=1e-5,
    atol=1e-6,
  )


def test_adaptive_average_pool_returns_a_map_of_that_size_itself():
  x = jnp.ones((2, 4, 3, 2))
  assert losses.adaptive_average_pool(x, (4, 3)) is x


def test_adaptive_average_pool_of_bfloat16_is_computed_in_float32():
  x = jnp.asarray(np.abs(normal(0, 1, 6, 6, 500)), jnp.bfloat16)
  pooled = losses.adaptive_average_pool(x, (2, 2))
  exact = losses.adaptive_average_pool(x.astype(jnp.float32), (2, 2))
  assert pooled.dtype == jnp.bfloat16
  np.testing.assert_array_equal(pooled, exact.astype(jnp.bfloat16))


def teacher_outputs(final, pooled):
  return outputs.Outputs((), final, pooled, jnp.zeros((1, 2)))


def test_feature_distance_of_maps_averages_the_teachers_down():
  final = jnp.array([0.0, 2.0, 4.0, 6.0]).reshape(1, 2, 2, 1)
  teacher = teacher_outputs(final, jnp.zeros((1, 1)))
  equal = outputs.Connected(jnp.ones((1, 2, 2, 1)), None, None)
  small = outputs.Connected(jnp.ones((1, 1, 1, 1)), None, None)
  assert losses.feature_distance(equal, teacher, 'map') == (1 + 1 + 9 + 25) / 4
  assert losses.feature_distance(small, teacher, 'map') == (3 - 1) ** 2


def test_feature_distance_of_pooled_features():
  teacher = teacher_outputs(jnp.zeros((2, 3, 3, 2)), LOGITS * 0 + 3)
  connected = outputs.Connected(None, jnp.array([[1.0, 3.0], [3, 4]]), None)
  distance = losses.feature_distance(connected, teacher, 'pooled')
  assert distance == (4 + 0 + 0 + 1) / 4


def test_combine_weighs_the_total_and_not_the_terms():
  total, terms = losses.combine(
    a=(2.0, lambda: jnp.float32(3.0)), b=(0.5, lambda: jnp.float32(4.0))
  )
  assert total == 2 * 3 + 0.5 * 4
  assert terms == {'a': 3.0, 'b': 4.0}


def test_combine_does_not_compute_a_term_of_weight_zero():
  def never():
    raise AssertionError('a term of weight zero was computed')

  total, terms = losses.combine(a=(1.0, lambda: 2.0), b=(0.0, never))
  assert total == 2.0
  assert terms == {'a': 2.0}


@pytest.mark.parametrize('size', [1e4, 1e30])
@pytest.mark.parametrize('temperature', [1.0, 4.0])
def test_logit_losses_are_finite_at_extremes(size, temperature):
  student = size * jnp.array([[1.0, -1.0, 0.0], [-1.0, 1.0, 1.0]])
  teacher = -student
  for loss in (
    lambda x: losses.cross_entropy(x, jnp.array([1, 0])),
    lambda x: losses.distillation(x, teacher, temperature),
    lambda x: losses.distillation(teacher, x, temperature),
  ):
    value, gradient = jax.value_and_grad(loss)(student)
    assert np.isfinite(value) and value > 0
    assert np.isfinite(gradient).all()


def test_gradients_against_finite_differences():
  logits, others = normal(0, 3, 4), normal(1, 3, 4)
  labels = jnp.array([0, -1, 3])
  maps = normal(2, 2, 5, 4, 2)

  def check(loss, *args):
    jax.test_util.check_grads(loss, args, order=1, modes=['rev'], eps=1e-2)

  check(lambda x: losses.cross_entropy(x, labels), logits)
  check(losses.mean_squared_error, logits, others)
  check(lambda x, y: losses.distillation(x, y, 2.0), logits, others)
  check(
    lambda x: jnp.sum(losses.adaptive_average_pool(x, (3, 3)) ** 2), maps / 3
  )


def test_bfloat16_inputs_are_computed_in_float32():
  low, other = (
    jnp.asarray(normal(seed, 64, 100), jnp.bfloat16) for seed in (0, 1)
  )
  exact, exact_other = low.astype(jnp.float32), other.astype(jnp.float32)
  labels = jnp.arange(64)
  for name, result, expected in (
    (
      'cross_entropy',
      losses.cross_entropy(low, labels),
      losses.cross_entropy(exact, labels),
    ),
    (
      'mean_squared_error',
      losses.mean_squared_error(low, other),
      losses.mean_squared_error(exact, exact_other),
    ),
    (
      'distillation',
      losses.distillation(low, other, 4.0),
      losses.distillation(exact, exact_other, 4.0),
    ),
  ):
    assert result.dtype == jnp.float32, name
    np.testing.assert_array_equal(result, expected, err_msg=name)
