"""Text as Markdown for reports, cards and tables."""

from collections.abc import Mapping
from collections.abc import Sequence
import re
from typing import Any

from ijckd_jax.runtime import config_utils

# Of each metric: its column's title, what it is multiplied by, its format.
METRICS = {
  'top1': ('top-1 %', 100, '.2f'),
  'top5': ('top-5 %', 100, '.2f'),
  'nll': ('NLL', 1, '.4f'),
  'ece': ('ECE %', 100, '.2f'),
  'agreement': ('agreement %', 100, '.2f'),
  'kl': ('KL to teacher', 1, '.4f'),
}


# Half-width of a 95% interval in standard errors: every ± is a half-width.
HALF_WIDTH = 1.96


# What Markdown takes for more than text. A `_` inside a word is none of it.
MARKUP = re.compile(r'[\\`*\[<>|~$#]|&(?=#?\w+;)|(?<![^\W_])_|_(?![^\W_])')


def escape(value: object) -> str:
  """Returns what a value says as one line of Markdown that shows just that.

  For whatever comes from outside: names of classes, files and networks, values
  of configs, and what bundles say of themselves. It may stand in a table.
  """
  return MARKUP.sub(r'\\\g<0>', config_utils.printable(value))


def metrics(rows: Mapping[str, Mapping[str, float]]) -> str:
  """Returns a Markdown table of METRICS, those that any row has.

  Args:
    rows: metrics by what the row is called.
  """
  shown = [key for key in METRICS if any(key in row for row in rows.values())]
  cells = [['', *(METRICS[key][0] for key in shown)]]
  for name, row in rows.items():
    cells.append([name])
    for key in shown:
      _, factor, form = METRICS[key]
      cells[-1].append(f'{factor * row[key]:{form}}' if key in row else '')
  return grid(cells)


def join(*sentences: str | bool) -> str:
  """Joins those sentences that there are."""
  return ' '.join(filter(None, sentences))


def learner(summary: Mapping[str, Any]) -> str:
  """Returns what a report calls the network that was trained."""
  return 'student' if summary['teacher_name'] else 'network'


def grid(cells: Sequence[Sequence[str]]) -> str:
  """Returns a Markdown table; its first row holds the titles."""
  # The rule of a column needs a hyphen beside its colon.
  widths = [max(2, *map(len, column)) for column in zip(*cells, strict=True)]
  rule = [f':{"-" * (widths[0] - 1)}']
  rule.extend(f'{"-" * (width - 1)}:' for width in widths[1:])
  lines = []
  for row in (cells[0], rule, *cells[1:]):
    first, *numbers = zip(row, widths, strict=True)
    padded = [first[0].ljust(first[1])]
    padded.extend(cell.rjust(width) for cell, width in numbers)
    lines.append(f'| {" | ".join(padded)} |')
  return '\n'.join(lines)
