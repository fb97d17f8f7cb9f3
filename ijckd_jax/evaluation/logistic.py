"""Linear heads by multinomial logistic regression, to convergence.

By L-BFGS on standardised features, with the weight of the L2 penalty chosen on
images that the head is not fitted on. scikit-learn finds the same head, on the
CPU alone; here the rows lie on the accelerator.
"""

from collections.abc import Sequence
import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ijckd_jax.runtime import config_utils
from ijckd_jax.runtime import progress

# Of the squared kernel on standardised features, beside the mean loss; from
# where nothing is learned to where nothing is held back.
PENALTIES = tuple(10.0**-power for power in range(8))
# Of the features' root-mean-square deviation, the least that a feature counts
# as having. One that hardly varies among few images would get a kernel of
# hundreds, and logits of thousands on others. On 40 garments, seen by an
# EfficientNet-Lite2, without it: top-1 51.2%, nll 22; with 0.03 to 0.3: 59.2 to
# 60.4%, nll 1.28. On 1,000: 82.6% either way.
MIN_SPREAD = 0.1
HELD_OUT = 10  # One labelled image of so many, where there is no validation.
# Of the gradient's largest number (what float32 sums leave of it), and of the
# iterations; less where penalties are only compared.
CONVERGED = (1e-6, 1000)
COMPARED = (1e-5, 200)
CHUNK = 8192  # Rows whose logits are in memory at a time.
HELD_OUT_STREAM = 3  # Beside those of steps; here it seeds NumPy.


@dataclasses.dataclass(frozen=True)
class Features:
  """Labelled rows: of one view after the other, in the images' order.

  Attributes:
    pooled: (N, D) float32.
    labels: (N,) int32; -1 where there is none.
    images: (N,) int32, whose rows they are.
  """

  pooled: np.ndarray
  labels: np.ndarray
  images: np.ndarray

  def __len__(self) -> int:
    return len(self.labels)

  def where(self, chosen: np.ndarray) -> 'Features':
    """Returns the rows that are chosen, (N,) bool."""
    return Features(*(x[chosen] for x in dataclasses.astuple(self)))

  @property
  def labelled(self) -> 'Features':
    """Those rows that have a label."""
    return self.where(self.labels >= 0)


def join(parts: Sequence[Features]) -> Features:
  """Returns the rows of one after the other."""
  fields = zip(*map(dataclasses.astuple, parts), strict=True)
  return Features(*map(np.concatenate, fields))


@dataclasses.dataclass(frozen=True)
class Fitted:
  """A head, and what it is worth.

  Attributes:
    kernel: (D, K) float32.
    bias: (K,) float32.
    report: JSON: the penalty, examples, accuracies and the log of the choice.
  """

  kernel: np.ndarray
  bias: np.ndarray
  report: dict[str, Any]

  @property
  def head(self) -> dict[str, np.ndarray]:
    """As teachers.Teacher has it."""
    return {'kernel': self.kernel, 'bias': self.bias}


