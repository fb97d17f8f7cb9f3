"""FitNet: a student's middle map regresses the teacher's.

Source: Romero et al. 2015, "FitNets: Hints for Thin Deep Nets",
https://arxiv.org/abs/1412.6550; in one stage, weighted as in RepDistiller.
"""

import dataclasses

import flax.linen as nn

from ijckd_jax.distillation.methods import auxiliary
from ijckd_jax.distillation.methods import base
from ijckd_jax.models import layers
from ijckd_jax.models import losses
from ijckd_jax.runtime import config_utils


class Regressor(auxiliary.Auxiliary, kw_only=True):
  """A convolution that brings the hinted map to the teacher's size, BN, ReLU.

  Of stride 2 where the student's is twice as large, transposed where it is half
  as large, of a window that leaves the teacher's size where it is larger, and
  else 3x3, for which the teacher's map is averaged to the student's size.

  Attributes:
    stage: of Features.stages.
  """

  stage: int

  @nn.compact
  def __call__(self, student, teacher, *, train):
    x, y = student.stages[self.stage], teacher.stages[self.stage]
    ours, theirs, width = x.shape[1:3], y.shape[1:3], y.shape[-1]
    pairs = list(zip(ours, theirs, strict=True))
    if all(a == 2 * b for a, b in pairs):
      x = self.conv(width, 3, 2, use_bias=True)(x)
    elif all(2 * a == b for a, b in pairs):
      x = nn.ConvTranspose(
        width,
        (4, 4),
        (2, 2),
        padding=((2, 2), (2, 2)),
        kernel_init=layers.TORCH_DEFAULT,
        dtype=self.dtype,
      )(x)
    elif all(a >= b for a, b in pairs):
      window = tuple(1 + a - b for a, b in pairs)
      x = nn.Conv(
        width,
        window,
        padding='VALID',
        kernel_init=layers.TORCH_DEFAULT,
        dtype=self.dtype,
      )(x)
    else:
      x = self.conv(width, 3, use_bias=True)(x)
    return nn.relu(self.norm(x, train))


@dataclasses.dataclass(frozen=True)
class Method(base.Method):
  """Cross-entropy, and the squared error of one stage's map after a regressor.

  Attributes:
    cross_entropy_weight: weight of the labels' cross-entropy.
    weight: of the maps' squared error, mean over all elements.
    stage: which one of Features.stages, as `tap=stageN` counts them.
  """

  cross_entropy_weight: float = 1.0
  weight: float = 100.0
  stage: int = 2

  def auxiliary(self, student, teacher):
    """Returns the regressor."""
    last = min(len(student.stages), len(teacher.stages)) - 1
    if not 0 <= self.stage <= last:
      raise config_utils.UserError(
        f'method.stage={self.stage}: both networks have stages 0 to {last}; a '
        'student has none after its tap'
      )
    return Regressor(stage=self.stage)

  def loss(self, student, teacher, batch):
    """Returns the weighted sum and its terms."""

    def hint():
      x = student.auxiliary
      y = losses.adaptive_average_pool(teacher.stages[self.stage], x.shape[1:3])
      return losses.mean_squared_error(x, y)

    return losses.combine(
      cross_entropy=(
        self.cross_entropy_weight,
        lambda: losses.cross_entropy(student.logits, batch['label']),
      ),
      hint=(self.weight, hint),
    )
