"""A backbone: three strided convolutions."""

import flax.linen as nn

import ijckd_jax


class PlainNet(ijckd_jax.Backbone):
  """Channels double as the map halves."""

  width: int = 8

  @nn.compact
  def __call__(self, images, *, train):
    x, stages = images, []
    for stage in range(3):
      if len(stages) == self.num_stages:  # It ends at its tap.
        break
      x = self.conv(self.width * 2**stage, 3, stride=2 if stage else 1)(x)
      x = nn.relu(self.norm(train)(x))
      stages.append(x)
    return ijckd_jax.Features(tuple(stages), x, self.pool(x))
