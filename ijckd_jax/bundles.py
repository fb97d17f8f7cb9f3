"""Bundles: folders that hold a classifier whole, as JSON and arrays.

`bundle.json` says how the parts are built and joined, `variables.safetensors`
holds their arrays. Nothing else is needed to evaluate, export or distil from
the network inside.
"""

import contextlib
import dataclasses
import json
from typing import Any
import uuid

from etils import epath
from flax import errors
from flax import traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy

from ijckd_jax import augment
from ijckd_jax import config_utils
from ijckd_jax import connectors
from ijckd_jax import models
from ijckd_jax import network as network_lib
from ijckd_jax import teachers

FORMAT_VERSION = 1
SPEC_FILE = 'bundle.json'
ARRAYS_FILE = 'variables.safetensors'
CONNECTOR_RUNTIME_FIELDS = ('axis_name', 'dtype', 'parent', 'name')


@dataclasses.dataclass(frozen=True)
class Bundle:
  """A classifier that needs nothing else.

  Attributes:
    network: how its parts are joined.
    variables: their arrays on the host, see network.Network.
    backbone_name: as models.build takes it.
    pool_name: 'average', or the backbone whose pool it is.
    image_shape: (H, W, C) of the images that it was made for.
    class_names: K names.
    info: what else is known of it, JSON: how it was trained and measured.
  """

  network: network_lib.Network
  variables: Any
  backbone_name: str
  pool_name: str
  image_shape: tuple[int, int, int]
  class_names: tuple[str, ...]
  info: dict[str, Any]

  def teacher(self, name: str | None = None) -> teachers.Teacher:
    """Returns it as a teacher."""
    return teachers.Teacher(
      apply=self.network,
      variables=self.variables,
      head=self.variables['params']['head'],
      preprocessing=self.network.preprocessing,
      name=name or self.backbone_name,
      pool=self.network.pool,
      pool_name=self.pool_name,
      pool_variables=self.variables['pool'],
      signed=self.network.signed,
      pools_map=self.network.pools_map,
      num_params=num_params(self.variables),
    )

  def save(self, directory: epath.PathLike) -> None:
    """Writes it; the folder appears whole or not at all."""
    directory = epath.Path(directory)
    partial = directory.parent / f'.{directory.name}.{uuid.uuid4().hex}'
    net = self.network
    connector = None
    if net.connector is not None:
      connector = {
        field.name: getattr(net.connector, field.name)
        for field in dataclasses.fields(net.connector)
        if field.name not in CONNECTOR_RUNTIME_FIELDS
      }
      connector['name'] = config_utils.reference(
        net.connector, connectors.CONNECTORS
      )
    spec = {
      'format_version': FORMAT_VERSION,
      'backbone': self.backbone_name,
      'truncated': net.backbone.truncated,
      'connector': connector,
      'connect_size': net.connect_size,
      'pool': self.pool_name,
      'preprocessing': dataclasses.asdict(net.preprocessing),
      'image_shape': self.image_shape,
      'class_names': self.class_names,
      'info': self.info,
    }
    flat = traverse_util.flatten_dict(self.variables, sep='/')
    arrays = {key: np.ascontiguousarray(value) for key, value in flat.items()}
    try:
      partial.mkdir(parents=True)
      (partial / ARRAYS_FILE).write_bytes(safetensors.numpy.save(arrays))
      (partial / SPEC_FILE).write_text(json.dumps(spec, indent=2) + '\n')
      if directory.exists():
        directory.rmtree()
      partial.rename(directory)
    except OSError:
      if partial.exists():
        partial.rmtree()
      raise


def load(directory: epath.PathLike, *, dtype=jnp.float32) -> Bundle:
  """Returns the bundle in a folder, or in a run's folder.

  Args:
    directory: holds `bundle.json`, or `bundle/` with it.
    dtype: of the computation.

  Raises:
    config_utils.UserError: there is no bundle, or it is damaged or too new.
  """
  directory = find(directory)
  try:
    spec = json.loads((directory / SPEC_FILE).read_text())
    arrays = safetensors.numpy.load((directory / ARRAYS_FILE).read_bytes())
  except (OSError, ValueError, safetensors.SafetensorError) as error:
    raise config_utils.UserError(
      f'the bundle in {directory} cannot be read: {error}'
    ) from error
  if not isinstance(spec, dict) or 'format_version' not in spec:
    raise config_utils.UserError(f'{directory / SPEC_FILE} is not a bundle')
  if spec['format_version'] != FORMAT_VERSION:
    raise config_utils.UserError(
      f'the bundle in {directory} has format {spec["format_version"]}; this '
      f'version of ijckd_jax reads {FORMAT_VERSION}'
    )
  backbone = models.build(
    spec['backbone'], truncated=spec['truncated'], dtype=dtype
  )
  connector = None
  if spec['connector'] is not None:
    fields = dict(spec['connector'])
    cls = config_utils.resolve(
      'connector', fields.pop('name'), connectors.CONNECTORS
    )
    connector = cls(**fields, dtype=dtype)
  connect_size = spec['connect_size']
  network = network_lib.Network(
    backbone=backbone,
    preprocessing=augment.Preprocessing(
      **{key: tuple(value) for key, value in spec['preprocessing'].items()}
    ),
    connector=connector,
    connect_size=connect_size and tuple(connect_size),
    pool=pool_of(spec['pool']),
  )
  variables = traverse_util.unflatten_dict(arrays, sep='/')
  for kind in network_lib.COLLECTIONS:
    variables.setdefault(kind, {})
  variables.setdefault('pool', {})
  images = jax.ShapeDtypeStruct((1, *spec['image_shape']), jnp.uint8)
  try:
    logits = jax.eval_shape(
      lambda x: network(variables, network.preprocessing(x)).logits, images
    )
  except (errors.FlaxError, KeyError, TypeError, ValueError) as error:
    raise config_utils.UserError(
      f'the arrays in {directory} do not fit its {spec["backbone"]}: {error}'
    ) from error
  if logits.shape[-1] != len(spec['class_names']):
    raise config_utils.UserError(
      f'the arrays in {directory} do not fit its {len(spec["class_names"])} '
      f'class names: there are {logits.shape[-1]} logits'
    )
  return Bundle(
    network=network,
    variables=variables,
    backbone_name=spec['backbone'],
    pool_name=spec['pool'],
    image_shape=tuple(spec['image_shape']),
    class_names=tuple(spec['class_names']),
    info=spec['info'],
  )


def find(directory: epath.PathLike) -> epath.Path:
  """Returns the folder that holds the bundle: the one given, or its `bundle/`.

  Raises:
    config_utils.UserError: neither does.
  """
  directory = epath.Path(directory)
  for candidate in (directory, directory / 'bundle'):
    with contextlib.suppress(OSError):
      if (candidate / SPEC_FILE).exists():
        return candidate
  raise config_utils.UserError(
    f'there is no bundle in {directory}: give the folder of a finished run, or '
    f'one that holds {SPEC_FILE}'
  )


def pool_of(name: str):
  """Returns the pool called 'average', or that of the backbone of that name."""
  if name == 'average':
    return teachers.average_pool
  return network_lib.pool_of(models.build(name))


def num_params(variables) -> dict[str, int]:
  """Returns the parameters of 'backbone', 'connector' and 'head', 0 if none."""
  params = variables['params']
  return {
    part: teachers.count(params.get(part, {}))
    for part in ('backbone', 'connector', 'head')
  }
