"""What version 0.1 wrote is read, and what it called things is found."""

import importlib
import logging
import pathlib
import subprocess
import sys
import tarfile

import numpy as np
import pytest

from ijckd_jax import __main__ as command
from ijckd_jax.bundles import bundles
from ijckd_jax.data import datasets
from ijckd_jax.runtime import config_utils
from ijckd_jax.runtime import moved
from ijckd_jax.training import train
from tests import test_train

# A run of `small_config` on the fields below that was stopped after step 11,
# the bundle that it ended with, and six pictures for each of two splits.
STORED = pathlib.Path(__file__).with_name('version_0_1.tar.xz')
FIELDS = {
  'dataset.validation_fraction': 0.8,
  'teacher.store.views': 1,
  'teacher.total_epochs': 1.0,
}


@pytest.fixture(scope='module')
def stored(tmp_path_factory):
  """The folder of what version 0.1 has written."""
  folder = tmp_path_factory.mktemp('version_0_1')
  with tarfile.open(STORED) as archive:
    archive.extractall(folder, filter='data')
  return folder


def test_a_stopped_run_goes_on(stored, small_config, caplog):
  """From its checkpoint, with its teacher and its stored outputs."""
  caplog.set_level(logging.INFO)
  result = train.train_and_evaluate(small_config(**FIELDS), stored / 'run')
  assert 'continues after step 11' in caplog.text
  assert 'goes on with other code or versions' in caplog.text
  given, wanted = (
    test_train.leaves(bundle.variables)
    for bundle in (result.bundle, bundles.load(stored / 'bundle'))
  )
  assert given.keys() == wanted.keys()
  for name, array in wanted.items():
    # The step that is left; another JAX may add in another order.
    np.testing.assert_allclose(given[name], array, rtol=1e-4, atol=1e-5)


def test_prepared_pictures_are_read(stored):
  dataset = datasets.get('image_folder')(
    data_dir=str(stored / 'data'), folder='small_pictures', size=8, resize=8
  )
  assert dataset.class_names == ('a', 'b')
  assert [len(dataset.load(split)) for split in ('train', 'test')] == [6, 6]


def test_a_config_is_read(tmp_path):
  path = tmp_path / 'mine.py'
  path.write_text(
    'from ijckd_jax import experiment\n'
    'def get_config():\n'
    '  return experiment.default_config(\n'
    "    dataset='digits', teacher='resnet8', student='resnet8', method='kd'\n"
    '  )\n'
  )
  with pytest.warns(
    FutureWarning,
    match='is now ijckd_jax.training.experiment; the old name works until '
    'version 0.4, which comes no earlier than 2027-06-01',
  ):
    config = config_utils.load(str(path))
  assert config.method.name == 'kd'


@pytest.mark.parametrize('old', moved.MODULES)
def test_modules_are_found_by_their_old_names(old, monkeypatch):
  """The very same ones, so that a class is one class."""
  new = importlib.import_module(moved.PACKAGE + moved.MODULES[old])
  monkeypatch.delitem(sys.modules, moved.PACKAGE + old, raising=False)
  with pytest.warns(FutureWarning, match=f'{old} is now {new.__name__}'):
    assert importlib.import_module(moved.PACKAGE + old) is new


def test_modules_of_folders_that_moved_are_found(monkeypatch):
  from ijckd_jax.data.datasets import digits as new

  monkeypatch.delitem(sys.modules, 'ijckd_jax.datasets.digits', raising=False)
  with pytest.warns(FutureWarning, match='is now ijckd_jax.data.datasets.dig'):
    assert importlib.import_module('ijckd_jax.datasets.digits') is new


def test_a_folder_of_the_name_of_a_module_has_what_that_had():
  old = importlib.import_module('ijckd_jax.bundles')
  with pytest.warns(FutureWarning, match='bundles.load is now ijckd_jax.bun'):
    assert old.load is bundles.load


def test_names_that_never_were_are_not_found():
  for name in ('nothing', 'datasets.nothing', 'bundles.nothing'):
    with pytest.raises(ModuleNotFoundError, match=name):
      importlib.import_module(moved.PACKAGE + name)


@pytest.mark.parametrize('old', moved.COMMANDS)
def test_each_old_command_is_one_of_today(old, monkeypatch):
  """Imported, it is that module; only `python -m` runs it."""
  new = importlib.import_module(f'ijckd_jax.commands.{moved.COMMANDS[old]}')
  monkeypatch.delitem(sys.modules, moved.PACKAGE + old, raising=False)
  with pytest.warns(FutureWarning, match=f'{old} is now {new.__name__}'):
    assert importlib.import_module(moved.PACKAGE + old) is new
  of_old = command.COMMANDS.keys() - {'train', 'sweep', 'probe'}
  assert {*moved.COMMANDS.values()} == of_old


@pytest.mark.parametrize(
  'old, new', [('predict', 'predict'), ('models', 'models')]
)
def test_commands_are_found_by_their_old_modules(old, new):
  done = subprocess.run(
    [sys.executable, '-m', f'ijckd_jax.{old}', '--help'],
    capture_output=True,
    check=True,
    text=True,
  )
  assert done.stdout.startswith(f'usage: python -m ijckd_jax {new} ')
  assert done.stderr == (
    f'python -m ijckd_jax.{old} is now python -m ijckd_jax {new}; the old name '
    'works until version 0.4, which comes no earlier than 2027-06-01\n'
  )
