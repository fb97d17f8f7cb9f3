"""RandAugment and TrivialAugment: operations on an image, drawn from a list.

Each is what torchvision's transform of that name does to a PIL image, with
nearest neighbours and zeros around. Under vmap every branch of a switch is
computed, so there is none: an image is resampled once, blended once and mapped
once, with arguments that leave it as it is unless the operation is that one.

Sources: Cubuk et al. 2020, https://arxiv.org/abs/1909.13719; Müller and Hutter
2021, "TrivialAugment", https://arxiv.org/abs/2103.10158.
"""

from collections.abc import Callable
import dataclasses
import math

import jax
import jax.numpy as jnp

from ijckd_jax.data import transforms

OPERATIONS = (
  'Identity',
  'ShearX',
  'ShearY',
  'TranslateX',
  'TranslateY',
  'Rotate',
  'Brightness',
  'Color',
  'Contrast',
  'Sharpness',
  'Posterize',
  'Solarize',
  'AutoContrast',
  'Equalize',
)
MAX_MAGNITUDE = 30


@dataclasses.dataclass(frozen=True)
class Space:
  """How far the operations go at the largest magnitude.

  Attributes:
    shear: the shift of a row or column for each pixel of distance.
    translate: `side -> pixels` of an image's side.
    rotate: degrees.
    enhance: added to the factor of one, of brightness, colour and the like.
    posterize: bits that are dropped.
  """

  shear: float
  translate: Callable[[int], float]
  rotate: float
  enhance: float
  posterize: int


# As torchvision's RandAugment and TrivialAugmentWide have them.
NARROW = Space(0.3, lambda side: 150 / 331 * side, 30.0, 0.9, 4)
WIDE = Space(0.99, lambda side: 32.0, 135.0, 0.99, 6)


@dataclasses.dataclass(frozen=True)
class RandAugment:
  """So many operations, drawn for each image, of one magnitude.

  Attributes:
    layers: how many, one after the other.
    magnitude: 0 to MAX_MAGNITUDE.
  """

  layers: int
  magnitude: int

  def __call__(self, key: jax.Array, image: jax.Array) -> jax.Array:
    """Returns a view (H, W, C) uint8 of an image of that shape."""

    def layer(image, key):
      operation, sign = _draw(key)
      return apply(image, operation, sign, self.magnitude), None

    keys = jax.random.split(key, self.layers)
    return jax.lax.scan(layer, image, keys)[0]


@dataclasses.dataclass(frozen=True)
class TrivialAugment:
  """One operation, drawn for each image, of a magnitude drawn as well."""

  def __call__(self, key: jax.Array, image: jax.Array) -> jax.Array:
    """Returns a view (H, W, C) uint8 of an image of that shape."""
    key, magnitude_key = jax.random.split(key)
    operation, sign = _draw(key)
    magnitude = jax.random.randint(magnitude_key, (), 0, MAX_MAGNITUDE + 1)
    return apply(image, operation, sign, magnitude, WIDE)


def _draw(key):
  """Returns an operation and a sign, each as likely as the others."""
  operation_key, sign_key = jax.random.split(key)
  operation = jax.random.randint(operation_key, (), 0, len(OPERATIONS))
  return operation, jnp.where(jax.random.bernoulli(sign_key), -1, 1)


def apply(
  image: jax.Array, operation, sign, magnitude, space: Space = NARROW
) -> jax.Array:
  """Returns an image after one operation.

  Args:
    image: (H, W, C) uint8.
    operation: its number in OPERATIONS.
    sign: 1 or -1, of those that have a direction.
    magnitude: 0 to MAX_MAGNITUDE.
    space: what the largest magnitude means.
  """
  height, width, _ = image.shape
  strength = magnitude / MAX_MAGNITUDE

  def chosen(name):
    return operation == OPERATIONS.index(name)

  def amount(name, largest):
    return jnp.where(chosen(name), sign * largest * strength, 0.0)

  def whole(number, largest):
    # In double precision for each magnitude, because float32 may round
    # otherwise at a whole number.
    strengths = (m / MAX_MAGNITUDE for m in range(MAX_MAGNITUDE + 1))
    return jnp.array([number(largest * s) for s in strengths])[magnitude]

  def pixels(name, side):
    shift = whole(math.trunc, space.translate(side))
    return jnp.where(chosen(name), sign * shift, 0)

  x = _resample(
    jnp.asarray(image, jnp.int32),
    shear=(amount('ShearX', space.shear), amount('ShearY', space.shear)),
    shift=(pixels('TranslateX', width), pixels('TranslateY', height)),
    angle=amount('Rotate', math.radians(space.rotate)),
  )
  x = _enhance(
    x,
    brightness=amount('Brightness', space.enhance),
    color=amount('Color', space.enhance),
    contrast=amount('Contrast', space.enhance),
    sharpness=amount('Sharpness', space.enhance),
  )
  dropped = jnp.where(chosen('Posterize'), whole(round, space.posterize), 0)
  x = (x >> dropped) << dropped
  kept = MAX_MAGNITUDE - magnitude
  threshold = jnp.where(chosen('Solarize'), 255 * kept / MAX_MAGNITUDE, 256)
  x = jnp.where(x >= threshold, 255 - x, x)
  x = jnp.where(chosen('AutoContrast'), _stretch(x), x)
  x = jnp.where(chosen('Equalize'), _equalize(x), x)
  return x.astype(image.dtype)


