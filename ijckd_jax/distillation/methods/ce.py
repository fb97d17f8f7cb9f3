"""CE: learn from the labels alone, as every teacher and baseline does."""

import dataclasses

from ijckd_jax.distillation.methods import base
from ijckd_jax.models import losses


@dataclasses.dataclass(frozen=True)
class Method(base.Method):
  """Cross-entropy of the student's own head; no teacher."""

  needs_teacher = False

  def loss(self, student, teacher, batch):
    """Returns the cross-entropy."""
    del teacher
    return losses.combine(
      cross_entropy=(
        1.0,
        lambda: losses.cross_entropy(student.logits, batch['label']),
      ),
    )
