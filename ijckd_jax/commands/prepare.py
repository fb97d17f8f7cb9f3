"""Prepares a data set, so that tfds reads it without TensorFlow.

  ijckd prepare cifar100
  ijckd prepare cifar100 --source DIR
  ijckd prepare image_folder --source DIR --name NAME

The first downloads it by tfds, which takes TensorFlow (the extra `prepare`).
The second takes the original files from a local folder, with neither TensorFlow
nor network: Fashion-MNIST's four IDX files, gzipped or not; CIFAR's binary or
Python version, as its archive or unpacked, or the parquet files of Hugging
Face's hub.
The third writes pictures of your own (JPEG, PNG, WebP, BMP, GIF, TIFF, PPM) as
a data set called NAME. DIR holds train/CLASS/... and val/CLASS/... (or test, or
both); or a folder for each class, a part of which becomes the split 'test'; or
pictures without classes. In place of DIR stands a table, with the columns
image, label and, perhaps, split: a CSV file of paths, or Parquet files
('DIR/*.parquet') as Hugging Face's hub has them; or NumPy's .npz with images
and labels, or train_images, train_labels and so on. What was cut off, the same
command continues.
"""

import argparse
import dataclasses
import os
import sys

from ijckd_jax.data import datasets
from ijckd_jax.data.datasets import image_folder
from ijckd_jax.data.datasets import image_layout
from ijckd_jax.data.datasets import image_table
from ijckd_jax.data.datasets import originals
from ijckd_jax.data.datasets import prepared
from ijckd_jax.runtime import config_utils

PROG = 'python -m ijckd_jax prepare'
# All write an image_folder; what it is of, the source says.
OWN = ('image_folder', 'csv', 'npz', 'parquet')
COLUMNS = [field.name for field in dataclasses.fields(image_table.Columns)]


def _prepare_folder(options) -> int:
  """Writes a folder of pictures as a data set and returns the exit code."""
  given = {key: value for key, value in options.items() if value is not None}
  columns = {field: given.pop(field) for field in COLUMNS if field in given}
  if columns:
    given['columns'] = image_table.Columns(**columns)
  for flag in ('source', 'name'):
    if not given.get(flag):
      asked = options['kind'] or 'image_folder'
      raise config_utils.UserError(f'{asked} needs --{flag}')
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
  if not prepared.find(name, data_dir):
    done = 'written'
    if hasattr(cls, 'prepare'):
      cls(data_dir=data_dir).prepare()
    elif source:
      originals.write(name, source, data_dir)
    else:
      hint = ', or give the original files by --source DIR'
      known = name in originals.READERS
      prepared.download(name, data_dir, hint if known else '')
  builder = prepared.find(name, data_dir)
  splits = builder.info.splits.items()
  counts = ', '.join(f'{x.num_examples} {split}' for split, x in splits)
  print(f'{name}: {done} in {builder.data_dir} ({counts})')


def main(argv: list[str], prog: str = PROG) -> int:
  """Prepares the data set that the arguments name; returns the exit code."""
  parser = config_utils.ArgumentParser(
    prog=prog,
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  parser.add_argument(
    'dataset',
    metavar='name',
    help=', '.join(sorted(datasets.DATASETS.keys() | OWN)),
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
  for field in COLUMNS:
    own.add_argument(
      f'--{field}',
      metavar='COLUMN',
      help=f'of a CSV or Parquet file (default: {field})',
    )
  own.add_argument(
    '--num_workers', type=int, help='processes (default: one for each CPU)'
  )
  options = vars(parser.parse_args(argv))
  dataset = options.pop('dataset')
  if dataset in OWN:
    kind = '' if dataset == 'image_folder' else dataset
    return _prepare_folder({**options, 'kind': kind})
  source, data_dir = options.pop('source'), options.pop('data_dir')
  for flag, value in options.items():
    if value is not None:
      raise config_utils.UserError(
        f'--{flag} is for image_folder only, not for {dataset}'
      )
  _prepare(dataset, source, data_dir)
  return 0
