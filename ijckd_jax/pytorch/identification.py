"""Whose state dict is it: the backbones here against names and shapes."""

import contextlib
import dataclasses
import functools
import shlex

import jax
import numpy as np

from ijckd_jax import models
from ijckd_jax.data import augment
from ijckd_jax.distillation import network as network_lib
from ijckd_jax.pytorch import published_names
from ijckd_jax.runtime import config_utils


@dataclasses.dataclass(frozen=True)
class PublishedState:
  """A state dict as that of a backbone.

  Attributes:
    name: of the backbone.
    arrays: under the published names.
    names: those that the backbone has.
    num_channels: of the images.
    prefix: what stood before the published names.
    left_out: names without that prefix, which are not of the backbone.
  """

  name: str
  arrays: dict[str, np.ndarray]
  names: published_names.Names
  num_channels: int
  prefix: str = ''
  left_out: tuple[str, ...] = ()

  @property
  def differences(self) -> str:
    """How the arrays are not those of the backbone; '' if they are."""
    return differences_of(self.arrays, self.names)

  @property
  def num_fitting(self) -> int:
    """How many of the backbone's arrays are there."""
    return sum(
      name in self.arrays and self.arrays[name].shape == entry.shape
      for name, entry in self.names.items()
    )

  @property
  def likeness(self) -> float:
    """The part of all arrays that both have."""
    return self.num_fitting / len(self.names.keys() | self.arrays.keys())

  def describe(self) -> str:
    """Returns how many arrays fit, and how the others differ."""
    under = f' under {self.prefix}*' if self.prefix else ''
    return (
      f'{self.num_fitting} of its {len(self.names)} arrays fit{under}, but '
      f'{self.differences}'
    )


def identify(arrays, wanted: str, size) -> PublishedState:
  """Returns whose state dict it is.

  Where all names of a backbone follow one prefix, such as 'model.' or
  'encoder.', arrays with other names may be beside them, and are left out.

  Args:
    arrays: the state dict, without counters.
    wanted: name of the backbone that it should be; '' if that is not known.
    size: (H, W) of the network's input; None for what is usual.

  Raises:
    config_utils.UserError: it is none, or another than `wanted`, or there are
      several.
  """
  reason, nearest = '', None
  if wanted:
    prefixes = _prefixes(arrays, wanted) or _any_prefixes(arrays)
    found = _likest(wanted, arrays, size, prefixes)
    if not found.differences:
      return found
    reason = f'the file is no {wanted}: {found.differences}; '
  for name in models.BACKBONES:
    prefixes = _prefixes(arrays, name)
    if not prefixes:
      continue
    found = _likest(name, arrays, size, prefixes)
    if not found.differences and wanted:
      raise config_utils.UserError(
        f'{reason}it is a {name}: say --backbone {name}'
      )
    if not found.differences:
      _check_alone(found)
      return found
    nearest = _nearer(nearest, found)
  if nearest is None:
    # Without a classifier, as after self-supervised training.
    for name in models.BACKBONES:
      # One that cannot have images of that size is none of those asked for.
      with contextlib.suppress(config_utils.UserError):
        found = _likest(name, arrays, size, _any_prefixes(arrays))
        nearest = _nearer(nearest, found)
  if nearest is None or not nearest.num_fitting:
    raise config_utils.UserError(
      f'{reason}it is like no backbone that is known here: its arrays are '
      f'{some(arrays)}'
    )
  but = '' if nearest.name == wanted else f', {nearest.describe()}'
  raise config_utils.UserError(
    f'{reason}it is of no backbone that is known here; nearest is '
    f'{nearest.name}{but}'
  )


def _check_alone(found: PublishedState) -> None:
  """Raises UserError where another backbone is the same network."""
  backbone = models.build(found.name)
  alike = [name for name in models.BACKBONES if models.build(name) == backbone]
  if len(alike) > 1:
    raise config_utils.UserError(
      f'it is a {" or a ".join(alike)}, which are one network for images that '
      'are prepared in different ways: say --backbone NAME'
    )


def _nearer(found, other):
  """Returns which of two is more like its backbone; `found` may be None."""
  if found is None or other.likeness > found.likeness:
    return other
  return found


def _prefixes(arrays, name):
  """Returns what stands before the name of a backbone's classifier."""
  backbone = models.build(name)
  head = f'{backbone.torch_head}.weight'
  found = [
    array.removesuffix(head)
    for array in arrays
    if array == head or array.endswith(f'.{head}')
  ]
  is_renamed = any(backbone.torch_key(array) == head for array in arrays)
  return found or ([''] if is_renamed else [])


def _any_prefixes(arrays):
  """Returns what stands before the names of half of all arrays, or more."""
  counts = {'': len(arrays)}
  for array in arrays:
    words = array.split('.')
    for end in range(1, len(words)):
      prefix = '.'.join(words[:end]) + '.'
      counts[prefix] = counts.get(prefix, 0) + 1
  return [name for name, count in counts.items() if 2 * count >= len(arrays)]


def _likest(name, arrays, size, prefixes) -> PublishedState:
  """Returns a state dict as that of a backbone, under the prefix that fits.

  Raises:
    config_utils.UserError: several fit.
  """
  found = [_as_backbone(name, arrays, size, prefix) for prefix in prefixes]
  fitting = [state.prefix for state in found if not state.differences]
  if len(fitting) > 1:
    there = ', '.join(f'{prefix}*' for prefix in fitting)
    part = shlex.quote(fitting[0].rstrip('.'))
    raise config_utils.UserError(
      f'it holds several of {name}, {there}: --part {part} takes the first'
    )
  return functools.reduce(_nearer, found)


@functools.lru_cache(maxsize=128)
def _names(name, size, num_channels, num_classes) -> published_names.Names:
  """Returns the published names of a backbone."""
  network = network_lib.Network(
    models.build(name),
    augment.Preprocessing(num_channels * (0.0,), num_channels * (1.0,), size),
    None,
    None,
    network_lib.pool_of(models.build(name)),
  )
  shapes = jax.eval_shape(
    lambda: network.init(jax.random.key(0), (*size, num_channels), num_classes)
  )
  return published_names.names_of(network, shapes)


def _as_backbone(name, arrays, size, prefix='') -> PublishedState:
  """Returns a state dict as that of a backbone, which it need not fit."""
  backbone = models.build(name)
  size = tuple(size or 2 * (backbone.usual_size,))
  left_out = tuple(key for key in arrays if not key.startswith(prefix))
  arrays = {
    backbone.torch_key(key.removeprefix(prefix)): array
    for key, array in arrays.items()
    if key.startswith(prefix)
  }
  head = arrays.get(f'{backbone.torch_head}.weight')
  num_classes = len(head) if head is not None and head.ndim == 2 else 1
  num_channels = 3
  names = _names(name, size, num_channels, num_classes)
  # No other convolution has as few inputs and is not depthwise.
  stems = [name for name, e in names.items() if e.shape[1:2] == (3,)]
  found = arrays.get(stems[0]) if stems else None
  if found is not None and found.ndim == 4 and found.shape[1] not in (0, 3):
    num_channels = found.shape[1]
    names = _names(name, size, num_channels, num_classes)
  return PublishedState(name, arrays, names, num_channels, prefix, left_out)


def some(names) -> str:
  """Returns the first of many names."""
  names = list(names)
  more = f' and {len(names) - 3} more' if len(names) > 3 else ''
  return ', '.join(names[:3]) + more


def differences_of(arrays, names: published_names.Names) -> str:
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
