"""Whether two parties mean the same by class 0, 1, ...: compared by name.

A head's columns and a data set's labels are numbers. Where both parties name
their classes, the names decide: the same names in another order are put in
order, other names are refused.
"""

from collections.abc import Sequence
import unicodedata

import numpy as np

from ijckd_jax.data.datasets import imagenet
from ijckd_jax.runtime import config_utils

MAX_SHOWN = 3


def match(
  names: Sequence[str],
  wanted: Sequence[str],
  *,
  what: str,
  of: str = 'the data set',
  by_number: bool = False,
  flag: str = '--classes_by_number',
) -> tuple[np.ndarray | None, str]:
  """Compares the names of K classes with those of another party.

  Names are alike that differ in case, white space, `_` or `-` only, unless one
  party has two classes that differ only so, such as EMNIST's `a` and `A`.
  WordNet's identifiers of ImageNet's classes are compared as words.

  Args:
    names: K names of one party, such as a teacher.
    wanted: K names of the other party, such as a data set.
    what: how messages call the one party.
    of: how messages call the other party.
    by_number: whether class i is class i, whatever the names are.
    flag: what sets `by_number`, for the messages.

  Returns:
    For each of the `wanted` classes its number among `names`, or None where
    they are in the same order; and a sentence that a user must know, or ''.

  Raises:
    config_utils.UserError: the names differ, or it cannot be told which class
      is which.
  """
  if len(names) != len(wanted):
    raise config_utils.UserError(
      f'{what} has {len(names)} classes, but {of} has {len(wanted)}'
    )
  names, wanted = map(imagenet.in_words, (names, wanted))
  ours, theirs = (list(map(_plain, values)) for values in (names, wanted))
  if len(set(ours)) < len(ours) or len(set(theirs)) < len(theirs):
    ours, theirs = (list(map(str, values)) for values in (names, wanted))
  if ours == theirs or by_number:
    return None, ''
  unnamed = [
    party
    for party, values in ((what, names), (of, wanted))
    if not are_names(values)
  ]
  same = sorted(ours) == sorted(theirs)
  if unnamed and not (same or all(map(str.isdecimal, ours + theirs))):
    return None, (
      f'the classes of {what} and of {of} could not be compared, because those '
      f'of {unnamed[0]} have no names, only numbers: class i of the one is '
      'taken for class i of the other'
    )
  if same and (unnamed or len(set(ours)) < len(ours)):
    why = 'are numbers' if unnamed else 'are not all different'
    raise config_utils.UserError(
      f'the classes of {what} and of {of} are in another order, but their '
      f'names {why}, so that it cannot be told which class is which: give '
      f'{flag} if class i is class i in both'
    )
  if same:
    place = {name: number for number, name in enumerate(ours)}
    return np.array([place[name] for name in theirs]), (
      f'the classes of {what} are in another order than those of {of}: they '
      'are put in order by their names'
    )
  shown = [
    f'class {i} is {config_utils.short(one)!r} and {config_utils.short(two)!r}'
    for i, (one, two) in enumerate(zip(names, wanted, strict=True))
    if ours[i] != theirs[i]
  ]
  more = f', and {len(shown) - MAX_SHOWN} more' * (len(shown) > MAX_SHOWN)
  raise config_utils.UserError(
    f'the classes of {what} are not those of {of} '
    f'({"; ".join(shown[:MAX_SHOWN])}{more}): give {flag} if class i is class '
    'i in both'
  )


def are_names(values: Sequence[str]) -> bool:
  """Returns whether classes have names: not all '', and not '0', '1', '2'..."""
  texts = [str(value).strip() for value in values]
  return any(texts) and texts != list(map(str, range(len(texts))))


def first_named(*parties: Sequence[str]) -> Sequence[str]:
  """Returns the first whose classes have names; the first where none has."""
  return next(filter(are_names, parties), parties[0])


def _plain(name: str) -> str:
  """Returns a name without what people write in several ways."""
  text = unicodedata.normalize('NFC', str(name)).casefold()
  return ' '.join(text.replace('_', ' ').replace('-', ' ').split())


def reorder(head, order: np.ndarray):
  """Returns a head whose class i is class `order[i]` of the one given.

  Args:
    head: 'kernel' (D, K) and 'bias' (K,).
    order: (K,) as `match` returns it.
  """
  return {'kernel': head['kernel'][:, order], 'bias': head['bias'][order]}
