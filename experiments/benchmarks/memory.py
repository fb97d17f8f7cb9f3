"""Peak memory of the host: the input of CIFAR, and a training step.

  python -m experiments.benchmarks.memory [--json FILE]

Each is a process of its own, whose largest resident set is read. See README.md.
"""

import argparse
import json
import pathlib
import resource
import subprocess
import sys

NUM_EXAMPLES, BATCH_SIZE, IMAGE_SHAPE = 50000, 64, (32, 32, 3)


def imports():
  """What the others have in memory before they begin."""
  from ijckd_jax.training import train  # noqa: F401


def make_arrays(num_examples):
  """Returns random images in the shape of CIFAR-100's."""
  import numpy as np

  from ijckd_jax.data import datasets

  rng = np.random.default_rng(0)
  images = rng.integers(0, 256, (num_examples, *IMAGE_SHAPE), np.uint8)
  return datasets.Arrays(images, np.arange(num_examples, dtype=np.int32) % 100)


def arrays():
  """The 50,000 images, which lie in memory."""
  imports()
  make_arrays(NUM_EXAMPLES)


def epoch():
  """An epoch of batches of them."""
  imports()
  from ijckd_jax.data import input_pipeline

  for _ in input_pipeline.train_batches(
    make_arrays(NUM_EXAMPLES),
    batch_size=BATCH_SIZE,
    seed=0,
    start_step=0,
    stop_step=NUM_EXAMPLES // BATCH_SIZE,
    rows=slice(0, BATCH_SIZE),
  ):
    pass


def step(num_steps=1):
  """One step of resnet32x4 -> resnet8x4 on a batch of 64, compiled first."""
  imports()
  from experiments.benchmarks import jax_step
  from experiments.benchmarks import pairs

  pair = pairs.PAIRS['resnet32x4']
  make, wait, _ = jax_step.make_step(jax_step.make_experiment(pair, {}), pair)
  for _ in range(num_steps):
    make()
  wait()


def steps_20():
  """Twenty such steps: a step leaves nothing behind."""
  step(20)


CASES = {
  case.__name__: case for case in (imports, arrays, epoch, step, steps_20)
}


def main(argv=None):
  parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
  parser.add_argument('--json', help='where to write the numbers')
  parser.add_argument('--case', choices=CASES, help='run one, in this process')
  flags = parser.parse_args(argv)
  if flags.case:
    CASES[flags.case]()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # KiB on Linux.
    print(peak * 1024)
    return
  peaks = {}
  print('| process | peak MB | beyond imports |\n| :- | -: | -: |')
  for name, case in CASES.items():
    result = subprocess.run(
      [sys.executable, '-m', 'experiments.benchmarks.memory', '--case', name],
      check=True,
      stdout=subprocess.PIPE,
      text=True,
    )
    peaks[name] = int(result.stdout)
    more = (peaks[name] - peaks['imports']) / 1e6
    print(
      f'| {case.__doc__.rstrip(".")} | {peaks[name] / 1e6:.0f} | {more:.0f} |',
      flush=True,
    )
  if flags.json:
    pathlib.Path(flags.json).write_text(json.dumps(peaks, indent=2) + '\n')


if __name__ == '__main__':
  main()
