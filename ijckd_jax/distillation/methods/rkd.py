"""RKD: distances and angles between images as the teacher has them.

Source: Park et al. 2019, "Relational Knowledge Distillation",
https://arxiv.org/abs/1904.05068; weighted as in RepDistiller.
"""

import dataclasses

import jax.numpy as jnp
import optax

from ijckd_jax.distillation.methods import base
from ijckd_jax.models import losses


@dataclasses.dataclass(frozen=True)
class Method(base.Method):
  """Cross-entropy, and relations between pooled features.

  It compares the images of one device (and of one piece, where the batch is
  worked through in pieces), and takes B^3 numbers for the angles.

  Attributes:
    cross_entropy_weight: weight of the labels' cross-entropy.
    distance_weight: of the smooth L1 distance between the Euclidean distances
      of all pairs, each over their mean; mean over B^2. As in RepDistiller, the
      mean is over the pairs of different rows, equal images among them.
    angle_weight: of the smooth L1 distance between the cosines of the angles of
      all triples; mean over B^3.
  """

  cross_entropy_weight: float = 1.0
  distance_weight: float = 25.0
  angle_weight: float = 50.0

  def loss(self, student, teacher, batch):
    """Returns the weighted sum and its terms."""

    def between(relations):
      return jnp.mean(
        optax.losses.huber_loss(
          relations(losses.at_least_float32(student.pooled)),
          relations(losses.at_least_float32(teacher.pooled)),
        )
      )

    return losses.combine(
      cross_entropy=(
        self.cross_entropy_weight,
        lambda: losses.cross_entropy(student.logits, batch['label']),
      ),
      distance=(self.distance_weight, lambda: between(_distances)),
      angle=(self.angle_weight, lambda: between(_angles)),
    )


def _distances(x):
  """Returns (B, B) Euclidean distances over the mean off the diagonal."""
  square = jnp.sum(jnp.square(x[:, None] - x[None]), axis=-1)
  distances = losses.safe_sqrt(square)
  mean = jnp.sum(distances) / max(len(x) * (len(x) - 1), 1)
  return distances / jnp.where(mean > 0, mean, 1.0)


def _angles(x):
  """Returns (B, B, B) cosines of the angle at the first of three images."""
  directions = losses.normalize(x[None] - x[:, None])
  return jnp.einsum('ijd,ikd->ijk', directions, directions, precision='highest')
