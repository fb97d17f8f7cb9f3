"""DeiT and ViT, vision transformers that classify by their class token.

Sources: Dosovitskiy et al. 2021, "An Image is Worth 16x16 Words",
https://arxiv.org/abs/2010.11929; Touvron et al. 2020, "Training data-efficient
image transformers & distillation through attention",
https://arxiv.org/abs/2012.12877 (the one without a distillation token). Layout
and start as in timm.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from ijckd_jax.models import backbone
from ijckd_jax.models import layers
from ijckd_jax.models import losses
from ijckd_jax.models import outputs
from ijckd_jax.runtime import config_utils

NORMAL = nn.initializers.normal(0.02)


class DeiT(backbone.Backbone):
  """Patches, a class token, and blocks of attention.

  Its maps are the patches' tokens: `final` after the last layer norm, the
  stages after each quarter of the blocks, before it. `pooled` is the class
  token after the layer norm. The positions' embedding has the size of the
  images.

  Attributes:
    width: of a token.
    depth: number of blocks, a multiple of four.
    num_heads: of each attention.
    patch: side of a patch in pixels.
  """

  width: int = 384
  depth: int = 12
  num_heads: int = 6
  patch: int = 16

  usual_size = 224
  torch_head = 'head'
  has_branches = True

  @property
  def signed(self):
    return True

  @property
  def pools_map(self):
    return self.truncated

  def init_head(self, key, num_features, num_classes):
    return backbone.normal_head(key, num_features, num_classes, std=0.02)

  def torch_name(self, layer):
    if layer in ('cls_token', 'pos_embed', 'patch_embed_proj'):
      return layer.replace('_proj', '.proj')
    return super().torch_name(layer)

  @nn.compact
  def __call__(self, images, *, train):
    height, width = images.shape[1:3]
    if height % self.patch or width % self.patch:
      raise config_utils.UserError(
        f'a DeiT cuts its images into patches of {self.patch} pixels, and '
        f'cannot read images of {height}x{width}: sides must be multiples of it'
      )
    x = self.conv(
      self.width,
      self.patch,
      self.patch,
      padding='VALID',
      use_bias=True,
      kernel_init=layers.TORCH_DEFAULT,
      bias_init=layers.torch_bias(self.patch**2 * images.shape[-1]),
      name='patch_embed_proj',
    )(images)
    size = x.shape[1:3]
    x = x.reshape(x.shape[0], -1, self.width)
    token = self.param(
      'cls_token', nn.initializers.normal(1e-6), (1, 1, self.width)
    )
    positions = self.param('pos_embed', NORMAL, (1, 1 + x.shape[1], self.width))
    token = jnp.broadcast_to(token, (x.shape[0], 1, self.width))
    x = jnp.concatenate([token.astype(x.dtype), x], axis=1)
    x += positions.astype(x.dtype)
    stages = []
    for block in range(self.depth):
      if len(stages) == self.num_stages:
        break
      name, position = f'blocks_{block}', block / (self.depth - 1)
      y = self.attention(self.layer_norm(x, f'{name}_norm1'), f'{name}_attn')
      x += self.drop_branch(y, position, train)
      y = self.mlp(self.layer_norm(x, f'{name}_norm2'), f'{name}_mlp')
      x += self.drop_branch(y, position, train)
      if (block + 1) % (self.depth // 4) == 0:
        stages.append(x[:, 1:].reshape(-1, *size, self.width))
    if self.truncated:
      final = stages[-1]
      return outputs.Features(tuple(stages), final, self.pool(final))
    x = self.layer_norm(x, 'norm')
    final = x[:, 1:].reshape(-1, *size, self.width)
    pooled = losses.at_least_float32(x[:, 0])
    return outputs.Features(tuple(stages), final, pooled)

  def fit_to_size(self, params, old, new):
    """Returns the params with the positions' embedding resized.

    Bicubic, antialiased where it shrinks; the class token's stays.
    """
    old, new = ([side // self.patch for side in size] for size in (old, new))
    if old == new:
      return params
    token, grid = np.split(params['pos_embed'], [1], axis=1)
    grid = grid.reshape(1, *old, self.width)
    grid = jax.image.resize(grid, (1, *new, self.width), 'bicubic')
    grid = np.asarray(grid).reshape(1, -1, self.width)
    return {**params, 'pos_embed': np.concatenate([token, grid], axis=1)}

  def dense(self, x, features, name):
    """Applies a linear layer."""
    return nn.Dense(features, kernel_init=NORMAL, dtype=self.dtype, name=name)(
      x
    )

  def layer_norm(self, x, name):
    """Applies a layer norm with the original's epsilon."""
    return nn.LayerNorm(epsilon=1e-6, dtype=self.dtype, name=name)(x)

  def attention(self, x, name):
    """Applies self-attention to tokens (B, N, D)."""
    qkv = self.dense(x, 3 * self.width, f'{name}_qkv')
    shape = (*x.shape[:2], 3, self.num_heads, self.width // self.num_heads)
    query, key, value = jnp.moveaxis(qkv.reshape(shape), 2, 0)
    x = jax.nn.dot_product_attention(query, key, value).reshape(x.shape)
    return self.dense(x, self.width, f'{name}_proj')

  def mlp(self, x, name):
    """Applies two linear layers to each token, four times wider between."""
    x = self.dense(x, 4 * self.width, f'{name}_fc1')
    return self.dense(nn.gelu(x, approximate=False), self.width, f'{name}_fc2')
