"""How differently two representations can be told, and read: estimates.

Each is found by a classifier that is trained for it, and so from below: of the
proxy A-distance and the disparity that makes lower estimates, diagnostics and
no certificates. Dis^2 goes the other way, and needs an assumption that it
states. Fit on examples other than those that are then measured.
"""

from collections.abc import Callable
from collections.abc import Sequence
import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax

from ijckd_jax.bounds import limits
from ijckd_jax.evaluation import logistic

# Of the critics' squared kernel on standardised features, beside losses of a
# few nats: enough to keep a kernel finite where classes can be told apart.
PENALTY = 1e-4
MAX_ITERATIONS = 300


def domain_head(z_t: np.ndarray, z_s: np.ndarray, *, seed: int):
  """Returns a linear head that tells teacher's from student's features.

  Rows i of both are of one example, and are held out together where the penalty
  is chosen.

  Args:
    z_t: (N, D).
    z_s: (N, D).
    seed: of which examples are held out.

  Returns:
    'kernel' (D, 2) and 'bias' (2,); class 1 is the student.
  """
  num = len(z_t)
  images = np.arange(num, dtype=np.int32)
  rows = logistic.join(
    [
      logistic.Features(
        np.asarray(z, np.float32), np.full(num, domain, np.int32), images
      )
      for domain, z in enumerate((z_t, z_s))
    ]
  )
  nothing = rows.where(np.zeros(len(rows), bool))
  return logistic.fit(rows, nothing, 2, seed=seed).head


