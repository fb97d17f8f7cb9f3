"""Confidence limits of means, from a finite sample.

The examples are independent and identically distributed. Each limit holds with
probability at least 1 - delta for any distribution within the stated range, and
is one-sided. Of several that are claimed together, each takes its share of
delta (`shared`).
"""

import math

import numpy as np

# Of the capital, at most this part is lost in one bet; Waudby-Smith and Ramdas
# advise 1/2 or 3/4.
MOST_BET = 0.75
TOLERANCE = 1e-9  # Of a limit that is found by bisection; on the safe side.


def shared(delta: float, num_claims: int) -> float:
  """Returns what each of several limits may fail with, so that all hold.

  By the union bound.

  Args:
    delta: probability that any of them fails.
    num_claims: at least 1.
  """
  check_delta(delta)
  return delta / num_claims


def check_delta(delta: float) -> None:
  """Raises ValueError where it is no probability of failure."""
  if not 0 < delta < 1:
    raise ValueError(f'delta={delta}: give a probability between 0 and 1')


def clopper_pearson_upper(count: int, num: int, delta: float) -> float:
  """Returns the exact upper limit of a probability.

  Args:
    count: successes.
    num: n >= 1 independent trials.
    delta: probability of being below the truth.

  Source: Clopper and Pearson 1934, https://doi.org/10.1093/biomet/26.4.404.
  """
  from scipy import special

  _check_count(count, num)
  check_delta(delta)
  if count == num:
    return 1.0
  return float(special.betaincinv(count + 1, num - count, 1 - delta))


def clopper_pearson_lower(count: int, num: int, delta: float) -> float:
  """Returns the exact lower limit of a probability; see the upper one."""
  from scipy import special

  _check_count(count, num)
  check_delta(delta)
  if not count:
    return 0.0
  return float(special.betaincinv(count, num - count + 1, delta))


def betting_upper(values: np.ndarray, delta: float) -> float:
  """Upper limit of a mean, by a gambler who bets that the values lie below it.

  Under a mean of m, the capital prod_i (1 + bet_i (m - x_i)) of bets that know
  only earlier values exceeds 1 / delta with probability delta at most (Ville).
  The limit is the smallest m under which the capital does; the capital grows
  with m, so that bisection finds it.

  Source: Waudby-Smith and Ramdas 2023, "Estimating means of bounded random
  variables by betting", https://arxiv.org/abs/2010.09686, Theorem 3 for one
  side, with their predictable plug-in bets.

  Args:
    values: (N,) independent and identically distributed, within [0, 1].
    delta: probability that the mean is above the limit.
  """
  from scipy import optimize

  check_delta(delta)
  # Files often list images class by class. Early images would then say little
  # about later ones, and the bets would be poor.
  x = np.random.RandomState(0).permutation(np.asarray(values, np.float64))
  num, seen = len(x), np.arange(1, len(x) + 1)
  mean = (0.5 + np.cumsum(x)) / (seen + 1)
  variance = (0.25 + np.cumsum(np.square(x - mean))) / (seen + 1)
  variance = np.concatenate([[0.25], variance[:-1]])
  bets = np.sqrt(2 * math.log(1 / delta) / (num * variance))

  def log_capital(m):
    # The worst value, 1, leaves a part of 1 - MOST_BET of the capital.
    allowed = np.minimum(bets, MOST_BET / (1 - m))
    return np.cumsum(np.log1p(allowed * (m - x))).max() + math.log(delta)

  high = 1 - 1e-12
  if log_capital(high) < 0:
    return 1.0
  found = optimize.bisect(log_capital, 0, high, xtol=TOLERANCE) + TOLERANCE
  # By the running maximum, the limit can be below the sample's mean. The larger
  # one holds as well.
  return max(found, float(x.mean()))


def of_mean(
  values: np.ndarray, delta: float, *, low: float, high: float
) -> tuple[float, float]:
  """Returns a lower and an upper limit of a mean, each at `delta`.

  Clopper-Pearson for zeros and ones, betting for other values.

  Args:
    values: (N,) independent and identically distributed, within [low, high].
    delta: of either limit.
    low: of the range.
    high: of the range.
  """
  values = np.asarray(values)
  num = len(values)
  if not num:
    raise ValueError('there is no example')
  if values.min() < low or values.max() > high:
    raise ValueError(
      f'values from {values.min()} to {values.max()} are outside '
      f'[{low}, {high}]'
    )
  if (low, high) == (0, 1) and values.dtype.kind in 'biu':
    count = int(values.sum())
    return (
      clopper_pearson_lower(count, num, delta),
      clopper_pearson_upper(count, num, delta),
    )
  width = high - low
  scaled = (values - low) / width
  return (
    high - width * betting_upper(1 - scaled, delta),
    low + width * betting_upper(scaled, delta),
  )


def _check_count(count: int, num: int) -> None:
  if not 0 <= count <= num or num < 1:
    raise ValueError(f'{count} of {num} is no count of successes')