def _resample(x, *, shear, shift, angle):
  """Returns for each pixel the one that a turned, sheared, moved grid hits."""
  height, width, _ = x.shape
  row = jnp.arange(height)[:, None] + 0.5
  column = jnp.arange(width) + 0.5
  # Turned about the centre, sheared from the corner.
  up, right = row - height / 2, column - width / 2
  cos, sin = jnp.cos(angle), jnp.sin(angle)
  source_column = cos * right - sin * up + width / 2
  source_row = sin * right + cos * up + height / 2
  source_column += shear[0] * row - shift[0]
  source_row += shear[1] * column - shift[1]
  rows = jnp.floor(source_row).astype(jnp.int32)
  columns = jnp.floor(source_column).astype(jnp.int32)
  found = (rows >= 0) & (rows < height) & (columns >= 0) & (columns < width)
  # Out of bounds is clipped, and then not looked at.
  return jnp.where(found[..., None], x.at[rows, columns].get(mode='clip'), 0)


def _enhance(x, *, brightness, color, contrast, sharpness):
  """Returns an image blended with black, its greys, its mean or a blur.

  The arguments are what is added to a factor of one: of the image in the blend.
  """
  grey = _grey(x)
  mean = jnp.floor(jnp.mean(grey.astype(jnp.float32)) + 0.5).astype(jnp.int32)
  other = jnp.where(color != 0, grey, 0)
  other = jnp.where(contrast != 0, mean, other)
  other = jnp.where(sharpness != 0, _smooth(x), other)
  factor = 1 + brightness + color + contrast + sharpness
  blend = other + factor * (x - other)
  return jnp.clip(blend, 0, 255).astype(jnp.int32)


def _grey(x):
  """Returns (H, W, 1): the luma of three channels, the mean of others."""
  if x.shape[-1] == 3:
    luma = jnp.sum(x * jnp.array([19595, 38470, 7471]), axis=-1, keepdims=True)
    return (luma + 2**15) >> 16
  return jnp.sum(x, axis=-1, keepdims=True) // x.shape[-1]


def _smooth(x):
  """Returns the mean with the neighbours, the centre counted five times.

  Pixels on the edges stay.
  """
  height, width, _ = x.shape
  # On CPUs a twentieth of what reduce_window takes.
  padded = jnp.pad(x, ((1, 1), (1, 1), (0, 0)))
  total = padded[:-2] + padded[1:-1] + padded[2:]
  total = total[:, :-2] + total[:, 1:-1] + total[:, 2:]
  rounded = (2 * (total + 4 * x) + 13) // 26
  inner = transforms.inside((height, width), 1, 1, height - 2, width - 2)
  return jnp.where(inner[..., None], rounded, x)


def _stretch(x):
  """Returns each channel with its range stretched to 0 to 255."""
  low = jnp.min(x, axis=(0, 1))
  high = jnp.max(x, axis=(0, 1))
  stretched = 255 * (x - low) // jnp.maximum(high - low, 1)
  return jnp.where(high > low, stretched, x)


def _equalize(x):
  """Returns each channel with its values spread by their ranks."""
  channels = jnp.arange(x.shape[-1])
  counts = jnp.zeros((len(channels), 256), jnp.int32).at[channels, x].add(1)
  below = jnp.cumsum(counts, axis=1) - counts
  brightest = jnp.take_along_axis(
    counts, jnp.max(x, axis=(0, 1))[:, None], axis=1
  )
  step = (jnp.sum(counts, axis=1, keepdims=True) - brightest) // 255
  table = (below + step // 2) // jnp.maximum(step, 1)
  table = jnp.where(step > 0, jnp.minimum(table, 255), jnp.arange(256))
  return table[channels, x]
