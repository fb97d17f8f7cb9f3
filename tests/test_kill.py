"""A run killed again and again ends like one that was left alone.

The whole harness is experiments/faults/kill.py; its result lies beside it.
"""

import shutil

import pytest

from experiments.faults import kill


# Four starts of a process, without a cache of compiled programs.
@pytest.mark.slow
def test_killed_run_ends_with_the_same_bits(tmp_path):
  harness = kill.Harness(tmp_path, warm=False)
  operations = harness.operations
  # Of the first start and the second, which does what the first had left to do.
  moments = [('file operation', operations // part) for part in (8, 2)]
  kills, found = harness.trial(0, moments, keep=True)
  assert found == []
  assert len(kills) == 2
  assert len({k.phase for k in kills}) >= 2, kills
  # What was made after the last checkpoint, and no more.
  known = [k.recomputed for k in kills if k.recomputed is not None]
  assert known and max(known) <= 2 * kill.PERIOD

  # And the comparison sees a bit of a parameter, a row, a number, a step.
  one = tmp_path / 'trial_0'
  metrics = one / 'metrics.jsonl'
  metrics.write_text(metrics.read_text() * 2)
  summary = one / 'teacher' / 'summary.json'
  text = summary.read_text().replace('"steps": 12', '"steps": 13')
  summary.write_text(text)
  arrays = one / 'bundle' / 'variables.safetensors'
  data = bytearray(arrays.read_bytes())
  data[-1] ^= 1
  arrays.write_bytes(data)
  shutil.copytree(one / 'checkpoints' / '28', one / 'checkpoints' / '40')
  found = kill.differences(one, harness.reference)
  assert {name for name in found if '[' not in name} == {
    './metrics.jsonl',
    'teacher/summary.json',
    'bundle/variables.safetensors',
  }
  assert all(name.startswith('checkpoints/40') for name in found if '[' in name)
  assert any('[' in name for name in found)
