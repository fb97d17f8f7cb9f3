"""MobileNetV3 small, as in torchvision.

Source: Howard et al. 2019, "Searching for MobileNetV3",
https://arxiv.org/abs/1905.02244, table 2.
"""

import flax.linen as nn
import jax.numpy as jnp

from ijckd_jax.models import backbone
from ijckd_jax.models import outputs

# Kernel, inner width, width, squeeze-and-excitation, hard swish, stride.
BLOCKS = (
  (3, 16, 16, True, False, 2),
  (3, 72, 24, False, False, 2),
  (3, 88, 24, False, False, 1),
  (5, 96, 40, True, True, 2),
  (5, 240, 40, True, True, 1),
  (5, 240, 40, True, True, 1),
  (5, 120, 48, True, True, 1),
  (5, 144, 48, True, True, 1),
  (5, 288, 96, True, True, 2),
  (5, 576, 96, True, True, 1),
  (5, 576, 96, True, True, 1),
)
STAGE_ENDS = (1, 3, 8, 11)  # Blocks, counted from 1; the stem is a stage too.
FINAL_WIDTH = 576
POOLED_WIDTH = 1024


def round_to_eight(width: float) -> int:
  """Returns the nearest multiple of 8, at least 8, at most a tenth below."""
  rounded = max(8, int(width + 4) // 8 * 8)
  return rounded if rounded >= 0.9 * width else rounded + 8


class MobileNetV3Small(backbone.Backbone):
  """Inverted residuals with squeeze and excitation; a hidden layer pools.

  Torchvision drops a fifth of the pooled features in training, as
  `student.dropout` does.
  """

  usual_size = 224
  momentum = 0.99
  torch_head = 'classifier.3'

  @property
  def signed(self):
    # Hard swish goes down to -3/8; a stage is a linear bottleneck.
    return True

  def init_head(self, key, num_features, num_classes):
    return backbone.normal_head(key, num_features, num_classes)

  def torch_name(self, layer):
    return super().torch_name(layer).replace('pool.hidden', 'classifier.0')

  def norm(self, train, **kwargs):
    """Returns a batch norm of the paper's epsilon, as its momentum is."""
    return super().norm(train, epsilon=1e-3, **kwargs)

  def setup(self):
    if not self.truncated:
      self.pool_hidden = nn.Dense(
        POOLED_WIDTH,
        kernel_init=nn.initializers.normal(0.01),
        precision='highest',
      )

  def pool(self, final):
    pooled = super().pool(final)
    if self.truncated:
      return pooled
    return nn.hard_swish(self.pool_hidden(pooled))

  @nn.compact
  def __call__(self, images, *, train):
    x = self.step(images, 16, 3, 2, 1, train, 'features_0')
    x = nn.hard_swish(x)
    stages = [x]
    for i, block in enumerate(BLOCKS, 1):
      if len(stages) == self.num_stages:
        break
      x = self.block(x, *block, train, f'features_{i}_block')
      if i in STAGE_ENDS:
        stages.append(x)
    if not self.truncated:
      x = self.step(x, FINAL_WIDTH, 1, 1, 1, train, 'features_12')
      x = nn.hard_swish(x)
    return outputs.Features(tuple(stages), x, self.pool(x))

  def step(self, x, features, kernel, stride, groups, train, name):
    """Applies a convolution and batch norm."""
    x = self.conv(
      features, kernel, stride, feature_group_count=groups, name=f'{name}_0'
    )(x)
    return self.norm(train, name=f'{name}_1')(x)

  def block(
    self, x, kernel, inner, width, squeezes, swishes, stride, train, name
  ):
    """Applies an inverted residual, with the shortcut where shapes allow."""
    activation = nn.hard_swish if swishes else nn.relu
    y, index = x, 0
    if inner != x.shape[-1]:
      y = self.step(y, inner, 1, 1, 1, train, f'{name}_{index}')
      y, index = activation(y), index + 1
    y = self.step(y, inner, kernel, stride, inner, train, f'{name}_{index}')
    y, index = activation(y), index + 1
    if squeezes:
      y, index = self.squeeze(y, f'{name}_{index}'), index + 1
    y = self.step(y, width, 1, 1, 1, train, f'{name}_{index}')
    return x + y if stride == 1 and x.shape[-1] == width else y

  def squeeze(self, x, name):
    """Scales each channel by what the averages of all say."""
    narrow = round_to_eight(x.shape[-1] / 4)
    scale = jnp.mean(x, axis=(1, 2), keepdims=True)
    scale = self.conv(narrow, 1, use_bias=True, name=f'{name}_fc1')(scale)
    scale = self.conv(x.shape[-1], 1, use_bias=True, name=f'{name}_fc2')(
      nn.relu(scale)
    )
    return x * nn.hard_sigmoid(scale)
