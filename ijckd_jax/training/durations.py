"""Durations of a config, given in epochs, steps or examples."""

from collections.abc import Mapping
import math

from ijckd_jax.runtime import config_utils

UNITS = ('epochs', 'steps', 'examples')


def duration(config: Mapping[str, object], what: str) -> tuple[str, float]:
  """Returns the unit and the value of a config's duration.

  Args:
    config: holds `<what>_epochs`, `<what>_steps` and `<what>_examples`; 0 means
      not given.
    what: 'total', 'warmup', ...

  Returns:
    ('epochs', 2.5), for example; ('steps', 0) where none is given.

  Raises:
    config_utils.UserError: more than one is given, or one is negative.
  """
  given = [
    (unit, config[f'{what}_{unit}'])
    for unit in UNITS
    if config[f'{what}_{unit}']
  ]
  if len(given) > 1:
    names = ' and '.join(f'{what}_{unit}={value}' for unit, value in given)
    raise config_utils.UserError(f'{names}: give one and set the others to 0')
  unit, value = given[0] if given else ('steps', 0)
  if not (math.isfinite(value) and value >= 0):
    raise config_utils.UserError(
      f'{what}_{unit}={value}: a duration is finite and cannot be negative'
    )
  return unit, value


def to_steps(
  config: Mapping[str, object],
  what: str,
  *,
  num_examples: int,
  batch_size: int,
  times: int = 1,
) -> int:
  """Returns so many `times` the duration `what` of a config, in whole steps.

  Args:
    config: as `duration` takes it.
    what: as `duration` takes it.
    num_examples: examples in an epoch.
    batch_size: examples in a step.
    times: 3 gives the step at which the third such period ends.

  Returns:
    Steps, rounded to the nearest and at least one a time; 0 where no duration
    is given.
  """
  return round(times * _period(config, what, num_examples, batch_size))


def next_period_end(
  config: Mapping[str, object],
  what: str,
  step: int,
  *,
  num_examples: int,
  batch_size: int,
) -> float:
  """Returns the first step after `step` at which a period of `what` ends.

  Args:
    config: as `duration` takes it.
    what: as `duration` takes it.
    step: counted from 1; 0 for the first period's end.
    num_examples: examples in an epoch.
    batch_size: examples in a step.

  Returns:
    A step; infinity where no duration is given, so that no period ends.
  """
  period = _period(config, what, num_examples, batch_size)
  if not period:
    return math.inf
  times = int(step / period)  # Whole periods; rounding may count one too many.
  ends = (round(t * period) for t in range(times, times + 3))
  return next(end for end in ends if end > step)


def _period(config, what, num_examples, batch_size) -> float:
  """Returns a duration in steps, at least one; 0 where none is given."""
  unit, value = duration(config, what)
  examples = {'epochs': num_examples, 'steps': batch_size, 'examples': 1}
  return max(1.0, value * examples[unit] / batch_size) if value else 0.0


def epoch_end(epoch: float, num_examples: int, batch_size: int) -> int:
  """Returns the step at which an epoch (counted from 1) ends."""
  return round(epoch * num_examples / batch_size)
