"""Brings PyTorch's weights here as a bundle, and a bundle's back to PyTorch.

  python -m ijckd_jax.torch_weights import --checkpoint FILE --output DIR
  python -m ijckd_jax.torch_weights export --bundle DIR --output FILE

A run takes an imported bundle by --config.teacher.checkpoint=DIR, where its
config names the same backbone (--config.teacher.backbone=NAME).
Files that torch.save wrote need PyTorch (the extra `torch`) to be read, and
nothing in them is executed; .safetensors files do not.
"""

import argparse
from collections.abc import Sequence
import math

from etils import epath

from ijckd_jax import config_utils

PROG = 'python -m ijckd_jax.torch_weights'
# What the module of a student imports, or whoever loads it.
SHADOWED = ('collections', 'safetensors', 'torch')


def main(argv: Sequence[str]) -> None:
  """Runs the command."""
  flags = _parser().parse_args(argv)
  if flags.command == 'import':
    _import(flags)
  else:
    _export(flags)


def _parser() -> argparse.ArgumentParser:
  parser = config_utils.ArgumentParser(
    prog=PROG,
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  commands = parser.add_subparsers(
    dest='command', required=True, parser_class=config_utils.ArgumentParser
  )
  reader = commands.add_parser('import', help='PyTorch to a bundle')
  reader.add_argument(
    '--checkpoint', required=True, help='a file, or hf:OWNER/NAME@COMMIT'
  )
  reader.add_argument('--output', required=True, help='folder of the bundle')
  reader.add_argument(
    '--backbone', default='', help='default: told by the names in the file'
  )
  reader.add_argument(
    '--num_classes', type=int, default=0, help='default: as the head has'
  )
  reader.add_argument(
    '--part',
    default='',
    choices=('student', 'teacher'),
    help='of a file that holds both',
  )
  reader.add_argument(
    '--preprocessing',
    help='a name such as cifar100 or imagenet; default: the usual one',
  )
  reader.add_argument('--mean', help='of pixels in [0, 1], by commas')
  reader.add_argument('--std', help='likewise')
  reader.add_argument('--image_size', type=int, help='side in pixels')
  reader.add_argument('--interpolation', help='bilinear (default) or bicubic')
  reader.add_argument('--class_names', help='a file with a name a line')
  reader.add_argument(
    '--teacher', help="bundle whose head a SimKD student's is"
  )
  writer = commands.add_parser('export', help='a bundle to PyTorch')
  writer.add_argument(
    '--bundle', required=True, help='folder of a bundle, or of a finished run'
  )
  writer.add_argument(
    '--output', required=True, help='FILE.safetensors or FILE.pth'
  )
  for command in (reader, writer):
    command.add_argument(
      '--trust_code',
      action='store_true',
      help='a bundle may name code outside the package, which is imported',
    )
    command.add_argument(
      '--overwrite', action='store_true', help='replace what is there'
    )
  return parser


def _import(flags: argparse.Namespace) -> None:
  """Writes the bundle of a PyTorch file, and prints what it took."""
  output = epath.Path(flags.output)
  _check_free(output, flags.overwrite)

  from ijckd_jax import bundles
  from ijckd_jax import torch_import

  if output.exists():
    _check_only_bundle(output)
  request = torch_import.Request(
    backbone=flags.backbone,
    num_classes=flags.num_classes,
    preprocessing=_preprocessing(flags),
    class_names=_class_names(flags.class_names),
    teacher=bundles.load(flags.teacher) if flags.teacher else None,
    trust_code=flags.trust_code,
  )
  bundle, notes = torch_import.read(flags.checkpoint, request, part=flags.part)
  _write(lambda: bundle.save(output), output)
  print('\n'.join([str(flags.checkpoint), *(f'- {note}' for note in notes)]))
  print(
    f'written to {output}; a run takes it by --config.teacher.checkpoint='
    f'{output} --config.teacher.backbone={bundle.backbone_name}'
  )


def _export(flags: argparse.Namespace) -> None:
  """Writes a bundle's state dict, and a module where none is published."""
  output = epath.Path(flags.output)

  from ijckd_jax import bundles
  from ijckd_jax import torch_files
  from ijckd_jax import torch_names
  from ijckd_jax import workdirs

  torch_files.check_suffix(output)
  bundle = bundles.load(flags.bundle, trust_code=flags.trust_code)
  if output.parent.resolve() == bundles.find(flags.bundle).resolve():
    raise config_utils.UserError(
      f'{output} is inside of the bundle: give another --output'
    )
  connected = bundle.network.connector is not None
  module = output.with_suffix('.py')
  if connected and module.stem in SHADOWED:
    raise config_utils.UserError(
      f'{module} would be imported in place of {module.stem}: give another '
      '--output'
    )
  for path in [output, *([module] if connected else [])]:
    _check_free(path, flags.overwrite)
  state = torch_names.state_dict(bundle)
  text = ''
  if connected:
    text = torch_names.module_source(bundle, suffix=output.suffix)
  metadata = torch_names.metadata(bundle)

  def write():
    output.parent.mkdir(parents=True, exist_ok=True)
    torch_files.write(output, state, metadata, wrap=connected)

  _write(write, output)
  print(f'{output}: {len(state)} arrays of a {bundle.backbone_name}')
  if connected:
    _write(lambda: workdirs.write_text(module, text), module)
    print(f'{module}: the module that runs them, with PyTorch alone')


def _check_free(path, overwrite) -> None:
  """Raises where something is in the way."""
  if path.exists() and not overwrite:
    raise config_utils.UserError(
      f'{path} is already there: give --overwrite to replace it'
    )


def _check_only_bundle(folder) -> None:
  """Raises where a folder that is to be replaced holds more than a bundle."""
  from ijckd_jax import bundles

  known = (bundles.SPEC_FILE, bundles.ARRAYS_FILE)
  there = [path.name for path in folder.iterdir()] if folder.is_dir() else ['']
  foreign = [name for name in there if name not in known]
  if foreign or bundles.SPEC_FILE not in there:
    what = f' (it has {foreign[0]})' if foreign and foreign[0] else ''
    raise config_utils.UserError(
      f'{folder} is no bundle alone{what}, so it is not replaced: give another '
      '--output'
    )


def _write(save, path) -> None:
  """Calls `save`; a disk that cannot be written is the user's to mend."""
  try:
    save()
  except OSError as error:
    raise config_utils.UserError(f'cannot write {path}: {error}') from error


def _preprocessing(flags):
  """Returns what the flags say of how images are prepared; None: nothing."""
  own = (flags.mean, flags.std, flags.image_size)
  if all(given is None for given in (*own, flags.interpolation)):
    return flags.preprocessing
  if flags.preprocessing:
    raise config_utils.UserError(
      'give --preprocessing, or --mean, --std and --image_size, not both'
    )
  if any(given is None for given in own):
    raise config_utils.UserError('--mean, --std and --image_size go together')

  from ijckd_jax import augment

  mean, std = (
    _numbers(name, text)
    for name, text in (('mean', flags.mean), ('std', flags.std))
  )
  if not min(std) > 0:
    raise config_utils.UserError(f'--std {flags.std}: it must be positive')
  config_utils.check_positive('--image_size', flags.image_size)
  interpolation = flags.interpolation or 'bilinear'
  if interpolation not in augment.INTERPOLATIONS:
    raise config_utils.unknown(
      'interpolation', interpolation, augment.INTERPOLATIONS
    )
  return augment.Preprocessing(
    mean, std, (flags.image_size, flags.image_size), interpolation
  )


def _numbers(name: str, text: str) -> tuple[float, ...]:
  try:
    numbers = tuple(map(float, text.split(',')))
  except ValueError:
    numbers = ()
  if not (numbers and all(map(math.isfinite, numbers))):
    raise config_utils.UserError(
      f'--{name} {text}: give a number for each channel, by commas'
    )
  return numbers


def _class_names(path) -> tuple[str, ...]:
  """Returns the lines of a file."""
  if path is None:
    return ()
  try:
    lines = epath.Path(path).read_text().splitlines()
  except (OSError, UnicodeDecodeError) as error:
    raise config_utils.UserError(
      f'--class_names {path} cannot be read: {error}'
    ) from error
  names = tuple(line.strip() for line in lines if line.strip())
  if not names:
    raise config_utils.UserError(f'--class_names {path} is empty')
  return names


if __name__ == '__main__':
  config_utils.run_command(main)
