"""A method: IJCKD whose features are compared by their angle."""

import dataclasses

import jax.numpy as jnp
import optax

from ijckd_jax.distillation import connectors
from ijckd_jax.models import losses


@dataclasses.dataclass(frozen=True)
class Method:
  """Cross-entropy through the teacher's head, and the cosine of the features.

  Attributes:
    cosine_weight: weight of one minus the cosine of the pooled features.
    connector: name of a connector.
    tap: the student's map that is connected, see methods.base.
  """

  cosine_weight: float = 1.0
  connector: str = 'experiments.extension_example.connector:Gated'
  tap: str = 'stage'

  predicts_with = 'teacher'

  def build_connector(self, student, teacher):
    """Returns the connector."""
    del student
    return connectors.build(self.connector, teacher)

  def loss(self, student, teacher, batch):
    """Returns the weighted sum and its terms."""
    return losses.combine(
      cross_entropy=(
        1.0,
        lambda: losses.cross_entropy(student.logits, batch['label']),
      ),
      cosine=(
        self.cosine_weight,
        lambda: jnp.mean(
          optax.losses.cosine_distance(
            student.connected.pooled, teacher.pooled, epsilon=1e-6
          )
        ),
      ),
    )
