"""PyTorch's networks by name, with their weights and their preprocessing.

The code of a network is run; its weights are read without running anything.
"""

from collections.abc import Mapping
import contextlib
import difflib
from typing import Any

from etils import epath

from ijckd_jax.pytorch import hub
from ijckd_jax.pytorch import published_weights
from ijckd_jax.pytorch import state_dicts
from ijckd_jax.runtime import config_utils

TIMM = 'timm:'
TORCHVISION = 'torchvision.models'


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
  # torchvision, which timm imports, may not fit torch, in many ways.
  except Exception as error:
    config_utils.raise_outside(error)
    raise config_utils.UserError(
      f'{name} takes timm, which cannot be imported ({error}): pip install '
      "'ijckd_jax[convert]' installs it, with a torch and a torchvision that "
      'fit each other'
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
) -> tuple[dict[str, Any], dict[str, Any]]:
  """Loads a checkpoint into a network, and returns what the checkpoint says.

  Args:
    model: torch.nn.Module, is changed.
    name: see `build`.
    source: a file, or hf:OWNER/NAME@COMMIT; None to keep the weights that a
      `module:attribute` brings.

  Returns:
    What the hub's config.json says, {} without one; and the origin of the
    weights.

  Raises:
    config_utils.UserError: there are no weights, or they do not fit.
  """
  if source is None:
    if name.startswith(TIMM):
      raise config_utils.UserError(
        f'{name} starts at random: give its weights by --checkpoint'
      )
    return {}, {}
  config, path = {}, source
  if source.startswith(hub.PREFIX):
    found = hub.download(source)
    if 'model.safetensors' not in found.files:
      raise config_utils.UserError(f'{source} has no model.safetensors')
    path = found.files['model.safetensors']
    config = found.config
    origin = {'hub': found.repo, 'revision': found.revision}
    origin['licence'] = found.licence
  else:
    origin = {'file': epath.Path(source).name}
  state = state_dicts.read(path)
  state_dicts.load_into(model, state, str(source))
  return config, {**origin, 'sha256': state.sha256}


def published(
  model: Any,
  arguments: Mapping[str, object],
  given: str | published_weights.Published | None,
  config: Mapping[str, Any],
  origin: Mapping[str, Any],
) -> published_weights.Published:
  """Returns what is known of a network: as given, or as published.

  Args:
    model: torch.nn.Module.
    arguments: with which it was made.
    given: key of published_weights.PREPROCESSING, or a value as there, or None.
    config: as `load_weights` returns it.
    origin: as `build` and `load_weights` return it, together.

  Raises:
    config_utils.UserError: nothing says how its images are prepared.
  """
  known, name = published_weights.PREPROCESSING, origin['model']
  if isinstance(given, str):
    if given not in known:
      raise config_utils.unknown('preprocessing', given, list(known))
    return known[given]
  if given is not None:
    return given
  found = published_weights.of_timm(origin.get('hub', name), config)
  if found is None and name.startswith(TIMM):
    own = getattr(model, 'pretrained_cfg', None)
    found = published_weights.of_timm(name, {'pretrained_cfg': own})
  if found is None and name.startswith(TORCHVISION):
    weights = _torchvision_weights(name, arguments, origin)
    found = weights and published_weights.of_torchvision(weights)
  if found is None:
    raise config_utils.UserError(
      f'how the images of {name} are prepared is not known: give '
      '--mean, --std and --image_size, or --preprocessing with one of '
      f'{", ".join(known)}'
    )
  return found


def _torchvision_weights(name, arguments, origin):
  """Returns which of torchvision's weights a network has; None: of others.

  They are told by the argument that names them, or by the start of their
  SHA-256, which ends the name of their file.
  """
  from torchvision import models

  with contextlib.suppress(ValueError):
    every = models.get_model_weights(name.partition(':')[2])
    if arguments.get('weights') and 'sha256' not in origin:
      return every.verify(arguments['weights'])
    for weights in every:
      start = weights.url.rpartition('-')[2].removesuffix('.pth')
      if origin.get('sha256', '').startswith(start):
        return weights
  return None
