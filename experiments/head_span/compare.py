"""Does IJCKD's feature loss need what the teacher's head cannot see?

  python -m experiments.shift_study.train WORKDIR
  python -m experiments.head_span.compare WORKDIR

Makes the students that are not made yet, writes results.json, and prints the
table. Teacher, images and recipe are those of experiments/shift_study.
"""

import argparse
import json
import logging
import pathlib

import numpy as np

from experiments.head_span import method
from experiments.shift_study import train
from ijckd_jax.reports import sweep_table
from ijckd_jax.runtime import markdown
from ijckd_jax.training import sweep

# Its features have 64 dimensions; a head of ten classes depends on nine.
TEACHER = 'wrn_16_1'
SEEDS = (0, 1, 2)
RESULTS = pathlib.Path(__file__).parent / 'results.json'
IN_SPAN = 'experiments.head_span.method:Method'
# The method of each variant, and its feature weight as a function of D and of
# the number of dimensions in the span.
VARIANTS = {
  'whole features': ('ijckd', lambda d, size: 1.0),
  'in the span': (IN_SPAN, lambda d, size: 1.0),
  'in the span, mean over it': (IN_SPAN, lambda d, size: d / size),
  'no feature loss': ('ijckd', lambda d, size: 0.0),
}


def configs(work: pathlib.Path) -> dict:
  """Returns the config of each run by variant and seed."""
  folder = str((work / TEACHER / 'teacher').resolve())
  features, size = method.span(folder).shape
  found = {}
  for name, (objective, weight) in VARIANTS.items():
    for seed in SEEDS:
      config = train.config_of(train.STUDENT, objective)
      config.seed = seed
      config.teacher.backbone = TEACHER
      config.teacher.checkpoint = folder
      config.teacher.store.views = 1
      config.method.feature_weight = weight(features, size)
      if objective == IN_SPAN:
        config.method.teacher_bundle = folder
      found[name, seed] = config
  return found


def folder_of(name: str, seed: int) -> str:
  """Returns what the run is called in the sweep."""
  return f'{name}-{seed}'.replace(' ', '_')


def table(top1: dict[str, list[float]]) -> str:
  """Returns a Markdown table of top-1, and of differences to whole features."""
  whole = np.array(top1['whole features'])
  cells = [['feature loss', 'n', 'top-1 %', 'to whole features']]
  for name in VARIANTS:
    values = np.array(top1[name])
    off = values - whole
    difference = f'{off.mean():+.2f} ± {sweep_table.half_width(off):.2f}'
    cells.append(
      [
        name,
        str(len(values)),
        f'{values.mean():.2f} ± {values.std(ddof=1):.2f}',
        difference if off.any() else '',
      ]
    )
  return markdown.grid(cells)


def main() -> None:
  """Trains what is not trained yet, and compares."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('work', type=pathlib.Path)
  flags = parser.parse_args()
  logging.basicConfig(level=logging.INFO, format='%(message)s')
  runs = configs(flags.work)
  outcome = sweep.run(
    {folder_of(*key): config for key, config in runs.items()},
    flags.work / 'head_span',
  )
  top1 = {}
  for name, seed in runs:
    summary = outcome.summaries[folder_of(name, seed)]
    values = top1.setdefault(name, [])
    values.append(100 * summary['student']['last']['top1'])
  RESULTS.write_text(json.dumps(top1, indent=1) + '\n')
  print(table(top1))


if __name__ == '__main__':
  main()
