"""What limits and estimates say of corrupted images, against the truth.

  python -m experiments.shift_study.analyse

Reads results.jsonl; writes study.json and study.png, and prints the tables.
"""

import json
import pathlib

from matplotlib import figure
import numpy as np

from experiments.shift_study import corruptions
from experiments.shift_study import measure
from experiments.shift_study import train
from ijckd_jax.bounds import calibration
from ijckd_jax.runtime import markdown

FOLDER = pathlib.Path(__file__).parent
LIMITS = {
  'dis2': "Dis² on the student's logits",
  'dis2_by_disagreement': 'the same, critics of the disagreement loss alone',
  'calibrated_limit': 'calibrated Dis²',
  'same_distribution': 'without a shift: error and disagreement',
}
ESTIMATES = {
  'calibrated': 'calibrated Dis²',
  'calibrated_atc': 'calibrated ATC',
  'thresholded_confidence': 'ATC',
  'average_confidence': 'average confidence',
}
NUM_FAILURES = 10
COLORS = ('#0072B2', '#009E73', '#D98E00', '#B0508A')


def cases(rows) -> list[dict]:
  """Returns a row for each student on each shift, with calibrated estimates.

  Those are calibrated by all shifts of the same student whose kinds are not in
  corruptions.NEW, but for the kind that is estimated.
  """
  found = []
  for teacher in train.TEACHERS:
    shifted = [
      row
      for row in rows
      if row['teacher'] == teacher and row['corruption'] != measure.CLEAN
    ]
    for method in train.methods(teacher):
      for row in shifted:
        case = {
          'teacher': teacher,
          'method': method,
          'corruption': row['corruption'],
          'severity': row['severity'],
          'group': group(teacher, row['corruption']),
          **row['found'][method],
        }
        known = [
          (other['corruption'], other['found'][method])
          for other in shifted
          if other['corruption'] not in (row['corruption'], *corruptions.NEW)
        ]
        for name, limit, by in (
          ('calibrated', 'calibrated_limit', 'dis2_value'),
          ('calibrated_atc', None, 'thresholded_confidence'),
        ):
          said = calibration.estimate(
            case[by],
            [(kind, there[by], there['true_error']) for kind, there in known],
            measure.DELTA,
          )
          case[name] = said['value']
          if limit:
            case[limit] = said['upper']
        found.append(case)
  return found


def group(teacher: str, corruption: str) -> str:
  """Returns which part of the study a case belongs to."""
  students = f"{teacher}'s students"
  if corruption in corruptions.NEW:
    return f'{students}, new kinds'
  return f'{students}, known kinds'


def summarize(found: list[dict]) -> dict:
  """Returns how each limit and estimate fares over cases."""
  truth = np.array([case['true_error'] for case in found])
  result = {'n': len(found), 'true_error': float(truth.mean())}
  for name in (*LIMITS, *ESTIMATES):
    said = np.array([case[name] for case in found])
    off = said - truth
    result[name] = {
      'holds': float((off >= 0).mean()),
      'slack': float(off.mean()),
      'absolute': float(np.abs(off).mean()),
      'worst': float(max(0.0, -off.min())),
      'vacuous': float((said >= 1).mean()),
    }
  return result


def by(found, *names: str) -> dict[str, dict]:
  """Returns `summarize` of cases by the values of fields."""
  groups = {}
  for case in found:
    key = ', '.join(str(case[name]) for name in names)
    groups.setdefault(key, []).append(case)
  return {key: summarize(part) for key, part in groups.items()}


def failures(found, limit: str) -> list[dict]:
  """Returns the cases above a limit, the worst first."""
  failed = [case for case in found if case[limit] < case['true_error']]
  failed.sort(key=lambda case: case[limit] - case['true_error'])
  names = ('teacher', 'method', 'corruption', 'severity', 'true_error', limit)
  return [{name: case[name] for name in names} for case in failed]


def percent(value: float) -> str:
  """Returns a share in per cent."""
  return f'{100 * value:.1f}'


