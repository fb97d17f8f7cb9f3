"""The arithmetic of the study of shifts, on numbers made by hand."""

import numpy as np
import pytest

from experiments.shift_study import analyse
from experiments.shift_study import corruptions
from experiments.shift_study import train


def test_a_kind_is_calibrated_by_other_kinds_that_are_not_new(monkeypatch):
  kinds = (*list(corruptions.CORRUPTIONS)[:4], corruptions.NEW[0])
  rows = [
    {
      'teacher': teacher,
      'corruption': kind,
      'severity': severity,
      'found': {
        method: {
          name: 0.1 * severity
          for name in (
            *('true_error', 'dis2_value', 'thresholded_confidence'),
            *('dis2', 'dis2_by_disagreement', 'same_distribution'),
            'average_confidence',
          )
        }
        for method in train.methods(teacher)
      },
    }
    for teacher in train.TEACHERS
    for kind in kinds
    for severity in (1, 2)
  ]
  seen = []

  def estimate(value, known, delta):
    del delta
    seen.append({kind for kind, _, _ in known})
    return {'value': value, 'upper': 1.0}

  monkeypatch.setattr(analyse.calibration, 'estimate', estimate)
  cases = analyse.cases(rows)
  assert len(cases) == 9 * len(kinds) * 2
  for case, known in zip(cases, np.reshape(seen, (-1, 2)), strict=True):
    expected = set(kinds[:4]) - {case['corruption']}
    assert list(known) == [expected, expected]
  found = analyse.summarize(cases)
  assert found['calibrated']['absolute'] == pytest.approx(0.0)
  assert found['calibrated_limit']['vacuous'] == 1.0
  assert not analyse.failures(cases, 'dis2')
