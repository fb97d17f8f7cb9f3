"""KD: match the teacher's softened predictions, or its logits.

Source: Hinton et al. 2015, "Distilling the Knowledge in a Neural Network",
https://arxiv.org/abs/1503.02531; weights as in RepDistiller's tables. Logits:
Ba and Caruana 2014, "Do Deep Nets Really Need to be Deep?",
https://arxiv.org/abs/1312.6184.
"""

import dataclasses

from ijckd_jax.distillation.methods import base
from ijckd_jax.models import losses
from ijckd_jax.runtime import config_utils


@dataclasses.dataclass(frozen=True)
class Method(base.Method):
  """Cross-entropy and T^2 KL(teacher || student), by the student's own head.

  Attributes:
    cross_entropy_weight: weight of the labels' cross-entropy.
    weight: of the divergence.
    logit_weight: weight of the logits' squared error, mean over B K.
    temperature: T.
    standardize: standardise logits first (losses.standardize_logits); its
      authors take weight=9 and temperature=2 then.
  """

  cross_entropy_weight: float = 0.1
  weight: float = 0.9
  logit_weight: float = 0.0
  temperature: float = 4.0
  standardize: bool = False

  def __post_init__(self):
    config_utils.check_positive('temperature', self.temperature)

  def loss(self, student, teacher, batch):
    """Returns the weighted sum and its terms."""
    return losses.combine(
      cross_entropy=(
        self.cross_entropy_weight,
        lambda: losses.cross_entropy(student.logits, batch['label']),
      ),
      distillation=(
        self.weight,
        lambda: losses.distillation(
          student.logits,
          teacher.logits,
          self.temperature,
          standardize=self.standardize,
        ),
      ),
      logit=(
        self.logit_weight,
        lambda: losses.mean_squared_error(
          *losses.read_logits(student.logits, teacher.logits, self.standardize)
        ),
      ),
    )
