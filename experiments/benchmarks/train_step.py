"""Times this package's train step against the same step in PyTorch.

  pip install -e '.[test,parity]'
  python -m experiments.benchmarks.train_step --json FILE [--python PATH ...]

Each candidate is a process of its own; windows of some seconds take turns, so
that whatever else the machine does meets all of them alike. `--python` names
further interpreters, with another JAX. See README.md.
"""

import argparse
import json
import os
import pathlib
import re
import statistics
import sys

from experiments.benchmarks import cpu_parts
from experiments.benchmarks import machine
from experiments.benchmarks import pairs
from experiments.benchmarks import worker
from ijckd_jax.runtime import markdown

JAX = 'experiments.benchmarks.jax_step'
TORCH = 'experiments.benchmarks.torch_step'


def start(
  name: str, pythons: list[str], only: list[str]
) -> dict[str, worker.Worker]:
  """Returns the candidates' processes, one by one, each once it is ready.

  Args:
    name: of pairs.PAIRS.
    pythons: interpreters with this package.
    only: regular expressions; a candidate is started if one of them is found
      in its title. Empty: all are started.
  """
  cores = str(machine.num_cores())
  candidates = {
    f'PyTorch, {title}': (sys.executable, '', (TORCH, name, mode, cores))
    for title, mode in (('eager', 'eager'), ('compiled', 'compile'))
  }
  for python in pythons:
    jax_version = f'jax {machine.version(python, "jax")}'
    for title, flags, arguments in (
      ("XLA's convolutions", '', ('1', 'xla')),
      ('ours', '', ('1', 'fast')),
      (f'ours, {cores} devices', '', (cores, 'fast')),
      ('ours, oneDNN', cpu_parts.FLAG, ('1', 'fast')),
      (f'ours, oneDNN, {cores} devices', cpu_parts.FLAG, (cores, 'fast')),
      ('ours, teacher stored', '', (cores, 'stored')),
    ):
      candidates[f'{jax_version}, {title}'] = (
        python,
        flags,
        (JAX, name, *arguments),
      )
  workers = {}
  for title, (python, flags, arguments) in candidates.items():
    if only and not any(re.search(part, title) for part in only):
      continue
    env = {**os.environ, 'JAX_PLATFORMS': 'cpu', 'XLA_FLAGS': flags}
    workers[title] = worker.Worker(*arguments, env=env, python=python)
    workers[title].wait_until_ready()
    print(f'{title}: ready', file=sys.stderr, flush=True)
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


def run(
  name: str, pythons: list[str], only: list[str], rounds: int, seconds: float
) -> dict:
  """Returns what was measured of a pair; see `start` for the arguments."""
  pair = pairs.PAIRS[name]
  workers = start(name, pythons, only)
  print(f'{pair}: timing', file=sys.stderr, flush=True)
  times = measure(workers, rounds, seconds)
  print(f'{pair}: timed', file=sys.stderr, flush=True)
  for one in workers.values():
    one.close()
  return {
    'pair': str(pair),
    'images_per_second': {
      key: pair.batch_size / statistics.median(values)
      for key, values in times.items()
    },
    'slowest_by_fastest_window': {
      key: max(values) / min(values) for key, values in times.items()
    },
  }


def table(results: list[dict]) -> str:
  """Returns images per second, and in brackets the ratio to PyTorch's best."""
  rows = [['', *(result['pair'] for result in results)]]
  for title in results[0]['images_per_second']:
    row = [title]
    for result in results:
      speed = result['images_per_second']
      best = max(speed[key] for key in speed if 'PyTorch' in key)
      row.append(f'{speed[title]:.1f} ({speed[title] / best:.2f})')
    rows.append(row)
  return markdown.grid(rows)


def main():
  """Prints a table and writes the numbers."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--pairs', default=','.join(pairs.PAIRS))
  parser.add_argument('--rounds', type=int, default=7)
  parser.add_argument('--seconds', type=float, default=2.0, help='of a window')
  parser.add_argument('--python', nargs='*', default=[])
  parser.add_argument(
    '--only', nargs='*', default=[], help='patterns of titles of candidates'
  )
  parser.add_argument('--json', type=pathlib.Path)
  args = parser.parse_args()
  pythons = [sys.executable, *args.python]
  results = []
  for name in args.pairs.split(','):
    results.append(run(name, pythons, args.only, args.rounds, args.seconds))
    if args.json:
      content = {
        'processor': machine.processor(),
        'torch': machine.version(sys.executable, 'torch'),
        'results': results,
      }
      args.json.write_text(json.dumps(content, indent=2) + '\n')
  print(table(results))


if __name__ == '__main__':
  main()
