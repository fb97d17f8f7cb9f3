"""WTTM: match the teacher's softened prediction by one that is not softened.

Source: Zheng and Yang 2024, "Knowledge Distillation Based on Transformed
Teacher Matching", https://arxiv.org/abs/2402.11148.
"""

import dataclasses

import jax
import jax.numpy as jnp
import optax

from ijckd_jax.distillation.methods import base
from ijckd_jax.models import losses
from ijckd_jax.runtime import config_utils


@dataclasses.dataclass(frozen=True)
class Method(base.Method):
  """Cross-entropy, and sum(p^c) KL(p^c / sum(p^c) || q).

  p is the teacher's prediction, q the student's. The factor sum(p^c) is large
  where the teacher is unsure; TTM is the same without it (weighted=False). On
  CIFAR-100 the authors take exponent=0.1 weight=45 for TTM from vgg13 to vgg8.
  For WTTM they publish only the values that they use together with CRD, which
  are the defaults here.

  Attributes:
    cross_entropy_weight: weight of the labels' cross-entropy.
    weight: of the divergence, mean over B.
    exponent: c, above zero; 1 / c is the teacher's temperature.
    weighted: whether the factor is there.
  """

  cross_entropy_weight: float = 1.0
  weight: float = 4.0
  exponent: float = 0.2
  weighted: bool = True

  def __post_init__(self):
    config_utils.check_positive('exponent', self.exponent)

  def loss(self, student, teacher, batch):
    """Returns the weighted sum and its terms."""

    def divergence():
      ours, theirs = (
        jax.nn.log_softmax(losses.at_least_float32(x.logits))
        for x in (student, teacher)
      )
      powers = self.exponent * theirs
      rows = optax.losses.kl_divergence_with_log_targets(
        ours, jax.nn.log_softmax(powers)
      )
      if self.weighted:
        rows = jnp.sum(jnp.exp(powers), axis=-1) * rows
      return jnp.mean(rows)

    return losses.combine(
      cross_entropy=(
        self.cross_entropy_weight,
        lambda: losses.cross_entropy(student.logits, batch['label']),
      ),
      divergence=(self.weight, divergence),
    )
