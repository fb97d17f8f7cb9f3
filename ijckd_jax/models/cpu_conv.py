"""Convolutions that are faster on CPUs than XLA's.

A 1x1 convolution is a matrix product. A depthwise 3x3 convolution is the sum of
nine products by element; XLA computes a full convolution instead. A wide 3x3
convolution goes by `winograd`. Any other 3x3 convolution is XLA's, but its
kernel gradient is `kernel_gradient`. All are exact but for rounding: some 1e-6
of the largest value in float32. XLA computes every convolution that
`_is_handled` refuses, and all convolutions on GPUs and TPUs.

An `Algorithm` may be deleted once XLA's convolution is as fast on every JAX
that setup.cfg allows: `python -m experiments.benchmarks.convolutions` compares
them. With the last one go `winograd`, `kernel_gradient` and the decorators of
the steps. Runs on CPUs then end with other bits.
"""

from collections.abc import Callable
import functools
from typing import NamedTuple

import flax.linen as nn
import jax
from jax import lax
import jax.numpy as jnp

from ijckd_jax.models import kernel_gradient
from ijckd_jax.models import winograd

# With fewer, products are too small to pay for the transforms.
MIN_CHANNELS = 64


class Algorithm(NamedTuple):
  """How a convolution is worked out.

  Attributes:
    convolve: `(x, kernel, stride)` to the result.
    by_x: `(kernel, g, stride, shape of x)` to the input gradient.
    by_kernel: `(x, g, stride)` to the kernel gradient.
  """

  convolve: Callable
  by_x: Callable
  by_kernel: Callable


def fast_convolutions():
  """Returns a context in which Linen's convolutions are fast on CPUs."""
  return nn.intercept_methods(_intercept)


def _intercept(next_fun, args, kwargs, context):
  conv = context.module
  if type(conv) is not nn.Conv or context.method_name != '__call__':
    return next_fun(*args, **kwargs)
  kernel = conv.get_variable('params', 'kernel')
  # During init there is no kernel yet.
  if len(args) != 1 or not isinstance(kernel, jax.Array):
    return next_fun(*args, **kwargs)
  if not _is_handled(conv, kernel, *args):
    return next_fun(*args, **kwargs)
  y = convolve(*args, kernel, conv.strides)
  return y + conv.get_variable('params', 'bias') if conv.use_bias else y


def _is_handled(conv, kernel, x):
  side, groups = kernel.shape[0], conv.feature_group_count
  plain = (
    x.ndim == 4
    and kernel.shape[:2] in ((1, 1), (3, 3))
    and x.dtype == kernel.dtype == jnp.float32
    and conv.dtype in (None, jnp.float32)
    and conv.padding == (side - 1) // 2
    and conv.strides in (1, 2)
    and conv.input_dilation == conv.kernel_dilation == 1
    and conv.mask is conv.precision is None
    and conv.conv_general_dilated is conv.conv_general_dilated_cls is None
  )
  if not plain or groups == 1:
    return plain
  return side == 3 and groups == conv.features == x.shape[-1]


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def convolve(x: jax.Array, kernel: jax.Array, stride: int) -> jax.Array:
  """Returns (B, H', W', D): `x` padded by half of the kernel, convolved.

  Args:
    x: (B, H, W, C) float32.
    kernel: (1, 1, C, D) or (3, 3, C, D) float32; or depthwise (3, 3, 1, C).
    stride: 1 or 2.
  """
  algorithm = algorithm_of(x, kernel, stride)
  on_cpu = functools.partial(algorithm.convolve, stride=stride)
  elsewhere = functools.partial(xla_convolve, stride=stride)
  return lax.platform_dependent(x, kernel, cpu=on_cpu, default=elsewhere)


