"""What predicts a student's error, how tight bounds are, what can be chosen.

  python -m experiments.bound_study.analyse

Reads results.jsonl; writes study.json and the pictures, and prints the tables.
"""

import collections
import json
import pathlib

from matplotlib import figure
import numpy as np
from scipy import stats

from experiments.bound_study import train
from ijckd_jax.runtime import markdown

FOLDER = pathlib.Path(__file__).parent
RESAMPLES = 2000
MIN_RUNS = 10  # Pairs of fewer are listed, and not ranked within.
# Of each predictor: whether it needs labels, whether features in the teacher's
# space, and how it is read off a row. All are expected to grow with the error.
PREDICTORS = {
  'disagreement': (False, False, lambda r: term(r, 'disagreement')),
  'feature MSE': (False, True, lambda r: r['means']['feature_square']),
  'logit MSE': (False, False, lambda r: r['means']['logit_square']),
  'KL to teacher': (False, False, lambda r: r['means']['kl']),
  'total variation': (False, False, lambda r: r['means']['total_variation']),
  'not certified to agree (D7a)': (
    False,
    True,
    lambda r: bound(r, 'flip_margin'),
  ),
  'discrepancy (D3)': (False, True, lambda r: term(r, 'discrepancy')),
  'IJC gap (D6)': (True, True, lambda r: term(r, 'ijc_gap')),
  'joint error (D3)': (True, True, lambda r: term(r, 'joint_error')),
  'joint bound (D3)': (True, True, lambda r: bound(r, 'joint')),
  'margin bound (D7b)': (True, True, lambda r: bound(r, 'label_margin')),
  'logit bound (D7c)': (True, False, lambda r: bound(r, 'logit_margin')),
  'soft bound (D11)': (True, False, lambda r: bound(r, 'soft')),
}
CHOICES = ('ijckd', *train.CONNECTORS, *train.WEIGHTS)


def term(row, name: str) -> float:
  """Returns the value of a term."""
  return row['report']['terms'][name]['value']


def bound(row, name: str) -> float:
  """Returns the value of a bound."""
  return row['report']['bounds'][name]['value']


def error(row) -> float:
  """Returns the student's error."""
  return term(row, 'student_error')


def is_connected(row) -> bool:
  """Returns whether its features are in the teacher's space."""
  return 'feature_square' in row['means']


def correlation(by_pair, read) -> float:
  """Returns Spearman's rank correlation within pairs, averaged over them."""
  found = []
  for rows in by_pair:
    values = [read(row) for row in rows]
    errors = [error(row) for row in rows]
    if len(set(values)) > 1 and len(set(errors)) > 1:
      found.append(stats.spearmanr(values, errors).statistic)
  return float(np.mean(found)) if found else float('nan')


def interval(by_pair, read, others=None) -> tuple[float, float]:
  """Returns 95% limits of the correlation, or of its lead over another's.

  Pairs are drawn again, then the configurations in them; the seeds of one stay
  together.
  """
  rng = np.random.default_rng(0)
  clusters = [
    [
      [r for r in rows if r['name'] == name]
      for name in dict.fromkeys(r['name'] for r in rows)
    ]
    for rows in by_pair
  ]
  found = []
  for _ in range(RESAMPLES):
    drawn = []
    for i in rng.integers(len(clusters), size=len(clusters)):
      chosen = rng.integers(len(clusters[i]), size=len(clusters[i]))
      drawn.append([row for j in chosen for row in clusters[i][j]])
    value = correlation(drawn, read)
    if others is not None:
      value -= correlation(drawn, others)
    found.append(value)
  return tuple(float(x) for x in np.nanquantile(found, (0.025, 0.975)))


