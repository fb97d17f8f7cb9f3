"""Connectors: published sizes, one contract for all, and their start."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ijckd_jax import models
from ijckd_jax.data import augment
from ijckd_jax.distillation import binding
from ijckd_jax.distillation import connectors
from ijckd_jax.distillation import methods
from ijckd_jax.distillation import teachers
from ijckd_jax.models import outputs
from ijckd_jax.runtime import config_utils

# C_s, C_t, and the parameters of SRRL's 1x1 and of bottlenecks by factor.
PUBLISHED = {
  'R34->R18': (512, 512, 263_168, 854_016, 280_064, 103_680),
  'R50->MobileNetV1': (1024, 2048, 2_101_248, 12_591_104, 3_938_304, 1_381_376),
  'R50->R18': (512, 2048, 1_052_672, 12_066_816, 3_676_160, 1_250_304),
  'R50->MobileNetV2': (320, 2048, 659_456, 11_870_208, 3_577_856, 1_201_152),
  'resnet32x4->resnet8x4': (256, 256, 66_048, 214_016, 70_400, 26_240),
  'resnet32x4->vgg8': (512, 256, 131_584, 246_784, 86_784, 34_432),
  'resnet32x4->ShuffleV2': (464, 256, 119_296, 240_640, 83_712, 32_896),
  'resnet32x4->ShuffleV2_1_5': (704, 256, 180_736, 271_360, 99_072, 40_576),
  'resnet32x4->ShuffleV1': (960, 256, 246_272, 304_128, 115_456, 48_768),
  'wrn40-2->wrn40-1': (64, 128, 8_448, 49_664, 15_744, 5_696),
  'wrn40-2->resnet8x4': (256, 128, 33_024, 61_952, 21_888, 8_768),
  'wrn40-2->ShuffleV1': (960, 128, 123_136, 107_008, 44_416, 20_032),
  'wrn40-2->MobileNetV2_1_0': (320, 128, 41_216, 66_048, 23_936, 9_792),
  'vgg13->vgg8': (512, 512, 263_168, 854_016, 280_064, 103_680),
  'vgg13->MobileNetV2': (160, 512, 82_944, 763_904, 235_008, 81_152),
  'ResNet50->MobileNetV2': (
    160,
    2048,
    331_776,
    11_706_368,
    3_495_936,
    1_160_192,
  ),
}


def teacher_shapes(width, *, size=3, signed=False):
  """Returns a teacher whose map and pooled features are `width` wide."""
  return outputs.Shapes(
    stages=(),
    final=jax.ShapeDtypeStruct((1, size, size, width), jnp.float32),
    pooled=jax.ShapeDtypeStruct((1, width), jnp.float32),
    signed=signed,
  )


def normal(seed, *shape):
  return np.random.RandomState(seed).randn(*shape).astype(np.float32)


def num_params(connector, width):
  variables = jax.eval_shape(
    lambda: connector.init(
      jax.random.key(0), jnp.ones((1, 2, 2, width)), train=False
    )
  )
  return sum(leaf.size for leaf in jax.tree.leaves(variables.get('params', {})))


def randomized(connector, x, seed=0):
  """Returns variables that leave nothing at its start."""
  shapes = jax.eval_shape(
    lambda: connector.init(jax.random.key(0), x, train=False)
  )
  rng = np.random.RandomState(seed)
  return jax.tree_util.tree_map_with_path(
    lambda path, leaf: (
      np.abs(rng.randn(*leaf.shape)) + 0.5
      if path[-1].key == 'var'
      else rng.randn(*leaf.shape)
    ).astype(np.float32),
    shapes,
  )


@pytest.mark.parametrize('pair', PUBLISHED)
def test_sizes_are_the_published_ones(pair):
  source, target, conv1x1, *bottlenecks = PUBLISHED[pair]
  teacher = teacher_shapes(target)
  assert num_params(connectors.build('conv1x1', teacher), source) == conv1x1
  for factor, expected in zip((2, 4, 8), bottlenecks, strict=True):
    connector = connectors.build('bottleneck', teacher, factor=factor)
    assert num_params(connector, source) == expected, factor


@pytest.mark.parametrize(
  'name, expected',
  [
    ('identity', 0),
    ('linear', 64 * 128 + 128),
    ('bottleneck_depthwise', 64 * 32 + 9 * 32 + 32 * 128 + 2 * (2 * 32 + 128)),
  ],
)
def test_sizes_of_the_others(name, expected):
  width = 128 if name == 'identity' else 64
  connector = connectors.build(name, teacher_shapes(128), factor=4)
  assert num_params(connector, width) == expected


def test_size_of_the_mlp():
  connector = connectors.build('mlp', teacher_shapes(128))
  assert num_params(connector, 64) == 64 * 128 + 128 * 128 + 2 * 2 * 128


@pytest.mark.parametrize('signed', [False, True])
@pytest.mark.parametrize('name', connectors.CONNECTORS)
def test_contract(name, signed):
  """A connector keeps the map's size, and ends where its target's signs do."""
  connector = connectors.build(name, teacher_shapes(12, signed=signed))
  width = 12 if name == 'identity' else 5
  size = (1, 1) if connector.takes == 'pooled' else (3, 4)
  x = normal(0, 2, *size, width)
  variables = randomized(connector, x)
  y = connector.apply(variables, x, train=False)
  assert y.shape == (2, *size, 12)
  assert connector.signed == (signed or name in ('linear', 'orthogonal'))
  assert (y.min() < 0) == connector.signed
  assert y.max() > 0
  low = connector.clone(dtype=jnp.bfloat16)
  assert name == 'identity' or low.apply(
    variables, x, train=False
  ).dtype == jnp.dtype(jnp.bfloat16)
  trained, changed = connector.apply(
    variables, x, train=True, mutable=['batch_stats']
  )
  assert trained.shape == y.shape
  has_norm = name not in ('identity', 'linear', 'orthogonal')
  assert ('batch_stats' in changed) == has_norm


@pytest.mark.parametrize('signed', [False, True])
@pytest.mark.parametrize('name', connectors.CONNECTORS)
def test_every_target_lies_in_the_range(name, signed):
  """With the right bias, the last layer gives any vector of that sign."""
  connector = connectors.build(name, teacher_shapes(12, signed=signed))
  target = normal(1, 12)
  target = target if signed else np.abs(target)
  x = normal(0, 2, 1, 1, 12)
  if name == 'identity':
    x[:] = target
    variables = {}
  elif name == 'orthogonal':
    variables = randomized(connector, x)
    rotation = connector.apply(
      variables, np.eye(12)[:, None, None], train=False
    )
    x[:] = target @ np.asarray(rotation)[:, 0, 0].T
  else:
    variables = randomized(connector, x)
    params = variables['params']
    last_norm = max([key for key in params if 'BatchNorm' in key], default=None)
    if last_norm is None:
      params['Conv_0']['kernel'][:] = 0
      params['Conv_0']['bias'][:] = target
    else:
      params[last_norm]['scale'][:] = 0
      params[last_norm]['bias'][:] = target
  y = connector.apply(variables, x, train=False)
  np.testing.assert_allclose(
    y,
    np.broadcast_to(target, y.shape),
    rtol=1e-4 if name == 'orthogonal' else 1e-6,
  )


@pytest.mark.parametrize('tap', ['final', 'stage'])
@pytest.mark.parametrize('name', ['resnet8', 'wrn_16_1'])
def test_identity_reproduces_a_teachers_own_features(name, tap):
  backbone = models.build(name, tap=tap)
  x = normal(0, 2, 8, 8, 1)
  features = backbone.apply(randomized(backbone, x), x, train=False)
  shapes = outputs.Shapes(
    features.stages, features.final, features.pooled, backbone.signed
  )
  connector = connectors.build('identity', shapes)
  y = connector.apply({}, features.final, train=False)
  np.testing.assert_array_equal(y, features.final)
  assert (y.min() < 0) == (name == 'wrn_16_1' and tap == 'stage')


def kernels(connector, width, seed=0):
  """Returns the fresh kernels by name, and checks all else at its start."""
  variables = jax.jit(functools.partial(connector.init, train=False))(
    jax.random.key(seed), jnp.ones((1, 1, 1, width))
  )
  found = {}
  for name, layer in variables['params'].items():
    layer = jax.tree.map(np.asarray, layer)
    if 'kernel' in layer:
      found[name] = layer['kernel']
    else:
      assert (layer['scale'] == 1).all(), name
    assert (layer.get('bias', 0) == np.zeros(1)).all(), name
  return found


def assert_uniform(kernel, bound):
  assert np.abs(kernel).max() <= bound
  assert np.abs(kernel).max() > 0.99 * bound
  error = abs(kernel.std() / (bound / np.sqrt(3)) - 1)
  assert error < 5 / np.sqrt(kernel.size)


@pytest.mark.parametrize(
  'name', ['bottleneck', 'bottleneck_depthwise', 'mlp', 'linear']
)
def test_start_is_pytorchs_default(name):
  """Kernels are U(+-1/sqrt(fan_in)), of a depthwise one fan_in is 9."""
  found = kernels(connectors.build(name, teacher_shapes(96)), 40)
  num_convs = {'linear': 1, 'mlp': 2}.get(name, 3)
  assert sorted(found) == [f'Conv_{i}' for i in range(num_convs)]
  for kernel in found.values():
    height, width, channels, _ = kernel.shape
    assert_uniform(kernel, 1 / np.sqrt(height * width * channels))
  if name == 'bottleneck_depthwise':
    assert found['Conv_1'].shape == (3, 3, 1, 48)


def test_start_of_srrls_convolution():
  """The official one is N(0, 2/C_out), the toolbox's PyTorch's default."""
  (kernel,) = kernels(
    connectors.build('conv1x1', teacher_shapes(96)), 40
  ).values()
  std = np.sqrt(2 / 96)
  assert abs(kernel.std() / std - 1) < 5 / np.sqrt(2 * kernel.size)
  assert np.abs(kernel).max() > 2.5 * std
  (kernel,) = kernels(
    connectors.build('conv1x1', teacher_shapes(96), torch_init=True), 40
  ).values()
  assert_uniform(kernel, 1 / np.sqrt(40))


def test_bottleneck_by_hand():
  """Width 2 over 4 channels, on one pixel: the 3x3 sees its centre alone."""
  connector = connectors.build('bottleneck', teacher_shapes(4), factor=2)
  x = normal(0, 3, 1, 1, 5)
  variables = randomized(connector, x)
  params, stats = variables['params'], variables['batch_stats']

  def norm(y, name):
    y = (y - stats[name]['mean']) / np.sqrt(stats[name]['var'] + 1e-5)
    return np.maximum(y * params[name]['scale'] + params[name]['bias'], 0)

  assert params['Conv_0']['kernel'].shape == (1, 1, 5, 2)
  y = norm(x[:, 0, 0] @ params['Conv_0']['kernel'][0, 0], 'BatchNorm_0')
  y = norm(y @ params['Conv_1']['kernel'][1, 1], 'BatchNorm_1')
  y = norm(y @ params['Conv_2']['kernel'][0, 0], 'BatchNorm_2')
  result = connector.apply(variables, x, train=False)
  np.testing.assert_allclose(result[:, 0, 0], y, rtol=1e-4, atol=1e-5)


def test_batch_norm_has_pytorchs_momentum():
  connector = connectors.build('conv1x1', teacher_shapes(4))
  x = normal(0, 8, 2, 2, 3)
  variables = randomized(connector, x)
  _, changed = connector.apply(
    variables, x, train=True, mutable=['batch_stats']
  )
  y = x @ variables['params']['Conv_0']['kernel'][0, 0]
  old = variables['batch_stats']['BatchNorm_0']
  new = changed['batch_stats']['BatchNorm_0']
  for name, batch in (('mean', y.mean((0, 1, 2))), ('var', y.var((0, 1, 2)))):
    np.testing.assert_allclose(
      new[name], 0.9 * old[name] + 0.1 * batch, rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize('takes', ['map', 'pooled'])
def test_width_is_that_of_what_is_taken(takes):
  teacher = outputs.Shapes(
    stages=(),
    final=jax.ShapeDtypeStruct((1, 4, 4, 6), jnp.float32),
    pooled=jax.ShapeDtypeStruct((1, 9), jnp.float32),
  )
  connector = connectors.build('conv1x1', teacher, takes=takes)
  assert connector.takes == takes
  assert connector.features == {'map': 6, 'pooled': 9}[takes]


def test_mlp_takes_pooled_features():
  assert connectors.build('mlp', teacher_shapes(4)).takes == 'pooled'


def test_a_factor_is_for_those_that_have_one():
  teacher = teacher_shapes(4)
  assert connectors.build('bottleneck', teacher, factor=4).factor == 4
  assert connectors.build('bottleneck_depthwise', teacher, factor=4).factor == 4
  connectors.build('linear', teacher, factor=4)


def test_unknown_name_names_the_nearest():
  with pytest.raises(
    config_utils.UserError, match="unknown connector.*mean 'bottleneck'"
  ):
    connectors.build('botleneck', teacher_shapes(4))


def teacher_of(width):
  """Returns a teacher that is a single reshaping of its input."""

  def apply(variables, images):
    del variables
    final = jnp.repeat(images, width, axis=-1)
    pooled = jnp.mean(final, axis=(1, 2))
    return outputs.Outputs((final,), final, pooled, pooled[:, :3])

  return teachers.Teacher(
    apply=apply,
    variables={},
    head={'kernel': np.eye(width, 3), 'bias': np.zeros(3)},
    preprocessing=augment.Preprocessing((0.0,), (1.0,), (8, 8)),
  )


@pytest.mark.parametrize(
  'fields, width, message',
  [
    ({'connector': 'identity'}, 96, 'student has 64 and the teacher 96'),
    ({'factor': 0}, 64, 'factor=0.*from 1 to 64'),
    ({'factor': 65}, 64, 'factor=65.*from 1 to 64'),
    ({'connector': 'bottleneck_depthwise', 'factor': -1}, 64, 'factor=-1'),
  ],
)
def test_what_does_not_fit_is_said_before_anything_runs(fields, width, message):
  with pytest.raises(config_utils.UserError, match=message):
    binding.bind(
      backbone=models.build('resnet8', tap='stage'),
      preprocessing=augment.Preprocessing((0.0,), (1.0,), (8, 8)),
      method=methods.get('ijckd')(**fields),
      given=(teacher_of(width),),
      image_shape=(8, 8, 1),
      num_classes=3,
      axis_name=None,
      dtype=jnp.float32,
    )
