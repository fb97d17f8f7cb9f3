"""Backbones: published sizes, one contract for all, and numpy's own forward."""

import functools

from flax import traverse_util
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ijckd_jax import augment
from ijckd_jax import config_utils
from ijckd_jax import models
from ijckd_jax import network
from ijckd_jax.models import backbone as backbone_lib

X1 = ((16, 32), (16, 32), (32, 16), (64, 8))
X2 = ((16, 32), (32, 32), (64, 16), (128, 8))
X4 = ((32, 32), (64, 32), (128, 16), (256, 8))

# Parameters with a head of 100 classes, elements of the running means and
# variances, and (channels, size) of each stage at 32x32x3, as the PyTorch
# models of RepDistiller, mdistiller and SimKD have them.
PUBLISHED = {
  'resnet8': (83_892, 672, X1),
  'resnet14': (181_108, 1_120, X1),
  'resnet20': (278_324, 1_568, X1),
  'resnet32': (472_756, 2_464, X1),
  'resnet38': (569_972, 2_912, X1),
  'resnet44': (667_188, 3_360, X1),
  'resnet56': (861_620, 4_256, X1),
  'resnet110': (1_736_564, 8_288, X1),
  'resnet116': (1_833_780, 8_736, X1),
  'resnet14x2': (703_732, 2_272, X2),
  'resnet38x2': (2_255_604, 5_856, X2),
  'resnet110x2': (6_911_220, 16_608, X2),
  'resnet8x4': (1_233_540, 2_752, X4),
  'resnet14x4': (2_783_620, 4_544, X4),
  'resnet32x4': (7_433_860, 9_920, X4),
  'resnet38x4': (8_983_940, 11_712, X4),
  'wrn_16_1': (180_916, 928, X1),
  'wrn_16_2': (703_284, 1_824, X2),
  'wrn_40_1': (569_780, 2_720, X1),
  'wrn_40_2': (2_255_156, 5_408, X2),
}
ONE_OF_EACH = ('resnet8', 'wrn_16_1')
# Compiling takes most of a small test's time.
FAST_COMPILE = {'xla_backend_optimization_level': 0}


@functools.cache
def shapes_of(name, image_shape, truncated=False, dtype=jnp.float32):
  """Returns shapes of the Features and of the variables."""
  backbone = models.build(name, truncated=truncated, dtype=dtype)
  images = jax.ShapeDtypeStruct((2, *image_shape), jnp.float32)
  return jax.eval_shape(
    lambda x: backbone.init_with_output(jax.random.key(0), x, train=False),
    images,
  )


def num_elements(tree):
  return sum(leaf.size for leaf in jax.tree.leaves(tree))


def noise(shapes, seed=0):
  """Returns variables that leave no layer without effect."""
  rng = np.random.RandomState(seed)
  flat = traverse_util.flatten_dict(shapes)
  for path, leaf in flat.items():
    values = rng.randn(*leaf.shape)
    if path[-1] in ('scale', 'var'):
      values = 1 + np.abs(values) / 2
    elif path[-1] == 'kernel':
      values *= np.sqrt(2 / np.prod(leaf.shape[:-1]))
    flat[path] = values.astype(np.float32)
  return traverse_util.unflatten_dict(flat)


def run(name, image_shape=(8, 8, 1), **settings):
  """Returns Features, variables and input of a backbone full of noise."""
  backbone = models.build(name, **settings)
  _, shapes = shapes_of(name, image_shape, settings.get('truncated', False))
  variables = noise(shapes)
  x = np.random.RandomState(1).randn(2, *image_shape).astype(np.float32)
  return backbone.apply(variables, x, train=False), variables, x