def predict(rows) -> dict:
  """Returns how each predictor ranks students, all and connected ones."""
  found = {}
  for name, (labels, features, read) in PREDICTORS.items():
    for kind in ('connected', 'all'):
      if kind == 'all' and features:
        continue
      by_pair = [
        [
          row
          for row in rows
          if row['pair'] == pair and (kind == 'all' or is_connected(row))
        ]
        for pair in dict.fromkeys(row['pair'] for row in rows)
      ]
      lead = {
        other: [
          correlation(by_pair, read) - correlation(by_pair, against),
          *interval(by_pair, read, against),
        ]
        for other in ('disagreement', 'feature MSE')
        for against in [PREDICTORS[other][2]]
        if kind == 'connected' and name != other
      }
      found.setdefault(name, {'labels': labels})[kind] = {
        'correlation': correlation(by_pair, read),
        'interval': interval(by_pair, read),
        'by_pair': [correlation([part], read) for part in by_pair],
        'lead': lead,
      }
  return found


def tightness(rows) -> dict:
  """Returns of each bound how far it is above what it bounds."""
  found = {}
  for row in rows:
    for key, limit in row['report']['bounds'].items():
      name = f'{limit["statement"]}: {limit["title"]}'
      if key.startswith('own_'):
        name += ' (own head)'
      found.setdefault(name, []).append(
        (limit['measured'], limit['value'], limit['upper'])
      )
  return {
    name: {
      'runs': len(values),
      'measured': float(np.mean(values, axis=0)[0]),
      'bound': float(np.mean(values, axis=0)[1]),
      'limit': float(np.mean(values, axis=0)[2]),
      'vacuous': float(np.mean([upper >= 1 for *_, upper in values])),
      'failed': int(sum(upper < value for value, _, upper in values)),
    }
    for name, values in found.items()
  }


def choose(rows) -> dict:
  """Returns the regret of choosing connector and weights by each predictor."""
  groups = {}
  for row in rows:
    if row['name'] in CHOICES:
      groups.setdefault((row['pair'], row['seed']), []).append(row)
  groups = [rows for rows in groups.values() if len(rows) == len(CHOICES)]
  rules = {
    name: lambda rows, read=read: min(rows, key=read)
    for name, (labels, _, read) in PREDICTORS.items()
    if not labels
  }
  rules['the default, ijckd'] = lambda rows: next(
    row for row in rows if row['name'] == 'ijckd'
  )
  found = {}
  for name, rule in rules.items():
    chosen = [rule(group) for group in groups]
    regret = [
      error(row) - min(map(error, group))
      for row, group in zip(chosen, groups, strict=True)
    ]
    found[name] = {
      'regret': float(np.mean(regret)),
      'worst': float(np.max(regret)),
      'chosen': [row['name'] for row in chosen],
    }
  regret = [
    np.mean([*map(error, group)]) - min(map(error, group)) for group in groups
  ]
  found['any, by chance'] = {
    'regret': float(np.mean(regret)),
    'worst': None,
    'chosen': [],
  }
  return {'groups': len(groups), 'rules': found}


def draw(rows, predictors) -> None:
  """Draws correlations, and the error against two predictors."""
  fig = figure.Figure(figsize=(9, 4.6), layout='constrained', dpi=120)
  left, right = fig.subplots(1, 2, width_ratios=(1.3, 1))
  names = sorted(
    predictors, key=lambda name: predictors[name]['connected']['correlation']
  )
  for i, name in enumerate(names):
    found = predictors[name]['connected']
    color = '#D55E00' if predictors[name]['labels'] else '#0072B2'
    left.plot(found['interval'], [i, i], color=color)
    left.plot(found['correlation'], i, 'o', color=color, markersize=4)
  left.set_yticks(range(len(names)), names, fontsize=8)
  left.axvline(0, color='#767676', linewidth=0.8)
  left.set_xlabel("rank correlation with the student's error, within pairs")
  left.set_title('blue: without labels; orange: with', fontsize=9)
  for pair, color in zip(
    train.PAIRS, ('#0072B2', '#009E73', '#B0508A'), strict=True
  ):
    chosen = [row for row in rows if row['pair'] == pair]
    right.plot(
      [100 * term(row, 'disagreement') for row in chosen],
      [100 * error(row) for row in chosen],
      '.',
      color=color,
      label=pair.replace('_', ', '),
    )
  right.set_xlabel('disagreement, %')
  right.set_ylabel("student's error, %")
  right.legend(fontsize=8)
  for form in ('png', 'svg'):
    fig.savefig(
      FOLDER / f'study.{form}',
      metadata={'Date': None} if form == 'svg' else None,
    )


