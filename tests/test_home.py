"""A `~` in a path is the user's home folder, wherever the path comes from."""

import os
import shutil

import numpy as np
from PIL import Image
import pytest

from ijckd_jax.bundles import bundles
from ijckd_jax.commands import export
from ijckd_jax.commands import predict
from ijckd_jax.commands import pytorch_flags
from ijckd_jax.commands import weights
from ijckd_jax.deploy import pictures
from ijckd_jax.deploy import sessions
from ijckd_jax.runtime import compilation_cache
from ijckd_jax.runtime import config_utils
from ijckd_jax.training import output_recorder
from ijckd_jax.training import train


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
  """The home folder, beside the working directory, which stays empty."""
  folder, here = tmp_path / 'home', tmp_path / 'here'
  folder.mkdir()
  here.mkdir()
  monkeypatch.setenv('HOME', str(folder))
  monkeypatch.chdir(here)
  yield folder
  assert not os.listdir(here)


@pytest.fixture
def run(home, finished_run):
  shutil.copytree(finished_run[0], home / 'run')
  return home / 'run'


def test_expand(home):
  assert config_utils.expand('~/x') == f'{home}/x'
  for path in ('x/~', 'gs://bucket/~', '/x', '', 'hf:owner/name@1'):
    assert config_utils.expand(path) == path


def test_bundles(home, run):
  bundle = bundles.load('~/run')
  bundle.save('~/copy')
  again = bundles.load(home / 'copy')
  np.testing.assert_array_equal(
    again.variables['params']['head']['kernel'],
    bundle.variables['params']['head']['kernel'],
  )


def test_a_workdir(run, small_config):
  result = train.train_and_evaluate(small_config(), '~/run')
  assert result.state is None  # It was found there, and finished.


def test_a_new_workdir_and_what_the_config_names(
  home, run, small_config, monkeypatch
):
  folders = []

  def take(exp, folder, *_):
    folders.append(folder)

  monkeypatch.setattr(train.one_run, 'run', take)
  config = small_config(**{'teacher.checkpoint': '~/run/teacher'})
  train.train_and_evaluate(config, '~/new')
  assert folders == [home / 'new'] and (home / 'new/config.json').exists()


def test_a_store(home, small_config, monkeypatch):
  made = []
  monkeypatch.setattr(
    output_recorder.output_store, 'Store', lambda *args, **_: made.append(args)
  )
  from ijckd_jax.training import experiment

  config = small_config(
    **{'teacher.store.views': 1, 'teacher.store.directory': '~/store'}
  )
  exp = experiment.build(config)
  output_recorder._store(exp, home / 'run', exp.dataset.load('validation'))
  assert made[0][0] == f'{home}/store'


def test_compiled_programs(home, monkeypatch):
  monkeypatch.delenv('JAX_COMPILATION_CACHE_DIR')
  monkeypatch.setattr(compilation_cache.jax.config, 'update', lambda *_: None)
  compilation_cache.enable('~/programs')
  assert (home / 'programs').is_dir()


def test_exported_files_and_pictures(home, run, capsys):
  flags = ['--bundle', '~/run', '--output', '~/out/student.safetensors']
  export.main([*flags, '--format', 'safetensors', '--check_images', '8'])
  assert (home / 'out/student.safetensors').exists()
  Image.new('RGB', (8, 8)).save(home / 'black.png')
  assert pictures.find(['~/*.png']) == [home / 'black.png']
  capsys.readouterr()
  predict.main(['--bundle', '~/out/student.safetensors', '~/black.png'])
  assert capsys.readouterr().out.startswith(f'{home}/black.png  ')
  assert sessions.load('~/out/student.safetensors').image_shape == (8, 8, 1)


def test_weights(home, run, capsys):
  weights.main(
    ['export', '--bundle', '~/run/teacher', '--output', '~/w.safetensors']
  )
  weights.main(
    ['import', '--checkpoint', '~/w.safetensors', '--output', '~/again']
  )
  assert (home / 'again/bundle.json').exists()


def test_names_of_classes(home):
  (home / 'names.txt').write_text('Bär\nKatze\n', encoding='utf-8')

  class Flags:
    class_names = '~/names.txt'

  assert pytorch_flags.class_names(Flags) == ('Bär', 'Katze')
