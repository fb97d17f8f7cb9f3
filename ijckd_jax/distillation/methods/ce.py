"""CE: learn from the labels alone, as every teacher and baseline does."""

import dataclasses

from ijckd_jax.models import losses


@dataclasses.dataclass(frozen=True)
class Method:
  """Cross-entropy of the student's own head; no teacher."""

  predicts_with = 'own'
  tap = 'final'
  needs_teacher = False

  def build_connector(self, student, teacher):
    """Returns None: nothing is connected."""
    del student, teacher

  def loss(self, student, teacher, batch):
    """Returns the cross-entropy."""
    del teacher
    return losses.combine(
      cross_entropy=(
        1.0,
        lambda: losses.cross_entropy(student.logits, batch['label']),
      ),
    )
