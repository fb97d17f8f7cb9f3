"""Many runs as one command: what is made, what is said, what comes back."""

from concurrent import futures
import contextlib
import json
import logging
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from ijckd_jax.commands import sweep as command
from ijckd_jax.commands import sweep_flags
from ijckd_jax.reports import sweep_table
from ijckd_jax.runtime import children
from ijckd_jax.runtime import config_utils
from ijckd_jax.runtime import locks
from ijckd_jax.training import experiment
from ijckd_jax.training import sweep
from ijckd_jax.training import sweep_processes
from ijckd_jax.training import train

ROOT = pathlib.Path(__file__).parents[1]
# Children know it too.
PLAIN = 'experiments.extension_example.backbone:PlainNet'
# The 97.5% quantile of Student's t with 1 and 2 degrees of freedom, from a
# printed table.
QUANTILE = {1: 12.7062, 2: 4.3027}


@pytest.fixture(scope='module')
def config(small_config):
  """Returns a function that gives the config of a run that a child can make."""

  def make(method='ce', **fields):
    return small_config(method, PLAIN, total_steps=4, **fields)

  return make


@pytest.fixture
def finished(finished_run, tmp_path):
  """The folder of a sweep with two finished runs of seeds 0 and 1; configs."""
  source = finished_run[0] / 'teacher'
  fields = json.loads((source / 'config.json').read_text())
  del fields['ijckd_jax']
  configs = {}
  for seed in (0, 1):
    config = config_utils.from_json(json.dumps({**fields, 'seed': seed}))
    configs[f'plain/{seed}'] = config
    folder = shutil.copytree(source, tmp_path / 'sweep/plain' / str(seed))
    (folder / 'config.json').write_text(
      json.dumps(config.to_dict() | {'ijckd_jax': '0'})
    )
  return tmp_path / 'sweep', configs


def summary(top1, teacher=None):
  return {
    'student': {'last': {'top1': top1}},
    'teacher': teacher and {'top1': teacher},
    'parameters': {'student': {'backbone': 7000, 'head': 500}},
  }


def test_numbers_of_the_table_by_hand():
  runs = [
    sweep_table.Run(setting, seed, summary(top1, teacher))
    for setting, seed, top1, teacher in (
      ('kd', 0, 0.70, 0.9),
      ('kd', 1, 0.74, 0.9),
      ('kd', 2, 0.75, 0.9),
      ('ijckd', 1, 0.75, 0.9),
      ('ijckd', 2, 0.79, 0.9),
      ('ijckd', 3, 0.20, 0.9),  # Has no pair.
      ('ijckd', 0, 0.73, 0.9),
      ('ce', 1, 0.64, None),
    )
  ]
  runs += [sweep_table.Run('ce', 0, None), sweep_table.Run('at', 0, None)]
  kd, ijckd, ce, at = sweep_table.rows(runs)
  # Mean 73; deviations -3, 1, 2; (9 + 1 + 4) / 2 = 7.
  assert kd['seeds'] == [0, 1, 2] and kd['difference'] is None
  np.testing.assert_allclose(kd['top1']['mean'], 73)
  np.testing.assert_allclose(kd['top1']['std'], 7**0.5)
  np.testing.assert_allclose(kd['teacher_top1'], 90)
  # Differences 3, 1, 4: mean 8/3, variance (1/9 + 25/9 + 16/9) / 2 = 7/3.
  assert ijckd['seeds'] == [0, 1, 2, 3] and ijckd['difference']['pairs'] == 3
  np.testing.assert_allclose(ijckd['difference']['mean'], 8 / 3)
  np.testing.assert_allclose(
    ijckd['difference']['half_width'],
    QUANTILE[2] * (7 / 3) ** 0.5 / 3**0.5,
    rtol=1e-4,
  )
  assert ce['top1']['std'] is None and ce['teacher_top1'] is None
  np.testing.assert_allclose(ce['difference']['mean'], -10)
  assert ce['difference'] | {'mean': 0} == {
    **{'mean': 0, 'half_width': None, 'pairs': 1}
  }
  assert at['seeds'] == [] and at['top1'] == {'mean': None, 'std': None}
  lines = sweep_table.text([kd, ijckd, ce, at]).splitlines()
  cells = [[x.strip() for x in line.split('|')[1:-1]] for line in lines[:6]]
  assert cells[0] == [
    *('setting', 'seeds', 'top-1 %', 'std, points', 'difference, points'),
    *('95% interval, points', 'pairs', "teacher's top-1 %", 'parameters'),
  ]
  assert cells[2] == ['kd', '3', '73.00', '2.65', '', '', '', '90.00', '7,500']
  assert cells[3][4:7] == ['+2.67', '± 3.79', '3']
  assert cells[4] == ['ce', '1', '64.00', '', '-10.00', '', '1', '', '7,500']
  assert cells[5] == ['at', '0', '', '', '', '', '0', '', '']


