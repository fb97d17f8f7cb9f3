"""What the report's text is made of."""

from collections.abc import Mapping
from collections.abc import Sequence
from typing import Any


def join(*sentences: str | bool) -> str:
  """Joins those sentences that there are."""
  return ' '.join(filter(None, sentences))


def learner(summary: Mapping[str, Any]) -> str:
  """Returns what a report calls the network that was trained."""
  return 'student' if summary['teacher'] else 'network'


def grid(cells: Sequence[Sequence[str]]) -> str:
  """Returns a Markdown table; its first row holds the titles."""
  widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
  rule = [f':{"-" * (widths[0] - 1)}']
  rule.extend(f'{"-" * (width - 1)}:' for width in widths[1:])
  lines = []
  for row in (cells[0], rule, *cells[1:]):
    first, *numbers = zip(row, widths, strict=True)
    padded = [first[0].ljust(first[1])]
    padded.extend(cell.rjust(width) for cell, width in numbers)
    lines.append(f'| {" | ".join(padded)} |')
  return '\n'.join(lines)
