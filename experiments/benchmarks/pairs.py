"""The pairs that are timed, and the batches that both libraries get."""

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True)
class Pair:
  """A teacher, a student and their data.

  Attributes:
    teacher, student: names in models.BACKBONES.
    batch_size: rows.
    image_shape: (H, W, C).
    num_classes: K.
  """

  teacher: str
  student: str
  batch_size: int
  image_shape: tuple[int, int, int]
  num_classes: int

  def batch(self, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns random images uint8 (B, H, W, C) and labels int32 (B,)."""
    rng = np.random.RandomState(seed)
    shape = (self.batch_size, *self.image_shape)
    images = rng.randint(0, 256, shape).astype(np.uint8)
    labels = rng.randint(0, self.num_classes, self.batch_size)
    return images, labels.astype(np.int32)

  def __str__(self):
    size = 'x'.join(map(str, self.image_shape))
    return f'{self.teacher} -> {self.student}, {size}, {self.batch_size}'


MEAN, STD, CROP_PADDING = 0.5, 0.25, 4
NUM_BATCHES = 4  # Taken in turn.

PAIRS = {
  'resnet32x4': Pair('resnet32x4', 'resnet8x4', 64, (32, 32, 3), 100),
  'wrn': Pair('wrn_40_2', 'wrn_16_2', 64, (32, 32, 3), 100),
  'resnet20': Pair('resnet20', 'resnet8', 128, (32, 32, 3), 100),
  'fashion_pairs': Pair('resnet20', 'resnet8', 128, (28, 56, 1), 100),
  'mobile': Pair('vgg13', 'mobilenet_v2_cifar_x0_5', 64, (32, 32, 3), 100),
  'imagenet': Pair('resnet34', 'resnet18', 32, (64, 64, 3), 200),
}
