"""Times this package's train step against the same step in PyTorch.

  pip install -e '.[test,parity]'
  python -m experiments.benchmarks.train_step --json FILE

Each candidate is a process of its own; windows of some seconds take turns, so
that whatever else the machine does meets all of them alike. See README.md.
"""

import argparse
import json
import os
import pathlib
import platform
import statistics
import sys

from experiments.benchmarks import pairs
from experiments.benchmarks import worker
from ijckd_jax.runtime import markdown

JAX = 'experiments.benchmarks.jax_step'
TORCH = 'experiments.benchmarks.torch_step'
STORED = 'ours, teacher stored'


def start(candidates: dict[str, tuple[str, ...]]) -> dict[str, worker.Worker]:
  """Returns the candidates' processes, one by one, each once it is ready."""
  workers = {}
  for name, arguments in candidates.items():
    workers[name] = worker.Worker(
      *arguments, env={**os.environ, 'JAX_PLATFORMS': 'cpu'}
    )
    workers[name].wait_until_ready()
  return workers


def measure(
  workers: dict[str, worker.Worker], rounds: int, seconds: float
) -> dict[str, list[float]]:
  """Returns the seconds of a step in each of the windows, which take turns."""
  num_steps = {
    name: max(1, round(seconds / one.seconds(1)))
    for name, one in workers.items()
  }
  times = {name: [] for name in workers}
  for _ in range(rounds):
    for name, one in workers.items():
      times[name].append(one.seconds(num_steps[name]) / num_steps[name])
  return times


def run(name: str, rounds: int, seconds: float) -> dict:
  """Returns what was measured of a pair."""
  pair, cores = pairs.PAIRS[name], str(os.cpu_count())
  workers = start(
    {
      'PyTorch, eager': (TORCH, name, 'eager', cores),
      'PyTorch, compiled': (TORCH, name, 'compile', cores),
      "ours, XLA's convolutions": (JAX, name, cores, 'xla'),
      'ours, 1 device': (JAX, name, '1', 'fast'),
      f'ours, {cores} devices': (JAX, name, cores, 'fast'),
      STORED: (JAX, name, cores, 'stored'),
    }
  )
  print(f'{pair}: timing', file=sys.stderr, flush=True)
  times = measure(workers, rounds, seconds)
  print(f'{pair}: timed', file=sys.stderr, flush=True)
  for one in workers.values():
    one.close()
  speed = {
    key: pair.batch_size / statistics.median(values)
    for key, values in times.items()
  }
  theirs = max(value for key, value in speed.items() if 'PyTorch' in key)
  ours = max(value for key, value in speed.items() if 'device' in key)
  return {
    'pair': str(pair),
    'images_per_second': speed,
    'slowest_by_fastest_window': {
      key: max(values) / min(values) for key, values in times.items()
    },
    'ratio': ours / theirs,
    'ratio_stored': speed[STORED] / theirs,
  }


def main():
  """Prints a table and writes the numbers."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--pairs', default=','.join(pairs.PAIRS))
  parser.add_argument('--rounds', type=int, default=7)
  parser.add_argument('--seconds', type=float, default=2.0, help='of a window')
  parser.add_argument('--json', type=pathlib.Path)
  args = parser.parse_args()
  results, machine = [], f'{platform.machine()}, {os.cpu_count()} cores'
  for name in args.pairs.split(','):
    results.append(run(name, args.rounds, args.seconds))
    if args.json:
      content = {'machine': machine, 'results': results}
      args.json.write_text(json.dumps(content, indent=2) + '\n')
  columns = list(results[0]['images_per_second'])
  rows = [
    [
      result['pair'],
      *(f'{result["images_per_second"][column]:.1f}' for column in columns),
      f'{result["ratio"]:.2f}',
      f'{result["ratio_stored"]:.2f}',
    ]
    for result in results
  ]
  titles = ['pair', *columns, 'ratio', 'ratio, stored']
  print(markdown.grid([titles, *rows]))
  ratios = [result['ratio'] for result in results]
  print(
    f'\ngeometric mean of the ratios: {statistics.geometric_mean(ratios):.2f}'
  )


if __name__ == '__main__':
  main()
