"""3x3 convolutions of stride 1 by Winograd's F(2x2, 3x3).

16 products give 2x2 values of the result, for which a direct convolution takes
36. A few images are transformed at a time, so that they stay in the processor's
cache between the transforms and the products.

Source: Lavin and Gray 2016, "Fast Algorithms for Convolutional Neural
Networks", https://arxiv.org/abs/1509.09308, section 4.1.
"""

import functools

import jax
from jax import lax
import jax.numpy as jnp
import numpy as np

# Of the transformed images that are held at a time: about a core's cache.
MAX_BYTES = 2**21
# Along one axis: kernel taps to points, pixels to points, points to pixels.
KERNEL = np.array([[1, 0, 0], [0.5, 0.5, 0.5], [0.5, -0.5, 0.5], [0, 0, 1]])
TILE = ((1, 0, -1, 0), (0, 1, 1, 0), (0, -1, 1, 0), (0, 1, 0, -1))
RESULT = ((1, 1, 1, 0), (0, 1, -1, -1))


def convolve(x: jax.Array, kernel: jax.Array) -> jax.Array:
  """Returns (B, H, W, D): `x` padded by one pixel, convolved.

  Args:
    x: (B, H, W, C) float32.
    kernel: (3, 3, C, D) float32.
  """
  kernel = _points_of_kernel(kernel)

  def convolve_some(_, x):
    products = jnp.einsum('ptc,pcd->ptd', _points_of_tiles(x), kernel)
    return None, _combine(products, x.shape)

  some = _cut(x, max(kernel.shape[1:]))
  _, y = lax.scan(convolve_some, None, some)
  y = y.reshape(-1, *y.shape[2:])
  return y[:, : x.shape[1], : x.shape[2]]


def gradient_by_kernel(x: jax.Array, g: jax.Array) -> jax.Array:
  """Returns (3, 3, C, D), the kernel gradient.

  Args:
    x: (B, H, W, C) float32, which was convolved.
    g: (B, H, W, D), the gradient by the result.
  """

  def add_some(total, some):
    x, g = some
    products = jnp.einsum('ptc,ptd->pcd', _points_of_tiles(x), _spread(g))
    return total + products, None

  channels = x.shape[-1], g.shape[-1]
  kernel = jax.ShapeDtypeStruct((3, 3, *channels), x.dtype)
  some = tuple(_cut(part, sum(channels)) for part in (x, g))
  total, _ = lax.scan(add_some, jnp.zeros((16, *channels), x.dtype), some)
  (by_kernel,) = jax.linear_transpose(_points_of_kernel, kernel)(total)
  return by_kernel


def in_parts(x: jax.Array, most: int) -> jax.Array:
  """Returns (B/n, n, ...) of (B, ...): the largest equal parts.

  Args:
    x: (B, ...).
    most: upper limit of n; 0 is taken for 1.
  """
  batch = len(x)
  most = max(1, most)
  num = max(n for n in range(1, batch + 1) if batch % n == 0 and n <= most)
  return x.reshape(batch // num, num, *x.shape[1:])


def _cut(x, channels):
  """Returns the images, of even sides, in cacheable parts: (B/n, n, ...)."""
  _, height, width, _ = x.shape
  x = jnp.pad(x, ((0, 0), (0, height % 2), (0, width % 2), (0, 0)))
  # 16 points of 4 bytes for every 4 pixels.
  return in_parts(x, MAX_BYTES // (16 * height * width * channels))


def _along_both(matrix, table):
  """Applies a matrix of -1, 0 and 1 to both axes of a table of arrays.

  Returns:
    The entries of the result, row after row.
  """

  def apply(values):
    for row in matrix:
      signed = [
        v if c > 0 else -v for c, v in zip(row, values, strict=True) if c
      ]
      yield functools.reduce(jnp.add, signed)

  columns = zip(*map(apply, table), strict=True)
  return [
    entry for row in zip(*map(apply, columns), strict=True) for entry in row
  ]


def _points_of_kernel(kernel):
  """Returns (16, C, D) of (3, 3, C, D)."""
  taps = kernel.reshape(9, -1)
  both = jnp.asarray(np.kron(KERNEL, KERNEL), kernel.dtype)
  points = jnp.dot(both, taps, precision='highest')
  return points.reshape(16, *kernel.shape[2:])


def _points_of_tiles(x):
  """Returns (16, T, C) of the T tiles of 4x4 pixels, which overlap by two."""
  batch, height, width, channels = x.shape
  rows, columns = height // 2, width // 2
  x = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
  x = x.reshape(batch, rows + 1, 2, columns + 1, 2, channels)

  def pixels(i, j):
    top, left = i // 2, j // 2
    return x[:, top : top + rows, i % 2, left : left + columns, j % 2]

  tiles = [[pixels(i, j) for j in range(4)] for i in range(4)]
  return jnp.stack(_along_both(TILE, tiles)).reshape(16, -1, channels)


def _combine(products, shape):
  """Returns (B, H, W, D) of the products (16, T, D)."""
  batch, height, width, _ = shape
  table = products.reshape(4, 4, batch, height // 2, width // 2, -1)
  y = jnp.stack(_along_both(RESULT, table))
  y = y.reshape(2, 2, *y.shape[1:]).transpose(2, 3, 0, 4, 1, 5)
  return y.reshape(batch, height, width, -1)


def _spread(g):
  """Returns (16, T, D) of (B, H, W, D): the transpose of `_combine`."""
  batch, height, width, channels = g.shape
  g = g.reshape(batch, height // 2, 2, width // 2, 2, channels)

  tiles = [[g[:, :, i, :, j] for j in range(2)] for i in range(2)]
  return jnp.stack(_along_both(np.transpose(RESULT), tiles)).reshape(
    16, -1, channels
  )
