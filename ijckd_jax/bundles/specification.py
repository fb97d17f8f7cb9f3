"""What `bundle.json` may say: checked, and built into a network.

A bundle may come from a stranger, so nothing in it is believed before it was
checked, and no code is imported by what it names.
"""

from collections.abc import Mapping
import dataclasses
import datetime

from flax import core
from flax import traverse_util
import jax
import jax.numpy as jnp
import numpy as np

from ijckd_jax import models
from ijckd_jax.data import augment
from ijckd_jax.data import images
from ijckd_jax.distillation import connectors
from ijckd_jax.distillation import network as network_lib
from ijckd_jax.distillation import teachers
from ijckd_jax.models import converted
from ijckd_jax.models import programs as programs_lib
from ijckd_jax.runtime import config_utils

DTYPES = ('float32', 'bfloat16')
# The files, by name, of what is not built but read.
PROGRAMS = (
  *(f'{converted.FEATURES}{dtype}' for dtype in DTYPES),
  *(f'{converted.TRAINING}{dtype}' for dtype in DTYPES),
  programs_lib.POOL,
  programs_lib.OWN_POOL,
  programs_lib.POOL_TRAINING,
)
CONVERTED_FLAGS = ('signed', 'pooled_signed', 'pools_map')
CONNECTOR_RUNTIME_FIELDS = (
  'axis_name',
  'dtype',
  'unbiased_variance',
  'parent',
  'name',
)
# A file may ask for anything: arrays as large as these sides still fit.
MAX_SIDE = 4096
SIDES = f'a list of sides from 1 to {MAX_SIDE}'
MAX_NUMBER = 2.0**127  # Beyond it float32 is infinite, and so are NaN and inf.
MAX_EVAL_BATCH_SIZE = 2**20
MAX_VERSION = 40  # Characters of a package's version.


def upgraded(spec):
  """Returns a spec as this version writes it.

  Args:
    spec: of one of bundles.FORMAT_VERSIONS, not checked.
  """
  if spec['format_version'] < 4 and spec.get('converted') is not None:
    return {**spec, 'truncated': False}
  return spec


def upgraded_arrays(spec, arrays):
  """Returns a bundle's arrays by the names that this version gives them."""
  if spec['format_version'] < 4 and spec.get('converted') is not None:
    old, new = 'pool/params/', 'params/backbone/'
    return {name.replace(old, new, 1): x for name, x in arrays.items()}
  return arrays


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
    and all(type(x) in (int, float) and abs(x) < MAX_NUMBER for x in value)
  )


def _is_texts(values):
  return isinstance(values, list) and all(isinstance(x, str) for x in values)


def check(spec):
  """Raises ValueError unless each field is of its type and within bounds."""
  _check_network(spec)
  _check_images(spec)
  _check_connection(spec)
  info = spec.get('info')
  _require(isinstance(info, dict), 'info', 'an object')
  _require(
    _is_count(info.get('eval_batch_size', 1), MAX_EVAL_BATCH_SIZE),
    'eval_batch_size',
    f'from 1 to {MAX_EVAL_BATCH_SIZE}',
  )
  for field in ('dataset', 'origin'):
    _require(isinstance(info.get(field, {}), dict), field, 'an object')


def _require(is_right, field, wanted):
  if not is_right:
    raise ValueError(f'{field} must be {wanted}')


