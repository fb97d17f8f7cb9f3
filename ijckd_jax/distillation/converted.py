"""Classifiers that were converted to programs, such as those from PyTorch."""

import dataclasses
from typing import Any

from flax import core
import jax
import jax.numpy as jnp

from ijckd_jax.data import augment
from ijckd_jax.distillation import network as network_lib
from ijckd_jax.models import losses
from ijckd_jax.models import outputs
from ijckd_jax.models import programs as programs_lib

FEATURES = 'features_'  # Of the names of programs, before the dtype.


@dataclasses.dataclass(frozen=True)
class Converted:
  """A classifier in inference; used as network.Network is, but not trained.

  Variables are `{'params': {'backbone', 'head'}, 'batch_stats': {'backbone'},
  'pool'}`, with the names that arrays have in the original.

  Attributes:
    features: programs by dtype, from preprocessed images (B, H, W, C) float32
      to the map; or to the map and `pooled`, where that does not follow from
      the map.
    pool: as in network.Network.
    preprocessing: as there.
    signed: whether the map can be negative.
    pooled_signed: whether `pooled` can be.
    pools_map: whether `pooled` is `pool` of the map.
    buffers: names of the arrays that are no parameters.
    dtype: of the computation, one for which there is a program.
  """

  features: core.FrozenDict[str, programs_lib.Program]
  pool: Any
  preprocessing: augment.Preprocessing
  signed: bool
  pooled_signed: bool
  pools_map: bool
  buffers: tuple[str, ...]
  dtype: Any = jnp.float32

  connector = None

  def __call__(self, variables, images: jax.Array) -> outputs.Outputs:
    """Returns the Outputs of preprocessed images."""
    parts = network_lib.part(variables, 'backbone')
    arrays = {**parts['params'], **parts['batch_stats']}
    result = self._program(arrays, images)
    if self.pools_map:
      final, pooled = result, self.pool(variables['pool'], result)
    else:
      final, pooled = result
      pooled = losses.at_least_float32(pooled)
    logits = network_lib.classify(variables['params']['head'], pooled)
    return outputs.Outputs((final,), final, pooled, logits)

  @property
  def _program(self) -> programs_lib.Program:
    return self.features[jnp.dtype(self.dtype).name]

  @property
  def programs(self) -> dict[str, programs_lib.Program]:
    """Its programs by name, as a bundle keeps them."""
    found = {f'{FEATURES}{dtype}': p for dtype, p in self.features.items()}
    return {**found, **programs_lib.of_pool(self.pool)}

  def shapes(self, num_classes: int) -> dict[str, Any]:
    """Returns the shapes of its variables with a head of so many classes."""
    arrays = self._program.arrays
    kinds = {'params': {}, 'batch_stats': {}}
    for name, shape in arrays.items():
      kinds['batch_stats' if name in self.buffers else 'params'][name] = shape
    made = {kind: {'backbone': arrays} for kind, arrays in kinds.items()}
    made['pool'] = {}
    if isinstance(self.pool, programs_lib.Pool):
      made['pool'] = self.pool.shapes
      (width,) = self.pool.program.gives
    elif self.pools_map:
      width = self._program.gives[-1]
    else:
      (width,) = self._program.gives[1]
    made['params']['head'] = network_lib.head_shapes(width, num_classes)
    return made
