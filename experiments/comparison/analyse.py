"""Tables and pictures of the runs that were made.

Missing cells stay empty. Intervals are of Student's t over seeds: of a mean
difference of runs that share the seed, so the student's start and its batches,
and the kind of machine. Of runs that were repeated on another kind, the first
counts; the others are what that machine's runs are compared with.
"""

import collections
import json
import math
import pathlib
import textwrap

from matplotlib import figure
import numpy as np
from scipy import stats

from experiments.comparison import grid
from ijckd_jax.reports import sweep_table

# Written down in plan.md before any run.
PRIMARY = (('ijckd', 'srrl'), ('ijckd', 'simkd'), ('ijckd', 'control'))
BASELINES = ('ce', 'control', 'srrl')
# In the picture of accuracy against parameters; the others would cover these.
DRAWN = {'methods', 'pairs', 'connectors', 'others'}
TITLES = {
  'methods': 'Methods',
  'losses': "IJCKD's losses",
  'heads': 'Heads',
  'pairs': 'Other pairs',
  'connectors': 'Connectors',
  'others': 'Other methods',
  'augmentation': 'Strong augmentation',
}


def read(path: pathlib.Path) -> list[dict]:
  """Returns the lines of a results file; none where there is no file."""
  if not path.exists():
    return []
  return [json.loads(line) for line in path.read_text().splitlines()]


def counted(rows, pair: str, name: str) -> list[dict]:
  """Returns a cell's runs, one of each seed: of repeated ones the first."""
  found = {}
  for row in rows:
    if (row['pair'], row['name']) == (pair, name):
      found.setdefault(row['seed'], row)
  return [found[seed] for seed in sorted(found)]


def scores(rows, pair: str, name: str, which='last') -> list[float]:
  """Returns a cell's accuracies in per cent, one of each seed."""
  return [100 * row[which]['top1'] for row in counted(rows, pair, name)]


def interval(values) -> tuple[float, float]:
  """Returns the mean and the half-width of its 95% interval, or NaN."""
  values = np.asarray(values, float)
  if len(values) < 2:
    return float(np.mean(values)), math.nan
  return float(np.mean(values)), sweep_table.half_width(values)


def differences(rows, pair: str, name: str, other: str) -> list[float]:
  """Returns the differences of runs of one seed and machine, in points."""
  theirs = {
    (row['seed'], *row['devices']): row
    for row in rows
    if (row['pair'], row['name']) == (pair, other)
  }
  return [
    100 * (row['last']['top1'] - theirs[key]['last']['top1'])
    for row in counted(rows, pair, name)
    if (key := (row['seed'], *row['devices'])) in theirs
  ]


def repeats(rows) -> dict[str, dict[int, list[float]]]:
  """Returns repeated runs less those that count, by machine and by seed."""
  first, found = {}, {}
  for row in rows:
    key = (row['pair'], row['name'], row['seed'])
    if (counts := first.setdefault(key, row)) is not row:
      by_seed = found.setdefault(machine(row), {})
      by_seed.setdefault(row['seed'], []).append(
        100 * (row['last']['top1'] - counts['last']['top1'])
      )
  return found


def pooled(rows) -> tuple[float, int]:
  """Returns the deviation of a difference to IJCKD, and its degrees of freedom.

  Pooled over all cells of three seeds on the first pair, without augmentation:
  two degrees of freedom each.
  """
  found = [
    differences(rows, 'same', cell.name, 'ijckd')
    for cell in grid.CELLS
    if cell.pair == 'same'
    and cell.name != 'ijckd'
    and 'augmentation' not in cell.parts
  ]
  variances = [np.var(values, ddof=1) for values in found if len(values) == 3]
  if not variances:
    return math.nan, 0
  return math.sqrt(np.mean(variances)), 2 * len(variances)


