"""How often limits hold on corrupted images, and how far above they are.

  python -m experiments.shift_study.analyse

Reads results.jsonl; writes study.json and the pictures, and prints the tables.
"""

import json
import pathlib

from matplotlib import figure
import numpy as np

from experiments.shift_study import measure
from experiments.shift_study import train
from ijckd_jax.runtime import markdown

FOLDER = pathlib.Path(__file__).parent
LIMITS = {
  'by_student_logits': "limit: Dis² on the student's logits",
  'same_distribution': 'limit without a shift: error and disagreement',
  'average_confidence': 'estimate: average confidence',
  'thresholded_confidence': 'estimate: ATC',
}


def summarize(found: list[dict]) -> dict:
  """Returns how each limit or estimate fares over conditions."""
  truth = np.array([row['true_error'] for row in found])
  result = {'n': len(found), 'true_error': float(truth.mean())}
  for name in LIMITS:
    off = np.array([row[name] for row in found]) - truth
    result[name] = {
      'holds': float((off >= 0).mean()),
      'slack': float(off.mean()),
      'worst': float(-off.min()),
      'vacuous': float(np.mean([row[name] >= 1 for row in found])),
    }
  return result


def table(groups: dict[str, dict]) -> str:
  """Returns a Markdown table of `summarize` by group."""
  cells = [['', 'n', 'said by', 'holds %', 'slack', 'most below', 'vacuous %']]
  for name, found in groups.items():
    for key, title in LIMITS.items():
      row = found[key]
      cells.append(
        [
          name,
          str(found['n']),
          title,
          f'{100 * row["holds"]:.1f}',
          f'{100 * row["slack"]:.1f}',
          f'{100 * row["worst"]:.1f}' if row['worst'] > 0 else '',
          f'{100 * row["vacuous"]:.1f}',
        ]
      )
  return markdown.grid(cells)


def draw(rows) -> None:
  """Draws what was said against the truth, for each way."""
  fig = figure.Figure(figsize=(9, 3.4), layout='constrained', dpi=120)
  axes = fig.subplots(1, 3, sharex=True, sharey=True)
  names = [name for name in LIMITS if name != 'same_distribution']
  colors = ('#0072B2', '#009E73', '#B0508A', '#D98E00', '#56B4E9')
  for ax, name in zip(axes, names, strict=True):
    ax.plot([0, 1], [0, 1], color='#222222', linewidth=0.8)
    ax.fill_between([0, 1], [0, 1], 0, color='#D55E00', alpha=0.08)
    for method, color in zip(train.METHODS, colors, strict=True):
      found = [row['found'][method] for row in rows]
      ax.plot(
        [row['true_error'] for row in found],
        [row[name] for row in found],
        '.',
        color=color,
        markersize=4,
        label=method,
      )
    ax.set_title(LIMITS[name].replace(', ', ',\n', 1), fontsize=9)
    ax.set_xlabel("student's true error")
  axes[0].set_ylabel('what was said without labels')
  axes[-1].legend(fontsize=8)
  axes[1].text(0.97, 0.03, 'too low', ha='right', color='#D55E00', fontsize=8)
  for form in ('png', 'svg'):
    fig.savefig(
      FOLDER / f'study.{form}',
      metadata={'Date': None} if form == 'svg' else None,
    )


def main() -> None:
  """Analyses what is there."""
  lines = (FOLDER / 'results.jsonl').read_text().splitlines()
  rows = [json.loads(line) for line in lines]
  shifted = [row for row in rows if row['corruption'] != measure.CLEAN]

  def found(rows, methods=train.METHODS):
    return [row['found'][method] for row in rows for method in methods]

  kinds = list(dict.fromkeys(row['corruption'] for row in shifted))
  study = {
    'conditions': len(shifted),
    'all': summarize(found(shifted)),
    'clean': summarize(
      found([row for row in rows if row['corruption'] == measure.CLEAN])
    ),
    'by_method': {
      method: summarize(found(shifted, (method,))) for method in train.METHODS
    },
    'by_severity': {
      str(number): summarize(
        found([row for row in shifted if row['severity'] == number])
      )
      for number in range(1, 6)
    },
    'by_corruption': {
      kind: summarize(
        found([row for row in shifted if row['corruption'] == kind])
      )
      for kind in kinds
    },
    'failures': [
      {
        'corruption': row['corruption'],
        'severity': row['severity'],
        'method': method,
        'said_by': LIMITS[name],
        'true_error': row['found'][method]['true_error'],
        'limit': row['found'][method][name],
      }
      for row in shifted
      for method in train.METHODS
      for name in LIMITS
      if name.startswith('by_')
      and row['found'][method][name] < row['found'][method]['true_error']
    ],
  }
  (FOLDER / 'study.json').write_text(json.dumps(study, indent=1) + '\n')
  draw(rows)
  print(
    table(
      {
        'all': study['all'],
        'clean': study['clean'],
        **{f'severity {k}': v for k, v in study['by_severity'].items()},
        **study['by_method'],
      }
    )
  )
  print(table(study['by_corruption']))
  print(len(study['failures']), 'failures')
  cells = [
    ['corruption', 'by', 'severity', 'student', 'true error %', 'limit %']
  ]
  for row in study['failures']:
    cells.append(
      [
        row['corruption'],
        row['said_by'],
        str(row['severity']),
        row['method'],
        f'{100 * row["true_error"]:.2f}',
        f'{100 * row["limit"]:.2f}',
      ]
    )
  print(markdown.grid(cells))


if __name__ == '__main__':
  main()