def test_one_setting_has_no_differences():
  runs = [sweep_table.Run('kd', seed, summary(0.5 + seed)) for seed in (0, 1)]
  text = sweep_table.text(sweep_table.rows(runs))
  assert 'difference' not in text.lower() and 'teacher' not in text
  assert sweep_table.half_width([1.0, 3.0]) == pytest.approx(
    QUANTILE[1], rel=1e-4
  )


def test_runs_are_the_product_and_have_names_of_their_own():
  configs = sweep_flags.configs_of(
    ['digits', 'digits:method=ijckd,student=resnet14'],
    ['seed=-0..1', 'method.factor=2,4', "teacher.others=(),('a', 'b:c')"],
    ['--config.total_epochs=3', '--config.batch_size', '30'],
  )
  names = list(configs)
  start = 'digits,seed=0,method.factor=2,teacher.others=__'
  assert names[0].startswith(f'{start}~')  # Brackets are not for names.
  assert len(set(names)) == 2 * 2 * 2 * 2
  assert all(sweep.NAME_PART.fullmatch(name) for name in names)
  found = {
    (c.student.backbone, c.seed, c.method.factor, c.teacher.others)
    for c in configs.values()
  }
  assert len(found) == 16
  assert ('resnet14', 1, 4, ('a', 'b:c')) in found
  for config in configs.values():
    assert (config.total_epochs, config.batch_size) == (3.0, 30)
  again = sweep_flags.configs_of(['digits'], ['seed=1,0'], [])
  assert list(again) == ['digits,seed=1', 'digits,seed=0']
  assert list(sweep_flags.configs_of(['digits:method=kd'], [], [])) == [
    'digits_method=kd'
  ]


def test_settings_are_what_differs_but_for_the_seed(config):
  configs = {
    'same/kd/0': config('kd', seed=0),
    'same/kd/1': config('kd', seed=1),
    'same/kd,_T=1/1': config('kd', seed=1, **{'method.temperature': 1.0}),
    'ce,seed=10': config('ce', seed=10),
    'ce,optimizer.momentum=0.0': config(seed=0, **{'optimizer.momentum': 0.0}),
    'odd': config('simkd', seed=3),
    'even': config('simkd', seed=4),
    'digits,seed=3,lr=2': config('at', seed=3),
    'digits,seed=13,lr=2': config('at', seed=13),
    'digits,seed=1,lr=1': config('sp', seed=1),
  }
  assert list(sweep.setting_names(configs).values()) == [
    *('same/kd', 'same/kd', 'same/kd,_T=1/1', 'ce'),
    *('ce,optimizer.momentum=0.0', 'odd', 'odd'),
    *('digits,lr=2', 'digits,lr=2', 'digits,lr=1'),
  ]


def test_a_config_goes_to_a_child_and_comes_back(config, tmp_path):
  sent = config('ijckd', **{'teacher.refit_epochs': (0.1, 1e-17), 'seed': 7})
  sent.total_epochs = float('inf')
  path = tmp_path / 'run.json'
  path.write_text(config_utils.to_json(sent))
  found = config_utils.load(str(path))
  assert found.to_dict() == sent.to_dict()
  assert isinstance(found.teacher.refit_epochs, tuple)
  for text, said in (('[]', 'no config'), ('{', 'cannot be read')):
    path.write_text(text)
    with pytest.raises(config_utils.UserError, match=said):
      config_utils.load(str(path))
  with pytest.raises(config_utils.UserError, match='takes no argument'):
    config_utils.load(f'{path}:method=kd')
  with pytest.raises(config_utils.UserError, match='no config file'):
    config_utils.load('nowhere.json')


