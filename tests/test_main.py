"""The command: what it prints, and what it says to mistakes."""

import os
import pathlib
import re
import shlex
import signal
import subprocess
import sys
import time

import pytest

from ijckd_jax import __main__ as ijckd
from ijckd_jax import main
from ijckd_jax.bundles import bundles
from ijckd_jax.commands import evaluate

ROOT = pathlib.Path(__file__).parents[1]
DIGITS = str(ROOT / 'configs' / 'digits.py')


@pytest.fixture
def command(run_command):
  return lambda *argv, entry=main.main: run_command(entry, *argv)


def test_help(command):
  code, out, _ = command('--help')
  assert code == 0
  assert '--workdir' in out


@pytest.mark.parametrize(
  'argv, said',
  [
    ([], '--config'),
    (['--config', 'nowhere.py'], "no config file 'nowhere.py'"),
    (['--config', DIGITS + ':metod=kd'], "did you mean 'method'"),
    (['--config', DIGITS + ':method'], 'give key=value'),
    (['--config', DIGITS + ':method=ijkd'], "did you mean 'ijckd'"),
    (['--config', DIGITS + ':method=no.such:Method'], "no module 'no.such'"),
    (['--config', DIGITS + ':student=resnet9'], "did you mean 'resnet8'"),
    (['--config.total_epoch=3'], "did you mean 'total_epochs'"),
    (['--config.optimizer.learning_rat=1'], "'optimizer.learning_rate'"),
    (['--config.method.logits_weight=1'], "did you mean 'method.logit_weight'"),
    (['--config.method.name=kd'], "method 'kd' has no field"),
    (['--config.method.connector=bottlenek'], "did you mean 'bottleneck'"),
    (['--config.method.connector=mlp'], "feature_site='pooled'"),
    (['--config.method.factor=100'], 'factor=100'),
    (
      [
        f'--config.method.{term}_weight=0'
        for term in ('cross_entropy', 'logit', 'feature')
      ],
      'nothing to learn',
    ),
    (['--config.dataset.name=digit'], "did you mean 'digits'"),
    (['--config.batch_size=many'], 'batch_size'),
    (['--config.batch_size=0'], 'positive multiple'),
    (['--config.accumulation=7'], 'accumulation=7'),
    (['--config.total_steps=5'], 'give one'),
    (['--config.total_epochs=0'], 'give one'),
    (['--config.total_epochs=-1'], 'negative'),
    (['--config.total_epochs=nan'], 'finite'),
    (['--config.seed=-1'], 'seed'),
    (['--config.num_cpu_devices=0'], 'at least 1'),
    (['--config.optimizer.learning_rate=nan'], 'must be positive'),
    (['--config.teacher.learning_rate=-1'], 'must be positive'),
    (['--config.optimizer.momentum=2'], 'optimizer.momentum=2'),
    (['--config.optimizer.clip_norm=-1'], 'optimizer.clip_norm=-1'),
    (['--config.dataset.crop_padding=-1'], 'crop_padding'),
    (['--config.dataset.validation_fraction=1'], 'validation_fraction'),
    (['--config', f'{DIGITS}:student=json:loads'], 'backbone'),
    (['--config', f'{DIGITS}:method=json:JSONDecoder'], 'dataclass'),
    (['--config.dataset.name=json:loads'], 'dataclass'),
    (['--config.mapper=pmpa'], "did you mean 'pmap'"),
    (['--config.dtype=float16'], "did you mean 'bfloat16'"),
    (['--config.optimizer.name=sdg'], "did you mean 'sgd'"),
    (['--config.optimizer.schedule=cosin'], "did you mean 'cosine'"),
    (['--config.optimizer.warmup_epochs=99'], 'does not fit'),
    (
      ['--config.total_epochs=1'],
      'optimizer.warmup_epochs=1.0, a warm-up of 24 steps, does not fit into '
      'total_epochs=1.0, 24 steps',
    ),
    (['--config.teacher.checkpoint=/nowhere'], 'no bundle in /nowhere'),
    (['--config.writers=("no.such:Writer",)'], "no module 'no.such'"),
    (['--overwrit'], "unknown flag '--overwrit'"),
    (['stray'], "unexpected 'stray'"),
  ],
)
def test_mistakes_get_one_line(command, tmp_path, data_dir, argv, said):
  if '--config' not in argv and argv:
    argv = ['--config', DIGITS, *argv]
  code, out, err = command(
    *argv,
    *([f'--config.dataset.data_dir={data_dir}'] if DIGITS in argv else []),
    *(['--workdir', tmp_path / 'run'] if argv else []),
  )
  assert (code, out) == (2, '')
  assert err.count('\n') == 1, err
  assert said in err
  assert not (tmp_path / 'run').exists()


