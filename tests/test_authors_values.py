"""Numbers that the authors' own code gave, in float64, for the same arrays."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ijckd_jax.distillation import distiller
from ijckd_jax.distillation import methods
from ijckd_jax.distillation.methods import reviewkd
from ijckd_jax.models import losses
from ijckd_jax.models import outputs


def wave(*shape, start):
  """Returns an array that any library can make."""
  x = np.sin(start + 0.7 * np.arange(np.prod(shape))).reshape(shape)
  return jnp.asarray(x, jnp.float32)


def network(stages=(), pooled=None, connected=None, **fields):
  return outputs.Outputs(
    stages=tuple(stages),
    final=None,
    pooled=pooled,
    connected=connected,
    **({'logits': jnp.zeros((2, 5))} | fields),
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


@pytest.mark.parametrize(
  ('fields', 'expected', 'slope'),
  [
    (
      {'weighted': False, 'exponent': 0.1},
      0.9683106872009858,
      (-0.005420133, 0.069552297, 0.070557638, -0.01053923),
    ),
    (
      {'exponent': 0.2},
      2.7532777311277634,
      (-0.020045134, 0.275839698, 0.252122966, -0.089453512),
    ),
  ],
  ids=['ttm', 'wttm'],
)
def test_transformed_teachers(fields, expected, slope):
  """TTM, distiller_zoo/ttm.py:13-21 and wttm.py:13-21."""
  method = methods.get('wttm')(cross_entropy_weight=0.0, weight=1.0, **fields)
  teacher = network(logits=4 * wave(3, 10, start=0.2))
  value, gradient = jax.value_and_grad(
    lambda logits: term(method, network(logits=logits), teacher)
  )(3 * wave(3, 10, start=0.5))
  np.testing.assert_allclose(value, expected, rtol=1e-5)
  np.testing.assert_allclose(gradient[0, :4], slope, atol=1e-6)


def apply(method, params, student, teacher):
  """Returns a student with what the method trains beside it."""
  module = method.auxiliary(None, None)
  found = module.apply({'params': params}, student, teacher, train=True)
  return student.replace(auxiliary=found)


def test_a_projector_ensemble():
  """PEFD, helper/loops.py:118-145."""
  method = methods.get('pefd')(cross_entropy_weight=0.0, weight=1.0)
  student = network(pooled=wave(3, 4, start=0.3))
  teacher = network(pooled=wave(3, 5, start=0.9))
  params = {
    f'projection_{i}': {
      'kernel': wave(5, 4, start=i).T,
      'bias': wave(5, start=7 + i),
    }
    for i in range(3)
  }
  found = term(method, apply(method, params, student, teacher), teacher)
  np.testing.assert_allclose(found, 0.8903591798177617, rtol=1e-5)


def test_a_simple_recipe():
  """Simple-Recipe-Distillation, torchdistill/losses/single.py:128-190."""
  method = methods.get('srd')(cross_entropy_weight=0.0)
  student = network(
    pooled=wave(6, 4, start=0.3), logits=3 * wave(6, 10, start=0.5)
  )
  teacher = network(
    pooled=wave(6, 5, start=0.9), logits=4 * wave(6, 10, start=0.2)
  )
  params = {
    'projection': {
      'kernel': wave(5, 4, start=0.4).T,
      'bias': wave(5, start=0.6),
    }
  }
  found = term(method, apply(method, params, student, teacher), teacher)
  np.testing.assert_allclose(found, 11.577974388607702, rtol=1e-5)


def test_predictions_of_two_views():
  """Multi-Level-Logit-Distillation, distillers/KD_ours.py:85-300.

  Of seven images: the shares that are below the median are not a half.
  """
  method = methods.get('mlkd')()
  (student, other), (teacher, others) = (
    [
      network(logits=scale * wave(7, 5, start=start))
      for start, scale in ((first, scale), (first + 0.1, scale))
    ]
    for first, scale in ((0.1, 3), (0.3, 4))
  )
  labels = jnp.array([0, 1, 2, 3, 4, 0, 1])

  def loss(first, second):
    seen = student.replace(logits=first, second=other.replace(logits=second))
    return method.loss(seen, teacher.replace(second=others), {'label': labels})

  (total, terms), gradients = jax.value_and_grad(
    loss, argnums=(0, 1), has_aux=True
  )(student.logits, other.logits)
  np.testing.assert_allclose(total, 2.3466931342797213, rtol=1e-5)
  for name, weight, value in (
    ('cross_entropy', 0.1, 0.7104917185221526),
    ('distillation', 0.9, 1.5725428292568155),
    ('class_level', 0.9, 0.03895233743500346),
    ('batch_level', 0.9, 0.02470624906574953),
  ):
    np.testing.assert_allclose(weight * terms[name], value, rtol=1e-4)
  for found, expected in zip(
    gradients,
    (
      [-0.03232745, -0.07544168, -0.04483768, 0.06101686, 0.09158994],
      [-0.03192039, -0.04997974, -0.01988546, 0.04234885, 0.05943674],
    ),
    strict=True,
  ):
    np.testing.assert_allclose(found[0], expected, rtol=1e-4, atol=1e-6)


def test_the_change_of_a_teacher():
  """ATSC, helper/util.py:10-36: no batch norm's arrays, and no bias."""

  def arrays(start):
    backbone = {
      'conv': {'kernel': wave(3, 3, 2, 3, start=start)},
      'norm': {'scale': wave(3, start=start), 'bias': wave(3, start=start + 1)},
    }
    head = {'kernel': wave(3, 5, start=start + 2), 'bias': wave(5, start=3)}
    return backbone, head

  found = distiller._change(arrays(0.4), arrays(0.1))
  np.testing.assert_allclose(found, 3.098617907500044, rtol=1e-5)
