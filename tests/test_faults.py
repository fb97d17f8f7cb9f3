"""Runs whose folder goes away, or that go on under other circumstances."""

import logging
import threading
import time

import numpy as np
import pytest

from ijckd_jax.bundles import bundles
from ijckd_jax.runtime import disk
from ijckd_jax.training import loop
from ijckd_jax.training import train
from tests import test_train


class Unmount:
  """A writer that takes the run's folder away when a step's row comes."""

  def __init__(self, folder, step, *, missed=None):
    """It comes back once `missed()` is true; None: not by itself."""
    self.folder = folder
    self.hidden = folder.with_name('unmounted')
    self.step = step
    self.missed = missed

  def write(self, step, scalars):
    if step == self.step:
      # A save under way would make the folder anew.
      last = self.folder / 'checkpoints' / str(step // 4 * 4)
      while not last.exists():
        time.sleep(0.01)
      self.folder.rename(self.hidden)
      if self.missed is not None:
        threading.Thread(target=self.mount_when_missed, daemon=True).start()

  def mount_when_missed(self):
    while not self.missed():
      time.sleep(0.01)
    self.mount()

  def mount(self):
    self.hidden.rename(self.folder)

  def close(self):
    pass


@pytest.fixture
def teacher(finished_run):
  return bundles.load(finished_run[0] / 'teacher').teacher()


def assert_ends_like(finished_run, workdir, result):
  reference_dir, reference = finished_run
  test_train.assert_same_bits(result.state, reference.state)
  rows = test_train.rows_without_times
  assert rows(workdir) == rows(reference_dir)
  assert result.summary['student'] == reference.summary['student']


def test_folder_that_is_away_for_a_while_costs_nothing(
  finished_run, small_config, tmp_path, teacher, monkeypatch, caplog
):
  monkeypatch.setattr(disk, 'RETRY_SECONDS', (0.2,) * 50)
  workdir, said = tmp_path / 'run', 'No such file or directory'
  result = train.train_and_evaluate(
    small_config(),
    workdir,
    teacher=teacher,
    writers=[Unmount(workdir, 5, missed=lambda: said in caplog.text)],
  )
  assert said in caplog.text
  assert_ends_like(finished_run, workdir, result)


# Two whole runs.
@pytest.mark.slow
def test_folder_that_stays_away_stops_the_run_and_loses_no_checkpoint(
  finished_run, small_config, tmp_path, teacher, monkeypatch
):
  monkeypatch.setattr(disk, 'RETRY_SECONDS', (0.1, 0.1))
  workdir = tmp_path / 'run'
  unmount = Unmount(workdir, 10)
  with pytest.raises(OSError, match='over 3 tries .*No such file'):
    train.train_and_evaluate(
      small_config(), workdir, teacher=teacher, writers=[unmount]
    )
  assert not workdir.exists()  # It is not made anew, on another disk.
  unmount.mount()
  result = train.train_and_evaluate(small_config(), workdir, teacher=teacher)
  assert_ends_like(finished_run, workdir, result)


# A whole run, and programs of another mapper.
@pytest.mark.slow
def test_run_continues_under_another_mapper_and_dtype(
  finished_run, small_config, tmp_path, teacher, caplog
):
  caplog.set_level(logging.INFO)
  with pytest.raises(loop.Interrupted):
    train.train_and_evaluate(
      small_config(), tmp_path, teacher=teacher, writers=[test_train.StopAt(5)]
    )
  other = small_config(mapper='shard_map', dtype='bfloat16')
  result = train.train_and_evaluate(other, tmp_path, teacher=teacher)
  assert 'continues after step 6' in caplog.text
  _, reference = finished_run
  terms = [
    [row['train/loss'] for row in history if 'train/loss' in row]
    for history in (result.history, reference.history)
  ]
  assert terms[0][0] == terms[1][0]
  # bfloat16 keeps 8 bits: the loss stays near, but not at, float32's.
  np.testing.assert_allclose(terms[0], terms[1], rtol=0.05)
  assert terms[0][1:] != terms[1][1:]
