"""The CIFAR ResNets of the distillation tables: three stages, no max-pool.

Source: He et al. 2015, "Deep Residual Learning for Image Recognition",
https://arxiv.org/abs/1512.03385, section 4.2; widths as in CRD and SimKD, where
resnetNx4 doubles the stem as well.
"""

import flax.linen as nn

from ijckd_jax.models import backbone
from ijckd_jax.models import outputs


class CifarResNet(backbone.Backbone):
  """A ResNet of depth 6n+2 for images of any size.

  Attributes:
    depth: 8, 14, 20, ...
    widths: channels of the stem and of the three stages.
  """

  depth: int = 20
  widths: tuple[int, int, int, int] = (16, 16, 32, 64)

  def torch_name(self, layer):
    layer = layer.replace('downsample_conv', 'downsample_0')
    return super().torch_name(layer.replace('downsample_bn', 'downsample_1'))

  @nn.compact
  def __call__(self, images, *, train):
    num_blocks, remainder = divmod(self.depth - 2, 6)
    if remainder:
      raise ValueError(f'depth {self.depth} is not 6n+2')
    x = self.conv(self.widths[0], 3, name='conv1')(images)
    x = nn.relu(self.norm(train, name='bn1')(x))
    stages, before = [x], [x]
    for stage, width in enumerate(self.widths[1:], 1):
      if len(stages) == self.num_stages:
        break
      for block in range(num_blocks):
        stride = 2 if stage > 1 and block == 0 else 1
        name = f'layer{stage}_{block}'
        y = self.block(x, width, stride, train, name)
        x = nn.relu(y)
      stages.append(x)
      before.append(y)
    return outputs.Features(tuple(stages), x, self.pool(x), tuple(before))

  def block(self, x, width, stride, train, name):
    """Applies two convolutions and the shortcut around them, but no ReLU."""
    y = self.conv(width, 3, stride, name=f'{name}_conv1')(x)
    y = nn.relu(self.norm(train, name=f'{name}_bn1')(y))
    y = self.conv(width, 3, name=f'{name}_conv2')(y)
    y = self.norm(train, name=f'{name}_bn2')(y)
    if stride > 1 or x.shape[-1] != width:
      x = self.conv(width, 1, stride, name=f'{name}_downsample_conv')(x)
      x = self.norm(train, name=f'{name}_downsample_bn')(x)
    return x + y
