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
from ijckd_jax.distillation import converted
from ijckd_jax.distillation import network as network_lib
from ijckd_jax.distillation import teachers
from ijckd_jax.models import programs as programs_lib
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

  def run(images):
    x = images.permute(0, 3, 1, 2)
    if parts.pools_map:
      return parts.final(x)
    return parts.final(x), parts.pooled(x)

  logger.info('%s: tracing it, to write it as programs', name)
  traced = tracing.trace(model, run, image_shape)
  features, notes = {'float32': traced.export(image_shape)}, []
  try:
    dtype = jnp.bfloat16
    features['bfloat16'] = traced.export(image_shape, dtype=dtype)
  except config_utils.UserError as error:  # Some operators know none.
    notes.append(f'no program in bfloat16: {error}')
  pool, pool_name, pool_arrays = _pool(model, parts)
  network = converted.Converted(
    features=core.FrozenDict(features),
    pool=pool,
    preprocessing=preprocessing,
    signed=parts.signed,
    pooled_signed=parts.pooled_signed,
    pools_map=parts.pools_map,
    buffers=tuple(sorted(traced.arrays.keys() - traced.trainable)),
  )
  variables = {
    kind: {'backbone': arrays} for kind, arrays in _by_kind(traced).items()
  }
  variables['pool'] = pool_arrays
  variables['params']['head'] = _head(parts, network)
  bundle = bundles.Bundle(
    network=network,
    variables=variables,
    backbone_name=name,
    pool_name=pool_name,
    image_shape=image_shape,
    class_names=names,
    info={'origin': {**origin, **versions()}},
    crop=crop,
  )
  errors = _compare(bundle, model, parts)
  _check(errors)
  return Result(bundle, errors, [f'cut by {parts.how}', *notes])


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
  arrays |= old.variables['pool'].get('params', {})
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


def _pool(model, parts) -> tuple[Any, str, dict[str, Any]]:
  """Returns the pool, its name in the bundle, and its arrays."""
  if parts.pool is None:
    return teachers.average_pool, 'average', {}
  traced = tracing.trace(model, parts.pool, parts.pool_takes)
  # A student is trained through it.
  pool = programs_lib.Pool(traced.export(parts.pool_takes, vjp_order=1))
  arrays = {'params': traced.arrays} if traced.arrays else {}
  return pool, programs_lib.PROGRAM, arrays


def _by_kind(traced) -> dict[str, dict[str, np.ndarray]]:
  """Returns the trainable arrays as 'params', the others as 'batch_stats'."""
  kinds = {'params': {}, 'batch_stats': {}}
  for key, array in traced.arrays.items():
    kind = 'params' if key in traced.trainable else 'batch_stats'
    kinds[kind][key] = array
  return kinds


def _head(parts, network) -> dict[str, np.ndarray]:
  """Returns the head's arrays; without classes where there is none."""
  if parts.kernel is not None:
    return {
      'kernel': np.ascontiguousarray(parts.kernel, np.float32),
      'bias': np.ascontiguousarray(parts.bias, np.float32),
    }
  width = network.shapes(0)['params']['head']['kernel'].shape[0]
  return network_lib.empty_head(width)


def _compare(bundle, model, parts) -> dict[str, float]:
  """Returns how far the bundle is from PyTorch, see Result."""
  import torch

  images = np.random.default_rng(0).standard_normal(
    (classifier_parts.NUM_PROBES, *bundle.image_shape), dtype=np.float32
  )
  with torch.no_grad():
    x = torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()
    wanted = {'map': parts.final(x), 'logits': model(x)}
    average = wanted['map'].mean(dim=(1, 2))
    if parts.pooled is not None:
      wanted['pooled'] = parts.pooled(x)
    elif parts.pool is not None:
      is_map = len(parts.pool_takes) == 3
      wanted['pooled'] = parts.pool(wanted['map'] if is_map else average)
    else:
      wanted['pooled'] = average
  if not bundle.class_names:
    del wanted['logits']
  given, errors = {}, {}
  dtypes = list(bundle.network.features)
  for dtype in progress.watched(
    dtypes, 'comparing with PyTorch', 'programs', len(dtypes)
  ):
    network = dataclasses.replace(bundle.network, dtype=jnp.dtype(dtype))
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
