"""What happens to images on the device, for teacher and student alike."""

from collections.abc import Callable
import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections

from ijckd_jax.data import randaugment
from ijckd_jax.data import transforms
from ijckd_jax.runtime import config_utils

INTERPOLATIONS = ('bilinear', 'bicubic')


@dataclasses.dataclass(frozen=True)
class Preprocessing:
  """From the shared view to what one network reads.

  Attributes:
    mean: per channel, of pixels scaled to [0, 1].
    std: per channel.
    size: (H, W) that the network wants.
    interpolation: how images of another size are resized, antialiased: one of
      INTERPOLATIONS.

  Raises:
    config_utils.UserError: they are no such numbers.
  """

  mean: tuple[float, ...]
  std: tuple[float, ...]
  size: tuple[int, int]
  interpolation: str = 'bilinear'

  def __post_init__(self) -> None:
    size = tuple(self.size)
    if len(size) != 2 or not all(isinstance(x, int) and x > 0 for x in size):
      raise config_utils.UserError(
        f'Preprocessing has the size {self.size}: give mean, std and then '
        'size, which is (H, W) in pixels'
      )
    if len(self.mean) != len(self.std):
      raise config_utils.UserError(
        f'Preprocessing has {len(self.mean)} numbers as the mean and '
        f'{len(self.std)} as the std: give one of each for a channel'
      )

  def __call__(self, images: jax.Array) -> jax.Array:
    """Returns (B, *size, C) float32 from (B, H, W, C) of 0 to 255."""
    x = images.astype(jnp.float32) / 255
    if x.shape[1:3] != self.size:
      shape = (x.shape[0], *self.size, x.shape[3])
      x = jax.image.resize(x, shape, self.interpolation, antialias=True)
    return (x - jnp.array(self.mean)) / jnp.array(self.std)


@dataclasses.dataclass(frozen=True)
class Augmentation:
  """Random crop out of a zero-padded image, mirroring, and what follows.

  Attributes:
    crop_padding: pixels of zeros on each side; 0 for no crop.
    flip: whether to mirror left and right with probability one half.
    views: how many views there are of an image, in turn; 0: a new one in each
      epoch.
    transforms: `(key, image) -> image` each, uint8 (H, W, C), one after the
      other.
  """

  crop_padding: int
  flip: bool
  views: int = 0
  transforms: tuple[Callable[[jax.Array, jax.Array], jax.Array], ...] = ()

  def __call__(
    self,
    key: jax.Array,
    images: jax.Array,
    epochs: jax.Array,
    indices: jax.Array,
  ) -> jax.Array:
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

  def _one(
    self, key: jax.Array, image: jax.Array, epoch: jax.Array, index: jax.Array
  ) -> jax.Array:
    key = example_key(key, epoch, index)
    crop_key, flip_key = jax.random.split(key)
    if self.crop_padding:
      pad = self.crop_padding
      padded = jnp.pad(image, ((pad, pad), (pad, pad), (0, 0)))
      row, column = jax.random.randint(crop_key, (2,), 0, 2 * pad + 1)
      image = jax.lax.dynamic_slice(padded, (row, column, 0), image.shape)
    if self.flip:
      mirrored = jax.random.bernoulli(flip_key)
      image = jnp.where(mirrored, image[:, ::-1], image)
    # Numbers 0 and 1 would give the keys of crop and flip again, since a split
    # folds in 0 and 1.
    for number, transform in enumerate(self.transforms, 2):
      image = transform(jax.random.fold_in(key, number), image)
    return image

  @property
  def identity(self) -> str:
    """By what stored outputs are known; what is off is not named."""
    fields = f'crop_padding={self.crop_padding}, flip={self.flip}'
    named = f'Augmentation({fields}, views={self.views})'
    return ' '.join([named, *map(str, self.transforms)])


def example_key(
  key: jax.Array, epoch: jax.Array | int, index: jax.Array | int
) -> jax.Array:
  """Returns an example's own key in an epoch, of a stream's key."""
  return jax.random.fold_in(jax.random.fold_in(key, epoch), index)


def default_config() -> ml_collections.ConfigDict:
  """Returns the `augment` section: nothing beside the data set's own."""
  return ml_collections.ConfigDict(
    {
      'inception_crop': False,  # In place of the data set's padded crop.
      'inception_area': (0.08, 1.0),  # Parts of the image's.
      'inception_aspect': (3 / 4, 4 / 3),  # Width to height.
      'randaugment_layers': 0,  # Operations on each image.
      'randaugment_magnitude': 9,  # 0 to 30.
      'trivialaugment': False,  # One operation of any magnitude.
      'erasing_probability': 0.0,
      'label_smoothing': 0.0,  # Share of a label that all classes get alike.
      'mixup_alpha': 0.0,  # Of Beta(alpha, alpha); 1: uniform, 0: none.
      'cutmix_alpha': 0.0,
    }
  )


def check(config: ml_collections.ConfigDict) -> None:
  """Raises UserError where a number of the `augment` section cannot be."""
  for name, high in (
    ('randaugment_layers', math.inf),
    ('randaugment_magnitude', randaugment.MAX_MAGNITUDE),
    ('erasing_probability', 1),
    ('mixup_alpha', math.inf),
    ('cutmix_alpha', math.inf),
  ):
    if not (0 <= config[name] <= high and math.isfinite(config[name])):
      raise config_utils.UserError(
        f'augment.{name}={config[name]}: it must be '
        + ('at least 0' if high == math.inf else f'from 0 to {high}')
      )
  if not 0 <= config.label_smoothing < 1:
    raise config_utils.UserError(
      f'augment.label_smoothing={config.label_smoothing}: it must be in [0, 1)'
    )
  if config.randaugment_layers and config.trivialaugment:
    raise config_utils.UserError(
      'augment.trivialaugment draws one operation in place of those of '
      'RandAugment: set it to False, or augment.randaugment_layers=0'
    )
  for name, high in (('inception_area', 1), ('inception_aspect', math.inf)):
    ends = tuple(config[name])
    if len(ends) != 2 or not 0 < ends[0] <= ends[1] <= high:
      raise config_utils.UserError(
        f'augment.{name}={ends}: give the smallest and the largest, above 0'
        + ('' if high == math.inf else f' and at most {high}')
      )


def build(
  config: ml_collections.ConfigDict, dataset: Any, views: int
) -> Augmentation:
  """Returns the Augmentation of a run's images.

  Args:
    config: the `augment` section, checked.
    dataset: see datasets; it brings its own crop and flip.
    views: see Augmentation.
  """
  crop_padding = dataset.crop_padding
  steps: list[Callable[[jax.Array, jax.Array], jax.Array]] = []
  if config.inception_crop:
    crop_padding = 0
    steps.append(
      transforms.InceptionCrop(
        tuple(config.inception_area), tuple(config.inception_aspect)
      )
    )
  if config.randaugment_layers:
    steps.append(
      randaugment.RandAugment(
        config.randaugment_layers, config.randaugment_magnitude
      )
    )
  if config.trivialaugment:
    steps.append(randaugment.TrivialAugment())
  if config.erasing_probability:
    fill = tuple(round(255 * mean) for mean in dataset.mean)
    steps.append(transforms.RandomErasing(config.erasing_probability, fill))
  return Augmentation(crop_padding, dataset.flip, views, tuple(steps))
