"""ConvNeXt, as in timm.

Source: Liu et al. 2022, "A ConvNet for the 2020s",
https://arxiv.org/abs/2201.03545; the small ones are timm's.
"""

import flax.linen as nn
import jax

from ijckd_jax.models import backbone
from ijckd_jax.models import outputs

DEPTHS = (2, 2, 6, 2)  # Blocks of each stage.
PATCH = 4  # Stride of the stem.
EPSILON = 1e-6  # Of the layer norms.
LAYER_SCALE = 1e-6  # What branches are scaled by at the start.
START = nn.initializers.normal(0.02)


class ConvNeXt(backbone.TimmBackbone):
  """Depthwise convolutions and pointwise layers; a layer norm pools.

  Attributes:
    widths: channels of each stage.
  """

  widths: tuple[int, ...] = (40, 80, 160, 320)

  has_branches = True
  torch_head = 'head.fc'
  kernel_init = staticmethod(START)

  @property
  def signed(self):
    return True

  def init_head(self, key, num_features, num_classes):
    return backbone.normal_head(key, num_features, num_classes, std=0.02)

  def setup(self):
    if not self.truncated:
      self.pool_head__norm = nn.LayerNorm(epsilon=EPSILON)

  def pool(self, final):
    pooled = super().pool(final)
    return pooled if self.truncated else self.pool_head__norm(pooled)

  @nn.compact
  def __call__(self, images, *, train):
    x = self.patches(images, self.widths[0], PATCH, 'stem__0')
    x = self.layer_norm(x, 'stem__1')
    stages, index = [], 0
    for stage, depth in enumerate(DEPTHS):
      if len(stages) == self.num_stages:
        break
      if stage:
        name = f'stages__{stage}__downsample'
        x = self.layer_norm(x, f'{name}__0')
        x = self.patches(x, self.widths[stage], 2, f'{name}__1')
      for block in range(depth):
        name = f'stages__{stage}__blocks__{block}'
        y = self.branch(x, name)
        x += self.drop_branch(y, index / (sum(DEPTHS) - 1), train)
        index += 1
      stages.append(x)
    return outputs.Features(tuple(stages), x, self.pool(x))

  def patches(self, x, width, side, name):
    """Applies a convolution to windows side by side; a rest is left out."""
    kwargs = {'padding': 'VALID', 'use_bias': True, 'name': name}
    return self.conv(width, side, side, **kwargs)(x)

  def layer_norm(self, x, name):
    """Applies a layer norm to each pixel's channels."""
    return nn.LayerNorm(epsilon=EPSILON, dtype=self.dtype, name=name)(x)

  def branch(self, x, name):
    """Returns what a block adds to a map (B, H, W, C)."""
    width = x.shape[-1]
    conv = {'kernel_init': START, 'use_bias': True}
    y = self.depthwise(x, 7, name=f'{name}__conv_dw', **conv)
    y = self.layer_norm(y, f'{name}__norm')
    y = self.conv(4 * width, 1, use_bias=True, name=f'{name}__mlp__fc1')(y)
    y = nn.gelu(y, approximate=False)
    y = self.conv(width, 1, use_bias=True, name=f'{name}__mlp__fc2')(y)
    start = nn.initializers.constant(LAYER_SCALE)
    gamma: jax.Array = self.param(f'{name}__gamma', start, (width,))
    return gamma.astype(y.dtype) * y
