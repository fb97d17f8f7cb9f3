"""MobileNetV1 for ImageNet.

Source: Howard et al. 2017, "MobileNets: Efficient Convolutional Neural Networks
for Mobile Vision Applications", https://arxiv.org/abs/1704.04861; layout and
start as in mdistiller and the official IJCKD code.
"""

import re

import flax.linen as nn

from ijckd_jax.models import backbone
from ijckd_jax.models import layers
from ijckd_jax.models import outputs

# Width and stride of each separable convolution.
BLOCKS = (
  (64, 1),
  *((128, 2), (128, 1)),
  *((256, 2), (256, 1)),
  *((512, 2), *5 * ((512, 1),)),
  *((1024, 2), (1024, 1)),
)
STAGE_ENDS = (3, 5, 11, 13)  # Counted from the stem, which is 0.


class MobileNetV1(backbone.Backbone):
  """A convolution, then 13 depthwise separable ones."""

  usual_size = 224
  kernel_init = staticmethod(layers.TORCH_DEFAULT)

  def torch_key(self, key):
    # KD_SRRL has the same layers in two sequences, of twelve and of two.
    return re.sub(
      r'^model([12])\.(\d+)',
      lambda match: f'model.{12 * (int(match[1]) - 1) + int(match[2])}',
      key,
    )

  @nn.compact
  def __call__(self, images, *, train):
    def step(x, features, kernel, stride, conv, norm, groups=1):
      x = self.conv(
        features, kernel, stride, feature_group_count=groups, name=conv
      )(x)
      return self.norm(train, name=norm)(x)

    x = nn.relu(step(images, 32, 3, 2, 'model_0_0', 'model_0_1'))
    stages, before = [], []
    for i, (width, stride) in enumerate(BLOCKS, 1):
      if len(stages) == self.num_stages:
        break
      name, channels = f'model_{i}', x.shape[-1]
      x = step(x, channels, 3, stride, f'{name}_0', f'{name}_1', channels)
      y = step(nn.relu(x), width, 1, 1, f'{name}_3', f'{name}_4')
      x = nn.relu(y)
      if i in STAGE_ENDS:
        stages.append(x)
        before.append(y)
    return outputs.Features(tuple(stages), x, self.pool(x), tuple(before))
