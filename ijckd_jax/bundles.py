"""Bundles: folders that hold a classifier whole, as JSON and arrays.

`bundle.json` says how the parts are built and joined, `variables.safetensors`
holds their arrays. Nothing else is needed to evaluate, export or distil from
the network inside.
"""

import contextlib
import dataclasses
import json
import math
import re
from typing import Any
import uuid

from etils import epath
from flax import traverse_util
import jax
import jax.numpy as jnp
import numpy as np
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
DTYPES = ('float32', 'bfloat16')
CONNECTOR_RUNTIME_FIELDS = ('axis_name', 'dtype', 'parent', 'name')
# A file may ask for anything: arrays as large as these sides still fit.
MAX_SIDE = 4096
MAX_EVAL_BATCH_SIZE = 2**20


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
    net, pool_variables = self.network, self.variables['pool']
    pool, pool_name = net.pool, self.pool_name
    if net.connector is None:
      backbone = network_lib.part(self.variables, 'backbone')
      pool_variables = network_lib.pool_variables(backbone)
      if net.backbone.truncated:
        # The backbone of that name, whole, may have another pool.
        pool, pool_name = teachers.average_pool, 'average'
    return teachers.Teacher(
      apply=net,
      variables=self.variables,
      head=self.variables['params']['head'],
      preprocessing=net.preprocessing,
      name=name or self.backbone_name,
      pool=pool,
      pool_name=pool_name,
      pool_variables=pool_variables,
      signed=net.signed,
      pools_map=net.pools_map,
      pooled_signed=net.pooled_signed,
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
      'dtype': jnp.dtype(net.backbone.dtype).name,
      'connector': connector,
      'connect_size': net.connect_size,
      'pool': self.pool_name,
      'preprocessing': dataclasses.asdict(net.preprocessing),
      'image_shape': self.image_shape,
      'class_names': [str(name) for name in self.class_names],
      'info': self.info,
    }
    # A mean or std may be of numpy's floats, which JSON does not know.
    text = json.dumps(spec, indent=2, default=float) + '\n'
    flat = traverse_util.flatten_dict(self.variables, sep='/')
    arrays = {key: np.ascontiguousarray(value) for key, value in flat.items()}
    try:
      directory.parent.mkdir(parents=True, exist_ok=True)
      _remove_partial(directory)
      partial.mkdir()
      (partial / ARRAYS_FILE).write_bytes(safetensors.numpy.save(arrays))
      (partial / SPEC_FILE).write_text(text)
      if directory.exists():
        directory.rmtree()
      partial.rename(directory)
    except OSError:
      if partial.exists():
        partial.rmtree()
      raise


def _remove_partial(directory):
  """Removes what saves of this bundle left beside it when they were killed."""
  pattern = re.compile(rf'\.{re.escape(directory.name)}\.[0-9a-f]{{32}}')
  for path in directory.parent.iterdir():
    if pattern.fullmatch(path.name):
      path.rmtree()


def load(
  directory: epath.PathLike, *, dtype=None, trust_code: bool = False
) -> Bundle:
  """Returns the bundle in a folder, or in a run's folder.

  Args:
    directory: holds `bundle.json`, or `bundle/` with it.
    dtype: of the computation; None: as in the run that made it.
    trust_code: whether it may name backbones and connectors outside this
      package, as `package.module:Name`. They are imported: their code runs.

  Raises:
    config_utils.UserError: there is no bundle, it is damaged or too new, or it
      names code that is not trusted.
  """
  directory = find(directory)
  # Data from strangers can be wrong in more ways than a list could name, so
  # here whatever goes wrong with it is the user's error, and said in one line.
  try:
    spec = json.loads((directory / SPEC_FILE).read_text())
    arrays = safetensors.numpy.load((directory / ARRAYS_FILE).read_bytes())
  except Exception as error:
    raise config_utils.UserError(
      f'the bundle in {directory} cannot be read: {_short(error)}'
    ) from error
  if not isinstance(spec, dict) or 'format_version' not in spec:
    raise config_utils.UserError(f'{directory / SPEC_FILE} is not a bundle')
  if spec['format_version'] != FORMAT_VERSION:
    raise config_utils.UserError(
      f'the bundle in {directory} has format {_short(spec["format_version"])}; '
      f'this version of ijckd_jax reads {FORMAT_VERSION}'
    )
  try:
    _check_spec(spec)
    outside = _names_outside(spec)
  except Exception as error:
    raise config_utils.UserError(
      f'{directory / SPEC_FILE} is damaged: {_short(error)}'
    ) from error
  if outside and not trust_code:
    raise config_utils.UserError(
      f'the bundle in {directory} names code outside the package '
      f'({_short(outside[0])}); load it with trust_code=True (--trust_code) if '
      'you trust it'
    )
  try:
    network, pool_backbone = _build(spec, dtype or getattr(jnp, spec['dtype']))
  except Exception as error:
    raise config_utils.UserError(
      f'{directory / SPEC_FILE}: what it names cannot be built: {_short(error)}'
    ) from error
  try:
    variables = traverse_util.unflatten_dict(arrays, sep='/')
    for kind in (*network_lib.COLLECTIONS, 'pool'):
      variables.setdefault(kind, {})
    _check_arrays(arrays, variables, network, pool_backbone, spec)
  except Exception as error:
    raise config_utils.UserError(
      f'the arrays in {directory} do not fit its {SPEC_FILE}: {_short(error)}'
    ) from error
  return Bundle(
    network=network,
    variables=variables,
    backbone_name=spec['backbone'],
    pool_name=spec['pool'],
    image_shape=tuple(spec['image_shape']),
    class_names=tuple(spec['class_names']),
    info=spec['info'],
  )


