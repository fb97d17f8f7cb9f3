"""Where compiled programs are kept, and that they are taken from there."""

import json
import os
import pathlib
import subprocess
import sys

import jax
import pytest

from ijckd_jax.runtime import compilation_cache
from ijckd_jax.runtime import workdirs
from ijckd_jax.training import experiment

ROOT = pathlib.Path(__file__).parents[1]
FIELDS = (
  'jax_compilation_cache_dir',
  'jax_persistent_cache_min_compile_time_secs',
)


@pytest.fixture
def enabled(monkeypatch):
  """Returns a function that enables a folder: what JAX then has for one."""
  monkeypatch.delenv('JAX_COMPILATION_CACHE_DIR', raising=False)
  before = {field: getattr(jax.config, field) for field in FIELDS}

  def enable(folder, **kwargs):
    jax.config.update('jax_compilation_cache_dir', None)
    compilation_cache.enable(str(folder), **kwargs)
    return jax.config.jax_compilation_cache_dir

  yield enable
  for field, value in before.items():
    jax.config.update(field, value)


def test_default_is_in_the_users_cache(enabled, monkeypatch, tmp_path):
  config = experiment.default_config(
    dataset='digits', teacher='resnet8', student='resnet8'
  )
  monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'cache'))
  folder = tmp_path / 'cache' / 'ijckd_jax' / 'compiled'
  assert enabled(config.compilation_cache) == str(folder)
  assert folder.stat().st_mode & 0o777 == 0o700
  monkeypatch.delenv('XDG_CACHE_HOME')
  monkeypatch.setenv('HOME', str(tmp_path / 'home'))
  folder = tmp_path / 'home' / '.cache' / 'ijckd_jax' / 'compiled'
  assert enabled(config.compilation_cache) == str(folder)


def test_another_folder_or_none(enabled, monkeypatch, tmp_path):
  monkeypatch.chdir(tmp_path)
  assert enabled('here') == str(tmp_path / 'here')
  assert enabled('') is None


def test_jaxs_own_variable_wins(enabled, monkeypatch, tmp_path):
  monkeypatch.setenv('JAX_COMPILATION_CACHE_DIR', str(tmp_path / 'jax'))
  assert enabled(tmp_path / 'ours') is None
  assert list(tmp_path.iterdir()) == []


def test_folder_that_cannot_be_written_is_told_in_a_line(
  enabled, caplog, tmp_path
):
  (tmp_path / 'file').touch()
  assert enabled(tmp_path / 'file' / 'cache') is None
  (line,) = [r.getMessage() for r in caplog.records if r.name == 'ijckd_jax']
  assert line.startswith('programs are compiled at every start: ')
  assert str(tmp_path / 'file') in line
  assert '\n' not in line


def refused(enabled, caplog, folder):
  """Returns the line that says why a folder is not used."""
  caplog.clear()
  assert enabled(folder) is None
  (line,) = [r.getMessage() for r in caplog.records if r.name == 'ijckd_jax']
  assert line.startswith('programs are compiled at every start: ')
  assert '\n' not in line
  return line


@pytest.mark.parametrize('mode', [0o777, 0o770, 0o702, 0o1777])
def test_folder_that_others_can_write(enabled, caplog, tmp_path, mode):
  """Also a sticky one: to add a program is enough."""
  folder = tmp_path / 'cache'
  folder.mkdir()
  folder.chmod(mode)
  assert f'can write to {folder}' in refused(enabled, caplog, folder)
  assert list(folder.iterdir()) == []
  # Nor one beneath it, which others could put another folder in place of.
  beneath = folder / 'mine' / 'own'
  if mode & 0o1000:
    assert enabled(beneath) == str(beneath)
  else:
    assert f'can write to {folder}' in refused(enabled, caplog, beneath)
  folder.chmod(0o755)
  assert enabled(beneath) == str(beneath)


def test_link_into_a_folder_that_others_can_write(enabled, caplog, tmp_path):
  folder, link = tmp_path / 'cache', tmp_path / 'link'
  folder.mkdir()
  link.symlink_to(folder)
  # JAX gets the folder itself: the link may change meanwhile.
  assert enabled(link) == str(folder)
  folder.chmod(0o777)
  assert f'can write to {folder}' in refused(enabled, caplog, link)


