"""Bundles from PyTorch state dicts.

Every entry that a network has is taken, and there must be no other.
"""

import collections
from collections.abc import Mapping
from collections.abc import Sequence
import dataclasses
import json
from typing import Any

from etils import epath
from flax import traverse_util
import jax
import jax.numpy as jnp
import numpy as np

from ijckd_jax import models
from ijckd_jax.bundles import bundles
from ijckd_jax.bundles import specification
from ijckd_jax.distillation import binding
from ijckd_jax.distillation import methods
from ijckd_jax.distillation import network as network_lib
from ijckd_jax.pytorch import hub
from ijckd_jax.pytorch import identification
from ijckd_jax.pytorch import published_names
from ijckd_jax.pytorch import published_weights
from ijckd_jax.pytorch import state_dicts
from ijckd_jax.pytorch import wrappers
from ijckd_jax.runtime import backend
from ijckd_jax.runtime import config_utils

SIMKD_CONNECTOR = 'proj'


@dataclasses.dataclass(frozen=True)
class Request:
  """What is known of a state dict beside its file.

  Attributes:
    backbone: name of its backbone; '' to tell it by the keys.
    num_classes: K; 0 to take what the head says.
    preprocessing: key of published_weights.PREPROCESSING, or a value as there;
      None to take the one that is usual for the backbone.
    class_names: K names; () for those of the data set, if it is known.
    teacher: whose head a SimKD student uses.
    dtype: of the computation; None: what an exported bundle says, or float32.
    trust_code: whether an exported bundle may name code outside the package.
  """

  backbone: str = ''
  num_classes: int = 0
  preprocessing: str | published_weights.Published | None = None
  class_names: Sequence[str] = ()
  teacher: bundles.Bundle | None = None
  dtype: Any = None
  trust_code: bool = False


def read(
  path: epath.PathLike, request: Request, *, part: str = ''
) -> tuple[bundles.Bundle, list[str]]:
  """Returns the bundle that a file of PyTorch or of the hub makes.

  Args:
    path: of a file, or `hf:OWNER/NAME@COMMIT`.
    request: what is known of it.
    part: see state_dicts.read.

  Returns:
    The bundle, and in sentences what was taken and assumed.

  Raises:
    config_utils.UserError: the file is not right, or does not fit the request.
  """
  backend.start()
  # Data from strangers can be wrong in more ways than a list could name.
  try:
    if str(path).startswith(hub.PREFIX):
      if part:
        raise config_utils.UserError('a network of the hub has no parts')
      bundle, notes = _read_hub(str(path), request)
    else:
      bundle, notes = _read_file(path, request, part)
    specification.check_whole(bundle.spec(), bundle.network, bundle.variables)
  except config_utils.UserError as error:
    if str(path) in str(error):
      raise
    raise config_utils.UserError(f'{path}: {error}') from error
  except Exception as error:
    config_utils.raise_outside(error)
    raise config_utils.UserError(
      f'{path} cannot be imported: {config_utils.short(error)}'
    ) from error
  return bundle, notes


def _read_file(path, request, part):
  """Returns the bundle of a file, and what was taken."""
  state = state_dicts.read(path, part=part)
  name = epath.Path(path).name
  origin = {'file': name, 'sha256': state.sha256}
  version, known = published_weights.recognise(name, state.sha256)
  if version == 'V2' and request.preprocessing is None:
    request = dataclasses.replace(request, preprocessing='imagenet_v2')
  bundle, notes = from_state(state, request, origin=origin)
  return bundle, [*known, *state.notes, *notes]


def _read_hub(reference, request):
  """Returns the bundle of a repository of the hub, and what was taken."""
  found = hub.download(reference)
  origin = {
    'hub': found.repo,
    'revision': found.revision,
    'licence': found.licence,
  }
  licence = found.licence or 'not stated'
  notes = [f'{found.repo} at {found.revision}; licence: {licence}']
  if 'bundle.json' in found.files:
    bundle = bundles.load(
      found.files['bundle.json'].parent,
      dtype=request.dtype,
      trust_code=request.trust_code,
    )
    _check_said(request, bundle.backbone_name, len(bundle.class_names))
    arrays = found.files['variables.safetensors']
    origin['sha256'] = state_dicts.sha256(arrays)
  else:
    state = state_dicts.read(found.files['model.safetensors'])
    origin['sha256'] = state.sha256
    if published_names.SPEC_KEY not in state.metadata:
      request = _as_timm_says(found, request)
    bundle, more = from_state(state, request, origin=origin)
    notes += [*state.notes, *more]
  # Also of a bundle that was exported elsewhere, from weights of its own.
  info = {**bundle.info, 'origin': origin}
  return dataclasses.replace(bundle, info=info), notes


