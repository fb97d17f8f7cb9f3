"""Several processes on this machine, as several hosts of a cluster."""

import json
import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest

from experiments.benchmarks import classifiers
from ijckd_jax.runtime import config_utils
from ijckd_jax.runtime import disk
from ijckd_jax.runtime import hosts
from ijckd_jax.training import checkpoints
from ijckd_jax.training import metric_writer
from tests import test_train

ROOT = pathlib.Path(__file__).parents[1]
STEPS = 12


@pytest.fixture(scope='module')
def start(data_dir):
  """Returns the arguments of all runs here, but for their teacher."""
  fields = {
    'dataset.data_dir': data_dir,
    'total_epochs': 0,
    'total_steps': STEPS,
    'log_epochs': 0,
    'log_steps': 2,
    'eval_epochs': 0,
    'eval_steps': 6,
    'batch_size': 480,  # An epoch ends at step 3: no stop here is at its end.
    'eval_batch_size': 128,  # The last of 360 images' batches is ragged.
    'optimizer.warmup_epochs': 0,
    'optimizer.learning_rate': 0.01,
    'ema_decay': 0.9,
    'sync_batch_norm': True,
    'teacher.store.views': 1,
    'heartbeat_timeout_seconds': 10,
  }
  config = f'{ROOT}/configs/digits.py:teacher=resnet8'
  flags = [f'--config.{name}={value}' for name, value in fields.items()]
  return ['--config', config, *flags]


@pytest.fixture(scope='module')
def arguments(start, published_run):
  """Returns the arguments that all runs here share."""
  return [*start, f'--config.teacher.checkpoint={published_run[0]}/teacher']


@pytest.fixture
def untrained(start, tmp_path):
  """Returns the same with a teacher for runs that end before a step."""
  teacher = classifiers.alone('resnet8', (8, 8, 1), num_classes=10)
  teacher.save(tmp_path / 'teacher')
  return [*start, f'--config.teacher.checkpoint={tmp_path}/teacher']


class Cluster:
  """N processes of one run."""

  def __init__(self, num, workdir, notes, *argv, stop_at=0, own=()):
    with socket.socket() as free:
      free.bind(('127.0.0.1', 0))
      coordinator = f'127.0.0.1:{free.getsockname()[1]}'
    self.processes = []
    for process in range(num):
      joined = ['--coordinator', coordinator, '--num_processes', str(num)]
      joined += ['--process_id', str(process)]
      self.processes.append(
        subprocess.Popen(
          [sys.executable, f'{ROOT}/tests/host_run.py', notes, str(stop_at)]
          + [*argv, '--workdir', str(workdir)]
          + (joined if num > 1 else [])
          + list(own[process] if own else []),
          cwd=ROOT,
          stdout=subprocess.PIPE,
          stderr=subprocess.STDOUT,
          text=True,
          env={**os.environ, 'PYTHONUNBUFFERED': '1'},
        )
      )

  def wait(self, timeout=240):
    """Returns the exit codes and what each has printed."""
    said = [p.communicate(timeout=timeout)[0] for p in self.processes]
    return [p.returncode for p in self.processes], said


def examples(notes, num):
  """Returns what each step's global batch was, by the processes' notes."""
  parts = []
  for process in range(num):
    lines = pathlib.Path(f'{notes}.{process}').read_text().splitlines()
    found = map(json.loads, lines)
    parts.append({n['step']: n['rows'] for n in found if 'step' in n})
  return {
    step: np.concatenate([part[step] for part in parts], axis=1)
    for step in parts[0]
    if all(step in part for part in parts)
  }


def written(notes, process):
  lines = pathlib.Path(f'{notes}.{process}').read_text().splitlines()
  return [n['written'] for n in map(json.loads, lines) if 'written' in n]


def last_state(workdir, like):
  store = checkpoints.Checkpoints(workdir / 'checkpoints', keep=2)
  state, _ = store.restore_newest(like)
  assert state.step == STEPS
  return test_train.leaves(state)


def with_ema(state):
  """Returns a state like those of the runs here."""
  kept = {'params': state.params, 'batch_stats': state.batch_stats}
  return state.replace(ema=kept)


