"""The command `ijckd`, and what an installed package needs for it."""

import configparser
from importlib import metadata
import pathlib
import shutil
import signal
import subprocess
import sys

import pytest

import ijckd_jax
from ijckd_jax import __main__ as command
from ijckd_jax.runtime import config_utils

ROOT = pathlib.Path(__file__).parents[1]
CONFIGS = {path.stem: path for path in (ROOT / 'configs').glob('*.py')}


@pytest.fixture
def ijckd(monkeypatch, capsys):
  """Returns a function that runs the program: its exit code and its words."""

  def run(*argv, entry=command.console):
    monkeypatch.setattr(sys, 'argv', ['ijckd', *argv])
    monkeypatch.setattr(sys, 'path', list(sys.path))
    monkeypatch.setattr(config_utils, 'user_path', [])
    monkeypatch.setattr(signal, 'signal', lambda *_: None)  # Of this process.
    with pytest.raises(SystemExit) as stopped:
      entry()
    printed = capsys.readouterr()
    return stopped.value.code, printed.out, printed.err

  return run


@pytest.fixture(scope='module')
def setup_cfg():
  parser = configparser.ConfigParser()
  parser.read(ROOT / 'setup.cfg')
  return parser


def test_setup_cfg_lists_every_package(setup_cfg):
  package = ROOT / 'ijckd_jax'
  folders = {path.parent for path in package.rglob('__init__.py')}
  names = {'.'.join(path.relative_to(ROOT).parts) for path in folders}
  listed = setup_cfg['options']['packages'].split()
  assert set(listed) == names | {'ijckd_jax.configs'}
  mapped = setup_cfg['options']['package_dir'].strip()
  assert mapped == 'ijckd_jax.configs = configs'


def test_setup_cfg_makes_the_program(setup_cfg):
  scripts = setup_cfg['options.entry_points']['console_scripts']
  name, _, entry = scripts.strip().partition(' = ')
  assert name == 'ijckd'
  assert config_utils.resolve('entry', entry, {}) is command.console


def test_the_package_ships_every_config():
  assert config_utils.shipped_configs() == CONFIGS


def test_an_installed_package_has_its_configs_inside(tmp_path):
  """As a wheel lays them out; a stranger's `configs` beside it is not read."""
  package = tmp_path / 'ijckd_jax'
  shutil.copytree(pathlib.Path(ijckd_jax.__file__).parent, package)
  shutil.copytree(ROOT / 'configs', package / 'configs')
  (tmp_path / 'configs').mkdir()
  (tmp_path / 'configs' / 'strange.py').touch()
  script = (
    'from ijckd_jax.runtime import config_utils\n'
    'print(*config_utils.shipped_configs().values())'
  )
  done = subprocess.run(
    [sys.executable, '-c', script],
    cwd=tmp_path,
    capture_output=True,
    check=True,
    text=True,
  )
  paths = [package / 'configs' / f'{name}.py' for name in sorted(CONFIGS)]
  assert done.stdout.split() == list(map(str, paths))


@pytest.mark.parametrize('name', CONFIGS)
def test_a_name_and_a_path_give_the_same_config(name):
  by_name, by_path = map(config_utils.load, (name, str(CONFIGS[name])))
  assert by_name.to_dict() == by_path.to_dict()


def test_a_name_takes_an_argument():
  config = config_utils.load('cifar100:student=resnet14,method=kd')
  assert config.student.backbone == 'resnet14'
  assert config.method.name == 'kd'


def test_the_working_directory_does_not_change_what_a_name_means(
  tmp_path, monkeypatch
):
  text = 'import ml_collections\nget_config = ml_collections.ConfigDict\n'
  for name in ('digits', 'digits.py', 'mine'):
    (tmp_path / name).write_text(text)
  monkeypatch.chdir(tmp_path)
  assert config_utils.load('digits').total_epochs == 20
  for path in ('./digits', 'digits.py', './mine'):
    assert not config_utils.load(path).to_dict()
  with pytest.raises(config_utils.UserError, match="unknown config 'mine'"):
    config_utils.load('mine')


