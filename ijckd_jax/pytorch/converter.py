"""Bundles from PyTorch classifiers of any kind, by tracing them."""

from collections.abc import Mapping
from collections.abc import Sequence
import dataclasses
import importlib.metadata
import logging
from typing import Any

from flax import core
import jax
import jax.numpy as jnp
import numpy as np

from ijckd_jax.bundles import bundles
from ijckd_jax.data import augment
from ijckd_jax.data import images as images_lib
from ijckd_jax.distillation import network as network_lib
from ijckd_jax.models import converted
from ijckd_jax.models import programs as programs_lib
from ijckd_jax.pytorch import batch_norm
from ijckd_jax.pytorch import classifier_parts
from ijckd_jax.pytorch import published_weights
from ijckd_jax.pytorch import splitting
from ijckd_jax.pytorch import tracing
from ijckd_jax.runtime import backend
from ijckd_jax.runtime import config_utils
from ijckd_jax.runtime import progress

logger = logging.getLogger('ijckd_jax')

PACKAGES = ('torch', 'torchax', 'jax')
# Of a number's scale: more is no rounding, but another network.
MAX_ERROR = 1e-3


@dataclasses.dataclass(frozen=True)
class Result:
  """A converted classifier.

  Attributes:
    bundle: the classifier, as a network of this package.
    errors: by 'map', 'pooled' and 'logits', the largest difference from
      PyTorch's on random images in float32, of the largest number there; and by
      'bfloat16 logits', say, what that costs.
    notes: in sentences, how its parts were found and what is missing.
  """

  bundle: bundles.Bundle
  errors: dict[str, float]
  notes: list[str]


def convert(
  model: Any,
  *,
  name: str,
  preprocessing: augment.Preprocessing,
  crop: images_lib.CentreCrop | None = None,
  class_names: Sequence[str] = (),
  usual_names: Sequence[str] = (),
  origin: Mapping[str, Any],
) -> Result:
  """Returns a PyTorch classifier as a bundle.

  Args:
    model: torch.nn.Module; it is put into inference mode.
    name: what the bundle is called.
    preprocessing: of its images, whose size is the one that it runs on.
    crop: see bundles.Bundle.
    class_names: K names; () for the usual ones.
    usual_names: names that are taken if the head has as many classes; numbers
      are taken if not.
    origin: what the bundle is to say of where it comes from.

  Raises:
    config_utils.UserError: its head is not linear, or it cannot be traced.
  """
  backend.start()
  notes = _notes_on_frozen(model)
  model = model.eval().requires_grad_(False)
  image_shape = (*preprocessing.size, len(preprocessing.mean))
  logger.info('%s: running it in PyTorch, to find its map and its head', name)
  parts = splitting.split(model, image_shape)
  num_classes = 0 if parts.bias is None else len(parts.bias)
  names = tuple(class_names)
  if not names and len(usual_names) == num_classes:
    names = tuple(usual_names)
  names = names or tuple(map(str, range(num_classes)))
  if len(names) != num_classes:
    raise config_utils.UserError(
      f'{len(names)} class names for a head of {num_classes} classes'
    )

  logger.info('%s: tracing it, to write it as programs', name)
  backbone, variables = _backbone(model, parts, image_shape, notes)
  bundle = bundles.Bundle(
    network=network_lib.plain(backbone, preprocessing),
    variables=variables,
    backbone_name=name,
    pool_name=backbone.pool_name(name),
    image_shape=image_shape,
    class_names=names,
    info={'origin': {**origin, **_head_name(model, parts), **versions()}},
    crop=crop,
  )
  errors = _compare(bundle, model, parts)
  _check(errors)
  if backbone.can_be_trained:
    notes += _in_training(bundle, model, parts)
  # Two programs may lack a dtype for one reason.
  notes = list(dict.fromkeys([f'cut by {parts.how}', *notes]))
  return Result(bundle, errors, notes)


