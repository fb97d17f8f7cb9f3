"""The study's results, from its runs to tables and a picture.

python -m experiments.thesis.analyse              # tables.md and contrasts.png
python -m experiments.thesis.analyse runs/thesis  # first gathers its runs

results.jsonl has a line for each run: more runs of the same cells are added to
it, and a run that is there already is not taken again.
"""

import json
import pathlib
import sys

from matplotlib import figure
import numpy as np
from scipy import stats

from experiments.comparison import analyse as comparison
from experiments.thesis import config as study
from ijckd_jax.reports import sweep_table
from ijckd_jax.runtime import config_utils
from ijckd_jax.runtime import markdown

FOLDER = pathlib.Path(__file__).parent
RESULTS = FOLDER / 'results.jsonl'
# Written down in plan.md before the first contrast.
CONTRASTED = ('pairs', 'glyphs')
PRIMARY = ('fresh_head', 'copied_head', 'no_features', 'own_head', 'dkd')
MARGIN = 0.3  # Points; within it students are called alike.
LEVEL = 0.05
SEEDS = range(10)
# What differs between runs of a cell: the seed, places, and the machine.
OF_A_RUN = (
  'seed',
  'dataset.path',
  'dataset.data_dir',
  'teacher.checkpoint',
  'teacher.fingerprint',
  'teacher.store.directory',
  'compilation_cache',
)


def gather(folder: pathlib.Path) -> list[dict]:
  """Returns a row for each finished run of the study below a folder."""
  known = {}
  for data in study.DATA:
    for cell in study.CELLS:
      if cell == 'teacher' and data not in study.TEACHERS:
        continue
      for labels in study.LABELLED[data]:
        arg = f'data={data},cell={cell},labels={labels}'
        known[_identity(study.get_config(arg).to_dict())] = data, cell, labels
  rows = []
  for path in sorted(folder.glob('**/summary.json')):
    summary = json.loads(path.read_text())
    name = known.get(_identity(summary['config']))
    if name is None:
      raise SystemExit(f'{path.parent} is no run of this study')
    if name[1] == 'teacher':
      continue
    parameters, steps = summary['parameters'], summary['steps']
    images = steps * summary['config']['batch_size']
    rows.append(
      {
        **dict(zip(('data', 'cell', 'labels'), name, strict=True)),
        'seed': summary['seed'],
        'top1': 100 * summary['student']['last']['top1'],
        'teacher': summary['config']['teacher']['fingerprint'],
        'teacher_top1': 100 * (summary['teacher'] or {}).get('top1', np.nan),
        'deployed': sum(parameters['student'].values()),
        'training_seconds': round(images / summary['images_per_second']),
        'devices': summary['devices'],
        'versions': summary['versions'],
      }
    )
  return rows


def _identity(config) -> str:
  """Returns the config without what differs between runs of a cell."""
  flat = config_utils.flatten(config)
  return json.dumps(
    {name: value for name, value in flat.items() if name not in OF_A_RUN},
    sort_keys=True,
  )


def add(rows: list[dict], new: list[dict]) -> list[dict]:
  """Returns rows and those of the new ones that are of other runs."""
  found = {_key(row): row for row in new} | {_key(row): row for row in rows}
  for data in study.DATA:
    teachers = {r['teacher'] for r in found.values() if r['data'] == data} - {0}
    if len(teachers) > 1:
      raise SystemExit(f'{data}: the students have {len(teachers)} teachers')
  return [found[key] for key in sorted(found)]


def _key(row):
  return row['data'], row['labels'], row['cell'], row['seed']


def scores(rows, data: str, cell: str, labels: str = 'all') -> dict[int, float]:
  """Returns a cell's top-1 in per cent, by seed."""
  return {
    row['seed']: row['top1']
    for row in rows
    if (row['data'], row['cell'], row['labels']) == (data, cell, labels)
  }


def differences(rows, data, cell, other, labels='all') -> list[float]:
  """Returns a cell less another one in points, by the seeds that both have."""
  one, two = (scores(rows, data, name, labels) for name in (cell, other))
  return [one[seed] - two[seed] for seed in sorted(one.keys() & two.keys())]


def contrasts(rows) -> list[dict]:
  """Returns IJCKD less each control on each data set, by Holm's procedure."""
  found = []
  for data in CONTRASTED:
    for other in PRIMARY:
      values = differences(rows, data, 'ijckd', other)[: len(SEEDS)]
      if len(values) > 1:
        p = float(stats.ttest_1samp(values, 0.0).pvalue)
        found.append(
          {
            'data': data,
            'other': other,
            'n': len(values),
            'mean': float(np.mean(values)),
            'half_width': sweep_table.half_width(values),
            'p': p,
            'p_alike': _p_alike(values),
          }
        )
  # A contrast that is not there yet counts as one that shows nothing.
  missing = len(CONTRASTED) * len(PRIMARY) - len(found)
  adjusted = comparison.holm([row['p'] for row in found] + [1.0] * missing)
  for row, p in zip(found, adjusted, strict=False):
    row['p_holm'] = p
    row['verdict'] = _verdict(row)
  return found


def _verdict(row) -> str:
  """Returns what the plan says of a contrast."""
  if row['n'] < len(SEEDS):
    return 'incomplete'
  said = []
  if row['p_holm'] < LEVEL:
    said.append('better' if row['mean'] > 0 else 'worse')
  if row['p_alike'] < LEVEL:
    said.append(f'alike within {MARGIN}')
  return ', '.join(said) or 'open'


