"""AT: attend where the teacher does.

Source: Zagoruyko and Komodakis 2017, "Paying More Attention to Attention",
https://arxiv.org/abs/1612.03928; weighted as in RepDistiller.
"""

import dataclasses

import jax.numpy as jnp

from ijckd_jax.distillation.methods import base
from ijckd_jax.models import losses


@dataclasses.dataclass(frozen=True)
class Method(base.Method):
  """Cross-entropy, and the squared error of normalised attention maps.

  Attributes:
    cross_entropy_weight: weight of the labels' cross-entropy.
    weight: of the attention's squared error: mean over batch and positions,
      summed over stages.
    pairing: where networks have different numbers of stages, whether these are
      paired from the 'first', as in RepDistiller, or from the 'last'.
  """

  cross_entropy_weight: float = 1.0
  weight: float = 1000.0
  pairing: str = 'first'

  def __post_init__(self):
    losses.check_pairing(self.pairing)

  def loss(self, student, teacher, batch):
    """Returns the weighted sum and its terms."""
    return losses.combine(
      cross_entropy=(
        self.cross_entropy_weight,
        lambda: losses.cross_entropy(student.logits, batch['label']),
      ),
      attention=(
        self.weight,
        lambda: sum(
          _distance(*pair)
          for pair in losses.pair_stages(
            student.stages, teacher.stages, self.pairing
          )
        ),
      ),
    )


def _distance(x, y):
  """Returns it of one stage; the larger map is averaged down first."""
  size = losses.smaller_size(x, y)
  x, y = map(losses.at_least_float32, (x, y))
  return losses.mean_squared_error(
    *(_attention(losses.adaptive_average_pool(z, size)) for z in (x, y))
  )


def _attention(x):
  """Returns (B, H W): the channels' mean square, as a vector of length one."""
  square = jnp.mean(jnp.square(x), axis=-1)
  return losses.normalize(square.reshape(len(x), -1))