def _short(value) -> str:
  """Returns the start of a text, in one line."""
  line = ' '.join(str(value).split())
  return line if len(line) <= 120 else f'{line[:117]}...'


def _is_count(value, limit):
  return type(value) is int and 1 <= value <= limit


def _is_size(value):
  return (
    isinstance(value, list)
    and len(value) == 2
    and all(_is_count(side, MAX_SIDE) for side in value)
  )


def _is_numbers(value, num):
  return (
    isinstance(value, list)
    and len(value) == num
    and all(type(x) in (int, float) and math.isfinite(x) for x in value)
  )


def _check_spec(spec):
  """Raises ValueError unless each field is of its type and within bounds."""

  def check(is_right, field, wanted):
    if not is_right:
      raise ValueError(f'{field} must be {wanted}')

  for field in ('backbone', 'pool'):
    check(isinstance(spec.get(field), str), field, 'a name')
  check(isinstance(spec.get('truncated'), bool), 'truncated', 'true or false')
  check(spec.get('dtype') in DTYPES, 'dtype', f'one of {", ".join(DTYPES)}')
  names = spec.get('class_names')
  is_texts = isinstance(names, list) and all(isinstance(x, str) for x in names)
  check(is_texts and names, 'class_names', 'a list of names')

  sides = f'a list of sides from 1 to {MAX_SIDE}'
  shape = spec.get('image_shape')
  check(
    isinstance(shape, list) and _is_size(shape[:2]) and len(shape) == 3,
    'image_shape',
    f'{sides}, and the number of channels',
  )
  check(_is_count(shape[2], MAX_SIDE), 'image_shape', 'of 1 channel or more')
  preprocessing = spec.get('preprocessing')
  check(
    isinstance(preprocessing, dict)
    and set(preprocessing) == {'mean', 'std', 'size'},
    'preprocessing',
    'a mean, a std and a size',
  )
  for field in ('mean', 'std'):
    values = preprocessing[field]
    wanted = f'a list of {shape[2]} numbers, one per channel'
    check(_is_numbers(values, shape[2]), field, wanted)
  check(min(preprocessing['std']) > 0, 'std', 'positive')
  check(_is_size(preprocessing['size']), 'size', sides)

  connector = spec.get('connector', '')
  connect_size = spec.get('connect_size', '')
  check(
    connector is None
    or (isinstance(connector, dict) and isinstance(connector.get('name'), str)),
    'connector',
    'null, or have a name and fields',
  )
  check(
    connect_size is None
    or (
      _is_size(connect_size)
      and all(map(int.__le__, connect_size, preprocessing['size']))
    ),
    'connect_size',
    f"null, or {sides}, at most the images'",
  )

  info = spec.get('info')
  check(isinstance(info, dict), 'info', 'an object')
  check(
    _is_count(info.get('eval_batch_size', 1), MAX_EVAL_BATCH_SIZE),
    'eval_batch_size',
    f'from 1 to {MAX_EVAL_BATCH_SIZE}',
  )
  check(isinstance(info.get('dataset', {}), dict), 'dataset', 'an object')