def _as_timm_says(found, request):
  """Returns a request with what config.json says of architecture and images.

  The architecture is not told by names and shapes alone: timm has networks that
  differ in what has no weights, such as resnetblur50 from resnet50.
  """
  architecture = found.config.get('architecture')
  if isinstance(architecture, str):
    if architecture not in models.BACKBONES:
      raise config_utils.UserError(
        f'{found.repo} is a {config_utils.short(architecture)}, which is no '
        'backbone here'
      )
    if request.backbone not in ('', architecture):
      raise config_utils.UserError(
        f'{found.repo} is no {request.backbone}, but a {architecture}'
      )
    request = dataclasses.replace(request, backbone=architecture)
  if request.preprocessing is None:
    published = published_weights.of_timm(found.repo, found.config)
    request = dataclasses.replace(request, preprocessing=published)
  return request


def from_state(
  state: state_dicts.StateDict,
  request: Request,
  *,
  origin: Mapping[str, Any],
) -> tuple[bundles.Bundle, list[str]]:
  """Returns the bundle that a state dict makes, and what was taken.

  Args:
    state: as read.
    request: what is known of it.
    origin: what the bundle is to say of where it comes from.

  Raises:
    config_utils.UserError: it does not fit the request.
  """
  if published_names.SPEC_KEY in state.metadata:
    return _from_export(state, request)
  arrays = _without_counters(state.arrays)
  for name, array in arrays.items():
    if name.endswith('.running_var') and np.any(array < 0):
      raise config_utils.UserError(f'the variances {name} are negative')
  given, known = request.preprocessing, published_weights.PREPROCESSING
  if isinstance(given, str) and given not in known:
    raise config_utils.unknown('preprocessing', given, list(known))
  size = known.get(given, given).preprocessing.size if given else None
  found = identification.identify(arrays, request.backbone, size)
  name, arrays, names = found.name, found.arrays, found.names
  notes = [] if request.backbone else [f'backbone {name}, told by the names']
  notes += _describe_prefix(found)
  if SIMKD_CONNECTOR in state.other:
    proj = state.other[SIMKD_CONNECTOR]
    bundle, more = _from_simkd(found, proj, request, origin)
    return bundle, [*notes, *more]
  if request.teacher is not None:
    raise config_utils.UserError(
      'a teacher is only of use to a SimKD student, and the file has no '
      f'connector (under {SIMKD_CONNECTOR!r})'
    )
  backbone = models.build(name, dtype=request.dtype or jnp.float32)
  num_classes = len(arrays[f'{backbone.torch_head}.bias'])
  _check_num_classes(num_classes, request)
  key, published = _published(found, num_classes, request)
  preprocessing = published.preprocessing
  bundle = bundles.Bundle(
    network=network_lib.Network(
      backbone, preprocessing, None, None, network_lib.pool_of(backbone)
    ),
    variables=_variables(arrays, names),
    backbone_name=name,
    pool_name=name,
    image_shape=(*preprocessing.size, found.num_channels),
    class_names=_class_names(published, num_classes, request),
    info={'origin': dict(origin)},
    crop=published.crop,
  )
  total = sum(bundles.num_params(bundle.variables).values())
  notes.append(
    f'{name}: all {len(names)} arrays taken, {total:,} parameters, '
    + published_weights.describe_classes(bundle.class_names)
  )
  return bundle, [*notes, _describe(key, published, request)]


def _describe_prefix(found) -> list[str]:
  """Returns what was taken off the names, and what was left out for that."""
  if not found.prefix:
    return []
  notes = [f'took {found.prefix} off the names']
  if found.left_out:
    groups = collections.Counter(
      name.partition('.')[0] for name in found.left_out
    )
    some = [
      f'{wrappers.word(name)} ({count} arrays)'
      for name, count in groups.most_common(5)
    ]
    more = ', ...' if groups.keys() - dict(groups.most_common(5)).keys() else ''
    notes.append(f'left out, beside {found.prefix}*: {", ".join(some)}{more}')
  return notes


