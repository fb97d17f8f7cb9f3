"""SimKD: match the teacher's last map, and reuse its classifier.

Source: Chen et al. 2022, "Knowledge Distillation with the Reused Teacher
Classifier", https://arxiv.org/abs/2203.14001.
"""

import dataclasses

from ijckd_jax.distillation import connectors
from ijckd_jax.distillation.methods import base
from ijckd_jax.models import losses


@dataclasses.dataclass(frozen=True)
class Method(base.Method):
  """The student's map, through a bottleneck, regresses the teacher's.

  Attributes:
    feature_weight: weight of the maps' squared error, mean over all elements.
    factor: as in ijckd.
    tap: the student's map that is connected, see base.Method.
  """

  feature_weight: float = 1.0
  factor: int = 2
  tap: str = 'stage'

  predicts_with = 'teacher'

  def build_connector(self, student, teacher):
    """Returns the bottleneck."""
    del student
    return connectors.build('bottleneck', teacher, factor=self.factor)

  def loss(self, student, teacher, batch):
    """Returns the feature term alone: the labels are not used."""
    del batch
    return losses.combine(
      feature=(
        self.feature_weight,
        lambda: losses.feature_distance(student.connected, teacher, 'map'),
      ),
    )