def xla_convolve(x: jax.Array, kernel: jax.Array, stride: int) -> jax.Array:
  """Returns the same by XLA's own convolution."""
  padding = ((kernel.shape[0] - 1) // 2,) * 2
  return lax.conv_general_dilated(
    x,
    kernel,
    (stride, stride),
    (padding, padding),
    dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
    feature_group_count=x.shape[-1] // kernel.shape[2],
  )


def _convolve_fwd(x, kernel, stride):
  return convolve(x, kernel, stride), (x, kernel)


def _convolve_bwd(stride, kept, g):
  algorithm = algorithm_of(*kept, stride)

  def on_cpu(x, kernel, g):
    by_x = algorithm.by_x(kernel, g, stride, x.shape)
    return by_x, algorithm.by_kernel(x, g, stride)

  def elsewhere(x, kernel, g):
    function = functools.partial(xla_convolve, stride=stride)
    return jax.vjp(function, x, kernel)[1](g)

  return lax.platform_dependent(*kept, g, cpu=on_cpu, default=elsewhere)


convolve.defvjp(_convolve_fwd, _convolve_bwd)


def algorithm_of(x, kernel, stride: int) -> Algorithm:
  """Returns how a convolution is worked out on a CPU."""
  if kernel.shape[0] == 1:
    return POINTWISE
  if kernel.shape[2] < x.shape[-1]:
    return DEPTHWISE
  is_wide = stride == 1 and min(kernel.shape[2:]) >= MIN_CHANNELS
  return WIDE if is_wide else NARROW


def _xla_by_x(kernel, g, stride, shape):
  x = jax.ShapeDtypeStruct(shape, g.dtype)
  function = functools.partial(xla_convolve, kernel=kernel, stride=stride)
  return jax.linear_transpose(function, x)(g)[0]


def _pointwise(x, kernel, stride):
  return jnp.dot(x[:, ::stride, ::stride], kernel[0, 0])


def _pointwise_by_x(kernel, g, stride, shape):
  return _spread(jnp.dot(g, kernel[0, 0].T), stride, shape)


def _pointwise_by_kernel(x, g, stride):
  x = x[:, ::stride, ::stride]
  return kernel_gradient.product(x, g)[None, None]


def _depthwise(x, kernel, stride):
  taps = kernel_gradient.taps(x, stride)
  return sum(map(jnp.multiply, taps, kernel.reshape(9, -1)))


def _depthwise_by_x(kernel, g, stride, shape):
  taps = kernel_gradient.taps(_spread(g, stride, shape), 1)
  return sum(map(jnp.multiply, taps, kernel.reshape(9, -1)[::-1]))


def _depthwise_by_kernel(x, g, stride):
  taps = kernel_gradient.taps(x, stride)
  by_kernel = jnp.stack([jnp.sum(tap * g, (0, 1, 2)) for tap in taps])
  return by_kernel.reshape(3, 3, 1, -1)


def _winograd(x, kernel, stride):
  del stride  # It is 1.
  return winograd.convolve(x, kernel)


def _winograd_by_x(kernel, g, stride, shape):
  del stride, shape
  return winograd.convolve(g, jnp.flip(kernel, (0, 1)).swapaxes(2, 3))


def _winograd_by_kernel(x, g, stride):
  del stride
  return winograd.gradient_by_kernel(x, g)


def _spread(g, stride, shape):
  """Returns `g` with zeros between the pixels, up to the size of `shape`."""
  sides = [
    (0, old - stride * (new - 1) - 1, stride - 1)
    for old, new in zip(shape[1:3], g.shape[1:3], strict=True)
  ]
  return lax.pad(g, 0.0, [(0, 0, 0), *sides, (0, 0, 0)])


POINTWISE = Algorithm(_pointwise, _pointwise_by_x, _pointwise_by_kernel)
DEPTHWISE = Algorithm(_depthwise, _depthwise_by_x, _depthwise_by_kernel)
NARROW = Algorithm(xla_convolve, _xla_by_x, kernel_gradient.gradient)
WIDE = Algorithm(_winograd, _winograd_by_x, _winograd_by_kernel)
