"""Layers as PyTorch has them: their padding, their start, their batch norm."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from ijckd_jax.models import losses
from ijckd_jax.runtime import config_utils

KAIMING_FAN_OUT = nn.initializers.variance_scaling(2.0, 'fan_out', 'normal')
# PyTorch's default start of kernels: uniform in +-1/sqrt(fan_in).
TORCH_DEFAULT = nn.initializers.variance_scaling(1 / 3, 'fan_in', 'uniform')


def torch_bias(fan_in: int):
  """Returns PyTorch's default start of biases: uniform in +-1/sqrt(fan_in)."""
  bound = fan_in**-0.5

  def init(key, shape, dtype=jnp.float32):
    return jax.random.uniform(key, shape, dtype, -bound, bound)

  return init


def conv(features: int, kernel: int = 1, stride: int = 1, **kwargs) -> nn.Conv:
  """Returns a convolution padded as PyTorch pads it, without bias.

  'SAME' puts the padding of a strided convolution elsewhere.

  Args:
    features: channels of the output.
    kernel: side of the window.
    stride: step of the window.
    **kwargs: further fields of nn.Conv.
  """
  return nn.Conv(
    features,
    (kernel, kernel),
    strides=stride,
    **{'padding': (kernel - 1) // 2, 'use_bias': False, **kwargs},
  )


class BatchNorm(nn.BatchNorm):
  """Batch norm with PyTorch's momentum and epsilon.

  Attributes:
    unbiased: let the running variance follow the batch's unbiased variance, of
      n/(n-1) times the size, as PyTorch does; n is the number of values that a
      channel has in the batch (of all devices where they are synchronised).
      What normalises the batch in training is the biased one in both.
  """

  momentum: float = 0.9
  epsilon: float = 1e-5
  unbiased: bool = False

  def __call__(self, x, pool=None, use_running_average=None):
    """Returns `x` (..., C) normalised; in training, follows its statistics.

    Args:
      x: a map.
      pool: a max-pool that follows, or None.
      use_running_average: given here or as a field.

    Raises:
      config_utils.UserError: in training, a channel has a single value, which
        has no variance; PyTorch refuses it as well.
    """
    inference = nn.merge_param(
      'use_running_average', self.use_running_average, use_running_average
    )
    trains = not (inference or self.is_initializing())
    if trains and self._num_values(x) < 2:
      raise config_utils.UserError(
        f'batch norm of {list(x.shape)} has a single value in each channel, '
        'and so no variance: take a larger batch_size, a smaller accumulation, '
        'larger images, or sync_batch_norm=True on several devices'
      )
    old = self.get_variable('batch_stats', 'var')
    if pool is None:
      y = super().__call__(x, use_running_average)
    elif not trains:
      y = pool(super().__call__(x, use_running_average))
    else:
      y = self._pool_first(x, pool)
    if self.unbiased and trains:
      count = self._num_values(x)
      kept = self.momentum * old
      added = self.get_variable('batch_stats', 'var') - kept
      added *= count / (count - 1)
      self.put_variable('batch_stats', 'var', kept + added)
    return y

  def _num_values(self, x) -> int:
    """Returns how many values a channel has in the batch."""
    count = x.size // x.shape[-1]
    if self.axis_name is not None:
      count *= jax.lax.axis_size(self.axis_name)
    return count

  def _pool_first(self, x, pool):
    """Returns `pool(self(x))` in training, normalising what is pooled alone.

    A channel's largest value stays the largest, or with a negative scale
    becomes the smallest: of such channels the sign is turned first. A TPU
    would write the whole normalised map, and read it twice.
    """
    scale, bias = (self.get_variable('params', k) for k in ('scale', 'bias'))
    sign = jnp.where(scale < 0, -1, 1)
    x = x * sign.astype(x.dtype)
    exact = losses.at_least_float32(x)
    axes = tuple(range(x.ndim - 1))
    moments = jnp.mean(exact, axes), jnp.mean(jnp.square(exact), axes)
    if self.axis_name is not None:
      moments = jax.lax.pmean(moments, self.axis_name)
    mean, square = moments
    var = jnp.maximum(0, square - jnp.square(mean))
    for name, value in (('mean', sign * mean), ('var', var)):
      kept = self.momentum * self.get_variable('batch_stats', name)
      self.put_variable('batch_stats', name, kept + (1 - self.momentum) * value)
    multiplier = jax.lax.rsqrt(var + self.epsilon) * (sign * scale)
    return ((pool(x) - mean) * multiplier + bias).astype(self.dtype)


class Joins:
  """The layers of what stands between two networks, for a module to inherit.

  It has the fields `axis_name`, `dtype` and `unbiased_variance` of a Connector.
  """

  def conv(self, features, kernel=1, stride=1, init=TORCH_DEFAULT, **kwargs):
    """Returns a convolution; without stride it keeps the map's size."""
    return conv(
      features, kernel, stride, kernel_init=init, dtype=self.dtype, **kwargs
    )

  def linear(self, x, features, name):
    """Applies a linear layer that starts as PyTorch's, in float32."""
    return nn.Dense(
      features,
      kernel_init=TORCH_DEFAULT,
      bias_init=torch_bias(x.shape[-1]),
      name=name,
    )(x)

  def norm(self, x, train, **kwargs):
    """Applies a batch norm, see BatchNorm."""
    return BatchNorm(
      use_running_average=not train,
      axis_name=self.axis_name,
      dtype=self.dtype,
      unbiased=self.unbiased_variance,
      **kwargs,
    )(x)


def channel_shuffle(x: jax.Array, groups: int) -> jax.Array:
  """Returns (..., C) with the channels of the groups dealt out in turn.

  Source: Zhang et al. 2017, "ShuffleNet", https://arxiv.org/abs/1707.01083.
  """
  grouped = x.reshape(*x.shape[:-1], groups, -1)
  return jnp.swapaxes(grouped, -1, -2).reshape(x.shape)