def proxy_a_distance(
  z_t: np.ndarray, z_s: np.ndarray, head: dict[str, np.ndarray]
) -> np.ndarray:
  """Returns 2 (1 - 2 e) of each pair, (N,) in [-2, 2].

  e in {0, 1/2, 1} is the share of the two features that the head takes for the
  other's. D13: the mean is at most 2 TV(z_t, z_s) but for sampling, so it is a
  lower estimate of how far the representations' distributions lie apart. It
  saturates at 2 where they are easily told apart. Source: Ben-David et al.
  2010.

  Args:
    z_t: (N, D) on which the head was not fitted.
    z_s: (N, D).
    head: of `domain_head`.
  """
  wrong = [
    logits(z, head).argmax(axis=-1) != domain
    for domain, z in enumerate((z_t, z_s))
  ]
  return 2 * (1 - wrong[0].astype(np.float64) - wrong[1])


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

  Convex in the logits, unlike `disparity_loss`. Source: Rosenfeld and Garg
  2023, "(Almost) Provable Error Bounds Under Distribution Shift via
  Disagreement Discrepancy", https://arxiv.org/abs/2306.00312.
  """
  own = jnp.take_along_axis(scores, predicted[:, None], axis=-1)[:, 0]
  others = (scores.sum(axis=-1) - own) / (scores.shape[-1] - 1)
  return jax.nn.softplus(own - others)


@dataclasses.dataclass(frozen=True)
class Read:
  """Features, and what a head predicts from them.

  Attributes:
    pooled: (N, D) float32.
    predicted: (N,) int32.
  """

  pooled: np.ndarray
  predicted: np.ndarray

  def __len__(self) -> int:
    return len(self.predicted)

  def differs(self, critic: dict[str, np.ndarray]) -> np.ndarray:
    """Returns where a critic predicts otherwise, (N,) int32."""
    found = logits(self.pooled, critic).argmax(axis=-1)
    return (found != self.predicted).astype(np.int32)

  def where(self, chosen: np.ndarray) -> 'Read':
    """Returns the rows that are chosen: (N,) bool, or indices."""
    return Read(self.pooled[chosen], self.predicted[chosen])


def read(pooled: np.ndarray, head: dict[str, np.ndarray]) -> Read:
  """Returns features (N, D), and what a head predicts from them."""
  predicted = logits(pooled, head).argmax(axis=-1)
  return Read(pooled, predicted.astype(np.int32))


def logits(pooled: np.ndarray, head: dict[str, np.ndarray]) -> np.ndarray:
  """Returns the logits (N, K) of a linear head on features (N, D)."""
  return pooled @ head['kernel'] + head['bias']


def fit_critic(
  source: Read,
  target: Read,
  head: dict[str, np.ndarray],
  loss: Callable[[jax.Array, jax.Array], jax.Array] = disagreement_loss,
) -> dict[str, np.ndarray]:
  """Returns a linear head that agrees on the source and differs on the target.

  By L-BFGS from the head itself, on features standardised together, so that
  what it finds is no less than nothing.

  Args:
    source: where it is to predict the same.
    target: where it is to predict otherwise.
    head: 'kernel' (D, K) and 'bias' (K,), where it starts.
    loss: of the target's logits and predictions.
  """
  from scipy import optimize

  stacked = np.concatenate([source.pooled, target.pooled])
  mean = stacked.mean(axis=0, dtype=np.float64)
  std = stacked.std(axis=0, dtype=np.float64)
  scale = np.where(std > 0, std, 1.0)
  kernel = np.asarray(head['kernel'], np.float64)
  shape, bias = kernel.shape, np.asarray(head['bias'], np.float64)
  arrays = [
    jax.device_put(((x.pooled - mean) / scale).astype(np.float32))
    for x in (source, target)
  ]
  labels = [jax.device_put(x.predicted) for x in (source, target)]

  def function(flat):
    value, gradient = _critic_loss(
      flat.astype(np.float32), arrays, labels, shape, loss
    )
    return float(value), np.asarray(gradient, np.float64)

  start = np.concatenate(
    [(kernel * scale[:, None]).ravel(), bias + mean @ kernel]
  )
  found = optimize.minimize(
    function,
    start,
    jac=True,
    method='L-BFGS-B',
    options={'maxiter': MAX_ITERATIONS},
  )
  kernel = found.x[: shape[0] * shape[1]].reshape(shape) / scale[:, None]
  bias = found.x[shape[0] * shape[1] :] - mean @ kernel
  return {
    'kernel': kernel.astype(np.float32),
    'bias': bias.astype(np.float32),
  }


def disparity(
  fitted: Sequence[Read], measured: Sequence[Read], head: dict[str, np.ndarray]
) -> np.ndarray:
  """Returns 1[h' != h on z_s] - 1[h' != h on z_t] of each pair, (N,) int32.

  D13: a lower estimate of the supremum over linear h', by a critic of either
  loss, whichever differs more where it was fitted. Source: Zhang et al. 2019
  (the disparity discrepancy) and Kuroki et al. 2019, "Unsupervised Domain
  Adaptation Based on Source-guided Discrepancy",
  https://arxiv.org/abs/1809.03839.

  Args:
    fitted: teacher's and student's features, on which critics are fitted.
    measured: the same of other examples.
    head: h, that both are read by.
  """

  def gaps(parts, critic):
    teacher, student = (part.differs(critic) for part in parts)
    return student - teacher

  critics = [
    fit_critic(*fitted, head, loss)
    for loss in (disparity_loss, disagreement_loss)
  ]
  best = max(critics, key=lambda critic: gaps(fitted, critic).mean())
  return gaps(measured, best)


@functools.partial(jax.jit, static_argnums=(3, 4))
def _critic_loss(flat, arrays, labels, shape, loss):
  """Returns what a critic makes small, and its gradient."""
  num_kernel = shape[0] * shape[1]

  def total(flat):
    kernel, bias = flat[:num_kernel].reshape(shape), flat[num_kernel:]
    near, far = (jnp.dot(x, kernel, precision='highest') + bias for x in arrays)
    agree = optax.losses.softmax_cross_entropy_with_integer_labels(
      near, labels[0]
    )
    return (
      agree.mean()
      + loss(far, labels[1]).mean()
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
  that was found: dis_T(h, y) - dis_S(h, y) <= dis_T(h, h') - dis_S(h, h'). That
  cannot be checked without labels. Both samples are independent of each other,
  and of the examples that the critic was fitted on.

  Proof of the sampling term: a source example changes the mean by up to 2/n_S,
  a target example by 1/n_T (McDiarmid).

  Source: Rosenfeld and Garg 2023, https://arxiv.org/abs/2306.00312.

  Args:
    source_wrong: (n_S,) 0 or 1, where h is wrong.
    source_differs: (n_S,) 0 or 1, where h' predicts otherwise.
    target_differs: (n_T,) the same on the target; no label is needed there.
    delta: probability of failure, the condition given.

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
