"""The CIFAR VGGs of the distillation tables: with batch norm, a linear head.

Source: Simonyan and Zisserman 2014, "Very Deep Convolutional Networks for
Large-Scale Image Recognition", https://arxiv.org/abs/1409.1556; widths, pools
and start as in RepDistiller.
"""

import flax.linen as nn

from ijckd_jax.models import backbone
from ijckd_jax.models import outputs
from ijckd_jax.runtime import config_utils


class Vgg(backbone.Backbone):
  """Five blocks of 3x3 convolutions, with max-pools between.

  Between the last two blocks there is one for images of 64 pixels or more.

  Attributes:
    num_convs: of each block.
  """

  num_convs: tuple[int, int, int, int, int] = (1, 1, 1, 1, 1)

  torch_head = 'classifier'

  def init_head(self, key, num_features, num_classes):
    return backbone.normal_head(key, num_features, num_classes)

  @nn.compact
  def __call__(self, images, *, train):
    if min(images.shape[1:3]) < 8:
      raise config_utils.UserError(
        f'a VGG halves its map three times: images of {images.shape[1]}x'
        f'{images.shape[2]} are too small, they need sides of 8 or more'
      )
    x, stages, before = images, [], []
    widths = (64, 128, 256, 512, 512)
    for block, (width, num_convs) in enumerate(
      zip(widths, self.num_convs, strict=True)
    ):
      if len(stages) == self.num_stages:
        break
      if 0 < block < 4 or (block == 4 and min(images.shape[1:3]) >= 64):
        x = nn.max_pool(x, (2, 2), (2, 2))
      for i in range(num_convs):
        x = self.conv(width, 3, use_bias=True, name=f'block{block}_{3 * i}')(x)
        y = self.norm(train, name=f'block{block}_{3 * i + 1}')(x)
        x = nn.relu(y)
      stages.append(x)
      before.append(y)
    return outputs.Features(tuple(stages), x, self.pool(x), tuple(before))