@pytest.mark.parametrize(
  'argv, said',
  [
    ([], '--config, --workdir'),
    (['--config', 'digit'], "did you mean 'digits'"),
    (['--over', 'sed=0..3'], "did you mean 'seed'"),
    (['--over', 'seed=a'], "invalid literal for int() with base 10: 'a'"),
    (['--over', 'seed=0,,1'], 'seed=: '),
    (['--over', 'seed='], 'give at least one value'),
    (['--over', 'seed'], 'give FIELD=VALUES'),
    (['--over', '=1'], 'give FIELD=VALUES'),
    (['--over', 'seed=3..1'], 'goes backwards; give 1..3'),
    (['--over', 'seed=0..99999'], 'more than 10000 runs'),
    (['--over', 'seed=0..999', '--over', 'batch_size=1..11'], '11000 runs'),
    (['--over', 'seed=-1..0'], 'seed=-1: a seed cannot be negative'),
    (['--over', 'seed=4294967296'], 'or above 4294967295'),
    (['--over', 'seed=0..1,5'], '--over seed=0..1: '),
    (['--over', 'seed=0..1,5'], 'a range FIRST..LAST stands alone'),
    (['--over', 'method=kd,ce'], 'give --config NAME:method=kd for each'),
    (['--over', 'seed=1,1'], 'the same run twice'),
    (['--over', 'seed=1,01'], 'the same run twice'),
    (['--config', 'digits'], 'the same run twice'),
    (['--config', 'digits:method=ijckd'], 'the same run twice'),
    (
      ['--config', 'digits:method=kd', '--over', 'method.factor=2,4'],
      "digits:method=kd: --over method.factor=2: unknown config field 'method.",
    ),
    (['--over', 'seed=1', '--over', 'seed=2'], '--over seed= sets that'),
    (['--over', 'seed=1', '--config.seed=2'], '--config.seed= sets that'),
    (['--over', 'seed=1', '--config.seed', '2'], '--config.seed= sets that'),
    (['--config.batch_size=many'], 'batch_size'),
    (['--config.batch_sze=3'], "did you mean 'batch_size'"),
    (['--jobs', '0'], '--jobs 0: give at least 1'),
    (['--jobs', 'two'], 'invalid int value'),
    (['--overwrite'], "unknown flag '--overwrite'"),
    (['stray'], "unexpected 'stray'"),
    (['--config.method.name=ijkd'], "did you mean 'ijckd'"),
    (['--over', 'num_cpu_devices=1,0'], 'num_cpu_devices=0: it must be at'),
    (['--over', 'num_cpu_devices=7'], 'a positive multiple of the 7 devices'),
    (['--over', 'optimizer.learning_rate=1,nan'], 'it must be positive'),
    (
      ['--config.total_epochs=0', '--config.total_steps=4'],
      'a warm-up of 24 steps, does not fit',
    ),
  ],
)
def test_mistakes_get_one_line(run_command, tmp_path, argv, said):
  if argv:
    argv = ['--config', 'digits', '--workdir', tmp_path / 'runs', *argv]
  code, out, err = run_command(command.main, *argv)
  assert (code, out) == (2, ''), err
  assert err.count('\n') == 1 and said in err, err
  assert not (tmp_path / 'runs').exists()


def test_the_folder_of_a_run_is_none_of_a_sweep(
  run_command, finished_run, tmp_path
):
  run, file = finished_run[0], tmp_path / 'file'
  file.touch()
  before = sorted(run.rglob('*'))
  for folder, said in (
    (run, f'{run} holds a run of its own'),
    (run / 'runs' / 'more', f'{run} holds a run of its own'),
    (file / 'runs', 'is not a folder'),
    ('gs://bucket/runs', 'is in a bucket'),
    ('', 'no workdir'),
  ):
    argv = ['--config', 'digits', '--over', 'seed=0,1', '--workdir', folder]
    code, _, err = run_command(command.main, *argv)
    assert code == 2 and said in err and err.count('\n') == 1, err
  assert sorted(run.rglob('*')) == before


