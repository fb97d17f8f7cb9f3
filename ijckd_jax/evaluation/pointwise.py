"""What a teacher and a student do on each example: the numbers behind bounds.

Notation: z_t and z_s are the representations (D), h the head that both are read
by, l_t and l_s its logits (K), p_t and p_s their softmax, y the label.
"""

import dataclasses
from typing import Any

from flax import struct
import jax
import jax.numpy as jnp
import numpy as np

# Of the size of what is added up in float32, far above its rounding: a margin
# that is not larger than this is taken for none.
ROUNDING = 1e-5
CHUNK = 1024  # Rows whose logits are in memory at a time.

_Array = jax.Array | np.ndarray


@struct.dataclass
class Head:
  """A linear classifier, and how far its classes' weights lie apart.

  Attributes:
    kernel: (D, K).
    bias: (K,).
    distances: (K, K), ||w_i - w_j||_2.
    largest_weight: max ||w_k||_2.
    span: (D, min(D, K - 1)), an orthonormal basis of a space that holds every
      w_i - w_j.
  """

  kernel: _Array
  bias: _Array
  distances: _Array
  largest_weight: _Array
  span: _Array


def describe(head: dict[str, Any]) -> Head:
  """Returns a head's constants, computed in float64 on the host.

  Args:
    head: 'kernel' (D, K) and 'bias' (K,).
  """
  kernel = np.asarray(head['kernel'], np.float64)
  products = kernel.T @ kernel
  squares = np.diag(products)
  distances = np.sqrt(
    np.maximum(squares[:, None] + squares[None, :] - 2 * products, 0)
  )
  # What cancels to less than the products' rounding is nothing.
  distances[distances < 1e-7 * np.sqrt(squares.max())] = 0
  np.fill_diagonal(distances, 0)
  span, _ = np.linalg.qr(kernel[:, 1:] - kernel[:, :1])
  return Head(
    kernel=np.asarray(head['kernel'], np.float32),
    bias=np.asarray(head['bias'], np.float32),
    distances=distances.astype(np.float32),
    largest_weight=np.asarray(np.sqrt(squares.max()), np.float32),
    span=span.astype(np.float32),
  )


def read(pooled: np.ndarray, head: dict[str, np.ndarray]) -> np.ndarray:
  """Returns the logits (N, K) of a linear head on features (N, D)."""
  return pooled @ head['kernel'] + head['bias']


@struct.dataclass
class Rows:
  """Of each example, what the statements are about; (N,) each.

  Predictions and what depends on the label are integers and float32. Where
  there is no label (-1), what would depend on it is not a number.

  Attributes:
    label: y, int32.
    teacher: predicted by the teacher, argmax l_t; ties to the lowest index.
    student: predicted by the student, argmax l_s.
    confidence: of the student's prediction, max p_s.
    logit_distance: ||l_s - l_t||_2.
    logit_range: max_k (l_s - l_t)_k - min_k (l_s - l_t)_k.
    logit_margin: m_y = l_t,y - max_{j != y} l_t,j, less what rounding can be.
    kl: KL(p_t || p_s), nats.
    total_variation: TV(p_t, p_s).
    teacher_soft: 1 - p_t,y.
    feature_distance: ||z_s - z_t||_2; None where the student is not seen in the
      teacher's space, like all that follow.
    head_distance: dz, the length of z_s - z_t in the span of the w_i - w_j.
    flip_margin: rho(z_t), the distance from z_t to where h predicts another
      class, less what rounding can be.
    label_margin: rho_y(z_t), the same to where h does not predict y; negative
      or zero where it does not.
    joint_teacher: predicted by the joint head from z_t; None where there is no
      such head.
    joint_student: predicted by the joint head from z_s.
    own: predicted by the student's own head, where it has one, and `student` is
      what it predicts through the teacher's; else None.
  """

  label: Any
  teacher: Any
  student: Any
  confidence: Any
  logit_distance: Any
  logit_range: Any
  logit_margin: Any
  kl: Any
  total_variation: Any
  teacher_soft: Any
  feature_distance: Any = None
  head_distance: Any = None
  flip_margin: Any = None
  label_margin: Any = None
  joint_teacher: Any = None
  joint_student: Any = None
  own: Any = None

  def __len__(self) -> int:
    return len(self.label)

  def where(self, chosen: np.ndarray) -> 'Rows':
    """Returns the rows that are chosen: (N,) bool, or indices."""
    return jax.tree.map(lambda x: x[chosen], self)

  @property
  def labelled(self) -> 'Rows':
    """Those rows that have a label."""
    return self.where(np.asarray(self.label) >= 0)


