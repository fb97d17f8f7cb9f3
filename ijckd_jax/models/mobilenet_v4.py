"""MobileNetV4 of convolutions alone, as in timm.

Source: Qin et al. 2024, "MobileNetV4: Universal Models for the Mobile
Ecosystem", https://arxiv.org/abs/2404.10518, tables 11 and 12.
"""

from typing import NamedTuple

import flax.linen as nn
import jax.numpy as jnp

from ijckd_jax.models import backbone
from ijckd_jax.models import outputs

STEM_WIDTH = 32
FINAL_WIDTH = 960
POOLED_WIDTH = 1280


class Conv(NamedTuple):
  """A convolution, batch norm and ReLU."""

  kernel: int
  width: int
  stride: int


class Fused(NamedTuple):
  """A 3x3 convolution that widens, a ReLU, and one of 1x1 that narrows."""

  inner: int
  width: int
  stride: int


class Universal(NamedTuple):
  """A universal inverted bottleneck.

  Attributes:
    start: side of the window of a depthwise convolution before the widening;
      0 for none.
    middle: of the one after the widening; 0 for none.
    inner: channels after the widening.
    width: channels of the result.
    stride: of the last depthwise convolution.
  """

  start: int
  middle: int
  inner: int
  width: int
  stride: int = 1


# Blocks by stage; the stem is a stage before them.
SMALL = (
  (Conv(3, 32, 2), Conv(1, 32, 1)),
  (Conv(3, 96, 2), Conv(1, 64, 1)),
  (
    Universal(5, 5, 192, 96, 2),
    *4 * (Universal(0, 3, 192, 96),),
    Universal(3, 0, 384, 96),
  ),
  (
    Universal(3, 3, 576, 128, 2),
    Universal(5, 5, 512, 128),
    Universal(0, 5, 512, 128),
    Universal(0, 5, 384, 128),
    *2 * (Universal(0, 3, 512, 128),),
  ),
)
MEDIUM = (
  (Fused(128, 48, 2),),
  (Universal(3, 5, 192, 80, 2), Universal(3, 3, 160, 80)),
  (
    Universal(3, 5, 480, 160, 2),
    *2 * (Universal(3, 3, 640, 160),),
    Universal(3, 5, 640, 160),
    Universal(3, 3, 640, 160),
    Universal(3, 0, 640, 160),
    Universal(0, 0, 320, 160),
    Universal(3, 0, 640, 160),
  ),
  (
    Universal(5, 5, 960, 256, 2),
    Universal(5, 5, 1024, 256),
    *2 * (Universal(3, 5, 1024, 256),),
    Universal(0, 0, 1024, 256),
    Universal(3, 0, 1024, 256),
    Universal(3, 5, 512, 256),
    Universal(5, 5, 1024, 256),
    *2 * (Universal(0, 0, 1024, 256),),
    Universal(5, 0, 512, 256),
  ),
)


class MobileNetV4(backbone.TimmBackbone):
  """Universal inverted bottlenecks; a hidden layer with batch norm pools.

  Attributes:
    blocks: by stage.
  """

  blocks: tuple[tuple[NamedTuple, ...], ...] = SMALL

  has_branches = True
  torch_head = 'classifier'

  @property
  def signed(self):
    # A stage of convolutions ends in a ReLU, and all others are linear.
    if not self.truncated or self.num_stages == 1:
      return False
    end = None if self.num_stages is None else self.num_stages - 1
    return not isinstance(self.blocks[:end][-1][-1], Conv)

  def init_head(self, key, num_features, num_classes):
    return backbone.uniform_head(key, num_features, num_classes)

  def setup(self):
    if not self.truncated:
      self.pool_conv_head = nn.Conv(
        POOLED_WIDTH,
        (1, 1),
        use_bias=False,
        kernel_init=self.kernel_init,
        precision='highest',
      )
      dtype = jnp.promote_types(self.dtype, jnp.float32)
      self.pool_norm_head = self.norm(None, dtype=dtype)

  def pool(self, final, train=False):
    pooled = super().pool(final)
    if self.truncated:
      return pooled
    x = self.pool_conv_head(pooled[:, None, None])
    return nn.relu(self.pool_norm_head(x, None, not self.follows(train)))[
      :, 0, 0
    ]

  @nn.compact
  def __call__(self, images, *, train):
    x = self.step(images, STEM_WIDTH, 3, 2, train, ('conv_stem', 'bn1'))
    stages, index = [x], 0
    num_blocks = sum(map(len, self.blocks)) + 1
    for stage, blocks in enumerate(self.blocks):
      if len(stages) == self.num_stages:
        break
      for number, block in enumerate(blocks):
        name = f'blocks__{stage}__{number}'
        x = self.block(x, block, index / num_blocks, train, name)
        index += 1
      stages.append(x)
    if not self.truncated:
      block, name = Conv(1, FINAL_WIDTH, 1), f'blocks__{len(self.blocks)}__0'
      x = self.block(x, block, 0, train, name)
    return outputs.Features(tuple(stages), x, self.pool(x, train))

  def step(self, x, width, kernel, stride, train, names, act=nn.relu):
    """Applies a convolution, batch norm and activation.

    Args:
      x: a map.
      width: channels of the result; None for a depthwise convolution.
      kernel: side of the window.
      stride: step of the window.
      train: whether batch norm uses the batch's statistics.
      names: of the convolution and of the batch norm.
      act: the activation; None for none.
    """
    conv, norm = names
    if width is None:
      x = self.depthwise(x, kernel, stride, name=conv)
    else:
      x = self.conv(width, kernel, stride, name=conv)(x)
    x = self.norm(train, name=norm)(x)
    return act(x) if act else x

  def block(self, x, block, position, train, name):
    """Applies a block, with the shortcut where shapes allow."""
    if isinstance(block, Conv):
      names = (f'{name}__conv', f'{name}__bn1')
      return self.step(x, block.width, block.kernel, block.stride, train, names)
    if isinstance(block, Fused):
      names = (f'{name}__conv_exp', f'{name}__bn1')
      x = self.step(x, block.inner, 3, block.stride, train, names)
      names = (f'{name}__conv_pwl', f'{name}__bn2')
      return self.step(x, block.width, 1, 1, train, names, act=None)
    y = x
    early = 1 if block.middle else block.stride
    for part, width, kernel, stride, act in (
      ('dw_start', None, block.start, early, None),
      ('pw_exp', block.inner, 1, 1, nn.relu),
      ('dw_mid', None, block.middle, block.stride, nn.relu),
      ('pw_proj', block.width, 1, 1, None),
    ):
      if kernel:
        names = (f'{name}__{part}__conv', f'{name}__{part}__bn')
        y = self.step(y, width, kernel, stride, train, names, act)
    if block.stride == 1 and x.shape[-1] == block.width:
      return x + self.drop_branch(y, position, train)
    return y