@pytest.mark.parametrize(
  'name',
  [
    *('', '/tmp/x', '../x', 'a/../x', '.hidden', 'a b', 'a:b', 'sweep'),
    *('teacher_0123abcd/x', 'teacher_0123abcd.json', 'a//b', 'ä', 'x\n'),
  ],
)
def test_names_that_are_no_folders_below(config, tmp_path, name):
  with pytest.raises(config_utils.UserError, match='a run cannot be called'):
    sweep.run({name: config()}, tmp_path / 'x')
  assert not (tmp_path / 'x').exists()


def test_what_cannot_be_a_sweep(config, tmp_path):
  with pytest.raises(config_utils.UserError, match='nothing to run'):
    sweep.run({}, tmp_path / 'x')
  configs = {'a': config(), 'a/b': config('kd')}
  with pytest.raises(config_utils.UserError, match='in the folder of the run'):
    sweep.run(configs, tmp_path / 'x')
  configs = {'a.log': config(), 'a': config('kd')}
  with pytest.raises(config_utils.UserError, match="'a' has a file there"):
    sweep.run(configs, tmp_path / 'x')


def test_finished_runs_are_not_repeated(finished, capsys):
  workdir, configs = finished
  before = {path: path.stat().st_mtime_ns for path in workdir.rglob('*/*/*')}
  told = []
  outcome = sweep.run(
    configs, workdir, jobs=8, finished=lambda *found: told.append(found)
  )
  assert not outcome.failed and not outcome.held
  assert [(name, seconds) for name, _, seconds in told] == [
    *(('plain/0', None), ('plain/1', None))
  ]
  for path, time_ns in before.items():
    assert path.stat().st_mtime_ns == time_ns
  assert (workdir / 'sweep.md').read_text() == outcome.table
  numbers = json.loads((workdir / 'sweep.json').read_text())
  (row,) = numbers['settings']
  last = outcome.summaries['plain/0']['student']['last']
  assert row['setting'] == 'plain' and row['seeds'] == [0, 1]
  np.testing.assert_allclose(row['top1']['mean'], 100 * last['top1'])
  assert row['top1']['std'] == 0
  assert numbers['runs']['plain/1']['student']['last'] == last


@pytest.mark.parametrize(
  'damage', ['{"x": 1}', '[]', '{"student": {"last": {"top1": "0.5"}}}']
)
def test_a_damaged_summary_is_that_of_no_finished_run(finished, damage):
  workdir, _ = finished
  folder = workdir / 'plain/0'
  assert sweep_processes.summary_of(folder)['student']
  (folder / 'summary.json').write_text(damage)
  assert sweep_processes.summary_of(folder) is None


def test_what_cannot_be_written_stops_no_other_run(finished, caplog):
  workdir, configs = finished
  (workdir / 'bad.log').mkdir()
  (workdir / 'sweep.md').mkdir()
  bad = config_utils.from_json(config_utils.to_json(configs['plain/0']))
  bad.student.backbone = PLAIN
  outcome = sweep.run({'bad': bad, **configs}, workdir)
  assert outcome.failed['bad'].startswith('cannot be started: ')
  assert [row['seeds'] for row in outcome.rows] == [[], [0, 1]]
  assert f'{workdir}: the table cannot be written: ' in caplog.text


