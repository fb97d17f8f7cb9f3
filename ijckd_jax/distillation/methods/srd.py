"""SRD: a linear projection, batch norm of both features, and a logarithm.

Source: Miles and Mikolajczyk 2024, "Understanding the Role of the Projector in
Knowledge Distillation", https://arxiv.org/abs/2303.11098.
"""

import dataclasses

import flax.linen as nn
import jax.numpy as jnp

from ijckd_jax.distillation.methods import auxiliary
from ijckd_jax.distillation.methods import base
from ijckd_jax.models import losses

EPSILON = 1e-4  # Added to the variance.
POWER = 4
SMALLEST = 1e-12  # Of what the logarithm is taken: equal features give no -inf.


class Projection(auxiliary.Auxiliary):
  """A linear map of the pooled features to the teacher's width."""

  @nn.compact
  def __call__(self, student, teacher, *, train):
    """Returns (B, D) of the teacher's width."""
    del train
    width = teacher.pooled.shape[-1]
    return self.linear(student.pooled, width, 'projection')


@dataclasses.dataclass(frozen=True)
class Method(base.Method):
  """Cross-entropy, log sum |x - y|^4 of normalised features, and KL.

  Both features are standardised over the images of one device (and of one
  piece, where the batch is worked through in pieces), over which the sum is
  taken too: of one image the term is constant. The weights are the authors' for
  resnet34 -> resnet18 on ImageNet.

  Attributes:
    cross_entropy_weight: weight of the labels' cross-entropy.
    weight: of the logarithm.
    distillation_weight: of KL between the predictions, mean over B, at
      temperature 1.
  """

  cross_entropy_weight: float = 1.0
  weight: float = 2.0
  distillation_weight: float = 1.0

  def auxiliary(self, student, teacher):
    """Returns the projection."""
    del student, teacher
    return Projection()

  def loss(self, student, teacher, batch):
    """Returns the weighted sum and its terms."""

    def distance():
      x, y = (
        losses.standardize(z, 0, EPSILON)
        for z in (student.auxiliary, teacher.pooled)
      )
      return jnp.log(jnp.maximum(jnp.sum((x - y) ** POWER), SMALLEST))

    return losses.combine(
      cross_entropy=(
        self.cross_entropy_weight,
        lambda: losses.cross_entropy(student.logits, batch['label']),
      ),
      feature=(self.weight, distance),
      distillation=(
        self.distillation_weight,
        lambda: losses.distillation(student.logits, teacher.logits, 1.0),
      ),
    )
