"""PEFD: several projections of a student's features, averaged, by their angle.

Source: Chen et al. 2022, "Improved Feature Distillation via Projector
Ensemble", https://arxiv.org/abs/2210.15274.
"""

import dataclasses

import flax.linen as nn
import jax.numpy as jnp

from ijckd_jax.distillation.methods import auxiliary
from ijckd_jax.distillation.methods import base
from ijckd_jax.models import losses
from ijckd_jax.runtime import config_utils


class Projections(auxiliary.Auxiliary, kw_only=True):
  """The mean of linear maps with ReLUs to the teacher's pooled width.

  Attributes:
    number: of them.
  """

  number: int

  @nn.compact
  def __call__(self, student, teacher, *, train):
    """Returns (B, D) of the teacher's width."""
    del train
    x, width = student.pooled, teacher.pooled.shape[-1]
    found = [
      nn.relu(self.linear(x, width, f'projection_{i}'))
      for i in range(self.number)
    ]
    return sum(found) / self.number


@dataclasses.dataclass(frozen=True)
class Method(base.Method):
  """Cross-entropy, and one less the cosine of projected and teacher's features.

  The weight is the authors' for resnet32x4 -> resnet8x4 on CIFAR-100.

  Attributes:
    cross_entropy_weight: weight of the labels' cross-entropy.
    weight: of one less the cosine, mean over B.
    number: of projections.
  """

  cross_entropy_weight: float = 1.0
  weight: float = 25.0
  number: int = 3

  def __post_init__(self):
    config_utils.check_positive('number', self.number)

  def auxiliary(self, student, teacher):
    """Returns the projections."""
    del student, teacher
    return Projections(number=self.number)

  def loss(self, student, teacher, batch):
    """Returns the weighted sum and its terms."""

    def angle():
      pairs = map(losses.normalize, (student.auxiliary, teacher.pooled))
      cosines = jnp.sum(jnp.multiply(*pairs), axis=-1)
      return jnp.mean(1 - cosines)

    return losses.combine(
      cross_entropy=(
        self.cross_entropy_weight,
        lambda: losses.cross_entropy(student.logits, batch['label']),
      ),
      angle=(self.weight, angle),
    )