@pytest.mark.parametrize('kind', ['folder', 'above', 'program'])
def test_what_belongs_to_another_user(
  enabled, caplog, monkeypatch, tmp_path, kind
):
  above, folder = tmp_path / 'above', tmp_path / 'above' / 'cache'
  program = folder / 'a-cache'
  folder.mkdir(parents=True)
  program.touch()
  assert enabled(folder) == str(folder)
  theirs = {'folder': folder, 'above': above, 'program': program}[kind]
  found = os.stat(theirs)
  if os.geteuid() == 0:
    os.chown(theirs, 12345, -1)
  else:
    # Only root can give a file away; whoever runs this becomes another user.
    monkeypatch.setattr(os, 'geteuid', lambda: found.st_uid + 1)
    theirs = folder
  line = refused(enabled, caplog, folder)
  assert f'{theirs} belongs to another user' in line


def test_new_folders_are_the_users_alone(enabled, tmp_path):
  umask = os.umask(0)
  try:
    folder = tmp_path / 'a' / 'b' / 'c'
    assert enabled(folder) == str(folder)
  finally:
    os.umask(umask)
  for path in (folder, *list(folder.parents)[:2]):
    assert path.stat().st_mode & 0o777 == 0o700


def test_the_oldest_go_first(enabled, tmp_path):
  for age, name in enumerate('abcd'):
    path = tmp_path / f'{name}-cache'
    path.write_bytes(bytes(100))
    os.utime(path, (1000 - age, 1000 - age))
  (tmp_path / 'other').write_bytes(bytes(1000))
  enabled(tmp_path, max_bytes=250)
  left = {path.name for path in tmp_path.iterdir()}
  assert left == {'a-cache', 'b-cache', 'other'}


def test_a_run_may_go_on_with_another_folder():
  assert 'compilation_cache' in workdirs.RUNTIME_FIELDS


def test_importing_enables_nothing():
  script = (
    'import jax;'
    'from ijckd_jax.runtime import compilation_cache;'
    'from ijckd_jax.commands import evaluate;'
    'from ijckd_jax import main;'
    'from ijckd_jax.training import train;'
    'print(jax.config.jax_compilation_cache_dir)'
  )
  environment = {**os.environ}
  del environment['JAX_COMPILATION_CACHE_DIR']
  result = subprocess.run(
    [sys.executable, '-c', script],
    capture_output=True,
    check=True,
    cwd=ROOT,
    env=environment,
    text=True,
  )
  assert result.stdout == 'None\n'


@pytest.mark.slow
def test_warm_start_is_silent_and_goes_on_to_the_same_bits(tmp_path, data_dir):
  """Compiled at once, compiled and taken from the folder, and half by half."""
  cache = tmp_path / 'cache'
  environment = {**os.environ, 'XDG_CACHE_HOME': str(cache)}
  for name in list(environment):
    if name.startswith('JAX_'):
      del environment[name]
  environment['JAX_PLATFORMS'] = 'cpu'

  def run(workdir, *more):
    result = subprocess.run(
      [sys.executable, '-m', 'ijckd_jax.main', '--workdir', str(workdir)]
      + ['--config', f'{ROOT}/configs/digits.py:teacher=resnet8']
      + [f'--config.dataset.data_dir={data_dir}', '--config.total_steps=12']
      + ['--config.total_epochs=0', '--config.optimizer.warmup_epochs=0']
      + ['--config.eval_epochs=0', '--config.eval_steps=6', *more],
      capture_output=True,
      cwd=ROOT,
      env=environment,
      text=True,
    )
    assert result.returncode == 0, result.stderr
    return result.stderr

  def left(workdir):
    meta = workdir / 'checkpoints' / '12' / '_CHECKPOINT_METADATA'
    metadata = json.loads(meta.read_text())['custom_metadata']
    return json.loads(metadata['content'])['arrays']

  def files():
    return sorted(path for path in cache.rglob('*-cache'))

  run(tmp_path / 'alone', '--config.compilation_cache=')
  assert files() == []
  run(tmp_path / 'cold')
  kept = files()
  assert len(kept) > 3
  warm = run(tmp_path / 'warm')
  # A busy machine may compile more of them slowly enough to be kept.
  assert set(files()) >= set(kept)
  for line in warm.splitlines():
    assert ' step ' in line or line.startswith(str(tmp_path)), warm
  # Its second half is made by programs that another process compiled.
  half = tmp_path / 'half'
  run(half, '--config.compilation_cache=', '--config.bundle=last')
  for folder in (half, half / 'teacher'):
    for name in ('summary.json', 'checkpoints/12'):
      subprocess.run(['rm', '-r', str(folder / name)], check=True)
  assert 'continues after step 6' in run(half)
  for workdir in ('cold', 'warm', 'half'):
    for folder in ('.', 'teacher'):
      expected = left(tmp_path / 'alone' / folder)
      assert left(tmp_path / workdir / folder) == expected, (workdir, folder)
