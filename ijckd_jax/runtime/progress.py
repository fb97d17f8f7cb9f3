"""How far long work is: a bar on a terminal, lines in the log elsewhere."""

from collections.abc import Iterable
from collections.abc import Iterator
import contextlib
import contextvars
import logging
import sys
import time
from typing import TypeVar

from ijckd_jax.runtime import config_utils

T = TypeVar('T')
# Before work is worth a bar or a line, and between two lines.
SECONDS = 10.0
NUM_COMPILING = 2  # Calls: a training step is compiled again in the second one.

logger = logging.getLogger('ijckd_jax')
_is_wanted = contextvars.ContextVar('is_wanted', default=True)


@contextlib.contextmanager
def shown(wanted: bool) -> Iterator[None]:
  """Shows the package's log, and how far its work is, or hides the latter.

  Lines go to standard error, unless the caller has set up logging.

  Args:
    wanted: False: no bars and no lines but warnings.
  """
  handler, level = None, logger.level
  token = _is_wanted.set(wanted)
  if wanted and not logger.hasHandlers():
    handler = logging.StreamHandler()
    handler.setFormatter(config_utils.LineFormatter())
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
  try:
    yield
  finally:
    _is_wanted.reset(token)
    if handler is not None:
      logger.removeHandler(handler)
      logger.setLevel(level)


def log_to_stderr() -> None:
  """Writes the package's log to standard error, as commands do.

  Logging that is set up already stays as it is, but for its level.
  """
  handler = logging.StreamHandler()
  handler.setFormatter(config_utils.LineFormatter())
  logging.basicConfig(handlers=[handler])
  logger.setLevel(logging.INFO)


class Lines:
  """Lines about work that goes on, where there is no terminal for a bar."""

  def __init__(self, what: str, unit: str, done: int, total: int):
    """Starts the clock.

    Args:
      what: name of the work, such as 'evaluating'.
      unit: name of the things that are counted, such as 'images'.
      done: how many of them are done already.
      total: how many of them there are.
    """
    self._what = what
    self._unit = unit
    self._total = total
    self._done = done
    self._said = time.monotonic()
    self._calls = 0
    # When the calls that compile had ended, and how many units were done then.
    self._begin = self._first = None

  def say(self, done: int) -> None:
    """Logs how many are done, if the last line is SECONDS ago.

    The time that is left is told by what follows the first calls, because these
    may have waited for a compiler.
    """
    now = time.monotonic()
    if done == self._done:
      return
    self._done = done
    self._calls += 1
    if self._calls == NUM_COMPILING:
      self._begin, self._first = now, done
    if not _is_wanted.get() or now - self._said < SECONDS:
      return
    self._said = now
    left = ''
    if self._calls > NUM_COMPILING:
      pace = (now - self._begin) / (done - self._first)
      left = f', about {duration(pace * (self._total - done))} left'
    counted = f'{done:,} of {self._total:,} {self._unit}'
    logger.info('%s: %s%s', self._what, counted, left)


def say(text: str) -> None:
  """Logs a line, unless progress is turned off."""
  if _is_wanted.get():
    logger.info('%s', text)


def has_bar() -> bool:
  """Returns whether progress is a bar: on a terminal, if it is wanted."""
  return _is_wanted.get() and sys.stderr.isatty()


def watched(
  items: Iterable[T], what: str, unit: str, total: int, size: int = 1
) -> Iterator[T]:
  """Yields items, and says how far they are if they take over SECONDS.

  Args:
    items: to go through.
    what: name of the work, such as 'evaluating'.
    unit: name of the things that are counted, such as 'images'.
    total: how many units there are.
    size: units of an item; the last one may have fewer.
  """
  if has_bar():
    yield from _with_bar(items, what, unit, total, size)
    return
  lines = Lines(what, unit, 0, total)
  for number, item in enumerate(items):
    lines.say(number * size)
    yield item


def _with_bar(items, what, unit, total, size):
  import tqdm

  options = dict(delay=SECONDS, leave=False, dynamic_ncols=True)
  with tqdm.tqdm(desc=what, unit=f' {unit}', total=total, **options) as bar:
    for item in items:
      yield item
      bar.update(min(size, total - bar.n))


def duration(seconds: float) -> str:
  """Returns a duration as people say it."""
  if seconds < 90:
    return f'{seconds:.0f} s'
  if seconds < 90 * 60:
    return f'{seconds / 60:.0f} min'
  return f'{seconds / 3600:.1f} h'
