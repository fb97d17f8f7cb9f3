"""How often each confidence limit holds, by simulation.

python -m experiments.bound_study.coverage
"""

import numpy as np
from scipy import stats

from ijckd_jax.bounds import limits
from ijckd_jax.bounds import shift
from ijckd_jax.runtime import markdown

DRAWS = 10_000
DELTA = 0.05
# Values on a scale of 4, as D3's, and how often each comes.
WORLDS = {
  'skewed': (0.7, 0.2, 0.1, 0, 0),
  'rare': (0.98, 0, 0, 0, 0.02),
  'even': (0.2,) * 5,
}


def clopper_pearson(p: float, num: int) -> float:
  """Returns how often the upper limit holds, exactly."""
  counts = np.arange(num + 1)
  upper = [limits.clopper_pearson_upper(int(k), num, DELTA) for k in counts]
  return float(stats.binom.pmf(counts, num, p)[np.array(upper) >= p].sum())


def means(world, num: int) -> float:
  """Returns how often the upper limit of a mean holds."""
  rng = np.random.default_rng(0)
  samples = rng.choice(5, p=world, size=(DRAWS, num))
  truth = np.dot(world, np.arange(5)) - 1e-12
  upper = [4 * limits.betting_upper(sample / 4, DELTA) for sample in samples]
  return float((np.array(upper) >= truth).mean())


def label_free(num: int) -> float:
  """Returns how often the limit without labels holds."""
  rng = np.random.default_rng(1)
  # Right: both, the teacher alone, the student alone, none (and they differ).
  old, new = (
    rng.choice(4, p=(0.7, 0.1, 0.05, 0.15), size=(DRAWS, num)) for _ in '12'
  )
  wrong, differ = np.isin(old, (2, 3)).sum(axis=1), (new > 0).sum(axis=1)
  return float(
    np.mean(
      [
        sum(
          limits.clopper_pearson_upper(int(count), num, DELTA / 2)
          for count in (w, d)
        )
        >= 0.25
        for w, d in zip(wrong, differ, strict=True)
      ]
    )
  )


def dis2(num: int) -> float:
  """Returns how often Dis^2 holds where the critic is the true labelling."""
  rng = np.random.default_rng(2)
  source, target = (
    rng.random((DRAWS, num)) < 0.1,
    rng.random((DRAWS, num)) < 0.3,
  )
  return float(
    np.mean(
      [
        shift.dis2(s, s, t, DELTA)['upper'] >= 0.3
        for s, t in zip(source, target, strict=True)
      ]
    )
  )


def main() -> None:
  """Prints the table."""
  cells = [['limit', 'world', 'n = 30', 'n = 300']]
  sizes = (30, 300)
  for p in (0.02, 0.25):
    held = [clopper_pearson(p, num) for num in sizes]
    cells.append(['Clopper-Pearson', f'p = {p}, exact', *held])
  for name, world in WORLDS.items():
    cells.append(['betting', name, *(means(world, num) for num in sizes)])
  cells.append(['without labels', '', *map(label_free, sizes)])
  cells.append(['Dis²', 'the critic is the truth', *map(dis2, sizes)])
  for row in cells[1:]:
    row[2:] = [f'{100 * held:.2f}' for held in row[2:]]
  print(f'Share of {DRAWS:,} samples in which the limit holds, %;')
  print(f'nominal {100 * (1 - DELTA):.0f}\n')
  print(markdown.grid(cells))


if __name__ == '__main__':
  main()
