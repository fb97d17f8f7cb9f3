"""Limits of a student's error on images without labels.

On images of the same distribution as the labelled ones: the teacher's error on
the labelled images, plus the disagreement of student and teacher on the others.
On images of another distribution: Dis^2, if the assumption holds that `dis2`
states.
"""

from collections.abc import Callable
from collections.abc import Sequence
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from ijckd_jax.bounds import limits
from ijckd_jax.evaluation import pointwise

# Random stream that picks the examples on which critics are fitted.
SPLIT_STREAM = 5
# Weight of the critics' squared kernel on standardised logits, beside losses of
# a few nats: enough to keep a kernel finite where classes can be told apart.
PENALTY = 1e-4
MAX_ITERATIONS = 300
# A critic's loss of each row, by its logits and the classifier's predictions.
Loss = Callable[[jax.Array, jax.Array], jax.Array]


def bound(
  source: dict[str, Any],
  target: dict[str, Any],
  head: dict[str, np.ndarray],
  *,
  delta: float,
  seed: int,
) -> dict[str, Any]:
  """Returns limits of the student's error on unlabelled images, as JSON.

  The student must not have been trained on these images: it agrees with its
  teacher there more than elsewhere.

  Args:
    source: labelled examples, of feature_extraction.of_split, by Pair.view.
    target: the same of the other examples. Labels that they have give
      'true_error', and nothing else.
    head: 'kernel' and 'bias' by which the teacher is read, and a student that
      has no head of its own.
    delta: probability that any of the limits fails.
    seed: of the halves on which critics are fitted.

  Returns:
    'examples', the number of unlabelled images; 'delta'; 'disagreement' on them
    with its 'upper' limit; 'same_distribution', the limit of the student's
    error if they are like the labelled ones; 'shifted', its limit by Dis^2,
    None for too few images; and 'true_error', where the target has labels.
  """
  (near_teacher, near), (far_teacher, far) = (
    _logits(part['rows'], head) for part in (source, target)
  )
  # The teacher's error, the disagreement and Dis^2 share delta.
  share = limits.shared(delta, 3)
  known = source['label'] >= 0
  wrong = near_teacher.argmax(axis=-1)[known] != source['label'][known]
  predicted = far.argmax(axis=-1)
  disagree = predicted != far_teacher.argmax(axis=-1)
  teachers, disagreement = (
    limits.clopper_pearson_upper(int(found.sum()), len(found), share)
    for found in (wrong, disagree)
  )
  result = {
    'examples': len(disagree),
    'delta': delta,
    'disagreement': {'value': float(disagree.mean()), 'upper': disagreement},
    'same_distribution': {
      'value': float(wrong.mean() + disagree.mean()),
      'upper': min(1.0, teachers + disagreement),
    },
    'shifted': by_critic(near, far, source['label'], delta=share, seed=seed),
  }
  labelled = target['label'] >= 0
  if labelled.any():
    result['true_error'] = float(
      np.mean(predicted[labelled] != target['label'][labelled])
    )
  return result


def _logits(rows, head) -> tuple[np.ndarray, np.ndarray]:
  """Returns the teacher's logits and the deployed student's, (N, K) each."""
  student = rows.get('l_own')
  if student is None:
    student = pointwise.read(rows['z_s'], head)
  return pointwise.read(rows['z_t'], head), student


def by_critic(
  source: np.ndarray,
  target: np.ndarray,
  labels: np.ndarray,
  *,
  delta: float,
  seed: int,
  losses: Sequence[Loss] | None = None,
) -> dict[str, float] | None:
  """Returns `dis2` of a classifier, by a linear critic that reads its logits.

  A critic of each loss is fitted on one half of either sample, and the one that
  differs more there is measured on the other half. None where nothing is left
  to measure it on.

  Args:
    source: logits of labelled examples, (n_S, K).
    target: logits of examples without labels, (n_T, K).
    labels: of the source, (n_S,) int; -1 where there is none.
    delta: probability of failure, if the assumption holds.
    seed: of the halves.
    losses: of `fit_critic`; default: `disagreement_loss` and `disparity_loss`.
  """
  if losses is None:
    losses = disagreement_loss, disparity_loss
  rng = np.random.default_rng((seed, SPLIT_STREAM))
  fitted = [rng.permutation(len(part)) % 2 == 0 for part in (source, target)]
  held = ~fitted[0] & (labels >= 0)
  if not held.any() or fitted[1].all():
    return None
  halves = source[fitted[0]], target[fitted[1]]
  critics = [fit_critic(*halves, loss) for loss in losses]

  def discrepancy(critic):
    near, far = (differs(part, critic).mean() for part in halves)
    return far - near

  critic = max(critics, key=discrepancy)
  source, target = source[held], target[~fitted[1]]
  return dis2(
    source.argmax(axis=-1) != labels[held],
    differs(source, critic),
    differs(target, critic),
    delta,
  )


def differs(logits: np.ndarray, critic: dict[str, np.ndarray]) -> np.ndarray:
  """Returns where a critic predicts another class than the logits, (N,) bool.

  Args:
    logits: (N, K).
    critic: 'kernel' (K, K) and 'bias' (K,).
  """
  found = pointwise.read(logits, critic).argmax(axis=-1)
  return found != logits.argmax(axis=-1)


