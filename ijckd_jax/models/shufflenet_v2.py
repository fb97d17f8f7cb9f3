"""ShuffleNetV2: torchvision's for ImageNet, and the tables' for CIFAR.

Source: Ma et al. 2018, "ShuffleNet V2: Practical Guidelines for Efficient CNN
Architecture Design", https://arxiv.org/abs/1807.11164; the stem for CIFAR as in
RepDistiller.
"""

import flax.linen as nn
import jax.numpy as jnp

from ijckd_jax.models import backbone
from ijckd_jax.models import layers
from ijckd_jax.models import outputs

STEM_WIDTH = 24
NUM_UNITS = (4, 8, 4)
# Names of the convolutions and batch norms: of the left branch of a unit that
# halves the map, of its right one, and of the one branch of other units.
CIFAR_NAMES = (
  (('conv1', 'bn1'), ('conv2', 'bn2')),
  (('conv3', 'bn3'), ('conv4', 'bn4'), ('conv5', 'bn5')),
  (('conv1', 'bn1'), ('conv2', 'bn2'), ('conv3', 'bn3')),
)
RIGHT = tuple((f'branch2_{i}', f'branch2_{i + 1}') for i in (0, 3, 5))
TORCHVISION_NAMES = (
  (('branch1_0', 'branch1_1'), ('branch1_2', 'branch1_3')),
  RIGHT,
  RIGHT,
)


class ShuffleNetV2(backbone.Backbone):
  """Units that work on half of the channels, and shuffle them.

  Attributes:
    widths: of the three stages and of the last convolution.
    cifar: start with a 1x1 convolution of stride 1 alone.
  """

  widths: tuple[int, int, int, int] = (116, 232, 464, 1024)
  cifar: bool = False

  kernel_init = staticmethod(layers.TORCH_DEFAULT)

  @property
  def usual_size(self):
    return 32 if self.cifar else 224

  @property
  def torch_head(self):
    return 'linear' if self.cifar else 'fc'

  @nn.compact
  def __call__(self, images, *, train):
    if self.cifar:
      x = self.step(images, STEM_WIDTH, 1, 1, 1, train, 'conv1', 'bn1')
    else:
      x = self.step(images, STEM_WIDTH, 3, 2, 1, train, 'conv1_0', 'conv1_1')
    x = nn.relu(x)
    if not self.cifar:
      x = nn.max_pool(x, (3, 3), (2, 2), ((1, 1), (1, 1)))
    stages, before = [x], [x]
    for i, num_units in enumerate(NUM_UNITS):
      if len(stages) == self.num_stages:
        break
      stage = f'layer{i + 1}' if self.cifar else f'stage{i + 2}'
      for unit in range(num_units):
        width = self.widths[i] if unit == 0 else None
        x, y = self.unit(x, width, train, f'{stage}_{unit}')
      stages.append(x)
      before.append(y)
    if not self.truncated:
      names = ('conv2', 'bn2') if self.cifar else ('conv5_0', 'conv5_1')
      x = nn.relu(self.step(x, self.widths[-1], 1, 1, 1, train, *names))
    return outputs.Features(tuple(stages), x, self.pool(x), tuple(before))

  def step(self, x, features, kernel, stride, groups, train, conv, norm):
    """Applies a convolution and batch norm."""
    x = self.conv(
      features, kernel, stride, feature_group_count=groups, name=conv
    )(x)
    return self.norm(train, name=norm)(x)

  def unit(self, x, width, train, name):
    """Applies a unit; one that is given a width halves the map.

    Returns:
      The map, and what it was before the last ReLU, with its channels in the
      order that they have before they are shuffled.
    """
    names = CIFAR_NAMES if self.cifar else TORCHVISION_NAMES
    left, right, single = (
      [[f'{name}_{layer}' for layer in pair] for pair in branch]
      for branch in names
    )
    if width is None:
      x, y = jnp.split(x, 2, axis=-1)
      y = self.branch(y, y.shape[-1], 1, train, single)
    else:
      y = self.branch(x, width // 2, 2, train, right)
      channels = x.shape[-1]
      x = self.step(x, channels, 3, 2, channels, train, *left[0])
      x = nn.relu(self.step(x, width // 2, 1, 1, 1, train, *left[1]))
    before = jnp.concatenate([x, y], axis=-1)
    activated = jnp.concatenate([x, nn.relu(y)], axis=-1)
    return layers.channel_shuffle(activated, 2), before

  def branch(self, x, width, stride, train, names):
    """Applies 1x1, depthwise 3x3 and 1x1 convolutions but for the last ReLU."""
    x = nn.relu(self.step(x, width, 1, 1, 1, train, *names[0]))
    x = self.step(x, width, 3, stride, width, train, *names[1])
    return self.step(x, width, 1, 1, 1, train, *names[2])
