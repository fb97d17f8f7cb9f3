"""Connectors: from the student's features to the teacher's space.

A connector ends in a ReLU where the teacher's features cannot be negative and
in none where they can (`signed`): a connector that ends in a ReLU could never
reach the negative half of a signed representation.
"""

from collections.abc import Mapping
import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from ijckd_jax.models import layers
from ijckd_jax.models import outputs
from ijckd_jax.runtime import config_utils


class Connector(layers.Joins, nn.Module):
  """`__call__(x, *, train)`: (B, H, W, C_s) to (B, H, W, features).

  Attributes:
    features: channels of the teacher's representation.
    signed: whether that representation can be negative.
    takes: 'map', the student's last map, or 'pooled', its pooled features as a
      map of 1x1.
    axis_name: mapped axis over which batch norm is synchronised, or None.
    dtype: dtype of the computation.
    unbiased_variance: see models.layers.BatchNorm.
  """

  features: int
  signed: bool = False
  takes: str = 'map'
  axis_name: str | None = None
  dtype: Any = jnp.float32
  unbiased_variance: bool = False

  def last(self, x: jax.Array) -> jax.Array:
    """Applies the activation that matches the target's sign."""
    return x if self.signed else nn.relu(x)


class Identity(Connector):
  """Nothing but the last activation; channel counts must be equal."""

  @nn.compact
  def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
    if x.shape[-1] != self.features:
      raise config_utils.UserError(
        f"connector 'identity' needs equal channel counts, but the student "
        f'has {x.shape[-1]} and the teacher {self.features}; try '
        "'bottleneck' or 'conv1x1'"
      )
    return self.last(x)


class Linear(Connector):
  """A 1x1 convolution with bias and nothing after it: always signed."""

  def __post_init__(self) -> None:
    self.signed = True
    super().__post_init__()

  @nn.compact
  def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
    return self.conv(self.features, use_bias=True)(x)


class Conv1x1(Connector):
  """A 1x1 convolution and batch norm.

  Attributes:
    torch_init: start from PyTorch's default, not from the official
      N(0, 2/C_out).

  Source: SRRL, Yang et al. 2021, https://openreview.net/forum?id=ZzwDy_wiWv.
  """

  torch_init: bool = False

  @nn.compact
  def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
    start = layers.TORCH_DEFAULT if self.torch_init else layers.KAIMING_FAN_OUT
    return self.last(self.norm(self.conv(self.features, init=start)(x), train))


class Bottleneck(Connector):
  """1x1, 3x3 and 1x1 convolutions at 1/factor of the teacher's width.

  Attributes:
    factor: the inner width is features // factor.

  Source: SimKD, Chen et al. 2022, https://arxiv.org/abs/2203.14001.
  """

  factor: int = 2
  depthwise = False

  @nn.compact
  def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
    if not 1 <= self.factor <= self.features:
      raise config_utils.UserError(
        f'factor={self.factor}: a bottleneck on {self.features} channels takes '
        f'a factor from 1 to {self.features}'
      )
    width = self.features // self.factor
    groups = width if self.depthwise else 1
    x = nn.relu(self.norm(self.conv(width)(x), train))
    x = self.conv(width, 3, feature_group_count=groups)(x)
    x = nn.relu(self.norm(x, train))
    return self.last(self.norm(self.conv(self.features)(x), train))


class DepthwiseBottleneck(Bottleneck):
  """The bottleneck with a depthwise 3x3 convolution."""

  depthwise = True


class Mlp(Connector):
  """Two linear layers with batch norm, on pooled features, at full width."""

  takes: str = 'pooled'

  @nn.compact
  def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
    x = nn.relu(self.norm(self.conv(self.features)(x), train))
    return self.last(self.norm(self.conv(self.features)(x), train))


class Orthogonal(Connector):
  """A linear map of pooled features with orthonormal rows or columns.

  Its kernel is cut out of the exponential of a skew-symmetric matrix, which is
  what is trained: it stays orthonormal. Always signed, without a bias.

  Source: VkD, Miles et al. 2024, https://arxiv.org/abs/2403.06213.
  """

  takes: str = 'pooled'

  def __post_init__(self) -> None:
    self.signed = True
    super().__post_init__()

  @nn.compact
  def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
    inputs = x.shape[-1]
    side = max(inputs, self.features)
    start = nn.initializers.normal(side**-0.5)
    rotation = _rotation(self.param('kernel', start, (side, side)))
    # At the default precision of a TPU it would not be orthonormal.
    return jnp.matmul(
      x, rotation[:inputs, : self.features], precision='highest'
    ).astype(self.dtype)


def as_linear(
  connector: Orthogonal, params: Mapping[str, Any], inputs: int
) -> tuple[Linear, dict[str, Any]]:
  """Returns the linear connector that does what an orthogonal one does.

  Args:
    connector: has been trained.
    params: of the connector.
    inputs: channels C_s that it takes.

  Returns:
    The linear connector and its params, float32.
  """
  features = connector.features
  kernel = _rotation(params['kernel'])[None, None, :inputs, :features]
  conv = {'kernel': np.array(kernel), 'bias': np.zeros(features, np.float32)}
  linear = Linear(features, takes=connector.takes, dtype=connector.dtype)
  return linear, {'Conv_0': conv}


def _rotation(free: jax.Array) -> jax.Array:
  return jax.scipy.linalg.expm(free - free.T)


CONNECTORS = {
  'bottleneck': Bottleneck,
  'bottleneck_depthwise': DepthwiseBottleneck,
  'conv1x1': Conv1x1,
  'identity': Identity,
  'linear': Linear,
  'mlp': Mlp,
  'orthogonal': Orthogonal,
}


def get(name: str) -> type[Connector]:
  """Returns the connector class called `name`, or at `package.module:Name`.

  Raises:
    config_utils.UserError: there is no such connector, or it is something else.
  """
  cls = config_utils.resolve('connector', name, CONNECTORS)
  if not (isinstance(cls, type) and issubclass(cls, Connector)):
    raise config_utils.UserError(
      f'{name!r} is not a connector: it must be a subclass of '
      'connectors.Connector'
    )
  return cls


def has_factor(name: str) -> bool:
  """Returns whether a connector has a width divisor; raises as `get` does."""
  return 'factor' in {field.name for field in dataclasses.fields(get(name))}


def build(
  name: str,
  teacher: outputs.Shapes,
  *,
  factor: int | None = None,
  **fields: Any,
) -> Connector:
  """Returns the connector called `name` for a teacher's representation.

  Args:
    name: a key of CONNECTORS, or `package.module:Name`.
    teacher: outputs.Shapes of the teacher.
    factor: width divisor, for connectors that have one.
    **fields: further fields of the connector, such as `takes`.

  Raises:
    config_utils.UserError: there is no such connector.
  """
  cls = get(name)
  if factor is not None and has_factor(name):
    fields['factor'] = factor
  takes = fields.get('takes', cls.takes)
  target, signed = teacher.final, teacher.signed
  if takes == 'pooled':
    target, signed = teacher.pooled, bool(teacher.pooled_signed)
  return cls(features=target.shape[-1], signed=signed, **fields)
