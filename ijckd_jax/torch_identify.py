"""Whose state dict is it: the backbones here against names and shapes."""

import dataclasses

import jax
import numpy as np

from ijckd_jax import augment
from ijckd_jax import config_utils
from ijckd_jax import models
from ijckd_jax import network as network_lib
from ijckd_jax import torch_names


@dataclasses.dataclass(frozen=True)
class PublishedState:
  """A state dict as that of a backbone.

  Attributes:
    name: of the backbone.
    arrays: under the published names.
    names: those that the backbone has.
    num_channels: of the images.
  """

  name: str
  arrays: dict[str, np.ndarray]
  names: torch_names.Names
  num_channels: int

  @property
  def differences(self) -> str:
    """How the arrays are not those of the backbone; '' if they are."""
    return differences_of(self.arrays, self.names)

  @property
  def likeness(self) -> float:
    """The part of all arrays that both have."""
    common = sum(
      name in self.arrays and self.arrays[name].shape == entry.shape
      for name, entry in self.names.items()
    )
    return common / len(self.names.keys() | self.arrays.keys())


def identify(arrays, wanted: str, size) -> PublishedState:
  """Returns whose state dict it is.

  Args:
    arrays: the state dict, without counters.
    wanted: name of the backbone that it should be; '' if that is not known.
    size: (H, W) of the network's input; None for what is usual.

  Raises:
    config_utils.UserError: it is none, or another than `wanted`.
  """
  reason, nearest = '', None
  if wanted:
    found = _as_backbone(wanted, arrays, size)
    if not found.differences:
      return found
    reason = f'the file is no {wanted}: {found.differences}; '
  for name in models.BACKBONES:
    if f'{models.build(name).torch_head}.weight' not in arrays:
      continue
    found = _as_backbone(name, arrays, size)
    if not found.differences and wanted:
      raise config_utils.UserError(
        f'{reason}it is a {name}: say --backbone {name}'
      )
    if not found.differences:
      return found
    if nearest is None or found.likeness > nearest.likeness:
      nearest = found
  if nearest is None:
    raise config_utils.UserError(
      f'{reason}it is like no backbone that is known here: its arrays are '
      f'{some(arrays)}'
    )
  but = '' if nearest.name == wanted else f', but {nearest.differences}'
  raise config_utils.UserError(
    f'{reason}it is of no backbone that is known here; nearest is '
    f'{nearest.name}{but}'
  )


def _as_backbone(name, arrays, size) -> PublishedState:
  """Returns a state dict as that of a backbone, which it need not fit."""
  backbone = models.build(name)
  size = size or 2 * (backbone.usual_size,)
  arrays = {backbone.torch_key(key): array for key, array in arrays.items()}
  head = arrays.get(f'{backbone.torch_head}.weight')
  num_classes = len(head) if head is not None and head.ndim == 2 else 1

  def names_for(num_channels):
    network = network_lib.Network(
      backbone,
      augment.Preprocessing(num_channels * (0.0,), num_channels * (1.0,), size),
      None,
      None,
      network_lib.pool_of(backbone),
    )
    shapes = jax.eval_shape(
      lambda: network.init(
        jax.random.key(0), (*size, num_channels), num_classes
      )
    )
    return torch_names.names_of(network, shapes)

  names, num_channels = names_for(3), 3
  # No other convolution has as few inputs and is not depthwise.
  stems = [name for name, e in names.items() if e.shape[1:2] == (3,)]
  found = arrays.get(stems[0]) if stems else None
  if found is not None and found.ndim == 4 and found.shape[1] not in (0, 3):
    num_channels = found.shape[1]
    names = names_for(num_channels)
  return PublishedState(name, arrays, names, num_channels)


def some(names) -> str:
  """Returns the first of many names."""
  names = list(names)
  more = f' and {len(names) - 3} more' if len(names) > 3 else ''
  return ', '.join(names[:3]) + more


def differences_of(arrays, names: torch_names.Names) -> str:
  """Returns how a state dict differs from what is wanted; '' if it does not."""
  missing = [name for name in names if name not in arrays]
  foreign = [name for name in arrays if name not in names]
  other = [
    f'{name} {list(arrays[name].shape)} for {list(entry.shape)}'
    for name, entry in names.items()
    if name in arrays and arrays[name].shape != entry.shape
  ]
  return '; '.join(
    f'{len(found)} {what} ({some(found)})'
    for found, what in (
      (missing, 'of its arrays are missing'),
      (foreign, 'arrays are not its own'),
      (other, 'arrays have other shapes'),
    )
    if found
  )
