"""A connector: a 1x1 convolution with a gate on each channel."""

import flax.linen as nn

import ijckd_jax


class Gated(ijckd_jax.Connector):
  """The gate looks at the same features."""

  @nn.compact
  def __call__(self, x, *, train):
    gate = nn.sigmoid(self.conv(self.features, use_bias=True)(x))
    return self.last(gate * self.norm(self.conv(self.features)(x), train))
