"""Prepares a data set, so that tfds reads it without TensorFlow.

  python -m ijckd_jax.datasets.prepare cifar100
  python -m ijckd_jax.datasets.prepare cifar100 --source DIR

The first downloads it by tfds, which takes TensorFlow (the extra `prepare`).
The second takes the original files from a local folder, with neither TensorFlow
nor network: Fashion-MNIST's four IDX files, gzipped or not; CIFAR's binary or
Python version, as its archive or unpacked.
"""

import argparse
import importlib.util
import pathlib
import sys

from ijckd_jax import config_utils
from ijckd_jax import datasets
from ijckd_jax.datasets import originals


def _download(name, data_dir):
  """Lets tfds download and write a data set."""
  # tfds uses the second without installing it.
  for module in ('tensorflow', 'importlib_resources'):
    if importlib.util.find_spec(module) is None:
      raise config_utils.UserError(
        f'tfds needs {module} to download {name}: pip install '
        "'ijckd_jax[prepare]', or give the original files by --source DIR"
      )
  import tensorflow_datasets as tfds

  tfds.display_progress_bar(sys.stderr.isatty())
  try:
    tfds.builder(
      name, data_dir=data_dir or None, file_format='array_record'
    ).download_and_prepare()
  except (
    OSError,
    tfds.core.registered.DatasetNotFoundError,
    tfds.core.download.util.DownloadError,
    tfds.core.download.download_manager.NonMatchingChecksumError,
  ) as error:
    reason = ' '.join(str(error).split())[:300]
    raise config_utils.UserError(
      f'cannot download {name}: {reason}; give the original files by '
      '--source DIR'
    ) from error


def main(args: list[str]) -> None:
  """Prepares the data set that the arguments name."""
  parser = config_utils.ArgumentParser(
    prog='python -m ijckd_jax.datasets.prepare',
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  parser.add_argument('name', help=', '.join(sorted(datasets.DATASETS)))
  parser.add_argument('--source', default='', help='the original files')
  parser.add_argument('--data_dir', default='', help="'' is tfds's default")
  options = parser.parse_args(args)

  cls = datasets.get(options.name)
  name = cls.tfds_name
  if options.source and name not in originals.READERS:
    raise config_utils.UserError(
      f'{name} is not made from files: leave out --source (it serves '
      f'{", ".join(sorted(originals.READERS))})'
    )
  done = 'already prepared'
  if not datasets.find(name, options.data_dir):
    done = 'written'
    if hasattr(cls, 'prepare'):
      cls(data_dir=options.data_dir).prepare()
    elif options.source:
      import tensorflow_datasets as tfds

      source = pathlib.Path(options.source).expanduser()
      splits, names = originals.READERS[name](source)
      datasets.write(tfds.builder_cls(name), options.data_dir, splits, names)
    else:
      _download(name, options.data_dir)
  builder = datasets.find(name, options.data_dir)
  counts = ', '.join(
    f'{info.num_examples} {split}'
    for split, info in builder.info.splits.items()
  )
  print(f'{name}: {done} in {builder.data_dir} ({counts})')


if __name__ == '__main__':
  config_utils.run_command(main)
