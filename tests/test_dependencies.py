"""The tests import nothing that `pip install -e '.[test]'` leaves out."""

import ast
import configparser
import functools
import importlib.metadata
import pathlib
import re
import sys

from packaging import requirements
from packaging import utils
import pytest

ROOT = pathlib.Path(__file__).parents[1]
FILES = sorted((ROOT / 'tests').glob('*.py'))


def distributions(name, extras):
  """Returns the names of all that pip installs for a distribution."""
  found, queue = set(), [(name, extra) for extra in ('', *extras)]
  for name, extra in queue:
    for line in importlib.metadata.requires(name) or ():
      needed = requirements.Requirement(line)
      if needed.marker and not needed.marker.evaluate({'extra': extra}):
        continue
      added = {(needed.name, more) for more in ('', *needed.extras)}
      queue += sorted(added - set(queue))
    found.add(utils.canonicalize_name(name))
  return found


def modules_of(installed):
  """Returns the top-level modules of distributions."""
  return {
    module
    for module, names in importlib.metadata.packages_distributions().items()
    if installed & {utils.canonicalize_name(name) for name in names}
  }


def file_of(root, name):
  """Returns the file of one of our modules, or None."""
  path = root.joinpath(*name.split('.'))
  for found in (path.with_suffix('.py'), path / '__init__.py'):
    if found.is_file():
      return found


def at_module_level(node):
  """Yields the nodes that run when a module is imported, in order."""
  for child in ast.iter_child_nodes(node):
    if not isinstance(child, ast.FunctionDef | ast.Lambda):
      yield child
      yield from at_module_level(child)


def is_skip(node):
  """Returns whether a node is a call of `pytest.importorskip`."""
  return (
    isinstance(node, ast.Call)
    and isinstance(node.func, ast.Attribute)
    and node.func.attr == 'importorskip'
  )


@functools.cache
def imports_of(path):
  """Returns (line, module, whether by importorskip) of a file's imports."""
  found = []
  for node in at_module_level(ast.parse(path.read_text())):
    if is_skip(node):
      found.append((node.lineno, node.args[0].value, True))
    elif isinstance(node, ast.Import):
      found += [(node.lineno, alias.name, False) for alias in node.names]
    elif isinstance(node, ast.ImportFrom):
      names = [f'{node.module}.{alias.name}' for alias in node.names]
      found += [(node.lineno, name, False) for name in names]
  return found


def unguarded(path, root, installed):
  """Returns the imports of a test module that may fail, as text.

  Args:
    path: the test module's file.
    root: the folder in which Python finds our own packages.
    installed: the top-level modules that are there for certain.

  Returns:
    A list of `FILE:LINE: MODULE`: of the file, or of our own modules that it
    imports, where no `pytest.importorskip` stands before the import.
  """
  guarded, seen, found = set(), set(), []

  def visit(path):
    seen.add(path)
    for line, name, skips in imports_of(path):
      first, *rest = name.split('.')
      parents = [first]
      for part in rest:
        parents.append(f'{parents[-1]}.{part}')
      for file in filter(None, (file_of(root, x) for x in parents)):
        if file not in seen:
          visit(file)
      if (root / first).is_dir():
        continue
      if skips:
        guarded.add(first)
      elif first not in installed | guarded:
        found.append(f'{path.relative_to(root)}:{line}: {first}')

  visit(path)
  return found


@pytest.fixture(scope='module')
def installed():
  found = modules_of(distributions('ijckd_jax', ['test']))
  assert {'jax', 'numpy', 'pytest', 'onnxruntime', 'equinox'} <= found
  assert not {'torch', 'torchvision', 'timm', 'torchax'} & found
  return found | set(sys.stdlib_module_names)


@pytest.mark.parametrize(
  'path',
  [path for path in FILES if path.stem.startswith(('test_', 'conftest'))],
  ids=lambda path: path.stem,
)
def test_modules_are_installed_or_skipped_without(path, installed):
  assert not unguarded(path, ROOT, installed)


def test_an_import_that_may_fail_is_found(tmp_path):
  """At module level, in the file or in ours that it imports; never later."""
  files = {
    'experiments/nets.py': 'import torch\n',
    'tests/__init__.py': '',
    'tests/helper.py': 'import torch.nn as nn\n',
    'tests/careful.py': 'import pytest\npytest.importorskip("torch")\n',
    'tests/test_plain.py': 'import os, torch\n',
    'tests/test_from.py': 'from torch.nn import functional\n',
    'tests/test_try.py': 'try:\n  import torch\nexcept ImportError:\n  0\n',
    'tests/test_helper.py': 'from tests import helper\n',
    'tests/test_nets.py': 'from experiments.nets import torch\n',
    'tests/test_late.py': (
      'import torch\nimport pytest\npytest.importorskip("torch")\n'
    ),
    'tests/test_function.py': 'def test():\n  import torch\n',
    'tests/test_guarded.py': (
      'import pytest\n'
      'torch = pytest.importorskip("torch")\n'
      'import torch.nn\nfrom tests import helper\n'
    ),
    'tests/test_careful.py': 'from tests import careful\nimport torch\n',
    'tests/test_other.py': (
      'import pytest\npytest.importorskip("timm")\nimport torch\n'
    ),
  }
  for name, text in files.items():
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
  found = {
    path.stem[5:]: unguarded(path, tmp_path, {'os', 'pytest'})
    for path in tmp_path.glob('tests/test_*.py')
  }
  assert found == {
    'plain': ['tests/test_plain.py:1: torch'],
    'from': ['tests/test_from.py:1: torch'],
    'try': ['tests/test_try.py:2: torch'],
    'helper': ['tests/helper.py:1: torch'],
    'nets': ['experiments/nets.py:1: torch'],
    'late': ['tests/test_late.py:1: torch'],
    'other': ['tests/test_other.py:3: torch'],
    'function': [],
    'guarded': [],
    'careful': [],
  }


def test_skips_say_what_to_install():
  skips = [
    node
    for path in FILES
    for node in ast.walk(ast.parse(path.read_text()))
    if is_skip(node) and not file_of(ROOT, node.args[0].value)
  ]
  assert len(skips) > 5
  for node in skips:
    said = {keyword.arg for keyword in node.keywords}
    assert 'reason' in said, ast.unparse(node)


def test_the_gate_asks_for_extras_that_there_are():
  """Pip only warns of one that is not, or that it calls otherwise."""
  config = configparser.ConfigParser()
  config.read(ROOT / 'setup.cfg')
  extras = set(config['options.extras_require'])
  assert all(name.isalnum() for name in extras)
  asked = re.findall(r"-e '\.\[([^]]*)\]'", (ROOT / '.ci/run').read_text())
  assert asked
  assert {name for names in asked for name in names.split(',')} <= extras
