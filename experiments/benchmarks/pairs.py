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
    crop_padding: zeros around an image before its random crop; 0: no crop.
  """

  teacher: str
  student: str
  batch_size: int
  image_shape: tuple[int, int, int]
  num_classes: int
  crop_padding: int = 4

  def batch(self, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns random images uint8 (B, H, W, C) and labels int32 (B,)."""
    rng = np.random.RandomState(seed)
    shape = (self.batch_size, *self.image_shape)
    images = rng.randint(0, 256, shape).astype(np.uint8)
    labels = rng.randint(0, self.num_classes, self.batch_size)
    return images, labels.astype(np.int32)

  def small(self) -> 'Pair':
    """Returns the pair with a few small images, to rehearse a benchmark."""
    height, width, channels = self.image_shape
    shape = (min(height, 64), min(width, 64), channels)
    return dataclasses.replace(self, batch_size=4, image_shape=shape)

  def __str__(self):
    size = 'x'.join(map(str, self.image_shape))
    return f'{self.teacher} -> {self.student}, {size}, {self.batch_size}'


MEAN, STD = 0.5, 0.25
# Teachers and labels are random: by a usual rate, training would diverge.
LEARNING_RATE = 1e-5
NUM_BATCHES = 4  # Taken in turn.

PAIRS = {
  'resnet32x4': Pair('resnet32x4', 'resnet8x4', 64, (32, 32, 3), 100),
  'wrn': Pair('wrn_40_2', 'wrn_16_2', 64, (32, 32, 3), 100),
  'resnet20': Pair('resnet20', 'resnet8', 128, (32, 32, 3), 100),
  'fashion_pairs': Pair('resnet20', 'resnet8', 128, (28, 56, 1), 100),
  'mobile': Pair('vgg13', 'mobilenet_v2_cifar_x0_5', 64, (32, 32, 3), 100),
  'imagenet': Pair('resnet34', 'resnet18', 32, (64, 64, 3), 200),
}
# On GPUs too. The host crops images of 224x224, so that the step mirrors them.
GPU_PAIRS = {
  **{name: PAIRS[name] for name in ('resnet32x4', 'wrn', 'resnet20', 'mobile')},
  'resnet32x4_512': dataclasses.replace(PAIRS['resnet32x4'], batch_size=512),
  'resnet34': Pair('resnet34', 'resnet18', 256, (224, 224, 3), 1000, 0),
  'resnet50': Pair('resnet50', 'mobilenet_v1', 256, (224, 224, 3), 1000, 0),
}
ALL_PAIRS = {**PAIRS, **GPU_PAIRS}