def assert_near(workdir, reference, like):
  """The same parameters, to what float32 loses by adding in another order.

  That grows with each step: to 0.8% of an array's scale here, where batch norm
  of each device's own rows would make it 34%.
  """
  found, wanted = (last_state(path, like) for path in (workdir, reference))
  for name, value in wanted.items():
    scale = np.abs(value).max() if value.size else 0
    np.testing.assert_allclose(
      found[name], value, rtol=0, atol=0.03 * scale, err_msg=name
    )
  rows = [test_train.rows_without_times(path) for path in (workdir, reference)]
  assert [row['step'] for row in rows[0]] == [row['step'] for row in rows[1]]
  for one, other in zip(*rows, strict=True):
    assert one.keys() == other.keys()
    for name in other:
      # An image on the border may fall to the other side: 1 of 360, or of 960.
      atol = 0.003 if re.search('top|accuracy|ece', name) else 1e-6
      np.testing.assert_allclose(
        one[name], other[name], rtol=5e-3, atol=atol, err_msg=name
      )


@pytest.fixture(scope='module')
def alone(arguments, tmp_path_factory):
  """Folder and examples of the run that one process makes in one go."""
  folder = tmp_path_factory.mktemp('alone')
  codes, said = Cluster(1, folder / 'run', folder / 'notes', *arguments).wait()
  assert codes == [0], said
  return folder / 'run', examples(folder / 'notes', 1)


@pytest.mark.slow
def test_two_then_one_then_four_processes_are_one_run(
  alone, arguments, tmp_path, published_run
):
  """Stopped by a signal to one of them, on other hosts each time."""
  workdir, seen, stopped = tmp_path / 'run', {}, 0
  for number, (num, stop_at, devices) in enumerate(
    [(2, 2, 1), (1, 6, 4), (4, 0, 1)]
  ):
    notes = tmp_path / f'notes{number}'
    codes, said = Cluster(
      num,
      workdir,
      notes,
      *arguments,
      f'--config.num_cpu_devices={devices}',
      stop_at=stop_at,
    ).wait()
    if number:
      assert f'continues after step {stopped}' in said[0]
      assert 'continues' not in ''.join(said[1:])
    seen |= {
      step: batch
      for step, batch in examples(notes, num).items()
      if step > stopped
    }
    for process in range(1, num):
      found = {pathlib.Path(path).parent for path in written(notes, process)}
      # The teacher's outputs are each process's own.
      assert found <= {workdir / 'teacher_outputs'}, found
    if not stop_at:
      assert codes == [0] * num, said
      continue
    assert codes == ([143] * num if num > 1 else [130]), said
    steps = [int(re.search(r'stopped after step (\d+)', s)[1]) for s in said]
    (stopped,) = set(steps)
    assert stop_at <= stopped < STEPS
  reference, wanted = alone
  assert seen.keys() == wanted.keys() == set(range(1, STEPS + 1))
  for step in wanted:
    np.testing.assert_array_equal(seen[step], wanted[step])
  assert_near(workdir, reference, with_ema(published_run[1].state))
  summaries = [disk.read_json(p / 'summary.json') for p in (workdir, reference)]
  assert summaries[0]['test_examples'] == summaries[1]['test_examples'] == 360
  # Counted exactly, every image once: a whole number of them is right.
  right = summaries[0]['student']['last']['top1'] * 360
  assert abs(right - round(right)) < 1e-9


@pytest.mark.slow
def test_eight_devices_then_four_then_two(
  alone, arguments, tmp_path, published_run
):
  workdir, seen, stopped = tmp_path / 'run', {}, 0
  for devices, stop_at in ((8, 2), (4, 6), (2, 0)):
    notes = tmp_path / f'notes{devices}'
    codes, said = Cluster(
      1,
      workdir,
      notes,
      *arguments,
      f'--config.num_cpu_devices={devices}',
      stop_at=stop_at,
    ).wait()
    assert codes == [130 if stop_at else 0], said
    new = examples(notes, 1)
    seen |= {step: batch for step, batch in new.items() if step > stopped}
    if stop_at:
      stopped = int(re.search(r'stopped after step (\d+)', said[0])[1])
  reference, wanted = alone
  for step in range(1, STEPS + 1):
    np.testing.assert_array_equal(seen[step], wanted[step])
  assert_near(workdir, reference, with_ema(published_run[1].state))


