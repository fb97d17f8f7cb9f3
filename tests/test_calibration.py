"""Estimates under shift, calibrated on shifts whose labels are known."""

import json

import numpy as np
import pytest
from sklearn import isotonic

from ijckd_jax.bounds import calibration
from ijckd_jax.runtime import config_utils


def test_regression_against_scikit_learn():
  random = np.random.RandomState(0)
  x = random.randint(0, 12, 40) / 12  # With ties.
  y = x**2 + 0.2 * random.randn(40)
  at = np.linspace(-0.2, 1.2, 50)
  other = isotonic.IsotonicRegression(out_of_bounds='clip').fit(x, y)
  np.testing.assert_allclose(
    calibration.predict(x, y, at), other.predict(at), atol=1e-12
  )


def test_a_limit_by_hand():
  """Three families of a shift each; errors are half of Dis² but for one.

  Known: (0.2, 0.1), (0.4, 0.3), (0.6, 0.3); the new shift has 0.4. Without the
  first: 0.3 everywhere, residual -0.2, so 0.1. Without the second: 0.2 in the
  middle, residual 0.1, so 0.3. Without the third: 0.3, residual 0, so 0.3.
  """
  known = [('a', 0.2, 0.1), ('b', 0.4, 0.3), ('c', 0.6, 0.3)]
  found = calibration.estimate(0.4, known, 0.5)
  # Of the sorted 0.1, 0.3, 0.3 the second: half of 3 + 1.
  assert found == {
    'value': pytest.approx(0.3),
    'upper': pytest.approx(0.3),
    'known': 3,
    'families': 3,
    'delta': 0.5,
  }
  # Beyond the known ones nothing is known.
  assert calibration.estimate(0.61, known, 0.5)['upper'] == 1
  # The 95% of three are none of them.
  assert calibration.estimate(0.4, known, 0.05)['upper'] == 1
  with pytest.raises(config_utils.UserError, match='2 families of known'):
    calibration.estimate(0.4, known[:2], 0.5)


def world(random, num_families, per_family):
  """Returns known shifts of a law that families bend in their own way."""
  found = []
  for family in range(num_families):
    bend = random.uniform(0.5, 1.5)
    for x in random.uniform(0.1, 1, per_family):
      error = np.clip(x ** (1 + bend) + 0.02 * random.randn(), 0, 1)
      found.append((f'family {family}', x, error))
  return found


def test_coverage_for_a_new_family():
  """About 1 - delta, as aimed at, for many families."""
  random = np.random.RandomState(0)
  delta, held = 0.1, []
  for _ in range(300):
    *known, (_, value, truth) = world(random, 16, 3)[: 15 * 3 + 1]
    found = calibration.estimate(value, known, delta)
    assert found['value'] <= found['upper'] <= 1
    held.append(truth <= found['upper'])
  assert 1 - 2 * delta <= np.mean(held) < 1


@pytest.mark.parametrize(
  'text, said',
  [
    ('noise', 'give FAMILY=DIR'),
    ('noise=', 'give FAMILY=DIR'),
    ('noise={0}/none', 'is no output of this command'),
    ('noise={0}/plain', 'is no output of this command for --unlabelled'),
    ('noise={0}/other', 'is of the student other, and not of mine'),
    ('noise={0}/odd', 'is of the student 5, and not of mine'),
    ('noise={0}/huge', r'holds no errors \(0.3, 42.0\)'),
    ('noise={0}/mine,{0}/copy', 'is given twice, or is a copy of another one'),
    ('noise={0}/mine', '1 families of known shifts are too few'),
  ],
)
def test_mistakes_about_known_shifts(tmp_path, text, said):
  shift = {'shifted': {'value': 0.3}, 'true_error': 0.1}
  for name, found in (
    ('plain', {'bundle': 'mine'}),
    ('other', {'bundle': 'other', 'unlabelled': shift}),
    ('odd', {'bundle': 5, 'unlabelled': shift}),
    ('huge', {'bundle': 'mine', 'unlabelled': {**shift, 'true_error': 42}}),
    ('mine', {'bundle': 'mine', 'unlabelled': shift}),
    ('copy', {'bundle': 'mine', 'unlabelled': shift}),
  ):
    (tmp_path / name).mkdir()
    (tmp_path / name / 'bounds.json').write_text(json.dumps(found))
  with pytest.raises(config_utils.UserError, match=said):
    calibration.read([text.format(tmp_path)], 'mine')
