"""Confidence limits: by hand, against scipy, and by how often they hold."""

import math

import numpy as np
import pytest
from scipy import stats

from ijckd_jax.bounds import limits
from ijckd_jax.bounds import selective
from ijckd_jax.bounds import shift

DRAWS = 4000


def at_least(held, delta):
  """Asserts that a limit holds at its rate, within four standard errors."""
  error = math.sqrt(delta * (1 - delta) / len(held))
  assert np.mean(held) >= 1 - delta - 4 * error, np.mean(held)


@pytest.mark.parametrize('count, num', [(0, 7), (3, 7), (7, 7), (40, 1000)])
def test_clopper_pearson_against_scipy(count, num):
  for delta in (0.2, 0.05, 0.001):
    exact = stats.binomtest(count, num).proportion_ci(1 - 2 * delta, 'exact')
    upper = limits.clopper_pearson_upper(count, num, delta)
    lower = limits.clopper_pearson_lower(count, num, delta)
    assert upper == pytest.approx(exact.high, rel=1e-9)
    assert lower == pytest.approx(exact.low, rel=1e-9)


def test_clopper_pearson_by_hand():
  """No success in n: (1 - p)^n = delta."""
  assert limits.clopper_pearson_upper(0, 10, 0.05) == pytest.approx(
    1 - 0.05**0.1
  )
  assert limits.clopper_pearson_lower(10, 10, 0.05) == pytest.approx(0.05**0.1)


def test_betting_by_hand():
  """Of x = 0: 1 + bet m >= 1 / delta = 2, with a bet of 0.75 / (1 - m).

  The bet is below sqrt(2 ln 2 / 0.25) = 2.35, so that m = 4 / 7. Twice, for
  1 / delta = 4, both bets are below sqrt(2 ln 4 / 0.5) = 2.35 and below
  sqrt(2 ln 4 / (2 * 0.15625)) = 2.98: the same m.
  """
  assert limits.betting_upper(np.zeros(1), 0.5) == pytest.approx(4 / 7)
  assert limits.betting_upper(np.zeros(2), 0.25) == pytest.approx(4 / 7)
  # The value 0 by chance: of 1, nothing is below.
  assert limits.betting_upper(np.ones(3), 0.5) == 1


@pytest.mark.parametrize('num', [1, 7, 60])
def test_betting_against_its_definition(num):
  """The smallest mean under which the capital reaches 1 / delta.

  It is never below the sample's own.
  """
  values = np.random.RandomState(num).beta(0.5, 2, num)
  order = np.random.RandomState(0).permutation(values)
  for delta in (0.3, 0.05):
    for m in np.linspace(0.001, 0.999, 200):
      capital, largest, seen = 1.0, 0.0, []
      squares = []
      for x in order:
        variance = (0.25 + sum(squares)) / (len(seen) + 1)
        bet = math.sqrt(2 * math.log(1 / delta) / (num * variance))
        capital *= 1 + min(bet, 0.75 / (1 - m)) * (m - x)
        largest = max(largest, capital)
        seen.append(x)
        squares.append((x - (0.5 + sum(seen)) / (len(seen) + 1)) ** 2)
      upper = limits.betting_upper(values, delta)
      reached = largest >= 1 / delta and m >= values.mean()
      assert reached == (m >= upper), (m, upper)


def test_formulas_by_hand():
  assert limits.shared(0.05, 10) == pytest.approx(0.005)
  # Within [-1, 3]: (v + 1) / 4 from below, and its mirror image from above.
  values = np.array([0, 1, 2, 1, 0.5, -1, 3])
  scaled = (values + 1) / 4
  assert limits.of_mean(values, 0.2, low=-1, high=3) == pytest.approx(
    (
      3 - 4 * limits.betting_upper(1 - scaled, 0.2),
      4 * limits.betting_upper(scaled, 0.2) - 1,
    )
  )
  # Zeros and ones are counted.
  assert limits.of_mean(np.array([0, 1, 1]), 0.1, low=0, high=1) == (
    limits.clopper_pearson_lower(2, 3, 0.1),
    limits.clopper_pearson_upper(2, 3, 0.1),
  )
  # n_S = 50, n_T = 100: sqrt(450 * 2 / 10,000) = 0.3.
  found = shift.dis2(
    np.repeat([0, 1], [40, 10]),
    np.repeat([0, 1], [45, 5]),
    np.repeat([0, 1], [80, 20]),
    math.exp(-2),
  )
  assert found == pytest.approx(
    {
      'value': 0.2 + (0.2 - 0.1),
      'upper': 0.3 + 0.3,
      'source_error': 0.2,
      'discrepancy': 0.1,
    }
  )
  # A critic that does worse than to agree is not taken.
  none = shift.dis2(*np.array([[1, 0], [1, 1], [0, 0]]), 0.5)
  assert (none['discrepancy'], none['value']) == (0, 0.5)


@pytest.mark.parametrize(
  'call',
  [
    lambda: limits.clopper_pearson_upper(3, 2, 0.1),
    lambda: limits.clopper_pearson_lower(0, 0, 0.1),
    lambda: limits.clopper_pearson_upper(1, 2, 0.0),
    lambda: limits.betting_upper(np.zeros(3), 1.0),
    lambda: limits.of_mean(np.array([0, 2]), 0.1, low=0, high=1),
    lambda: limits.of_mean(np.zeros(0), 0.1, low=0, high=1),
  ],
)
def test_what_cannot_be_is_refused(call):
  with pytest.raises(ValueError):
    call()


