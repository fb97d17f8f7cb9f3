"""Gathers the runs of run.sh into WORKDIR/results.json and a table.

python experiments/cheaper_steps/collect.py WORKDIR
"""

import json
import pathlib
import sys

import numpy as np

from ijckd_jax.runtime import markdown

ARMS = {
  'views1': '1 stored view',
  'views4': '4 stored views',
  'views16': '16 stored views',
  'live': 'live teacher, float32',
  'bfloat16': 'live teacher, bfloat16',
}
FIELDS = ('top1', 'nll', 'agreement')


def read(workdir):
  """Returns the teacher's results, and each arm's by seed."""
  results = {'teacher': None, 'arms': {}}
  for path in sorted(workdir.glob('*_[0-9]*/summary.json')):
    arm, _, seed = path.parent.name.rpartition('_')
    summary = json.loads(path.read_text())
    results['teacher'] = summary['teacher']
    results['arms'].setdefault(arm, {})[seed] = {
      **{key: summary['student']['last'][key] for key in FIELDS},
      'steps': summary['steps'],
      'versions': summary['versions'],
    }
  return results


def table(results):
  """Returns the arms as a Markdown table."""
  rows = [('', 'top-1 %, last', 'less than live', 'agreement %', 'seeds')]
  live = results['arms'].get('live', {})
  for arm, name in ARMS.items():
    runs = results['arms'].get(arm, {})
    # By seed: what the seeds share does not count as noise.
    paired = [
      live[seed]['top1'] - run['top1']
      for seed, run in runs.items()
      if seed in live and arm != 'live'
    ]
    rows.append(
      (
        name,
        _spread([run['top1'] for run in runs.values()]),
        _spread(paired),
        _spread([run['agreement'] for run in runs.values()]),
        str(len(runs)),
      )
    )
  return markdown.grid(rows)


def _spread(values):
  """Returns mean and standard deviation of fractions, in percent."""
  if not values:
    return ''
  mean = f'{100 * np.mean(values):.2f}'
  if len(values) == 1:
    return mean
  return f'{mean} ± {100 * np.std(values, ddof=1):.2f}'


def main(workdir):
  """Writes results.json and table.md, and prints the table."""
  folder = pathlib.Path(workdir)
  results = read(folder)
  if not results['arms']:
    sys.exit(f'{workdir} holds no finished runs of run.sh')
  (folder / 'results.json').write_text(json.dumps(results, indent=1) + '\n')
  (folder / 'table.md').write_text(table(results) + '\n')
  print(f'teacher: {100 * results["teacher"]["top1"]:.2f}')
  print(table(results))


if __name__ == '__main__':
  main(sys.argv[1])