def _check_network(spec):
  """Raises ValueError unless backbone, pool, classes and programs are right."""
  for field in ('backbone', 'pool'):
    _require(isinstance(spec.get(field), str), field, 'a name')
  is_right = isinstance(spec.get('tap'), str) ^ ('truncated' in spec)
  _require(is_right, 'tap', 'a name, or not there where truncated is')
  flags = {'truncated': spec['truncated']} if 'truncated' in spec else {}
  found = spec.get('converted')
  if found is not None:
    _require(isinstance(found, dict), 'converted', 'null or an object')
    _require(_is_texts(found.get('buffers')), 'buffers', 'a list of names')
    flags |= {name: found.get(name) for name in CONVERTED_FLAGS}
    if spec.get('connector') is None:
      pools = ('average', programs_lib.PROGRAM)
      _require(spec['pool'] in pools, 'pool', 'its own')
  for field, value in flags.items():
    _require(isinstance(value, bool), field, 'true or false')
  _require(spec.get('dtype') in DTYPES, 'dtype', f'one of {", ".join(DTYPES)}')
  # There are none where there is no head.
  names = spec.get('class_names')
  _require(_is_texts(names), 'class_names', 'a list of names')
  hashes = spec.get('programs', {})
  _require(
    isinstance(hashes, dict)
    and set(hashes) <= set(PROGRAMS)
    and _is_texts(list(hashes.values())),
    'programs',
    f'checksums of {", ".join(PROGRAMS)}',
  )
  programs_made(spec)


def programs_made(spec) -> programs_lib.Made:
  """Returns when a bundle's programs were made; older bundles do not say it.

  Raises:
    ValueError: what is said is no day, or no version.
  """
  found = spec.get('programs_made', {'day': '', 'jaxlib': ''})
  _require(
    isinstance(found, dict)
    and set(found) == {'day', 'jaxlib'}
    and _is_texts([*found.values()])
    and _is_day(found['day'])
    and len(found['jaxlib']) <= MAX_VERSION,
    'programs_made',
    'a day, YYYY-MM-DD, and a jaxlib',
  )
  made = programs_lib.Made(**found)
  # The calendar ends with the year 9999, and raises.
  _require(not made.day or made.until, 'programs_made', 'a day of our time')
  return made


def _is_day(value):
  try:
    return value == '' or bool(datetime.date.fromisoformat(value))
  except ValueError:
    return False


def _check_images(spec):
  """Raises ValueError unless the images and their preprocessing are right."""
  shape = spec.get('image_shape')
  _require(
    isinstance(shape, list) and _is_size(shape[:2]) and len(shape) == 3,
    'image_shape',
    f'{SIDES}, and the number of channels',
  )
  _require(_is_count(shape[2], MAX_SIDE), 'image_shape', 'of 1 channel or more')
  preprocessing = spec.get('preprocessing')
  _require(
    isinstance(preprocessing, dict)
    and set(preprocessing) - {'interpolation'} == {'mean', 'std', 'size'},
    'preprocessing',
    'a mean, a std, a size and an interpolation',
  )
  # Bundles that do not name one were made when all were bilinear.
  _check_interpolation(preprocessing.get('interpolation', 'bilinear'))
  for field in ('mean', 'std'):
    values = preprocessing[field]
    wanted = f'a list of {shape[2]} numbers, one per channel'
    _require(_is_numbers(values, shape[2]), field, wanted)
  _require(min(preprocessing['std']) > 0, 'std', 'positive')
  _require(_is_size(preprocessing['size']), 'size', SIDES)
  crop_of(spec)


def crop_of(spec) -> images.CentreCrop | None:
  """Returns the crop that a spec names.

  Raises:
    ValueError: see `read_crop`.
  """
  found = spec.get('crop')
  return None if found is None else read_crop(found, spec['image_shape'][0])


def read_crop(found, height: int) -> images.CentreCrop:
  """Returns a crop that is described as JSON.

  Args:
    found: whatever was read.
    height: of the images that are cut out.

  Raises:
    ValueError: it is no such description.
  """
  fields = {field.name for field in dataclasses.fields(images.CentreCrop)}
  _require(
    isinstance(found, dict) and set(found) == fields,
    'crop',
    f'an object with {", ".join(sorted(fields))}',
  )
  _require(
    _is_count(found['resize'], MAX_SIDE) and found['resize'] >= height,
    'resize',
    f"from {height}, the images' height, to {MAX_SIDE}",
  )
  _check_interpolation(found['interpolation'])
  _require(isinstance(found['keeps_size'], bool), 'keeps_size', 'true or false')
  return images.CentreCrop(**found)


