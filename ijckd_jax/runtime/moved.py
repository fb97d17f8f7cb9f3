"""Modules that have moved: for a while old names work, and say the new ones."""

import importlib
import importlib.abc
import importlib.machinery
import sys
import warnings

# The version in which the old names go, with this module, and the day before
# which it does not come out; see docs/promises.md.
GONE_IN = '0.4'
NOT_BEFORE = '2027-06-01'
UNTIL = (
  f'the old name works until version {GONE_IN}, which comes no earlier than '
  f'{NOT_BEFORE}'
)
# Of the commands: what stands after `python -m ijckd_jax` today.
COMMANDS = {
  'bounds.__main__': 'bounds',
  'compile': 'estimate',
  'datasets.prepare': 'prepare',
  'evaluate': 'evaluate',
  'export': 'export',
  'models.__main__': 'models',
  'predict': 'predict',
  'torch_model': 'convert',
  'torch_weights': 'weights',
}
# Of all others: old name to new one, within the package.
MODULES = {
  'augment': 'data.augment',
  'backend': 'runtime.backend',
  'binding': 'distillation.binding',
  'bound_plots': 'reports.bound_plots',
  'bound_wording': 'reports.bound_wording',
  'bounds.pointwise': 'evaluation.pointwise',
  'bundle_spec': 'bundles.specification',
  'checkpoints': 'training.checkpoints',
  'classes': 'data.classes',
  'compilation_cache': 'runtime.compilation_cache',
  'config_checks': 'training.config_checks',
  'config_utils': 'runtime.config_utils',
  'connectors': 'distillation.connectors',
  'converted': 'models.converted',
  'cost': 'evaluation.cost',
  'cpu_memory': 'runtime.cpu_memory',
  'datasets': 'data.datasets',
  'distiller': 'distillation.distiller',
  'experiment': 'training.experiment',
  'features': 'evaluation.feature_extraction',
  'heads': 'training.head_fitting',
  'hosts': 'runtime.hosts',
  'hub': 'pytorch.hub',
  'images': 'data.images',
  'input_pipeline': 'data.input_pipeline',
  'locks': 'runtime.locks',
  'logistic': 'evaluation.logistic',
  'loop': 'training.loop',
  'losses': 'models.losses',
  'measure': 'bounds.measure',
  'methods': 'distillation.methods',
  'metric_writer': 'training.metric_writer',
  'metrics': 'evaluation.metrics',
  'mixing': 'data.mixing',
  'model_card': 'bundles.model_card',
  'network': 'distillation.network',
  'optim': 'training.optim',
  'outputs': 'models.outputs',
  'pairs': 'bounds.pairs',
  'parallel': 'runtime.parallel',
  'plots': 'reports.plots',
  'pretrained': 'bundles.pretrained',
  'programs': 'models.programs',
  'randaugment': 'data.randaugment',
  'record_files': 'training.output_files',
  'report': 'reports.report',
  'results': 'training.results',
  'run_record': 'training.run_record',
  'run_teachers': 'training.teacher_loading',
  'shift': 'bounds.shift',
  'steps': 'distillation.steps',
  'streams': 'runtime.streams',
  'teacher_outputs': 'training.output_recorder',
  'teacher_store': 'training.output_store',
  'teachers': 'distillation.teachers',
  'torch_backbones': 'pytorch.backbone_source',
  'torch_convert': 'pytorch.converter',
  'torch_files': 'pytorch.state_dicts',
  'torch_flags': 'commands.pytorch_flags',
  'torch_identify': 'pytorch.identification',
  'torch_import': 'pytorch.importer',
  'torch_names': 'pytorch.published_names',
  'torch_parts': 'pytorch.classifier_parts',
  'torch_sources': 'pytorch.published_weights',
  'torch_split': 'pytorch.splitting',
  'torch_students': 'pytorch.student_source',
  'torch_trace': 'pytorch.tracing',
  'torch_unwrap': 'pytorch.wrappers',
  'torch_watch': 'pytorch.watching',
  'train': 'training.train',
  'train_state': 'distillation.train_state',
  'transforms': 'data.transforms',
  'web_page': 'reports.web_page',
  'wording': 'runtime.markdown',
  'workdirs': 'runtime.workdirs',
  'workers': 'runtime.workers',
}
PACKAGE = 'ijckd_jax.'


class Finder(importlib.abc.MetaPathFinder):
  """Finds modules by their old names."""

  def find_spec(self, fullname, path=None, target=None):
    """Returns a spec for an old name; None for any other."""
    if not fullname.startswith(PACKAGE):
      return None
    old = fullname.removeprefix(PACKAGE)
    if old in COMMANDS:
      return importlib.machinery.ModuleSpec(fullname, _Command(old))
    folder, dot, rest = old.partition('.')
    new = MODULES.get(old) or (
      dot and MODULES.get(folder) and f'{MODULES[folder]}.{rest}'
    )
    if not new:
      return None
    return importlib.machinery.ModuleSpec(fullname, _Alias(PACKAGE + new))


class _Alias(importlib.abc.Loader):
  """Loads a module by its old name: the very one of the new name."""

  def __init__(self, new: str):
    self._new = new

  def create_module(self, spec):
    return None

  def exec_module(self, module):
    sys.modules[module.__name__] = importlib.import_module(self._new)
    _warn(module.__name__, self._new)


class _Command(_Alias, importlib.abc.InspectLoader):
  """Loads a command by its old name; `python -m` runs the source instead."""

  def __init__(self, old: str):
    super().__init__(f'{PACKAGE}commands.{COMMANDS[old]}')
    self._old = old

  def is_package(self, fullname):
    return False

  def get_source(self, fullname):
    return f'from ijckd_jax.runtime import moved\nmoved.run({self._old!r})\n'


def run(old: str) -> None:
  """Runs a command by the name of the module that it once was, and exits."""
  command = COMMANDS[old]
  print(
    f'python -m {PACKAGE}{old.removesuffix(".__main__")} is now '
    f'python -m ijckd_jax {command}; {UNTIL}',
    file=sys.stderr,
  )
  sys.argv.insert(1, command)
  importlib.import_module(PACKAGE + '__main__').run('python -m ijckd_jax')


def contents(folder: str, new: str):
  """Returns the `__getattr__` of a folder that once was a module.

  Args:
    folder: its name in the package.
    new: today's name, in the package, of the module that it once was.
  """

  def find(name):
    if name.startswith('_'):
      raise AttributeError(name)
    found = getattr(importlib.import_module(PACKAGE + new), name)
    _warn(f'{PACKAGE}{folder}.{name}', f'{PACKAGE}{new}.{name}')
    return found

  return find


def _warn(old: str, new: str) -> None:
  warnings.warn(f'{old} is now {new}; {UNTIL}', FutureWarning, stacklevel=3)


def install() -> None:
  """Makes old names known to Python's imports."""
  # Before the others: by the path of `datasets` they would find its modules,
  # and make each a second time.
  sys.meta_path.insert(0, Finder())
