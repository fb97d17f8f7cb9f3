"""Numbers that the authors' own code gave, in float64, for the same arrays."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ijckd_jax.distillation import methods
from ijckd_jax.distillation.methods import reviewkd
from ijckd_jax.models import losses
from ijckd_jax.models import outputs


def wave(*shape, start):
  """Returns an array that any library can make."""
  x = np.sin(start + 0.7 * np.arange(np.prod(shape))).reshape(shape)
  return jnp.asarray(x, jnp.float32)


def network(stages=(), pooled=None, connected=None):
  return outputs.Outputs(
    stages=tuple(stages),
    final=None,
    pooled=pooled,
    logits=jnp.zeros((2, 5)),
    connected=connected,
  )


def term(method, student, teacher):
  """Returns a method's loss but for that of the labels, which is not asked."""
  return method.loss(student, teacher, {'label': jnp.zeros(2, jnp.int32)})[0]


def test_attention_from_the_first_stage():
  """RepDistiller, distiller_zoo/AT.py:18-32, weighted by 1000.

  A student of four stages beside a teacher of three.
  """
  student, teacher = (
    [
      wave(2, size, size, width, start=start + i)
      for i, (size, width) in enumerate(shapes)
    ]
    for start, shapes in (
      (-1, ((8, 2), (8, 3), (4, 4), (4, 5), (2, 5))),
      (9, ((8, 2), (8, 4), (4, 6), (2, 7))),
    )
  )
  method = methods.get('at')(cross_entropy_weight=0.0)
  found = term(method, network(student), network(teacher))
  np.testing.assert_allclose(found, 10.609184441267534, rtol=1e-5)
  last = methods.get('at')(cross_entropy_weight=0.0, pairing='last')
  assert abs(term(last, network(student), network(teacher)) - found) > 1


def test_relations_of_equal_images():
  """RepDistiller, distiller_zoo/RKD.py:15-60: the first and last are equal."""
  student, teacher = wave(4, 3, start=1.0), wave(4, 5, start=2.0)
  student, teacher = (x.at[3].set(x[0]) for x in (student, teacher))
  found = term(
    methods.get('rkd')(cross_entropy_weight=0.0),
    network(pooled=student),
    network(pooled=teacher),
  )
  np.testing.assert_allclose(found, 3.2709788229311374, rtol=1e-5)


def test_standardised_logits():
  """logit-standardization-KD, mdistiller/distillers/KD.py:7-25."""
  student, teacher = 3 * wave(3, 10, start=0.5), 4 * wave(3, 10, start=0.2)
  value, gradient = jax.value_and_grad(losses.distillation)(
    student, teacher, 2.0, standardize=True
  )
  np.testing.assert_allclose(value, 0.036030967034750096, rtol=1e-4)
  expected = (
    *(0.005603848, 0.002989722, -0.004286053, -0.008185349, -0.005925097),
    *(-0.002286779, 0.000256282, 0.002105697, 0.004119831, 0.005607897),
  )
  np.testing.assert_allclose(gradient[0], expected, atol=1e-7)


def test_projected_features():
  """vkd, engine.py:99-100."""
  teacher = 3 * wave(3, 6, start=0.9) + 1
  method = methods.get('vkd')(cross_entropy_weight=0.0)

  def loss(pooled):
    connected = outputs.Connected(map=None, pooled=pooled, logits=None)
    return term(method, network(connected=connected), network(pooled=teacher))

  value, gradient = jax.value_and_grad(loss)(2 * wave(3, 6, start=0.3))
  np.testing.assert_allclose(value, 0.4083158805361125, rtol=1e-5)
  expected = (
    *(-0.012113757, 0.031939728, 0.055555556),
    *(0.055555556, 0.055555556, 0.020308731),
  )
  np.testing.assert_allclose(gradient[0], expected, atol=1e-6)


@pytest.mark.parametrize(
  'size, expected',
  [
    (2, (0.099833417, 0.997494987, 0.72896904, 0.798487113)),
    (
      3,
      (
        *(0.099833417, 0.717356091, 0.808496404),
        *(-0.442520443, -0.916165937, -0.550685543),
        *(-0.922775422, -0.95401925, 0.133232041),
      ),
    ),
  ],
)
def test_maps_are_scaled_down_by_the_first_row_of_each(size, expected):
  """torch.nn.functional.interpolate, mode 'nearest', as ReviewKD has it."""
  found = reviewkd._resize(wave(1, 5, 5, 1, start=0.1), (size, size))
  np.testing.assert_allclose(found.ravel(), expected, atol=1e-6)


def test_review_at_several_scales():
  """mdistiller, distillers/ReviewKD.py:11-29."""
  total = sum(
    reviewkd._distance(
      wave(2, size, size, 3, start=i), wave(2, size, size, 3, start=20 + i)
    )
    for i, size in enumerate((1, 2, 5, 8))
  )
  np.testing.assert_allclose(total, 1.6386920247914682, rtol=1e-5)
