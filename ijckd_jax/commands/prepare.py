"""Prepares a data set, so that tfds reads it without TensorFlow.

  ijckd prepare cifar100
  ijckd prepare cifar100 --source DIR
  ijckd prepare image_folder --source DIR --name NAME

The first downloads it by tfds, which takes TensorFlow (the extra `prepare`).
The second takes the original files from a local folder, with neither TensorFlow
nor network: Fashion-MNIST's four IDX files, gzipped or not; CIFAR's binary or
Python version, as its archive or unpacked.
The third writes pictures of your own (JPEG, PNG, WebP, BMP, GIF, TIFF, PPM) as
a data set called NAME. DIR holds train/CLASS/... and val/CLASS/... (or test, or
both); or a folder for each class, a part of which becomes the split 'test'; or
pictures without classes. What was cut off, the same command continues.
"""

import argparse
import importlib.util
import os
import pathlib
import sys

from ijckd_jax.data import datasets
from ijckd_jax.data.datasets import image_folder
from ijckd_jax.data.datasets import image_layout
from ijckd_jax.data.datasets import originals
from ijckd_jax.runtime import config_utils

PROG = 'python -m ijckd_jax prepare'


def _download(name, data_dir):
  """Lets tfds download and write a data set."""
  otherwise = ''
  if name in originals.READERS:
    otherwise = ', or give the original files by --source DIR'
  # tfds uses the second without installing it.
  for module in ('tensorflow', 'importlib_resources'):
    if importlib.util.find_spec(module) is None:
      raise config_utils.UserError(
        f'tfds needs {module} to download {name}: pip install '
        f"'ijckd_jax[prepare]'{otherwise}"
      )
  import tensorflow_datasets as tfds

  tfds.display_progress_bar(sys.stderr.isatty())
  try:
    tfds.builder(
      name, data_dir=data_dir or None, file_format='array_record'
    ).download_and_prepare()
  except (
    OSError,
    AssertionError,  # Archives that have to be put somewhere by hand.
    tfds.core.registered.DatasetNotFoundError,
    tfds.core.download.util.DownloadError,
    tfds.core.download.download_manager.NonMatchingChecksumError,
  ) as error:
    reason = ' '.join(str(error).split())[:300]
    raise config_utils.UserError(
      f'cannot prepare {name}: {reason}{otherwise}'
    ) from error


def _prepare_folder(options) -> int:
  """Writes a folder of pictures as a data set and returns the exit code."""
  given = {key: value for key, value in options.items() if value is not None}
  for flag in ('source', 'name'):
    if not given.get(flag):
      raise config_utils.UserError(f'image_folder needs --{flag}')
  try:
    image_folder.prepare(**{'num_workers': os.cpu_count() or 1, **given})
  except KeyboardInterrupt:
    print('interrupted: the same command continues', file=sys.stderr)
    return 130
  except OSError as error:
    print(
      f'error: {" ".join(str(error).split())}: once that is mended, the same '
      'command continues',
      file=sys.stderr,
    )
    return 1
  return 0


def _prepare(dataset, source, data_dir):
  """Downloads a data set, or writes it from its original files."""
  cls = datasets.get(dataset)
  name = cls.tfds_name
  if source and name not in originals.READERS:
    raise config_utils.UserError(
      f'{name} is not made from files: leave out --source (it serves '
      f'{", ".join(sorted(originals.READERS))})'
    )
  done = 'already prepared'
  if not datasets.find(name, data_dir):
    done = 'written'
    if hasattr(cls, 'prepare'):
      cls(data_dir=data_dir).prepare()
    elif source:
      import tensorflow_datasets as tfds

      files = pathlib.Path(source).expanduser()
      splits, names = originals.READERS[name](files)
      datasets.write(tfds.builder_cls(name), data_dir, splits, names)
    else:
      _download(name, data_dir)
  builder = datasets.find(name, data_dir)
  counts = ', '.join(
    f'{info.num_examples} {split}'
    for split, info in builder.info.splits.items()
  )
  print(f'{name}: {done} in {builder.data_dir} ({counts})')


def main(argv: list[str], prog: str = PROG) -> int:
  """Prepares the data set that the arguments name; returns the exit code."""
  parser = config_utils.ArgumentParser(
    prog=prog,
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  parser.add_argument(
    'dataset', metavar='name', help=', '.join(sorted(datasets.DATASETS))
  )
  parser.add_argument(
    '--source', default='', help='the original files, or your pictures'
  )
  parser.add_argument('--data_dir', default='', help="'' is tfds's default")
  own = parser.add_argument_group('of image_folder')
  own.add_argument('--name', help='what the data set is to be called')
  own.add_argument(
    '--validation_fraction',
    type=float,
    help="part of every class that becomes 'test' where DIR holds neither val/ "
    f'nor test/ (default: {image_layout.HELD_OUT})',
  )
  own.add_argument(
    '--unlabelled',
    action='store_true',
    default=None,
    help='folders are no classes: all pictures, at any depth, without labels',
  )
  own.add_argument(
    '--num_workers', type=int, help='processes (default: one for each CPU)'
  )
  options = vars(parser.parse_args(argv))
  dataset = options.pop('dataset')
  if dataset == 'image_folder':
    return _prepare_folder(options)
  source, data_dir = options.pop('source'), options.pop('data_dir')
  for flag, value in options.items():
    if value is not None:
      raise config_utils.UserError(
        f'--{flag} is for image_folder only, not for {dataset}'
      )
  _prepare(dataset, source, data_dir)
  return 0
