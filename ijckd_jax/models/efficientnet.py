"""EfficientNets, their Lite versions and MobileNetV3 large, as in timm.

Sources: Tan and Le 2019, "EfficientNet", https://arxiv.org/abs/1905.11946,
table 1; Howard et al. 2019, "Searching for MobileNetV3",
https://arxiv.org/abs/1905.02244, table 1.
"""

import math
from typing import NamedTuple

import flax.linen as nn
import jax.numpy as jnp

from ijckd_jax.models import backbone
from ijckd_jax.models import mobilenet_v3
from ijckd_jax.models import outputs

# Kernel, expansion, width, number of blocks and first stride of each group.
GROUPS = (
  (3, 1, 16, 1, 1),
  (3, 6, 24, 2, 2),
  (5, 6, 40, 2, 2),
  (3, 6, 80, 3, 2),
  (5, 6, 112, 3, 1),
  (5, 6, 192, 4, 2),
  (3, 6, 320, 1, 1),
)
# Kernel, inner width, width, squeeze-and-excitation, hard swish and stride of
# each block of MobileNetV3 large, in timm's groups.
LARGE = (
  ((3, 16, 16, False, False, 1),),
  ((3, 64, 24, False, False, 2), (3, 72, 24, False, False, 1)),
  ((5, 72, 40, True, False, 2), *2 * ((5, 120, 40, True, False, 1),)),
  (
    (3, 240, 80, False, True, 2),
    (3, 200, 80, False, True, 1),
    *2 * ((3, 184, 80, False, True, 1),),
  ),
  ((3, 480, 112, True, True, 1), (3, 672, 112, True, True, 1)),
  ((5, 672, 160, True, True, 2), *2 * ((5, 960, 160, True, True, 1),)),
)
STAGE_ENDS = (1, 2, 4)  # Groups before the last; the stem is a stage as well.
STEM_WIDTH = 32
LAST_WIDTH = 1280
TF_EPSILON = 1e-3  # Of the batch norms of TensorFlow's weights.
ACTIVATIONS = {
  'relu': nn.relu,
  'relu6': nn.relu6,
  'silu': nn.silu,
  'hard_swish': nn.hard_swish,
}


# From EfficientNet-PyTorch's names of layers to timm's: of a whole network, of
# a block that does not widen, and of one that does.
TORCH_NAMES = {
  '_conv_stem': 'conv_stem',
  '_bn0': 'bn1',
  '_conv_head': 'conv_head',
  '_bn1': 'bn2',
  '_fc': 'classifier',
}
BLOCK_NAMES = (
  {
    '_depthwise_conv': 'conv_dw',
    '_bn1': 'bn1',
    '_se_reduce': 'se.conv_reduce',
    '_se_expand': 'se.conv_expand',
    '_project_conv': 'conv_pw',
    '_bn2': 'bn2',
  },
  {
    '_expand_conv': 'conv_pw',
    '_bn0': 'bn1',
    '_depthwise_conv': 'conv_dw',
    '_bn1': 'bn2',
    '_se_reduce': 'se.conv_reduce',
    '_se_expand': 'se.conv_expand',
    '_project_conv': 'conv_pwl',
    '_bn2': 'bn3',
  },
)


class Block(NamedTuple):
  """An inverted residual.

  Attributes:
    kernel: side of the depthwise convolution's window.
    inner: channels that the depthwise convolution has.
    width: channels of the result.
    squeezed: channels inside of squeeze-and-excitation; 0 for none.
    activation: a key of ACTIVATIONS.
    stride: of the depthwise convolution.
  """

  kernel: int
  inner: int
  width: int
  squeezed: int
  activation: str
  stride: int


def groups_of(
  width: float = 1.0, depth: float = 1.0, lite: bool = False
) -> tuple[tuple[Block, ...], ...]:
  """Returns the blocks of an EfficientNet, group by group.

  Args:
    width: factor on the channels, which are rounded to multiples of eight.
    depth: factor on the numbers of blocks, which are rounded up.
    lite: whether it has ReLU6 for SiLU, no squeeze-and-excitation, and first
      and last groups that are not deepened.
  """
  groups, channels = [], STEM_WIDTH
  for number, (kernel, expansion, base, num, stride) in enumerate(GROUPS):
    if not (lite and number in (0, len(GROUPS) - 1)):
      num = math.ceil(num * depth)
    wider, blocks = mobilenet_v3.round_to_eight(base * width), []
    for block in range(num):
      squeezed, activation = channels // 4, 'silu'
      if lite:
        squeezed, activation = 0, 'relu6'
      step = 1 if block else stride
      inner = channels * expansion
      blocks.append(Block(kernel, inner, wider, squeezed, activation, step))
      channels = wider
    groups.append(tuple(blocks))
  return tuple(groups)


def large_groups() -> tuple[tuple[Block, ...], ...]:
  """Returns the blocks of MobileNetV3 large, group by group."""

  def block(kernel, inner, width, squeezes, swishes, stride):
    squeezed = mobilenet_v3.round_to_eight(inner / 4) if squeezes else 0
    activation = 'hard_swish' if swishes else 'relu'
    return Block(kernel, inner, width, squeezed, activation, stride)

  return tuple(tuple(block(*row) for row in group) for group in LARGE)


