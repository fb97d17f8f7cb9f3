"""How far long work is, said in time and no more often."""

import logging

import numpy as np
import pytest

from ijckd_jax.data import datasets
from ijckd_jax.data import input_pipeline
from ijckd_jax.runtime import progress
from ijckd_jax.training import loop

logger = logging.getLogger('ijckd_jax')


@pytest.fixture
def clock(monkeypatch):
  """A list whose first entry is the time in seconds."""
  now = [100.0]
  monkeypatch.setattr(progress.time, 'monotonic', lambda: now[0])
  return now


def gone_through(clock, seconds):
  """Goes through ten items of ten images; each item takes so many seconds."""
  found = []
  for item in progress.watched(range(10), 'evaluating', 'images', 98, 10):
    found.append(item)
    clock[0] += seconds
  assert found == list(range(10))


def test_lines_by_hand(clock, caplog):
  caplog.set_level(logging.INFO)
  gone_through(clock, 6.0)
  # Items 2, 4, 6 and 8 begin after 12, 24, 36 and 48 s; 0.6 s an image.
  assert caplog.messages == [
    'evaluating: 20 of 98 images',
    'evaluating: 40 of 98 images, about 35 s left',
    'evaluating: 60 of 98 images, about 23 s left',
    'evaluating: 80 of 98 images, about 11 s left',
  ]


def test_quick_work_says_nothing(clock, caplog):
  caplog.set_level(logging.INFO)
  gone_through(clock, 0.9)
  assert not caplog.messages


def test_a_run_that_continues_counts_its_own_steps(clock, caplog):
  caplog.set_level(logging.INFO)
  with loop._ProgressLine('student', 1000, 4000) as line:
    line.advance(7)
    line.advance(1)
    clock[0] += 50
    line.advance(92)
  # 92 steps in 50 s; 2,900 are left.
  assert caplog.messages == [
    'student: compiling its training step',
    'student: 1,100 of 4,000 steps, about 26 min left',
  ]


def test_steps_that_are_compiled_tell_no_time(clock, caplog):
  caplog.set_level(logging.INFO)
  with loop._ProgressLine('student', 0, 100) as line:
    for seconds in (60, 30, 20):
      clock[0] += seconds
      line.advance(1)
  assert caplog.messages == [
    'student: compiling its training step',
    'student: 1 of 100 steps',
    'student: 2 of 100 steps',
    'student: 3 of 100 steps, about 32 min left',
  ]


def test_evaluation_says_how_far_it_is(monkeypatch, caplog):
  caplog.set_level(logging.INFO)
  monkeypatch.setattr(progress, 'SECONDS', -1.0)
  arrays = datasets.Arrays(np.zeros((5, 8, 8, 1), np.uint8), np.zeros(5))
  batches = input_pipeline.eval_batches(
    arrays, batch_size=2, process_index=0, num_processes=1, what='comparing'
  )
  assert len(list(batches)) == 3
  said = [message.partition(', about')[0] for message in caplog.messages]
  assert said == ['comparing: 2 of 5 images', 'comparing: 4 of 5 images']


def test_a_terminal_has_a_bar(monkeypatch, capsys):
  monkeypatch.setattr(progress, 'has_bar', lambda: True)
  monkeypatch.setattr(progress, 'SECONDS', 0.0)
  gone_through([0.0], 0.0)
  assert 'evaluating:   0%' in capsys.readouterr().err


def test_python_shows_it_unless_switched_off(monkeypatch, capsys, clock):
  monkeypatch.setattr(logger, 'propagate', False)  # As where nothing is set up.
  monkeypatch.setattr(logger, 'handlers', [])
  level = logger.level
  for wanted in (True, False):
    with progress.shown(wanted):
      gone_through(clock, 6.0)
    err = capsys.readouterr().err
    assert ('evaluating: 20 of 98 images' in err) == wanted
    assert (logger.handlers, logger.level) == ([], level)


def test_logging_of_the_callers_own_is_left_alone(caplog):
  caplog.set_level(logging.INFO)
  with progress.shown(True):
    assert not logger.handlers
