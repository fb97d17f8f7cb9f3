"""Imports go down the layers of the design, and slow ones wait."""

import ast
import pathlib
import subprocess
import sys

import pytest

import ijckd_jax

PACKAGE = pathlib.Path(ijckd_jax.__file__).parent

# From the top: a folder imports what stands below it, and itself.
FOLDERS = (
  'commands',
  'deploy',
  'training',
  'reports',
  'pytorch',
  'bounds',
  'evaluation',
  'bundles',
  'distillation',
  'models',
  'data',
  'runtime',
)
ROOT = ('__init__', '__main__', 'main')
# Copied as text into the files of students.
NEVER_IMPORTED = 'pytorch.blocks'
LINEN = ('models', 'distillation.connectors', 'distillation.methods')
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


def height_of(module):
  """Returns the height of a module's folder; the package's root is above."""
  folder = module.partition('.')[0]
  if folder in ROOT:
    return len(FOLDERS)
  return len(FOLDERS) - 1 - FOLDERS.index(folder)


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


def test_folders_are_those_that_are_listed():
  found = {path.name for path in PACKAGE.iterdir() if path.suffix == '.py'}
  assert found == {f'{name}.py' for name in ROOT}
  folders = {module.partition('.')[0] for module in MODULES} - {*ROOT}
  assert folders == {*FOLDERS}


@pytest.mark.parametrize('folder', FOLDERS)
def test_each_folder_says_what_lives_there(folder):
  said = ast.get_docstring(MODULES[folder])
  assert said and '`' in said


@pytest.mark.parametrize('module', MODULES)
def test_imports_go_down(module):
  used = project_imports(module)
  if module == '__init__':
    of_names = {value.partition(':')[0] for value in ijckd_jax._PUBLIC.values()}
    assert used == {'runtime.moved'} | of_names  # These for type checkers.
    return
  assert '__init__' not in used, 'import what is needed, not the package'
  upward = [name for name in used if height_of(name) > height_of(module)]
  assert not upward, f'{module} imports {upward}, which stand above it'


@pytest.mark.parametrize('module', MODULES)
def test_nothing_private_is_used_elsewhere(module):
  tree = MODULES[module]
  names = {
    alias.asname or alias.name
    for node in ast.walk(tree)
    if isinstance(node, ast.ImportFrom)
    and node.module.partition('.')[0] == 'ijckd_jax'
    for alias in node.names
  }
  assert not [name for name in names if name.startswith('_')]
  assert not [
    f'{node.value.id}.{node.attr}'
    for node in ast.walk(tree)
    if isinstance(node, ast.Attribute)
    and isinstance(node.value, ast.Name)
    and node.value.id in names
    and node.attr.startswith('_')
    and not node.attr.endswith('__')
  ]


def test_there_are_no_cycles():
  """Also between modules of a folder; a package may import its parts."""
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
    assert not uses or module.startswith(LINEN), module


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
  for module in MODULES:
    if not module.startswith(('main', 'commands.')):
      continue
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
  loaded = ['ijckd_jax.runtime', 'ijckd_jax.runtime.moved']
  assert result.stdout == f'{loaded} False\n'