def test_a_run_keeps_the_teacher_with_which_it_began(
  finished_run, config, tmp_path
):
  """Another feed or dtype would train another one; nor does a move matter."""
  source = finished_run[0]
  one, other = config('ijckd', feed='host'), config('ijckd', feed='device')
  folder = teachers_of({'run': one}, tmp_path)['run']
  assert teachers_of({'run': other}, tmp_path)['run'] != folder
  shutil.copytree(source / 'teacher', folder)
  begun = one.copy_and_resolve_references()
  begun.teacher.checkpoint = str(folder)
  begun.teacher.fingerprint = 7
  (tmp_path / 'run').mkdir()
  (tmp_path / 'run/config.json').write_text(
    json.dumps(begun.to_dict() | {'ijckd_jax': '0'})
  )
  (task,) = sweep._tasks({'run': other}, tmp_path)
  assert task.teacher is None
  assert task.config.teacher.checkpoint == str(folder)
  sweep._check_folder(task)
  # A finished run in a folder that was moved, and one that is not finished.
  moved = shutil.copytree(tmp_path, tmp_path / 'moved')
  shutil.rmtree(folder)
  (task,) = sweep._tasks({'run': one}, moved)
  assert task.teacher.folder == moved / folder.name
  task.summary = summary(0.5)
  sweep._check_folder(task)
  task.summary = None
  with pytest.raises(config_utils.UserError, match='teacher.checkpoint'):
    sweep._check_folder(task)


def test_a_teacher_that_a_config_named_is_not_kept(
  finished_run, config, tmp_path
):
  """A later command without it asks for another run, in a folder of its own."""
  named = config('ijckd')
  named.teacher.checkpoint = str(finished_run[0] / 'teacher')
  (tmp_path / 'run').mkdir()
  (tmp_path / 'run/config.json').write_text(
    json.dumps(named.to_dict() | {'ijckd_jax': '0'})
  )
  (task,) = sweep._tasks({'run': config('ijckd')}, tmp_path)
  assert task.teacher is not None
  for task.summary in (None, summary(0.5)):
    with pytest.raises(config_utils.UserError, match='teacher.checkpoint'):
      sweep._check_folder(task)


def test_a_folder_of_other_settings_is_left_alone(finished):
  workdir, configs = finished
  configs['plain/1'].batch_size = 24
  with pytest.raises(config_utils.UserError, match='batch_size: 48 -> 24') as e:
    sweep.run(configs, workdir)
  assert '--overwrite' not in str(e.value)
  assert not (workdir / 'sweep.md').exists()


def teachers_of(configs, workdir):
  tasks = sweep._tasks(configs, workdir)
  return {task.name: task.teacher and task.teacher.folder for task in tasks}


def test_equal_teachers_are_one(config, tmp_path):
  configs = {
    'kd': config('kd', seed=0, num_workers=1),
    'ijckd': config('ijckd', seed=1),
    'rate': config('ijckd', **{'teacher.learning_rate': 0.1}),
    # Other bits, and perhaps other data.
    'feed': config('ijckd', feed='device'),
    'dtype': config('ijckd', dtype='bfloat16'),
    'data': config('ijckd', **{'dataset.data_dir': '/elsewhere'}),
    'ce': config('ce'),
    'given': config('kd', **{'teacher.checkpoint': '/somewhere'}),
  }
  found = teachers_of(configs, tmp_path)
  assert found['kd'] == found['ijckd']
  assert found['ce'] is found['given'] is None
  folders = {folder for folder in found.values() if folder is not None}
  assert len(folders) == 5
  for folder in folders:
    assert folder.parent == tmp_path
    assert re.fullmatch('teacher_[0-9a-f]{8}', folder.name)
  tasks = {task.name: task for task in sweep._tasks(configs, tmp_path)}
  assert tasks['rate'].config.teacher.checkpoint == str(found['rate'])
  assert tasks['given'].config == configs['given']
  assert configs['kd'].teacher.checkpoint == ''
  assert tasks['kd'].teacher.config == experiment.teacher_config(configs['kd'])
  # A teacher keeps its folder, whatever else a later call asks for.
  swapped = teachers_of(dict(reversed(configs.items())), tmp_path)
  assert swapped == found
  assert teachers_of({'kd': configs['kd']}, tmp_path)['kd'] == found['kd']


def test_cores_are_shared():
  all_cores = sorted(os.sched_getaffinity(0))
  assert sweep_processes._cores(0, 1) == []
  parts = [sweep_processes._cores(i, 2) for i in (0, 1)]
  assert all(parts) and {*parts[0], *parts[1]} == {*all_cores}
  assert len(all_cores) == 1 or not {*parts[0]} & {*parts[1]}
  many = [sweep_processes._cores(i, 99) for i in range(99)]
  assert {core for part in many for core in part} == {*all_cores}


