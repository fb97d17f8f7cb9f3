"""What happens to images on the device: crop, flip, normalise, resize."""

import dataclasses

import jax
import jax.numpy as jnp

INTERPOLATIONS = ('bilinear', 'bicubic')


@dataclasses.dataclass(frozen=True)
class Preprocessing:
  """From the shared uint8 view to what one network reads.

  Attributes:
    mean: per channel, of pixels scaled to [0, 1].
    std: per channel.
    size: (H, W) that the network wants.
    interpolation: how images of another size are resized, antialiased: one of
      INTERPOLATIONS.
  """

  mean: tuple[float, ...]
  std: tuple[float, ...]
  size: tuple[int, int]
  interpolation: str = 'bilinear'

  def __call__(self, images: jax.Array) -> jax.Array:
    """Returns (B, *size, C) float32 from (B, H, W, C) uint8."""
    x = images.astype(jnp.float32) / 255
    if x.shape[1:3] != self.size:
      shape = (x.shape[0], *self.size, x.shape[3])
      x = jax.image.resize(x, shape, self.interpolation, antialias=True)
    return (x - jnp.array(self.mean)) / jnp.array(self.std)


@dataclasses.dataclass(frozen=True)
class Augmentation:
  """Random crop out of a zero-padded image, and random mirroring.

  Attributes:
    crop_padding: pixels of zeros on each side; 0 for no crop.
    flip: whether to mirror left and right with probability one half.
    views: how many views there are of an image, in turn; 0: a new one in each
      epoch.
  """

  crop_padding: int
  flip: bool
  views: int = 0

  def __call__(self, key: jax.Array, images, epochs, indices) -> jax.Array:
    """Returns the view of each image that belongs to (key, epoch, index).

    It depends on nothing else: not on the step, the row or the device. Where
    there are so many views, it depends on the epoch modulo their number.

    Args:
      key: random key of the run's augmentation stream.
      images: (B, H, W, C) uint8.
      epochs: (B,) int32.
      indices: (B,) int32, of the examples in their data set.
    """
    if self.views:
      epochs = epochs % self.views
    return jax.vmap(self._one, in_axes=(None, 0, 0, 0))(
      key, images, epochs, indices
    )

  def _one(self, key, image, epoch, index):
    key = jax.random.fold_in(jax.random.fold_in(key, epoch), index)
    crop_key, flip_key = jax.random.split(key)
    if self.crop_padding:
      pad = self.crop_padding
      padded = jnp.pad(image, ((pad, pad), (pad, pad), (0, 0)))
      row, column = jax.random.randint(crop_key, (2,), 0, 2 * pad + 1)
      image = jax.lax.dynamic_slice(padded, (row, column, 0), image.shape)
    if self.flip:
      mirrored = jax.random.bernoulli(flip_key)
      image = jnp.where(mirrored, image[:, ::-1], image)
    return image