@pytest.mark.parametrize(
  'reference, arg',
  [
    ('./we:ird.py', None),
    ('./we:ird.py:method=kd', 'method=kd'),
    ('a:b/c.py:', ''),
    ('~/home:made.py:x=~', 'x=~'),
    ('./plain.py:./we:ird.py', './we:ird.py'),
  ],
)
def test_a_path_with_colons(reference, arg, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  monkeypatch.setenv('HOME', str(tmp_path))
  (tmp_path / 'a:b').mkdir()
  text = (
    'import ml_collections\n'
    'def get_config(arg=None):\n'
    '  return ml_collections.ConfigDict({"arg": arg}, convert_dict=False)\n'
  )
  for name in ('we:ird.py', 'a:b/c.py', 'home:made.py', 'plain.py'):
    (tmp_path / name).write_text(text)
  assert config_utils.load(reference).arg == arg


@pytest.mark.parametrize(
  'name, said',
  [
    (
      'digit',
      r"unknown config 'digit'; did you mean 'digits'\?.*cifar100, dig",
    ),
    ('', r"unknown config ''; known: cifar100, .*; or a path"),
    ('elsewhere/digits.py', 'no config file .*ships one, --config digits'),
    ('elsewhere/none.py', r"there is no config file 'elsewhere/none\.py'$"),
  ],
)
def test_a_config_that_is_not_there(name, said):
  with pytest.raises(config_utils.UserError, match=said):
    config_utils.load(name)


def test_help_names_every_command(ijckd):
  for flag in ('--help', '-h', 'help'):
    code, out, err = ijckd(flag)
    assert (code, err) == (0, '')
  lines = dict(line.split(maxsplit=1) for line in out.split('\n')[2:-3])
  assert lines == command.COMMANDS
  assert max(map(len, out.splitlines())) <= 80


@pytest.mark.parametrize('name', command.COMMANDS)
def test_each_command_shows_how_it_was_called(ijckd, name):
  code, out, err = ijckd(name, '--help')
  assert (code or 0, err) == (0, '')
  assert out.startswith(f'usage: ijckd {name} ')
  assert 'python -m ijckd_jax' not in out
  code, out, _ = ijckd(
    name, '--help', entry=lambda: command.run('python -m ijckd_jax')
  )
  assert out.startswith(f'usage: python -m ijckd_jax {name} ')


def test_help_loads_nothing_slow():
  script = (
    'import sys\n'
    'from ijckd_jax import __main__\n'
    'sys.argv = ["ijckd", "--help"]\n'
    'try:\n'
    '  __main__.console()\n'
    'except SystemExit:\n'
    '  print(*sys.modules)'
  )
  done = subprocess.run(
    [sys.executable, '-c', script], capture_output=True, check=True, text=True
  )
  loaded = set(done.stdout.rpartition('\n\n')[2].splitlines()[-1].split())
  assert {name for name in loaded if name.startswith('ijckd_jax')} == {
    'ijckd_jax',
    'ijckd_jax.__main__',
    'ijckd_jax.runtime',
    'ijckd_jax.runtime.moved',
    'ijckd_jax.runtime.streams',
  }
  assert not loaded & {'absl', 'argparse', 'jax', 'ml_collections', 'numpy'}


@pytest.mark.parametrize('argv', [['--help'], ['train', '--help']])
def test_output_that_nobody_reads_ends_quietly(argv):
  """As of `ijckd ... | head -0`: no traceback, and what shells call 141."""
  process = subprocess.Popen(
    [sys.executable, '-m', 'ijckd_jax', *argv],
    cwd=ROOT,
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
  )
  process.stdout.close()
  assert process.stderr.read() == b''
  assert process.wait() in (-signal.SIGPIPE, 128 + signal.SIGPIPE)


def test_without_a_command_the_help_is_an_error(ijckd):
  code, out, err = ijckd()
  assert (code, out) == (2, '')
  assert err == command.usage('ijckd') + '\n'


def test_version(ijckd):
  code, out, _ = ijckd('-V')
  assert ijckd('--version')[:2] == (code, out)
  assert (code, out) == (0, f'ijckd_jax {metadata.version("ijckd_jax")}\n')


@pytest.mark.parametrize(
  'argv, said',
  [
    (
      ['trian'],
      "unknown command 'trian'; did you mean 'train'? known: --help,",
    ),
    (['version'], "did you mean '--version'?"),
    (['--verbose'], "unknown command '--verbose'"),
    (['train'], '(see ijckd train --help)'),
    (['evaluate', '--bundel', 'x'], '(see ijckd evaluate --help)'),
    (['weights', 'import'], '(see ijckd weights import --help)'),
  ],
)
def test_mistakes_get_one_line(ijckd, argv, said):
  code, out, err = ijckd(*argv)
  assert (code, out) == (2, '')
  assert err.startswith('error: ') and err.count('\n') == 1
  assert said in err


def test_modules_of_the_working_directory_are_found_last(
  ijckd, monkeypatch, tmp_path
):
  """And not before the user names one: JAX itself looks for libtpu and more."""
  monkeypatch.chdir(tmp_path)
  (tmp_path / 'libtpu.py').write_text('')
  (tmp_path / 'module_of_a_user.py').write_text('class Method: pass')
  (tmp_path / 'numpy.py').write_text('raise SystemExit')
  before = [path for path in sys.path if path not in ('', str(tmp_path))]
  monkeypatch.setattr(sys, 'path', before)
  code, _, err = ijckd(
    'train', '--config', 'digits', '--workdir', 'run', '--x=1'
  )
  assert code == 2, err
  assert '' not in sys.path
  config_utils.resolve('method', 'module_of_a_user:Method', {})
  assert sys.path == [*before, '']
