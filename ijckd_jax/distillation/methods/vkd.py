"""VkD: an orthogonal projection onto the teacher's layer-normalised features.

Source: Miles et al. 2024, "VkD: Improving Knowledge Distillation using
Orthogonal Projections", https://arxiv.org/abs/2403.06213.
"""

import dataclasses

import jax.numpy as jnp
import optax

from ijckd_jax.distillation import connectors
from ijckd_jax.distillation.methods import base
from ijckd_jax.models import losses

EPSILON = 1e-5  # Added to the variance, as layer norm does.


@dataclasses.dataclass(frozen=True)
class Method(base.Method):
  """Cross-entropy of the own head, and projected features' smooth L1 distance.

  The teacher's pooled features are standardised image by image.

  Attributes:
    cross_entropy_weight: weight of the labels' cross-entropy.
    weight: of the smooth L1 distance, mean over B D; the paper's weights belong
      to its recipes, one is this library's.
    tap: the student's map whose pooled features are projected, and that its own
      head reads, see base.Method.
  """

  cross_entropy_weight: float = 1.0
  weight: float = 1.0
  tap: str = 'final'

  def build_connector(self, student, teacher):
    """Returns the projection."""
    del student
    return connectors.build('orthogonal', teacher)

  def loss(self, student, teacher, batch):
    """Returns the weighted sum and its terms."""
    return losses.combine(
      cross_entropy=(
        self.cross_entropy_weight,
        lambda: losses.cross_entropy(student.logits, batch['label']),
      ),
      feature=(
        self.weight,
        lambda: jnp.mean(
          optax.losses.huber_loss(
            losses.at_least_float32(student.connected.pooled),
            losses.standardize(teacher.pooled, -1, EPSILON),
          )
        ),
      ),
    )
