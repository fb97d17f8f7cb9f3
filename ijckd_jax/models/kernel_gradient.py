"""The kernel gradient of a 3x3 convolution, as matrix products.

XLA makes it a convolution of the images with the gradient as one large kernel,
which on a CPU runs at an eighth to a half of a product's speed. Here a few
images at a time are laid out and multiplied, so that they stay in the cache.
"""

import jax
from jax import lax
import jax.numpy as jnp

from ijckd_jax.models import winograd

# Limit of the arrays that one product reads: about half of a core's cache.
MAX_BYTES = 2**20


def gradient(x: jax.Array, g: jax.Array, stride: int) -> jax.Array:
  """Returns (3, 3, C, D), the gradient by the kernel.

  Args:
    x: (B, H, W, C) float32, which was padded by one pixel and convolved.
    g: (B, H', W', D), the gradient by the result.
    stride: of the convolution.
  """
  _, height, width, channels = x.shape
  _, rows, columns, features = g.shape
  if stride == 1:
    add = _shift_both
    num_values = 3 * (height + 2) * width * (channels + features)
  else:
    add = _shift_images
    num_values = rows * columns * (9 * channels + features)

  def add_some(total, some):
    return total + add(*some, stride), None

  most = MAX_BYTES // (4 * num_values)
  some = tuple(winograd.in_parts(part, most) for part in (x, g))
  total = jnp.zeros((3, 3, channels, features), x.dtype)
  return lax.scan(add_some, total, some)[0]


def _shift_both(x, g, stride):
  """Returns the gradient of a stride of 1: one product for all nine taps.

  The images are shifted by columns, and the gradient by rows. So each is laid
  out three times, where images shifted by both would be laid out nine times.
  """
  del stride
  _, height, width, channels = x.shape
  features = g.shape[-1]
  x = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
  g = jnp.pad(g, ((0, 0), (2, 2), (0, 0), (0, 0)))
  x = [x[:, :, j : j + width] for j in range(3)]
  g = [g[:, 2 - i : 4 - i + height] for i in range(3)]
  taken = product(jnp.concatenate(x, -1), jnp.concatenate(g, -1))
  return taken.reshape(3, channels, 3, features).transpose(2, 0, 1, 3)


def _shift_images(x, g, stride):
  """Returns the gradient of any stride, from the images at all nine taps."""
  taken = product(jnp.concatenate(taps(x, stride), -1), g)
  return taken.reshape(3, 3, x.shape[-1], g.shape[-1])


def product(x: jax.Array, g: jax.Array) -> jax.Array:
  """Returns (C, D), summed over all pixels of (..., C) and (..., D)."""
  return jnp.dot(x.reshape(-1, x.shape[-1]).T, g.reshape(-1, g.shape[-1]))


def taps(
  x: jax.Array, stride: int, side: int = 3, pads=((1, 1), (1, 1))
) -> list[jax.Array]:
  """Returns what each tap of a kernel meets.

  Args:
    x: (B, H, W, C).
    stride: of the convolution.
    side: of the kernel.
    pads: pixels by which `x` is padded: above and below, left and right.
  """
  x = jnp.pad(x, ((0, 0), *pads, (0, 0)))
  # As far as the last place of the kernel, for each of its taps.
  rows, columns = (length - side + 1 for length in x.shape[1:3])
  return [
    x[:, i : i + rows : stride, j : j + columns : stride]
    for i in range(side)
    for j in range(side)
  ]
