"""Collects what study.sh left.

python -m experiments.converted.collect WORKDIR
"""

import json
import pathlib
import statistics
import sys

RUNS = ('alone', 'fitted', 'pooled')
SEEDS = (0, 1, 2)


def main(work: str) -> None:
  """Writes study.json beside this file, and prints a table."""
  folder = pathlib.Path(work)
  found = {
    name: [
      json.loads((folder / f'{name}_{seed}' / 'summary.json').read_text())
      for seed in SEEDS
    ]
    for name in RUNS
  }
  rows = {
    name: [100 * s['student']['last']['top1'] for s in summaries]
    for name, summaries in found.items()
  }
  teacher = found['fitted'][0]
  result = {
    'top1_last': rows,
    'teacher_top1': [100 * s['teacher']['top1'] for s in found['fitted']],
    'agreement': {
      name: [100 * s['student']['last']['agreement'] for s in found[name]]
      for name in RUNS[1:]
    },
    'heads': [s['heads'] for s in found['fitted']],
    'parameters': teacher['parameters'],
    'versions': teacher['versions'],
  }
  path = pathlib.Path(__file__).with_name('study.json')
  path.write_text(json.dumps(result, indent=1) + '\n')
  for name, values in rows.items():
    mean, std = statistics.mean(values), statistics.stdev(values)
    by_seed = [
      value - alone for value, alone in zip(values, rows['alone'], strict=True)
    ]
    gain = statistics.mean(by_seed)
    spread = statistics.stdev(by_seed)
    print(
      f'{name}: {mean:.2f} +- {std:.2f}; to alone, by seed: {gain:+.2f} +- '
      f'{spread:.2f}'
    )


if __name__ == '__main__':
  main(sys.argv[1])