@pytest.mark.parametrize('name', models.BACKBONES)
def test_sizes_are_the_published_ones(name):
  num_params, num_stats, stages = PUBLISHED[name]
  features, variables = shapes_of(name, (32, 32, 3))
  head = jax.eval_shape(
    lambda: models.build(name).init_head(
      jax.random.key(0), features.pooled.shape[-1], 100
    )
  )
  assert num_elements(variables['params']) + num_elements(head) == num_params
  assert num_elements(variables['batch_stats']) == num_stats
  assert set(variables) == {'params', 'batch_stats'}
  assert [stage.shape for stage in features.stages] == [
    (2, size, size, channels) for channels, size in stages
  ]
  assert features.pooled.shape == (2, features.final.shape[-1])


@pytest.mark.parametrize('name', models.BACKBONES)
def test_images_may_have_any_size_and_any_number_of_channels(name):
  image_shape = (33, 30, 4)
  _, _, stages = PUBLISHED[name]
  features, _ = shapes_of(name, image_shape)
  for features_of_stage, (channels, size) in zip(
    features.stages, stages, strict=True
  ):
    halvings = 32 // size
    height, width = (-(-side // halvings) for side in image_shape[:2])
    assert features_of_stage.shape == (2, height, width, channels)


@pytest.mark.parametrize(
  'name, truncated',
  [
    *((name, False) for name in models.BACKBONES),
    *((name, True) for name in ONE_OF_EACH),
  ],
)
def test_contract(name, truncated):
  """The head of the pooled final map gives the logits, in every backbone."""
  backbone = models.build(name, truncated=truncated)
  features, variables, x = run(name, truncated=truncated)
  final = np.asarray(features.final)
  assert final.std() > 0
  assert (final.min() < 0) == backbone.signed
  assert (features.pooled.min() < 0) == backbone.pooled_signed
  assert features.pooled.dtype == jnp.float32
  if backbone.pools_map:
    pooled = backbone.pool(features.final)
    np.testing.assert_array_equal(features.pooled, pooled)
  width = features.pooled.shape[-1]
  rng = np.random.RandomState(2)
  head = {
    'kernel': rng.randn(width, 7).astype(np.float32),
    'bias': rng.randn(7).astype(np.float32),
  }
  net = network.Network(
    backbone,
    augment.Preprocessing((0.5,), (0.5,), x.shape[1:3]),
    connector=None,
    connect_size=None,
    pool=lambda _, final: backbone.pool(final),
  )
  out = net(
    {
      'params': {'backbone': variables['params'], 'head': head},
      'batch_stats': {'backbone': variables['batch_stats']},
    },
    x,
  )
  np.testing.assert_array_equal(out.final, features.final)
  np.testing.assert_array_equal(out.pooled, features.pooled)
  assert len(out.stages) == len(features.stages)
  expected = np.asarray(features.pooled, np.float64) @ head['kernel']
  np.testing.assert_allclose(
    out.logits, expected + head['bias'], rtol=1e-4, atol=1e-4
  )
  assert net.signed == backbone.signed
  assert net.pooled_signed == backbone.pooled_signed
  assert net.pools_map == backbone.pools_map
  assert out.connected is None


@pytest.mark.parametrize('name', models.BACKBONES)
def test_truncated_ends_at_the_last_stage(name):
  backbone = models.build(name, truncated=True)

  def init(x):
    features, variables = backbone.init_with_output(
      jax.random.key(0), x, train=False
    )
    assert features.final is features.stages[-1]
    return variables

  cut = jax.eval_shape(init, jax.ShapeDtypeStruct((2, 8, 8, 1), jnp.float32))
  _, full = shapes_of(name, (8, 8, 1))
  full, cut = (
    {path: leaf.shape for path, leaf in traverse_util.flatten_dict(v).items()}
    for v in (full, cut)
  )
  assert cut.items() <= full.items()
  dropped = {path[1] for path in full.keys() - cut.keys()}
  assert dropped == ({'bn1'} if name.startswith('wrn') else set())


@pytest.mark.parametrize('truncated', [False, True])
@pytest.mark.parametrize('name', ONE_OF_EACH)
def test_every_parameter_has_an_effect_on_the_final_map(name, truncated):
  features, variables, x = run(name, truncated=truncated)
  backbone = models.build(name, truncated=truncated)
  weights = np.random.RandomState(3).randn(*features.final.shape)

  @functools.partial(jax.jit, compiler_options=FAST_COMPILE)
  def gradient(params):
    def score(params):
      moving = {**variables, 'params': params}
      final = backbone.apply(moving, x, train=False).final
      return jnp.sum(final * weights)

    return jax.grad(score)(params)

  gradients = traverse_util.flatten_dict(gradient(variables['params']))
  assert (
    gradients.keys() == traverse_util.flatten_dict(variables['params']).keys()
  )
  assert not [path for path, g in gradients.items() if not np.any(g)]


@pytest.mark.parametrize('name', ONE_OF_EACH)
def test_bfloat16_keeps_parameters_and_pooled_in_float32(name):
  features, variables = shapes_of(name, (8, 8, 1), dtype=jnp.bfloat16)
  assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {
    jnp.dtype(jnp.float32)
  }
  assert features.final.dtype == jnp.bfloat16
  assert features.pooled.dtype == jnp.float32
  exact, _, _ = run(name)
  low, _, _ = run(name, dtype=jnp.bfloat16)
  error = np.abs(low.pooled - exact.pooled).mean()
  assert 0 < error < 0.03 * np.abs(exact.pooled).mean()
  pooled = np.asarray(low.final.astype(jnp.float32)).mean(axis=(1, 2))
  np.testing.assert_allclose(low.pooled, pooled, rtol=1e-6)


def test_unknown_name_names_the_nearest():
  with pytest.raises(
    config_utils.UserError,
    match="unknown backbone 'resnet8x5'; did you mean 'resnet8x4'.*known: ",
  ):
    models.build('resnet8x5')


def test_build_reaches_outside_and_passes_settings_on():
  backbone = models.build(
    'ijckd_jax.models:WideResNet', truncated=True, axis_name='a'
  )
  assert backbone == models.WideResNet(truncated=True, axis_name='a')


@pytest.mark.parametrize(
  'name, said',
  [
    ('json:loads', 'does not make a backbone: loads'),
    ('json:__name__', 'does not make a backbone: .* not callable'),
    ('collections:OrderedDict', 'makes a OrderedDict, which is not a models'),
    ('flax.linen:Module', 'does not make a backbone: '),
  ],
)
def test_what_is_no_backbone(name, said):
  with pytest.raises(
    config_utils.UserError, match=f"^'{name}' {said}"
  ) as error:
    models.build(name, truncated=True)
  assert '\n' not in str(error.value)


@pytest.mark.parametrize('name, depth', [('ResNet', 21), ('WideResNet', 20)])
def test_depth_that_cannot_be(name, depth):
  backbone = getattr(models, name)(depth=depth)
  with pytest.raises(ValueError, match=f'depth {depth} is not 6n'):
    backbone.init(jax.random.key(0), jnp.ones((1, 8, 8, 1)), train=False)


class OneConv(backbone_lib.Backbone):
  """A single convolution."""

  features: int = 1
  kernel: int = 3
  stride: int = 1

  @nn.compact
  def __call__(self, x, *, train):
    return self.conv(self.features, self.kernel, self.stride, name='conv')(x)


def test_strided_convolution_is_padded_on_both_sides():
  x = jnp.arange(1.0, 17.0).reshape(1, 4, 4, 1)
  ones = {'params': {'conv': {'kernel': jnp.ones((3, 3, 1, 1))}}}
  y = OneConv(stride=2).apply(ones, x, train=False)
  # Rows and columns (-1, 0, 1) and (1, 2, 3) of 1 2 3 4 / 5 6 7 8 / ...
  assert y.shape == (1, 2, 2, 1)
  np.testing.assert_array_equal(
    y[0, :, :, 0],
    [
      [1 + 2 + 5 + 6, 2 + 3 + 4 + 6 + 7 + 8],
      [5 + 6 + 9 + 10 + 13 + 14, 6 + 7 + 8 + 10 + 11 + 12 + 14 + 15 + 16],
    ],
  )


def convolve(x, kernel, stride=1):
  """Convolves as PyTorch does with padding (k-1)/2, window by window."""
  size = kernel.shape[0]
  pad = (size - 1) // 2
  x = np.pad(x, ((0, 0), (pad, pad), (pad, pad), (0, 0)))
  rows = range(0, x.shape[1] - size + 1, stride)
  columns = range(0, x.shape[2] - size + 1, stride)
  return np.stack(
    [
      np.stack(
        [
          np.tensordot(x[:, i : i + size, j : j + size], kernel, 3)
          for j in columns
        ],
        axis=1,
      )
      for i in rows
    ],
    axis=1,
  )


class Numpy:
  """Layers in float64 numpy, with a network's variables by layer name."""

  def __init__(self, variables):
    self.params = variables['params']
    self.stats = variables['batch_stats']

  def conv(self, x, name, stride=1):
    kernel = np.asarray(self.params[name]['kernel'], np.float64)
    return convolve(x, kernel, stride)

  def norm(self, x, name):
    stats, params = self.stats[name], self.params[name]
    x = (x - stats['mean']) / np.sqrt(stats['var'] + 1e-5)
    return x * params['scale'] + params['bias']


@pytest.mark.parametrize('size, stride', [(3, 1), (3, 2), (1, 2), (1, 1)])
@pytest.mark.parametrize('shape', [(5, 5), (4, 7)])
def test_convolution_by_brute_force(size, stride, shape):
  rng = np.random.RandomState(0)
  x = rng.randn(2, *shape, 3).astype(np.float32)
  kernel = rng.randn(size, size, 3, 4).astype(np.float32)
  y = OneConv(features=4, kernel=size, stride=stride).apply(
    {'params': {'conv': {'kernel': kernel}}}, x, train=False
  )
  expected = convolve(x, kernel, stride)
  np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-4)


def relu(x):
  return np.maximum(x, 0)


def resnet_by_hand(net, x, num_blocks):
  """Conv-BN-ReLU-conv-BN, add, ReLU; 1x1 conv and BN where shapes change."""
  x = relu(net.norm(net.conv(x, 'conv1'), 'bn1'))
  stages = [x]
  for stage in (1, 2, 3):
    for block in range(num_blocks):
      stride = 2 if stage > 1 and block == 0 else 1
      name = f'layer{stage}_{block}'
      y = relu(net.norm(net.conv(x, f'{name}_conv1', stride), f'{name}_bn1'))
      y = net.norm(net.conv(y, f'{name}_conv2'), f'{name}_bn2')
      if y.shape != x.shape:
        x = net.conv(x, f'{name}_downsample_conv', stride)
        x = net.norm(x, f'{name}_downsample_bn')
      x = relu(x + y)
    stages.append(x)
  return stages, x


def wrn_by_hand(net, x, num_blocks):
  """BN-ReLU-conv-BN-ReLU-conv, add; a 1x1 shortcut is of the activated."""
  x = net.conv(x, 'conv1')
  stages = [x]
  for stage in (1, 2, 3):
    for block in range(num_blocks):
      stride = 2 if stage > 1 and block == 0 else 1
      name = f'block{stage}_{block}'
      activated = relu(net.norm(x, f'{name}_bn1'))
      y = net.conv(activated, f'{name}_conv1', stride)
      y = net.conv(relu(net.norm(y, f'{name}_bn2')), f'{name}_conv2')
      if y.shape != x.shape:
        x = net.conv(activated, f'{name}_shortcut', stride)
      x = x + y
    stages.append(x)
  return stages, relu(net.norm(x, 'bn1'))


@pytest.mark.parametrize(
  'name, by_hand, num_blocks',
  [
    ('resnet8', resnet_by_hand, 1),
    ('resnet14x2', resnet_by_hand, 2),
    ('wrn_16_1', wrn_by_hand, 2),
    ('wrn_16_2', wrn_by_hand, 2),
  ],
)
def test_forward_by_hand(name, by_hand, num_blocks):
  features, variables, x = run(name, image_shape=(6, 9, 2))
  stages, final = by_hand(Numpy(variables), x.astype(np.float64), num_blocks)
  for stage, expected in zip(
    (*features.stages, features.final), (*stages, final), strict=True
  ):
    np.testing.assert_allclose(
      stage, expected, rtol=1e-3, atol=1e-4 * np.abs(expected).max()
    )
  np.testing.assert_allclose(features.pooled, final.mean((1, 2)), rtol=1e-4)


def test_batch_norm_has_pytorchs_momentum_and_epsilon():
  class OneNorm(backbone_lib.Backbone):
    @nn.compact
    def __call__(self, x, *, train):
      return self.norm(train, name='bn')(x)

  x = np.random.RandomState(0).randn(4, 3, 3, 2).astype(np.float32) / 100 + 1
  variables = OneNorm().init(jax.random.key(0), x, train=False)
  y, changed = OneNorm().apply(
    variables, x, train=True, mutable=['batch_stats']
  )
  mean, var = x.mean((0, 1, 2)), x.var((0, 1, 2))
  np.testing.assert_allclose(
    y, (x - mean) / np.sqrt(var + 1e-5), rtol=1e-2, atol=1e-3
  )
  stats = changed['batch_stats']['bn']
  np.testing.assert_allclose(stats['mean'], 0.1 * mean, rtol=1e-4)
  np.testing.assert_allclose(stats['var'], 0.9 + 0.1 * var, rtol=1e-5)


@pytest.mark.parametrize('name', ONE_OF_EACH)
def test_start_of_backbones(name):
  """Convolutions are N(0, 2 / (k k C_out)), batch norms the identity."""
  backbone = models.build(name)
  variables = jax.jit(
    functools.partial(backbone.init, train=False), compiler_options=FAST_COMPILE
  )(jax.random.key(0), jnp.ones((1, 4, 4, 3)))
  for path, leaf in traverse_util.flatten_dict(variables).items():
    leaf = np.asarray(leaf)
    if path[-1] != 'kernel':
      expected = 1 if path[-1] in ('scale', 'var') else 0
      assert (leaf == expected).all(), path
      continue
    kernel, _, _, channels = leaf.shape
    std = np.sqrt(2 / (kernel * kernel * channels))
    # Six standard errors of an estimated standard deviation and mean.
    assert abs(leaf.std() / std - 1) < 6 / np.sqrt(2 * leaf.size), path
    assert abs(leaf.mean() / std) < 6 / np.sqrt(leaf.size), path
    if leaf.size > 30_000:  # A normal has 4.6 % beyond 2, and is not cut.
      assert abs(np.mean(np.abs(leaf) > 2 * std) - 0.0455) < 0.01, path
      assert np.abs(leaf).max() > 3.5 * std, path


@pytest.mark.parametrize('name', models.BACKBONES)
def test_start_of_heads(name):
  """Heads are U(+-1/sqrt(D)), but those of a WRN have no bias at first."""
  head = models.build(name).init_head(jax.random.key(0), 64, 100)
  kernel, bias = np.asarray(head['kernel']), np.asarray(head['bias'])
  assert kernel.shape == (64, 100) and bias.shape == (100,)
  assert kernel.dtype == bias.dtype == np.float32
  for values in (kernel,) if name.startswith('wrn') else (kernel, bias):
    assert np.abs(values).max() <= 1 / 8
    assert np.abs(values).max() > 0.9 / 8
    assert abs(values.mean()) < 6 / 8 / np.sqrt(3 * values.size)
  assert abs(kernel.std() * 8 * np.sqrt(3) - 1) < 0.05
  assert bias.any() != name.startswith('wrn')
