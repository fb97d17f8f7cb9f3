"""The convolutions for CPUs are XLA's, but for rounding."""

import functools

import flax.linen as nn
import jax
from jax import test_util
import jax.numpy as jnp
import numpy as np
import pytest

from ijckd_jax.models import cpu_conv
from ijckd_jax.models import kernel_gradient
from ijckd_jax.models import layers
from ijckd_jax.models import winograd

# Batch and sides of the images, channels in and out, side of the kernel,
# stride, depthwise: every way, also of sides that are odd or below a kernel's.
HANDLED = [
  (4, 8, 8, 64, 64, 3, 1, False),
  (3, 7, 9, 64, 96, 3, 1, False),
  (1, 1, 1, 64, 64, 3, 1, False),
  (3, 7, 9, 128, 144, 3, 1, False),
  (2, 2, 2, 128, 128, 3, 1, False),
  (4, 8, 6, 16, 24, 3, 1, False),
  (3, 7, 9, 1, 16, 3, 1, False),
  (2, 1, 1, 16, 16, 3, 1, False),
  (4, 8, 6, 16, 24, 3, 2, False),
  (3, 7, 9, 16, 24, 3, 2, False),
  (2, 8, 8, 128, 128, 3, 2, False),
  (2, 1, 1, 16, 16, 3, 2, False),
  (4, 8, 6, 16, 24, 1, 1, False),
  (4, 8, 6, 16, 24, 1, 2, False),
  (3, 7, 9, 16, 24, 1, 2, False),
  (2, 8, 6, 24, 24, 3, 1, True),
  (2, 8, 6, 24, 24, 3, 2, True),
  (2, 7, 9, 24, 24, 3, 2, True),
  (2, 8, 6, 24, 24, 5, 1, True),
  (2, 7, 9, 24, 24, 5, 2, True),
  (2, 3, 2, 24, 24, 7, 1, True),
]
SIZES = 'batch, height, width, inputs, outputs, side, stride, depthwise'


def draw(batch, height, width, inputs, outputs, side, depthwise):
  """Returns images and a kernel."""
  rng = np.random.RandomState(0)
  x = rng.randn(batch, height, width, inputs)
  kernel = rng.randn(side, side, 1 if depthwise else inputs, outputs)
  return jnp.float32(x), jnp.float32(kernel)


@pytest.mark.parametrize(SIZES, HANDLED)
def test_values_and_gradients_are_xlas(
  batch, height, width, inputs, outputs, side, stride, depthwise
):
  x, kernel = draw(batch, height, width, inputs, outputs, side, depthwise)

  def all_of(function):
    function = functools.partial(function, stride=stride)
    y, pullback = jax.vjp(function, x, kernel)
    # Not a constant: every entry of the gradients shall matter.
    return y, *pullback(jnp.cos(jnp.arange(y.size)).reshape(y.shape))

  ours = jax.jit(
    lambda: all_of(lambda x, k, stride: cpu_conv.convolve(x, k, stride))
  )()
  theirs = jax.jit(lambda: all_of(cpu_conv.xla_convolve))()
  for mine, expected in zip(ours, theirs, strict=True):
    scale = np.abs(expected).max()
    np.testing.assert_allclose(mine, expected, rtol=0, atol=3e-6 * scale)


@pytest.mark.parametrize('height, width', [(8, 6), (7, 9), (1, 2)])
@pytest.mark.parametrize('stride', [1, 2])
@pytest.mark.parametrize('side', cpu_conv.DEPTHWISE_SIDES)
def test_a_depthwise_convolution_may_be_padded_as_by_tensorflow(
  side, stride, height, width
):
  """Of an even side, by one pixel less above than below."""
  x, _ = draw(2, height, width, 24, 24, 1, False)
  conv = layers.conv(
    24, side, stride, feature_group_count=24, padding='SAME', use_bias=True
  )
  assert is_custom(conv, x)
  variables = conv.init(jax.random.key(0), x)

  def all_of():
    y, pullback = jax.vjp(conv.apply, variables, x)
    return y, pullback(jnp.cos(jnp.arange(y.size)).reshape(y.shape))

  theirs = jax.jit(all_of)()
  with cpu_conv.fast_convolutions():
    ours = jax.jit(lambda: all_of())()
  for mine, expected in zip(*map(jax.tree.leaves, (ours, theirs)), strict=True):
    scale = np.abs(expected).max()
    np.testing.assert_allclose(mine, expected, rtol=0, atol=3e-6 * scale)


@pytest.mark.parametrize(
  'side, stride, depthwise',
  [
    (5, 2, True),
    (3, 1, False),
    (3, 2, False),
    (3, 1, True),
    (1, 1, False),
    (1, 2, False),
  ],
)
def test_gradients_are_of_the_values(side, stride, depthwise):
  """By finite differences, with no other convolution to lean on."""
  with jax.enable_x64(True):
    x, kernel = draw(2, 5, 4, 4, 4, side, depthwise)
    x, kernel = x.astype(jnp.float64), kernel.astype(jnp.float64)
    function = functools.partial(cpu_conv.convolve, stride=stride)
    test_util.check_grads(
      lambda x, k: function(x, k), (x, kernel), order=1, modes=['rev']
    )


