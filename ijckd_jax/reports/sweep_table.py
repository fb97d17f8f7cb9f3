"""The table of a sweep: what each setting was worth over its seeds."""

from collections.abc import Mapping
from collections.abc import Sequence
import dataclasses
import math
from typing import Any

import numpy as np

from ijckd_jax.runtime import markdown

LEVEL = 0.95  # Of the intervals.


@dataclasses.dataclass(frozen=True)
class Run:
  """A run of a sweep, by what its table tells of it.

  Attributes:
    setting: what the runs that differ in their seed only are called.
    seed: of the run.
    summary: as in `summary.json`; None where the run is not finished.
  """

  setting: str
  seed: int
  summary: Mapping[str, Any] | None


def rows(runs: Sequence[Run]) -> list[dict[str, Any]]:
  """Returns a row for each setting, in their order.

  Its keys: 'setting'; 'seeds', of the finished runs; 'top1', the test accuracy
  of the last student in per cent, by its 'mean' and its sample standard
  deviation 'std'; 'difference' to the first setting over the seeds that both
  have, in points, by its 'mean', the 'half_width' of its 95% t-interval and the
  number of 'pairs'; 'teacher_top1' in per cent; 'parameters' of the student. A
  number for which there are too few runs is None.
  """
  scores, teachers, sizes = {}, {}, {}
  for run in runs:
    found = scores.setdefault(run.setting, {})
    judged = teachers.setdefault(run.setting, [])
    if run.summary is not None:
      found[run.seed] = 100 * run.summary['student']['last']['top1']
      counts = run.summary['parameters']['student']
      sizes[run.setting] = sum(counts.values())
      if run.summary['teacher']:
        judged.append(100 * run.summary['teacher']['top1'])
  first = next(iter(scores))
  table = []
  for setting, found in scores.items():
    values = list(found.values())
    shared = [seed for seed in found if seed in scores[first]]
    differences = [found[seed] - scores[first][seed] for seed in shared]
    table.append(
      {
        'setting': setting,
        'seeds': sorted(found),
        'top1': {'mean': _mean(values), 'std': _std(values)},
        'difference': None
        if setting == first
        else {
          'mean': _mean(differences),
          'half_width': half_width(differences),
          'pairs': len(differences),
        },
        'teacher_top1': _mean(teachers[setting]),
        'parameters': sizes.get(setting),
      }
    )
  return table


def _mean(values) -> float | None:
  return float(np.mean(values)) if values else None


def _std(values) -> float | None:
  """Returns the sample standard deviation; None for fewer than two values."""
  return float(np.std(values, ddof=1)) if len(values) > 1 else None


def half_width(values: Sequence[float]) -> float | None:
  """Returns the half-width of the mean's 95% interval, by Student's t.

  None for fewer than two values.
  """
  if len(values) < 2:
    return None

  from scipy import stats

  quantile = stats.t.ppf((1 + LEVEL) / 2, len(values) - 1)
  return float(quantile * _std(values) / math.sqrt(len(values)))


def text(table: Sequence[Mapping[str, Any]]) -> str:
  """Returns the rows as Markdown, and below them how they are to be read."""
  several = len(table) > 1
  with_teacher = any(row['teacher_top1'] is not None for row in table)
  titles = ['setting', 'seeds', 'top-1 %', 'std, points']
  if several:
    titles += ['difference, points', '95% interval, points', 'pairs']
  if with_teacher:
    titles += ["teacher's top-1 %"]
  titles += ['parameters']
  cells = [titles]
  for row in table:
    top1, difference = row['top1'], row['difference'] or {}
    line = [markdown.escape(row['setting']), f'{len(row["seeds"])}']
    line += [_number(top1['mean']), _number(top1['std'])]
    if several:
      half = _number(difference.get('half_width'))
      line += [_number(difference.get('mean'), '+'), half and f'± {half}']
      line += [f'{difference["pairs"]}' if difference else '']
    if with_teacher:
      line += [_number(row['teacher_top1'])]
    size = row['parameters']
    line += ['' if size is None else f'{size:,}']
    cells.append(line)
  said = (
    'Top-1 is that of the last student on the test split, as a mean over the '
    "seeds; std is the seeds' sample standard deviation."
  )
  if several:
    said += (
      f' Differences are to {markdown.escape(table[0]["setting"])}, in pairs '
      "of the same seed; their interval is Student's t."
    )
  return f'{markdown.grid(cells)}\n\n{said}\n'


def _number(value: float | None, sign: str = '') -> str:
  return '' if value is None else f'{value:{sign}.2f}'
