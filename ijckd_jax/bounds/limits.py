"""Confidence limits of means, from a finite sample of independent examples.

Each holds with probability at least 1 - delta for any distribution within the
stated range; all are one-sided. Of several that are claimed together, each
takes its share of delta (`shared`).
"""

from collections.abc import Sequence
import math

import numpy as np


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


def hoeffding(num: int, delta: float, *, width: float) -> float:
  """Returns by how much a mean may be off to one side.

  Args:
    num: n >= 1 independent examples.
    delta: probability of being further off.
    width: of the range that each example's value lies in.

  Source: Hoeffding 1963, https://doi.org/10.1080/01621459.1963.10500830.
  """
  check_delta(delta)
  if num < 1:
    raise ValueError('there is no example')
  return width * math.sqrt(math.log(1 / delta) / (2 * num))


def empirical_bernstein(
  variance: float, num: int, delta: float, *, width: float
) -> float:
  """Returns by how much a mean may be off to one side, by its variance.

  Much less than Hoeffding's where the values hardly vary. A single example has
  no variance: its mean may be off by the whole range.

  Args:
    variance: of the sample, with n - 1 in the denominator.
    num: n >= 1 independent examples.
    delta: probability of being further off.
    width: of the range that each example's value lies in.

  Source: Maurer and Pontil 2009, Theorem 4, https://arxiv.org/abs/0907.3740.
  """
  check_delta(delta)
  if num < 1:
    raise ValueError('there is no example')
  if num == 1:
    return float(width)
  log = math.log(2 / delta)
  return math.sqrt(2 * variance * log / num) + 7 * width * log / (3 * (num - 1))


def of_mean(
  values: np.ndarray, delta: float, *, low: float, high: float
) -> tuple[float, float]:
  """Returns a lower and an upper limit of a mean, each at `delta`.

  Exact for zeros and ones, otherwise empirical Bernstein; never outside the
  range.

  Args:
    values: (N,) independent, within [low, high].
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
  mean = float(values.mean(dtype=np.float64))
  variance = float(values.var(dtype=np.float64, ddof=1)) if num > 1 else 0.0
  off = empirical_bernstein(variance, num, delta, width=high - low)
  return max(low, mean - off), min(high, mean + off)


def label_free(
  teacher_errors: int,
  num_labelled: int,
  disagreements: int,
  num_unlabelled: int,
  delta: float,
) -> float:
  """Returns an upper limit of a student's error that needs no new labels.

  P[student wrong] <= P[teacher wrong] + P[they disagree], each by its exact
  limit at delta / 2. Both samples must be independent examples of the one
  distribution that the claim is about; after a shift it says nothing.

  Args:
    teacher_errors: of the teacher, on labelled examples.
    num_labelled: how many those are.
    disagreements: of teacher and student, on examples without labels.
    num_unlabelled: how many those are.
    delta: probability that the student's error is above.
  """
  return min(
    1.0,
    clopper_pearson_upper(teacher_errors, num_labelled, delta / 2)
    + clopper_pearson_upper(disagreements, num_unlabelled, delta / 2),
  )


def asymptotic(values: np.ndarray, delta: float) -> tuple[float, float]:
  """Returns limits of a mean by the central limit theorem, each at `delta`.

  For values without a bounded range; right only as the sample grows.

  Args:
    values: (N,) independent.
    delta: of either limit.
  """
  from scipy import special

  check_delta(delta)
  values = np.asarray(values, np.float64)
  if len(values) < 2:
    return -math.inf, math.inf
  off = -special.ndtri(delta) * values.std(ddof=1) / math.sqrt(len(values))
  return float(values.mean() - off), float(values.mean() + off)


def bootstrap_upper(
  columns: Sequence[np.ndarray], function, delta: float, *, num: int = 1000
) -> float:
  """Returns an upper limit of a function of means, by the percentile bootstrap.

  Right only as the sample grows.

  Args:
    columns: (N,) each, of the same examples.
    function: of the columns' means, (num,) each.
    delta: share of the resamples above the limit.
    num: resamples.
  """
  check_delta(delta)
  columns = np.stack([np.asarray(x, np.float64) for x in columns])
  rng = np.random.default_rng(0)
  size = columns.shape[1]
  means = np.empty((len(columns), num))
  for i in range(num):
    counts = np.bincount(rng.integers(size, size=size), minlength=size)
    means[:, i] = columns @ counts / size
  return float(np.quantile(function(*means), 1 - delta))


def _check_count(count: int, num: int) -> None:
  if not 0 <= count <= num or num < 1:
    raise ValueError(f'{count} of {num} is no count of successes')
