"""What the networks that a run ends with cost, beside what they are worth."""

import logging
from typing import Any

import jax

from ijckd_jax.evaluation import cost
from ijckd_jax.runtime import config_utils

# Number of images that are timed together.
BATCH_SIZE = 64

logger = logging.getLogger('ijckd_jax')


def measure(exp, bundle) -> dict[str, dict[str, Any]]:
  """Returns what a student and its teacher cost when they predict.

  Args:
    exp: experiment.Experiment.
    bundle: bundles.Bundle of the student.

  Returns:
    Each number of cost.of_network for 'student' and 'teacher', by its name;
    None without a teacher, and where it could not be measured, which is logged.
  """
  network, teacher = bundle.network, exp.teacher
  costs = {
    'student': _measure(
      lambda arrays, x: network(arrays, network.preprocessing(x)),
      bundle.variables,
      exp,
    ),
    'teacher': teacher and _measure(teacher, teacher.arrays, exp),
  }
  return {
    key: {who: found and found[key] for who, found in costs.items()}
    for key in ('multiply_adds', 'weight_bytes', 'milliseconds')
  }


def _measure(fn, arrays, exp) -> dict[str, Any] | None:
  """Returns what a network costs: `fn(arrays, images)` gives its outputs."""

  def predict(arrays, images):
    outputs = fn(arrays, images)
    # A network without classes has empty logits: XLA would leave out all of it.
    return outputs.logits, outputs.pooled

  # No device is given more images than in an evaluation.
  most = max(1, exp.config.eval_batch_size // jax.device_count())
  try:
    return cost.of_network(
      predict, arrays, tuple(exp.dataset.image_shape), min(BATCH_SIZE, most)
    )
  except Exception as error:  # Whatever it is, it must not cost the run.
    logger.warning(
      'what a network costs is not measured: %s: %s',
      type(error).__name__,
      config_utils.short(error),
    )
    return None
