"""Distil image classifiers in JAX, through the teacher's own classifier.

These names are public:

- runs: `distill`, `train_and_evaluate`, `default_config` and `parse_arg` for
  config files, `Result`; and what they raise: `UserError`, `Diverged`,
  `Interrupted`;
- data: `ArrayDataset`, `Arrays`, `Preprocessing`;
- networks: `Teacher`, `Bundle`, `load_bundle`, `Outputs`, `Features`, `Shapes`;
- what a class of your own inherits, or must look like: `Method`, `Backbone`,
  `NnxBackbone`, `FunctionBackbone`, `Connector`, `Dataset`, `MetricWriter`.

And the public functions and classes of these modules:

- `ijckd_jax.models` and `ijckd_jax.data.datasets`: what there is, by name;
- `ijckd_jax.models.losses`, `ijckd_jax.distillation.connectors`: what methods
  are made of;
- `ijckd_jax.training.sweep`: many runs;
- `ijckd_jax.evaluation.pointwise`, `ijckd_jax.bounds.certify`: the bound;
- `ijckd_jax.pytorch.converter`: a module of PyTorch as a bundle.

All else is private, and may change in any version.
"""

import importlib
from typing import TYPE_CHECKING
from typing import Any

from ijckd_jax.runtime import moved

if TYPE_CHECKING:
  from ijckd_jax.bundles.bundles import Bundle as Bundle
  from ijckd_jax.bundles.bundles import load
  from ijckd_jax.data.augment import Preprocessing as Preprocessing
  from ijckd_jax.data.datasets import ArrayDataset as ArrayDataset
  from ijckd_jax.data.datasets import Arrays as Arrays
  from ijckd_jax.data.datasets import Dataset as Dataset
  from ijckd_jax.distillation.connectors import Connector as Connector
  from ijckd_jax.distillation.methods.base import Method as Method
  from ijckd_jax.distillation.teachers import Teacher as Teacher
  from ijckd_jax.models.adapters import FunctionBackbone as FunctionBackbone
  from ijckd_jax.models.adapters import NnxBackbone as NnxBackbone
  from ijckd_jax.models.backbone import Backbone as Backbone
  from ijckd_jax.models.outputs import Features as Features
  from ijckd_jax.models.outputs import Outputs as Outputs
  from ijckd_jax.models.outputs import Shapes as Shapes
  from ijckd_jax.runtime.config_utils import UserError as UserError
  from ijckd_jax.runtime.config_utils import parse_arg as parse_arg
  from ijckd_jax.training.experiment import default_config as default_config
  from ijckd_jax.training.loop import Diverged as Diverged
  from ijckd_jax.training.loop import Interrupted as Interrupted
  from ijckd_jax.training.metric_writer import MetricWriter as MetricWriter
  from ijckd_jax.training.results import Result as Result
  from ijckd_jax.training.train import distill as distill
  from ijckd_jax.training.train import train_and_evaluate as train_and_evaluate

  load_bundle = load

# What each public name is, in a module of the package, imported when asked for.
_PUBLIC = {
  'ArrayDataset': 'data.datasets:ArrayDataset',
  'Arrays': 'data.datasets:Arrays',
  'Backbone': 'models.backbone:Backbone',
  'Bundle': 'bundles.bundles:Bundle',
  'Connector': 'distillation.connectors:Connector',
  'Dataset': 'data.datasets:Dataset',
  'Diverged': 'training.loop:Diverged',
  'Features': 'models.outputs:Features',
  'FunctionBackbone': 'models.adapters:FunctionBackbone',
  'Interrupted': 'training.loop:Interrupted',
  'Method': 'distillation.methods.base:Method',
  'MetricWriter': 'training.metric_writer:MetricWriter',
  'NnxBackbone': 'models.adapters:NnxBackbone',
  'Outputs': 'models.outputs:Outputs',
  'Preprocessing': 'data.augment:Preprocessing',
  'Result': 'training.results:Result',
  'Shapes': 'models.outputs:Shapes',
  'Teacher': 'distillation.teachers:Teacher',
  'UserError': 'runtime.config_utils:UserError',
  'default_config': 'training.experiment:default_config',
  'distill': 'training.train:distill',
  'load_bundle': 'bundles.bundles:load',
  'parse_arg': 'runtime.config_utils:parse_arg',
  'train_and_evaluate': 'training.train:train_and_evaluate',
}
__all__ = list(_PUBLIC)

moved.install()


if not TYPE_CHECKING:  # It would make a checker believe in every name.

  def __getattr__(name: str) -> Any:
    """Imports what is asked for, so that one module does not load them all."""
    if name not in _PUBLIC:
      raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
    module, _, attribute = _PUBLIC[name].partition(':')
    return getattr(importlib.import_module(f'{__name__}.{module}'), attribute)


def __dir__() -> list[str]:
  return sorted([*globals(), *_PUBLIC])