def test_so_many_runs_must_fit():
  found = {'name': 'kd', 'host': 2e9, 'host_free': 7e9}
  sweep_processes._check_memory(found, 3)
  with pytest.raises(config_utils.UserError, match='give --jobs 3 at most'):
    sweep_processes._check_memory(found, 4)
  found |= {'device': 50e9, 'device_free': 80e9}
  with pytest.raises(config_utils.UserError, match='give --jobs 1 at most'):
    sweep_processes._check_memory(found, 2)
  found['device_free'] = 49e9
  with pytest.raises(config_utils.UserError, match='not even one run fits'):
    sweep_processes._check_memory(found, 2)
  sweep_processes._check_memory({'name': 'kd', 'host': 1, 'host_free': None}, 9)


WAITS = """
import sys, time
print(*sys.path, "up", sep="\\n", flush=True)
time.sleep(600)
"""
PARENT = """
import sys, time
from ijckd_jax.runtime import children
child = children.start('module_that_waits', user_path=sys.argv[1:])
print(child.pid, flush=True)
time.sleep(600)
"""


def is_alive(pid):
  try:
    stat = pathlib.Path(f'/proc/{pid}/stat').read_text()
  except FileNotFoundError:
    return False
  return stat.rpartition(')')[2].split()[0] not in 'ZX'  # Nobody waits for it.


def wait_until(condition, process=None, seconds=120):
  deadline = time.monotonic() + seconds
  while not condition():
    assert time.monotonic() < deadline
    assert process is None or process.poll() is None, process.communicate()
    time.sleep(0.05)


def test_a_child_dies_with_its_parent(tmp_path):
  """However the parent ends; and it imports from where the parent does."""
  (tmp_path / 'module_that_waits.py').write_text(WAITS)
  parent = subprocess.Popen(
    [sys.executable, '-c', PARENT, tmp_path],
    stdout=subprocess.PIPE,
    text=True,
    cwd=ROOT,
  )
  pid = int(parent.stdout.readline())
  path = []
  while (line := parent.stdout.readline().strip()) != 'up':
    path.append(line)
  assert path.index(str(ROOT)) < path.index(str(tmp_path))
  assert is_alive(pid)
  parent.kill()
  wait_until(lambda: not is_alive(pid), seconds=20)
  parent.communicate()


def test_a_child_that_comes_too_late_ends():
  gone = [sys.executable, '-m', children.__name__, '1', '', 'this']
  done = subprocess.run(gone, cwd=ROOT, check=False, capture_output=True)
  assert (done.returncode, done.stderr) == (128 + signal.SIGKILL, b'')


# Looked for when the run starts, not before.
NO_WRITER = {'writers': ('no_such_module:Writer',)}


def test_a_run_that_fails_is_named(finished, caplog):
  caplog.set_level(logging.INFO)
  workdir, configs = finished
  bad = config_utils.from_json(config_utils.to_json(configs['plain/0']))
  bad.student.backbone, bad.writers = PLAIN, NO_WRITER['writers']
  outcome = sweep.run({**configs, 'bad': bad}, workdir)
  assert list(outcome.failed) == ['bad'] and outcome.summaries['bad'] is None
  assert "no module 'no_such_module'" in outcome.failed['bad']
  assert '2 of 3 runs are finished' in caplog.text
  assert f'bad: starts ({workdir}/bad.log)' in caplog.text
  assert f'({workdir}/bad.log)' in caplog.text.rpartition('bad: failed')[2]
  assert [row['seeds'] for row in outcome.rows] == [[0, 1], []]
  numbers = json.loads((workdir / 'sweep.json').read_text())
  assert numbers['failed'] == outcome.failed


