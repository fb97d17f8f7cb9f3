"""The examples of teachers from Flax NNX and Equinox."""

import jax
import numpy as np
import pytest

from experiments.jax_teachers import equinox_teacher
from experiments.jax_teachers import nnx_teacher
from ijckd_jax.data import augment


# Each trains a teacher in its own library, and a student.
@pytest.mark.slow
@pytest.mark.parametrize('example', [nnx_teacher, equinox_teacher])
def test_example(example, data_dir):
  """Few steps of both: the student comes to agree, and nothing is ported."""
  settings = {'total_epochs': 3.0, 'bounds.fit_examples': 0}
  accuracies = example.main(
    num_steps=60, **settings, **{'dataset.data_dir': data_dir}
  )
  assert accuracies['teacher'] > 0.9
  assert accuracies['student'] > 0.8


@pytest.mark.parametrize('library', ['nnx', 'equinox'])
def test_teacher_is_its_network(library):
  preprocessing = augment.Preprocessing((0.0,), (1.0,), (8, 8))
  images = np.random.default_rng(0).integers(0, 256, (3, 8, 8, 1))
  x = preprocessing(images)
  if library == 'nnx':
    net = nnx_teacher.Net(8, 10, rngs=nnx_teacher.nnx.Rngs(0))
    teacher = nnx_teacher.teacher(net, preprocessing)
    wanted = net.head(net.features(x).mean(axis=(1, 2)))
  else:
    net = equinox_teacher.Net(8, 10, key=jax.random.key(0))
    teacher = equinox_teacher.teacher(net, preprocessing)
    maps = jax.vmap(net.features)(np.moveaxis(x, 3, 1))
    wanted = jax.vmap(net.head)(maps.mean(axis=(2, 3)))
  given = teacher(teacher.arrays, images)
  np.testing.assert_allclose(given.logits, wanted, rtol=1e-5, atol=1e-6)
  assert teacher.shapes((8, 8, 1)).pooled.shape == (1, 8)
