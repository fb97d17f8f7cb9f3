"""SP: images that are alike to the teacher are alike to the student.

Source: Tung and Mori 2019, "Similarity-Preserving Knowledge Distillation",
https://arxiv.org/abs/1907.09682; weighted as in RepDistiller.
"""

import dataclasses

import jax.numpy as jnp

from ijckd_jax.distillation.methods import base
from ijckd_jax.models import losses


@dataclasses.dataclass(frozen=True)
class Method(base.Method):
  """Cross-entropy, and the squared error of the batch's similarities.

  It compares the images of one device (and of one piece, where the batch is
  worked through in pieces).

  Attributes:
    cross_entropy_weight: weight of the labels' cross-entropy.
    weight: of the similarities' squared error, mean over B^2.
  """

  cross_entropy_weight: float = 1.0
  weight: float = 3000.0

  def loss(self, student, teacher, batch):
    """Returns the weighted sum and its terms."""
    return losses.combine(
      cross_entropy=(
        self.cross_entropy_weight,
        lambda: losses.cross_entropy(student.logits, batch['label']),
      ),
      similarity=(
        self.weight,
        lambda: losses.mean_squared_error(
          _similarities(student.stages[-1]), _similarities(teacher.stages[-1])
        ),
      ),
    )


def _similarities(x):
  """Returns (B, B): of the last stage's maps, rows of length one."""
  x = losses.at_least_float32(x).reshape(len(x), -1)
  return losses.normalize(jnp.matmul(x, x.T, precision='highest'))
