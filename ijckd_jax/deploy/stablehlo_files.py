"""StableHLO files: programs of jax.export, which any JAX runs.

The weights are inside. What such a file says of itself stands beside it, in
FILE.json, since the format has no room for it.
"""

import jax
from jax import export
import jax.numpy as jnp
import numpy as np

from ijckd_jax.deploy import deployed as deployed_lib
from ijckd_jax.models import programs
from ijckd_jax.runtime import backend
from ijckd_jax.runtime import config_utils


def encode(deployed: deployed_lib.Deployed, *, half: bool = False) -> bytes:
  """Returns a function as a program for CPUs, GPUs and TPUs.

  `jax.export.deserialize(data).call(images)` gives logits and probabilities,
  for any number of images.

  Args:
    deployed: the function.
    half: whether its weights are stored in half precision; it computes in
      float32 all the same.
  """
  arrays = dict(deployed.arrays)
  if half:
    arrays = {k: deployed_lib.halved(k, x) for k, x in arrays.items()}

  def whole(images):
    # Nothing is done to the weights before the barrier: they stay as stored.
    stored = jax.lax.optimization_barrier(
      {k: jnp.asarray(x) for k, x in arrays.items()}
    )
    return deployed(
      {k: x.astype(jnp.float32) for k, x in stored.items()}, images
    )

  (batch,) = export.symbolic_shape('B')
  exported = export.export(jax.jit(whole), platforms=programs.PLATFORMS)(
    deployed.shape(batch)
  )
  return bytes(exported.serialize())


class Session:
  """A program, run by JAX.

  Attributes:
    metadata: texts by name.
    takes: the images' dtype.
    image_shape: (H, W, C).
  """

  def __init__(self, data: bytes, what: str, metadata: dict[str, str]):
    """Loads a program.

    Args:
      data: the file's content, which must be trusted.
      what: the file, for messages.
      metadata: what stands beside it.

    Raises:
      config_utils.UserError: it is no program, or not one of `encode`.
    """
    backend.start()
    with config_utils.blame(f'{what} cannot be read by jax {jax.__version__}'):
      exported = export.deserialize(bytearray(data))
      (images,) = exported.in_avals
    self.metadata, self.takes = metadata, images.dtype.name
    self.image_shape = tuple(images.shape[1:])
    self._call = jax.jit(exported.call)

  def __call__(self, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns logits and probabilities, (B, K) float32 each."""
    return jax.device_get(self._call(images))