def again(model: Any, old: bundles.Bundle) -> Result:
  """Returns a converted classifier, converted once more from its own arrays.

  Its head, which may have been fitted, its preprocessing, its crop, its classes
  and what else is known of it stay.

  Args:
    model: torch.nn.Module that it was converted from, with any weights.
    old: the bundle.

  Raises:
    config_utils.UserError: the arrays are not those of the model.
  """
  head = old.variables['params']['head']
  _load(model, old)
  result = convert(
    model,
    name=old.backbone_name,
    preprocessing=old.network.preprocessing,
    crop=old.crop,
    origin=old.info.get('origin', {}),
  )
  made = result.bundle
  if made.variables['params']['head']['kernel'].shape[0] != len(head['kernel']):
    raise config_utils.UserError('its features have another width than before')
  origin = made.info['origin']
  params = {**made.variables['params'], 'head': head}
  bundle = dataclasses.replace(
    made,
    variables={**made.variables, 'params': params},
    image_shape=old.image_shape,
    class_names=old.class_names,
    info={**old.info, 'origin': origin},
  )
  return dataclasses.replace(result, bundle=bundle)


def _load(model, old) -> None:
  """Loads a bundle's arrays into the model, all but its classifier's."""
  import torch

  parts = network_lib.part(old.variables, 'backbone')
  arrays = {**parts['params'], **parts['batch_stats']}
  wanted = model.state_dict()
  foreign = [
    name
    for name, array in arrays.items()
    if name not in wanted or tuple(wanted[name].shape) != array.shape
  ]
  if foreign:
    raise config_utils.UserError(
      f'{len(foreign)} of its arrays are not those of the model '
      f'({", ".join(map(config_utils.short, foreign[:3]))}): give the '
      '--model_args that it was made with'
    )
  tensors = {
    name: torch.tensor(array, dtype=wanted[name].dtype)
    for name, array in arrays.items()
  }
  model.load_state_dict(tensors, strict=False)


def describe(result: Result) -> list[str]:
  """Returns in sentences what was converted."""
  bundle, network = result.bundle, result.bundle.network
  head = f'a head of {published_weights.describe_classes(bundle.class_names)}'
  if not bundle.class_names:
    head = "no head (--config.teacher.head=fit makes one for a run's classes)"
  shape = 'x'.join(map(str, bundle.image_shape))
  pools = {'average': 'the average', 'program': 'a program'}
  pool = pools[bundle.pool_name]
  if not network.pools_map:
    pool = 'not of the map, so that students are matched on pooled features'
  signs = {True: 'signed', False: 'not negative'}
  made, programs = network.preprocessing, network.programs
  platforms = next(iter(programs.values())).platforms
  sizes = ', '.join(
    f'{name} {len(program.data) / 1e3:.0f} kB'
    for name, program in programs.items()
  )
  return [
    *result.notes,
    head,
    f'images {shape}: mean {made.mean}, std {made.std}, {made.interpolation}'
    + published_weights.describe_crop(bundle.crop),
    f'map {signs[network.signed]}, pooled features '
    f'{signs[network.pooled_signed]}; pool: {pool}',
    'from PyTorch, of the scale: '
    + ', '.join(f'{what} {error:.1e}' for what, error in result.errors.items()),
    f'programs for {", ".join(platforms)}: {sizes}',
    programs_lib.lifetime(next(iter(programs.values())).made)[0],
  ]


def versions() -> dict[str, str]:
  """Returns the versions that a conversion depends on."""
  return {name: importlib.metadata.version(name) for name in PACKAGES}


def _notes_on_frozen(model) -> list[str]:
  """Returns a note on parameters that are frozen, where not all of them are."""
  flags = [parameter.requires_grad for parameter in model.parameters()]
  if all(flags) or not any(flags):
    return []
  return [
    f'{flags.count(False)} of its {len(flags)} parameters are frozen '
    '(requires_grad=False); in training here, all of them learn'
  ]


