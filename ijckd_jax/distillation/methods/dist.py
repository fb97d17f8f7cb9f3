"""DIST: predictions that correlate with the teacher's, by image and by class.

Source: Huang et al. 2022, "Knowledge Distillation from A Stronger Teacher",
https://arxiv.org/abs/2205.10536.
"""

import dataclasses

import jax
import jax.numpy as jnp

from ijckd_jax.distillation.methods import base
from ijckd_jax.models import losses
from ijckd_jax.runtime import config_utils

EPSILON = 1e-8  # Added to the product of the norms, as the authors do.


@dataclasses.dataclass(frozen=True)
class Method(base.Method):
  """Cross-entropy, and T^2 (1 - Pearson's correlation) of softened predictions.

  Within classes it compares the images of one device (and of one piece, where
  the batch is worked through in pieces).

  Attributes:
    cross_entropy_weight: weight of the labels' cross-entropy.
    inter_weight: of the correlation over classes, mean over images. The authors
      weigh it by 2, and beta is 1.
    intra_weight: of that over images, mean over classes; 2, and gamma is 1.
    temperature: T; the authors take 1 on ImageNet, and 4 on CIFAR-100.
    standardize: standardise logits first (losses.standardize_logits).
  """

  cross_entropy_weight: float = 1.0
  inter_weight: float = 2.0
  intra_weight: float = 2.0
  temperature: float = 1.0
  standardize: bool = False

  def __post_init__(self):
    config_utils.check_positive('temperature', self.temperature)

  def loss(self, student, teacher, batch):
    """Returns the weighted sum and its terms."""
    ours, theirs = (
      jax.nn.softmax(logits / self.temperature)
      for logits in losses.read_logits(
        student.logits, teacher.logits, self.standardize
      )
    )

    def distance(x, y):
      return self.temperature**2 * (1 - jnp.mean(_correlation(x, y)))

    return losses.combine(
      cross_entropy=(
        self.cross_entropy_weight,
        lambda: losses.cross_entropy(student.logits, batch['label']),
      ),
      inter=(self.inter_weight, lambda: distance(ours, theirs)),
      intra=(self.intra_weight, lambda: distance(ours.T, theirs.T)),
    )


def _correlation(x, y):
  """Returns Pearson's correlation of each row."""
  x, y = (z - jnp.mean(z, axis=-1, keepdims=True) for z in (x, y))
  norms = (losses.safe_sqrt(jnp.sum(jnp.square(z), axis=-1)) for z in (x, y))
  first, second = norms
  return jnp.sum(x * y, axis=-1) / (first * second + EPSILON)
