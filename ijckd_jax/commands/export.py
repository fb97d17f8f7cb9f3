"""Writes a student as a file that runs without this package.

  ijckd export --bundle DIR --format onnx --output student.onnx

Backbone, connector, pool, head and preprocessing become one function: images
in, logits and probabilities out, for any number of images. Before anything is
written, the file's own runtime is compared with JAX on test images, or on
--pictures; what was found stands in OUTPUT.json.
"""

# More than 120 lines: many flags are read, and checked before JAX is loaded.

import argparse
import dataclasses
import json
import os
import pathlib

from ijckd_jax.commands import bundle_flags
from ijckd_jax.commands import output_flags
from ijckd_jax.runtime import config_utils

PROG = 'python -m ijckd_jax export'
# As ENCODERS of deploy/exports.py has them.
FORMATS = ('onnx', 'stablehlo', 'safetensors', 'web')
# What the folder of a page holds.
PAGE = frozenset(
  'index.html page.js pixels.js models.json export.json student.onnx '
  'teacher.onnx onnxruntime'.split()
)
WEIGHTS = ('float32', 'float16', 'int8')


def main(argv: list[str], prog: str = PROG) -> None:
  """Runs the command."""
  flags = _parser(prog).parse_args(argv)
  output = pathlib.Path(flags.output)
  _check_flags(flags, output)

  import jax
  import jax.numpy as jnp

  from ijckd_jax.bundles import bundles
  from ijckd_jax.deploy import checks
  from ijckd_jax.deploy import exports
  from ijckd_jax.deploy import pictures
  from ijckd_jax.runtime import compilation_cache

  # Products of float32 are rounded on GPUs and TPUs, by more than the check
  # allows.
  jax.config.update('jax_platforms', 'cpu')
  if flags.format in ('onnx', 'web'):
    from ijckd_jax.deploy import onnx_files

    onnx_files.require()
  if flags.format == 'web':
    from ijckd_jax.deploy import web

    runtime = web.runtime()
  paths = pictures.find(flags.pictures)
  compilation_cache.enable(compilation_cache.DEFAULT)
  roles = {'student': flags.bundle}
  if flags.teacher:
    roles['teacher'] = flags.teacher
  loaded = {
    role: bundles.load(path, dtype=jnp.float32, trust_code=flags.trust_code)
    for role, path in roles.items()
  }
  names = [field.name for field in dataclasses.fields(exports.Settings)]
  settings = exports.Settings(**{name: getattr(flags, name) for name in names})
  if paths:
    settings = dataclasses.replace(settings, split='pictures')
    examples = {
      role: (_of_pictures(paths, bundle, flags.check_images), iter(()))
      for role, bundle in loaded.items()
    }
  else:
    examples = _of_dataset(loaded, flags)
  made = {
    role: exports.export(bundle, *examples[role], settings)
    for role, bundle in loaded.items()
  }
  if flags.format == 'web':
    models = [
      web.Model(role, data, about['metadata'])
      for role, (data, about) in made.items()
    ]
    abouts = {role: about for role, (_, about) in made.items()}
    output_flags.write(
      lambda: web.write(output, models, runtime, abouts), output
    )
    print(f'python -m http.server --directory {output}    shows it')
  else:
    ((data, about),) = made.values()
    output_flags.write(lambda: _write(output, data, about), output)
  for role, (_, about) in made.items():
    where = f'{output}/{role}.onnx' if flags.format == 'web' else output
    said = about['metadata']['description']
    print(f'{where}: {said}, {about["bytes"]:,} bytes')
    print(checks.describe(about['check']))