def fit(
  train: Features, validation: Features, num_classes: int, *, seed: int
) -> Fitted:
  """Returns the head with the strongest penalty that held-out images allow.

  That is the strongest whose mean loss on them is within a standard error of
  the least: a small kernel has small logits where a student is not right yet.

  Args:
    train: to fit on; rows without a label are left out.
    validation: to choose the penalty by; where it is empty, a tenth of the
      training images is held out for that, and the head is then fitted again
      on all of them.
    num_classes: K.
    seed: of which images are held out.

  Raises:
    config_utils.UserError: there are no labels, or features are not finite.
  """
  train, validation = train.labelled, validation.labelled
  chosen_on, used = validation, train
  if not len(validation):
    images = np.unique(train.images)
    rng = np.random.default_rng((seed, HELD_OUT_STREAM))
    num_held_out = max(1, len(images) // HELD_OUT)
    held_out = rng.permutation(images)[:num_held_out]
    is_out = np.isin(train.images, held_out)
    used, chosen_on = train.where(~is_out), train.where(is_out)
  if not len(used):
    raise config_utils.UserError(
      f'teacher.head=fit needs labelled training images, more than {len(train)}'
    )
  if not all(np.isfinite(x.pooled).all() for x in (used, chosen_on)):
    raise config_utils.UserError(
      "the teacher's features are not finite, so no head can be fitted on them"
    )
  tried, solutions = [], []
  problem = _Problem(used, num_classes)
  start = problem.zeros
  for penalty in progress.watched(
    PENALTIES, 'fitting a head', 'penalties at most', len(PENALTIES)
  ):
    start, _ = problem.solve(penalty, start, *COMPARED)
    solutions.append(start)
    nll, correct = evaluate(*problem.head(start), chosen_on)
    tried.append(
      {
        'penalty': penalty,
        'nll': float(nll.mean()),
        'nll_error': float(nll.std() / math.sqrt(len(nll))),
        'top1': float(correct.mean()),
      }
    )
    least = min(tried, key=lambda row: row['nll'])
    if len(tried) - tried.index(least) > 2:
      break  # It has only become worse since.
  allowed = least['nll'] + least['nll_error']
  best = next(i for i, row in enumerate(tried) if row['nll'] <= allowed)
  penalty, start = tried[best]['penalty'], solutions[best]
  if used is not train:
    problem = _Problem(train, num_classes)
    start = problem.zeros
  solution, gradient = problem.solve(penalty, start, *CONVERGED)
  kernel, bias = problem.head(solution)
  return Fitted(
    kernel,
    bias,
    {
      'penalty': penalty,
      'examples': len(train),
      'held_out': len(chosen_on) if used is not train else 0,
      'train_top1': float(evaluate(kernel, bias, train)[1].mean()),
      'validation_top1': tried[best]['top1'],
      'validation_nll': tried[best]['nll'],
      'gradient': gradient,
      'tried': tried,
    },
  )


class _Problem:
  """Mean cross-entropy and penalty, on standardised features."""

  def __init__(self, rows: Features, num_classes: int):
    x = rows.pooled
    self._mean = x.mean(axis=0, dtype=np.float64)
    std = x.std(axis=0, dtype=np.float64)
    varies = std > 0
    if varies.any():
      std = np.maximum(std, MIN_SPREAD * np.sqrt(np.mean(std[varies] ** 2)))
    self._scale = 1 / np.where(varies, std, 1.0)
    x = ((x - self._mean) * self._scale).astype(np.float32)
    self._shape = (x.shape[1], num_classes)
    padding = -len(x) % min(CHUNK, len(x))
    chunks = (len(x) + padding) // min(CHUNK, len(x))
    x = np.pad(x, ((0, padding), (0, 0))).reshape(chunks, -1, x.shape[1])
    labels = np.pad(rows.labels, (0, padding), constant_values=-1)
    self._rows = (
      jax.device_put(x),
      jax.device_put(labels.reshape(chunks, -1)),
    )

  @property
  def zeros(self) -> np.ndarray:
    """A start: kernel and bias of zeros, flat."""
    return np.zeros(self._shape[0] * self._shape[1] + self._shape[1])

  def solve(
    self,
    penalty: float,
    start: np.ndarray,
    tolerance: float,
    max_iterations: int,
  ) -> tuple[np.ndarray, float]:
    """Returns the flat solution, and the gradient's largest number there."""
    from scipy import optimize

    num_kernel = self._shape[0] * self._shape[1]

    def objective(flat):
      kernel = flat[:num_kernel].reshape(self._shape)
      value, (to_kernel, to_bias) = _loss_and_gradient(
        kernel.astype(np.float32),
        flat[num_kernel:].astype(np.float32),
        *self._rows,
      )
      value = float(value) + penalty / 2 * np.sum(kernel**2)
      to_kernel = np.asarray(to_kernel, np.float64) + penalty * kernel
      to_bias = np.asarray(to_bias, np.float64)
      return value, np.concatenate([to_kernel.ravel(), to_bias])

    found = optimize.minimize(
      objective,
      start,
      jac=True,
      method='L-BFGS-B',
      options={
        'maxiter': max_iterations,
        'maxfun': 2 * max_iterations,
        'gtol': tolerance,
        'ftol': 0.0,
      },
    )
    return found.x, float(np.abs(found.jac).max())

  def head(self, flat: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns kernel and bias for features as they are."""
    num_kernel = self._shape[0] * self._shape[1]
    kernel = flat[:num_kernel].reshape(self._shape) * self._scale[:, None]
    bias = flat[num_kernel:] - self._mean @ kernel
    return kernel.astype(np.float32), bias.astype(np.float32)


@jax.jit
def _loss_and_gradient(kernel, bias, x, labels):
  """Returns the mean cross-entropy of labelled rows, and its gradient."""
  count = jnp.sum(labels >= 0)

  def loss(head, x, labels):
    logits = jnp.dot(x, head[0], precision='highest') + head[1]
    rows = jax.nn.logsumexp(logits, axis=-1) - jnp.take_along_axis(
      logits, jnp.maximum(labels, 0)[:, None], axis=-1
    ).squeeze(-1)
    return jnp.sum(jnp.where(labels >= 0, rows, 0.0)) / count

  def add(total, rows):
    new = jax.value_and_grad(loss)((kernel, bias), *rows)
    return jax.tree.map(jnp.add, total, new), None

  start = (jnp.zeros(()), (jnp.zeros_like(kernel), jnp.zeros_like(bias)))
  return jax.lax.scan(add, start, (x, labels))[0]


def evaluate(
  kernel: np.ndarray, bias: np.ndarray, rows: Features
) -> tuple[np.ndarray, np.ndarray]:
  """Returns each row's negative log-likelihood, and whether it is right."""
  from scipy import special

  logits = rows.pooled.astype(np.float64) @ kernel + bias
  chosen = logits[np.arange(len(rows)), rows.labels]
  nll = special.logsumexp(logits, axis=-1) - chosen
  return nll, logits.argmax(axis=-1) == rows.labels
