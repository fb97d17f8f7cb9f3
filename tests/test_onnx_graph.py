"""Functions as ONNX graphs, run by onnxruntime, against JAX."""

import collections
import types

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import onnx
import pytest

from ijckd_jax.deploy import deployed as deployed_lib
from ijckd_jax.deploy import onnx_files
from ijckd_jax.models import layers
from ijckd_jax.runtime import config_utils

SHAPE = (6, 8, 4)


def random(*shape, seed=0):
  return np.random.RandomState(seed).normal(size=shape).astype(np.float32)


class Function:
  """A network that is one function of images from 0 to 1."""

  def __init__(self, fn):
    self.fn = fn

  def preprocessing(self, images):
    return images / 255

  def __call__(self, variables, x):
    del variables
    return types.SimpleNamespace(logits=self.fn(x))


def encoded(fn):
  """Returns the file of a function of images (B, 6, 8, 4), flattened."""

  def flat(x):
    return fn(x).reshape(x.shape[0], -1)

  shape = jax.eval_shape(flat, jax.ShapeDtypeStruct((1, *SHAPE), jnp.float32))
  deployed = deployed_lib.Deployed(
    network=Function(flat),
    arrays={},
    unread={},
    image_shape=SHAPE,
    class_names=tuple(map(str, range(shape.shape[1]))),
    takes='float32',
    metadata={'backbone': 'function', 'takes': 'float32'},
  )
  return onnx_files.encode(deployed)


def kinds_of(fn):
  """Returns how many nodes there are of each kind, but for the last two.

  They are the function's last shape, and the probabilities.
  """
  nodes = onnx.load_from_string(encoded(fn)).graph.node
  return collections.Counter(node.op_type for node in nodes)


def assert_same(fn, *, atol=2e-6):
  """Asserts that a function's file does what it does, for two batch sizes."""
  session = onnx_files.Session(encoded(fn), 'function')
  for size in (1, 3):
    images = np.random.RandomState(size).uniform(size=(size, *SHAPE))
    images = images.astype(np.float32)
    wanted = np.asarray(jax.jit(fn)(images)).reshape(size, -1)
    found, _ = session(images)
    assert np.ptp(wanted) > 0  # It could differ.
    np.testing.assert_allclose(
      found, wanted, atol=atol * max(1, np.abs(wanted).max())
    )


def conv(x, features=6, size=(3, 3), strides=1, padding=((1, 1), (1, 1)), **kw):
  """Returns a convolution of channels last."""
  inputs = x.shape[-1] // kw.get('feature_group_count', 1)
  return jax.lax.conv_general_dilated(
    x,
    random(*size, inputs, features),
    (strides, strides),
    padding,
    dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
    **kw,
  )


CHANNELS = random(4, seed=5) + 3


@pytest.mark.parametrize(
  'fn',
  (
    lambda x: conv(x, strides=2),
    lambda x: conv(x, padding=((0, 2), (3, 1)), size=(3, 5)),
    lambda x: conv(x, rhs_dilation=(2, 1), strides=2),
    lambda x: conv(x, features=8, feature_group_count=2),
    lambda x: conv(x, features=4, feature_group_count=4, strides=2),
    lambda x: conv(x, padding='SAME', strides=2),
    lambda x: conv(conv(x), size=(2, 4), padding='VALID'),
    # Other layouts than channels last.
    lambda x: jax.lax.conv(
      x.transpose(0, 3, 1, 2), random(5, 4, 3, 3), (1, 2), 'SAME'
    ),
    lambda x: jax.lax.conv_general_dilated(
      x[:, :, 0],
      random(3, 4, 5),
      (2,),
      ((1, 1),),
      dimension_numbers=('NWC', 'WIO', 'NWC'),
    ),
  ),
)
def test_convolutions(fn):
  assert_same(fn)


@pytest.mark.parametrize('groups', (1, 2, 4))
@pytest.mark.parametrize('pad', (0, 1))
def test_what_comes_before_a_convolution_goes_into_it(groups, pad):
  """Zeros at the borders are those of after the subtraction."""

  def fn(x):
    x = (x - CHANNELS / 9) / CHANNELS
    padding = ((pad, 0), (0, pad))
    return conv(x, 8, padding=padding, feature_group_count=groups)

  assert_same(fn)
  kinds = kinds_of(fn)
  assert kinds['Conv'] == 1 and kinds['Sub'] == pad
  assert not kinds['Mul'] + kinds['Div'] + kinds['Add']


def test_a_scale_of_zero_before_a_convolution():
  scale = np.float32([1, 0, 2, 3])
  assert_same(lambda x: conv(x * scale + CHANNELS))


def test_what_comes_after_a_convolution_goes_into_it():
  scale, bias = random(6, seed=1), random(6, seed=2)

  def fn(x):
    return (conv(x) - bias) * scale / 3 + 2

  assert_same(fn)
  assert kinds_of(fn)['Conv'] == 1
  assert not {'Add', 'Sub', 'Mul', 'Div'} & kinds_of(fn).keys()

  def read_twice(x):
    y = conv(x)
    return y * (y + bias)

  # The bias of one reader is not the other's.
  assert_same(read_twice)
  assert kinds_of(read_twice)['Conv'] == 1
  along_width = random(8, 1, seed=3)
  assert_same(lambda x: conv(x) * along_width + along_width)


