"""Losses and what they are made of: arrays in, scalars out.

All are computed in float32, or in float64 where that is what comes in.
"""

from collections.abc import Callable
from collections.abc import Mapping
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from ijckd_jax.data import mixing
from ijckd_jax.models import outputs
from ijckd_jax.runtime import config_utils

PAIRINGS = ('first', 'last')


def at_least_float32(x: jax.Array) -> jax.Array:
  """Returns low precision as float32, and anything else as it is."""
  return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def single_labels(labels: jax.Array | mixing.MixedLabels) -> jax.Array:
  """Returns (B,) int32: of a mixed image, the label of its larger part."""
  if isinstance(labels, mixing.MixedLabels):
    return jnp.where(labels.weight < 0.5, labels.other, labels.own)
  return labels


def cross_entropy(
  logits: jax.Array, labels: jax.Array | mixing.MixedLabels
) -> jax.Array:
  """Returns the cross-entropy of labelled rows, summed, over the batch size.

  Dividing by all rows, labelled or not, makes the mean over shards equal to the
  mean over the batch. A mixed row's is that with either label, by its weight.
  With labels smoothed by s, a row's is 1 - s of it and s of the mean over all
  classes.

  Args:
    logits: (B, K).
    labels: (B,) int32; -1 for an unlabelled row. Or mixing.MixedLabels.
  """

  def rows(labels: jax.Array, smoothing: float | jax.Array = 0.0) -> jax.Array:
    rows = optax.losses.softmax_cross_entropy_with_integer_labels(
      at_least_float32(logits), jnp.maximum(labels, 0)
    )
    if smoothing:
      log_probs = jax.nn.log_softmax(at_least_float32(logits))
      rows = (1 - smoothing) * rows - smoothing * jnp.mean(log_probs, axis=-1)
    return jnp.where(labels >= 0, rows, 0.0)

  if not isinstance(labels, mixing.MixedLabels):
    return jnp.mean(rows(labels))
  own = labels.weight * rows(labels.own, labels.smoothing)
  other = rows(labels.other, labels.smoothing)
  return jnp.mean(own + (1 - labels.weight) * other)


def mean_squared_error(x: jax.Array, y: jax.Array) -> jax.Array:
  """Returns the mean over all elements of (x - y)^2; shapes must be equal."""
  if x.shape != y.shape:
    raise ValueError(f'shapes differ: {x.shape} and {y.shape}')
  return jnp.mean(jnp.square(at_least_float32(x) - at_least_float32(y)))


def distillation(
  student_logits: jax.Array,
  teacher_logits: jax.Array,
  temperature: float,
  *,
  standardize: bool = False,
) -> jax.Array:
  """Returns T^2 KL(teacher || student) of softened predictions, over B rows.

  The factor T^2 keeps the gradient's size when the temperature changes.

  Args:
    student_logits: (B, K).
    teacher_logits: (B, K).
    temperature: T, both are divided by it before the softmax.
    standardize: take both by `standardize_logits`.

  Source: Hinton et al. 2015, https://arxiv.org/abs/1503.02531.
  """
  log_student, log_teacher = (
    jax.nn.log_softmax(logits / temperature)
    for logits in read_logits(student_logits, teacher_logits, standardize)
  )
  rows = optax.losses.kl_divergence_with_log_targets(log_student, log_teacher)
  return temperature**2 * jnp.mean(rows)


def standardize(x: jax.Array, axis: int, epsilon: float) -> jax.Array:
  """Returns x of mean zero and variance one along an axis.

  Args:
    x: of any shape.
    axis: over which mean and variance are taken.
    epsilon: is added to the variance.
  """
  x = at_least_float32(x)
  centered = x - jnp.mean(x, axis=axis, keepdims=True)
  variance = jnp.mean(jnp.square(centered), axis=axis, keepdims=True)
  return centered / jnp.sqrt(variance + epsilon)


def standardize_logits(logits: jax.Array) -> jax.Array:
  """Returns logits less their mean, over their standard deviation, row by row.

  The variance is the sum of squares over K - 1, as in the authors' code.

  Args:
    logits: (B, K).

  Source: Sun et al. 2024, "Logit Standardization in Knowledge Distillation",
  https://arxiv.org/abs/2403.01427.
  """
  logits = at_least_float32(logits)
  centered = logits - jnp.mean(logits, axis=-1, keepdims=True)
  squares = jnp.sum(jnp.square(centered), axis=-1, keepdims=True)
  return centered / (safe_sqrt(squares / (logits.shape[-1] - 1)) + 1e-7)


def read_logits(
  student: jax.Array, teacher: jax.Array, standardize: bool
) -> tuple[jax.Array, jax.Array]:
  """Returns the logits of both as a loss reads them, standardised or not."""
  read = standardize_logits if standardize else at_least_float32
  return read(student), read(teacher)


