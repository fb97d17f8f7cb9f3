"""VID: keep what a student's maps say of the teacher's.

Source: Ahn et al. 2019, "Variational Information Distillation for Knowledge
Transfer", https://arxiv.org/abs/1904.05835; weighted as in RepDistiller.
"""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from ijckd_jax.distillation.methods import auxiliary
from ijckd_jax.distillation.methods import base
from ijckd_jax.models import losses

START_VARIANCE = 5.0
MIN_VARIANCE = 1e-5


class Regressors(auxiliary.Auxiliary, kw_only=True):
  """Of each pair of stages a mean of the teacher's map, and its variance.

  Three 1x1 convolutions with ReLUs between; the variance is a trained number
  for each channel.

  Attributes:
    pairing: of losses.pair_stages.
  """

  pairing: str

  @nn.compact
  def __call__(self, student, teacher, *, train):
    """Returns (mean, target, variance) of each pair, of one size."""
    del train
    found = []
    pairs = losses.pair_stages(student.stages, teacher.stages, self.pairing)
    for number, (x, y) in enumerate(pairs):
      size, width = losses.smaller_size(x, y), y.shape[-1]
      x, y = (losses.adaptive_average_pool(z, size) for z in (x, y))
      for layer in range(3):
        x = x if layer == 0 else nn.relu(x)
        x = self.conv(width, name=f'mean_{number}_{layer}')(x)
      rho = self.param(
        f'scale_{number}',
        nn.initializers.constant(
          np.log(np.expm1(START_VARIANCE - MIN_VARIANCE))
        ),
        (width,),
      )
      found.append((x, y, jax.nn.softplus(rho) + MIN_VARIANCE))
    return found


@dataclasses.dataclass(frozen=True)
class Method(base.Method):
  """Cross-entropy, and the Gaussian log-likelihood of the teacher's maps.

  Attributes:
    cross_entropy_weight: weight of the labels' cross-entropy.
    weight: of the negative log-likelihood but for its constant: mean over all
      elements of a stage, summed over stages.
    pairing: where networks have different numbers of stages, whether these are
      paired from the 'first', as in RepDistiller, or from the 'last'.
  """

  cross_entropy_weight: float = 1.0
  weight: float = 1.0
  pairing: str = 'first'

  def __post_init__(self):
    losses.check_pairing(self.pairing)

  def auxiliary(self, student, teacher):
    """Returns the regressors, whose variances are trained."""
    del student, teacher
    return Regressors(pairing=self.pairing)

  def loss(self, student, teacher, batch):
    """Returns the weighted sum and its terms."""
    del teacher

    def likelihood(*found):
      mean, target, variance = map(losses.at_least_float32, found)
      square = jnp.square(mean - target) / variance
      return jnp.mean((square + jnp.log(variance)) / 2)

    return losses.combine(
      cross_entropy=(
        self.cross_entropy_weight,
        lambda: losses.cross_entropy(student.logits, batch['label']),
      ),
      information=(
        self.weight,
        lambda: sum(likelihood(*found) for found in student.auxiliary),
      ),
    )
