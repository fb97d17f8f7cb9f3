"""Metrics against scikit-learn, scipy and brute force."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
import sklearn.metrics

from ijckd_jax.evaluation import metrics

NUM_CLASSES = 10


def predictions(seed=0, num_rows=300, num_classes=NUM_CLASSES):
  """Returns logits that are right about half the time, and labels."""
  rng = np.random.RandomState(seed)
  labels = rng.randint(0, num_classes, num_rows)
  logits = 2 * rng.randn(num_rows, num_classes)
  logits[np.arange(num_rows), labels] += 2
  return logits.astype(np.float32), labels.astype(np.int32)


def sums_of(logits, labels, mask=None):
  if mask is None:
    mask = np.ones(len(labels), bool)
  sums = metrics.prediction_sums(
    jnp.asarray(logits), jnp.asarray(labels), jnp.asarray(mask)
  )
  return jax.tree.map(np.asarray, sums)


def calibration_error(probabilities, labels, num_bins=15):
  """Returns sum_b |B_b|/N |accuracy - confidence|, bins (b/15, (b+1)/15]."""
  confidence = probabilities.max(axis=1)
  correct = probabilities.argmax(axis=1) == labels
  total = 0.0
  for b in range(num_bins):
    inside = (confidence > b / num_bins) & (confidence <= (b + 1) / num_bins)
    if inside.any():
      gap = correct[inside].mean() - confidence[inside].mean()
      total += inside.mean() * abs(gap)
  return total


def test_by_hand():
  log3 = np.log(3.0)
  # Confidence 3/4, 3/4 and 1/2: right, wrong, right (of equals, the first).
  logits = np.array([[0, log3], [log3, 0], [0, 0]], np.float32)
  sums = sums_of(logits, [1, 1, 0])
  assert sums['examples'] == 3
  assert sums['top1'] == 2
  np.testing.assert_allclose(
    sums['nll'], -np.log(3 / 4) - np.log(1 / 4) - np.log(1 / 2), rtol=1e-6
  )
  # 3/4 lies in the bin (11/15, 12/15], 1/2 in (7/15, 8/15].
  expected = np.zeros((3, 15))
  expected[:, 11] = 2, 1.5, 1
  expected[:, 7] = 1, 0.5, 1
  for name, values in zip(
    ('bin_examples', 'bin_confidence', 'bin_top1'), expected, strict=True
  ):
    np.testing.assert_allclose(sums[name], values, rtol=1e-6, err_msg=name)
  summary = metrics.summarize(sums)
  np.testing.assert_allclose(summary['ece'], (0.5 + 0.5) / 3, rtol=1e-6)


def test_against_scikit_learn():
  logits, labels = predictions()
  probabilities = scipy.special.softmax(logits.astype(np.float64), axis=1)
  classes = np.arange(NUM_CLASSES)
  sums = sums_of(logits, labels)
  summary = metrics.summarize(sums)
  assert set(summary) == {'top1', 'top5', 'nll', 'ece'}
  expected = {
    'top1': sklearn.metrics.accuracy_score(labels, logits.argmax(axis=1)),
    'top5': sklearn.metrics.top_k_accuracy_score(
      labels, logits, k=5, labels=classes
    ),
    'nll': sklearn.metrics.log_loss(labels, probabilities, labels=classes),
    'ece': calibration_error(probabilities, labels),
  }
  for name, value in expected.items():
    np.testing.assert_allclose(summary[name], value, rtol=1e-5, err_msg=name)
  assert 0.3 < summary['top1'] < summary['top5'] < 1


def test_what_is_masked_or_unlabelled_is_not_counted():
  logits, labels = predictions()
  rng = np.random.RandomState(1)
  mask = rng.rand(len(labels)) < 0.7
  labels[rng.rand(len(labels)) < 0.3] = -1
  kept = mask & (labels >= 0)
  # Whatever a padded row holds, even what is not a number.
  logits[~mask] = np.nan
  counted = sums_of(logits, labels, mask)
  expected = sums_of(logits[kept], labels[kept])
  assert 0 < kept.sum() < len(labels)
  assert counted['examples'] == kept.sum()
  for name in expected:
    np.testing.assert_allclose(
      counted[name], expected[name], rtol=1e-5, err_msg=name
    )


@pytest.mark.parametrize('num_classes', [2, 3, 5, 6])
def test_top5_is_told_of_more_than_five_classes(num_classes):
  logits, labels = predictions(num_classes=num_classes)
  sums = sums_of(logits, labels)
  summary = metrics.summarize(sums)
  assert ('top5' in sums) == ('top5' in summary) == (num_classes > 5)
  if num_classes > 5:
    assert sums['top1'] < sums['top5'] < sums['examples']


def test_sums_do_not_grow_with_the_square_of_the_classes():
  num_classes = 21_000
  logits = jax.ShapeDtypeStruct((8, num_classes), np.float32)
  labels = jax.ShapeDtypeStruct((8,), np.int32)
  mask = jax.ShapeDtypeStruct((8,), bool)
  sums = jax.eval_shape(metrics.prediction_sums, logits, labels, mask)
  assert max(value.size for value in sums.values()) == metrics.NUM_BINS


def test_certain_predictions_fall_into_the_last_bin():
  logits = np.array([[1e4, 0.0], [0.0, 1e4]], np.float32)
  sums = sums_of(logits, [0, 0])
  assert sums['bin_examples'][14] == 2
  assert metrics.summarize(sums)['ece'] == 0.5
  assert np.isfinite(sums['nll'])


def test_sums_over_shards_equal_the_whole():
  logits, labels = predictions()
  others, _ = predictions(seed=1)
  mask = np.arange(len(labels)) % 3 > 0
  shards = np.split(np.arange(len(labels)), 4)
  whole = sums_of(logits, labels, mask)
  parts = [sums_of(logits[i], labels[i], mask[i]) for i in shards]
  for name in whole:
    total = sum(part[name] for part in parts)
    np.testing.assert_allclose(total, whole[name], rtol=1e-5, err_msg=name)
  pairs = [metrics.pair_sums(logits[i], others[i], mask[i]) for i in shards]
  for name, value in metrics.pair_sums(logits, others, mask).items():
    total = sum(pair[name] for pair in pairs)
    np.testing.assert_allclose(total, value, rtol=1e-5, err_msg=name)


def test_pair_sums_against_scipy():
  student, _ = predictions()
  teacher, _ = predictions(seed=1)
  teacher[::2] = 1.5 * student[::2]
  mask = np.random.RandomState(2).rand(len(student)) < 0.7
  p = scipy.special.softmax(teacher[mask].astype(np.float64), axis=1)
  q = scipy.special.softmax(student[mask].astype(np.float64), axis=1)
  same = teacher[mask].argmax(axis=1) == student[mask].argmax(axis=1)
  student[~mask] = np.nan
  sums = metrics.pair_sums(
    jnp.asarray(student), jnp.asarray(teacher), jnp.asarray(mask)
  )
  assert sums['examples'] == mask.sum()
  summary = metrics.summarize_pair(jax.tree.map(np.asarray, sums))
  assert set(summary) == {'agreement', 'kl'}
  assert 0.5 < summary['agreement'] < 1
  np.testing.assert_allclose(summary['agreement'], same.mean(), rtol=1e-6)
  np.testing.assert_allclose(
    summary['kl'], scipy.special.rel_entr(p, q).sum(axis=1).mean(), rtol=1e-5
  )


def test_pair_sums_are_finite_at_extremes():
  logits = jnp.array([[1e4, -1e4, 0.0]])
  sums = metrics.pair_sums(-logits, logits, jnp.array([True]))
  assert sums['kl'] == 2e4


def test_bfloat16_logits_are_computed_in_float32():
  logits, labels = predictions()
  low = jnp.asarray(logits, jnp.bfloat16)
  exact = np.asarray(low.astype(jnp.float32))
  result, expected = sums_of(low, labels), sums_of(exact, labels)
  for name in expected:
    assert result[name].dtype == np.float32, name
    np.testing.assert_array_equal(result[name], expected[name], err_msg=name)