@pytest.mark.slow
def test_hosts_whose_devices_hold_the_training_set(
  arguments, tmp_path, published_run
):
  """Each host gives its devices its rows' indices, and all make equal calls."""
  shared = [
    *arguments,
    '--config.teacher.store.views=0',
    '--config.batch_size=120',
  ]
  notes = tmp_path / 'notes'
  codes, said = Cluster(1, tmp_path / 'alone', notes, *shared).wait()
  assert codes == [0], said
  for num, mapper, stop_at, code in (
    (2, 'pmap', 2, 143),
    (1, 'shard_map', 6, 130),
    (2, 'shard_map', 0, 0),
  ):
    fields = {'feed': 'device', 'num_cpu_devices': 2, 'mapper': mapper}
    codes, said = Cluster(
      num,
      tmp_path / 'run',
      notes,
      *shared,
      *(f'--config.{name}={value}' for name, value in fields.items()),
      stop_at=stop_at,
    ).wait()
    assert codes == [code] * num, said
  state = with_ema(published_run[1].state)
  assert_near(tmp_path / 'run', tmp_path / 'alone', state)


# Three starts of two processes, and seconds of silence.
@pytest.mark.slow
def test_others_do_not_wait_for_a_host_that_died(
  alone, arguments, tmp_path, published_run
):
  """And all together, started again, end as if nothing had been."""
  workdir = tmp_path / 'run'
  arguments = [*arguments, '--config.checkpoint_steps=1']
  arguments += ['--config.batch_size=48', '--config.teacher.store.views=0']
  cluster = Cluster(
    2, workdir, tmp_path / 'notes', *arguments, '--config.total_steps=4000'
  )
  folder = workdir / 'checkpoints'
  deadline = time.monotonic() + 200
  while not (folder.exists() and any(folder.glob('[0-9]*'))):
    assert time.monotonic() < deadline
    time.sleep(0.1)
  cluster.processes[1].kill()
  start = time.monotonic()
  codes, said = cluster.wait(timeout=120)
  assert codes == [-signal.SIGABRT, -signal.SIGKILL], said
  # The heartbeat's limit, twice for the noise of a machine in use.
  assert time.monotonic() - start < 20
  rows = metric_writer.read_rows(workdir / 'metrics.jsonl')
  again = Cluster(
    2, workdir, tmp_path / 'again', *arguments, '--config.total_steps=4000'
  )
  for line in again.processes[0].stdout:
    if 'continues after step' in line:
      break
  step = int(line.split()[-1])
  assert step >= 1 and (not rows or step >= rows[-1]['step'] - 2)
  for process in again.processes:
    process.kill()
    process.communicate()


@pytest.mark.parametrize(
  'own, said',
  [
    (['--config.seed=7'], r'config.seed: 0 -> 7'),
    (['--config.dataset.validation_fraction=0.1'], 'validation_fraction'),
  ],
)
def test_hosts_that_disagree_are_told_at_start(untrained, tmp_path, own, said):
  codes, words = Cluster(
    2, tmp_path / 'run', tmp_path / 'notes', *untrained, own=([], own)
  ).wait()
  assert codes == [2, 2], words
  for text in words:
    assert re.search('error: process 1 is not like process 0.*' + said, text)
  assert not (tmp_path / 'run').exists()


def test_data_that_one_host_lacks_end_both(untrained, tmp_path):
  """The other one would wait for it."""
  own = ['--config.dataset.data_dir=/proc/nowhere']
  codes, words = Cluster(
    2, tmp_path / 'run', tmp_path / 'notes', *untrained, own=([], own)
  ).wait()
  assert codes == [2, 2], words
  for text in words:
    assert re.search("process 1 is not like process 0.*data: 'there'", text)
  assert not (tmp_path / 'run').exists()


