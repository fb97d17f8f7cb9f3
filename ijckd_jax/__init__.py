"""Distil image classifiers in JAX, through the teacher's own classifier."""

import importlib

from ijckd_jax.runtime import moved

_LAZY = {
  'ArrayDataset': 'ijckd_jax.data.datasets',
  'Arrays': 'ijckd_jax.data.datasets',
  'Teacher': 'ijckd_jax.distillation.teachers',
  'distill': 'ijckd_jax.training.train',
  'load_bundle': 'ijckd_jax.bundles.bundles',
}

moved.install()


def __getattr__(name: str):
  """Imports what is asked for, so that one module does not load them all."""
  if name not in _LAZY:
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
  module = importlib.import_module(_LAZY[name])
  return getattr(module, 'load' if name == 'load_bundle' else name)


def __dir__():
  return sorted([*globals(), *_LAZY])