def _without_counters(arrays):
  """Returns a state dict without the numbers of batches that norms count."""
  return {
    name: array
    for name, array in arrays.items()
    if name.rpartition('.')[2] != published_names.COUNTER
  }


def _variables(arrays, names: published_names.Names):
  """Returns a network's variables from a state dict."""
  variables = traverse_util.unflatten_dict(
    {entry.path: entry.to_flax(arrays[name]) for name, entry in names.items()}
  )
  variables.setdefault('batch_stats', {}).setdefault('backbone', {})
  variables.setdefault('pool', {})
  return variables


def _check_num_classes(num_classes, request):
  if request.num_classes not in (0, num_classes):
    raise config_utils.UserError(
      f'the head in the file tells {num_classes} classes apart, not '
      f'{request.num_classes}'
    )


def _published(found, num_classes, request):
  """Returns what is known of the network: its name, or '', and itself.

  Raises:
    config_utils.UserError: nothing is given and nothing is usual, or it is for
      images of other channels.
  """
  given, channels = request.preprocessing, found.num_channels
  if isinstance(given, published_weights.Published):
    key, made = '', given
  else:
    known = published_weights.PREPROCESSING
    key, made = given, known.get(given)
    if not given:
      key, made = published_weights.usual_preprocessing(
        found.name, channels, num_classes
      )
    if made is None:
      raise config_utils.UserError(
        f'how the images of this {found.name} ({channels} channels, '
        f'{num_classes} classes) were prepared is not known: give --mean, '
        '--std and --image_size, or --preprocessing with one of '
        f'{", ".join(known)}'
      )
  numbers = made.preprocessing
  if len(numbers.mean) != channels or len(numbers.std) != channels:
    raise config_utils.UserError(
      f'the network reads images of {channels} channels, but its preprocessing '
      f'has a mean of {len(numbers.mean)} and a std of {len(numbers.std)}'
    )
  return key, made


def _class_names(published, num_classes, request):
  names = tuple(request.class_names)
  if not names:
    names = tuple(published.class_names())
    return (
      names
      if len(names) == num_classes
      else tuple(map(str, range(num_classes)))
    )
  if len(names) != num_classes:
    raise config_utils.UserError(
      f'{len(names)} class names for a head of {num_classes} classes'
    )
  return names


def _describe(key, published, request) -> str:
  """Returns how images are prepared, and whether that is assumed."""
  made = published.preprocessing
  height, width = made.size
  assumed = '' if request.preprocessing else ', assumed as it is usual'
  return (
    f'preprocessing{f" {key}" if key else ""}{assumed}: mean {made.mean}, std '
    f'{made.std}, {height}x{width}, {made.interpolation}'
    + published_weights.describe_crop(published.crop)
  )


def _check_said(request, backbone, num_classes):
  """Raises where a request says what a bundle says itself, or another thing."""
  if request.backbone not in ('', backbone):
    raise config_utils.UserError(
      f'it is no {request.backbone}, but a {backbone}'
    )
  _check_num_classes(num_classes, request)
  if request.preprocessing or request.class_names or request.teacher:
    raise config_utils.UserError(
      'it was exported from a bundle and says itself how images are prepared, '
      'what its classes are called and what its head is: leave that out'
    )


def _from_export(state, request):
  """Returns the bundle that `state_dict` and `metadata` were made of."""
  try:
    spec = json.loads(state.metadata[published_names.SPEC_KEY])
  except (ValueError, RecursionError) as error:
    raise config_utils.UserError(
      f'its description of the bundle is damaged: {config_utils.short(error)}'
    ) from error
  network, pool_backbone = bundles.build(
    spec, 'the file', dtype=request.dtype, trust_code=request.trust_code
  )
  _check_said(request, spec['backbone'], len(spec['class_names']))
  arrays = _without_counters(state.arrays)
  names = published_names.names_of(
    network, specification.shapes(network, pool_backbone, spec), spec['pool']
  )
  problem = identification.differences_of(arrays, names)
  if problem:
    raise config_utils.UserError(
      f'it does not hold what it describes: {problem}'
    )
  bundle = bundles.Bundle(
    network=network,
    variables=_variables(arrays, names),
    backbone_name=spec['backbone'],
    pool_name=spec['pool'],
    image_shape=tuple(spec['image_shape']),
    class_names=tuple(spec['class_names']),
    info=spec['info'],
    crop=specification.crop_of(spec),
  )
  return bundle, [
    f'exported from a bundle: {spec["backbone"]}, all {len(names)} arrays'
  ]


