"""Crops and erasures of one image at random: `(key, image) -> image`."""

import dataclasses
import math

import jax
import jax.numpy as jnp

TRIES = 10
# Of torchvision's RandomErasing, whose aspect is that of height to width.
ERASING_AREA = (0.02, 0.33)
ERASING_ASPECT = (1 / 3.3, 1 / 0.3)


@dataclasses.dataclass(frozen=True)
class InceptionCrop:
  """A random part of an image, resized to the whole one's size.

  Area and aspect are drawn up to ten times, until the box fits; else it is the
  whole image. The part is resized bilinearly, without a look beyond its edges.

  Attributes:
    area: smallest and largest, as parts of the image's, uniform.
    aspect: smallest and largest, width to height, uniform in the logarithm.

  Source: Szegedy et al. 2015, https://arxiv.org/abs/1409.4842, as torchvision's
  RandomResizedCrop draws it.
  """

  area: tuple[float, float]
  aspect: tuple[float, float]

  def __call__(self, key: jax.Array, image: jax.Array) -> jax.Array:
    """Returns a view (H, W, C) uint8 of an image of that shape."""
    height, width, _ = image.shape
    whole = (0, 0, height, width)
    fits, box = _draw_box(key, whole[2:], whole[2:], self.area, self.aspect)
    top, left, box_height, box_width = (
      jnp.where(fits, one, other) for one, other in zip(box, whole, strict=True)
    )
    view = jnp.einsum(
      'ih,hwc,jw->ijc',
      _interpolation(top, box_height, height),
      image.astype(jnp.float32),
      _interpolation(left, box_width, width),
      precision='highest',
    )
    return jnp.round(view).astype(image.dtype)


@dataclasses.dataclass(frozen=True)
class RandomErasing:
  """Fills a random box of an image, or none.

  Attributes:
    probability: that a box is filled.
    fill: the colour, of 0 to 255 for each channel.

  Source: Zhong et al. 2020, https://arxiv.org/abs/1708.04896, with areas and
  aspects of torchvision's RandomErasing.
  """

  probability: float
  fill: tuple[int, ...]

  def __call__(self, key: jax.Array, image: jax.Array) -> jax.Array:
    """Returns a view (H, W, C) of an image of that shape and type."""
    size = image.shape[:2]
    erase_key, box_key = jax.random.split(key)
    largest = (size[0] - 1, size[1] - 1)
    fits, box = _draw_box(box_key, size, largest, ERASING_AREA, ERASING_ASPECT)
    erased = fits & jax.random.bernoulli(erase_key, self.probability)
    erased &= inside(size, *box)
    fill = jnp.array(self.fill, image.dtype)
    return jnp.where(erased[..., None], fill, image)


def inside(size: tuple[int, int], top, left, height, width) -> jax.Array:
  """Returns (H, W) bool: which pixels of an image lie in a box."""
  rows, columns = jnp.arange(size[0])[:, None], jnp.arange(size[1])
  return (
    (top <= rows)
    & (rows < top + height)
    & (left <= columns)
    & (columns < left + width)
  )


def _draw_box(key, size, largest, area, aspect):
  """Returns whether a box was drawn that fits, and (top, left, H, W) of it."""
  area_key, aspect_key, top_key, left_key = jax.random.split(key, 4)
  low, high = area
  areas = jax.random.uniform(area_key, (TRIES,), minval=low, maxval=high)
  areas *= size[0] * size[1]
  low, high = map(math.log, aspect)
  aspects = jax.random.uniform(aspect_key, (TRIES,), minval=low, maxval=high)
  heights = jnp.round(jnp.sqrt(areas / jnp.exp(aspects))).astype(jnp.int32)
  widths = jnp.round(jnp.sqrt(areas * jnp.exp(aspects))).astype(jnp.int32)
  fits = (heights >= 1) & (heights <= largest[0])
  fits &= (widths >= 1) & (widths <= largest[1])
  first = jnp.argmax(fits)
  height, width = heights[first], widths[first]
  top = jax.random.randint(top_key, (), 0, size[0] - height + 1)
  left = jax.random.randint(left_key, (), 0, size[1] - width + 1)
  return fits[first], (top, left, height, width)


def _interpolation(start, length, size: int) -> jax.Array:
  """Returns (size, size) weights that spread a stretch of pixels over all."""
  within = (jnp.arange(size) + 0.5) * (length / size) - 0.5
  source = start + jnp.clip(within, 0, length - 1)
  return jnp.maximum(0, 1 - jnp.abs(source[:, None] - jnp.arange(size)))