def others(rows) -> list[dict]:
  """Returns the other methods less IJCKD, and Holm's p by two variances."""
  std, freedom = pooled(rows)
  found = []
  for cell in grid.CELLS:
    if 'others' not in cell.parts:
      continue
    values = differences(rows, 'same', cell.name, 'ijckd')
    if len(values) < 2:
      continue
    error = std / math.sqrt(len(values))
    found.append(
      {
        'name': cell.name,
        'n': len(values),
        'mean': float(np.mean(values)),
        'half_width': float(stats.t.ppf(0.975, freedom) * error),
        'p': float(2 * stats.t.sf(abs(np.mean(values)) / error, freedom)),
        'p_own': float(stats.ttest_1samp(values, 0.0).pvalue),
      }
    )
  for name in ('p', 'p_own'):
    adjusted = holm([row[name] for row in found])
    for row, p in zip(found, adjusted, strict=True):
      row[f'{name}_holm'] = p
  return found


def holm(ps) -> list[float]:
  """Returns p-values that are adjusted for each other by Holm's procedure."""
  adjusted, largest = [0.0] * len(ps), 0.0
  for rank, i in enumerate(np.argsort(ps)):
    largest = max(largest, min(1.0, ps[i] * (len(ps) - rank)))
    adjusted[i] = largest
  return adjusted


def machine(row) -> str:
  """Returns the kind of a run's devices."""
  return ', '.join(dict.fromkeys(row['devices']))


def _machines(rows) -> list[str]:
  """Returns all kinds, that of the most runs first."""
  counts = collections.Counter(machine(row) for row in rows)
  return [name for name, _ in counts.most_common()]


def primary(rows) -> list[dict]:
  """Returns the primary contrasts on the first pair, by Holm's procedure."""
  found = []
  for name, other in PRIMARY:
    values = differences(rows, 'same', name, other)
    if len(values) < 2:
      continue
    mean, half = interval(values)
    p = float(stats.ttest_1samp(values, 0.0).pvalue)
    found.append(
      {
        'contrast': f'{name} - {other}',
        'n': len(values),
        'mean': mean,
        'half_width': half,
        'p': p,
      }
    )
  for row, p in zip(found, holm([row['p'] for row in found]), strict=True):
    row['p_holm'] = p
  return found


def write(rows) -> None:
  """Writes tables.md and the pictures, and prints the tables."""
  text = tables(rows)
  (grid.FOLDER / 'tables.md').write_text(text)
  draw(rows)
  print(text)


def tables(rows) -> str:
  """Returns all tables, as Markdown."""
  parts = ['# Tables', '', _circumstances(rows), '', '## Primary contrasts', '']
  parts += [
    '| contrast | n | difference, points | p | p, Holm |',
    '| :-- | --: | --: | --: | --: |',
  ]
  contrasts = primary(rows)
  for row in contrasts:
    parts.append(
      f'| {row["contrast"]} | {row["n"]} | {row["mean"]:+.2f} ± '
      f'{row["half_width"]:.2f} | {row["p"]:.2g} | {row["p_holm"]:.2g} |'
    )
  planned = grid.find('same', 'ijckd').num_seeds
  if any(row['n'] < planned for row in contrasts):
    parts += ['', f'Interim: planned are {planned} seeds, before any claim.']
  parts += _others(rows)
  for part in grid.PARTS:
    cells = [cell for cell in grid.CELLS if part in cell.parts]
    for pair in dict.fromkeys(cell.pair for cell in cells):
      parts += ['', f'## {TITLES[part]}: {grid.TEACHER} to {grid.PAIRS[pair]}']
      names = [cell.name for cell in cells if cell.pair == pair]
      anchors = [
        name for name in (*BASELINES, 'ijckd') if name not in names
      ]  # What the others are read against.
      parts += ['', _table(rows, pair, names, anchors)]
  return '\n'.join(parts) + '\n'