def _check_interpolation(name):
  _require(
    name in augment.INTERPOLATIONS,
    'interpolation',
    f'one of {", ".join(augment.INTERPOLATIONS)}',
  )


def _check_connection(spec):
  """Raises ValueError unless the connector and its size are right."""
  connector = spec.get('connector', '')
  size = spec.get('connect_size', '')
  _require(
    connector is None
    or (isinstance(connector, dict) and isinstance(connector.get('name'), str)),
    'connector',
    'null, or have a name and fields',
  )
  _require(
    size is None
    or (
      _is_size(size)
      and all(map(int.__le__, size, spec['preprocessing']['size']))
    ),
    'connect_size',
    f"null, or {SIDES}, at most the images'",
  )


def _tap(spec) -> str:
  """Returns the tap of a checked spec, which names it or says `truncated`."""
  if 'truncated' in spec:
    return 'stage' if spec['truncated'] else 'final'
  return spec['tap']


def names_outside(spec) -> list[str]:
  """Returns the names in a spec that are references to code elsewhere.

  Raises:
    config_utils.UserError: a name is neither known nor a reference.
  """
  names = []
  if spec.get('converted') is None:
    names.append(('backbone', spec['backbone'], models.BACKBONES))
  if spec['pool'] not in ('average', programs_lib.PROGRAM):
    names.append(('backbone', spec['pool'], models.BACKBONES))
  if spec['connector'] is not None:
    name = spec['connector']['name']
    names.append(('connector', name, connectors.CONNECTORS))
  unknown = [item for item in names if item[1] not in item[2]]
  for kind, name, table in unknown:
    if ':' not in name:
      raise config_utils.unknown(kind, name, list(table))
  return [name for _, name, _ in unknown]


def build(spec, dtype, programs: Mapping[str, programs_lib.Program]):
  """Returns the network of a checked spec, and the backbone of its pool.

  That backbone is None where the pool is the plain average, the network's own,
  or a program.

  Args:
    spec: checked.
    dtype: of the computation.
    programs: those that it names.

  Raises:
    ValueError: a program is missing.
  """
  preprocessing = augment.Preprocessing(
    **{
      key: tuple(value) if isinstance(value, list) else value
      for key, value in spec['preprocessing'].items()
    }
  )
  pool, pool_backbone, pool_signed = teachers.average_pool, None, False
  if spec['pool'] == programs_lib.PROGRAM:
    if programs_lib.POOL not in programs:
      raise ValueError('its pool is a program, which is not there')
    pool = programs_lib.Pool(programs[programs_lib.POOL])
    pool_signed = True
  if spec.get('converted') is not None:
    backbone = _build_converted(spec, dtype, programs)
  else:
    backbone = models.build(spec['backbone'], tap=_tap(spec), dtype=dtype)
  if spec['connector'] is None:
    pool = network_lib.pool_of(backbone)
    return network_lib.Network(backbone, preprocessing, None, None, pool), None
  fields = {
    key: tuple(value) if isinstance(value, list) else value
    for key, value in spec['connector'].items()
  }
  cls = connectors.get(fields.pop('name'))
  _check_connector(cls, fields)
  if spec['pool'] not in ('average', programs_lib.PROGRAM):
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