def test_folder_that_only_one_host_has_is_told_at_start(untrained, tmp_path):
  elsewhere = ['--workdir', str(tmp_path / 'elsewhere')]
  codes, words = Cluster(
    2, tmp_path / 'run', tmp_path / 'notes', *untrained, own=([], elsewhere)
  ).wait()
  assert codes == [2, 2], words
  for text in words:
    assert 'process 1 does not see what process 0 writes' in text


@pytest.mark.parametrize(
  'flags, said',
  [
    (['--coordinator', 'here:1'], 'go together'),
    (['--num_processes', '2'], 'go together'),
    (
      ['--coordinator', 'here', '--num_processes', '2', '--process_id', '0'],
      'HOST:PORT',
    ),
    (
      ['--coordinator', 'here:1', '--num_processes', '2', '--process_id', '2'],
      'from 0 to 1',
    ),
  ],
)
def test_mistakes_in_the_flags(flags, said):
  from ijckd_jax import main

  config = ['--config', f'{ROOT}/configs/digits.py', '--workdir', '/nowhere/x']
  with pytest.raises(config_utils.UserError, match=said):
    main.main([*config, *flags])


SLURM = {
  'SLURM_JOB_ID': '77',
  'SLURM_STEP_NODELIST': 'localhost',
  'SLURM_NTASKS': '4',
  'SLURM_PROCID': '0',
  'SLURM_LOCALID': '0',
}
OPEN_MPI = {
  'OMPI_MCA_orte_hnp_uri': '1531576320.0;tcp://127.0.0.1:34911',
  'OMPI_COMM_WORLD_SIZE': '2',
  'OMPI_COMM_WORLD_RANK': '1',
}


def test_variables_that_others_are_to_come_are_told_at_once():
  """And JAX does not abort: by hand, in a shell of Slurm."""
  script = (
    'import sys\n'
    'from ijckd_jax.runtime import config_utils;'
    'from ijckd_jax.runtime import hosts;'
    'from ijckd_jax import main\n'
    'hosts.WAIT_SECONDS = 1\n'
    'config_utils.run_command(main.main)'
  )
  done = subprocess.run(
    [sys.executable, '-c', script, '--config', 'digits', '--workdir', '/no/x'],
    cwd=ROOT,
    env={**os.environ, **SLURM},
    capture_output=True,
    text=True,
    timeout=60,
  )
  assert done.returncode == 134
  first, second = done.stderr.splitlines()
  assert first == (
    'waiting up to 1 s for the other processes (SLURM_NTASKS=4 '
    'SLURM_PROCID=0); to run alone: SLURM_NTASKS=1 ijckd train ...'
  )
  assert second.startswith('error: the other processes did not come in 1 s')
  assert second.endswith(first.partition('; ')[2])


@pytest.mark.parametrize(
  'variables, wanted',
  [
    (
      OPEN_MPI,
      (
        '1',
        'OMPI_COMM_WORLD_SIZE=2 OMPI_COMM_WORLD_RANK=1',
        'OMPI_COMM_WORLD_SIZE=1 ijckd train ...',
      ),
    ),
    # What JAX does not take for a cluster: sbatch's own shell has no step.
    ({**SLURM, 'SLURM_STEP_NODELIST': None}, ('', '', '')),
    ({}, ('', '', '')),
  ],
)
def test_what_makes_a_process_one_of_several(variables, wanted, monkeypatch):
  for name in (*SLURM, *OPEN_MPI):
    monkeypatch.delenv(name, raising=False)
  for name, value in variables.items():
    if value is not None:
      monkeypatch.setenv(name, value)
  assert hosts._joining(None, None, None) == wanted


def test_only_process_0_says_that_it_waits(capsys):
  for number in '01':
    with hosts._waiting(number, 'flags', 'leave them out'):
      # Ctrl-C ends it at once, where JAX waits in C++.
      assert signal.getsignal(signal.SIGINT) == signal.SIG_DFL
  assert signal.getsignal(signal.SIGINT) != signal.SIG_DFL
  assert capsys.readouterr().err.count('waiting up to 300 s') == 1