@pytest.mark.parametrize(
  'fn',
  (
    lambda x: nn.max_pool(x - 1, (3, 3), (2, 2), ((1, 1), (1, 1))),
    lambda x: nn.max_pool(conv(x), (2, 3), (1, 2), ((0, 1), (2, 0))),
    lambda x: nn.max_pool(x, (1, 3), (1, 1), 'SAME'),
    lambda x: nn.avg_pool(x, (3, 3), (2, 2), ((1, 1), (1, 1))),
    lambda x: nn.avg_pool(conv(x), (2, 4), (2, 4)),
    lambda x: jax.lax.reduce_window(
      x, 0.0, jax.lax.add, (1, 2, 3, 1), (1, 1, 1, 1), 'VALID'
    ),
    lambda x: jax.lax.reduce_window(
      x, -np.inf, jax.lax.max, (1, 2, 2, 1), (1, 1, 1, 1), 'VALID',
      window_dilation=(1, 3, 2, 1),
    ),
    # Of an array with channels first.
    lambda x: nn.max_pool(
      x.transpose(0, 2, 3, 1), (3, 2), (1, 1), ((1, 0), (0, 1))
    ),
  ),
)  # fmt: skip
def test_pools(fn):
  assert_same(fn)
  assert (
    not {'Mul', 'Div'}
    & kinds_of(lambda x: nn.avg_pool(conv(x), (2, 4), (2, 4))).keys()
  )


@pytest.mark.parametrize(
  'axes', ((1,), (3,), (1, 2), (1, 3), (2, 3), (1, 2, 3))
)
def test_reductions(axes):
  """Over the axes of a map, which is stored with its channels first."""

  def fn(x):
    x = conv(x, 5)
    total = jnp.sum(x, axes, keepdims=True)
    spread = jnp.max(x, axes, keepdims=True) - jnp.min(x, axes, keepdims=True)
    return x * total + spread - jnp.mean(x, axes, keepdims=True) * 3

  assert_same(fn)


def test_pooled_features_become_a_map_without_transpositions():
  """As connectors of pooled features take them."""

  def fn(x):
    x = conv(x).mean((1, 2))[:, None, None, :]
    x = conv(x, 5, size=(1, 1), padding='VALID') + random(5, seed=1)
    return nn.relu(x)[:, 0, 0, :]

  assert_same(fn)
  kinds = kinds_of(fn)
  assert kinds['Transpose'] == 1 and kinds['Conv'] == 2 and not kinds['Add']


def test_a_mean_is_one_node():
  kinds = kinds_of(lambda x: jnp.mean(conv(x), (1, 2)) @ random(6, 3))
  assert kinds == {'Transpose': 1, 'Conv': 1, 'ReduceMean': 1} | {
    'Gemm': 1,
    'Softmax': 1,
  }


def attention(x):
  """Returns what three heads of two channels read at 48 places."""
  qkv = conv(x, 18).reshape(x.shape[0], 48, 3, 3, 2)
  query, key, value = (qkv[:, :, i] for i in range(3))
  return jax.nn.dot_product_attention(query, key, value)


@pytest.mark.parametrize(
  'fn',
  (
    lambda x: x.transpose(0, 2, 3, 1),
    lambda x: conv(x).transpose(0, 3, 2, 1),
    lambda x: conv(x).reshape(x.shape[0], 48, 6)[:, ::-1],
    lambda x: conv(x).reshape(x.shape[0], 6, 2, 4, 3, 2).swapaxes(2, 5),
    lambda x: conv(x).reshape(x.shape[0] * 6, 8, 6).sum(1),
    lambda x: layers.channel_shuffle(conv(x), 3),
    lambda x: layers.channel_shuffle(conv(x), 2) * random(6, seed=3),
    lambda x: conv(x)[:, 1:5:2][:, :, ::-1][..., 2],
    lambda x: conv(x)[..., jnp.array([3, 0, 0])],
    lambda x: conv(x)[:, jnp.array([3, 5])],
    lambda x: jnp.pad(conv(x), ((0, 0), (1, 0), (0, 2), (3, 0))),
    lambda x: jnp.pad(x, ((0, 0), (0, 0), (1, 1), (0, 0)), constant_values=7),
    lambda x: sum(
      y * (i + 1) for i, y in enumerate(jnp.split(conv(x), 3, axis=3))
    ),
    lambda x: jnp.concatenate([conv(x), x, x[..., :1] * 0 + 3], axis=-1),
    # A constant, and a mean, are repeated for each image and place.
    lambda x: jnp.concatenate(
      [jnp.broadcast_to(random(1, 1, 8, 4), (x.shape[0], 2, 8, 4)), x], axis=1
    ),
    lambda x: jnp.concatenate(
      [jnp.broadcast_to(x.mean((1, 2), keepdims=True), x.shape), x], axis=2
    ),
    lambda x: jnp.broadcast_to(x[:, :1], x.shape)[:, 2:4].sum(1),
    lambda x: x + random(6, 1, 4, seed=1) * random(8, 1, seed=2),
    lambda x: x.mean((1, 2))[:, None, :, None] * conv(x, 3)[:, :, :4],
  ),
)
def test_layouts(fn):
  assert_same(fn)