@pytest.mark.parametrize('p', [0.01, 0.3, 0.97])
@pytest.mark.parametrize('num', [5, 60])
def test_coverage_of_clopper_pearson(p, num):
  """By all outcomes, not by chance: exactly at least 1 - delta."""
  outcomes = np.arange(num + 1)
  chance = stats.binom.pmf(outcomes, num, p)
  for delta in (0.05, 0.2):
    upper = [limits.clopper_pearson_upper(k, num, delta) for k in outcomes]
    lower = [limits.clopper_pearson_lower(k, num, delta) for k in outcomes]
    assert chance[np.array(upper) >= p].sum() >= 1 - delta - 1e-12
    assert chance[np.array(lower) <= p].sum() >= 1 - delta - 1e-12


# Values on a scale of 4, and how often each comes: skewed, rare, even.
WORLDS = ((0.7, 0.2, 0.1, 0, 0), (0.98, 0, 0, 0, 0.02), (0.2,) * 5)


@pytest.mark.parametrize('world', WORLDS)
@pytest.mark.parametrize('num', [2, 30, 200])
def test_coverage_of_limits_of_a_mean(world, num):
  rng = np.random.default_rng(0)
  mean = np.dot(world, np.arange(5))
  samples = rng.choice(5, p=world, size=(DRAWS, num))
  for delta in (0.05, 0.3):
    found = np.array([limits.of_mean(x, delta, low=0, high=4) for x in samples])
    assert (found[:, 0] <= samples.mean(-1) + 1e-12).all()
    assert (found[:, 1] >= samples.mean(-1) - 1e-12).all()
    at_least(found[:, 0] <= mean + 1e-12, delta)
    at_least(found[:, 1] >= mean - 1e-12, delta)


def test_coverage_of_several_limits_together():
  """Five means, and none may be off."""
  rng = np.random.default_rng(1)
  share = limits.shared(0.3, 5)
  samples = rng.random((DRAWS, 5, 40)) < 0.1
  upper = np.array(
    [limits.clopper_pearson_upper(k, 40, share) for k in range(41)]
  )
  at_least((upper[samples.sum(-1)] >= 0.1).all(-1), 0.3)


def test_coverage_of_dis2():
  """Where the critic's discrepancy is that of the truth, its limit holds."""
  rng = np.random.default_rng(3)
  delta = 0.2
  held = []
  for _ in range(DRAWS):
    # The critic is the true labelling on the target, and h errs in 30%; on the
    # source h errs in 10%, and the critic is it as well.
    source = rng.random(50) < 0.1
    target = rng.random(80) < 0.3
    held.append(shift.dis2(source, source, target, delta)['upper'] >= 0.3)
  at_least(held, delta)


def test_answers_by_hand():
  """The 40 most confident of 100 are right, the rest is wrong half the time."""
  confidence = np.linspace(1, 0.01, 100)
  wrong = np.where(np.arange(100) < 40, 0, np.arange(100) % 2)
  delta = 0.05
  share = delta / len(selective.SHARES)
  five, ten = selective.answer(wrong, confidence, delta)
  # Of 40 without an error, at most 1 - share^(1/40) are wrong: 13.9%.
  assert limits.clopper_pearson_upper(0, 40, share) > 0.13
  assert five == {
    'target': 0.05,
    'answered': 0.0,
    'threshold': None,
    'error': None,
    'upper': None,
  }
  assert ten['answered'] == 0
  # Ten times as many: 400 right ones are enough, and with 50 others too many.
  five, ten = selective.answer(
    np.repeat(wrong, 10), np.repeat(confidence, 10), delta
  )
  assert (five['answered'], five['error']) == (0.4, 0)
  assert five['threshold'] == pytest.approx(confidence[40])
  assert five['upper'] == limits.clopper_pearson_upper(0, 400, share)
  assert (ten['answered'], ten['error']) == (0.45, 20 / 450)


def test_answers_of_few_examples():
  """A target is not met, nor is one of ties, which have no threshold."""
  for confidence in ([0.9], [0.5, 0.5, 0.5]):
    confidence = np.array(confidence)
    found = selective.answer(np.zeros(len(confidence)), confidence, 0.1)
    assert [one['answered'] for one in found] == [0, 0]
  many = selective.answer(np.zeros(1000), np.full(1000, 0.5), 0.1)
  assert [one['answered'] for one in many] == [1, 1]


def test_coverage_of_answers():
  """The threshold is chosen on the examples, and the limit holds all the same.

  Of confidence c, uniform, 0.5 (1 - c) are wrong: above t, 0.25 (1 - t).
  """
  rng = np.random.default_rng(6)
  delta, num = 0.2, 800
  held, answered = [], []
  for _ in range(1000):
    confidence = rng.random(num)
    wrong = rng.random(num) < 0.5 * (1 - confidence)
    found = selective.answer(wrong, confidence, delta)
    held.append(
      all(
        one['threshold'] is None
        or 0.25 * (1 - one['threshold']) <= one['target']
        for one in found
      )
    )
    answered.append(found[1]['answered'])
  at_least(held, delta)
  # 0.25 (1 - t) <= 0.1 allows 40% at most.
  assert 0.1 < np.mean(answered) < 0.4