def _build_converted(spec, dtype, programs):
  """Returns the Converted of a checked spec."""
  features, training = (
    {
      name.removeprefix(prefix): program
      for name, program in programs.items()
      if name.startswith(prefix)
    }
    for prefix in (converted.FEATURES, converted.TRAINING)
  )
  own_pool = programs.get(programs_lib.OWN_POOL)
  if spec['connector'] is None:
    own_pool = programs.get(programs_lib.POOL)
  dtype = jnp.dtype(dtype)
  if dtype.name not in features:
    raise ValueError(
      f'it was converted for {", ".join(features) or "nothing"}, not for '
      f'{dtype.name}'
    )
  known = set(features[dtype.name].arrays)
  known |= set(own_pool.arrays if own_pool else ())
  for name, program in programs.items():
    is_own = name.startswith(converted.TRAINING)
    is_own |= name == programs_lib.POOL_TRAINING
    if is_own and not known >= set(program.arrays):
      raise ValueError(f'{name} takes arrays that inference does not')
  found = spec['converted']
  return converted.Converted(
    tap=_tap(spec),
    dtype=dtype,
    features=core.FrozenDict(features),
    training=core.FrozenDict(training),
    own_pool=own_pool,
    pool_training=programs.get(programs_lib.POOL_TRAINING),
    buffers=tuple(found['buffers']),
    map_is_signed=found['signed'],
    pooled_is_signed=found['pooled_signed'],
    map_is_pooled=found['pools_map'],
  )


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


def shapes(network, pool_backbone, spec):
  """Returns the shapes of the variables that a spec's network has.

  Args:
    network: as `build` returns it.
    pool_backbone: as `build` returns it.
    spec: a checked spec.
  """
  image_shape, key = tuple(spec['image_shape']), jax.random.key(0)
  num_classes, connector = len(spec['class_names']), network.connector
  if connector is None:
    made = jax.eval_shape(lambda: network.init(key, image_shape, num_classes))
    return {**made, 'pool': {}}
  made = jax.eval_shape(lambda: network.init(key, image_shape, None))
  made['pool'], width = {}, connector.features
  if network.pools_map:
    size = (1, *network.connect_size, width)
    final = jax.ShapeDtypeStruct(size, jnp.float32)
    if isinstance(network.pool, programs_lib.Pool):
      made['pool'] = network.pool.shapes
    elif pool_backbone is not None:
      made['pool'] = jax.eval_shape(
        lambda x: pool_backbone.init(key, x, method='pool'), final
      )
    width = jax.eval_shape(network.pool, made['pool'], final).shape[-1]
  made['params']['head'] = network_lib.head_shapes(width, num_classes)
  return made


def nested(arrays):
  """Returns a network's variables out of arrays by name."""
  variables = traverse_util.unflatten_dict(arrays, sep='/')
  for kind in (*network_lib.COLLECTIONS, 'pool'):
    variables.setdefault(kind, {})
  return variables


def check_whole(spec, network, variables):
  """Raises ValueError unless a bundle would be taken if it were loaded."""
  check(spec)
  _, pool_backbone = build(spec, network.dtype, network.programs)
  arrays = traverse_util.flatten_dict(variables, sep='/')
  check_arrays(arrays, network, shapes(network, pool_backbone, spec))


def check_arrays(arrays, network, expected):
  """Raises unless a network has these arrays, and they are what they can be.

  Args:
    arrays: by name.
    network: as `build` returns it.
    expected: `shapes` of the network.

  Raises:
    ValueError: one is missing, not known, of another shape, not finite, or a
      negative variance.
  """
  expected = traverse_util.flatten_dict(expected, sep='/')
  for name in sorted(expected.keys() | arrays.keys()):
    described = [
      f'{tree[name].dtype}{list(tree[name].shape)}' if name in tree else 'none'
      for tree in (arrays, expected)
    ]
    if described[0] != described[1]:
      raise ValueError(f'{name} is {described[0]}, not {described[1]}')
    array = arrays[name]
    if not jnp.issubdtype(array.dtype, jnp.floating):
      continue
    # A buffer of a converted network may be infinite, such as a mask.
    is_converted = '/backbone/' in name and isinstance(
      network.backbone, converted.Converted
    )
    if (np.isnan if is_converted else lambda x: ~np.isfinite(x))(array).any():
      raise ValueError(f'{name} holds numbers that are not finite')
    if name.startswith('batch_stats/') and name.endswith('/var'):
      if not is_converted and array.size and array.min() < 0:
        raise ValueError(f'{name} holds a negative variance')