def test_a_shuffle_is_one_transposition():
  def fn(x):
    return conv(layers.channel_shuffle(conv(x), 3))

  kinds = kinds_of(fn)
  # The images', the shuffle's and the result's.
  assert kinds['Transpose'] == 3 and kinds['Reshape'] == 3


@pytest.mark.parametrize(
  'fn',
  (
    lambda x: x @ random(4, 7),
    lambda x: (x / CHANNELS + CHANNELS) @ random(4, 7) * 2 + random(7, seed=1),
    lambda x: conv(x).mean((1, 2)) @ random(6, 3) + random(3, seed=1),
    lambda x: random(5, 8) @ x,
    lambda x: jnp.einsum('bhwc,hk->bkwc', x, random(6, 3)),
    lambda x: jnp.einsum('bhwc,hwk->bkc', x, random(6, 8, 3)),
    lambda x: jnp.einsum('bhwc,bhwd->bcd', conv(x), x),
    lambda x: jnp.einsum('bhwc,bhvd->bhwvcd', x, x[..., :2])[:, :2],
    lambda x: jnp.einsum('bhwc,bhvc->bhvw', x[:, :, :3], x),
    lambda x: jnp.einsum('bhwc,bhwd->bhcd', x, conv(x)),
    lambda x: x @ random(4, 1),
    attention,
    lambda x: jax.image.resize(
      x, (x.shape[0], 9, 5, 4), 'bicubic', antialias=True
    ),
  ),
)
def test_products(fn):
  assert_same(fn, atol=1e-5)


@pytest.mark.parametrize(
  'fn',
  (
    nn.relu,
    nn.relu6,
    nn.silu,
    nn.elu,
    nn.leaky_relu,
    nn.sigmoid,
    nn.hard_sigmoid,
    nn.hard_swish,
    nn.hard_tanh,
    nn.softmax,
    nn.tanh,
    lambda x: nn.gelu(x, approximate=False),
    lambda x: nn.gelu(x, approximate=True),
    lambda x: jnp.clip(x, -0.2, 0.3),
    lambda x: jax.lax.clamp(-0.2, x, 0.3),
    lambda x: jnp.maximum(0.5, jnp.minimum(x, 0.7)),
    lambda x: jnp.minimum(nn.relu(x) * 2, 0.5),
    lambda x: jnp.maximum(x, -x[:, ::-1]),
    lambda x: jnp.where((x > 0) & (x != 1), x, jnp.exp(x)),
    lambda x: jnp.sqrt(jnp.abs(x)) + jnp.square(x) + x**3 - 1 / (2 + x * x),
    lambda x: jax.lax.rsqrt(1 + x * x) - (2 - x) / 3,
    lambda x: (jnp.floor(3 * x).astype(jnp.int32) * 2 + 1).astype(jnp.float32),
    lambda x: nn.LayerNorm().apply(
      {'params': {'scale': CHANNELS, 'bias': CHANNELS}}, x
    ),
    # Functions in functions; a constant that is computed; a name.
    lambda x: jax.checkpoint(jax.jit(jnp.sin))(x) * jnp.exp(jnp.arange(4.0)),
    lambda x: jax.lax.stop_gradient(x) - nn.normalize(jnp.float32(CHANNELS)),
  ),
)
def test_elementwise(fn):
  assert_same(lambda x: fn(conv(x, 4) / 9))


def test_bounds_are_one_node():
  assert kinds_of(lambda x: nn.relu6(conv(x)))['Clip'] == 1
  assert 'Relu' not in kinds_of(lambda x: nn.relu6(conv(x)))
  swish = kinds_of(lambda x: conv(nn.hard_swish(conv(x))))
  # The division by six is in the weights.
  assert swish == {'Transpose': 2, 'Conv': 2, 'Add': 1, 'Clip': 1} | {
    'Mul': 1,
    'Reshape': 1,
    'Softmax': 1,
  }


@pytest.mark.parametrize(
  'fn, primitive',
  (
    (lambda x: jnp.cumsum(x, 1), 'cumsum'),
    (lambda x: jnp.sort(x), 'sort'),
    (
      lambda x: conv(x, lhs_dilation=(2, 2)),
      'conv_general_dilated with .*lhs_dilation',
    ),
    (lambda x: x - jnp.sum(x, 0), 'reduce_sum'),
  ),
)
def test_what_has_no_writer_is_named(fn, primitive):
  with pytest.raises(config_utils.UserError, match=primitive) as caught:
    encoded(fn)
  assert '--format stablehlo' in str(caught.value)