def _backbone(model, parts, image_shape, notes):
  """Returns a Converted, and its variables with the head's.

  Args:
    model: torch.nn.Module.
    parts: of it.
    image_shape: (H, W, C).
    notes: to which what is missing is added.
  """
  traced = tracing.trace(model, _function(parts), image_shape)
  own_pool, pool = None, None
  arrays, trainable = traced.arrays, traced.trainable
  if parts.pool is not None:
    pool = tracing.trace(model, parts.pool, parts.pool_takes)
    own_pool = pool.export(parts.pool_takes, vjp_order=1)
    arrays, trainable = arrays | pool.arrays, trainable | pool.trainable
  if parts.kernel is not None and parts.head_name is None:
    notes.append('its head is made of several layers, which become one')
  training = {}
  try:
    _check_tied(model, parts, arrays)
    features = _by_dtype(traced, image_shape, notes, vjp_order=1)
    training = _training(model, parts, traced, pool, features, notes)
  except config_utils.UserError as error:
    notes.append(f'it can teach, but not be trained: {error}')
    features = _by_dtype(traced, image_shape, notes)
  backbone = converted.Converted(
    features=core.FrozenDict(features),
    own_pool=own_pool,
    buffers=tuple(sorted(arrays.keys() - trainable)),
    map_is_signed=parts.signed,
    pooled_is_signed=parts.pooled_signed,
    map_is_pooled=parts.pools_map,
    **training,
  )
  kinds = {'params': trainable, 'batch_stats': arrays.keys() - trainable}
  variables = {
    kind: {'backbone': {name: arrays[name] for name in sorted(names)}}
    for kind, names in kinds.items()
  }
  variables['params']['head'] = _head(parts)
  return backbone, {**variables, 'pool': {}}


def _function(parts):
  """Returns images (B, H, W, C) to the map, or to map and z; see Converted."""

  def run(images):
    final, pooled = parts.features(images.permute(0, 3, 1, 2))
    return final if parts.pools_map else (final, pooled)

  return run


def _check_tied(model, parts, arrays) -> None:
  """Raises UserError where a parameter has two names: one alone would learn."""
  names: dict[int, list[str]] = {}
  for name, parameter in model.named_parameters(remove_duplicate=False):
    is_head = parts.head_name and name.startswith(f'{parts.head_name}.')
    if name in arrays or is_head:
      names.setdefault(id(parameter), []).append(name)
  for shared in names.values():
    if len(shared) > 1:
      raise config_utils.UserError(f'{" and ".join(shared)} are one parameter')


def _training(model, parts, traced, pool, features, notes):
  """Returns the programs of training that differ, as fields of a Converted.

  Args:
    model: torch.nn.Module.
    parts: of it.
    traced: of inference, tracing.Traced.
    pool: the same of its own pool, or None.
    features: programs of `traced` by dtype.
    notes: to which what is missing is added.

  Raises:
    config_utils.UserError: it cannot be trained.
  """
  made: dict[str, Any] = {}
  norms = batch_norm.modules(model)
  if batch_norm.among(norms, traced.arrays):
    shape = features['float32'].takes[1:]
    step = tracing.trace(
      model, _function(parts), shape, norms=norms, known=traced.arrays
    )
    made['training'] = core.FrozenDict(
      _by_dtype(step, shape, notes, vjp_order=1)
    )
  if pool is not None and batch_norm.among(norms, pool.arrays):
    # Of the map: its average has another variance.
    shape = features['float32'].gives
    step = tracing.trace(
      model, parts.pool_of_map, shape, norms=norms, known=pool.arrays
    )
    made['pool_training'] = step.export(shape, vjp_order=1)
  return made


def _by_dtype(traced, image_shape, notes, **settings):
  """Returns programs in float32, and in bfloat16 if all operators know it."""
  made = {'float32': traced.export(image_shape, **settings)}
  try:
    dtype = jnp.bfloat16
    made['bfloat16'] = traced.export(image_shape, dtype=dtype, **settings)
  except config_utils.UserError as error:  # Some operators know none.
    notes.append(f'no program in bfloat16: {error}')
  return made


def _head_name(model, parts) -> dict[str, str]:
  """Returns what the origin says of the head, by which it goes back.

  Nothing where the head's arrays are not the kernel and bias of its layer.
  """
  found, name = model.state_dict(), parts.head_name
  if name is None or not {f'{name}.weight', f'{name}.bias'} <= found.keys():
    return {}
  return {'head': name}


