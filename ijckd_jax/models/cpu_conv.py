"""3x3 convolutions that are faster on CPUs; to be deleted when XLA's are.

Wide ones go by `winograd`. Depthwise ones are nine products and their sum, of
which XLA makes much more. Both are exact but for rounding: some 1e-6 of the
largest value in float32. What `_is_handled` does not name is left to XLA, as
everything is on GPUs and TPUs.
"""

import functools

import flax.linen as nn
import jax
from jax import lax
import jax.numpy as jnp

from ijckd_jax.models import winograd

# With fewer, products are too small to pay for the transforms.
MIN_CHANNELS = 64


def fast_convolutions():
  """Returns a context in which Linen's convolutions are fast on CPUs."""
  return nn.intercept_methods(_intercept)


def _intercept(next_fun, args, kwargs, context):
  conv = context.module
  if type(conv) is not nn.Conv or context.method_name != '__call__':
    return next_fun(*args, **kwargs)
  kernel = conv.get_variable('params', 'kernel')
  # While it is being made there is none.
  if len(args) != 1 or not isinstance(kernel, jax.Array):
    return next_fun(*args, **kwargs)
  if not _is_handled(conv, kernel, *args):
    return next_fun(*args, **kwargs)
  y = convolve(*args, kernel, conv.strides)
  return y + conv.get_variable('params', 'bias') if conv.use_bias else y


def _is_handled(conv, kernel, x):
  plain = (
    x.ndim == 4
    and kernel.shape[:2] == (3, 3)
    and x.dtype == kernel.dtype == jnp.float32
    and conv.dtype in (None, jnp.float32)
    and conv.padding == conv.input_dilation == conv.kernel_dilation == 1
    and conv.mask is conv.precision is None
    and conv.conv_general_dilated is conv.conv_general_dilated_cls is None
  )
  if not plain or kernel.shape[2] == 1:
    depthwise = conv.feature_group_count == conv.features == x.shape[-1]
    return plain and depthwise and conv.strides in (1, 2)
  wide = min(kernel.shape[2:]) >= MIN_CHANNELS
  return wide and conv.feature_group_count == conv.strides == 1


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def convolve(x: jax.Array, kernel: jax.Array, stride: int) -> jax.Array:
  """Returns (B, H, W, D): `x` padded by one pixel, convolved.

  Args:
    x: (B, H, W, C) float32.
    kernel: (3, 3, C, D) float32, for a stride of 1; or depthwise (3, 3, 1, C).
    stride: 1 or 2.
  """

  def here(x, kernel):
    if kernel.shape[2] > 1:
      return winograd.convolve(x, kernel)
    return sum(map(jnp.multiply, _taps(x, stride), kernel.reshape(9, -1)))

  xla = functools.partial(xla_convolve, stride=stride)
  return lax.platform_dependent(x, kernel, cpu=here, default=xla)


def xla_convolve(x: jax.Array, kernel: jax.Array, stride: int) -> jax.Array:
  """Returns the same by XLA's own convolution."""
  return lax.conv_general_dilated(
    x,
    kernel,
    (stride, stride),
    ((1, 1), (1, 1)),
    dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
    feature_group_count=x.shape[-1] // kernel.shape[2],
  )


def _convolve_fwd(x, kernel, stride):
  return convolve(x, kernel, stride), (x, kernel)


def _convolve_bwd(stride, kept, g):
  def here(x, kernel, g):
    if kernel.shape[2] > 1:
      return winograd.gradients(x, kernel, g)
    by_kernel = [jnp.sum(t * g, (0, 1, 2)) for t in _taps(x, stride)]
    # Zeros between the gradients of a strided convolution, up to x's size.
    sides = [
      (0, old - stride * (new - 1) - 1, stride - 1)
      for old, new in zip(x.shape[1:3], g.shape[1:3], strict=True)
    ]
    g = lax.pad(g, 0.0, [(0, 0, 0), *sides, (0, 0, 0)])
    turned = kernel.reshape(9, -1)[::-1]
    by_x = sum(map(jnp.multiply, _taps(g, 1), turned))
    return by_x, jnp.stack(by_kernel).reshape(kernel.shape)

  def xla(x, kernel, g):
    xla_fn = functools.partial(xla_convolve, stride=stride)
    return jax.vjp(xla_fn, x, kernel)[1](g)

  return lax.platform_dependent(*kept, g, cpu=here, default=xla)


convolve.defvjp(_convolve_fwd, _convolve_bwd)


def _taps(x, stride):
  """Returns what each of the nine taps of a kernel meets."""
  _, height, width, _ = x.shape
  x = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
  return [
    x[:, i : i + height : stride, j : j + width : stride]
    for i in range(3)
    for j in range(3)
  ]
