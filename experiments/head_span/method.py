"""A method: IJCKD whose features are compared where the head can see them."""

import dataclasses
import functools

import jax.numpy as jnp
import numpy as np

from ijckd_jax.bundles import bundles
from ijckd_jax.distillation.methods import ijckd
from ijckd_jax.evaluation import pointwise
from ijckd_jax.models import losses


@functools.cache
def span(bundle: str) -> np.ndarray:
  """Returns a basis (D, K - 1) of the differences of the head's weights."""
  params = bundles.load(bundle).variables['params']
  return np.asarray(pointwise.describe(params['head']).span)


@dataclasses.dataclass(frozen=True)
class Method(ijckd.Method):
  """IJCKD whose feature loss sees the span of all w_i - w_j alone.

  The rest of a feature changes no prediction. The squared error in the span is
  divided by all D, as without it, so that the weight means the same.

  Attributes:
    teacher_bundle: folder of the teacher's bundle, or run.
  """

  teacher_bundle: str = ''

  def loss(self, student, teacher, batch):
    """Returns the weighted sum and its terms."""
    basis = span(self.teacher_bundle)

    def feature():
      seen = student.connected.map
      target = losses.adaptive_average_pool(teacher.final, seen.shape[1:3])
      off = jnp.dot(
        losses.at_least_float32(seen - target), basis, precision='highest'
      )
      return jnp.mean(jnp.square(off)) * basis.shape[1] / basis.shape[0]

    rest = dataclasses.replace(self, feature_weight=0.0)
    total, terms = ijckd.Method.loss(rest, student, teacher, batch)
    value = feature()
    return total + self.feature_weight * value, {**terms, 'feature': value}
