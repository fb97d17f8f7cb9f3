"""Convolutions that are faster on CPUs than XLA's.

A 1x1 convolution is a matrix product. A depthwise convolution is a sum of
products by element; XLA computes a full convolution instead. A wide 3x3
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
DEPTHWISE_SIDES = (3, 5, 7)
Pads = tuple[tuple[int, int], tuple[int, int]]


class Algorithm(NamedTuple):
  """How a convolution is worked out.

  Attributes:
    convolve: `(x, kernel, stride, pads)` to the result.
    by_x: `(kernel, g, stride, pads, shape of x)` to the input gradient.
    by_kernel: `(x, g, stride, pads, side)` to the kernel gradient.
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
  y = convolve(*args, kernel, conv.strides, _pads(conv, kernel, *args))
  return y + conv.get_variable('params', 'bias') if conv.use_bias else y


def _is_handled(conv, kernel, x):
  side, groups = kernel.shape[0], conv.feature_group_count
  plain = (
    x.ndim == 4
    and kernel.shape[0] == kernel.shape[1]
    and x.dtype == kernel.dtype == jnp.float32
    and conv.dtype in (None, jnp.float32)
    and conv.strides in (1, 2)
    and conv.input_dilation == conv.kernel_dilation == 1
    and conv.mask is conv.precision is None
    and conv.conv_general_dilated is conv.conv_general_dilated_cls is None
  )
  if not plain:
    return False
  pads = _pads(conv, kernel, x)
  if groups == 1:
    return side in (1, 3) and pads == half(side)
  is_depthwise = groups == conv.features == x.shape[-1]
  return is_depthwise and side in DEPTHWISE_SIDES and pads is not None


def _pads(conv, kernel, x) -> Pads | None:
  """Returns by how much an input is padded; None if that is unusual."""
  side = kernel.shape[0]
  if conv.padding == (side - 1) // 2:
    return half(side)
  if conv.padding == 'SAME':
    sides, strides = x.shape[1:3], 2 * (conv.strides,)
    return tuple(lax.padtype_to_pads(sides, 2 * (side,), strides, 'SAME'))
  return None


def half(side: int) -> Pads:
  """Returns the padding that keeps the size at a stride of 1."""
  return 2 * (2 * ((side - 1) // 2,),)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def convolve(
  x: jax.Array, kernel: jax.Array, stride: int, pads: Pads | None = None
) -> jax.Array:
  """Returns (B, H', W', D): `x` padded and convolved.

  Args:
    x: (B, H, W, C) float32.
    kernel: (1, 1, C, D) or (3, 3, C, D) float32; or depthwise (N, N, 1, C) with
      N of DEPTHWISE_SIDES.
    stride: 1 or 2.
    pads: pixels above and below, left and right; None for half of the kernel,
      as every convolution has that is not depthwise.
  """
  pads = pads or half(kernel.shape[0])
  algorithm = algorithm_of(x, kernel, stride)
  on_cpu = functools.partial(algorithm.convolve, stride=stride, pads=pads)
  elsewhere = functools.partial(xla_convolve, stride=stride, pads=pads)
  return lax.platform_dependent(x, kernel, cpu=on_cpu, default=elsewhere)


def xla_convolve(
  x: jax.Array, kernel: jax.Array, stride: int, pads: Pads | None = None
) -> jax.Array:
  """Returns the same by XLA's own convolution."""
  return lax.conv_general_dilated(
    x,
    kernel,
    (stride, stride),
    pads or half(kernel.shape[0]),
    dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
    feature_group_count=x.shape[-1] // kernel.shape[2],
  )


def _convolve_fwd(x, kernel, stride, pads):
  return convolve(x, kernel, stride, pads), (x, kernel)


def _convolve_bwd(stride, pads, kept, g):
  algorithm = algorithm_of(*kept, stride)
  side = kept[1].shape[0]
  pads = pads or half(side)

  def on_cpu(x, kernel, g):
    by_x = algorithm.by_x(kernel, g, stride, pads, x.shape)
    return by_x, algorithm.by_kernel(x, g, stride, pads, side)

  def elsewhere(x, kernel, g):
    function = functools.partial(xla_convolve, stride=stride, pads=pads)
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


def _xla_by_x(kernel, g, stride, pads, shape):
  del pads  # They are half of the kernel, as for all but depthwise ones.
  x = jax.ShapeDtypeStruct(shape, g.dtype)
  function = functools.partial(xla_convolve, kernel=kernel, stride=stride)
  return jax.linear_transpose(function, x)(g)[0]


def _narrow_by_kernel(x, g, stride, pads, side):
  del pads, side
  return kernel_gradient.gradient(x, g, stride)


def _pointwise(x, kernel, stride, pads):
  del pads  # There are none.
  return jnp.dot(x[:, ::stride, ::stride], kernel[0, 0])


def _pointwise_by_x(kernel, g, stride, pads, shape):
  del pads
  return _spread(jnp.dot(g, kernel[0, 0].T), stride, shape)


def _pointwise_by_kernel(x, g, stride, pads, side):
  del pads, side
  x = x[:, ::stride, ::stride]
  return kernel_gradient.product(x, g)[None, None]


def _depthwise(x, kernel, stride, pads):
  side = kernel.shape[0]
  taps = kernel_gradient.taps(x, stride, side, pads)
  return sum(map(jnp.multiply, taps, kernel.reshape(side**2, -1)))


def _depthwise_by_x(kernel, g, stride, pads, shape):
  side = kernel.shape[0]
  turned = tuple((side - 1 - before, before) for before, _ in pads)
  taps = kernel_gradient.taps(_spread(g, stride, shape), 1, side, turned)
  return sum(map(jnp.multiply, taps, kernel.reshape(side**2, -1)[::-1]))


def _depthwise_by_kernel(x, g, stride, pads, side):
  taps = kernel_gradient.taps(x, stride, side, pads)
  by_kernel = jnp.stack([jnp.sum(tap * g, (0, 1, 2)) for tap in taps])
  return by_kernel.reshape(side, side, 1, -1)


def _winograd(x, kernel, stride, pads):
  del stride, pads  # They are 1, and half of the kernel.
  return winograd.convolve(x, kernel)


def _winograd_by_x(kernel, g, stride, pads, shape):
  del stride, pads, shape
  return winograd.convolve(g, jnp.flip(kernel, (0, 1)).swapaxes(2, 3))


def _winograd_by_kernel(x, g, stride, pads, side):
  del stride, pads, side
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
NARROW = Algorithm(xla_convolve, _xla_by_x, _narrow_by_kernel)
WIDE = Algorithm(_winograd, _winograd_by_x, _winograd_by_kernel)