def _parser(prog: str) -> argparse.ArgumentParser:
  parser = config_utils.ArgumentParser(
    prog=prog,
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  bundle_flags.add_data_flags(parser)
  parser.add_argument('--format', required=True, choices=FORMATS)
  output_flags.add_output(parser, 'the file to write; for web, the folder')
  parser.add_argument(
    '--teacher', help='bundle or run that the page of web shows beside it'
  )
  parser.add_argument(
    '--input',
    default='uint8',
    choices=('uint8', 'float32'),
    help='images as pixels from 0 to 255, or from 0 to 1',
  )
  parser.add_argument(
    '--weights',
    default='float32',
    choices=WEIGHTS,
    help='how they are stored; with int8, which is for onnx, it also computes '
    'so',
  )
  parser.add_argument(
    '--split',
    default='test',
    choices=('train', 'validation', 'test'),
    help='whose images the file is checked on',
  )
  parser.add_argument(
    '--check_images', type=int, default=1000, help='how many of them'
  )
  parser.add_argument(
    '--pictures',
    nargs='+',
    default=[],
    metavar='PICTURE',
    help='files, folders or globs of pictures without labels, to check the '
    'file on in place of a data set',
  )
  parser.add_argument(
    '--calibration_images',
    type=int,
    default=512,
    help='training images that tell the ranges for int8',
  )
  parser.add_argument(
    '--max_drop',
    type=float,
    default=0.02,
    help='part of the images that int8 may cost',
  )
  output_flags.add_overwrite(parser)
  return parser


def _check_flags(flags, output: pathlib.Path) -> None:
  """Raises where the flags do not go together, or something is in the way."""
  if flags.weights == 'int8' and flags.format not in ('onnx', 'web'):
    raise config_utils.UserError(
      f'--weights int8 is for --format onnx or web, not for {flags.format}'
    )
  if flags.pictures and (flags.dataset or flags.dataset_fields):
    raise config_utils.UserError('give --pictures or --dataset, not both')
  if flags.pictures and flags.weights == 'int8':
    raise config_utils.UserError(
      '--weights int8 tells its ranges by training images, which --pictures '
      'are not: give --dataset, or other --weights'
    )
  if flags.teacher and flags.format != 'web':
    raise config_utils.UserError(
      '--teacher is for --format web; elsewhere, export it as --bundle'
    )
  for name in ('check_images', 'calibration_images'):
    config_utils.check_positive(f'--{name}', getattr(flags, name))
  if flags.format == 'web':
    _check_folder(output, flags.overwrite)
    return
  if output.is_dir():
    raise config_utils.UserError(f'--output {output} is a folder: name a file')
  for path in (output, _beside(output)):
    output_flags.check_free(path, flags.overwrite)


def _check_folder(folder: pathlib.Path, overwrite: bool) -> None:
  """Raises unless a page can be written there, and nothing else is lost."""
  if folder.exists():
    there = set(os.listdir(folder)) if folder.is_dir() else set()
    if 'models.json' not in there or there - PAGE:
      raise config_utils.UserError(
        f'{folder} is there, and is no page of this command alone: give '
        'another --output'
      )
  output_flags.check_free(folder, overwrite)


def _of_pictures(paths, bundle, count: int):
  """Returns the pictures on which a bundle's file is checked."""
  from ijckd_jax.deploy import deployed
  from ijckd_jax.deploy import pictures

  shape, crop = bundle.image_shape, deployed.crop_of(bundle)
  return pictures.examples(paths, shape, crop, count)


def _of_dataset(loaded, flags):
  """Returns by role the images that check a file, and those that tell ranges.

  Raises:
    config_utils.UserError: a bundle does not fit the data set.
  """
  from ijckd_jax.deploy import checks

  dataset = bundle_flags.dataset_of(loaded['student'], flags)
  for role, bundle in loaded.items():
    _check_fits('bundle' if role == 'student' else role, bundle, dataset)
  found = {}
  for role, bundle in loaded.items():
    order = bundle_flags.class_order(f'the {role}', bundle, dataset, flags)
    found[role] = (
      checks.images(dataset, flags.split, flags.check_images, order),
      checks.images(dataset, 'train', flags.calibration_images),
    )
  return found


def _check_fits(what: str, bundle, dataset) -> None:
  """Raises where a data set's images are not what the file will take."""
  bundle_flags.check_fits(what, bundle, dataset)
  wanted, found = tuple(bundle.image_shape), tuple(dataset.image_shape)
  if wanted != found:
    wanted, found = ('x'.join(map(str, x)) for x in (wanted, found))
    raise config_utils.UserError(
      f'the {what} takes images of {wanted}, but the data set has {found}: '
      'give --dataset or --dataset_fields of images like those, or --pictures'
    )


def _beside(output: pathlib.Path) -> pathlib.Path:
  return output.with_name(f'{output.name}.json')


def _write(output: pathlib.Path, data: bytes, about) -> None:
  """Writes a file, and what is known of it beside it."""
  from ijckd_jax.runtime import disk

  output.parent.mkdir(parents=True, exist_ok=True)
  text = json.dumps(about, indent=2) + '\n'
  disk.write_files({_beside(output): text.encode(), output: data})
