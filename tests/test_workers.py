"""Workers that die, or cannot start, are told in one line with the cure."""

import errno
import multiprocessing
import os
import pathlib
import re
import signal
import subprocess
import sys

import numpy as np
import pytest

from ijckd_jax.data import input_pipeline
from ijckd_jax.data.datasets import image_folder
from ijckd_jax.data.datasets import image_shards
from ijckd_jax.runtime import config_utils
from ijckd_jax.runtime import workers
from ijckd_jax.training import train

ROOT = pathlib.Path(__file__).parents[1]


class Dying:
  """Examples whose worker dies, or fails, in their second epoch."""

  in_memory = False

  def __init__(self, death):
    self.death = death

  def __len__(self):
    return 16

  def train_views(self, indices, epochs, seed):
    if epochs[0] == 1:
      if isinstance(self.death, Exception):
        raise self.death
      os.kill(os.getpid(), self.death)
    return {'image': np.zeros((len(indices), 2), np.uint8)}


def batches(death):
  return input_pipeline.train_batches(
    Dying(death),
    batch_size=16,
    seed=0,
    start_step=0,
    stop_step=4,
    rows=slice(0, 16),
    num_workers=1,
  )


@pytest.mark.parametrize(
  'death, said',
  [
    (signal.SIGKILL, 'exit code -9: .* memory ran out: fewer num_workers'),
    (signal.SIGBUS, 'exit code -7: the shared memory, /dev/shm, is full'),
    (OSError(errno.ENOSPC, 'No space left'), '^the shared memory, /dev/shm'),
  ],
  ids=['memory', 'shared memory', 'no room to start'],
)
def test_a_decoder_that_dies(death, said):
  with pytest.raises(OSError, match=said):
    list(batches(death))
  assert not multiprocessing.active_children()


def test_a_writer_that_dies():
  class Process:
    exitcode = -9

    def join(self):
      pass

  with pytest.raises(OSError, match='exit code -9: .*memory ran out'):
    image_shards._check_end(Process())


def test_a_writer_without_memory():
  class Writer:
    def write(self, *args):
      raise MemoryError('a picture of 9 GB')

  reader, sender = multiprocessing.Pipe(duplex=False)
  image_shards._work(Writer(), [(None, None)], sender)
  error = reader.recv()
  assert isinstance(error, OSError) and 'memory' in str(error)
  assert 'a picture of 9 GB' in str(error)


# Without a guard; a line for each time that it is run.
SCRIPT = """
import sys
with open('runs.txt', 'a') as file:
  print('run', file=file)
import pathlib
from ijckd_jax.data.datasets import image_folder
from ijckd_jax.data.datasets import image_shards
image_shards.SHARD_BYTES = 1
image_folder.prepare('source', 'pets', 'data', num_workers=2)
with open('runs.txt', 'a') as file:
  print('prepared', file=file)
"""


@pytest.fixture
def folder(tmp_path):
  """A working directory with `source`, six pictures of two classes."""
  from PIL import Image

  for name in ('cat', 'dog'):
    (tmp_path / 'source' / name).mkdir(parents=True)
    for number in range(3):
      path = tmp_path / 'source' / name / f'{number}.png'
      Image.new('RGB', (4, 4), (40 * number, len(name), 7)).save(path)
  return tmp_path


def run_script(folder, *argv, **options):
  return subprocess.run(
    [sys.executable, *argv],
    cwd=folder,
    env={**os.environ, 'PYTHONPATH': str(ROOT)},
    capture_output=True,
    text=True,
    timeout=100,
    **options,
  )


def test_a_script_without_a_guard_does_its_work_once(folder):
  (folder / 'script.py').write_text(SCRIPT)
  done = run_script(folder, 'script.py')
  assert done.returncode == 1
  # By the workers no traceback, and by the script its own one alone.
  assert done.stderr.count('Traceback') == 1
  last = done.stderr.splitlines()[-1]
  assert re.search("UserError: .* under if __name__ == '__main__':", last)
  runs = (folder / 'runs.txt').read_text().split()
  assert set(runs) == {'run'} and 2 <= len(runs) <= 3


def test_a_script_from_standard_input(folder):
  """The same by workers would be a FileNotFoundError of each."""
  done = run_script(folder, '-', input=SCRIPT)
  assert done.returncode == 1
  assert done.stderr.count('Traceback') == 1
  last = done.stderr.splitlines()[-1]
  assert 'UserError' in last and 'save it to a file' in last
  assert (folder / 'runs.txt').read_text().split() == ['run']


@pytest.mark.parametrize(
  'call',
  [
    lambda: train.distill(teacher='', student='', data=''),
    lambda: train.train_and_evaluate(None, ''),
    lambda: image_folder.prepare('', ''),
    lambda: list(batches(0)),
  ],
  ids=['distill', 'train_and_evaluate', 'prepare', 'batches'],
)
def test_whatever_starts_workers_refuses_to_run_in_one(call, monkeypatch):
  """As while multiprocessing imports the script: of somebody else's pool."""
  process = multiprocessing.current_process()
  monkeypatch.setattr(process, '_inheriting', True, raising=False)
  with pytest.raises(config_utils.UserError, match='__main__'):
    call()


def test_a_worker_of_ours_ends_without_a_word(monkeypatch):
  process = multiprocessing.current_process()
  monkeypatch.setattr(process, '_inheriting', True, raising=False)
  monkeypatch.setattr(process, '_name', 'grain-process-prefetch-x')
  ended = []
  monkeypatch.setattr(os, '_exit', ended.append)
  with pytest.raises(config_utils.UserError):  # os._exit would not return.
    workers.check_script()
  assert ended == [workers.UNGUARDED]
  assert isinstance(workers.ended(workers.UNGUARDED), config_utils.UserError)
