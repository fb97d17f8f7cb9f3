"""The benchmark of stacked students times the same training in each way."""

import numpy as np

from experiments.benchmarks import pairs
from experiments.benchmarks import stacked


def test_all_ways_train_the_same_students():
  pair = pairs.Pair('resnet8', 'resnet8', 4, (8, 8, 1), 10)
  steps = stacked.make_steps(pair, 2, 'float32')
  losses = {}
  for kind, step in steps.items():
    losses[kind] = np.array([[float(x) for x in step()] for _ in range(3)])
  assert list(losses) == list(stacked.KINDS)
  separate = losses['separate']
  assert separate.shape == (3, 2)
  assert (np.diff(separate, axis=0) < 0).all()  # Of each student.
  assert separate[0, 0] != separate[0, 1]
  for values in losses.values():
    np.testing.assert_allclose(values, separate, rtol=1e-5)


def test_table_by_hand():
  row = {
    'pair': 'a -> b',
    'students': 4,
    'convolutions': 'xla',
    'milliseconds': {'separate': 1200.0, 'shared': 900.0, 'stacked': 600.0},
    'stacked_by_separate': 2.0,
    'stacked_by_shared': 1.5,
  }
  last = stacked.table([row]).splitlines()[-1]
  cells = [cell.strip() for cell in last.strip('|').split('|')]
  assert cells == [
    *('a -> b', '4', 'xla', '1,200.0', '900.0', '600.0', '2.00', '1.50')
  ]
