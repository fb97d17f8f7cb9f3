"""A calibrated estimate of a student's error under shift, from known shifts.

Dis^2 ranks shifts by their error, and lies far above it. Shifts whose labels
are known say how far. The estimate is valid only for a new shift that could
have been one of them, and is no bound for another kind.
"""

from collections.abc import Sequence
import json
import math
import pathlib

import numpy as np

from ijckd_jax.bounds import limits
from ijckd_jax.runtime import config_utils

MIN_FAMILIES = 3  # One is left out, and a regression needs two others.


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
  For a new shift of a known family, about delta of the limits fail. For a new
  family nothing is promised: if K + 1 families are alike, the new one is the
  worst of them with probability 1 / (K + 1).

  Args:
    value: Dis^2 of the new shift, without its sampling term.
    known: for each known shift its family, its Dis^2 and its error.
    delta: share of new shifts that the limit aims to fail for.

  Returns:
    'value'; 'upper', which is 1 where the known shifts are too few for delta,
    or Dis^2 is above all of theirs; 'known' and 'families', their numbers; and
    'delta'.

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
  upper = 1.0
  if rank <= len(known) and value <= x.max():
    upper = sorted(candidates)[rank - 1]
  found = float(predict(x, y, np.array([value]))[0])
  return {
    'value': found,
    'upper': float(min(1.0, max(found, upper))),
    'known': len(known),
    'families': len(families),
    'delta': delta,
  }


def read(texts: Sequence[str], bundle: str) -> list[tuple[str, float, float]]:
  """Returns known shifts as `estimate` takes them.

  Args:
    texts: FAMILY=DIR[,DIR] each; a DIR holds `ijckd bounds --output` of images
      with labels as --unlabelled.
    bundle: folder of the student's bundle, as `ijckd bounds` writes it.

  Raises:
    config_utils.UserError: they are no such texts or folders.
  """
  found, seen = [], set()
  for text in texts:
    family, _, folders = text.partition('=')
    if not (family and folders):
      raise config_utils.UserError(f'--known {text}: give FAMILY=DIR[,DIR]')
    for folder in folders.split(','):
      path = pathlib.Path(config_utils.expand(folder)).resolve() / 'bounds.json'
      try:
        report = json.loads(path.read_text())
        shift = report['unlabelled']
        row = float(shift['shifted']['value']), float(shift['true_error'])
        student = str(report['bundle'])
      except (OSError, KeyError, TypeError, ValueError) as error:
        raise config_utils.UserError(
          f'--known: {path} is no output of this command for --unlabelled '
          f'images with labels ({config_utils.short(error)})'
        ) from error
      if not (0 <= row[0] <= 2 and 0 <= row[1] <= 1):
        raise config_utils.UserError(
          f'--known: {path} holds no errors ({row[0]}, {row[1]}): it is damaged'
        )
      if row in seen:
        raise config_utils.UserError(
          f'--known: {path} is given twice, or is a copy of another one'
        )
      if student != bundle:
        raise config_utils.UserError(
          f'--known: {path} is of the student {student}, and not of {bundle}'
        )
      seen.add(row)
      found.append((family, *row))
  if found:
    check(found)
  return found


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
