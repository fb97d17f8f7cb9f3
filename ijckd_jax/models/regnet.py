"""RegNetY, as in timm.

Source: Radosavovic et al. 2020, "Designing Network Design Spaces",
https://arxiv.org/abs/2003.13678.
"""

import flax.linen as nn
import jax.numpy as jnp

from ijckd_jax.models import backbone
from ijckd_jax.models import outputs

STEM_WIDTH = 32


class RegNetY(backbone.TimmBackbone):
  """Residual bottlenecks of one width, with grouped 3x3 convolutions.

  The defaults are those of 400 million multiply-adds.

  Attributes:
    widths: channels of each stage.
    depths: blocks of each stage.
    group_width: channels of a group.
  """

  widths: tuple[int, ...] = (48, 104, 208, 440)
  depths: tuple[int, ...] = (1, 3, 6, 6)
  group_width: int = 8

  has_branches = True
  torch_head = 'head.fc'

  def init_head(self, key, num_features, num_classes):
    return backbone.normal_head(key, num_features, num_classes)

  @nn.compact
  def __call__(self, images, *, train):
    before = [self.step(images, STEM_WIDTH, 3, 2, 1, train, 'stem')]
    stages, index = [nn.relu(before[0])], 0
    for stage, depth in enumerate(self.depths, 1):
      if len(stages) == self.num_stages:
        break
      x = stages[-1]
      for number in range(1, depth + 1):
        stride = 2 if number == 1 else 1
        position = index / (sum(self.depths) - 1)
        width, name = self.widths[stage - 1], f's{stage}__b{number}'
        y = self.block(x, width, stride, position, train, name)
        x, index = nn.relu(y), index + 1
      stages.append(x)
      before.append(y)
    x = stages[-1]
    return outputs.Features(tuple(stages), x, self.pool(x), tuple(before))

  def step(self, x, features, kernel, stride, groups, train, name, **kwargs):
    """Applies a convolution and batch norm."""
    init = nn.initializers.variance_scaling(2 * groups, 'fan_out', 'normal')
    x = self.conv(
      features,
      kernel,
      stride,
      feature_group_count=groups,
      kernel_init=init,
      name=f'{name}__conv',
    )(x)
    return self.norm(train, name=f'{name}__bn', **kwargs)(x)

  def block(self, x, width, stride, position, train, name):
    """Applies a block, but for its last ReLU."""
    y = nn.relu(self.step(x, width, 1, 1, 1, train, f'{name}__conv1'))
    groups, step = width // self.group_width, f'{name}__conv2'
    y = nn.relu(self.step(y, width, 3, stride, groups, train, step))
    y = self.squeeze(y, round(x.shape[-1] / 4), f'{name}__se')
    zeros = nn.initializers.zeros_init()
    last = f'{name}__conv3'
    y = self.step(y, width, 1, 1, 1, train, last, scale_init=zeros)
    y = self.drop_branch(y, position, train)
    if stride > 1 or x.shape[-1] != width:
      x = self.step(x, width, 1, stride, 1, train, f'{name}__downsample')
    return x + y

  def squeeze(self, x, narrow, name):
    """Scales each channel by what the averages of all say."""
    scale = jnp.mean(x, axis=(1, 2), keepdims=True)
    scale = self.conv(narrow, 1, use_bias=True, name=f'{name}__fc1')(scale)
    scale = nn.relu(scale)
    scale = self.conv(x.shape[-1], 1, use_bias=True, name=f'{name}__fc2')(scale)
    return x * nn.sigmoid(scale)