# A whole run.
@pytest.mark.slow
def test_a_run_that_fails_does_not_stop_the_others(config, tmp_path, caplog):
  """Side by side."""
  caplog.set_level(logging.INFO)
  configs = {
    'bad': config(seed=3, **NO_WRITER),
    'good': config(seed=3),
    'other': config(seed=4),
  }
  outcome = sweep.run(configs, tmp_path, jobs=2)
  assert list(outcome.failed) == ['bad'] and outcome.summaries['bad'] is None
  assert re.search(r'a run takes about [01]\.\d\d of the ', caplog.text)
  found = outcome.summaries['good']
  assert found['seed'] == 3 and found['steps'] == 4
  assert (tmp_path / 'good/bundle').is_dir()
  top1 = 100 * found['student']['last']['top1']
  assert f'good: top-1 {top1:.2f}%, ' in caplog.text
  assert '; 0 left' in caplog.text and '; 1 left, about ' in caplog.text
  assert [row['seeds'] for row in outcome.rows] == [[], [3, 4]]


def sweep_command(workdir, data_dir, *argv, **options):
  return subprocess.Popen(
    [sys.executable, '-m', 'ijckd_jax', 'sweep', '--workdir', str(workdir)]
    + [f'--config.dataset.data_dir={data_dir}', *argv],
    cwd=ROOT,
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
    **options,
  )


# Whole runs.
@pytest.mark.slow
def test_stopped_and_killed_sweeps_continue(tmp_path, data_dir):
  work = tmp_path / 'runs'
  argv = ['--config', f'digits:method=ce,student={PLAIN}', '--over', 'seed=0,1']
  argv += ['--config.total_epochs=3000', '--config.eval_epochs=2', '--jobs=2']

  def started():
    logs = [path.read_text() for path in work.glob('*.log')]
    saved = [path.name for path in work.glob('*/checkpoints/[0-9]*')]
    return len(logs) == 2 and len(saved) >= 2 and all('step' in x for x in logs)

  def continued(times):
    return lambda: all(
      path.read_text().count('continues after step') == times
      for path in work.glob('*.log')
    )

  process = sweep_command(work, data_dir, *argv)
  wait_until(started, process)
  os.kill(process.pid, signal.SIGINT)
  _, err = process.communicate(timeout=120)
  assert process.returncode == 130, err
  assert 'Traceback' not in err and 'waiting for 2 runs to save' in err
  assert err.splitlines()[-1] == (
    'the sweep stopped with 0 of 2 runs finished; it is saved, and the same '
    'command continues from there'
  )
  for path in work.glob('*.log'):
    assert 'stopped after step' in path.read_text()
  process = sweep_command(work, data_dir, *argv)
  wait_until(continued(1), process)
  process.kill()
  process.communicate()
  process = sweep_command(work, data_dir, *argv)  # At once.
  wait_until(continued(2), process)
  process.terminate()
  _, err = process.communicate(timeout=120)
  assert process.returncode == 143 and 'Traceback' not in err, err


class Stuck:
  """A writer that keeps its run from saving, and from looking at signals."""

  def __init__(self, config, workdir):
    del config
    self._mark = pathlib.Path(workdir) / 'stuck'

  def write(self, step, scalars):
    del step, scalars
    self._mark.touch()
    time.sleep(600)

  def close(self):
    pass


# Whole runs.
@pytest.mark.slow
def test_a_second_signal_waits_for_no_save(tmp_path, data_dir):
  work = tmp_path / 'runs'
  argv = ['--config', f'digits:method=ce,student={PLAIN}']
  argv += [f'--config.writers=("{__name__}:{Stuck.__name__}",)']
  process = sweep_command(work, data_dir, *argv)
  wait_until(lambda: list(work.glob('*/stuck')), process)
  process.terminate()
  time.sleep(1)
  assert process.poll() is None
  process.terminate()
  _, err = process.communicate(timeout=60)
  assert process.returncode == 143, err
  (log,) = work.glob('*.log')
  assert 'waiting for 1 run to save' in err
  assert f'{log.stem}: ended without a save after ' in err
  assert err.splitlines()[-1] == (
    'the sweep stopped with 0 of 1 runs finished; ended without a save: '
    f'{log.stem}; the same command continues from the checkpoints that are '
    'there'
  )


