"""Measures how far networks and training here are from PyTorch's.

  pip install -e '.[test,parity]'
  python -m experiments.parity.measure

Prints the tables of docs/parity.md. Every backbone gets random weights and
batch-norm statistics in PyTorch, which are imported as a user imports them; the
tests hold most of this too.
"""

import sys

import jax
import numpy as np

from ijckd_jax import models
from ijckd_jax.runtime import markdown
from tests import test_torch_import
from tests import test_torch_training
from tests import torch_networks


def forward_row(name):
  """Returns a backbone's line: against whom, at which size, and the errors."""
  size = models.build(name).usual_size
  errors = test_torch_import.errors(name, size)
  exact = test_torch_import.errors(name, size, dtype='float64')
  if name in torch_networks.OURS:
    oracle = 'tests/torch_networks.py'
  else:
    is_timms = name in torch_networks.TIMM_STAGES
    is_timms |= name.startswith(torch_networks.TRANSFORMERS)
    oracle = 'timm' if is_timms else 'torchvision'
  shown = [f'{x:.1e}' for x in (*errors.values(), max(exact.values()))]
  return [name, oracle, f'{size}x{size}', *shown]


def training_row(method, dtype):
  """Returns a line on twenty steps: of the terms, and of what they end in."""
  with jax.enable_x64(dtype == 'float64'):
    ours, theirs, errors = test_torch_training.train_in_both(
      'resnet14', 'resnet8', method, dtype=dtype
    )
  terms = [
    max(abs(mine[name] / value - 1) for name, value in expected.items())
    for mine, expected in zip(ours, theirs, strict=True)
  ]
  numbers = (terms[0], max(terms), *errors.values())
  return [method, dtype, *(f'{number:.1e}' for number in numbers)]


def main():
  """Prints both tables, as they grow."""
  columns = ('stages', 'final', 'pooled', 'logits', 'all, float64')
  rows = [['backbone', 'against', 'images', *columns]]
  for name in models.BACKBONES:
    rows.append(forward_row(name))
    print(name, *rows[-1][3:], file=sys.stderr)
    test_torch_import.imported.cache_clear()
  print(markdown.grid(rows))
  kinds = ('parameters', 'running mean', 'running variance')
  rows = [['method', 'dtype', 'terms, step 1', 'terms, all 20', *kinds]]
  for dtype in ('float64', 'float32'):
    rows += [
      training_row(method, dtype) for method in ('ijckd', 'simkd', 'srrl')
    ]
  print()
  print(markdown.grid(rows))
  versions = [torch_networks.torch, torch_networks.torchvision]
  versions += [torch_networks.timm, jax, np]
  print()
  print(', '.join(f'{x.__name__} {x.__version__}' for x in versions))


if __name__ == '__main__':
  main()