def _from_simkd(found, proj, request, origin):
  """Returns the bundle of a SimKD student: a net, a projector, a teacher."""
  if request.teacher is None:
    raise config_utils.UserError(
      "a SimKD student predicts through its teacher's head, which is not in "
      'its file: import the teacher first, and give its bundle by --teacher'
    )
  teacher = request.teacher.teacher()
  _check_num_classes(teacher.num_classes, request)
  proj = {
    f'connector.{key.removeprefix("transfer.")}': array
    for key, array in _without_counters(proj).items()
  }
  name, dtype = found.name, request.dtype or jnp.float32
  if request.preprocessing is None:
    made = published_weights.Published(
      request.teacher.network.preprocessing, request.teacher.crop
    )
    request = dataclasses.replace(request, preprocessing=made)
  key, published = _published(found, teacher.num_classes, request)
  preprocessing = published.preprocessing
  image_shape = (*preprocessing.size, found.num_channels)
  bound = binding.bind(
    backbone=models.build(name, tap='stage', dtype=dtype),
    preprocessing=preprocessing,
    method=_simkd_method(proj),
    given=(teacher,),
    image_shape=image_shape,
    num_classes=teacher.num_classes,
    axis_name=None,
    dtype=dtype,
  )
  names = _simkd_names(bound, teacher, image_shape)
  arrays = {f'backbone.{key}': array for key, array in found.arrays.items()}
  unused = [key for key in arrays if key not in names]
  taken = {key: arrays[key] for key in arrays if key in names} | proj
  problem = identification.differences_of(taken, names)
  if problem:
    raise config_utils.UserError(
      f'the connector in the file does not fit {name} and the teacher '
      f'{teacher.name}: {problem}'
    )
  bundle = bundles.Bundle(
    network=bound.deployed_network,
    variables=bound.deployed(_variables(taken, names), bound.frozen),
    backbone_name=name,
    pool_name=teacher.pool_name,
    image_shape=image_shape,
    class_names=request.teacher.class_names,
    info={'origin': dict(origin), 'teacher': teacher.name},
    crop=published.crop,
  )
  left = identification.some(unused)
  return bundle, [
    f'{name} by SimKD: {len(names)} arrays taken, the head is that of '
    f'{teacher.name}; not used, as SimKD does not: {left}',
    _describe(key, published, request),
  ]


def _simkd_names(bound, teacher, image_shape) -> published_names.Names:
  """Returns the names of the arrays of a student that its own file holds."""
  shapes = jax.eval_shape(
    lambda: bound.deployed(
      bound.init(jax.random.key(0), image_shape), bound.frozen
    )
  )
  names = published_names.names_of(
    bound.deployed_network, shapes, teacher.pool_name
  )
  own = ('backbone.', 'connector.')
  return {key: entry for key, entry in names.items() if key.startswith(own)}


def _simkd_method(proj):
  """Returns a method whose connector has the projector's shapes."""
  try:
    width, _, _, _ = proj['connector.0.weight'].shape
    inputs = proj['connector.3.weight'].shape[1]
    features = proj['connector.6.weight'].shape[0]
  except (KeyError, ValueError, IndexError) as error:
    raise config_utils.UserError(
      "the connector in the file is not SimKD's: it has not the convolutions "
      'transfer.0, transfer.3 and transfer.6'
    ) from error
  if not 1 <= width <= features:
    raise config_utils.UserError(
      f"the connector in the file is not SimKD's: it is {width} wide inside "
      f'and {features} outside'
    )
  depthwise = inputs == 1 < width
  return methods.get('ijckd')(
    connector='bottleneck_depthwise' if depthwise else 'bottleneck',
    factor=features // width,
  )