# Whole runs.
@pytest.mark.slow
def test_ctrl_c_on_a_terminal_reaches_the_runs_once(tmp_path, data_dir):
  """The terminal sends it to all processes in the foreground."""
  work = tmp_path / 'runs'
  argv = ['--config', f'digits:method=ce,student={PLAIN}']
  argv += ['--config.total_epochs=3000']
  process = sweep_command(work, data_dir, *argv, start_new_session=True)
  wait_until(lambda: list(work.glob('*/checkpoints/[0-9]*')), process)
  os.killpg(process.pid, signal.SIGINT)
  _, err = process.communicate(timeout=120)
  assert process.returncode == 130 and 'Traceback' not in err, err
  (log,) = work.glob('*.log')
  assert 'stopped after step' in log.read_text()


# Whole runs.
@pytest.mark.slow
def test_a_shared_teacher_is_trained_once(config, tmp_path, caplog):
  """And its students are those of ordinary runs, bit for bit."""
  caplog.set_level(logging.INFO)
  configs = {
    'kd/0': config('kd', seed=0),
    'kd/1': config('kd', seed=1),
    'ijckd/0': config('ijckd', seed=0),
    'ce/0': config('ce', seed=0),
  }
  teacher = teachers_of(configs, tmp_path / 'runs')['kd/0']
  outcome = sweep.run(configs, tmp_path / 'runs', jobs=2)
  assert all(outcome.summaries.values())
  assert 'the teacher is trained once, for 3 runs' in caplog.text
  made = sorted(str(x.parent) for x in tmp_path.rglob('checkpoints'))
  assert made == sorted(
    map(str, (teacher, *(tmp_path / 'runs' / name for name in configs)))
  )
  alone = train.train_and_evaluate(configs['kd/0'], tmp_path / 'alone')
  assert alone.summary['student'] == outcome.summaries['kd/0']['student']
  assert alone.summary['teacher'] == outcome.summaries['kd/0']['teacher']
  one, other = (
    (folder / 'bundle/variables.safetensors').read_bytes()
    for folder in (tmp_path / 'alone', tmp_path / 'runs/kd/0')
  )
  assert one == other
  kd, ijckd, ce = outcome.rows
  assert kd['seeds'] == [0, 1] and ijckd['difference']['pairs'] == 1
  assert kd['teacher_top1'] and ce['teacher_top1'] is None


# Whole runs.
@pytest.mark.slow
def test_runs_and_teachers_of_other_processes(config, tmp_path, monkeypatch):
  """A run that is held is skipped; a teacher that is held is waited for."""
  monkeypatch.setattr(sweep_processes, 'TEACHER_SECONDS', 1)
  configs = {'kd': config('kd'), 'ce': config('ce')}
  folder = teachers_of(configs, tmp_path)['kd']
  for path in (folder, tmp_path / 'ce'):
    path.mkdir()
  with contextlib.ExitStack() as stack:
    stack.enter_context(locks.Lock(tmp_path / 'ce'))
    threads = stack.enter_context(futures.ThreadPoolExecutor())
    teacher = locks.Lock(folder)
    teacher.__enter__()

    def free():
      log = folder.with_name(f'{folder.name}.log')
      try:
        wait_until(lambda: (tmp_path / 'ce.log').exists())
        wait_until(lambda: locks.HELD in log.read_text())
      finally:
        teacher.__exit__()

    freed = threads.submit(free)
    outcome = sweep.run(configs, tmp_path)
    freed.result()
  assert outcome.held == ('ce',) and not outcome.failed
  assert outcome.summaries['kd'] and not outcome.summaries['ce']


# Whole runs.
@pytest.mark.slow
def test_students_of_a_teacher_that_fails_are_not_made(config, tmp_path):
  diverges = {'teacher.learning_rate': 1e30}
  configs = {'kd': config('kd', **diverges), 'at': config('at', **diverges)}
  outcome = sweep.run(configs, tmp_path)
  assert list(outcome.failed) == ['kd', 'at']
  (log,) = tmp_path.glob('teacher_*.log')
  assert outcome.failed['kd'].startswith('its teacher failed: step ')
  assert outcome.failed['kd'].endswith(f'({log})')
