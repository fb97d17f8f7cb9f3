"""ATSC: SimKD with a teacher that moves towards its student.

Source: "Adaptive Teaching with Shared Classifier for Knowledge Distillation",
2024, https://arxiv.org/abs/2406.08528.
"""

import dataclasses

from ijckd_jax.distillation import connectors
from ijckd_jax.distillation.methods import base
from ijckd_jax.models import losses


@dataclasses.dataclass(frozen=True)
class Method(base.Method):
  """The maps of student and teacher regress each other; a copy of the head.

  The teacher is trained as the student is: in training mode, by one optimizer.
  What predicts is a copy of its head, of which the bias alone learns from
  labels, by the teacher's own prediction. The authors make that step after the
  other one, with an optimizer of its own; here both are one step.

  Attributes:
    feature_weight: weight of the maps' squared error, mean over all elements.
    change_weight: of the teacher's change: the sum of the squared differences
      of its kernels from those that it started with. The authors take 1 on
      CIFAR-100, and 10 on ImageNet.
    cross_entropy_weight: weight of the cross-entropy of the teacher's
      prediction, which trains the head's bias.
    factor: as in ijckd.
    tap: the student's map that is connected, see base.Method.
  """

  feature_weight: float = 1.0
  change_weight: float = 1.0
  cross_entropy_weight: float = 1.0
  factor: int = 2
  tap: str = 'stage'

  predicts_with = 'copy'
  adapts_teacher = True

  def build_connector(self, student, teacher):
    """Returns the bottleneck."""
    del student
    return connectors.build('bottleneck', teacher, factor=self.factor)

  def loss(self, student, teacher, batch):
    """Returns the weighted sum and its terms."""
    return losses.combine(
      feature=(
        self.feature_weight,
        lambda: losses.feature_distance(student.connected, teacher, 'map'),
      ),
      change=(
        self.change_weight,
        lambda: losses.at_least_float32(teacher.change),
      ),
      cross_entropy=(
        self.cross_entropy_weight,
        lambda: losses.cross_entropy(teacher.logits, batch['label']),
      ),
    )
