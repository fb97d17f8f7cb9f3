"""Imports go down the layers of the design, and slow ones wait."""

import ast
import pathlib
import subprocess
import sys

import pytest

import ijckd_jax

PACKAGE = pathlib.Path(ijckd_jax.__file__).parent

# From the top. A name with a slash stands for all modules of a subpackage that
# no other name lists.
LAYERS = {
  'commands': (
    '__main__',
    'main',
    'export',
    'predict',
    'compile',
    'models.__main__',
    'torch_weights',
    'torch_model',
    'datasets.prepare',
    'bounds.__main__',
    'bundle_flags',
    'evaluate',
  ),
  'loops': (
    'train',
    'loop',
    'heads',
    'results',
    'evaluator',
    'report',
    'features',
    'measure',
    'shift',
    'plots',
    'bound_plots',
  ),
  'assembly': (
    'bundles',
    'bundle_spec',
    'converted',
    'torch_backbones',
    'torch_blocks',
    'torch_convert',
    'torch_flags',
    'torch_identify',
    'torch_import',
    'torch_names',
    'torch_sources',
    'torch_parts',
    'torch_split',
    'torch_students',
    'torch_trace',
    'torch_watch',
    'run_teachers',
    'teachers',
    'binding',
    'distiller',
    'network',
    'pairs',
    'config_checks',
    'pretrained',
    'experiment',
    'steps',
    'stored_outputs',
    'teacher_outputs',
    'train_state',
    'deploy/',
    'model_card',
  ),
  'parts': (
    'methods/',
    'connectors',
    'losses',
    'models/',
    'datasets/',
    'augment',
    'images',
    'input_pipeline',
    'mixing',
    'optim',
    'programs',
    'randaugment',
    'transforms',
  ),
  'adapters': (
    'parallel',
    'backend',
    'checkpoints',
    'compilation_cache',
    'disk',
    'cpu_memory',
    'hosts',
    'locks',
    'metric_writer',
    'record_files',
    'run_record',
    'teacher_store',
    'workdirs',
    'workers',
    'torch_files',
    'torch_unwrap',
    'hub',
  ),
  'ground': (
    'metrics',
    'classes',
    'bounds/',
    'config_utils',
    'streams',
    'logistic',
    'outputs',
    'wording',
    'bound_wording',
    'cost',
    'web_page',
  ),
}
# Its text is copied into files that are written for PyTorch.
NEVER_IMPORTED = 'torch_blocks'
# The package itself loads its parts when they are asked for.
LAZY = ('__init__',)
LINEN = ('models', 'connectors', 'methods')
SLOW = (
  'array_record',
  'cv2',
  'huggingface_hub',
  'markdown_it',
  'matplotlib',
  'onnx',
  'onnxruntime',
  'PIL',
  'scipy',
  'sklearn',
  'tensorboardX',
  'tensorflow',
  'tensorflow_datasets',
  'timm',
  'torch',
  'torchax',
  'torchvision',
  'tqdm',
)


def name_of(path):
  """Returns a module's name in the package: 'losses', 'methods.kd', ..."""
  parts = path.relative_to(PACKAGE).with_suffix('').parts
  if len(parts) > 1 and parts[-1] == '__init__':
    parts = parts[:-1]
  return '.'.join(parts)


MODULES = {
  name_of(path): ast.parse(path.read_text())
  for path in sorted(PACKAGE.rglob('*.py'))
}


def layer_of(module):
  """Returns the height of a module's layer; None where none lists it."""
  layers = list(reversed(LAYERS.values()))
  for wanted in (module, f'{module.partition(".")[0]}/'):
    for height, names in enumerate(layers):
      if wanted in names:
        return height
  return None


def imported(tree):
  """Returns all that is imported, wherever, as dotted names."""
  found = set()
  for node in ast.walk(tree):
    if isinstance(node, ast.Import):
      found |= {alias.name for alias in node.names}
    elif isinstance(node, ast.ImportFrom):
      assert not node.level, 'imports are absolute'
      found |= {f'{node.module}.{alias.name}' for alias in node.names}
  return found


