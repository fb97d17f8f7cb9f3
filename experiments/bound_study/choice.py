"""What it costs to choose a student without labels, by its disagreement.

  python -m experiments.bound_study.choice

The student is chosen that differs from its teacher on the fewest images. Reads
the runs of this study and those of experiments/comparison, and prints tables.
"""

import collections
import json
import pathlib
import statistics

import numpy as np

from experiments.bound_study import train
from experiments.comparison import analyse
from experiments.comparison import grid
from ijckd_jax.runtime import markdown

DEFAULT = 'ijckd'
MIN_CONFIGURATIONS = 10  # Of a pair, to fit a line on all but one of them.
# Names of the configurations of each study: with another connector than the
# default's, with other losses (simkd is the one with features alone), and those
# that were trained without labels.
OF_HERE = {
  'connectors': train.CONNECTORS,
  'losses': ('simkd', *train.WEIGHTS),
  'without': ('simkd', 'logits', 'unlabelled'),
}
OF_COMPARISON = {
  part: [c.name for c in grid.CELLS if part in c.parts and c.name != DEFAULT]
  for part in ('connectors', 'losses')
} | {'without': ('simkd', 'logit', 'logit + feature')}


def of_here() -> list[dict]:
  """Returns this study's students: where each is from, and two rates."""
  path = pathlib.Path(__file__).parent / 'results.jsonl'
  found = []
  for row in map(json.loads, path.read_text().splitlines()):
    terms = {key: x['value'] for key, x in row['report']['terms'].items()}
    found.append(
      {
        'pair': ('here', row['pair']),
        'name': row['name'],
        'seed': row['seed'],
        'disagreement': terms['disagreement'],
        'error': terms['student_error'],
        'help': terms['help'],
      }
    )
  return found


def of_comparison() -> list[dict]:
  """Returns the students of experiments/comparison, as `of_here` does."""
  rows = analyse.read(grid.FOLDER / 'results.jsonl')
  found = []
  for cell in grid.CELLS:
    if 'augmentation' in cell.parts:
      continue
    for row in analyse.counted(rows, cell.pair, cell.name):
      last = row['last']
      found.append(
        {
          'pair': ('comparison', f'{grid.TEACHER}_{grid.PAIRS[cell.pair]}'),
          'name': cell.name,
          'seed': row['seed'],
          'disagreement': 1 - last['agreement'],
          'error': last['student_error'],
          'help': last['help'],
        }
      )
  return found


def regrets(students, names) -> dict | None:
  """Returns what was lost, in points, by how it was chosen; None for no group.

  Students of one pair and seed are chosen from, where none is missing.

  Args:
    students: of `of_here` or `of_comparison`, of one pair.
    names: of the configurations that are chosen from.
  """
  groups = collections.defaultdict(dict)
  for student in students:
    if student['name'] in names:
      groups[student['seed']][student['name']] = student
  lost = collections.defaultdict(list)
  for group in groups.values():
    if len(group) < len(names):
      continue
    errors = {name: 100 * row['error'] for name, row in group.items()}
    best = min(errors.values())
    chosen = min(group, key=lambda name: group[name]['disagreement'])
    lost['disagreement'].append(errors[chosen] - best)
    lost['chance'].append(statistics.mean(errors.values()) - best)
    if DEFAULT in errors:
      lost['default'].append(errors[DEFAULT] - best)
  return lost or None


def by_group(students, of) -> list[list[str]]:
  """Returns the rows of the table of regrets."""
  connectors = [DEFAULT, *of['connectors']]
  losses = [DEFAULT, *of['losses']]
  both = [*connectors, *of['losses']]
  choices = {
    'connectors': connectors,
    'losses': losses,
    'both': both,
    'both, trained on labels': [x for x in both if x not in of['without']],
  }
  cells = []
  for pair in dict.fromkeys(student['pair'] for student in students):
    ours = [student for student in students if student['pair'] == pair]
    for what, names in choices.items():
      lost = regrets(ours, names)
      if lost is None:
        continue
      by_disagreement = lost['disagreement']
      cells.append(
        [
          ', '.join(pair),
          what,
          str(len(names)),
          str(len(by_disagreement)),
          f'{statistics.mean(by_disagreement):.2f}',
          f'{max(by_disagreement):.2f}',
          f'{statistics.mean(lost["default"]):.2f}',
          f'{statistics.mean(lost["chance"]):.2f}',
        ]
      )
  return cells


def line(students) -> list[str] | None:
  """Returns how a line predicts the errors of a pair; None for too few.

  The error of a configuration is predicted by its disagreement, and by a line
  that was fitted on all the others.
  """
  names, x, y = (
    np.array([student[key] for student in students])
    for key in ('name', 'disagreement', 'error')
  )
  configurations = sorted(set(names))
  if len(configurations) < MIN_CONFIGURATIONS:
    return None
  off = []
  for name in configurations:
    out = names == name
    fitted = np.polyfit(x[~out], y[~out], 1)
    off.append(100 * np.abs(np.polyval(fitted, x[out]) - y[out]).mean())
  right = np.array([student['help'] for student in students])
  agree = (y - x + right).sum() / (1 - x).sum()
  return [
    str(len(students)),
    str(len(configurations)),
    f'{statistics.mean(off):.2f}',
    f'{max(off):.2f}',
    f'{100 * agree:.1f}',
    f'{100 * (x - right).sum() / x.sum():.1f}',
  ]


def main() -> None:
  """Prints the tables."""
  chosen = [
    ['runs of', 'chosen between', 'of', 'seeds', 'regret', 'worst', 'default']
    + ['chance']
  ]
  lines = [
    ['runs of', 'students', 'configurations', 'off by', 'at most']
    + ['wrong where they agree %', 'where they differ %']
  ]
  for students, of in ((of_here(), OF_HERE), (of_comparison(), OF_COMPARISON)):
    chosen += by_group(students, of)
    for pair in dict.fromkeys(student['pair'] for student in students):
      found = line([s for s in students if s['pair'] == pair])
      if found:
        lines.append([', '.join(pair), *found])
  print(markdown.grid(chosen), '\n')
  print(markdown.grid(lines))


if __name__ == '__main__':
  main()
