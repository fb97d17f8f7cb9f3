"""Measures the bound of every run that train.py left.

  python -m experiments.bound_study.measure WORKDIR

Each line of results.jsonl is one run; run again, it goes on where it was
stopped. With `--worker 0 --workers 2`, and `--worker 1 --workers 2` beside it,
two of them share the runs.
"""

import argparse
import json
import pathlib

from experiments.bound_study import train
from ijckd_jax.bounds import measure
from ijckd_jax.bounds import pairs
from ijckd_jax.bundles import bundles
from ijckd_jax.data.datasets import fashion_pairs
from ijckd_jax.runtime import compilation_cache
from ijckd_jax.runtime import parallel
from ijckd_jax.runtime import workdirs

RESULTS = pathlib.Path(__file__).parent / 'results.jsonl'
FIT_EXAMPLES = 2500
DELTA = 0.05


def measure_run(work, pair: str, name: str, seed: int, splits) -> dict:
  """Returns the report of a run."""
  teacher_name, _, _ = train.PAIRS[pair]
  teacher = bundles.load(train.teacher_dir(work, teacher_name)).teacher()
  folder = train.run_dir(work, pair, name, seed)
  student = bundles.load(folder)
  connected = student
  if student.network.connector is None:
    connected = None
    if (folder / workdirs.CONNECTED).exists():
      connected = bundles.load(folder / workdirs.CONNECTED)
  measured = measure.measure(
    pairs.Pair(teacher, student.network, connected and connected.network),
    {
      'teacher': teacher.arrays,
      'student': student.variables,
      'connected': connected and connected.variables,
    },
    splits,
    trained=[splits['train']],
    mapper=parallel.Mapper(),
    batch_size=250,
    delta=DELTA,
    fit_examples=FIT_EXAMPLES,
    seed=seed,
  )
  rows = measured.rows
  means = {
    'kl': float(rows.kl.mean()),
    'total_variation': float(rows.total_variation.mean()),
    'logit_square': float((rows.logit_distance**2).mean()),
  }
  if rows.feature_distance is not None:
    means['feature_square'] = float((rows.feature_distance**2).mean())
  return {
    'pair': pair,
    'name': name,
    'seed': seed,
    'means': means,
    'report': measured.report,
  }


def main() -> None:
  """Measures what is trained and not measured yet."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('work', type=pathlib.Path)
  parser.add_argument('--worker', type=int, default=0)
  parser.add_argument('--workers', type=int, default=1)
  flags = parser.parse_args()
  compilation_cache.enable(compilation_cache.DEFAULT)
  done = set()
  if RESULTS.exists():
    rows = map(json.loads, RESULTS.read_text().splitlines())
    done = {(row['pair'], row['name'], row['seed']) for row in rows}
  data = fashion_pairs.Dataset(num_train=5_000, resolution='half')
  splits = {split: data.load(split) for split in ('train', 'test')}
  runs = train.all_runs()
  for run in runs[flags.worker :: flags.workers]:
    folder = train.run_dir(flags.work, *run)
    if run in done or not workdirs.is_finished(folder):
      continue
    row = measure_run(flags.work, *run, splits)
    with RESULTS.open('a') as stream:
      stream.write(json.dumps(row) + '\n')
    print(*run, f'{row["report"]["terms"]["student_error"]["value"]:.4f}')


if __name__ == '__main__':
  main()