def from_logits(
  teacher: jax.Array,
  student: jax.Array,
  labels: jax.Array,
  *,
  rounding: jax.Array | None = None,
) -> Rows:
  """Returns the rows of any two classifiers of the same classes.

  Args:
    teacher: l_t, (N, K).
    student: l_s, (N, K).
    labels: (N,) int32; -1 where there is none.
    rounding: (N,) by how much a difference of logits may be off; None: by
      ROUNDING of the largest logit.
  """
  teacher, student = (x.astype(jnp.float32) for x in (teacher, student))
  labelled = labels >= 0
  index = jnp.maximum(labels, 0)[:, None]
  difference = student - teacher
  log_teacher = jax.nn.log_softmax(teacher)
  log_student = jax.nn.log_softmax(student)
  p_teacher, p_student = jnp.exp(log_teacher), jnp.exp(log_student)
  is_label = jax.nn.one_hot(labels, teacher.shape[-1], dtype=bool)
  if rounding is None:
    largest = jnp.maximum(jnp.abs(teacher), jnp.abs(student)).max(axis=-1)
    rounding = ROUNDING * largest
  others = jnp.where(is_label, -jnp.inf, teacher).max(axis=-1)

  def at_label(x):
    return jnp.take_along_axis(x, index, axis=-1)[:, 0]

  def if_labelled(x):
    return jnp.where(labelled, x, jnp.nan)

  return Rows(
    label=labels,
    teacher=jnp.argmax(teacher, axis=-1).astype(jnp.int32),
    student=jnp.argmax(student, axis=-1).astype(jnp.int32),
    confidence=p_student.max(axis=-1),
    logit_distance=jnp.linalg.norm(difference, axis=-1),
    logit_range=difference.max(axis=-1) - difference.min(axis=-1),
    logit_margin=if_labelled(at_label(teacher) - others - rounding),
    kl=jnp.sum(p_teacher * (log_teacher - log_student), axis=-1),
    total_variation=jnp.minimum(
      jnp.abs(p_teacher - p_student).sum(axis=-1) / 2, 1.0
    ),
    # Not by subtracting: of a probability near one, that leaves little.
    teacher_soft=if_labelled(-jnp.expm1(at_label(log_teacher))),
  )


def from_features(
  z_t: jax.Array,
  z_s: jax.Array,
  labels: jax.Array,
  head: Head,
  joint: dict[str, jax.Array] | None = None,
) -> Rows:
  """Returns the rows of a teacher, and a student read by the same head.

  To be traced: its memory is of K numbers for each row. `compute` goes through
  many rows.

  Args:
    z_t: (N, D).
    z_s: (N, D).
    labels: (N,) int32; -1 where there is none.
    head: h, of `describe`.
    joint: 'kernel' and 'bias' of a reference head r; None for none.
  """
  z_t, z_s = (z.astype(jnp.float32) for z in (z_t, z_s))

  def logits(z, kernel, bias):
    return jnp.dot(z, kernel, precision='highest') + bias

  teacher, student = (logits(z, head.kernel, head.bias) for z in (z_t, z_s))
  norms = jnp.linalg.norm(z_t, axis=-1) + jnp.linalg.norm(z_s, axis=-1)
  rounding = ROUNDING * (norms * head.largest_weight + jnp.abs(head.bias).max())
  rows = from_logits(teacher, student, labels, rounding=rounding)
  label_margin = margin(teacher, jnp.maximum(labels, 0), head, rounding)
  rows = dataclasses.replace(
    rows,
    feature_distance=jnp.linalg.norm(z_s - z_t, axis=-1),
    head_distance=jnp.linalg.norm(
      jnp.dot(z_s - z_t, head.span, precision='highest'), axis=-1
    ),
    flip_margin=margin(teacher, rows.teacher, head, rounding),
    label_margin=jnp.where(labels >= 0, label_margin, jnp.nan),
  )
  if joint is not None:
    predicted = [
      jnp.argmax(logits(z, joint['kernel'], joint['bias']), axis=-1)
      for z in (z_t, z_s)
    ]
    rows = dataclasses.replace(
      rows,
      joint_teacher=predicted[0].astype(jnp.int32),
      joint_student=predicted[1].astype(jnp.int32),
    )
  return rows


def margin(
  logits: jax.Array, classes: jax.Array, head: Head, rounding: jax.Array
) -> jax.Array:
  """Returns min_{j != i} (l_i - l_j - rounding) / ||w_i - w_j||, (N,).

  The distance, in the space of features, to where h does not predict class i;
  negative where it does not. For equal weights the quotient is infinite, and
  its sign that of l_i - l_j: what is tied is not safe.

  Args:
    logits: (N, K).
    classes: i of each row, (N,).
    head: of `describe`.
    rounding: (N,) by how much a difference of logits may be off.
  """
  own = jnp.take_along_axis(logits, classes[:, None], axis=-1)
  gaps = own - logits - rounding[:, None]
  distances = jnp.asarray(head.distances)[classes]
  quotients = jnp.where(
    distances > 0,
    gaps / jnp.where(distances > 0, distances, 1),
    jnp.where(gaps > 0, jnp.inf, -jnp.inf),
  )
  is_own = jax.nn.one_hot(classes, logits.shape[-1], dtype=bool)
  return jnp.where(is_own, jnp.inf, quotients).min(axis=-1)


_from_features = jax.jit(from_features)
_from_logits = jax.jit(from_logits)