def test_teacher_must_fit(command, finished_run, tmp_path, data_dir):
  workdir, _ = finished_run
  common = ['--workdir', tmp_path / 'run']
  common += [f'--config.dataset.data_dir={data_dir}']
  code, _, err = command(
    '--config', DIGITS, f'--config.teacher.checkpoint={workdir}', *common
  )
  assert code == 2
  assert 'is a plain, but the config says teacher.backbone=resnet20' in err
  code, _, err = command(
    *('--config', str(ROOT / 'configs' / 'cifar100.py') + ':teacher=plain'),
    f'--config.teacher.checkpoint={workdir}',
    *common,
  )
  assert code == 2
  assert '10 classes' in err and '100' in err
  assert not (tmp_path / 'run').exists()


@pytest.mark.parametrize(
  'name, said',
  [
    ('student.onnx', 'is an exported file and no bundle: ijckd predict reads'),
    ('student.stablehlo', 'exported file and no bundle: ijckd predict reads'),
    ('student.safetensors', 'if ijckd export wrote it, ijckd predict reads it'),
    ('weights.pth', 'import it first: ijckd weights import --checkpoint'),
  ],
)
def test_a_file_in_place_of_a_bundle(command, tmp_path, name, said):
  (tmp_path / name).write_bytes(b'content')
  code, _, err = command('--bundle', tmp_path / name, entry=evaluate.main)
  assert code == 2
  assert said in err and err.count('\n') == 1


def test_truncated_teacher(command, finished_run, tmp_path, data_dir):
  workdir, result = finished_run
  broken = tmp_path / 'broken'
  result.bundle.save(broken)
  arrays = broken / bundles.ARRAYS_FILE
  arrays.write_bytes(arrays.read_bytes()[:-100])
  code, _, err = command(
    *('--config', DIGITS + ':teacher=resnet8', '--workdir', tmp_path / 'run'),
    f'--config.teacher.checkpoint={broken}',
    f'--config.dataset.data_dir={data_dir}',
  )
  assert code == 2
  assert err.count('\n') == 1
  assert 'cannot be read' in err
  (broken / bundles.SPEC_FILE).write_text('{"format_version": 99}')
  code, _, err = command('--bundle', broken, entry=evaluate.main)
  assert code == 2


def test_workdir_of_another_config(command, finished_run, data_dir, tmp_path):
  workdir, _ = finished_run
  before = sorted(path.name for path in workdir.iterdir())
  code, _, err = command(
    *('--config', DIGITS, '--workdir', workdir),
    f'--config.dataset.data_dir={data_dir}',
  )
  assert code == 2
  assert 'batch_size: 48 -> 60;' in err and '--overwrite' in err
  assert len(err) < 500
  assert sorted(path.name for path in workdir.iterdir()) == before
  file = tmp_path / 'file'
  file.write_text('not a folder')
  code, _, err = command(
    *('--config', DIGITS, '--workdir', file / 'run'),
    f'--config.dataset.data_dir={data_dir}',
  )
  assert code == 2
  assert 'cannot be written' in err
  assert err.count('\n') == 1


def test_foreign_folders_are_left_alone(command, tmp_path, data_dir):
  """Another tool's folder may have files of the same names."""
  common = ['--config', f'{DIGITS}:teacher=resnet8']
  common += [f'--config.dataset.data_dir={data_dir}']
  for name in ('config.json', 'checkpoints/precious.pt', 'bundle/mine'):
    folder = tmp_path / name.replace('/', '_')
    (folder / name).parent.mkdir(parents=True)
    (folder / name).write_text('{"hidden_size": 768}')
    for more in ([], ['--overwrite']):
      code, _, err = command(*common, '--workdir', folder, *more)
      assert code == 2
      assert 'not of a run' in err
      assert (folder / name).exists()
      assert len(list(folder.iterdir())) == 1
  assert command(*common, '--workdir', '')[0] == 2


