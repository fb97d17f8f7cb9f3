"""A classifier as one function of images, with its batch norm folded in."""

from collections.abc import Mapping
import dataclasses
import importlib.metadata
import json
from typing import Any

from flax import traverse_util
import jax
from jax.interpreters import partial_eval
import jax.numpy as jnp
import numpy as np

from ijckd_jax.bundles import bundles
from ijckd_jax.bundles import model_card
from ijckd_jax.bundles import specification
from ijckd_jax.data import images
from ijckd_jax.distillation import connectors
from ijckd_jax.distillation import network as network_lib
from ijckd_jax.models import folding
from ijckd_jax.runtime import config_utils

# What it takes, by dtype. The rest of the preprocessing is inside in both.
PIXELS = {'uint8': 'from 0 to 255', 'float32': 'from 0 to 1'}


@dataclasses.dataclass(frozen=True, eq=False)
class Deployed:
  """`(arrays, images) -> (logits, probabilities)`, (B, K) float32 each.

  Images are (B, H, W, C) of `image_shape`, with pixels as PIXELS says.

  Attributes:
    network: see there; its batch norm is folded in.
    arrays: float32 by name, those that the function reads.
    unread: shapes by name of the other arrays of the network.
    image_shape: (H, W, C).
    class_names: K names.
    takes: the images' dtype, of PIXELS.
    metadata: what else is known, texts by name; lists and objects as JSON.
  """

  network: Any
  arrays: Mapping[str, np.ndarray]
  unread: Mapping[str, jax.ShapeDtypeStruct]
  image_shape: tuple[int, int, int]
  class_names: tuple[str, ...]
  takes: str
  metadata: Mapping[str, str]

  def __call__(self, arrays, images):
    """Returns logits and probabilities."""
    logits = self.logits(arrays, images)
    return logits, jax.nn.softmax(logits)

  def logits(self, arrays, images: jax.Array) -> jax.Array:
    """Returns the logits alone."""
    # Nothing comes of them, but Linen asks for them.
    missing = {k: jnp.zeros(x.shape, x.dtype) for k, x in self.unread.items()}
    variables = specification.nested({**missing, **arrays})
    if self.takes == 'float32':
      images = images * 255
    x = self.network.preprocessing(images)
    with folding.runs_folded():
      return self.network(variables, x).logits

  def shape(self, batch: Any) -> jax.ShapeDtypeStruct:
    """Returns the shape of a batch of images, whose size may be symbolic."""
    return jax.ShapeDtypeStruct(
      (batch, *self.image_shape), jnp.dtype(self.takes)
    )


def deploy(bundle: bundles.Bundle, *, takes: str = 'uint8') -> Deployed:
  """Returns a bundle's function, without the arrays that it does not read.

  Args:
    bundle: computes in float32.
    takes: a key of PIXELS.

  Raises:
    config_utils.UserError: it has no head.
  """
  bundle.check_head('the bundle')
  network, variables = _folded(
    bundle.network, bundle.variables, bundle.image_shape
  )
  arrays = traverse_util.flatten_dict(variables, sep='/')
  whole = Deployed(
    network=network,
    arrays=arrays,
    unread={},
    image_shape=tuple(bundle.image_shape),
    class_names=tuple(map(str, bundle.class_names)),
    takes=takes,
    metadata=metadata(bundle, takes),
  )
  jaxpr = jax.make_jaxpr(whole.logits)(arrays, whole.shape(1)).jaxpr
  _, is_read = partial_eval.dce_jaxpr(jaxpr, [True])
  names = sorted(arrays)  # As JAX orders the leaves of a dictionary.
  read = {name for name, used in zip(names, is_read, strict=False) if used}
  return dataclasses.replace(
    whole,
    arrays={name: arrays[name] for name in names if name in read},
    unread={
      name: jax.ShapeDtypeStruct(arrays[name].shape, arrays[name].dtype)
      for name in names
      if name not in read
    },
  )


def halved(name: str, array: np.ndarray) -> np.ndarray:
  """Returns a weight in half precision; what is no matrix stays as it is.

  Raises:
    config_utils.UserError: it is too large.
  """
  if array.ndim < 2:
    return array
  with np.errstate(over='ignore'):
    half = array.astype(np.float16)
  if not np.isfinite(half).all():
    raise config_utils.UserError(
      f'{name} has a weight of {np.abs(array).max():.3g}, too large for '
      'float16: export with --weights float32'
    )
  return half


def _folded(network, variables, image_shape):
  """Returns the network and its variables with all that is constant folded."""
  x = jax.ShapeDtypeStruct(
    (1, *network.preprocessing.size, image_shape[2]), jnp.float32
  )
  modules = {'backbone': (network.backbone, x)}
  if network.connector is not None:
    features, _ = jax.eval_shape(
      lambda variables, x: network_lib.run(
        network.backbone, variables, x, train=False
      ),
      network_lib.part(variables, 'backbone'),
      x,
    )
    shape = network.connector_shape(features)
    if isinstance(network.connector, connectors.Orthogonal):
      params = dict(variables['params'])
      connector, params['connector'] = connectors.as_linear(
        network.connector, params['connector'], shape[-1]
      )
      network = dataclasses.replace(network, connector=connector)
      variables = {**variables, 'params': params}
    modules['connector'] = (
      network.connector,
      jax.ShapeDtypeStruct(shape, jnp.float32),
    )
  found = {kind: dict(variables[kind]) for kind in network_lib.COLLECTIONS}
  for name, (module, x) in modules.items():
    part = folding.fold(module, network_lib.part(variables, name), x)
    for kind, tree in part.items():
      found[kind][name] = tree
  return network, {**variables, **found}


def metadata(bundle: bundles.Bundle, takes: str) -> dict[str, str]:
  """Returns what a shipped file says of itself, see Deployed."""
  height, width, channels = bundle.image_shape
  info = dict(bundle.info)
  if 'dataset' in info:  # Where its files lay is nobody's business.
    info['dataset'] = {
      key: x for key, x in info['dataset'].items() if key != 'data_dir'
    }
  said = {
    'description': model_card.describe(bundle),
    'input': (
      f'images (B, {height}, {width}, {channels}) {takes}, pixels '
      f'{PIXELS[takes]}'
    ),
    'takes': takes,
    'image_shape': list(bundle.image_shape),
    'class_names': [str(name) for name in bundle.class_names],
    'crop': dataclasses.asdict(crop_of(bundle)),
    'preprocessing': dataclasses.asdict(bundle.network.preprocessing),
    'backbone': bundle.backbone_name,
    'info': info,
    'ijckd_jax': importlib.metadata.version('ijckd_jax'),
  }
  return {
    key: value if isinstance(value, str) else json.dumps(value, default=float)
    for key, value in said.items()
  }


def crop_of(bundle: bundles.Bundle) -> images.CentreCrop:
  """Returns how pictures of any size become a bundle's images."""
  if bundle.crop is not None:
    return bundle.crop
  return crop_of_dataset(bundle.info.get('dataset'), bundle.image_shape[0])


def crop_of_dataset(described: Any, height: int) -> images.CentreCrop:
  """Returns how a data set's test images were made of pictures.

  A picture of their size may be one of them, and is left as it is.

  Args:
    described: a bundle's `info` says it of the data set; whatever it may be.
    height: of its images.
  """
  resize = described.get('resize') if isinstance(described, dict) else None
  if type(resize) is not int or resize < height:
    resize = height
  return images.CentreCrop(resize, keeps_size=True)
