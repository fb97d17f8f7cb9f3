"""MobileNetV2: torchvision's for ImageNet, and the tables' for CIFAR.

Source: Sandler et al. 2018, "MobileNetV2: Inverted Residuals and Linear
Bottlenecks", https://arxiv.org/abs/1801.04381; the CIFAR one as in
RepDistiller: ReLU for ReLU6, an expansion in the first block too, widths that
are not rounded to multiples of eight.
"""

import flax.linen as nn

from ijckd_jax.models import backbone
from ijckd_jax.models import outputs

# Expansion, width, number of blocks and first stride of each group.
GROUPS = (
  (1, 16, 1, 1),
  (6, 24, 2, 2),
  (6, 32, 3, 2),
  (6, 64, 4, 2),
  (6, 96, 3, 1),
  (6, 160, 3, 2),
  (6, 320, 1, 1),
)
STAGE_ENDS = (1, 2, 4, 6)  # Groups; the stem is a stage as well.
LAST_WIDTH = 1280
# Names of a block's convolutions and batch norms.
CIFAR_NAMES = ('0', '1', '3', '4', '6', '7')
TORCHVISION_NAMES = ('0_0', '0_1', '1_0', '1_1', '2', '3')
UNEXPANDED_NAMES = ('0_0', '0_1', '1', '2')


class MobileNetV2(backbone.Backbone):
  """Inverted residuals; its stages are their linear bottlenecks.

  Torchvision drops a fifth of the pooled features in training, as
  `student.dropout` does.

  Attributes:
    width: factor on the widths; of the CIFAR one alone.
    cifar: whether it is the one for CIFAR.
  """

  width: float = 1.0
  cifar: bool = False

  @property
  def usual_size(self):
    return 32 if self.cifar else 224

  @property
  def torch_head(self):
    return 'classifier.0' if self.cifar else 'classifier.1'

  @property
  def signed(self):
    # A stage is a linear bottleneck, but for the stem, which ends in a ReLU.
    return self.truncated and self.num_stages != 1

  def init_head(self, key, num_features, num_classes):
    return backbone.normal_head(key, num_features, num_classes)

  @nn.compact
  def __call__(self, images, *, train):
    stem, last = (
      ('conv1', 'conv2')
      if self.cifar
      else (
        'features_0',
        'features_18',
      )
    )
    x = self.step(images, int(32 * self.width), 3, 2, train, stem)
    stages, index = [x], 0
    for group, (expansion, width, num_blocks, stride) in enumerate(GROUPS):
      if len(stages) == self.num_stages:
        break
      if self.cifar and group == 1:
        stride = 1
      for block in range(num_blocks):
        index += 1
        name = f'blocks_{group}_{block}' if self.cifar else f'features_{index}'
        x = self.block(
          x,
          expansion,
          int(width * self.width),
          stride if block == 0 else 1,
          train,
          f'{name}_conv',
        )
      if group in STAGE_ENDS:
        stages.append(x)
    if not self.truncated:
      x = self.step(x, LAST_WIDTH, 1, 1, train, last)
    return outputs.Features(tuple(stages), x, self.pool(x))

  def step(self, x, features, kernel, stride, train, name):
    """Applies a convolution, batch norm and activation."""
    x = self.conv(features, kernel, stride, name=f'{name}_0')(x)
    return self.activation(self.norm(train, name=f'{name}_1')(x))

  def activation(self, x):
    """Applies a ReLU, cut at six in torchvision's."""
    return nn.relu(x) if self.cifar else nn.relu6(x)

  def block(self, x, expansion, width, stride, train, name):
    """Applies an inverted residual: widen, depthwise, narrow, and a shortcut.

    Torchvision leaves out the widening that widens nothing.
    """
    inner = x.shape[-1] * expansion
    convs = [(inner, 1, 1, 1), (inner, 3, stride, inner), (width, 1, 1, 1)]
    names = CIFAR_NAMES if self.cifar else TORCHVISION_NAMES
    if not self.cifar and expansion == 1:
      convs, names = convs[1:], UNEXPANDED_NAMES
    y = x
    for i, (features, kernel, step, groups) in enumerate(convs):
      conv, norm = names[2 * i : 2 * i + 2]
      y = self.conv(
        features,
        kernel,
        step,
        feature_group_count=groups,
        name=f'{name}_{conv}',
      )(y)
      y = self.norm(train, name=f'{name}_{norm}')(y)
      if i < len(convs) - 1:
        y = self.activation(y)
    return x + y if stride == 1 and x.shape[-1] == width else y
