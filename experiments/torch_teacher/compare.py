"""Compares an imported teacher's predictions with those of PyTorch.

python -m experiments.torch_teacher.compare OUT
"""

import pathlib
import sys

import numpy as np

from ijckd_jax.bundles import bundles
from ijckd_jax.data.datasets import fashion_mnist
from ijckd_jax.evaluation import evaluator as evaluator_lib
from ijckd_jax.runtime import parallel


def main(out):
  """Prints on how many test images the two agree."""
  folder = pathlib.Path(out)
  expected = np.load(folder / 'predictions.npy')
  bundle = bundles.load(folder / 'bundle')
  evaluator = evaluator_lib.make(
    bundle.network, mapper=parallel.Mapper(), batch_size=500
  )
  test = fashion_mnist.Dataset().load('test')
  result = evaluator(bundle.variables, None, test)
  same = np.sum(result.predictions == expected)
  print(f'top-1 here: {result.metrics["top1"]:.6f}')
  print(f'the same prediction on {same:,} of {len(test):,} test images')


if __name__ == '__main__':
  main(*sys.argv[1:])