def disparity_loss(scores: jax.Array, predicted: jax.Array) -> jax.Array:
  """Returns -log(1 - p_predicted) of each row of logits.

  Source: Zhang et al. 2019, "Bridging Theory and Algorithm for Domain
  Adaptation", https://arxiv.org/abs/1904.05801.
  """
  others = jnp.where(
    jax.nn.one_hot(predicted, scores.shape[-1], dtype=bool), -jnp.inf, scores
  )
  return jax.nn.logsumexp(scores, axis=-1) - jax.nn.logsumexp(others, axis=-1)


def disagreement_loss(scores: jax.Array, predicted: jax.Array) -> jax.Array:
  """Returns log(1 + exp(l_predicted - mean of the other l)) of each row.

  Convex in the logits, unlike `disparity_loss`, but not consistent for more
  than two classes. Source: Rosenfeld and Garg 2023, "(Almost) Provable Error
  Bounds Under Distribution Shift via Disagreement Discrepancy",
  https://arxiv.org/abs/2306.00312; the inconsistency: Marchant et al. 2025,
  https://arxiv.org/abs/2512.05931.
  """
  own = jnp.take_along_axis(scores, predicted[:, None], axis=-1)[:, 0]
  others = (scores.sum(axis=-1) - own) / (scores.shape[-1] - 1)
  return jax.nn.softplus(own - others)


def fit_critic(
  source: np.ndarray,
  target: np.ndarray,
  loss: Loss,
) -> dict[str, np.ndarray]:
  """Returns a linear critic that agrees on the source, not on the target.

  Fitted by L-BFGS on logits standardised together. It starts from the identity,
  which agrees with the classifier everywhere.

  Args:
    source: logits (n_S, K) on which it is to predict the same class.
    target: logits (n_T, K) on which it is to predict another class.
    loss: of the critic's logits and the classifier's predictions.

  Returns:
    'kernel' (K, K) and 'bias' (K,) float32.
  """
  from scipy import optimize

  stacked = np.concatenate([source, target])
  mean = stacked.mean(axis=0, dtype=np.float64)
  std = stacked.std(axis=0, dtype=np.float64)
  scale = np.where(std > 0, std, 1.0)
  num = len(mean)
  arrays = [
    jax.device_put(((x - mean) / scale).astype(np.float32))
    for x in (source, target)
  ]
  predicted = [jax.device_put(x.argmax(axis=-1)) for x in (source, target)]

  def function(flat):
    value, gradient = _critic_loss(
      flat.astype(np.float32), arrays, predicted, loss
    )
    return float(value), np.asarray(gradient, np.float64)

  found = optimize.minimize(
    function,
    np.concatenate([np.diag(scale).ravel(), mean]),
    jac=True,
    method='L-BFGS-B',
    options={'maxiter': MAX_ITERATIONS},
  )
  kernel = found.x[: num * num].reshape(num, num) / scale[:, None]
  bias = found.x[num * num :] - mean @ kernel
  return {
    'kernel': kernel.astype(np.float32),
    'bias': bias.astype(np.float32),
  }


@functools.partial(jax.jit, static_argnames='loss')
def _critic_loss(flat, arrays, predicted, loss):
  """Returns the loss that a critic minimises, and its gradient."""
  num = arrays[0].shape[-1]

  def total(flat):
    kernel, bias = flat[: num * num].reshape(num, num), flat[num * num :]
    near, far = (jnp.dot(x, kernel, precision='highest') + bias for x in arrays)
    agree = optax.losses.softmax_cross_entropy_with_integer_labels(
      near, predicted[0]
    )
    return (
      agree.mean()
      + loss(far, predicted[1]).mean()
      + PENALTY / 2 * jnp.sum(jnp.square(kernel))
    )

  return jax.value_and_grad(total)(flat)


def dis2(
  source_wrong: np.ndarray,
  source_differs: np.ndarray,
  target_differs: np.ndarray,
  delta: float,
) -> dict[str, float]:
  """Returns Dis^2, a limit of a classifier's error on a shifted distribution.

  err_T(h) <= err_S(h) + [dis_T(h, h') - dis_S(h, h')] with probability at least
  1 - delta, **if** the true labels are not more adversarial than the critic h'
  that was found: dis_T(h, y) - dis_S(h, y) <= dis_T(h, h') - dis_S(h, h'). This
  cannot be checked without labels. Both samples are independent of each other,
  and of the examples on which the critic was fitted.

  Proof of the sampling term: a source example changes the mean by up to 2/n_S,
  a target example by 1/n_T (McDiarmid).

  Source: Rosenfeld and Garg 2023, https://arxiv.org/abs/2306.00312.

  Args:
    source_wrong: (n_S,) 0 or 1, where h is wrong.
    source_differs: (n_S,) 0 or 1, where h' predicts another class.
    target_differs: (n_T,) the same on the target; no label is needed there.
    delta: probability of failure, if the assumption holds.

  Returns:
    'value', 'upper' (at most 1), 'source_error' and 'discrepancy'.
  """
  limits.check_delta(delta)
  num_source, num_target = len(source_wrong), len(target_differs)
  error = float(np.mean(source_wrong))
  # To agree with h everywhere is a critic too.
  discrepancy = max(
    0.0, float(np.mean(target_differs)) - float(np.mean(source_differs))
  )
  off = math.sqrt(
    (num_source + 4 * num_target)
    * math.log(1 / delta)
    / (2 * num_source * num_target)
  )
  value = error + discrepancy
  return {
    'value': value,
    'upper': min(1.0, value + off),
    'source_error': error,
    'discrepancy': discrepancy,
  }
