"""Fitted heads against scikit-learn, and what must not matter to them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn import linear_model

from ijckd_jax.evaluation import logistic
from ijckd_jax.runtime import config_utils

NUM_CLASSES = 3
NOTHING = logistic.Features(
  np.zeros((0, 6), np.float32), np.zeros(0, np.int32), np.zeros(0, np.int32)
)


def make_rows(number=200, seed=0):
  """Returns rows that a linear head tells apart, but for some noise."""
  rng = np.random.default_rng(seed)
  labels = rng.integers(0, NUM_CLASSES, number).astype(np.int32)
  centres = np.random.default_rng(1).normal(size=(NUM_CLASSES, 6))
  pooled = centres[labels] + 0.8 * rng.normal(size=(number, 6))
  # Of unlike scales, as the features of networks are.
  pooled = pooled * np.array([1, 0.1, 10, 1, 3, 0.01]) + 5
  images = np.arange(number, dtype=np.int32)
  return logistic.Features(pooled.astype(np.float32), labels, images)


def fit(train, validation=NOTHING, seed=0):
  return logistic.fit(train, validation, NUM_CLASSES, seed=seed)


def assert_same_head(one, other, **kwargs):
  for name in ('kernel', 'bias'):
    np.testing.assert_allclose(
      getattr(one, name), getattr(other, name), **kwargs
    )


def test_is_scikit_learns():
  rows = make_rows()
  fitted = fit(rows)
  mean, std = rows.pooled.mean(0), rows.pooled.std(0)
  std = np.maximum(std, logistic.MIN_SPREAD * np.sqrt((std**2).mean()))
  penalty = fitted.report['penalty']
  theirs = linear_model.LogisticRegression(
    C=1 / (penalty * len(rows)), tol=1e-8, max_iter=10_000
  ).fit((rows.pooled - mean) / std, rows.labels)
  # They differ by what is added to all logits.
  kernel = fitted.kernel * std[:, None]
  kernel -= kernel.mean(axis=1, keepdims=True)
  coefficients = theirs.coef_ - theirs.coef_.mean(axis=0)
  np.testing.assert_allclose(kernel, coefficients.T, atol=2e-3)
  nll, right = logistic.evaluate(fitted.kernel, fitted.bias, rows)
  logs = theirs.predict_log_proba((rows.pooled - mean) / std)
  chosen = -logs[np.arange(len(rows)), rows.labels]
  # Large logits multiply what the coefficients, in float32, may differ by.
  np.testing.assert_allclose(nll, chosen, atol=2e-3, rtol=1e-3)
  assert right.mean() == theirs.score((rows.pooled - mean) / std, rows.labels)
  assert fitted.report['gradient'] < 5e-5  # Of sums in float32.


def test_gradient_is_that_of_the_mean_over_labelled_rows():
  rng = np.random.default_rng(0)
  x = rng.normal(size=(3, 4, 5)).astype(np.float32)  # Three chunks of rows.
  labels = rng.integers(-1, NUM_CLASSES, (3, 4)).astype(np.int32)
  labels[0, 0] = -1
  kernel = rng.normal(size=(5, NUM_CLASSES)).astype(np.float32)
  bias = rng.normal(size=NUM_CLASSES).astype(np.float32)

  def loss(kernel, bias):
    chosen = labels.ravel() >= 0
    logits = x.reshape(12, 5)[chosen] @ kernel + bias
    own = jnp.take_along_axis(logits, labels.ravel()[chosen][:, None], axis=1)
    return (jax.nn.logsumexp(logits, axis=1) - own[:, 0]).mean()

  given = logistic._loss_and_gradient(kernel, bias, x, labels)
  wanted = jax.value_and_grad(loss, argnums=(0, 1))(kernel, bias)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6),
    given,
    wanted,
  )


def test_chunks_do_not_matter(monkeypatch):
  rows = make_rows()
  whole = fit(rows)
  monkeypatch.setattr(logistic, 'CHUNK', 64)  # 200 is no multiple of it.
  assert_same_head(fit(rows), whole, rtol=1e-2, atol=1e-2)


def test_rows_without_a_label_do_not_matter():
  rows, more = make_rows(), make_rows(50, seed=2)
  unlabelled = logistic.Features(
    1e3 * more.pooled, np.full(50, -1, np.int32), more.images + 1000
  )
  both = logistic.join([rows, unlabelled])
  assert_same_head(fit(both), fit(rows), rtol=1e-6)


def test_the_penalty_is_chosen_on_images_that_are_not_fitted():
  """All views of an image are on one side."""
  rows = make_rows()
  views = logistic.join(
    [
      rows,
      logistic.Features(rows.pooled + 0.01, rows.labels, rows.images),
    ]
  )
  report = fit(views).report
  assert report['held_out'] == 2 * (len(rows) // logistic.HELD_OUT)
  assert report['examples'] == 2 * len(rows)
  given = fit(rows, make_rows(60, seed=3)).report
  assert (given['held_out'], given['examples']) == (0, len(rows))


def test_the_strongest_penalty_within_an_error_of_the_best_is_taken():
  report = fit(make_rows()).report
  tried = report['tried']
  least = min(tried, key=lambda row: row['nll'])
  allowed = [
    row['penalty']
    for row in tried
    if row['nll'] <= least['nll'] + least['nll_error']
  ]
  assert report['penalty'] == max(allowed)
  assert report['penalty'] >= least['penalty']
  assert [row['penalty'] for row in tried] == sorted(
    (row['penalty'] for row in tried), reverse=True
  )


def test_noise_takes_a_strong_penalty():
  rng = np.random.default_rng(0)
  rows = make_rows(100)
  noise = logistic.Features(
    rng.normal(size=(100, 6)).astype(np.float32), rows.labels, rows.images
  )
  assert fit(noise).report['penalty'] > fit(rows).report['penalty']


def test_a_feature_that_never_changes_is_no_harm():
  rows = make_rows()
  pooled = np.concatenate([rows.pooled, np.full((200, 1), 7.0)], axis=1)
  fitted = fit(
    logistic.Features(pooled.astype(np.float32), rows.labels, rows.images)
  )
  assert np.isfinite(fitted.kernel).all()
  plain = fit(rows)
  np.testing.assert_allclose(fitted.kernel[:6], plain.kernel, rtol=1e-3)


def test_a_feature_that_hardly_varies_makes_no_large_logits():
  """It happens to tell the classes apart, but by a millionth of its size."""
  rows = make_rows()
  hardly = 1 + 1e-6 * (rows.labels == 0) * rows.pooled.std()
  pooled = np.concatenate([rows.pooled, hardly[:, None]], axis=1)
  fitted = fit(
    logistic.Features(pooled.astype(np.float32), rows.labels, rows.images)
  )
  largest = np.abs(fit(rows).kernel).max()
  assert np.abs(fitted.kernel[6]).max() < 10 * largest


def test_what_cannot_be_fitted_is_said():
  rows = make_rows(20)
  none = logistic.Features(rows.pooled, np.full(20, -1, np.int32), rows.images)
  with pytest.raises(config_utils.UserError, match='needs labelled training'):
    fit(none)
  bad = rows.pooled.copy()
  bad[3, 2] = np.nan
  with pytest.raises(config_utils.UserError, match='are not finite'):
    fit(logistic.Features(bad, rows.labels, rows.images))
