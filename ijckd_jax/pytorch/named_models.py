"""PyTorch's networks by name, with their weights and their preprocessing.

The code of a network is run; its weights are read without running anything.
"""

from collections.abc import Mapping
import difflib
from typing import Any

from etils import epath

from ijckd_jax.data import augment
from ijckd_jax.pytorch import hub
from ijckd_jax.pytorch import published_weights
from ijckd_jax.pytorch import state_dicts
from ijckd_jax.runtime import config_utils

TIMM = 'timm:'


def build(
  name: str, arguments: Mapping[str, object]
) -> tuple[Any, dict[str, str]]:
  """Returns the torch.nn.Module of a name, and its origin.

  Args:
    name: `timm:NAME`, or `module:attribute` of a torch.nn.Module or of a
      function that makes one. It is imported, and its code runs.
    arguments: of the function.

  Raises:
    config_utils.UserError: there is no such network, or no PyTorch.
  """
  try:
    import torch
  except ImportError as error:
    raise config_utils.UserError(
      f"converting takes PyTorch: pip install 'ijckd_jax[convert]' ({error})"
    ) from error
  if name.startswith(TIMM):
    return _timm_model(name, arguments)
  found = config_utils.resolve('model', name, {})
  if not isinstance(found, torch.nn.Module) and callable(found):
    found = _call(found, name, arguments)
  elif arguments:
    raise config_utils.UserError(
      f'--model_args: {name} is not made, but there; it takes none'
    )
  if not isinstance(found, torch.nn.Module):
    raise config_utils.UserError(
      f'{name} gives a {type(found).__name__}, not a torch.nn.Module'
    )
  return found, {'model': name}


def _timm_model(name, arguments):
  try:
    import timm
  except ImportError as error:
    raise config_utils.UserError(
      f"{name} takes timm: pip install 'ijckd_jax[convert]' ({error})"
    ) from error
  wanted = name.removeprefix(TIMM)
  if not timm.is_model(wanted):
    near = difflib.get_close_matches(wanted, timm.list_models(), n=5)
    raise config_utils.UserError(
      f'timm {timm.__version__} has no model {wanted!r}'
      + (f'; it has {", ".join(near)}' if near else '')
      + ' (timm.list_models() names all)'
    )
  model = _call(timm.create_model, name, {'model_name': wanted, **arguments})
  return model, {'model': name, 'timm': timm.__version__}


def _call(factory, name, arguments):
  """Returns what a factory makes; its errors are the user's."""
  with config_utils.blame(f'{name} cannot be made with {arguments}'):
    return factory(**arguments)


def load_weights(
  model: Any, name: str, source: str | None
) -> tuple[augment.Preprocessing | None, dict[str, Any]]:
  """Loads a checkpoint into a network, and returns what the checkpoint says.

  Args:
    model: torch.nn.Module, is changed.
    name: see `build`.
    source: a file, or hf:OWNER/NAME@COMMIT; None to keep the weights that a
      `module:attribute` brings.

  Returns:
    How images are prepared, None where nothing says it; and the origin of the
    weights.

  Raises:
    config_utils.UserError: there are no weights, or they do not fit.
  """
  if source is None:
    if name.startswith(TIMM):
      raise config_utils.UserError(
        f'{name} starts at random: give its weights by --checkpoint'
      )
    return None, {}
  preprocessing, path = None, source
  if source.startswith(hub.PREFIX):
    found = hub.download(source)
    if 'model.safetensors' not in found.files:
      raise config_utils.UserError(f'{source} has no model.safetensors')
    path = found.files['model.safetensors']
    preprocessing = published_weights.timm_preprocessing(
      found.repo, found.config
    )
    origin = {'hub': found.repo, 'revision': found.revision}
    origin['licence'] = found.licence
  else:
    origin = {'file': epath.Path(source).name}
  state = state_dicts.read(path)
  state_dicts.load_into(model, state, str(source))
  return preprocessing, {**origin, 'sha256': state.sha256}


def preprocessing(
  model: Any,
  name: str,
  given: str | augment.Preprocessing | None,
  published: augment.Preprocessing | None,
) -> augment.Preprocessing:
  """Returns how images are prepared: as given, as published, as timm says.

  Args:
    model: torch.nn.Module.
    name: see `build`.
    given: key of published_weights.PREPROCESSING, or one itself, or None.
    published: as `load_weights` returns it.

  Raises:
    config_utils.UserError: nothing says it.
  """
  known = published_weights.PREPROCESSING
  if isinstance(given, str):
    if given not in known:
      raise config_utils.unknown('preprocessing', given, list(known))
    return known[given]
  if given is not None or published is not None:
    return given or published
  config = getattr(model, 'pretrained_cfg', None)
  made = None
  if name.startswith(TIMM) and config:
    made = published_weights.timm_preprocessing(
      name, {'pretrained_cfg': config}
    )
  if made is None:
    raise config_utils.UserError(
      f'how the images of {name} are prepared is not known: give '
      '--mean, --std and --image_size, or --preprocessing with one of '
      f'{", ".join(known)}'
    )
  return made