def imported_at_once(tree):
  """Returns what importing the module imports: not what functions do."""
  found, nodes = set(), [tree]
  while nodes:
    node = nodes.pop()
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
      continue
    if isinstance(node, ast.Import | ast.ImportFrom):
      found |= imported(ast.Module([node], []))
    nodes.extend(ast.iter_child_nodes(node))
  return found


def project_imports(module):
  """Returns the modules of the package that one imports, wherever."""
  found = set()
  for name in imported(MODULES[module]):
    package, _, rest = name.partition('.')
    if package != 'ijckd_jax':
      continue
    while rest and rest not in MODULES:
      rest = rest.rpartition('.')[0]  # A name out of a module.
    found.add(rest or '__init__')
  return found


@pytest.mark.parametrize('module', MODULES)
def test_every_module_has_a_layer(module):
  assert module in LAZY or layer_of(module) is not None, (
    f'{module} is in no layer: add it to LAYERS, and to the design'
  )


@pytest.mark.parametrize('module', MODULES)
def test_imports_go_down(module):
  used = project_imports(module)
  if module in LAZY:
    assert not used
    return
  assert '__init__' not in used, 'import what is needed, not the package'
  upward = [name for name in used if layer_of(name) > layer_of(module)]
  assert not upward, f'{module} imports {upward}, which stand above it'


def test_ground_imports_the_ground_alone():
  ground = {module for module in MODULES if layer_of(module) == 0}
  for module in ground:
    assert project_imports(module) <= ground


def test_there_are_no_cycles():
  """Also between modules of a layer; a subpackage may import its parts."""
  done, path = set(), []

  def visit(module):
    assert module not in path, ' -> '.join(
      [*path[path.index(module) :], module]
    )
    if module in done:
      return
    path.append(module)
    for name in sorted(project_imports(module)):
      visit(name)
    path.pop()
    done.add(module)

  for module in MODULES:
    visit(module)


def test_linen_stays_with_models_connectors_and_methods():
  for module, tree in MODULES.items():
    uses = any(name.startswith('flax.linen') for name in imported(tree))
    assert not uses or module.partition('.')[0] in LINEN, module


@pytest.mark.parametrize('module', MODULES)
def test_nothing_imports_configs_or_experiments(module):
  roots = {name.partition('.')[0] for name in imported(MODULES[module])}
  assert not roots & {'configs', 'experiments', 'tests'}


@pytest.mark.parametrize('module', MODULES)
def test_text_that_needs_pytorch_is_not_imported(module):
  assert NEVER_IMPORTED not in project_imports(module)


@pytest.mark.parametrize('module', MODULES)
def test_slow_libraries_are_imported_where_they_are_used(module):
  roots = {name.partition('.')[0] for name in imported_at_once(MODULES[module])}
  assert module == NEVER_IMPORTED or not roots & set(SLOW)


def test_commands_read_their_flags_before_they_load_jax():
  """A wrong flag is answered at once."""
  for module in (
    'main',
    'evaluate',
    'compile',
    'datasets.prepare',
    'torch_weights',
    'torch_model',
    'bounds.__main__',
  ):
    roots = {
      name.partition('.')[0] for name in imported_at_once(MODULES[module])
    }
    assert not roots & {'jax', 'flax', 'optax', 'orbax', 'grain'}, module


def test_the_package_loads_nothing_by_itself():
  script = (
    'import sys, ijckd_jax; ijckd_jax.__dir__();'
    'print([m for m in sys.modules if m.startswith("ijckd_jax.")],'
    ' "jax" in sys.modules)'
  )
  result = subprocess.run(
    [sys.executable, '-c', script],
    capture_output=True,
    check=True,
    text=True,
  )
  assert result.stdout == '[] False\n'


def test_what_the_package_offers_is_there():
  assert callable(ijckd_jax.distill)
  assert callable(ijckd_jax.load_bundle)
  assert set(ijckd_jax._LAZY) <= set(dir(ijckd_jax))
  for name in ijckd_jax._LAZY:
    assert getattr(ijckd_jax, name)
  with pytest.raises(AttributeError, match="no attribute 'nothing'"):
    ijckd_jax.nothing  # noqa: B018