# A whole run.
@pytest.mark.slow
def test_damaged_config_of_a_run_can_be_overwritten(
  command, finished_run, tmp_path, data_dir
):
  workdir, result = finished_run
  folder = tmp_path / 'run'
  result.bundle.save(folder / 'bundle')
  (folder / 'config.json').write_text('{"half')
  (folder / 'run.json').write_bytes((workdir / 'run.json').read_bytes())
  argv = ['--config', f'{DIGITS}:teacher=plain', '--workdir', folder]
  argv += [f'--config.dataset.data_dir={data_dir}', '--config.total_epochs=0']
  argv += ['--config.total_steps=2', '--config.optimizer.warmup_epochs=0']
  argv += ['--config.bounds.fit_examples=0']
  argv += [f'--config.teacher.checkpoint={workdir}/teacher']
  code, _, err = command(*argv)
  assert code == 2
  assert 'config.json is damaged' in err
  code, out, err = command(*argv, '--overwrite')
  assert code == 0, err
  assert 'student, last' in out


def run_main(workdir, data_dir, *more):
  return subprocess.Popen(
    [sys.executable, '-m', 'ijckd_jax.main']
    + ['--config', f'{DIGITS}:teacher=resnet8', '--workdir', str(workdir)]
    + [f'--config.dataset.data_dir={data_dir}', *more],
    cwd=ROOT,
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  )


def test_interrupted_command_continues(tmp_path, data_dir):
  fields = ['--config.total_epochs=0', '--config.total_steps=2000']
  process = run_main(tmp_path / 'run', data_dir, *fields)
  checkpoints = tmp_path / 'run' / 'teacher' / 'checkpoints'
  deadline = time.time() + 120
  while not (checkpoints.exists() and any(checkpoints.glob('[0-9]*'))):
    assert process.poll() is None and time.time() < deadline
    time.sleep(0.1)
  process.send_signal(signal.SIGINT)
  _, err = process.communicate(timeout=60)
  assert process.returncode == 130, err
  stopped = int(re.search(r'stopped after step (\d+) of 2000', err)[1])
  assert 'Traceback' not in err
  process = run_main(tmp_path / 'run', data_dir, *fields)
  for line in process.stderr:
    if 'continues after step' in line:
      break
  assert line.strip().endswith(f'continues after step {stopped}')
  process.kill()
  process.communicate()


@pytest.mark.slow
def test_command_from_start_to_end_and_overwrite(tmp_path, data_dir):
  fields = ['--config.total_epochs=0', '--config.total_steps=4']
  fields += ['--config.optimizer.warmup_epochs=0', '--config.num_cpu_devices=2']
  process = run_main(tmp_path, data_dir, *fields)
  out, err = process.communicate(timeout=300)
  assert process.returncode == 0, err
  assert 'student' in out and 'teacher' in out and 'Traceback' not in err
  assert os.path.exists(tmp_path / 'report.md')
  teacher = tmp_path / 'teacher' / 'summary.json'
  before = teacher.stat().st_mtime_ns, (tmp_path / 'summary.json').stat().st_ino
  process = run_main(tmp_path, data_dir, *fields, '--overwrite')
  again, err = process.communicate(timeout=300)
  assert process.returncode == 0, err
  # The teacher is kept, the student made anew.
  after = teacher.stat().st_mtime_ns, (tmp_path / 'summary.json').stat().st_ino
  assert before[0] == after[0]
  assert before[1] != after[1] or 'step 4/4' in err


def test_the_commands_that_a_run_ends_with_can_be_typed(
  finished_run, tmp_path, monkeypatch, capsys
):
  from PIL import Image

  workdir, result = finished_run
  main._show(result, str(workdir))
  lines = capsys.readouterr().out.split('next:\n')[1].splitlines()
  assert len(lines) == 2
  Image.new('L', (8, 8)).save(tmp_path / 'image.png')
  monkeypatch.chdir(tmp_path)
  for line in lines:
    program, *argv = shlex.split(line)
    assert program == 'ijckd'
    assert not ijckd.main(argv), line
  assert (tmp_path / 'student.onnx').exists()
