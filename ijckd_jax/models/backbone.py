"""What every backbone shares: its settings, its pool and its head's start."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

KAIMING_FAN_OUT = nn.initializers.variance_scaling(2.0, 'fan_out', 'normal')


class Backbone(nn.Module):
  """A network from images to a map and a pooled representation.

  `__call__(images, *, train)` takes normalised images (B, H, W, C) and returns
  outputs.Features; `head(features.pooled)` are the logits, whatever the
  architecture.

  A `pool` that has parameters (a hidden layer, a layer norm) makes its layers
  in `setup`, as attributes whose names start with 'pool_': by that name they
  are cut out of the backbone's variables, to serve a student that is connected
  before them. It computes what it does in inference, in training as well, and
  in float32 whatever `dtype` is.

  Attributes:
    truncated: end at the last stage, without the layers between it and the
      pool: `final` is then `stages[-1]`, `pooled` is its plain average, and
      there are no 'pool_' layers.
    axis_name: mapped axis over which batch norm is synchronised, or None.
    dtype: dtype of the computation; parameters stay float32.
  """

  truncated: bool = False
  axis_name: str | None = None
  dtype: Any = jnp.float32

  pools_map = True  # `pooled` is a function of `final`.

  @property
  def signed(self) -> bool:
    """Whether `final` can be negative."""
    return False

  @property
  def pooled_signed(self) -> bool:
    """Whether `pooled` can be negative."""
    return self.signed

  def pool(self, final: jax.Array) -> jax.Array:
    """Returns `pooled` (B, D) float32 of `final`: here its global average."""
    return jnp.mean(final.astype(jnp.float32), axis=(1, 2))

  def init_head(
    self, key: jax.Array, num_features: int, num_classes: int
  ) -> dict[str, jax.Array]:
    """Returns a fresh head, uniform in +-1/sqrt(D) as PyTorch's linear layer.

    Args:
      key: random key.
      num_features: D.
      num_classes: K.

    Returns:
      'kernel' (D, K) and 'bias' (K,), float32.
    """
    bound = 1 / np.sqrt(num_features)
    kernel_key, bias_key = jax.random.split(key)
    return {
      'kernel': jax.random.uniform(
        kernel_key, (num_features, num_classes), minval=-bound, maxval=bound
      ),
      'bias': jax.random.uniform(
        bias_key, (num_classes,), minval=-bound, maxval=bound
      ),
    }

  def conv(self, features: int, kernel: int, stride: int = 1, **kwargs):
    """Returns a convolution padded as PyTorch pads it.

    'SAME' puts the padding of a strided convolution elsewhere.
    """
    return nn.Conv(
      features,
      (kernel, kernel),
      strides=stride,
      padding=(kernel - 1) // 2,
      use_bias=False,
      kernel_init=KAIMING_FAN_OUT,
      dtype=self.dtype,
      **kwargs,
    )

  def norm(self, train: bool, **kwargs):
    """Returns a batch norm with PyTorch's epsilon and momentum."""
    return nn.BatchNorm(
      use_running_average=not train,
      momentum=0.9,
      epsilon=1e-5,
      axis_name=self.axis_name,
      dtype=self.dtype,
      **kwargs,
    )
