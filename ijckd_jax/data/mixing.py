"""Mixup and cutmix, of two rows of a batch in one image, and soft labels."""

import dataclasses

from flax import struct
import jax
import jax.numpy as jnp
import ml_collections

from ijckd_jax.data import augment
from ijckd_jax.data import transforms
from ijckd_jax.runtime import config_utils


@struct.dataclass
class MixedLabels:
  """Labels of images that were mixed of two, or labels that are smoothed.

  Attributes:
    own: (B,) int32; -1 where there is none.
    other: (B,) int32, of the other image.
    weight: (B,) float32, of the own one; the other's is one minus that.
    smoothing: share of a label that all classes get alike.

  Source of the smoothing: Szegedy et al. 2016,
  https://arxiv.org/abs/1512.00567, section 7.
  """

  own: jax.Array
  other: jax.Array
  weight: jax.Array
  smoothing: float = struct.field(pytree_node=False, default=0.0)


@dataclasses.dataclass(frozen=True)
class Mixing:
  """Mixes row 2k with row 2k + 1, each in a proportion of its own.

  With both alphas, each row is mixed in one of the two ways, at random.

  Attributes:
    mixup_alpha: of Beta(alpha, alpha), the row's share of each pixel; 0: none.
    cutmix_alpha: of Beta(alpha, alpha), the row's share of the image, whose
      other part is a box out of the partner; 0: none.
    label_smoothing: see MixedLabels. With this alone, images are not mixed.

  Sources: Zhang et al. 2018, https://arxiv.org/abs/1710.09412; Yun et al. 2019,
  https://arxiv.org/abs/1905.04899.
  """

  mixup_alpha: float
  cutmix_alpha: float
  label_smoothing: float = 0.0

  def __call__(
    self, key: jax.Array, images, labels, epochs, indices
  ) -> tuple[jax.Array, MixedLabels]:
    """Returns the mixed images (B, H, W, C) float32, 0 to 255, and labels.

    Images that are not mixed stay uint8.

    A row's share depends on (key, epoch, index), its partner on the order of
    the batch; neither on the step or the device.

    Args:
      key: random key of the run's mixing stream.
      images: (B, H, W, C) uint8, B even.
      labels: (B,) int32; -1 for an unlabelled row.
      epochs: (B,) int32.
      indices: (B,) int32, of the examples in their data set.
    """
    if not mixes_images(self):
      whole = jnp.ones(len(images))
      labels = MixedLabels(labels, labels, whole, self.label_smoothing)
      return images, labels
    check_rows(len(images))
    shares = jax.vmap(self._share, in_axes=(None, 0, 0, None))(
      key, epochs, indices, images.shape[1:3]
    )
    weights = jnp.mean(shares, axis=(1, 2))
    shares, images = shares[..., None], images.astype(jnp.float32)
    images = shares * images + (1 - shares) * _partners(images)
    return images, MixedLabels(
      labels, _partners(labels), weights, self.label_smoothing
    )

  def _share(self, key, epoch, index, size):
    """Returns (H, W): how much of each pixel is the row's own."""
    key = augment.example_key(key, epoch, index)
    choice_key, mixup_key, cutmix_key = jax.random.split(key, 3)
    if not self.cutmix_alpha:
      return self._mixup(mixup_key, size)
    if not self.mixup_alpha:
      return self._cutmix(cutmix_key, size)
    return jnp.where(
      jax.random.bernoulli(choice_key),
      self._mixup(mixup_key, size),
      self._cutmix(cutmix_key, size),
    )

  def _mixup(self, key, size):
    share = jax.random.beta(key, self.mixup_alpha, self.mixup_alpha)
    return jnp.full(size, share)

  def _cutmix(self, key, size):
    """Returns zeros in a box whose centre is anywhere, and ones around."""
    share_key, centre_key = jax.random.split(key)
    share = jax.random.beta(share_key, self.cutmix_alpha, self.cutmix_alpha)
    sides = jnp.array(size)
    half = (sides * jnp.sqrt(1 - share)).astype(jnp.int32) // 2
    centre = jax.random.randint(centre_key, (2,), 0, sides)
    box = transforms.inside(size, *(centre - half), *(2 * half))
    return 1 - box.astype(jnp.float32)


def build(config: ml_collections.ConfigDict) -> Mixing | None:
  """Returns what the `augment` section says of images and labels.

  None where no image is mixed and no label smoothed.
  """
  if not (mixes_images(config) or config.label_smoothing):
    return None
  return Mixing(config.mixup_alpha, config.cutmix_alpha, config.label_smoothing)


def mixes_images(config: ml_collections.ConfigDict | Mixing) -> bool:
  """Returns whether the `augment` section mixes an image with its partner."""
  return bool(config.mixup_alpha or config.cutmix_alpha)


def check_rows(num_rows: int) -> None:
  """Raises UserError where a device's rows cannot be mixed in pairs."""
  if num_rows % 2:
    raise config_utils.UserError(
      f'a device gets {num_rows} rows of a batch, which mixup and cutmix mix '
      'in pairs: give a batch_size that makes them even'
    )


def _partners(rows):
  """Returns the rows in which each has changed places with its partner."""
  pairs = rows.reshape(-1, 2, *rows.shape[1:])
  return pairs[:, ::-1].reshape(rows.shape)