def _names_outside(spec) -> list[str]:
  """Returns the names in a spec that are references to code elsewhere.

  Raises:
    config_utils.UserError: a name is neither known nor a reference.
  """
  names = [('backbone', spec['backbone'], models.BACKBONES)]
  if spec['pool'] != 'average':
    names.append(('backbone', spec['pool'], models.BACKBONES))
  if spec['connector'] is not None:
    name = spec['connector']['name']
    names.append(('connector', name, connectors.CONNECTORS))
  unknown = [item for item in names if item[1] not in item[2]]
  for kind, name, table in unknown:
    if ':' not in name:
      raise config_utils.unknown(kind, name, list(table))
  return [name for _, name, _ in unknown]


def _build(spec, dtype):
  """Returns the network of a checked spec, and the backbone of its pool.

  That backbone is None where the pool is the plain average or the network's
  own.
  """
  backbone = models.build(
    spec['backbone'], truncated=spec['truncated'], dtype=dtype
  )
  preprocessing = augment.Preprocessing(
    **{key: tuple(value) for key, value in spec['preprocessing'].items()}
  )
  if spec['connector'] is None:
    pool = network_lib.pool_of(backbone)
    return network_lib.Network(backbone, preprocessing, None, None, pool), None
  fields = {
    key: tuple(value) if isinstance(value, list) else value
    for key, value in spec['connector'].items()
  }
  cls = connectors.get(fields.pop('name'))
  _check_connector(cls, fields)
  pool, pool_backbone, pool_signed = teachers.average_pool, None, False
  if spec['pool'] != 'average':
    pool_backbone = models.build(spec['pool'], dtype=dtype)
    pool = network_lib.pool_of(pool_backbone)
    pool_signed = pool_backbone.pooled_signed
  network = network_lib.Network(
    backbone,
    preprocessing,
    connector=cls(**fields, dtype=dtype),
    connect_size=spec['connect_size'] and tuple(spec['connect_size']),
    pool=pool,
    pool_signed=pool_signed,
  )
  return network, pool_backbone


def _check_connector(cls, values):
  """Raises ValueError where a connector's fields are not what it declares.

  A field that a subclass adds may be missing: bundles from before it was added
  stay readable, if its default is what was done before.
  """
  types = {
    field.name: field.type
    for field in dataclasses.fields(cls)
    if field.name not in CONNECTOR_RUNTIME_FIELDS
  }
  for name, value in values.items():
    if name not in types:
      raise ValueError(f'the connector has no field {name!r}')
    wanted = types[name]
    kinds = (int, float) if wanted is float else (wanted,)
    if isinstance(wanted, type) and type(value) not in kinds:
      raise ValueError(f"the connector's {name} must be {wanted.__name__}")
  for name in ('features', 'signed', 'takes'):
    if name not in values:
      raise ValueError(f'the connector needs {name}')
  if values['takes'] not in ('map', 'pooled'):
    raise ValueError("the connector's takes must be 'map' or 'pooled'")


def _check_arrays(arrays, variables, network, pool_backbone, spec):
  """Raises unless a network has these arrays, no more and no fewer."""
  image_shape = tuple(spec['image_shape'])
  key = jax.random.key(0)
  out = jax.eval_shape(
    lambda variables, x: network(variables, network.preprocessing(x)),
    variables,
    jax.ShapeDtypeStruct((1, *image_shape), jnp.uint8),
  )
  width, num_classes = out.pooled.shape[-1], len(spec['class_names'])
  expected = jax.eval_shape(lambda: network.init(key, image_shape, None))
  expected['params']['head'] = {
    'kernel': jax.ShapeDtypeStruct((width, num_classes), jnp.float32),
    'bias': jax.ShapeDtypeStruct((num_classes,), jnp.float32),
  }
  if pool_backbone is not None and network.pools_map:
    expected['pool'] = jax.eval_shape(
      lambda x: pool_backbone.init(key, x, method='pool'), out.final
    )
  expected = traverse_util.flatten_dict(expected, sep='/')
  for name in sorted(expected.keys() | arrays.keys()):
    described = [
      f'{tree[name].dtype}{list(tree[name].shape)}' if name in tree else 'none'
      for tree in (arrays, expected)
    ]
    if described[0] != described[1]:
      raise ValueError(f'{name} is {described[0]}, not {described[1]}')


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


def num_params(variables) -> dict[str, int]:
  """Returns the parameters of 'backbone', 'connector' and 'head', 0 if none.

  A pool that came with the teacher's head is counted there.
  """
  params = variables['params']
  parts = {
    **params,
    'head': [params['head'], variables['pool'].get('params', {})],
  }
  return {
    part: teachers.count(parts.get(part, {}))
    for part in ('backbone', 'connector', 'head')
  }
