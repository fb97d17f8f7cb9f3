"""Backbones that are programs, such as those that were PyTorch's."""

from collections.abc import Mapping
from typing import Any

from flax import core
import flax.linen as nn
import jax
import jax.numpy as jnp

from ijckd_jax.models import backbone
from ijckd_jax.models import losses
from ijckd_jax.models import outputs
from ijckd_jax.models import programs as programs_lib
from ijckd_jax.runtime import config_utils

FEATURES = 'features_'  # Prefix of program names; the dtype follows.
TRAINING = 'training_'


class Converted(backbone.Backbone):
  """A network that was traced, under the names that its arrays had there.

  Programs take their arrays as arguments, and have no rule for how these start:
  a network that is trained starts from a bundle. In training its batch norm
  alone does other things than in inference; nothing is dropped.

  Attributes:
    features: programs by dtype, from normalised images to the map; or to the
      map and `pooled`, where that is no function of the map.
    training: the same in training, which give the running statistics too: after
      the step, the 'mean', and the variance by a 'biased' and an 'unbiased'
      estimate. Empty where there is no batch norm.
    own_pool: program from the map, or its average, to `pooled`; None where that
      is the average, or no function of the map.
    pool_training: program from the map to `pooled` and the running statistics,
      in training; None where the pool has no batch norm.
    buffers: names of the arrays that are no parameters.
    map_is_signed: whether the map can be negative.
    pooled_is_signed: whether `pooled` can be.
    map_is_pooled: whether `pooled` is a function of the map.
  """

  features: Mapping[str, programs_lib.Program] = core.FrozenDict()
  training: Mapping[str, programs_lib.Program] = core.FrozenDict()
  own_pool: programs_lib.Program | None = None
  pool_training: programs_lib.Program | None = None
  buffers: tuple[str, ...] = ()
  map_is_signed: bool = True
  pooled_is_signed: bool = True
  map_is_pooled: bool = True

  @property
  def signed(self):
    return self.map_is_signed

  @property
  def pooled_signed(self):
    return self.map_is_signed if self.truncated else self.pooled_is_signed

  @property
  def pools_map(self):
    return self.truncated or self.map_is_pooled

  @property
  def programs(self) -> dict[str, programs_lib.Program]:
    """Its programs by name, as a bundle keeps them."""
    found = {f'{FEATURES}{dtype}': p for dtype, p in self.features.items()}
    found |= {f'{TRAINING}{dtype}': p for dtype, p in self.training.items()}
    found[programs_lib.OWN_POOL] = self.own_pool
    found[programs_lib.POOL_TRAINING] = self.pool_training
    return {name: program for name, program in found.items() if program}

  @property
  def can_be_trained(self) -> bool:
    """Whether its programs give gradients."""
    return self._of_dtype(self.features).has_gradient

  def check_trains(self, name: str) -> None:
    """Raises UserError where it can be run, but not trained.

    Args:
      name: what the message calls it.
    """
    dtype = jnp.dtype(self.dtype).name
    if dtype not in self.features:
      raise config_utils.UserError(
        f'{name} has programs in {", ".join(self.features)}, none in {dtype}: '
        'set dtype'
      )
    if not self.can_be_trained:
      raise config_utils.UserError(
        f'{name} can teach, but not be trained: its programs give no '
        "gradients. Either 'ijckd convert' said why, or an older version wrote "
        f'them: {programs_lib.CONVERT}'
      )
    if self.freeze_statistics or not (self.training or self.pool_training):
      return
    if self.training and dtype not in self.training:
      raise config_utils.UserError(
        f'{name} can be trained in {", ".join(self.training)} alone: set dtype'
      )
    if self.axis_name is not None:
      raise config_utils.UserError(
        f'{name}: a converted network has the batch statistics of each device: '
        'leave sync_batch_norm=False'
      )

  @property
  def _pool(self) -> programs_lib.Pool | None:
    """Its own pool; None where that is the average, or is not run."""
    if self.truncated or self.own_pool is None:
      return None
    return programs_lib.Pool(self.own_pool)

  def _of_dtype(self, by_dtype):
    return by_dtype[jnp.dtype(self.dtype).name]

  def pool(self, final):
    if self._pool is None:
      return super().pool(final)
    arrays = {
      name: self.get_variable(self._kind(name), name)
      for name in self.own_pool.arrays
    }
    return self._pool({'params': arrays}, final)

  def pool_name(self, name):
    del name  # Its program is found by PROGRAM, since no backbone is built.
    return 'average' if self._pool is None else programs_lib.PROGRAM

  def pool_variables(self, variables):
    if self._pool is None:
      return {}
    arrays = {**variables['params'], **variables['batch_stats']}
    return {'params': {name: arrays[name] for name in self.own_pool.arrays}}

  def stages_of_layers(self, images):
    """Returns 0 for all of its arrays: its layers are not known."""
    del images
    arrays = dict(self._of_dtype(self.features).arrays)
    if self._pool is not None:
      arrays |= self.own_pool.arrays
    return dict.fromkeys(arrays, 0)

  @nn.compact
  def __call__(self, images, *, train: bool):
    """Returns Features, whose one stage is the map.

    Raises:
      config_utils.UserError: in training there is a single image, which may
        have no variance.
    """
    inference = self._of_dtype(self.features)
    arrays = {n: self._array(n, like) for n, like in inference.arrays.items()}
    if self._pool is not None:
      for name, like in self.own_pool.arrays.items():
        if name not in arrays:
          arrays[name] = self._array(name, like)
    follows = self.follows(train)
    if follows and self.training:
      result = self._run_training(self._of_dtype(self.training), arrays, images)
    else:
      result = inference(_select(arrays, inference), images)
    final, pooled = (result, None) if self.map_is_pooled else result
    if self.truncated or pooled is None:
      if follows and self.pool_training and not self.truncated:
        x = losses.at_least_float32(final)
        pooled = self._run_training(self.pool_training, arrays, x)
      else:
        pooled = self.pool(final)
    return outputs.Features((final,), final, losses.at_least_float32(pooled))

  def _run_training(self, step, arrays, x):
    """Returns what a program of training gives; the statistics are updated."""
    if len(x) < 2:
      raise config_utils.UserError(
        'the batch norm of a converted network needs two images or more on '
        'each device: take a larger batch_size, or a smaller accumulation'
      )
    result, statistics = step(_select(arrays, step), x)
    kind = 'unbiased' if self.unbiased_variance else 'biased'
    for name, value in (statistics['mean'] | statistics[kind]).items():
      self.put_variable('batch_stats', name, value)
    return result

  def _kind(self, name: str) -> str:
    return 'batch_stats' if name in self.buffers else 'params'

  def _array(self, name: str, like: Any) -> jax.Array:
    """Returns one of its arrays; a fresh one is zero."""
    if self._kind(name) == 'params':
      return self.param(name, lambda key: jnp.zeros(like.shape, like.dtype))
    return self.variable(
      'batch_stats', name, lambda: jnp.zeros(like.shape, like.dtype)
    ).value


def _select(arrays, program) -> dict[str, jax.Array]:
  """Returns those of the arrays that a program takes."""
  return {name: arrays[name] for name in program.arrays}
