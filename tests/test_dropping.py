"""Stochastic depth and dropout: by hand, by the step's key, and refused."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ijckd_jax import models
from ijckd_jax.distillation import network
from ijckd_jax.distillation import steps
from ijckd_jax.distillation import train_state
from ijckd_jax.models import outputs
from ijckd_jax.runtime import config_utils
from ijckd_jax.runtime import parallel
from ijckd_jax.training import experiment
from tests import views_on_devices


class Branches(models.Backbone):
  """A convolution, and two branches beside their shortcuts."""

  has_branches = True

  @nn.compact
  def __call__(self, images, *, train):
    x = self.conv(8, 3, stride=2)(images)
    for position in (0.5, 1.0):
      x += self.drop_branch(nn.relu(self.conv(8, 3)(x)), position, train)
    return outputs.Features((x,), x, self.pool(x))


class Branch(models.Backbone):
  """A single branch, which is its whole input."""

  @nn.compact
  def __call__(self, images, *, train):
    return self.drop_branch(images, 0.5, train)


def test_a_branch_is_dropped_whole_and_scaled_up_where_it_is_kept():
  images = np.random.default_rng(0).random((4000, 2, 2, 1), np.float32) + 1
  kept, stats = network.run(
    Branch(drop_path=0.4),
    {'params': {}, 'batch_stats': {}},
    images,
    train=True,
    key=jax.random.key(1),
  )
  assert stats == {}
  # With probability 0.4 * 0.5 it is zero, and otherwise 1 / 0.8 of itself.
  is_dropped = ~np.any(np.asarray(kept), axis=(1, 2, 3))
  assert abs(np.mean(is_dropped) - 0.2) < 0.02
  np.testing.assert_allclose(
    kept[~is_dropped], images[~is_dropped] / 0.8, rtol=1e-6
  )


def test_half_precision_stays():
  images = jnp.ones((4, 2, 2, 1), jnp.bfloat16)
  variables = {'params': {}, 'batch_stats': {}}
  key = jax.random.key(1)
  made, _ = network.run(
    Branch(drop_path=0.4), variables, images, train=True, key=key
  )
  assert made.dtype == jnp.bfloat16


def test_inference_drops_nothing():
  images = np.ones((4, 2, 2, 1))
  variables = {'params': {}, 'batch_stats': {}}
  made, _ = network.run(Branch(drop_path=0.4), variables, images, train=False)
  np.testing.assert_array_equal(made, images)


def test_features_are_dropped_one_by_one():
  pooled = np.full((200, 100), 3.0)
  made = network.drop_features(pooled, 0.25, jax.random.key(0))
  values, counts = np.unique(made, return_counts=True)
  np.testing.assert_allclose(values, [0, 4])
  assert abs(counts[0] / pooled.size - 0.25) < 0.01


def config_of(**fields):
  config = experiment.default_config(
    dataset='digits',
    teacher='',
    student='tests.test_dropping:Branches',
    method='ce',
  )
  config.total_epochs, config.batch_size = 1.0, 48
  config_utils.override(config, {'seed': 3, **fields})
  return config


def losses_of(config, step=0, num_devices=1):
  """Returns the loss of a step, and its state's parameters."""
  exp = experiment.build(config)
  tx, _ = exp.optimizer(48)
  mapped = jax.vmap(
    exp.train_step(tx),
    in_axes=(None, None, 0, None),
    out_axes=None,
    axis_name=parallel.AXIS,
  )
  variables = exp.distiller.init(jax.random.key(0), (8, 8, 1))
  state = train_state.create(variables, tx, with_ema=False)
  state = state.replace(step=jnp.int32(step))
  shards = jax.tree.map(
    lambda x: x.reshape(num_devices, -1, *x.shape[1:]),
    views_on_devices.make_batch(),
  )
  key = jax.random.key(config.seed)
  _, sums = jax.jit(mapped)(state, exp.frozen, shards, key)
  return float(sums['loss'][0] / sums['loss'][1])


@pytest.mark.parametrize('field', ['drop_path', 'dropout'])
def test_what_is_dropped_is_a_function_of_seed_and_step(field):
  dropped = {f'student.{field}': 0.5}
  first = losses_of(config_of(**dropped))
  assert losses_of(config_of(**dropped)) == first
  others = {
    losses_of(config_of()),
    losses_of(config_of(**dropped, seed=4)),
    losses_of(config_of(**dropped), step=1),
    losses_of(config_of(**dropped, accumulation=2)),
    losses_of(config_of(**dropped), num_devices=2),
    first,
  }
  assert len(others) == 6


def test_devices_and_steps_have_keys_of_their_own():
  keys = jax.vmap(
    lambda step: jax.vmap(
      lambda _: steps._dropout_key(jax.random.key(0), step),
      axis_name=parallel.AXIS,
    )(jnp.arange(3))
  )(jnp.arange(4))
  assert len(np.unique(jax.random.key_data(keys).reshape(12, -1), axis=0)) == 12


def test_a_student_sees_its_key():
  exp = experiment.build(config_of(**{'student.dropout': 0.5}))
  variables = exp.distiller.init(jax.random.key(0), (8, 8, 1))
  images = views_on_devices.make_batch()['image'][:2]
  first, other = (
    exp.distiller.run_student(variables, exp.frozen, images, key)[0][0].logits
    for key in jax.random.split(jax.random.key(0))
  )
  assert np.abs(first - other).max() > 1e-3


def test_the_teacher_of_a_run_drops_nothing():
  config = config_of(**{'student.drop_path': 0.3, 'student.dropout': 0.3})
  config.augment.label_smoothing = 0.1
  assert experiment.teacher_config(config).augment.label_smoothing == 0
  teacher = experiment.teacher_config(config).student
  assert (teacher.drop_path, teacher.dropout) == (0.0, 0.0)


@pytest.mark.parametrize(
  'fields, message',
  [
    ({'student.drop_path': 1.0}, r'drop_path=1.0: it must be in \[0, 1\)'),
    ({'student.dropout': -0.1}, r'dropout=-0.1: it must be in \[0, 1\)'),
    (
      {'student.drop_path': 0.1, 'student.backbone': 'resnet8'},
      'a resnet8 has no stochastic depth here: set it to 0',
    ),
  ],
)
def test_what_cannot_be_dropped_is_refused(fields, message):
  with pytest.raises(config_utils.UserError, match=message):
    experiment.build(config_of(**fields))


def test_dropout_is_for_a_head_of_the_students_own(small_config):
  config = small_config('ijckd', **{'student.dropout': 0.1})
  with pytest.raises(config_utils.UserError, match="with the head 'teacher'"):
    experiment.build(config)
