"""What every backbone shares: its settings, its pool and its head's start."""

from collections.abc import Mapping
from collections.abc import Sequence
import re
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from ijckd_jax.models import layers
from ijckd_jax.models import losses
from ijckd_jax.runtime import config_utils

POOL_PREFIX = 'pool_'  # Of the names of a pool's layers, see Backbone.


class Backbone(nn.Module):
  """A network from images to a map and a pooled representation.

  `__call__(images, *, train)` takes normalised images (B, H, W, C) and returns
  outputs.Features; `head(features.pooled)` are the logits, whatever the
  architecture.

  A `pool` that has parameters (a hidden layer, a layer norm) makes its layers
  in `setup`, as attributes whose names start with `pool_`: by that name they
  are cut out of the backbone's variables, to serve a student that is connected
  before them. `pool` by itself is that of inference, in float32 whatever
  `dtype` is; `__call__` may give it `train` where it has a batch norm.

  A backbone that ends at a stage leaves its loop over the layers where
  `len(stages) == self.num_stages`, before it builds the next stage, and builds
  the layers after its last stage only if it is not `truncated`.

  Attributes:
    tap: the map that the backbone ends at, without the layers after it. 'final'
      is the whole backbone, 'stage' ends at the last stage, and 'stageN' ends
      at `stages[N]`: N counts from 0, which is the stem, or the first stage of
      a backbone whose stem is no stage of its own. At a stage, `final` is
      `stages[-1]`, `pooled` is its plain average, and there are no `pool_`
      layers.
    axis_name: mapped axis over which batch norm is synchronised, or None.
    dtype: dtype of the computation; parameters stay float32.
    unbiased_variance: see layers.BatchNorm.
    freeze_statistics: batch norm is in training what it is in inference: it
      keeps its running statistics, and normalises by them.
    drop_path: stochastic depth; see `drop_branch`. Of a backbone without
      `has_branches` it must be 0.
  """

  tap: str = 'final'
  axis_name: str | None = None
  dtype: Any = jnp.float32
  unbiased_variance: bool = False
  drop_path: float = 0.0
  freeze_statistics: bool = False

  has_branches = False  # Whether it calls `drop_branch`.
  usual_size = 32  # Side of the square images that it was made for.
  torch_head = 'fc'  # The head's name in the published PyTorch network.
  kernel_init = staticmethod(layers.KAIMING_FAN_OUT)  # Of convolutions.

  @property
  def truncated(self) -> bool:
    """Whether the backbone ends at a stage, without the layers after it."""
    return self.tap != 'final'

  @property
  def num_stages(self) -> int | None:
    """Number of stages that are built; None for all of them."""
    found = re.fullmatch('stage(0|[1-9][0-9]?)', self.tap)
    return found and int(found[1]) + 1

  def check_tap(self, stages: Sequence[Any]) -> None:
    """Raises UserError unless the backbone ends where `tap` says.

    Args:
      stages: its Features.stages, or their shapes.
    """
    known = [f'stage{number}' for number in range(len(stages))]
    known += ['final', 'stage']
    if self.tap not in known:
      raise config_utils.unknown('tap', self.tap, known)
    if self.num_stages not in (None, len(stages)):
      raise config_utils.UserError(
        f'a {type(self).__name__} does not end at {self.tap}, but goes on to '
        f'stage{len(stages) - 1}: its __call__ must build no more stages where '
        'len(stages) == self.num_stages'
      )

  @property
  def momentum(self) -> float:
    """What batch norm keeps of its running statistics at a step."""
    return 0.9

  @property
  def pools_map(self) -> bool:
    """Whether `pooled` is a function of `final`."""
    return True

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
    return jnp.mean(losses.at_least_float32(final), axis=(1, 2))

  def pool_name(self, name: str) -> str:
    """Returns by which name a bundle finds its pool again.

    Args:
      name: the backbone's.
    """
    return name

  def pool_variables(self, variables: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the pool's share of its 'params' and 'batch_stats'."""
    share = {
      kind: {k: v for k, v in tree.items() if k.startswith(POOL_PREFIX)}
      for kind, tree in variables.items()
    }
    return {kind: tree for kind, tree in share.items() if tree}

  @property
  def programs(self) -> dict[str, Any]:
    """The programs.Program that it runs, by name; of most backbones none."""
    return {}

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

  def torch_name(self, layer: str) -> str:
    """Returns a layer's name in the published PyTorch network.

    Layers are called as there, with '_' for '.', unless a backbone says
    otherwise.
    """
    return layer.replace('_', '.')

  def torch_key(self, key: str) -> str:
    """Returns the published name of an entry of another author's state dict."""
    return key

  def fit_to_size(
    self, params: Mapping[str, Any], old: tuple[int, int], new: tuple[int, int]
  ) -> Mapping[str, Any]:
    """Returns a backbone's 'params' for images of another size.

    Args:
      params: of the same backbone; the same object is returned where nothing
        depends on the size.
      old: (H, W) of the images that they are for.
      new: (H, W) of the images to come.
    """
    del old, new  # Most backbones have none that depend on the size.
    return params

  def drop_branch(
    self, branch: jax.Array, position: float, train: bool
  ) -> jax.Array:
    """Returns a residual branch, in training without that of some images.

    A branch is dropped with probability `drop_path * position`, and is scaled
    up where it is kept, so that its mean is that of inference.

    Args:
      branch: what is added to the shortcut, (B, ...).
      position: of the block, from 0 for the first to 1 for the last one.
      train: whether branches are dropped at all.

    Source: Huang et al. 2016, "Deep Networks with Stochastic Depth",
    https://arxiv.org/abs/1603.09382.
    """
    kept = 1 - self.drop_path * position
    if not train or kept == 1:
      return branch
    shape = (len(branch),) + (1,) * (branch.ndim - 1)
    mask = jax.random.bernoulli(self.make_rng('dropout'), kept, shape)
    return branch * (mask / kept).astype(branch.dtype)

  def stages_of_layers(
    self, images: jax.Array | jax.ShapeDtypeStruct
  ) -> dict[str, int]:
    """Returns the number of the first stage that needs each layer.

    Layers after the last stage have the number that a further stage would have.

    Args:
      images: normalised (B, H, W, C), or their shapes.

    Returns:
      A number for each key of the backbone's 'params'.
    """

    def shapes(backbone: 'Backbone') -> Any:
      key = jax.random.key(0)
      return jax.eval_shape(
        lambda x: backbone.init_with_output(key, x, train=False), images
      )

    features, variables = shapes(self)
    num_stages = len(features.stages)
    found = dict.fromkeys(variables['params'], num_stages)
    for number in reversed(range(num_stages)):
      _, variables = shapes(self.clone(tap=f'stage{number}'))
      found |= dict.fromkeys(variables['params'], number)
    return found

  def conv(
    self, features: int, kernel: int, stride: int = 1, **kwargs: Any
  ) -> nn.Conv:
    """Returns a convolution, see layers.conv."""
    kwargs = {'kernel_init': self.kernel_init, **kwargs}
    return layers.conv(features, kernel, stride, dtype=self.dtype, **kwargs)

  def follows(self, train: bool) -> bool:
    """Returns whether batch norm follows the batch's statistics."""
    return train and not self.freeze_statistics

  def norm(self, train: bool | None, **kwargs: Any) -> layers.BatchNorm:
    """Returns a batch norm, see layers.BatchNorm.

    Args:
      train: whether the backbone is trained; None: the call of the batch norm
        says whether it uses running statistics.
      **kwargs: fields of the batch norm.
    """
    return layers.BatchNorm(
      **{
        'use_running_average': None
        if train is None
        else not self.follows(train),
        'momentum': self.momentum,
        'axis_name': self.axis_name,
        'dtype': self.dtype,
        'unbiased': self.unbiased_variance,
        **kwargs,
      }
    )


class TimmBackbone(Backbone):
  """A backbone whose layers are called as in timm, with '__' for '.'."""

  usual_size: int = 224

  def torch_name(self, layer: str) -> str:
    return layer.removeprefix('pool_').replace('__', '.')

  def depthwise(
    self, x: jax.Array, kernel: int, stride: int = 1, **kwargs: Any
  ) -> jax.Array:
    """Applies a convolution to each channel by itself.

    Its start counts one channel's window as the fan-out, as in timm.
    """
    channels = x.shape[-1]
    init = nn.initializers.variance_scaling(2.0, 'fan_in', 'normal')
    kwargs = {'kernel_init': init, 'feature_group_count': channels, **kwargs}
    return self.conv(channels, kernel, stride, **kwargs)(x)


def normal_head(
  key: jax.Array, num_features: int, num_classes: int, std: float = 0.01
) -> dict[str, jax.Array]:
  """Returns a fresh head, N(0, std^2) without bias; see Backbone.init_head."""
  return {
    'kernel': std * jax.random.normal(key, (num_features, num_classes)),
    'bias': jnp.zeros(num_classes),
  }


def uniform_head(
  key: jax.Array, num_features: int, num_classes: int
) -> dict[str, jax.Array]:
  """Returns a fresh head, U(+-1/sqrt(K)) and zeros; see Backbone.init_head.

  That is how timm starts EfficientNets and MobileNets.
  """
  bound, shape = num_classes**-0.5, (num_features, num_classes)
  return {
    'kernel': jax.random.uniform(key, shape, minval=-bound, maxval=bound),
    'bias': jnp.zeros(num_classes),
  }
