"""Safetensors files: the folded weights by name, and how to put them together.

The names are those of a bundle. Where a batch norm was folded its arrays are
missing, and the convolution before it has a bias. The metadata's 'network' is
what `bundle.json` says.
"""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy

from ijckd_jax.bundles import bundles
from ijckd_jax.deploy import deployed as deployed_lib
from ijckd_jax.runtime import config_utils
from ijckd_jax.runtime import disk

NETWORK, UNREAD = 'network', 'unread'


def encode(
  bundle: bundles.Bundle,
  deployed: deployed_lib.Deployed,
  *,
  half: bool = False,
) -> bytes:
  """Returns the arrays of a bundle's function, with what they belong to.

  Args:
    bundle: that the function was made of.
    deployed: the function.
    half: whether the weights are stored in half precision.

  Raises:
    config_utils.UserError: the network is a program.
  """
  if bundle.network.programs:
    raise config_utils.UserError(
      'the network, or its pool, is a program, which is more than arrays: '
      'export with --format stablehlo'
    )
  arrays = {
    name: deployed_lib.halved(name, x) if half else x
    for name, x in deployed.arrays.items()
  }
  # Of the network that the arrays belong to now.
  spec = dataclasses.replace(bundle, network=deployed.network).spec()
  unread = {name: list(x.shape) for name, x in deployed.unread.items()}
  metadata = {
    **deployed.metadata,
    # What it says of its making is in the metadata already, less its paths.
    NETWORK: json.dumps({**spec, 'info': {}}),
    UNREAD: json.dumps(unread),
  }
  return safetensors.numpy.save(
    {name: np.asarray(x, order='C') for name, x in arrays.items()}, metadata
  )


def decode(
  data: bytes, what: str, *, trust_code: bool = False
) -> deployed_lib.Deployed:
  """Returns the function in a file.

  Args:
    data: the file's content.
    what: the file, for messages.
    trust_code: see bundles.load.

  Raises:
    config_utils.UserError: it is no such file, or damaged.
  """
  with config_utils.blame(f'{what} is no file that ijckd export wrote'):
    arrays = safetensors.numpy.load(data)
    metadata = disk.safetensors_metadata(data)
    spec, unread = (json.loads(metadata[key]) for key in (NETWORK, UNREAD))
    takes = metadata['takes']
  network, _ = bundles.build(
    spec, what, dtype=jnp.float32, trust_code=trust_code
  )
  return deployed_lib.Deployed(
    network=network,
    arrays={name: x.astype(np.float32) for name, x in arrays.items()},
    unread={
      name: jax.ShapeDtypeStruct(tuple(shape), jnp.float32)
      for name, shape in unread.items()
    },
    image_shape=tuple(spec['image_shape']),
    class_names=tuple(spec['class_names']),
    takes=takes,
    metadata=metadata,
  )


class Session:
  """A file's function, run by JAX.

  Attributes:
    metadata: texts by name.
    takes: the images' dtype.
    image_shape: (H, W, C).
  """

  def __init__(self, data: bytes, what: str, *, trust_code: bool = False):
    """Loads a file; for the arguments and errors see `decode`."""
    found = decode(data, what, trust_code=trust_code)
    self.metadata, self.takes = dict(found.metadata), found.takes
    self.image_shape = found.image_shape
    self._call, self._arrays = jax.jit(found), found.arrays
    with config_utils.blame(f'the arrays in {what} do not fit together'):
      jax.eval_shape(found, found.arrays, found.shape(1))

  def __call__(self, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns logits and probabilities, (B, K) float32 each."""
    return jax.device_get(self._call(self._arrays, images))
