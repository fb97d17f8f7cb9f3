"""Metrics as sums over examples, that devices and batches add up."""

import jax
import jax.numpy as jnp
import numpy as np

NUM_BINS = 15


def prediction_sums(
  logits: jax.Array, labels: jax.Array, mask: jax.Array
) -> dict[str, jax.Array]:
  """Returns what `summarize` needs of one network's predictions.

  Args:
    logits: (B, K).
    labels: (B,) int32; -1 rows are not counted.
    mask: (B,) bool; False rows are not counted.

  Returns:
    Sums over the counted rows: 'examples', 'top1', 'nll' and, for more than 5
    classes, 'top5' (scalars), and of calibration bins by confidence
    'bin_examples', 'bin_confidence', 'bin_top1' (15,).
  """
  counted = (mask & (labels >= 0)).astype(jnp.float32)
  labels = jnp.maximum(labels, 0)
  log_probs = jax.nn.log_softmax(logits.astype(jnp.float32))
  label_log_probs = jnp.take_along_axis(log_probs, labels[:, None], axis=1)
  correct = counted * (jnp.argmax(logits, axis=-1) == labels)
  confidence = jnp.exp(jnp.max(log_probs, axis=-1))
  bins = jnp.clip(jnp.ceil(confidence * NUM_BINS) - 1, 0, NUM_BINS - 1)
  bins = bins.astype(jnp.int32)

  def by_bin(values):
    return jax.ops.segment_sum(values, bins, NUM_BINS)

  sums = {
    'examples': jnp.sum(counted),
    'top1': jnp.sum(correct),
    'nll': -jnp.sum(jnp.where(counted > 0, label_log_probs[:, 0], 0.0)),
    'bin_examples': by_bin(counted),
    'bin_confidence': by_bin(jnp.where(counted > 0, confidence, 0.0)),
    'bin_top1': by_bin(correct),
  }
  if logits.shape[-1] > 5:
    _, top5 = jax.lax.top_k(logits, 5)
    in_top5 = jnp.any(top5 == labels[:, None], axis=1)
    sums['top5'] = jnp.sum(counted * in_top5)
  return sums


def pair_sums(
  student_logits: jax.Array, teacher_logits: jax.Array, mask: jax.Array
) -> dict[str, jax.Array]:
  """Returns sums of agreement and of KL(teacher || student) in nats.

  Args:
    student_logits: (B, K).
    teacher_logits: (B, K).
    mask: (B,) bool; labels are not needed.
  """
  log_student = jax.nn.log_softmax(student_logits.astype(jnp.float32))
  log_teacher = jax.nn.log_softmax(teacher_logits.astype(jnp.float32))
  kl = jnp.sum(jnp.exp(log_teacher) * (log_teacher - log_student), axis=-1)
  same = jnp.argmax(student_logits, -1) == jnp.argmax(teacher_logits, -1)
  return {
    'examples': jnp.sum(mask, dtype=jnp.float32),
    'agreement': jnp.sum(mask & same, dtype=jnp.float32),
    'kl': jnp.sum(jnp.where(mask, kl, 0.0)),
  }


def summarize(sums: dict[str, np.ndarray]) -> dict[str, float]:
  """Returns the means that `prediction_sums` stand for.

  Returns:
    'top1' and, for more than 5 classes, 'top5' as shares of the examples; 'nll'
    in nats; 'ece', the expected calibration error over 15 bins of equal width
    (Guo et al. 2017, https://arxiv.org/abs/1706.04599).
  """
  count = sums['examples']
  result = {'top1': float(sums['top1'] / count)}
  if 'top5' in sums:
    result['top5'] = float(sums['top5'] / count)
  result['nll'] = float(sums['nll'] / count)
  gaps = np.abs(sums['bin_top1'] - sums['bin_confidence'])
  result['ece'] = float(np.sum(gaps) / count)
  return result


def summarize_pair(sums: dict[str, np.ndarray]) -> dict[str, float]:
  """Returns the means that `pair_sums` stand for."""
  return {
    name: float(sums[name] / sums['examples']) for name in ('agreement', 'kl')
  }
