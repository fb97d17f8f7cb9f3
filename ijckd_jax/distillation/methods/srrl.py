"""SRRL: the teacher's classifier regularises a student with its own.

Source: Yang et al. 2021, "Knowledge Distillation via Softmax Regression
Representation Learning", https://openreview.net/forum?id=ZzwDy_wiWv. The
defaults are the official code's. SimKD's toolbox has another variant:
connects='pooled', distillation_weight=1.
"""

import dataclasses

from ijckd_jax.distillation import connectors
from ijckd_jax.distillation.methods import base
from ijckd_jax.models import losses
from ijckd_jax.runtime import config_utils

CONNECTS = ('map', 'pooled')


@dataclasses.dataclass(frozen=True)
class Method(base.Method):
  """Pooled features and logits match the teacher's; the own head predicts.

  Attributes:
    cross_entropy_weight: weight of the own head's cross-entropy.
    feature_weight: weight of the pooled features' squared error, mean over B D.
    logit_weight: weight of the squared error, mean over B K, between the
      teacher's head on the student's features and on its own.
    distillation_weight: weight of T^2 KL between the own head's predictions and
      the teacher's; 0 in the official code, 1 in SimKD's toolbox.
    temperature: T of that term.
    standardize: standardise logits (losses.standardize_logits) in both terms.
    connects: 'map', the connector comes before the pool (official), or
      'pooled', after it (SimKD's toolbox).
    tap: the student's map that is connected, and that its own head reads, see
      base.Method.
  """

  cross_entropy_weight: float = 1.0
  feature_weight: float = 1.0
  logit_weight: float = 1.0
  distillation_weight: float = 0.0
  temperature: float = 4.0
  standardize: bool = False
  connects: str = 'map'
  tap: str = 'final'

  def __post_init__(self):
    if self.connects not in CONNECTS:
      raise config_utils.unknown('connects', self.connects, CONNECTS)
    config_utils.check_positive('temperature', self.temperature)

  def build_connector(self, student, teacher):
    """Returns a 1x1 convolution, started as the variant's code does."""
    del student
    return connectors.build(
      'conv1x1',
      teacher,
      takes=self.connects,
      torch_init=self.connects == 'pooled',
    )

  def loss(self, student, teacher, batch):
    """Returns the weighted sum and its terms."""
    return losses.combine(
      cross_entropy=(
        self.cross_entropy_weight,
        lambda: losses.cross_entropy(student.logits, batch['label']),
      ),
      feature=(
        self.feature_weight,
        lambda: losses.feature_distance(student.connected, teacher, 'pooled'),
      ),
      logit=(
        self.logit_weight,
        lambda: losses.mean_squared_error(
          *losses.read_logits(
            student.connected.logits, teacher.logits, self.standardize
          )
        ),
      ),
      distillation=(
        self.distillation_weight,
        lambda: losses.distillation(
          student.logits,
          teacher.logits,
          self.temperature,
          standardize=self.standardize,
        ),
      ),
    )