def test_a_part_of_the_images_at_a_time_gives_the_same(monkeypatch):
  x, kernel = draw(6, 8, 8, 4, 4, 3, False)
  g = jnp.cos(jnp.arange(x.size)).reshape(x.shape)
  for stride in (1, 2):
    g = g[:, ::stride, ::stride]
    whole = kernel_gradient.gradient(x, g, stride)
    with monkeypatch.context() as patch:
      patch.setattr(kernel_gradient, 'MAX_BYTES', 0)
      parts = kernel_gradient.gradient(x, g, stride)
    assert whole.shape == kernel.shape
    np.testing.assert_allclose(parts, whole, rtol=0, atol=1e-4)


def test_algorithm_by_shape():
  """Narrow, wide, strided, pointwise and depthwise ones."""

  def algorithm(inputs, outputs, side=3, stride=1, groups=1):
    kernel = jnp.zeros((side, side, inputs // groups, outputs))
    x = jnp.zeros((1, 8, 8, inputs))
    return cpu_conv.algorithm_of(x, kernel, stride)

  for inputs, outputs in ((63, 512), (512, 63), (1, 8)):
    assert algorithm(inputs, outputs) is cpu_conv.NARROW
  assert algorithm(512, 512, stride=2) is cpu_conv.NARROW
  assert algorithm(64, 512) is algorithm(512, 64) is cpu_conv.WIDE
  assert algorithm(128, 128, side=1) is cpu_conv.POINTWISE
  assert algorithm(128, 128, groups=128) is cpu_conv.DEPTHWISE


def test_images_are_worked_through_in_parts():
  """As many as fit into the cache, and whatever their number divides by."""
  x = jnp.zeros((12, 32, 32, 64))
  assert winograd._cut(x, 64).shape == (6, 2, 32, 32, 64)
  assert winograd._cut(x[:7], 64).shape == (7, 1, 32, 32, 64)
  assert winograd._cut(x[:, :7, :7], 64).shape == (1, 12, 8, 8, 64)


def is_custom(conv, x):
  """Returns whether a convolution is taken from XLA."""
  variables = conv.init(jax.random.key(0), x)
  with cpu_conv.fast_convolutions():
    jaxpr = jax.make_jaxpr(conv.apply)(variables, x)
  return 'custom_vjp' in str(jaxpr)


def test_what_is_handled_and_what_is_left_to_xla():
  x = jnp.zeros((2, 8, 8, 64))
  assert is_custom(layers.conv(64, 3), x)
  assert is_custom(layers.conv(64, 3, use_bias=True), x)
  assert is_custom(layers.conv(64, 3, feature_group_count=64), x)
  assert is_custom(layers.conv(64, 3, 2, feature_group_count=64), x)
  assert is_custom(layers.conv(32, 3, 2), x)
  assert is_custom(layers.conv(32, 1), x)
  assert is_custom(layers.conv(32, 1, 2), x)
  assert is_custom(layers.conv(32, 1, 2, padding='SAME'), x)
  assert is_custom(layers.conv(64, 3, padding='SAME'), x)
  assert is_custom(layers.conv(64, 7, feature_group_count=64), x)
  for conv in (
    layers.conv(64, 5),
    layers.conv(64, 3, 3),
    layers.conv(64, 1, feature_group_count=64),
    layers.conv(128, 3, feature_group_count=2),
    layers.conv(128, 3, feature_group_count=64),
    layers.conv(64, 3, kernel_dilation=2),
    layers.conv(64, 3, input_dilation=2),
    layers.conv(64, 3, 2, padding='SAME'),
    layers.conv(64, 9, feature_group_count=64),
    layers.conv(64, 3, padding='VALID'),
    layers.conv(64, 3, precision='highest'),
    layers.conv(64, 3, conv_general_dilated=jax.lax.conv_general_dilated),
    layers.conv(64, 3, dtype=jnp.bfloat16),
  ):
    assert not is_custom(conv, x), conv
  assert not is_custom(layers.conv(64, 3), x.astype(jnp.bfloat16))
  with jax.enable_x64(True):
    assert not is_custom(layers.conv(64, 3), x.astype(jnp.float64))


def test_however_a_convolution_is_called():
  x = jnp.zeros((2, 8, 8, 64))
  conv = layers.conv(
    64,
    3,
    kernel_init=nn.with_partitioning(nn.initializers.ones, 4 * (None,)),
  )
  variables = conv.init(jax.random.key(0), x)
  with cpu_conv.fast_convolutions():
    assert conv.apply(variables, x).shape == x.shape
    assert conv.apply(nn.unbox(variables), inputs=x).shape == x.shape


@pytest.mark.parametrize('use_bias', [False, True])
def test_layers_give_what_they_give_without(use_bias):
  x, _ = draw(2, 6, 6, 64, 64, 3, False)
  conv = layers.conv(
    64, 3, use_bias=use_bias, bias_init=nn.initializers.normal()
  )
  variables = conv.init(jax.random.key(0), x)
  with cpu_conv.fast_convolutions():
    ours = conv.apply(variables, x)
  theirs = conv.apply(variables, x)
  assert not np.array_equal(ours, theirs)
  np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5)


@pytest.mark.parametrize('platform', ['cuda', 'tpu'])
def test_accelerators_get_xlas_own(platform):
  x, kernel = draw(2, 8, 8, 64, 64, 3, False)

  def gradients(x, kernel):
    return jax.grad(lambda *a: cpu_conv.convolve(*a, 1).sum(), (0, 1))(
      x, kernel
    )

  traced = jax.jit(gradients).trace(x, kernel)
  there = traced.lower(lowering_platforms=(platform,)).as_text()
  here = traced.lower(lowering_platforms=('cpu',)).as_text()
  assert 'convolution' in there and 'dot_general' not in there
  assert 'dot_general' in here and 'convolution' not in here