def table(groups, titles, columns) -> str:
  """Returns a Markdown table of `summarize` by group.

  Args:
    groups: summaries by name.
    titles: of the rows of each group, by limit or estimate.
    columns: keys of a summary by their titles.
  """
  cells = [['', 'n', 'said by', *columns]]
  for name, found in groups.items():
    for key, title in titles.items():
      values = [percent(found[key][column]) for column in columns.values()]
      cells.append([name, str(found['n']), title, *values])
  return markdown.grid(cells)


def failures_table(failed, limit: str) -> str:
  """Returns a Markdown table of the worst of `failures`."""
  cells = [
    ['corruption', 'severity', 'student of', 'by', 'true error %', 'limit %']
  ]
  for case in failed[:NUM_FAILURES]:
    cells.append(
      [
        *(str(case[key]) for key in ('corruption', 'severity', 'teacher')),
        case['method'],
        percent(case['true_error']),
        percent(case[limit]),
      ]
    )
  return markdown.grid(cells)


def draw(found) -> None:
  """Draws what was said against the truth."""
  fig = figure.Figure(figsize=(9.6, 3.5), layout='constrained', dpi=120)
  panels = {
    'dis2': "limit: Dis² on the student's logits",
    'calibrated_limit': 'limit: calibrated Dis²',
    'calibrated': 'estimate: calibrated Dis²',
    'thresholded_confidence': 'estimate: ATC',
  }
  axes = fig.subplots(1, len(panels), sharex=True, sharey=True)
  groups = list(dict.fromkeys(case['group'] for case in found))
  for ax, (name, title) in zip(axes, panels.items(), strict=True):
    ax.plot([0, 1], [0, 1], color='#222222', linewidth=0.8)
    ax.fill_between([0, 1], [0, 1], 0, color='#D55E00', alpha=0.08)
    for part, color in zip(groups, COLORS, strict=True):
      chosen = [case for case in found if case['group'] == part]
      ax.plot(
        [case['true_error'] for case in chosen],
        [case[name] for case in chosen],
        '.',
        color=color,
        markersize=3,
        label=part,
      )
    ax.set_title(title, fontsize=9)
    ax.set_xlabel("student's true error", fontsize=9)
  axes[0].set_ylabel('what was said without labels')
  axes[0].text(0.97, 0.03, 'too low', ha='right', color='#D55E00', fontsize=8)
  fig.legend(
    *axes[0].get_legend_handles_labels(),
    loc='outside lower center',
    ncols=2,
    fontsize=8,
    markerscale=2,
  )
  fig.savefig(FOLDER / 'study.png')


def main() -> None:
  """Analyses what is there."""
  lines = (FOLDER / 'results.jsonl').read_text().splitlines()
  found = cases([json.loads(line) for line in lines])
  study = {
    'by_group': by(found, 'group'),
    'by_severity': by(found, 'severity'),
    'by_corruption': by(found, 'corruption'),
    'by_student': by(found, 'teacher', 'method'),
    'failures': {
      limit: failures(found, limit)
      for limit in ('dis2', 'dis2_by_disagreement', 'calibrated_limit')
    },
  }
  (FOLDER / 'study.json').write_text(json.dumps(study, indent=1) + '\n')
  draw(found)
  for limit, failed in study['failures'].items():
    print(f'{len(failed)} of {len(found)} above {LIMITS[limit]}\n')
    print(failures_table(failed, limit), '\n')
  holds = {
    'holds %': 'holds',
    'slack': 'slack',
    'most below': 'worst',
    'vacuous %': 'vacuous',
  }
  off = {'off by': 'absolute', 'mean of it': 'slack', 'most below': 'worst'}
  few = {'calibrated_limit': LIMITS['calibrated_limit']}
  print(table(study['by_group'], LIMITS, holds), '\n')
  print(table(study['by_group'], ESTIMATES, off), '\n')
  for key in ('by_severity', 'by_corruption', 'by_student'):
    print(table(study[key], few, holds), '\n')


if __name__ == '__main__':
  main()