class EfficientNet(backbone.TimmBackbone):
  """Inverted residuals, whose linear bottlenecks end its stages.

  Attributes:
    groups: blocks by timm's groups.
    activation: of the stem and the last convolution, a key of ACTIVATIONS.
    same_padding: whether convolutions are padded as TensorFlow pads them.
    epsilon: of the batch norms.
  """

  groups: tuple[tuple[Block, ...], ...] = groups_of()
  activation: str = 'silu'
  same_padding: bool = False
  epsilon: float = 1e-5

  has_branches = True
  torch_head = 'classifier'
  stem_width = STEM_WIDTH
  num_last = 0  # Layers after `groups` that timm counts among the blocks.
  gate = staticmethod(nn.sigmoid)  # Of squeeze-and-excitation.

  @property
  def signed(self):
    # A stage is a linear bottleneck, but for the stem.
    if self.truncated and self.num_stages != 1:
      return True
    return not self.activation.startswith('relu')

  def torch_key(self, key):
    """Returns timm's name of an entry as EfficientNet-PyTorch calls it.

    Its networks are TensorFlow's, and are padded as there.
    """
    if not self.same_padding:
      return key
    name, _, rest = key.partition('.')
    if name != '_blocks':
      name = TORCH_NAMES.get(name)
      return f'{name}.{rest}' if name else key
    number, _, rest = rest.partition('.')
    layer, _, leaf = rest.partition('.')
    places = [
      (group, block)
      for group, blocks in enumerate(self.groups)
      for block in range(len(blocks))
    ]
    if not (number.isdecimal() and int(number) < len(places)):
      return key
    group, block = places[int(number)]
    # The first group widens nothing.
    layer = BLOCK_NAMES[bool(group)].get(layer, layer)
    return f'blocks.{group}.{block}.{layer}.{leaf}'

  def init_head(self, key, num_features, num_classes):
    return backbone.uniform_head(key, num_features, num_classes)

  def conv(self, features, kernel=1, stride=1, **kwargs):
    """Returns a convolution, padded as the weights want it."""
    if self.same_padding:
      kwargs['padding'] = 'SAME'
    return super().conv(features, kernel, stride, **kwargs)

  def norm(self, train, **kwargs):
    """Returns a batch norm of the weights' epsilon."""
    return super().norm(train, epsilon=self.epsilon, **kwargs)

  @nn.compact
  def __call__(self, images, *, train):
    x = self.conv(self.stem_width, 3, 2, name='conv_stem')(images)
    x = self.activate(self.norm(train, name='bn1')(x))
    stages, index = [x], 0
    num_blocks = sum(map(len, self.groups)) + self.num_last
    for group, blocks in enumerate(self.groups):
      if len(stages) == self.num_stages:
        break
      for number, block in enumerate(blocks):
        name = f'blocks__{group}__{number}'
        x = self.block(x, block, index / num_blocks, train, name)
        index += 1
      if group in STAGE_ENDS or group == len(self.groups) - 1:
        stages.append(x)
    if not self.truncated:
      x = self.last(x, train)
    return outputs.Features(tuple(stages), x, self.pool(x))

  def activate(self, x):
    """Applies the activation of the stem and the last convolution."""
    return ACTIVATIONS[self.activation](x)

  def last(self, x, train):
    """Applies the layers between the last stage and the pool."""
    x = self.conv(LAST_WIDTH, name='conv_head')(x)
    return self.activate(self.norm(train, name='bn2')(x))

  def block(self, x, block, position, train, name):
    """Applies an inverted residual, with the shortcut where shapes allow."""
    activate, y, widens = ACTIVATIONS[block.activation], x, 0
    if block.inner != x.shape[-1]:
      widens = 1
      y = self.conv(block.inner, name=f'{name}__conv_pw')(y)
      y = activate(self.norm(train, name=f'{name}__bn1')(y))
    step = f'{name}__conv_dw'
    y = self.depthwise(y, block.kernel, block.stride, name=step)
    y = activate(self.norm(train, name=f'{name}__bn{widens + 1}')(y))
    if block.squeezed:
      y = self.squeeze(y, block, f'{name}__se')
    narrow = 'conv_pwl' if widens else 'conv_pw'
    y = self.conv(block.width, name=f'{name}__{narrow}')(y)
    y = self.norm(train, name=f'{name}__bn{widens + 2}')(y)
    if block.stride == 1 and x.shape[-1] == block.width:
      return x + self.drop_branch(y, position, train)
    return y

  def squeeze(self, x, block, name):
    """Scales each channel by what the averages of all say."""
    scale = jnp.mean(x, axis=(1, 2), keepdims=True)
    reduce, expand = f'{name}__conv_reduce', f'{name}__conv_expand'
    scale = self.conv(block.squeezed, use_bias=True, name=reduce)(scale)
    scale = self.squeeze_activation(scale)
    scale = self.conv(x.shape[-1], use_bias=True, name=expand)(scale)
    return x * self.gate(scale)

  def squeeze_activation(self, x):
    """Applies the activation inside of squeeze-and-excitation."""
    return nn.silu(x)


class MobileNetV3Large(EfficientNet):
  """MobileNetV3 large; a hidden layer pools."""

  groups: tuple[tuple[Block, ...], ...] = large_groups()
  activation: str = 'hard_swish'

  stem_width = 16
  num_last = 1
  gate = staticmethod(nn.hard_sigmoid)

  def setup(self):
    if not self.truncated:
      self.pool_conv_head = nn.Conv(
        LAST_WIDTH, (1, 1), kernel_init=self.kernel_init, precision='highest'
      )

  def pool(self, final):
    pooled = super().pool(final)
    if self.truncated:
      return pooled
    return nn.hard_swish(self.pool_conv_head(pooled[:, None, None]))[:, 0, 0]

  def last(self, x, train):
    name = f'blocks__{len(self.groups)}__0'
    x = self.conv(960, name=f'{name}__conv')(x)
    return self.activate(self.norm(train, name=f'{name}__bn1')(x))

  def squeeze_activation(self, x):
    return nn.relu(x)
