"""What teacher and student cost when they predict, in four runtimes.

  pip install -e '.[test,parity]'
  python -m experiments.benchmarks.inference --json FILE

Of each pair the teacher, the student with its connector, and the student alone:
parameters, the ONNX file's bytes, multiply-adds, milliseconds for one image and
images per second for 64. Each candidate is a process of its own; windows of a
pair's teacher take turns, and then those of its students, so that whatever else
the machine does meets all of them alike. Of ResNet50 -> MobileNetV1 they took
14 GB.
"""

import argparse
import itertools
import json
import os
import pathlib
import platform
import statistics
import sys

import jax
import jax.numpy as jnp

from experiments.benchmarks import classifiers
from experiments.benchmarks import inference_step
from experiments.benchmarks import worker
from ijckd_jax.bundles import bundles
from ijckd_jax.deploy import deployed as deployed_lib
from ijckd_jax.deploy import onnx_files
from ijckd_jax.evaluation import cost
from ijckd_jax.runtime import markdown

STEP = 'experiments.benchmarks.inference_step'


def candidates(case: classifiers.Case) -> list[list[tuple[str, str]]]:
  """Returns (classifier, runtime) of those that take turns."""
  official, *others = (':'.join(map(str, x)) for x in case.connectors)
  teachers, students = (
    [(which, x) for which in whose for x in inference_step.RUNTIMES]
    for whose in (('teacher',), (official, 'alone'))
  )
  return [teachers, [*students, *((x, 'onnxruntime') for x in others)]]


def start(
  name: str, keys: list[tuple[str, str]]
) -> dict[tuple[str, str], worker.Worker]:
  """Returns the processes of candidates of a case, each once it is ready."""
  cores = str(os.cpu_count())
  workers, env = {}, {**os.environ, 'JAX_PLATFORMS': 'cpu'}
  for which, runtime in keys:
    one = worker.Worker(STEP, name, which, runtime, cores, env=env)
    one.wait_until_ready()
    one.pause()
    workers[which, runtime] = one
  return workers


def measure(workers, rounds: int, seconds: float) -> dict:
  """Returns the seconds of a batch of each size, by candidate and window."""
  times = {}
  for round_ in range(-1, rounds):
    for key, one in workers.items():
      one.go()
      for size in map(str, classifiers.BATCH_SIZES):
        taken = times.setdefault((key, size), [])
        if round_ < 0:  # How many make a window.
          taken.append(one.seconds(1, size))
          continue
        count = max(1, round(seconds / min(taken)))
        taken.append(one.seconds(count, size) / count)
      one.pause()
  return {key: taken[1:] for key, taken in times.items()}


def describe(case: classifiers.Case, which: str) -> dict:
  """Returns what a classifier costs that need not be timed."""
  bundle = case.bundle(which)
  deployed = deployed_lib.deploy(bundle)
  image = jax.ShapeDtypeStruct((1, *case.image_shape), jnp.uint8)
  return {
    'parameters': bundles.num_params(bundle.variables),
    'file_bytes': len(onnx_files.encode(deployed)),
    'multiply_adds': cost.multiply_adds(
      deployed.logits, dict(deployed.arrays), image
    ),
  }


def run(name: str, rounds: int, seconds: float) -> dict:
  """Returns what was found of a pair."""
  case = classifiers.CASES[name]
  windows = {}
  for keys in candidates(case):
    workers = start(name, keys)
    print(f'{case}: timing', file=sys.stderr, flush=True)
    windows |= measure(workers, rounds, seconds)
    for one in workers.values():
      one.go()
      one.close()
  found = {}
  for which, runtime in itertools.chain(*candidates(case)):
    about = found.setdefault(which, {'runtimes': {}})
    about['runtimes'][runtime] = {
      size: {
        'seconds': statistics.median(windows[(which, runtime), size]),
        'slowest_by_fastest': max(windows[(which, runtime), size])
        / min(windows[(which, runtime), size]),
      }
      for size in map(str, classifiers.BATCH_SIZES)
    }
  for which, about in found.items():
    about |= describe(case, which)
  return {'pair': str(case), 'classifiers': found}


def ratio(found: dict, which: str, size: str) -> float:
  """Returns PyTorch's best time over onnxruntime's: above 1, it is slower."""
  times = {
    runtime: of[size]['seconds']
    for runtime, of in found['classifiers'][which]['runtimes'].items()
  }
  theirs = min(x for runtime, x in times.items() if 'PyTorch' in runtime)
  return theirs / times['onnxruntime']


def costs(results: list[dict]) -> str:
  """Returns what need not be timed, as a Markdown table."""
  cells = [['', 'parameters', 'connector', 'ONNX file, KB', 'multiply-adds, M']]
  for result in results:
    for which, about in result['classifiers'].items():
      parts = about['parameters']
      total = sum(parts.values())
      share = parts['connector'] / total
      cells.append(
        [
          f'{result["pair"]}: {which}',
          f'{total:,}',
          f'{share:.0%}' if share else '',
          f'{about["file_bytes"] / 1000:,.0f}',
          f'{about["multiply_adds"] / 1e6:,.1f}',
        ]
      )
  return markdown.grid(cells)


def times(results: list[dict], size: int) -> str:
  """Returns milliseconds of a batch of a size, as a Markdown table."""
  runtimes = list(inference_step.RUNTIMES)
  cells = [['', *runtimes, 'PyTorch / onnxruntime']]
  for result in results:
    for which, about in result['classifiers'].items():
      of, row = about['runtimes'], [f'{result["pair"]}: {which}']
      for runtime in runtimes:
        found = of.get(runtime)
        seconds = found and found[str(size)]['seconds']
        row.append(f'{1e3 * seconds:,.2f}' if found else '')
      both = {'PyTorch', 'onnxruntime'} <= of.keys()
      row.append(f'{ratio(result, which, str(size)):.2f}' if both else '')
      cells.append(row)
  return markdown.grid(cells)


def main():
  """Prints a table and writes the numbers."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--cases', default=','.join(classifiers.CASES))
  parser.add_argument('--rounds', type=int, default=5)
  parser.add_argument('--seconds', type=float, default=0.5, help='of a window')
  parser.add_argument('--json', type=pathlib.Path)
  args = parser.parse_args()
  results, machine = [], f'{platform.machine()}, {os.cpu_count()} cores'
  for name in args.cases.split(','):
    results.append(run(name, args.rounds, args.seconds))
    if args.json:
      content = {'machine': machine, 'results': results}
      args.json.write_text(json.dumps(content, indent=2) + '\n')
  print(costs(results))
  for size in classifiers.BATCH_SIZES:
    print(f'\nMilliseconds for a batch of {size}:\n\n{times(results, size)}')


if __name__ == '__main__':
  main()