def main() -> None:
  """Analyses what is there."""
  lines = (FOLDER / 'results.jsonl').read_text().splitlines()
  rows = [json.loads(line) for line in lines]
  rows.sort(key=lambda row: train.all_runs().index(_run(row)))
  counts = collections.Counter(row['pair'] for row in rows)
  ranked = [row for row in rows if counts[row['pair']] >= MIN_RUNS]
  study = {
    'runs': len(rows),
    'ranked': len(ranked),
    'errors': errors(rows),
    'predictors': predict(ranked),
    'tightness': tightness(rows),
    'choice': choose(rows),
  }
  (FOLDER / 'study.json').write_text(json.dumps(study, indent=1) + '\n')
  draw(rows, study['predictors'])
  print(tables(study))


def _run(row) -> tuple[str, str, int]:
  return row['pair'], row['name'], row['seed']


def errors(rows) -> dict:
  """Returns mean and spread of the error, and terms, by configuration."""
  found = {}
  for row in rows:
    found.setdefault(f'{row["pair"]} {row["name"]}', []).append(row)

  def mean_of(rows, name):
    return float(np.mean([term(row, name) for row in rows]))

  return {
    key: {
      'n': len(rows),
      'error': mean_of(rows, 'student_error'),
      'std': float(np.std([*map(error, rows)], ddof=1)) if len(rows) > 1 else 0,
      'disagreement': mean_of(rows, 'disagreement'),
      'certified': 1 - float(np.mean([bound(r, 'label_margin') for r in rows]))
      if is_connected(rows[0])
      else None,
      'ijc_gap': mean_of(rows, 'ijc_gap') if is_connected(rows[0]) else None,
      'violated': sum(
        row['report']['terms']['ijc_gap']['lower'] > 0
        for row in rows
        if is_connected(row)
      ),
    }
    for key, rows in found.items()
  }


def tables(study) -> str:
  """Returns the study's tables in Markdown."""

  def percent(value):
    return '' if value is None else f'{100 * value:.2f}'

  parts = []
  cells = [['run', 'n', 'error %', '±', 'disagrees %', 'certified %', 'gap %']]
  for name, row in study['errors'].items():
    cells.append(
      [
        name,
        str(row['n']),
        *(
          percent(row[key])
          for key in ('error', 'std', 'disagreement', 'certified', 'ijc_gap')
        ),
      ]
    )
  parts.append(markdown.grid(cells))
  cells = [['predictor', 'labels', 'connected', '95%', 'all', 'lead', '95%']]
  for name, row in study['predictors'].items():
    connected = row['connected']
    lead = connected['lead'].get('disagreement')
    cells.append(
      [
        name,
        'yes' if row['labels'] else 'no',
        f'{connected["correlation"]:.2f}',
        '{:.2f} to {:.2f}'.format(*connected['interval']),
        f'{row["all"]["correlation"]:.2f}' if 'all' in row else '',
        f'{lead[0]:.2f}' if lead else '',
        '{:.2f} to {:.2f}'.format(*lead[1:]) if lead else '',
      ]
    )
  parts.append(markdown.grid(cells))
  cells = [['bound', 'runs', 'measured %', 'bound %', 'limit %', 'vacuous %']]
  for name, row in study['tightness'].items():
    cells.append(
      [
        name,
        str(row['runs']),
        *(percent(row[k]) for k in ('measured', 'bound', 'limit', 'vacuous')),
      ]
    )
  parts.append(markdown.grid(cells))
  cells = [['chosen by', 'regret, points', 'worst']]
  for name, row in study['choice']['rules'].items():
    cells.append([name, percent(row['regret']), percent(row['worst'])])
  parts.append(markdown.grid(cells))
  return '\n\n'.join(parts)


if __name__ == '__main__':
  main()