def _head(parts) -> dict[str, np.ndarray]:
  """Returns the head's arrays; without classes where there is none."""
  if parts.kernel is None:
    return network_lib.empty_head(parts.num_features)
  return {
    'kernel': np.ascontiguousarray(parts.kernel, np.float32),
    'bias': np.ascontiguousarray(parts.bias, np.float32),
  }


def _compare(bundle, model, parts) -> dict[str, float]:
  """Returns how far the bundle is from PyTorch, see Result."""
  import torch

  images = _probes(bundle.image_shape)
  with torch.no_grad():
    x = _as_torch(images)
    map_, pooled = parts.features(x)
    wanted = {'map': map_, 'pooled': pooled, 'logits': model(x)}
  if not bundle.class_names:
    del wanted['logits']
  given, errors = {}, {}
  dtypes = list(bundle.network.backbone.features)
  for dtype in progress.watched(
    dtypes, 'comparing with PyTorch', 'programs', len(dtypes)
  ):
    backbone = bundle.network.backbone.clone(dtype=jnp.dtype(dtype))
    network = dataclasses.replace(bundle.network, backbone=backbone)
    result = jax.jit(network)(bundle.variables, images)
    given[dtype] = {
      'map': result.final,
      'pooled': result.pooled,
      'logits': result.logits,
    }
  for what, right in wanted.items():
    for dtype, found in given.items():
      name = what if dtype == 'float32' else f'{dtype} {what}'
      errors[name] = _error(found[what], right.numpy())
  return errors


def _in_training(bundle, model, parts) -> list[str]:
  """Returns a note where PyTorch does more in training than is done here.

  The features of a few images are compared, in float32.
  """
  import torch

  images = _probes(bundle.image_shape)
  buffers = {name: x.clone() for name, x in model.named_buffers()}
  try:
    with torch.no_grad(), classifier_parts.unchanged(model):
      model.train()
      wanted = [x.numpy() for x in parts.features(_as_torch(images))]
  except Exception as error:  # Of a model in a mode that it was not cut in.
    config_utils.raise_outside(error)
    wanted = []
  finally:
    for name, x in model.named_buffers():
      x.copy_(buffers[name])
  part = network_lib.part(bundle.variables, 'backbone')
  backbone = bundle.network.backbone
  features = jax.jit(
    lambda part, x: network_lib.run(backbone, part, x, train=True)[0]
  )(part, images)
  given = features.final, features.pooled
  if [x.shape for x in given] != [x.shape for x in wanted]:
    return [
      'in training PyTorch runs other modules of it than in inference; here, '
      'those of inference are trained'
    ]
  largest = np.max([_error(*pair) for pair in zip(given, wanted, strict=True)])
  if largest <= MAX_ERROR:
    return []
  return [
    f'in training its features are {largest:.1e} of the scale from those of '
    'PyTorch: what the network does there beside batch norm, such as dropout '
    'or stochastic depth, is not done here'
  ]


def _probes(image_shape) -> np.ndarray:
  """Returns some images, normalised and of no meaning."""
  shape = (classifier_parts.NUM_PROBES, *image_shape)
  return np.random.default_rng(0).standard_normal(shape, dtype=np.float32)


def _as_torch(images):
  """Returns (B, H, W, C) as PyTorch has images."""
  import torch

  return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()


def _check(errors: Mapping[str, float]) -> None:
  """Raises UserError where a bundle is further from PyTorch than rounding."""
  for what in ('map', 'pooled', 'logits'):
    if not errors.get(what, 0.0) <= MAX_ERROR:
      raise config_utils.UserError(
        f'what was traced does not compute what PyTorch does: its {what} is '
        f'{errors[what]:.1e} of the scale away, more than {MAX_ERROR:.0e}; the '
        'network cannot be converted'
      )


def _error(given, wanted) -> float:
  """Returns the largest difference, of the largest number."""
  difference = np.abs(np.asarray(given, np.float32) - wanted).max()
  return float(
    difference / max(np.abs(wanted).max(), np.finfo(np.float32).tiny)
  )
