"""Wide residual networks: batch norm and ReLU before each convolution.

Source: Zagoruyko and Komodakis 2016, "Wide Residual Networks",
https://arxiv.org/abs/1605.07146.
"""

import re

import flax.linen as nn
import jax.numpy as jnp

from ijckd_jax.models import backbone
from ijckd_jax.models import outputs


class WideResNet(backbone.Backbone):
  """A WRN of depth 6n+4 for images of any size.

  Its stages are raw sums, before the next batch norm and ReLU; `before` has
  them between the two, and `final` is the last one after both. Where it ends at
  a stage, it has no last batch norm, `final` is the raw sum, and `before` ().

  Attributes:
    depth: 16, 40, ...
    widen: factor on the widths of the three stages.
    torchdistill: as torchdistill has it: a shortcut is not activated. Its
      weights have the same shapes and make another function.
  """

  depth: int = 16
  widen: int = 1
  torchdistill: bool = False

  @property
  def signed(self):
    return self.truncated

  def init_head(self, key, num_features, num_classes):
    head = super().init_head(key, num_features, num_classes)
    return {**head, 'bias': jnp.zeros_like(head['bias'])}

  def torch_name(self, layer):
    if self.torchdistill:
      layer = layer.replace('block', 'layer')
      return super().torch_name(layer.replace('shortcut', 'shortcut_0'))
    layer = re.sub(r'^(block\d)_', r'\1_layer_', layer)
    return super().torch_name(layer.replace('shortcut', 'convShortcut'))

  @nn.compact
  def __call__(self, images, *, train):
    num_blocks, remainder = divmod(self.depth - 4, 6)
    if remainder:
      raise ValueError(f'depth {self.depth} is not 6n+4')
    x = self.conv(16, 3, name='conv1')(images)
    stages, before = [x], [x]
    for stage, width in enumerate((16, 32, 64), 1):
      if len(stages) == self.num_stages:
        break
      for block in range(num_blocks):
        stride = 2 if stage > 1 and block == 0 else 1
        name = f'block{stage}_{block}'
        normed = self.norm(train, name=f'{name}_bn1')(x)
        if stage > 1 and block == 0:
          before.append(normed)
        x = self.block(x, normed, width * self.widen, stride, train, name)
      stages.append(x)
    if not self.truncated:
      before.append(self.norm(train, name='bn1')(x))
      x = nn.relu(before[-1])
    before = () if self.truncated else tuple(before)
    return outputs.Features(tuple(stages), x, self.pool(x), before)

  def block(self, x, normed, width, stride, train, name):
    """Applies two pre-activated convolutions, and the shortcut around them."""
    activated = nn.relu(normed)
    y = self.conv(width, 3, stride, name=f'{name}_conv1')(activated)
    y = nn.relu(self.norm(train, name=f'{name}_bn2')(y))
    y = self.conv(width, 3, name=f'{name}_conv2')(y)
    if x.shape[-1] != width:
      shortcut = self.conv(width, 1, stride, name=f'{name}_shortcut')
      x = shortcut(x if self.torchdistill else activated)
    return x + y
