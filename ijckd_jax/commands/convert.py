r"""Makes a teacher of any PyTorch image classifier, by tracing it.

  ijckd convert --model timm:NAME --checkpoint FILE \
    --output DIR

The network becomes a program that JAX runs on CPUs, GPUs and TPUs, in a bundle
that config.teacher.checkpoint takes. PyTorch is needed here, and no more when
the teacher teaches: pip install 'ijckd_jax[convert]'. The model's code is run;
its weights are read without running anything.
"""

import argparse
import ast
from collections.abc import Sequence
import difflib

from etils import epath

from ijckd_jax.commands import pytorch_flags
from ijckd_jax.runtime import config_utils

PROG = 'python -m ijckd_jax convert'
TIMM = 'timm:'


def main(argv: Sequence[str], prog: str = PROG) -> None:
  """Runs the command."""
  flags = _parser(prog).parse_args(argv)
  output = epath.Path(flags.output)
  pytorch_flags.check_free(output, flags.overwrite)
  if output.exists():
    pytorch_flags.check_only_bundle(output)
  arguments = _arguments(flags.model_args)

  from ijckd_jax.bundles import bundles
  from ijckd_jax.pytorch import converter

  given = pytorch_flags.preprocessing(flags)
  model, origin = _model(flags.model, arguments)
  own, more = _load_weights(model, flags)
  try:
    result = converter.convert(
      model,
      name=flags.name or flags.model,
      preprocessing=_preprocessing(given, own, model, flags),
      class_names=pytorch_flags.class_names(flags),
      origin=_origin({**origin, **more}, flags),
    )
  except config_utils.UserError as error:
    raise config_utils.UserError(f'{flags.model}: {error}') from error
  bundle = result.bundle
  pytorch_flags.write(lambda: bundle.save(output), output)
  said = [flags.model, *(f'- {note}' for note in _notes(result))]
  print('\n'.join(map(config_utils.printable, said)))
  counts = bundles.num_params(bundle.variables)
  print(
    f'written to {output} ({sum(counts.values()):,} parameters); a run takes '
    f'it by --config.teacher.checkpoint={output} '
    f'--config.teacher.backbone={bundle.backbone_name}'
  )


def _parser(prog: str) -> argparse.ArgumentParser:
  parser = config_utils.ArgumentParser(
    prog=prog,
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  parser.add_argument(
    '--model',
    required=True,
    help='timm:NAME, or module:attribute, a torch.nn.Module or what makes one; '
    'it is imported, and its code runs',
  )
  parser.add_argument(
    '--model_args',
    default='',
    help='what it is made with: num_classes=10,img_size=32',
  )
  parser.add_argument(
    '--checkpoint',
    type=config_utils.expand,
    help='a file with its weights, or hf:OWNER/NAME@COMMIT; a module:attribute '
    'may bring its own',
  )
  parser.add_argument(
    '--output',
    type=config_utils.expand,
    required=True,
    help='folder of the bundle',
  )
  parser.add_argument(
    '--name', default='', help='what the bundle is called; default: the model'
  )
  parser.add_argument(
    '--licence', help='of the weights; default: what the hub says'
  )
  pytorch_flags.add_images(parser)
  parser.add_argument(
    '--overwrite', action='store_true', help='replace what is there'
  )
  return parser


def _arguments(text: str) -> dict[str, object]:
  """Returns `key=value,key=value` with values as Python writes them."""
  try:
    call = ast.parse(f'f({text})', mode='eval').body
    if call.args or any(keyword.arg is None for keyword in call.keywords):
      raise ValueError('not key=value')
    return {
      keyword.arg: ast.literal_eval(keyword.value) for keyword in call.keywords
    }
  except (SyntaxError, ValueError) as error:
    raise config_utils.UserError(
      f'--model_args {text!r}: give key=value,key=value, with names in quotes '
      "(global_pool='avg')"
    ) from error


def _model(name: str, arguments: dict[str, object]):
  """Returns the module of that name, and what is known of it."""
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
  try:
    return factory(**arguments)
  except Exception as error:  # The code may be anyone's.
    config_utils.raise_outside(error)
    raise config_utils.UserError(
      f'{name} cannot be made with {arguments}: {config_utils.short(error)}'
    ) from error


def _load_weights(model, flags):
  """Loads the checkpoint; returns its word on images, and on its origin."""
  from ijckd_jax.pytorch import hub
  from ijckd_jax.pytorch import published_weights
  from ijckd_jax.pytorch import state_dicts

  source = flags.checkpoint
  if source is None:
    if flags.model.startswith(TIMM):
      raise config_utils.UserError(
        f'{flags.model} starts at random: give its weights by --checkpoint'
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


def _preprocessing(given, own, model, flags):
  """Returns how images are prepared: as said, as published, as timm says.

  Raises:
    config_utils.UserError: nobody says it.
  """
  from ijckd_jax.pytorch import published_weights

  known = published_weights.PREPROCESSING
  if isinstance(given, str):
    if given not in known:
      raise config_utils.unknown('preprocessing', given, list(known))
    return known[given]
  if given is not None or own is not None:
    return given or own
  config = getattr(model, 'pretrained_cfg', None)
  made = None
  if flags.model.startswith(TIMM) and config:
    made = published_weights.timm_preprocessing(
      flags.model, {'pretrained_cfg': config}
    )
  if made is None:
    raise config_utils.UserError(
      f'how the images of {flags.model} are prepared is not known: give '
      '--mean, --std and --image_size, or --preprocessing with one of '
      f'{", ".join(known)}'
    )
  return made


def _origin(origin, flags) -> dict[str, str]:
  """Returns an origin with the licence that was stated."""
  licence = flags.licence or origin.get('licence')
  return {**origin, 'licence': licence or 'not stated'}


def _notes(result) -> list[str]:
  """Returns in sentences what was converted."""
  bundle, network = result.bundle, result.bundle.network
  head = f'a head of {len(bundle.class_names)} classes'
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
    f'images {shape}: mean {made.mean}, std {made.std}, {made.interpolation}',
    f'map {signs[network.signed]}, pooled features '
    f'{signs[network.pooled_signed]}; pool: {pool}',
    'from PyTorch, of the scale: '
    + ', '.join(f'{what} {error:.1e}' for what, error in result.errors.items()),
    f'programs for {", ".join(platforms)}: {sizes}',
  ]
