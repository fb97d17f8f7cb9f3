"""A calibrated estimate of a student's error under shift, from known shifts.

Dis^2 ranks shifts by their error, and lies far above it. Shifts whose labels
are known say how far. The estimate is valid only for a new shift that could
have been one of them, and is no bound for another kind.
"""

from collections.abc import Sequence
import math

import numpy as np

from ijckd_jax.bounds import limits
from ijckd_jax.runtime import config_utils

MIN_FAMILIES = 3  # Of fewer, none can be left out and the rest be regressed.


def estimate(
  value: float,
  known: Sequence[tuple[str, float, float]],
  delta: float,
) -> dict[str, float]:
  """Returns the calibrated error of a shift, and an upper limit.

  Isotonic regression from Dis^2 to the error. The limit is jackknife+ over
  families, one-sided: families of shifts are left out one by one, and the limit
  is a quantile of the left-out predictions of the new shift, each plus the
  residual of a shift that was left out with it. Source: Barber et al. 2021,
  "Predictive inference with the jackknife+", https://arxiv.org/abs/1905.02928.

  Args:
    value: Dis^2 of the new shift, without its sampling term.
    known: for each known shift its family, its Dis^2 and its error.
    delta: share of new shifts whose error is above the limit, as the limit aims
      at. For a family that is exchangeable with the known ones, the theory
      promises at most twice that.

  Returns:
    'value', 'upper' (1 where the known shifts are too few for delta), 'known'
    and 'families', their numbers.

  Raises:
    config_utils.UserError: there are fewer than MIN_FAMILIES families.
  """
  limits.check_delta(delta)
  check(known)
  names = np.array([name for name, _, _ in known])
  x, y = (np.array([row[i] for row in known], float) for i in (1, 2))
  families = np.unique(names)
  candidates = []
  for family in families:
    left_out = names == family
    rest = x[~left_out], y[~left_out]
    residuals = y[left_out] - predict(*rest, x[left_out])
    candidates += list(predict(*rest, np.array([value]))[0] + residuals)
  rank = math.ceil((1 - delta) * (len(known) + 1))
  upper = sorted(candidates)[rank - 1] if rank <= len(known) else 1.0
  found = float(predict(x, y, np.array([value]))[0])
  return {
    'value': found,
    'upper': float(min(1.0, max(found, upper))),
    'known': len(known),
    'families': len(families),
  }


def check(known: Sequence[tuple[str, float, float]]) -> None:
  """Raises config_utils.UserError where there are too few families."""
  families = {name for name, _, _ in known}
  if len(families) < MIN_FAMILIES:
    raise config_utils.UserError(
      f'{len(families)} families of known shifts are too few to calibrate by: '
      f'give {MIN_FAMILIES} at least'
    )


def predict(x: np.ndarray, y: np.ndarray, at: np.ndarray) -> np.ndarray:
  """Returns an isotonic regression of y on x, linear between its points.

  Args:
    x: (n,).
    y: (n,).
    at: (m,) where it is read; constant beyond the ends.
  """
  from scipy import optimize

  points, which, counts = np.unique(x, return_inverse=True, return_counts=True)
  means = np.bincount(which, weights=y) / counts
  fitted = optimize.isotonic_regression(means, weights=counts).x
  return np.interp(at, points, fitted)
