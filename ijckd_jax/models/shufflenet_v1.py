"""ShuffleNetV1 with three groups, for CIFAR.

Source: Zhang et al. 2017, "ShuffleNet: An Extremely Efficient Convolutional
Neural Network for Mobile Devices", https://arxiv.org/abs/1707.01083; stem and
start as in RepDistiller.
"""

import flax.linen as nn
import jax.numpy as jnp

from ijckd_jax.models import backbone
from ijckd_jax.models import layers
from ijckd_jax.models import outputs

GROUPS = 3
STEM_WIDTH = 24
STAGES = ((240, 4), (480, 8), (960, 4))  # Width and number of units.


class ShuffleNetV1(backbone.Backbone):
  """Units of grouped 1x1 convolutions around a depthwise one."""

  torch_head = 'linear'
  kernel_init = staticmethod(layers.TORCH_DEFAULT)

  @nn.compact
  def __call__(self, images, *, train):
    x = self.conv(STEM_WIDTH, 1, name='conv1')(images)
    x = nn.relu(self.norm(train, name='bn1')(x))
    stages, before = [x], [x]
    for stage, (width, num_units) in enumerate(STAGES, 1):
      if len(stages) == self.num_stages:
        break
      for unit in range(num_units):
        y = self.unit(x, width, unit == 0, train, f'layer{stage}_{unit}')
        x = nn.relu(y)
      stages.append(x)
      before.append(y)
    return outputs.Features(tuple(stages), x, self.pool(x), tuple(before))

  def unit(self, x, width, halves, train, name):
    """Applies a unit but for its last ReLU.

    One that halves the map is joined to its average.
    """
    stride = 2 if halves else 1
    if halves:
      width -= x.shape[-1]
    inner = width // 4
    # The stem's channels are too few to be grouped.
    groups = 1 if x.shape[-1] == STEM_WIDTH else GROUPS
    y = x
    for i, (features, kernel, step, num_groups) in enumerate(
      ((inner, 1, 1, groups), (inner, 3, stride, inner), (width, 1, 1, GROUPS)),
      1,
    ):
      y = self.conv(
        features,
        kernel,
        step,
        feature_group_count=num_groups,
        name=f'{name}_conv{i}',
      )(y)
      y = self.norm(train, name=f'{name}_bn{i}')(y)
      if i < 3:
        y = nn.relu(y)
      if i == 1:
        y = layers.channel_shuffle(y, groups)
    if not halves:
      return x + y
    # The padding counts in the mean.
    x = nn.avg_pool(x, (3, 3), (2, 2), ((1, 1), (1, 1)))
    return jnp.concatenate([y, x], axis=-1)