def _p_alike(values) -> float:
  """Returns the larger p of the two one-sided tests of MARGIN."""
  tests = ((-MARGIN, 'greater'), (MARGIN, 'less'))
  return max(
    float(stats.ttest_1samp(values, bound, alternative=side).pvalue)
    for bound, side in tests
  )


def tables(rows) -> str:
  """Returns all tables, as Markdown."""
  parts = ['# Tables', '', _made_with(rows), '', '## Primary contrasts', '']
  header = ('IJCKD minus', 'on', 'n', 'points', 'p', 'p, Holm', 'IJCKD is')
  cells = [
    (
      f'`{row["other"]}`',
      row['data'],
      str(row['n']),
      _signed(row['mean'], row['half_width']),
      f'{row["p"]:.2g}',
      f'{row["p_holm"]:.2g}',
      row['verdict'],
    )
    for row in contrasts(rows)
  ]
  parts += [markdown.grid([header, *cells])]
  for data in study.DATA:
    for labels in study.LABELLED[data]:
      parts += _cells_of(rows, data, labels)
  return '\n'.join(parts) + '\n'


def _cells_of(rows, data, labels) -> list[str]:
  """Returns the result table for one data set and one number of labels."""
  header = ('cell', 'n', 'top-1 %', 'IJCKD - cell', 'cell - ce', 'parameters')
  cells = []
  for cell in study.CELLS:
    found = scores(rows, data, cell, labels)
    if not found:
      continue
    deployed = next(
      row['deployed']
      for row in rows
      if (row['data'], row['cell']) == (data, cell)
    )
    values = list(found.values())
    spread = f' ± {np.std(values, ddof=1):.2f}' if len(values) > 1 else ''
    cells.append(
      (
        f'`{cell}`',
        str(len(values)),
        f'{np.mean(values):.2f}{spread}',
        *(
          _paired(differences(rows, data, one, two, labels))
          if one != two
          else ''
          for one, two in (('ijckd', cell), (cell, 'ce'))
        ),
        f'{deployed:,}',
      )
    )
  if not cells:
    return []
  number = f'{study.LABELS[labels]:,} labels'
  return ['', f'## {data}, {number}', '', markdown.grid([header, *cells])]


def _paired(values) -> str:
  if len(values) < 2:
    return ''
  return _signed(float(np.mean(values)), sweep_table.half_width(values))


def _signed(mean: float, half_width: float) -> str:
  return f'{mean:+.2f} ± {half_width:.2f}'


def _made_with(rows) -> str:
  """Returns how much was run, with what, and what the numbers are."""
  hours = sum(row['training_seconds'] for row in rows) / 3600
  kinds = sorted({', '.join(dict.fromkeys(row['devices'])) for row in rows})
  jax = sorted({row['versions']['jax'] for row in rows})
  teachers = ', '.join(
    f'{data} {top1:.2f}%'
    for data in study.DATA
    for top1 in {
      row['teacher_top1']
      for row in rows
      if row['data'] == data and row['cell'] == 'ijckd'
    }
  )
  return (
    f'{len(rows)} runs, {hours:.1f} hours of training on {"; ".join(kinds)}, '
    f'jax {", ".join(jax)}. Test top-1 of the teachers: {teachers}. Mean ± '
    'standard deviation over seeds; differences with 95% intervals, in pairs '
    'of the same seed.'
  )


def draw(rows, path: pathlib.Path) -> None:
  """Draws the primary contrasts with their intervals."""
  found = contrasts(rows)
  fig = figure.Figure(figsize=(7, 3.4), dpi=150, layout='constrained')
  ax = fig.add_subplot()
  ax.axvspan(-MARGIN, MARGIN, color='0.9', label=f'alike: within ± {MARGIN}')
  ax.axvline(0, color='0.4', linewidth=1)
  marks = {'pairs': ('o', '#0072B2', -0.12), 'glyphs': ('s', '#D55E00', 0.12)}
  for data, (marker, color, shift) in marks.items():
    chosen = [row for row in found if row['data'] == data]
    ax.errorbar(
      [row['mean'] for row in chosen],
      [PRIMARY.index(row['other']) + shift for row in chosen],
      xerr=[row['half_width'] for row in chosen],
      fmt=marker,
      color=color,
      capsize=3,
      label=data,
    )
  ax.set_yticks(range(len(PRIMARY)), PRIMARY)
  ax.invert_yaxis()
  ax.set_xlabel('IJCKD minus it, points of top-1 (95% interval)')
  ax.legend(loc='best', frameon=False)
  ax.spines[['top', 'right']].set_visible(False)
  fig.savefig(path)


def main(argv) -> None:
  """Gathers runs, if a folder is given, and writes the tables."""
  rows = comparison.read(RESULTS)
  for folder in argv:
    rows = add(rows, gather(pathlib.Path(folder)))
  if argv:
    RESULTS.write_text(''.join(json.dumps(row) + '\n' for row in rows))
  text = tables(rows)
  (FOLDER / 'tables.md').write_text(text)
  draw(rows, FOLDER / 'contrasts.png')
  print(text)


if __name__ == '__main__':
  main(sys.argv[1:])
