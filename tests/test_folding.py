"""Batch norm folded into convolutions, against the network that has it."""

from flax import traverse_util
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.benchmarks import classifiers
from ijckd_jax import models
from ijckd_jax.distillation import connectors
from ijckd_jax.models import folding
from ijckd_jax.models import layers
from tests import marks

SIDE = 32
# One of each family, and how many of its batch norms follow something else than
# a convolution of their own: those before the convolutions of a WRN's blocks.
FAMILIES = {
  'resnet8': 0,
  'wrn_16_1': 7,
  'vgg8': 0,
  'resnet18_cifar': 0,
  'mobilenet_v2_cifar_x0_5': 0,
  'shufflenet_v1_cifar': 0,
  'shufflenet_v2_cifar_x0_5': 0,
  'mobilenet_v1': 0,
  'mobilenet_v3_small': 0,
  'mobilenetv3_large_100': 0,
  'mobilenetv4_conv_small': 0,
  'tf_efficientnet_lite0': 0,
  'regnety_004': 0,
  'resnet18': 0,
}
BY_DEFAULT = ('resnet8', 'wrn_16_1', 'shufflenet_v1_cifar', 'mobilenet_v1')


def random_variables(module, x):
  """Returns variables as they could be after training, by no seed but one."""
  shapes = jax.eval_shape(
    lambda: module.init(jax.random.key(0), jnp.zeros(x.shape), train=False)
  )
  made = classifiers.random_arrays(shapes)
  return {kind: made.get(kind, {}) for kind in ('params', 'batch_stats')}


def num_norms(variables):
  paths = traverse_util.flatten_dict(variables['batch_stats'])
  return sum(path[-1] == 'mean' for path in paths)


def outputs_of(module, variables, x):
  return jax.jit(lambda v, x: module.apply(v, x, train=False))(variables, x)


def assert_same(module, x, left, limit=2e-5):
  """Asserts that a module folds to the same, with `left` batch norms left."""
  variables = random_variables(module, x)
  folded = folding.fold(module, variables, x)
  assert num_norms(folded) == left < num_norms(variables)
  images = np.random.RandomState(1).normal(size=(3, *x.shape[1:]))
  images = images.astype(np.float32)
  wanted = jax.tree.leaves(outputs_of(module, variables, images))
  with folding.runs_folded():
    found = jax.tree.leaves(outputs_of(module, folded, images))
  for mine, theirs in zip(found, wanted, strict=True):
    np.testing.assert_allclose(
      mine, theirs, atol=limit * np.abs(theirs).max(), rtol=0
    )


def test_by_hand():
  """3 u + 1, of mean 4 and variance 2.25, scaled by 6 and shifted by 5."""

  class Module(nn.Module):
    @nn.compact
    def __call__(self, x, *, train):
      x = nn.Conv(1, (1, 1))(x)
      norm = nn.BatchNorm(use_running_average=not train, epsilon=0.0)
      return norm(x)

  one = np.ones(1, np.float32)
  variables = {
    'params': {
      'Conv_0': {'kernel': 3 * one.reshape(1, 1, 1, 1), 'bias': one},
      'BatchNorm_0': {'scale': 6 * one, 'bias': 5 * one},
    },
    'batch_stats': {'BatchNorm_0': {'mean': 4 * one, 'var': 2.25 * one}},
  }
  x = jax.ShapeDtypeStruct((1, 1, 1, 1), jnp.float32)
  folded = folding.fold(Module(), variables, x)
  # (3 u + 1 - 4) * 6 / 1.5 + 5 = 12 u - 7.
  assert folded['batch_stats'] == {}
  assert folded['params'].keys() == {'Conv_0'}
  assert folded['params']['Conv_0']['kernel'].item() == 12
  assert folded['params']['Conv_0']['bias'].item() == -7


@pytest.mark.parametrize('name', marks.slow_but(BY_DEFAULT, FAMILIES))
def test_backbones(name):
  module = models.build(name)
  side = 32 if models.build(name).usual_size == 32 else 64
  x = jax.ShapeDtypeStruct((1, side, side, 3), jnp.float32)
  # In deep networks, random weights let rounding errors grow.
  limit = (
    1e-4 if name in ('mobilenetv3_large_100', 'tf_efficientnet_lite0') else 2e-5
  )
  assert_same(module, x, FAMILIES[name], limit)


@pytest.mark.parametrize('name', ('bottleneck', 'conv1x1', 'mlp'))
def test_connectors(name):
  module = connectors.get(name)(features=12)
  assert_same(module, jax.ShapeDtypeStruct((1, 4, 4, 6), jnp.float32), 0)


class Twice(nn.Module):
  """A convolution that more than its batch norm reads, or two batch norms."""

  read_by: str

  @nn.compact
  def __call__(self, x, *, train):
    conv, norm = layers.conv(5, use_bias=True), layers.BatchNorm(True)
    y = layers.BatchNorm(True)(layers.conv(5)(x))
    z = conv(y)
    if self.read_by == 'sum':
      return norm(z) + z
    if self.read_by == 'output':
      return norm(z), z
    if self.read_by == 'second call':
      return norm(z) + norm(conv(x[..., :5]))
    return norm(jnp.square(z))


@pytest.mark.parametrize('read_by', ('sum', 'output', 'second call', 'square'))
def test_what_others_read_stays(read_by):
  """Only the first pair of the two is folded."""
  x = jax.ShapeDtypeStruct((1, 4, 4, 5), jnp.float32)
  assert_same(Twice(read_by), x, 1)


def test_unfolded_variables_run_as_ever():
  module = models.build('resnet8')
  x = jax.ShapeDtypeStruct((1, 8, 8, 1), jnp.float32)
  variables = random_variables(module, x)
  images = np.ones((2, 8, 8, 1), np.float32)
  wanted = outputs_of(module, variables, images).pooled
  with folding.runs_folded():
    found = outputs_of(module, variables, images).pooled
  np.testing.assert_array_equal(found, wanted)
