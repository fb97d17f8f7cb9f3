"""Times the parts of a train step on a CPU, beside PyTorch's.

  pip install -e '.[test,parity]'
  taskset -c 0 python -m experiments.benchmarks.cpu_parts --json FILE \
    [--python PATH ...]

The teacher's forward pass, the student's, and the student's with its gradient:
of this package with its own convolutions and with XLA's, both with and without
oneDNN's (FLAG), and of PyTorch. Each candidate is a process of its own, with as
many threads as it may use cores, and windows take turns. `--python` names
further interpreters, with another JAX. See README.md.
"""

import argparse
import json
import os
import pathlib
import statistics
import sys

from experiments.benchmarks import machine
from experiments.benchmarks import pairs
from experiments.benchmarks import torch_step
from experiments.benchmarks import worker
from ijckd_jax.runtime import markdown

JAX = 'experiments.benchmarks.jax_step'
TORCH = 'experiments.benchmarks.torch_step'
FLAG = '--xla_cpu_experimental_onednn_custom_call=true'
PARTS = ('teacher', 'student', 'gradient')
PRODUCT = 'product'
EAGER = 'PyTorch, eager'


def start(
  name: str, pythons: list[str], only: list[str]
) -> dict[str, worker.Worker]:
  """Returns the candidates' processes, each once it is ready."""
  candidates = {
    f'PyTorch, {title}': (
      sys.executable,
      '',
      (TORCH, name, mode, str(machine.num_cores()), '--parts'),
    )
    for title, mode in (('eager', 'eager'), ('compiled', 'compile'))
  }
  for python in pythons:
    jax_version = machine.version(python, 'jax')
    for title, kind in (('ours', 'fast'), ("XLA's", 'xla')):
      for more, flags in (('', ''), (', oneDNN', FLAG)):
        candidates[f'jax {jax_version}, {title}{more}'] = (
          python,
          flags,
          (JAX, name, '1', kind, '--parts'),
        )
  if only:
    candidates = {
      title: candidate
      for title, candidate in candidates.items()
      if title == EAGER or any(part in title for part in only)
    }
  workers = {}
  for title, (python, flags, arguments) in candidates.items():
    env = {**os.environ, 'JAX_PLATFORMS': 'cpu', 'XLA_FLAGS': flags}
    workers[title] = worker.Worker(*arguments, env=env, python=python)
    workers[title].wait_until_ready()
    print(f'{title}: ready', file=sys.stderr, flush=True)
  return workers


def run(
  name: str, pythons: list[str], only: list[str], rounds: int, seconds: float
) -> dict:
  """Returns what was measured of a pair.

  Args:
    name: of pairs.PAIRS.
    pythons: interpreters with this package.
    only: parts of the titles of the candidates that are wanted, beside EAGER;
      empty: all are.
    rounds: windows of each part of each candidate.
    seconds: of a window.
  """
  workers = start(name, pythons, only)
  kinds = {title: PARTS for title in workers}
  kinds[EAGER] += (PRODUCT,)
  cases = [(title, kind) for title in workers for kind in kinds[title]]
  counts = {
    (title, kind): max(1, round(seconds / workers[title].seconds(1, kind)))
    for title, kind in cases
  }
  windows = {case: [] for case in cases}
  for _ in range(rounds):
    for title, kind in cases:
      count = counts[title, kind]
      taken = workers[title].seconds(count, kind) / count
      windows[title, kind].append(1e3 * taken)
  ours = next(title for title in workers if title.startswith('jax'))
  pair = pairs.PAIRS[name]
  flops = workers[ours].facts()
  for one in workers.values():
    one.close()
  product = statistics.median(windows.pop((EAGER, PRODUCT)))
  return {
    'pair': str(pair),
    'gflop': {k: 1e-9 * pair.batch_size * x for k, x in flops.items()},
    'product_gflop_per_second': 2e-6 * torch_step.PRODUCT_SIDE**3 / product,
    'milliseconds': {
      title: {kind: statistics.median(windows[title, kind]) for kind in PARTS}
      for title in workers
    },
    'slowest_by_fastest_window': {
      title: {
        kind: max(windows[title, kind]) / min(windows[title, kind])
        for kind in PARTS
      }
      for title in workers
    },
  }


def table(result: dict) -> str:
  """Returns the table of a pair: milliseconds, and the best PyTorch over it."""
  times = result['milliseconds']
  best = {
    kind: min(row[kind] for title, row in times.items() if 'PyTorch' in title)
    for kind in PARTS
  }
  rate = 1e-3 * result['product_gflop_per_second']
  rows = [
    [result['pair'], *PARTS, *(f'{kind}, ratio' for kind in PARTS)],
    [
      'floor, at the rate of a product',
      *(f'{result["gflop"][kind] / rate:.1f}' for kind in PARTS),
      *(len(PARTS) * ['']),
    ],
  ]
  for title, row in times.items():
    rows.append(
      [
        title,
        *(f'{row[kind]:.1f}' for kind in PARTS),
        *(f'{best[kind] / row[kind]:.2f}' for kind in PARTS),
      ]
    )
  return markdown.grid(rows)


def main(argv=None):
  """Prints tables and writes the numbers."""
  parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
  parser.add_argument('--pairs', default='resnet20,resnet32x4,mobile')
  parser.add_argument(
    '--python', action='append', default=[], help='a further interpreter'
  )
  parser.add_argument(
    '--only', nargs='*', default=[], help="parts of the candidates' titles"
  )
  parser.add_argument('--rounds', type=int, default=5)
  parser.add_argument('--seconds', type=float, default=1.0, help='of a window')
  parser.add_argument('--json', type=pathlib.Path)
  args = parser.parse_args(argv)
  results, processor = [], machine.processor()
  for name in args.pairs.split(','):
    pythons = [sys.executable, *args.python]
    results.append(run(name, pythons, args.only, args.rounds, args.seconds))
    if args.json:
      content = {
        'machine': processor,
        'torch': machine.version(sys.executable, 'torch'),
        'results': results,
      }
      args.json.write_text(json.dumps(content, indent=2) + '\n')
    product = results[-1]['product_gflop_per_second']
    print(f'{processor}; a product: {product:.0f} GFLOP/s\n')
    print(f'{table(results[-1])}\n', flush=True)


if __name__ == '__main__':
  main()
