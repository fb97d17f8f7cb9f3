"""The lock on a run's folder."""

import errno
import fcntl
import json
import os
import subprocess
import sys
import threading
import time

import pytest

from ijckd_jax.runtime import config_utils
from ijckd_jax.runtime import locks
from ijckd_jax.training import train

REFUSED = pytest.raises(config_utils.UserError, match='another run')


@pytest.fixture(autouse=True)
def fast(monkeypatch):
  monkeypatch.setattr(locks, 'BEAT_SECONDS', 0.05)
  monkeypatch.setattr(locks, 'PATIENCE_SECONDS', 0.5)


def life(folder):
  return json.loads((folder / locks.FILE).read_text().strip() or 'null')


def test_second_run_is_refused_until_the_first_ends(tmp_path):
  with locks.Lock(tmp_path):
    with pytest.raises(
      config_utils.UserError, match=f'process {os.getpid()} on .* is at work'
    ):
      locks.Lock(tmp_path).__enter__()
    before = life(tmp_path)['beats']
    deadline = time.monotonic() + 10
    while life(tmp_path)['beats'] == before:
      assert time.monotonic() < deadline
  assert life(tmp_path) is None
  with locks.Lock(tmp_path):
    pass


def test_killed_holder_leaves_no_lock(tmp_path):
  code = (
    'import sys, time\n'
    'from ijckd_jax.runtime import locks\n'
    'with locks.Lock(sys.argv[1]):\n'
    "  print('held', flush=True)\n"
    '  time.sleep(60)\n'
  )
  holder = subprocess.Popen(
    [sys.executable, '-c', code, tmp_path], stdout=subprocess.PIPE
  )
  holder.stdout.readline()
  with REFUSED:
    locks.Lock(tmp_path).__enter__()
  holder.kill()
  holder.communicate()
  assert life(tmp_path)['pid'] == holder.pid
  start = time.monotonic()
  with locks.Lock(tmp_path):
    # The kernel knows that it is gone: there is nothing to wait for.
    assert time.monotonic() - start < locks.PATIENCE_SECONDS


def no_flock(*_):
  raise OSError(errno.ENOLCK, 'No locks available')


@pytest.mark.parametrize('flock', [fcntl.flock, no_flock])
def test_holder_on_another_machine_is_seen_by_its_beats(
  tmp_path, monkeypatch, flock
):
  """There the kernel may grant the lock to both."""
  monkeypatch.setattr(fcntl, 'flock', flock)
  file = tmp_path / locks.FILE
  other = {'id': 'x', 'host': 'far', 'machine': 'far', 'pid': 7, 'beats': 0}
  file.write_text(json.dumps(other))
  ended = threading.Event()

  def beat():
    while not ended.wait(0.05):
      other['beats'] += 1
      file.write_text(json.dumps(other))

  thread = threading.Thread(target=beat)
  thread.start()
  with pytest.raises(config_utils.UserError, match='process 7 on far'):
    locks.Lock(tmp_path).__enter__()
  ended.set()
  thread.join()
  # Now it is silent, and taken for dead.
  start = time.monotonic()
  with locks.Lock(tmp_path):
    assert time.monotonic() - start >= locks.PATIENCE_SECONDS
    assert life(tmp_path)['pid'] == os.getpid()


def test_two_without_flock_on_one_machine(tmp_path, monkeypatch):
  monkeypatch.setattr(fcntl, 'flock', no_flock)
  with locks.Lock(tmp_path):
    with REFUSED:
      locks.Lock(tmp_path).__enter__()
  with locks.Lock(tmp_path):
    pass


def test_lock_file_of_garbage_is_no_obstacle(tmp_path):
  for text in ('', 'null', '[1]', '{"half', '\x00'):
    (tmp_path / locks.FILE).write_text(text)
    with locks.Lock(tmp_path):
      assert life(tmp_path)['pid'] == os.getpid()


def test_folder_that_vanishes_is_let_go(tmp_path):
  folder = tmp_path / 'run'
  folder.mkdir()
  with locks.Lock(folder):
    folder.rename(tmp_path / 'away')


def test_run_in_a_folder_in_use_is_refused_untouched(tmp_path, small_config):
  with locks.Lock(tmp_path):
    with REFUSED:
      train.train_and_evaluate(small_config('ce'), tmp_path)
    with REFUSED:
      train.train_and_evaluate(small_config('ce'), tmp_path, overwrite=True)
  assert os.listdir(tmp_path) == [locks.FILE]
