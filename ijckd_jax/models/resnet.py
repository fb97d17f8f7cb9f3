"""ResNets of four stages: torchvision's for ImageNet, and CIFAR's.

Source: He et al. 2015, "Deep Residual Learning for Image Recognition",
https://arxiv.org/abs/1512.03385; wide_resnet50_2 and resnext50_32x4d as in
torchvision; those for CIFAR, with a 3x3 stem and no max-pool, as in
RepDistiller and mdistiller.
"""

import flax.linen as nn

from ijckd_jax.models import backbone
from ijckd_jax.models import outputs


class ResNet(backbone.Backbone):
  """A ResNet whose stages are 64, 128, 256 and 512 wide, before expansion.

  Attributes:
    num_blocks: of each stage.
    bottleneck: blocks of 1x1, 3x3 and 1x1 convolutions, four times wider at
      their ends; else of two 3x3.
    inner_width: factor on the width inside of a bottleneck.
    groups: of a bottleneck's 3x3 convolution.
    cifar: start with a 3x3 convolution of stride 1 alone.
  """

  num_blocks: tuple[int, int, int, int] = (2, 2, 2, 2)
  bottleneck: bool = False
  inner_width: int = 1
  groups: int = 1
  cifar: bool = False

  @property
  def usual_size(self):
    return 32 if self.cifar else 224

  @property
  def torch_head(self):
    return 'linear' if self.cifar else 'fc'

  def torch_name(self, layer):
    shortcut = 'shortcut' if self.cifar else 'downsample'
    layer = layer.replace('downsample_conv', f'{shortcut}_0')
    layer = layer.replace('downsample_bn', f'{shortcut}_1')
    return super().torch_name(layer)

  @nn.compact
  def __call__(self, images, *, train):
    if self.cifar:
      x = self.conv(64, 3, name='conv1')(images)
    else:
      x = self.conv(64, 7, 2, name='conv1')(images)
    pool = None if self.cifar else _max_pool
    x = nn.relu(self.norm(train, name='bn1')(x, pool))
    stages, before = [x], [x]
    for stage, num_blocks in enumerate(self.num_blocks, 1):
      if len(stages) == self.num_stages:
        break
      for block in range(num_blocks):
        stride = 2 if stage > 1 and block == 0 else 1
        name = f'layer{stage}_{block}'
        y = self.block(x, 32 * 2**stage, stride, train, name)
        x = nn.relu(y)
      stages.append(x)
      before.append(y)
    return outputs.Features(tuple(stages), x, self.pool(x), tuple(before))

  def block(self, x, width, stride, train, name):
    """Applies convolutions and the shortcut around them, but no last ReLU."""
    if self.bottleneck:
      inner = width * self.inner_width
      width *= 4
      convs = ((inner, 1, 1, 1), (inner, 3, stride, self.groups))
      convs += ((width, 1, 1, 1),)
    else:
      convs = ((width, 3, stride, 1), (width, 3, 1, 1))
    y = x
    for i, (features, kernel, step, groups) in enumerate(convs, 1):
      y = self.conv(
        features,
        kernel,
        step,
        feature_group_count=groups,
        name=f'{name}_conv{i}',
      )(y)
      y = self.norm(train, name=f'{name}_bn{i}')(y)
      if i < len(convs):
        y = nn.relu(y)
    if stride > 1 or x.shape[-1] != width:
      x = self.conv(width, 1, stride, name=f'{name}_downsample_conv')(x)
      x = self.norm(train, name=f'{name}_downsample_bn')(x)
    return x + y


def _max_pool(x):
  return nn.max_pool(x, (3, 3), (2, 2), ((1, 1), (1, 1)))