def compute(
  z_t: np.ndarray,
  z_s: np.ndarray,
  labels: np.ndarray,
  kernel: np.ndarray,
  bias: np.ndarray,
  *,
  joint: dict[str, np.ndarray] | None = None,
) -> Rows:
  """Returns the rows of a split, on the host; see `from_features`.

  Args:
    z_t: (N, D), the teacher's representation.
    z_s: (N, D), the student's.
    labels: (N,) int; -1 where there is none.
    kernel: (D, K) of the head that reads both.
    bias: (K,).
    joint: 'kernel' and 'bias' of a reference head; None for none.
  """
  head = jax.device_put(describe({'kernel': kernel, 'bias': bias}))
  joint = jax.device_put(joint)
  return _by_chunks(
    lambda *rows: _from_features(*rows, head, joint), z_t, z_s, labels
  )


def compute_from_logits(
  teacher: np.ndarray, student: np.ndarray, labels: np.ndarray
) -> Rows:
  """Returns the rows of a split, on the host; see `from_logits`."""
  return _by_chunks(_from_logits, teacher, student, labels)


def _by_chunks(function, first, second, labels) -> Rows:
  """Returns a function of rows, applied to a chunk at a time."""
  labels = np.asarray(labels, np.int32)
  num = len(labels)
  if not num or len(first) != num or len(second) != num:
    raise ValueError(
      f'{len(first)} and {len(second)} rows for {num} labels: give as many of '
      'each, and at least one'
    )
  parts = []
  for start in range(0, num, CHUNK):
    # The last chunk ends with the last row, so that all are of one shape.
    begin = max(0, min(start, num - CHUNK))
    rows = slice(begin, begin + CHUNK)
    found = function(first[rows], second[rows], labels[rows])
    parts.append(
      jax.tree.map(lambda x, n=start - begin: np.asarray(x)[n:], found)
    )
  return jax.tree.map(lambda *x: np.concatenate(x), *parts)


def sums(rows: Rows, mask: jax.Array) -> dict[str, jax.Array]:
  """Returns what devices and batches add up: counts, and sums of distances.

  Counts are int32, so that their sum is the same however rows are cut.

  Args:
    rows: of a batch, traced; `own` may be None.
    mask: (B,) bool; False rows are not counted.

  Returns:
    Scalars: 'examples', 'labelled', 'disagreement' of teacher and what is
    deployed; of the labelled 'teacher_wrong', 'student_wrong', 'harm' (only the
    teacher right), 'help' (only the student right); sums of 'logit_square',
    ||l_s - l_t||^2, and in the teacher's space 'feature_square',
    ||z_s - z_t||^2, 'certified_agreement' (rho > dz) and 'certified' (rho_y >
    dz).
  """
  labelled = mask & (rows.label >= 0)
  deployed = rows.student if rows.own is None else rows.own
  teacher_wrong, student_wrong = (
    labelled & (x != rows.label) for x in (rows.teacher, deployed)
  )

  def count(x):
    return jnp.sum(x, dtype=jnp.int32)

  def total(x):
    return jnp.sum(jnp.where(mask, x, 0.0))

  result = {
    'examples': count(mask),
    'labelled': count(labelled),
    'disagreement': count(mask & (rows.teacher != deployed)),
    'teacher_wrong': count(teacher_wrong),
    'student_wrong': count(student_wrong),
    'harm': count(student_wrong & ~teacher_wrong),
    'help': count(teacher_wrong & ~student_wrong),
    'logit_square': total(jnp.square(rows.logit_distance)),
  }
  if rows.feature_distance is not None:
    result['feature_square'] = total(jnp.square(rows.feature_distance))
    far = reach(rows.head_distance)
    result['certified_agreement'] = count(mask & (rows.flip_margin > far))
    result['certified'] = count(labelled & (rows.label_margin > far))
  return result


def summarize(
  totals: dict[str, Any], num_features: int, num_classes: int
) -> dict[str, float]:
  """Returns the means that `sums` stand for.

  Args:
    totals: of all batches.
    num_features: D.
    num_classes: K.

  Returns:
    Shares of the labelled examples: 'teacher_error', 'student_error', 'harm',
    'help' and 'certified'; of all examples 'certified_agreement'; and, as means
    over all elements as the losses are, 'logit_mse' and 'feature_mse'.
  """
  num, labelled = float(totals['examples']), float(totals['labelled'])
  result = {}
  if labelled:
    for name, total in (
      ('teacher_error', 'teacher_wrong'),
      ('student_error', 'student_wrong'),
      *((name, name) for name in ('harm', 'help', 'certified')),
    ):
      if total in totals:
        result[name] = float(totals[total]) / labelled
  result['logit_mse'] = float(totals['logit_square']) / num / num_classes
  if 'feature_square' in totals:
    result['feature_mse'] = float(totals['feature_square']) / num / num_features
    result['certified_agreement'] = float(totals['certified_agreement']) / num
  return result


def reach(distance: Any) -> Any:
  """Returns a distance, or a multiple of one, as long as it can truly be."""
  return (1 + ROUNDING) * distance
