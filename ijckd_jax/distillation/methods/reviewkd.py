"""ReviewKD: a student's deep maps, fused into its shallow ones, match all.

Source: Chen et al. 2021, "Distilling Knowledge via Knowledge Review",
https://arxiv.org/abs/2104.09044; warm-up as in mdistiller.
"""

import dataclasses

import flax.linen as nn
import jax.numpy as jnp
import numpy as np

from ijckd_jax.distillation.methods import auxiliary
from ijckd_jax.distillation.methods import base
from ijckd_jax.models import losses
from ijckd_jax.runtime import config_utils

# Sides to which maps are averaged too, each counting half of the one before.
SIDES = (4, 2, 1)
KAIMING_UNIFORM = nn.initializers.variance_scaling(1.0, 'fan_in', 'uniform')


class Fusions(auxiliary.Auxiliary, kw_only=True):
  """From the pooled features back to the first stage, each fused with the last.

  A level is brought to one width; where it is not the deepest, two gates that
  are a function of both mix it with the one before, which is scaled up to its
  size; a 3x3 convolution brings the mixture to the teacher's width, after it
  was scaled to the teacher's size. Each convolution but the gates' has a batch
  norm.

  Attributes:
    width: between the two convolutions of a fusion, at most.
    before_relu: whether the student's maps are those before their last ReLU.
  """

  width: int
  before_relu: bool

  @nn.compact
  def __call__(self, student, teacher, *, train):
    """Returns (map, target) of each level, the deepest first."""
    width = min(self.width, student.pooled.shape[-1])
    found, fused = [], None
    levels = _levels(student, teacher, self.before_relu)
    for number, (x, y) in enumerate(levels):
      x = self.conv(width, init=KAIMING_UNIFORM, name=f'in_{number}')(x)
      x = self.norm(x, train, name=f'in_norm_{number}')
      if fused is not None:
        fused = _resize(fused, x.shape[1:3])
        both = jnp.concatenate([x, fused], axis=-1)
        gates = self.conv(2, use_bias=True, name=f'gates_{number}')(both)
        gates = nn.sigmoid(gates)
        x = x * gates[..., :1] + fused * gates[..., 1:]
      fused = x
      x = _resize(x, y.shape[1:3])
      x = self.conv(y.shape[-1], 3, init=KAIMING_UNIFORM, name=f'out_{number}')(
        x
      )
      found.append((self.norm(x, train, name=f'out_norm_{number}'), y))
    return found


def _levels(student, teacher, before_relu: bool):
  """Returns pairs of maps, pooled features of 1x1 first, then backwards.

  The teacher's are those before their last ReLU.
  """
  stages = (student.before if before_relu else ()) or student.stages
  pairs = losses.pair_stages(stages, teacher.before or teacher.stages)
  pooled = tuple(x.pooled[:, None, None, :] for x in (student, teacher))
  return [pooled, *reversed(pairs)]


def _resize(x, size):
  """Returns a map of another size: row i is floor(i H / h), columns alike."""
  if x.shape[1:3] == tuple(size):
    return x
  rows, columns = (
    np.arange(new) * old // new
    for old, new in zip(x.shape[1:3], size, strict=True)
  )
  return x[:, rows][:, :, columns]


@dataclasses.dataclass(frozen=True)
class Method(base.Method):
  """Cross-entropy, and the squared error of fused maps at several scales.

  Attributes:
    cross_entropy_weight: weight of the labels' cross-entropy.
    weight: of the squared error: mean over elements and scales, summed over
      levels. The authors take 0.6, 1, 5 or 8 for their pairs.
    warm_up_epochs: over which that weight grows from nothing; 1 on ImageNet.
    width: of the maps while they are fused, at most.
    before_relu: whether the student's maps are taken before their last ReLU, as
      on ImageNet.
  """

  cross_entropy_weight: float = 1.0
  weight: float = 5.0
  warm_up_epochs: float = 20.0
  width: int = 512
  before_relu: bool = False

  def __post_init__(self):
    config_utils.check_positive('width', self.width)

  def auxiliary(self, student, teacher):
    """Returns the fusions."""
    del student, teacher
    return Fusions(width=self.width, before_relu=self.before_relu)

  def loss(self, student, teacher, batch):
    """Returns the weighted sum and its terms."""
    del teacher

    def review():
      total = sum(_distance(x, y) for x, y in student.auxiliary)
      return losses.warm_up(batch, self.warm_up_epochs) * total

    return losses.combine(
      cross_entropy=(
        self.cross_entropy_weight,
        lambda: losses.cross_entropy(student.logits, batch['label']),
      ),
      review=(self.weight, review),
    )


def _distance(x, y):
  """Returns the mean squared error over scales, weighted 1, 1/2, 1/4, 1/8."""
  x, y = map(losses.at_least_float32, (x, y))
  total, weights, weight = losses.mean_squared_error(x, y), 1.0, 1.0
  for side in SIDES:
    if side >= min(x.shape[1:3]):
      continue
    weight /= 2
    weights += weight
    total += weight * losses.mean_squared_error(
      *(losses.adaptive_average_pool(z, (side, side)) for z in (x, y))
    )
  return total / weights
