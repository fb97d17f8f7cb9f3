"""Which cases of a test are run by default."""

from collections.abc import Iterable

import pytest


def slow_but(kept, values: Iterable) -> list:
  """Returns values as parameters of a test, all but those kept as slow ones."""
  return [
    value if value in kept else pytest.param(value, marks=pytest.mark.slow)
    for value in values
  ]
