"""Brings PyTorch's weights here as a bundle, and a bundle's back to PyTorch.

  ijckd weights import --checkpoint FILE --output DIR
  ijckd weights export --bundle DIR --output FILE

A run takes an imported bundle by --config.teacher.checkpoint=DIR, where its
config names the same backbone (--config.teacher.backbone=NAME).
Files that torch.save wrote need PyTorch (the extra `torch`) to be read, and
nothing in them is executed; .safetensors files do not.
"""

# More than 120 lines, because `weights` is two commands, each with its flags.

import argparse
from collections.abc import Sequence

from etils import epath

from ijckd_jax.commands import output_flags
from ijckd_jax.commands import pytorch_flags
from ijckd_jax.runtime import config_utils

PROG = 'python -m ijckd_jax weights'
# What the module of a student imports, or whoever loads it.
SHADOWED = ('collections', 'safetensors', 'torch')


def main(argv: Sequence[str], prog: str = PROG) -> None:
  """Runs the command."""
  flags = _parser(prog).parse_args(argv)
  if flags.command == 'import':
    _import(flags)
  else:
    _export(flags)


def _parser(prog: str) -> argparse.ArgumentParser:
  parser = config_utils.ArgumentParser(
    prog=prog,
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  commands = parser.add_subparsers(
    dest='command', required=True, parser_class=config_utils.ArgumentParser
  )
  reader = commands.add_parser('import', help='PyTorch to a bundle')
  reader.add_argument(
    '--checkpoint',
    type=config_utils.expand,
    required=True,
    help='a file, or hf:OWNER/NAME@COMMIT',
  )
  output_flags.add_output(reader, 'folder of the bundle')
  reader.add_argument(
    '--backbone', default='', help='default: told by the names in the file'
  )
  reader.add_argument(
    '--num_classes', type=int, default=0, help='default: as the head has'
  )
  reader.add_argument(
    '--part',
    default='',
    metavar='KEY',
    help='of a file that holds several networks, or the moving average of one: '
    'its key in the file, such as student, teacher or state_dict_ema',
  )
  pytorch_flags.add_images(reader)
  reader.add_argument(
    '--teacher', help="bundle whose head a SimKD student's is"
  )
  writer = commands.add_parser('export', help='a bundle to PyTorch')
  writer.add_argument(
    '--bundle', required=True, help='folder of a bundle, or of a finished run'
  )
  output_flags.add_output(writer, 'FILE.safetensors or FILE.pth')
  for command in (reader, writer):
    command.add_argument(
      '--trust_code',
      action='store_true',
      help='a bundle may name code outside the package, which is imported',
    )
    output_flags.add_overwrite(command)
  return parser


def _import(flags: argparse.Namespace) -> None:
  """Writes the bundle of a PyTorch file, and prints what it took."""
  output = epath.Path(flags.output)
  output_flags.check_bundle(output, flags.overwrite)

  from ijckd_jax.bundles import bundles
  from ijckd_jax.pytorch import importer

  request = importer.Request(
    backbone=flags.backbone,
    num_classes=flags.num_classes,
    preprocessing=pytorch_flags.preprocessing(flags),
    class_names=pytorch_flags.class_names(flags),
    teacher=bundles.load(flags.teacher, trust_code=flags.trust_code)
    if flags.teacher
    else None,
    trust_code=flags.trust_code,
  )
  bundle, notes = importer.read(flags.checkpoint, request, part=flags.part)
  output_flags.write(lambda: bundle.save(output), output)
  said = [flags.checkpoint, *(f'- {note}' for note in notes)]
  print('\n'.join(map(config_utils.printable, said)))
  print(
    f'written to {output}; a run takes it by --config.teacher.checkpoint='
    f'{output} --config.teacher.backbone={bundle.backbone_name}'
  )


def _export(flags: argparse.Namespace) -> None:
  """Writes a bundle's state dict, and a module where none is published."""
  output = epath.Path(flags.output)

  from ijckd_jax.bundles import bundles
  from ijckd_jax.pytorch import published_names
  from ijckd_jax.pytorch import state_dicts
  from ijckd_jax.runtime import disk

  state_dicts.check_suffix(output)
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
    output_flags.check_free(path, flags.overwrite)
  state = published_names.state_dict(bundle)
  text = ''
  if connected:
    text = published_names.module_source(bundle, suffix=output.suffix)
  metadata = published_names.metadata(bundle)

  def write():
    output.parent.mkdir(parents=True, exist_ok=True)
    state_dicts.write(output, state, metadata, wrap=connected)

  output_flags.write(write, output)
  print(f'{output}: {len(state)} arrays of a {bundle.backbone_name}')
  if bundle.network.programs:
    print(
      f'a module that is made for {len(bundle.class_names)} classes loads them '
      'by load_state_dict(arrays, strict=False)'
    )
  if connected:
    output_flags.write(lambda: disk.write_text(module, text), module)
    print(f'{module}: the module that runs them, with PyTorch alone')
