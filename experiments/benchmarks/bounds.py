"""Time and memory of all bounds at ImageNet's size, with a joint head given.

python -m experiments.benchmarks.bounds
"""

import argparse
import json
import resource
import time

import numpy as np

from ijckd_jax.bounds import certify
from ijckd_jax.evaluation import pointwise


def main() -> None:
  """Measures once, and prints JSON."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--examples', type=int, default=50_000)
  parser.add_argument('--features', type=int, default=2048)
  parser.add_argument('--classes', type=int, default=1000)
  flags = parser.parse_args()
  rng = np.random.default_rng(0)
  shape = flags.examples, flags.features
  z_t = rng.standard_normal(shape, np.float32)
  z_s = rng.standard_normal(shape, np.float32)
  z_s *= 0.3
  z_s += z_t
  heads = [
    {
      'kernel': rng.standard_normal(
        (flags.features, flags.classes), np.float32
      ),
      'bias': rng.standard_normal(flags.classes, np.float32),
    }
    for _ in range(2)
  ]
  labels = rng.integers(flags.classes, size=flags.examples)
  start = time.perf_counter()
  rows = pointwise.compute(z_t, z_s, labels, **heads[0], joint=heads[1])
  computed = time.perf_counter()
  report = certify.report(rows, 0.05)
  end = time.perf_counter()
  peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
  print(
    json.dumps(
      {
        'examples': flags.examples,
        'seconds_rows': round(computed - start, 1),
        'seconds_report': round(end - computed, 1),
        'peak_gib': round(peak, 2),
        'features_gib': round(2 * z_t.nbytes / 2**30, 2),
        'claims': report['claims'],
      }
    )
  )


if __name__ == '__main__':
  main()