def _others(rows) -> list[str]:
  """Returns the lines about the other methods, if they were made."""
  std, freedom = pooled(rows)
  found = others(rows) if freedom else []
  if not found:
    return []
  lines = [
    *('', '## Other methods less IJCKD', ''),
    '± and p are by the standard deviation of a difference of paired runs, '
    f'{std:.2f}, which is pooled over all cells of three seeds on the first '
    f'pair ({freedom} degrees of freedom); the last column is by the variance '
    'of the method alone. Both are adjusted for each other by Holm.',
    '',
    '| method | n | difference, points | p, Holm | own variance |',
    '| :-- | --: | --: | --: | --: |',
  ]
  for row in found:
    lines.append(
      f'| {row["name"]} | {row["n"]} | {row["mean"]:+.2f} ± '
      f'{row["half_width"]:.2f} | {row["p_holm"]:.2g} | '
      f'{row["p_own_holm"]:.2g} |'
    )
  return lines


def _circumstances(rows) -> str:
  """Returns on what the tables stand."""
  if not rows:
    return 'No run was made.'
  made = []
  for name in _machines(rows):
    seconds = [row['seconds'] for row in rows if machine(row) == name]
    made.append(
      f'{len(seconds)} runs on {name}, {sum(seconds) / 3600:.1f} hours of one '
      'worker'
    )
  said = ', '.join(f'{top1:.2f}%' for top1 in _teachers_top1(rows))
  lines = [
    f'{"; ".join(made)}. Top-1 on {grid.NUM_TEST:,} test pairs, %; the '
    f'teacher, {grid.TEACHER}, gets {said}. Mean and standard deviation over n '
    'seeds; differences to runs of the same seed on the same kind of machine, '
    'with 95% intervals; parameters as deployed; images/s as measured beside '
    'whatever else ran.'
  ]
  for name, by_seed in repeats(rows).items():
    mean, half = interval([np.mean(values) for values in by_seed.values()])
    lines.append(
      f'{sum(map(len, by_seed.values()))} of the runs on {name} repeat '
      f'others, and end {mean:+.2f} ± {half:.2f} points from them (clustered '
      f'by their {len(by_seed)} seeds). They are not among the n: the other '
      'runs of that machine are compared with them.'
    )
  return '\n\n'.join(lines).replace(' ± nan', '')


def _table(rows, pair: str, names, anchors) -> str:
  """Returns a table of cells, and below it of those they are read against."""
  head = ['', 'n', 'last', 'best']
  head += [f'to {name}' for name in BASELINES]
  machines = _machines(rows)
  head += ['parameters', *(f'images/s, {name}' for name in machines)]
  lines = [
    '| ' + ' | '.join(head) + ' |',
    '| :-- |' + ' --: |' * (len(head) - 1),
  ]
  for name in (*names, *anchors):
    found = counted(rows, pair, name)
    if not found:
      if name in names:
        lines.append(f'| {name} |' + ' |' * (len(head) - 1))
      continue
    row = [f'*{name}*' if name in anchors else name, str(len(found))]
    for which in ('last', 'best'):
      values = scores(rows, pair, name, which)
      spread = np.std(values, ddof=1) if len(values) > 1 else math.nan
      row.append(f'{np.mean(values):.2f} ± {spread:.2f}')
    for other in BASELINES:
      values = differences(rows, pair, name, other)
      if name == other or not values:
        row.append('')
      else:
        mean, half = interval(values)
        row.append(f'{mean:+.2f} ± {half:.2f}')
    row.append(f'{deployed(found[0]):,}')
    for kind in machines:
      speeds = [
        r['images_per_second']
        for r in found
        if machine(r) == kind and r['images_per_second']
      ]
      row.append(f'{np.median(speeds):,.0f}' if speeds else '')
    lines.append('| ' + ' | '.join(row) + ' |')
  return '\n'.join(lines).replace('± nan', '')


def deployed(row) -> int:
  """Returns the parameters of the student that a run leaves."""
  return sum(row['parameters'].values())


def draw(rows) -> None:
  """Draws accuracy against parameters, and the differences."""
  _draw_cost(rows)
  _draw_differences(rows)


