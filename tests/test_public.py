"""The public names: a list, its docs, and what type checkers see of them."""

import ast
import importlib
import inspect
import pathlib
import re
import shutil
import subprocess
import sys
import sysconfig

import pytest

import ijckd_jax

ROOT = pathlib.Path(__file__).parents[1]
SAID = re.findall(r'`([\w.]+)`', ijckd_jax.__doc__)
MODULES = [name for name in SAID if '.' in name]
PAGES = [ROOT / 'README.md', *sorted((ROOT / 'docs').glob('*.md'))]
EXAMPLES = [
  path
  for folder in (
    'configs',
    'experiments/extension_example',
    'experiments/jax_students',
    'experiments/jax_teachers',
  )
  for path in sorted((ROOT / folder).glob('*.py'))
]
# A name of the package in a text, where it is no path and no command's.
NAME = re.compile(r'(?<!-m )(?<![\w/.])ijckd_jax(?:\.\w+)+')


def is_public(name):
  """Returns whether a dotted name is public, or is in a module that is."""
  module, _, attribute = name.rpartition('.')
  if module in MODULES:
    # A folder of the package has private modules, too.
    found = getattr(importlib.import_module(module), attribute, None)
    return f'{module}.{attribute}' in MODULES or (
      not inspect.ismodule(found) and not attribute.startswith('_')
    )
  if name in MODULES:
    return True
  return name.removeprefix('ijckd_jax.') in ijckd_jax.__all__


def imported(code):
  """Returns the dotted names that a text of code imports from the package."""
  found = []
  for node in ast.walk(ast.parse(code)):
    if isinstance(node, ast.ImportFrom) and node.module.startswith('ijckd_jax'):
      found += [f'{node.module}.{alias.name}' for alias in node.names]
    elif isinstance(node, ast.Import):
      found += [x.name for x in node.names if x.name.startswith('ijckd_jax.')]
  return found


def functions_of(module):
  """Returns the public functions of a module, and of its public classes."""
  own = [
    value
    for name, value in vars(module).items()
    if getattr(value, '__module__', '') == module.__name__
    and not name.startswith('_')
  ]
  return [function for value in own for function in methods_of(value)]


def methods_of(value):
  """Returns a function as a list, or the public methods of a class."""
  if inspect.isfunction(value):
    return [value]
  return [
    getattr(method, 'fget', method)
    for name, method in vars(value).items()
    if not name.startswith('_')
    and getattr(method, '__module__', value.__module__) == value.__module__
    and (inspect.isfunction(method) or isinstance(method, property))
  ]


def test_the_list_is_what_the_docstring_says():
  assert sorted(set(SAID) - {*MODULES}) == sorted(ijckd_jax.__all__)
  assert len(SAID) == len(set(SAID))
  assert {*ijckd_jax.__all__} <= set(dir(ijckd_jax))
  with pytest.raises(AttributeError, match="no attribute 'nothing'"):
    ijckd_jax.nothing  # noqa: B018


def test_type_checkers_see_the_same_names():
  tree = ast.parse(pathlib.Path(ijckd_jax.__file__).read_text())
  seen = {
    (f'{node.module}:{alias.name}').removeprefix('ijckd_jax.')
    for node in ast.walk(tree)
    if isinstance(node, ast.ImportFrom) and node.module.startswith('ijckd_jax.')
    for alias in node.names
  }
  assert seen == {*ijckd_jax._PUBLIC.values(), 'runtime:moved'}


@pytest.mark.parametrize('name', ijckd_jax.__all__)
def test_each_name_has_a_docstring_and_types(name):
  found = getattr(ijckd_jax, name)
  # One of its own: a class would have that of its base, and a dataclass its
  # signature.
  said = vars(found)['__doc__'] if isinstance(found, type) else found.__doc__
  assert said and not said.startswith(f'{name}(')
  for function in methods_of(found):
    check_types(function)


@pytest.mark.parametrize('name', MODULES)
def test_each_module_has_a_docstring_and_types(name):
  module = importlib.import_module(name)
  assert module.__doc__
  for function in functions_of(module):
    check_types(function)


def check_types(function):
  """Asserts that a function has types of all that goes in and comes out."""
  signature = inspect.signature(function)
  given = [x for x in signature.parameters.values() if x.name != 'self']
  untyped = [x.name for x in given if x.annotation is x.empty]
  assert not untyped, f'{function.__qualname__}: {untyped}'
  assert signature.return_annotation is not signature.empty, function


@pytest.mark.parametrize('path', EXAMPLES, ids=lambda path: path.stem)
def test_examples_import_public_names_only(path):
  assert not [
    name for name in imported(path.read_text()) if not is_public(name)
  ]


@pytest.mark.parametrize('path', PAGES, ids=lambda path: path.stem)
def test_pages_name_public_names_only(path):
  text = path.read_text()
  codes = re.findall(r'```python\n(.*?)```', text, re.DOTALL)
  names = [name for code in codes for name in imported(code)]
  names += NAME.findall(re.sub(r'```python\n.*?```', '', text, flags=re.DOTALL))
  assert not [name for name in names if not is_public(name)]


def test_a_user_sees_the_types(tmp_path):
  """Of the package as it is installed, in which `py.typed` tells of them."""
  subprocess.run(
    [sys.executable, '-m', 'venv', '--without-pip', tmp_path / 'venv'],
    check=True,
  )
  (site,) = tmp_path.glob('venv/lib/python*/site-packages')
  shutil.copytree(ROOT / 'ijckd_jax', site / 'ijckd_jax')
  (site / 'others.pth').write_text(sysconfig.get_path('purelib'))
  program = shutil.copy(ROOT / 'tests' / 'typed_use.py', tmp_path)
  done = subprocess.run(
    [
      *(sys.executable, '-m', 'mypy', '--strict', program),
      *('--python-executable', tmp_path / 'venv' / 'bin' / 'python'),
    ],
    capture_output=True,
    cwd=tmp_path,
    text=True,
  )
  assert done.returncode == 0, done.stdout + done.stderr