def safe_sqrt(x: jax.Array) -> jax.Array:
  """Returns the square root, whose gradient at zero is zero, not infinite."""
  is_positive = x > 0
  return jnp.where(is_positive, jnp.sqrt(jnp.where(is_positive, x, 1.0)), 0.0)


def normalize(x: jax.Array) -> jax.Array:
  """Returns vectors (..., D) of length one; that of zero stays zero."""
  x = at_least_float32(x)
  norm = safe_sqrt(jnp.sum(jnp.square(x), axis=-1, keepdims=True))
  return x / jnp.maximum(norm, 1e-12)


def warm_up(batch: Mapping[str, Any], epochs: float) -> jax.Array | float:
  """Returns what a term is multiplied by, which grows to one over `epochs`.

  In the first epoch it is 1 / epochs. The rows of a batch that crosses epochs
  are averaged.

  Args:
    batch: of the step, with 'epoch' (B,), counted from 0.
    epochs: of the warm-up; with 0 it is one from the start.
  """
  if not epochs:
    return 1.0
  return jnp.mean(jnp.minimum((batch['epoch'] + 1) / epochs, 1.0))


def check_pairing(pairing: str) -> None:
  """Raises config_utils.UserError for what is none of PAIRINGS."""
  if pairing not in PAIRINGS:
    raise config_utils.unknown('pairing', pairing, PAIRINGS)


def pair_stages(
  student: Sequence, teacher: Sequence, pairing: str = 'last'
) -> list[tuple]:
  """Returns the stages of two networks that stand side by side, stems left out.

  What the longer one has beyond them is left out. A teacher of another library
  may have its last map alone, which stands beside the student's last.

  Args:
    student: Features.stages, or their shapes.
    teacher: the same of the teacher, or Features.before.
    pairing: whether they are counted from the 'first', or from the 'last'.
  """
  if len(teacher) == 1 or len(student) == 1:
    return [(student[-1], teacher[-1])]
  student, teacher = student[1:], teacher[1:]
  count = min(len(student), len(teacher))
  if pairing == 'last':
    student, teacher = student[-count:], teacher[-count:]
  return list(zip(student[:count], teacher[:count], strict=True))


def smaller_size(x: jax.Array, y: jax.Array) -> tuple[int, int]:
  """Returns (h, w), of each the smaller of two maps (B, H, W, C)."""
  return min(x.shape[1], y.shape[1]), min(x.shape[2], y.shape[2])


def adaptive_average_pool(x: jax.Array, size: Sequence[int]) -> jax.Array:
  """Returns a map averaged to `size`, with PyTorch's overlapping bins.

  Output row i averages input rows floor(i H / h) to ceil((i+1) H / h) - 1.

  Args:
    x: (B, H, W, C).
    size: (h, w), any two sizes.

  Returns:
    (B, h, w, C) of x's dtype; `x` itself where it has that size.
  """
  if x.shape[1:3] == tuple(size):
    return x
  rows, columns = (
    _averaging_matrix(old, new)
    for old, new in zip(x.shape[1:3], size, strict=True)
  )
  # In bfloat16 the weights of a bin do not add up to one.
  exact = at_least_float32(x)
  pooled = jnp.einsum(
    'bhwc,ih,jw->bijc',
    exact,
    rows.astype(exact.dtype),
    columns.astype(exact.dtype),
    precision='highest',
  )
  return pooled.astype(x.dtype)


def _averaging_matrix(old: int, new: int) -> np.ndarray:
  """Returns (new, old) weights of each bin's mean."""
  index = np.arange(new)
  start = index * old // new
  end = -(-(index + 1) * old // new)
  inside = (np.arange(old) >= start[:, None]) & (np.arange(old) < end[:, None])
  return inside / inside.sum(axis=1, keepdims=True)


def feature_distance(
  connected: outputs.Connected, teacher: outputs.Outputs, site: str
) -> jax.Array:
  """Returns the mean squared error between two representations.

  Args:
    connected: outputs.Connected of the student.
    teacher: outputs.Outputs of the teacher.
    site: 'map', where a larger teacher's map is averaged down to the student's
      size first, or 'pooled'.

  Raises:
    config_utils.UserError: the connector has made no map.
  """
  if site == 'pooled':
    return mean_squared_error(connected.pooled, teacher.pooled)
  if connected.map is None:
    raise config_utils.UserError(
      'the student is connected by its pooled features, so there is no map to '
      "compare with the teacher's"
    )
  target = adaptive_average_pool(teacher.final, connected.map.shape[1:3])
  return mean_squared_error(connected.map, target)


def combine(
  **terms: tuple[float, Callable[[], jax.Array]],
) -> tuple[jax.Array, dict[str, jax.Array]]:
  """Returns the weighted sum of terms, and each term that was computed.

  A term of weight zero is not computed: zero times infinity is not a number.

  Args:
    **terms: (weight, function that gives the unweighted term) by name.
  """
  values = {name: term() for name, (weight, term) in terms.items() if weight}
  total: Any = sum(terms[name][0] * value for name, value in values.items())
  return total, values
