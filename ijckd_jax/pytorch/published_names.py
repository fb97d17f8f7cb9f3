"""What a network's arrays are called in PyTorch, and how they lie there.

A backbone says what its layers are called (`torch_name`), so one list of names
serves both directions: import takes all of its entries and no other, export
writes them.
"""

import dataclasses
import json

from flax import traverse_util
import numpy as np

from ijckd_jax import models
from ijckd_jax.bundles import bundles
from ijckd_jax.distillation import network as network_lib
from ijckd_jax.models import converted
from ijckd_jax.pytorch import student_source
from ijckd_jax.runtime import config_utils

# By this key an exported file's metadata say what `bundle.json` says.
SPEC_KEY = 'ijckd_jax'
COUNTER = 'num_batches_tracked'
LEAVES = {
  'kernel': 'weight',
  'scale': 'weight',
  'mean': 'running_mean',
  'var': 'running_var',
}
# From Flax's axes to PyTorch's, of kernels: HWIO to OIHW, (in, out) to its
# transpose.
AXES = {4: (3, 2, 0, 1), 2: (1, 0)}


@dataclasses.dataclass(frozen=True)
class Entry:
  """Where an array of a state dict lies in a network's variables.

  Attributes:
    path: keys from the variables down to the array.
    axes: permutation from Flax's axes to PyTorch's; () for none.
    shape: PyTorch's.
  """

  path: tuple[str, ...]
  axes: tuple[int, ...]
  shape: tuple[int, ...]

  def to_torch(self, array) -> np.ndarray:
    """Returns the array with PyTorch's axes."""
    return np.transpose(array, self.axes) if self.axes else np.asarray(array)

  def to_flax(self, array) -> np.ndarray:
    """Returns the array with Flax's axes."""
    if self.axes:
      array = np.transpose(array, np.argsort(self.axes))
    return np.ascontiguousarray(array)


Names = dict[str, Entry]


def _module_names(variables, torch_name, *, above=(), prefix='') -> Names:
  """Returns the names of one module's arrays.

  Args:
    variables: its collections, of arrays or shapes.
    torch_name: from a layer's name to PyTorch's.
    above: keys of the network's variables that lead to the module, put between
      collection and layer; a '*' stands for the collection.
    prefix: put before each name.
  """
  names = {}
  for kind in network_lib.COLLECTIONS:
    flat = traverse_util.flatten_dict(variables.get(kind, {}))
    for (*layer, leaf), array in flat.items():
      name = torch_name('_'.join(layer)) if layer else torch_name(leaf)
      if layer:
        name = f'{name}.{LEAVES.get(leaf, leaf)}'
      axes = AXES.get(len(array.shape), ()) if leaf == 'kernel' else ()
      shape = tuple(array.shape[axis] for axis in axes) or tuple(array.shape)
      path = tuple(kind if key == '*' else key for key in above)
      names[prefix + name] = Entry((*path, *layer, leaf), axes, shape)
  return names


def names_of(
  network: network_lib.Network, variables, pool_name: str = 'average'
) -> Names:
  """Returns where each entry of a network's state dict lies in its variables.

  A network without a connector has the published names. One with a connector
  has 'backbone.' before those, 'connector.', 'pool.' and 'head.'.

  Args:
    network: the network.
    variables: its arrays or their shapes.
    pool_name: as bundles.Bundle has it.

  Raises:
    config_utils.UserError: a connector or pool is none of this package.
  """
  connected = network.connector is not None
  backbone = network.backbone
  names = _module_names(
    network_lib.part(variables, 'backbone'),
    backbone.torch_name,
    above=('*', 'backbone'),
    prefix='backbone.' if connected else '',
  )
  if connected:
    names |= _module_names(
      network_lib.part(variables, 'connector'),
      student_source.connector_name(network.connector).__getitem__,
      above=('*', 'connector'),
      prefix='connector.',
    )
    names |= _module_names(
      variables['pool'],
      student_source.pool_name(pool_backbone(pool_name)).__getitem__,
      above=('pool', '*'),
      prefix='pool.',
    )
  head = 'head' if connected else backbone.torch_head
  kernel = variables['params']['head']['kernel']
  names[f'{head}.weight'] = Entry(
    ('params', 'head', 'kernel'), (1, 0), tuple(kernel.shape[::-1])
  )
  names[f'{head}.bias'] = Entry(
    ('params', 'head', 'bias'), (), (kernel.shape[1],)
  )
  return names


def pool_backbone(name: str) -> models.Backbone | None:
  """Returns the backbone whose pool a name means; None for the average."""
  return None if name == 'average' else models.build(name)


def state_dict(bundle: bundles.Bundle) -> dict[str, np.ndarray]:
  """Returns a network's arrays as PyTorch's state dict holds them.

  Raises:
    config_utils.UserError: it has no head.
  """
  bundle.check_head('the bundle')
  if bundle.network.programs:
    return _of_converted(bundle)
  flat = traverse_util.flatten_dict(bundle.variables)
  state = {}
  names = names_of(bundle.network, bundle.variables, bundle.pool_name)
  for name, entry in names.items():
    state[name] = np.ascontiguousarray(entry.to_torch(flat[entry.path]))
    if name.endswith('.running_var'):
      counter = f'{name.rpartition(".")[0]}.{COUNTER}'
      state[counter] = np.zeros((), np.int64)
  return state


def _of_converted(bundle) -> dict[str, np.ndarray]:
  """Returns the arrays of a converted network by their names in PyTorch."""
  head = bundle.variables['params']['head']
  name = bundle.info.get('origin', {}).get('head')
  is_alone = bundle.network.connector is None
  is_alone &= isinstance(bundle.network.backbone, converted.Converted)
  if not (is_alone and isinstance(name, str)):
    raise config_utils.UserError(
      'it cannot be written for PyTorch: what is a program, its pool or its '
      'network, is no torch.nn.Module any more. A converted network without a '
      'connector, whose head is one linear layer, can be written as weights of '
      'the module that it was'
    )
  parts = network_lib.part(bundle.variables, 'backbone')
  return {
    **{k: x for tree in parts.values() for k, x in tree.items()},
    f'{name}.weight': np.ascontiguousarray(head['kernel'].T),
    f'{name}.bias': head['bias'],
  }


def metadata(bundle: bundles.Bundle) -> dict[str, str]:
  """Returns what an exported file says beside its arrays."""
  return {SPEC_KEY: json.dumps(bundle.spec())}


def module_source(bundle: bundles.Bundle, suffix: str = '.safetensors') -> str:
  """Returns the text of a PyTorch module that runs a connected student.

  Args:
    bundle: of the student.
    suffix: of the file with its arrays, which the text says how to load.

  Raises:
    config_utils.UserError: it has a part that cannot be written.
  """
  return student_source.source(
    bundle.network,
    backbone_name=bundle.backbone_name,
    pool_backbone=pool_backbone(bundle.pool_name),
    image_shape=bundle.image_shape,
    num_classes=len(bundle.class_names),
    suffix=suffix,
  )
