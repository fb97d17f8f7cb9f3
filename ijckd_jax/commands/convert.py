r"""Makes a bundle of any PyTorch image classifier, by tracing it.

  ijckd convert --model timm:NAME --checkpoint FILE \
    --output DIR

The network becomes a program that JAX runs on CPUs, GPUs and TPUs, in a bundle
that teaches (config.teacher.checkpoint) or is trained further
(config.student.init_from, config.teacher.init_from). PyTorch is needed here,
and not in training: pip install 'ijckd_jax[convert]'. The model's code is
run; its weights are read without running anything.

  ijckd convert --again BUNDLE --output NEW

JAX promises to read the programs for six months. This converts such a network
once more, from the weights that its bundle holds.
"""

import argparse
import ast
from collections.abc import Sequence

from etils import epath

from ijckd_jax.commands import output_flags
from ijckd_jax.commands import pytorch_flags
from ijckd_jax.runtime import config_utils
from ijckd_jax.runtime import progress

PROG = 'python -m ijckd_jax convert'


def main(argv: Sequence[str], prog: str = PROG) -> None:
  """Runs the command."""
  flags = _parser(prog).parse_args(argv)
  output = epath.Path(flags.output)
  output_flags.check_bundle(output, flags.overwrite)
  arguments = _arguments(flags.model_args)
  if bool(flags.again) == bool(flags.model):
    raise config_utils.UserError('give --model, or --again BUNDLE')

  progress.log_to_stderr()
  if flags.again:
    _write(flags.again, _again(flags, arguments), output)
  else:
    _write(flags.model, _convert(flags, arguments), output)


def _convert(flags: argparse.Namespace, arguments: dict[str, object]):
  """Returns what the network that the flags name is converted to."""
  from ijckd_jax.pytorch import converter
  from ijckd_jax.pytorch import named_models

  given = pytorch_flags.preprocessing(flags)
  model, origin = named_models.build(flags.model, arguments)
  config, more = named_models.load_weights(model, flags.model, flags.checkpoint)
  origin |= more
  published = named_models.published(model, arguments, given, config, origin)
  if flags.model_args:
    origin['model_args'] = flags.model_args
  origin['licence'] = flags.licence or origin.get('licence') or 'not stated'
  try:
    return converter.convert(
      model,
      name=flags.name or flags.model,
      preprocessing=published.preprocessing,
      crop=published.crop,
      class_names=pytorch_flags.class_names(flags),
      usual_names=published.class_names(),
      origin=origin,
    )
  except config_utils.UserError as error:
    raise config_utils.UserError(f'{flags.model}: {error}') from error


def _again(flags: argparse.Namespace, arguments: dict[str, object]):
  """Returns what a bundle's network is, converted once more."""
  from ijckd_jax.bundles import bundles
  from ijckd_jax.models import converted
  from ijckd_jax.pytorch import converter
  from ijckd_jax.pytorch import named_models

  old = bundles.load(flags.again, trust_programs=True)
  origin = old.info.get('origin', {})
  name = origin.get('model')
  is_converted = isinstance(old.network.backbone, converted.Converted)
  if not (is_converted and old.network.connector is None and name):
    raise config_utils.UserError(
      f'{flags.again} is no bundle that ijckd convert wrote: convert the '
      'teacher that it was distilled from, and distil again'
    )
  arguments = arguments or _arguments(origin.get('model_args', ''))
  try:
    model, _ = named_models.build(name, arguments)
    return converter.again(model, old)
  except config_utils.UserError as error:
    raise config_utils.UserError(f'{flags.again}: {error}') from error


def _write(name: str, result, output: epath.Path) -> None:
  """Writes a converted network, and says what it is."""
  from ijckd_jax.bundles import bundles
  from ijckd_jax.pytorch import converter

  bundle = result.bundle
  output_flags.write(lambda: bundle.save(output), output)
  said = [name, *(f'- {note}' for note in converter.describe(result))]
  print('\n'.join(map(config_utils.printable, said)))
  counts = bundles.num_params(bundle.variables)
  print(
    f'written to {output} ({sum(counts.values()):,} parameters); a run takes '
    f'it as its teacher by --config.teacher.checkpoint={output} '
    f'--config.teacher.backbone={bundle.backbone_name}'
  )
  if bundle.network.backbone.can_be_trained:
    print(
      f'and trains it further by --config.student.init_from={output} '
      f'--config.student.backbone={bundle.backbone_name}'
    )


def _parser(prog: str) -> argparse.ArgumentParser:
  parser = config_utils.ArgumentParser(
    prog=prog,
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  parser.add_argument(
    '--again',
    type=config_utils.expand,
    metavar='BUNDLE',
    help='a bundle that this command wrote, to convert once more; give its '
    "--model_args if it does not say them. The model's code is run",
  )
  parser.add_argument(
    '--model',
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
  output_flags.add_output(parser, 'folder of the bundle')
  parser.add_argument(
    '--name', default='', help='what the bundle is called; default: the model'
  )
  parser.add_argument(
    '--licence', help='of the weights; default: what the hub says'
  )
  pytorch_flags.add_images(parser)
  output_flags.add_overwrite(parser)
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