def _draw_cost(rows) -> None:
  pairs = [p for p in grid.PAIRS if any(row['pair'] == p for row in rows)]
  if not pairs:
    return
  fig = figure.Figure((5 * len(pairs), 5), layout='constrained')
  for axes, pair in zip(
    fig.subplots(1, len(pairs), squeeze=False)[0], pairs, strict=True
  ):
    points = []
    for cell in grid.CELLS:
      if cell.pair != pair or not DRAWN & set(cell.parts):
        continue
      found = counted(rows, pair, cell.name)
      if not found:
        continue
      value = float(np.mean(scores(rows, pair, cell.name)))
      count = round(deployed(found[0]) / 1e3)
      axes.scatter(count, value, s=14, color='C0')
      points.append((count, -value, cell.name))
    # Neighbours have one label, the best first; those of the smallest students
    # are on the other side, clear of the rest.
    groups = []
    for point in sorted(points):
      last = groups[-1][-1] if groups else (0, 0.0, '')
      if point[0] == last[0] and point[1] - last[1] < 0.12:
        groups[-1].append(point)
      else:
        groups.append([point])
    for group in groups:
      counts, values, names = zip(*group, strict=True)
      left = counts[0] == groups[0][0][0]
      axes.annotate(
        textwrap.fill('; '.join(names), 24),
        (counts[0], -float(np.mean(values))),
        (-5 if left else 5, 0),
        textcoords='offset points',
        fontsize=6.5,
        ha='right' if left else 'left',
        va='center',
      )
    top1 = min(_teachers_top1(r for r in rows if r['pair'] == pair))
    axes.axhline(top1, color='0.6', lw=0.8, ls='--')
    axes.text(
      0.98,
      top1,
      'teacher',
      fontsize=7,
      ha='right',
      va='bottom',
      transform=axes.get_yaxis_transform(),
      color='0.4',
    )
    axes.margins(x=0.6)
    axes.set_title(f'{grid.TEACHER} to {grid.PAIRS[pair]}', fontsize=9)
    axes.set_xlabel('deployed parameters, thousands')
    axes.set_ylabel('top-1 on test pairs, %, last step')
  _save(fig, 'cost')


def _teachers_top1(rows) -> list[float]:
  """Returns what the teachers get, %; one with a refitted head is another."""
  return sorted(
    {
      100 * row['teacher']['top1']
      for row in rows
      if 'teacher.refit' not in row['settings']
    }
  )


def _draw_differences(rows) -> None:
  found = []
  for cell in grid.CELLS:
    values = differences(rows, cell.pair, cell.name, 'control')
    if (
      cell.name != 'control'
      and len(values) > 1
      and ('augmentation' not in cell.parts)
    ):
      found.append((cell, *interval(values), len(values)))
  if not found:
    return
  pairs = list(dict.fromkeys(cell.pair for cell, *_ in found))
  heights = [sum(cell.pair == pair for cell, *_ in found) for pair in pairs]
  fig = figure.Figure((7, 1 + 0.24 * sum(heights)), layout='constrained')
  axes = fig.subplots(
    len(pairs), 1, sharex=True, squeeze=False, height_ratios=heights
  )[:, 0]
  for ax, pair in zip(axes, pairs, strict=True):
    chosen = [entry for entry in found if entry[0].pair == pair]
    chosen.sort(key=lambda entry: entry[1])
    means = [mean for _, mean, _, _ in chosen]
    halves = [half for _, _, half, _ in chosen]
    ax.errorbar(means, range(len(chosen)), xerr=halves, fmt='o', ms=4, lw=1)
    ax.set_yticks(
      range(len(chosen)),
      [f'{cell.name} ({n})' for cell, _, _, n in chosen],
      fontsize=8,
    )
    ax.axvline(0, color='0.5', lw=0.8)
    ax.set_title(f'{grid.TEACHER} to {grid.PAIRS[pair]}', fontsize=9)
  axes[-1].set_xlabel(
    'points above CE with the same connector and a fresh head\n'
    '(paired by seed; 95% interval; number of seeds)'
  )
  _save(fig, 'differences')


def _save(fig, name: str) -> None:
  for kind in ('png', 'svg'):
    fig.savefig(grid.FOLDER / f'{name}.{kind}', dpi=150)
