"""Gathers what .run has left into results.json and results.png, and a table."""

import json
import pathlib

from matplotlib import figure
import numpy as np

from experiments.pretrained_teacher import config
from ijckd_jax.reports import sweep_table
from ijckd_jax.runtime import markdown

STARTS = ('fresh', 'pretrained')
METHODS = {'ce': ('alone', '#767676'), 'ijckd': ('by IJCKD', '#0072B2')}
TEACHER, PROBE = '#D55E00', '#009E73'


def write(folder: pathlib.Path) -> None:
  """Writes results.json and results.png into a folder, and prints the table.

  Args:
    folder: of .run, which has come to its end.
  """
  found = read(folder)
  text = json.dumps(found, indent=1) + '\n'
  (folder / 'results.json').write_text(text)
  draw(found, folder / 'results.png')
  print(table(found))


def read(folder: pathlib.Path) -> dict:
  """Returns by start what its probe and its runs are worth, and the teacher."""
  found = {
    'probes': {
      what: json.loads((folder / f'probe_{what}.json').read_text())
      for what in ('teacher', *STARTS)
    },
  }
  for start in STARTS:
    for method in METHODS:
      runs = sorted((folder / start).glob(f'*{start}_{method}*seed=[0-9]'))
      summaries = list(map(_summary, runs))
      found[f'{start}_{method}'] = {
        'backbone': config.BACKBONES[start],
        'top1': [s['student']['last']['top1'] for s in summaries],
        'parameters': summaries[0]['parameters']['student'],
        'multiply_adds': summaries[0]['multiply_adds']['student'],
      }
  taught = summaries[0]  # By the last method, which has a teacher.
  found['teacher'] = {
    'top1': _summary(folder / 'teacher')['student']['last']['top1'],
    'parameters': sum(taught['parameters']['teacher'].values()),
    'multiply_adds': taught['multiply_adds']['teacher'],
  }
  found['versions'] = taught['versions']
  return found


def _summary(run: pathlib.Path) -> dict:
  return json.loads((run / 'summary.json').read_text())


def table(found: dict) -> str:
  """Returns the results in Markdown."""
  rows = [['', 'parameters', 'of the teacher', 'test top-1 %', 'to alone']]
  whole = found['teacher']['parameters']
  probe = 100 * found['probes']['teacher']['linear']['top1']
  top1 = 100 * found['teacher']['top1']
  rows += [
    [f'{config.TEACHER}, its start probed', '', '', f'{probe:.2f}', ''],
    [f'{config.TEACHER}, the teacher', f'{whole:,}', '', f'{top1:.2f}', ''],
  ]
  for start in STARTS:
    probe = 100 * found['probes'][start]['linear']['top1']
    name = config.BACKBONES[start]
    rows.append([f'{name}, its {start} start probed', '', '', f'{probe:.2f}'])
    rows[-1].append('')
    alone = 100 * np.array(found[f'{start}_ce']['top1'])
    for method, (label, _) in METHODS.items():
      arm = found[f'{start}_{method}']
      count = sum(arm['parameters'].values())
      values = 100 * np.array(arm['top1'])
      said = f'{values.mean():.2f} ± {values.std(ddof=1):.2f}'
      gain = ''
      if method != 'ce':
        half = sweep_table.half_width(list(values - alone))
        gain = f'{(values - alone).mean():+.2f} ± {half:.2f}'
      share = f'{count / whole:.1%}'
      rows.append([f'{name} {label}', f'{count:,}', share, said, gain])
  return markdown.grid(rows)


def draw(found: dict, path: pathlib.Path) -> None:
  """Draws the runs of each arm beside their start's probe and the teacher."""
  fig = figure.Figure(figsize=(8, 3.2), dpi=150, layout='constrained')
  ax = fig.subplots()
  names = []
  for start in STARTS:
    probe = 100 * found['probes'][start]['linear']['top1']
    for method, (label, color) in METHODS.items():
      arm, y = found[f'{start}_{method}'], -len(names)
      values = 100 * np.array(arm['top1'])
      ax.plot(values, [y] * len(values), 'o', color=color, alpha=0.5)
      ax.plot(values.mean(), y, '|', color=color, markersize=18, mew=2)
      ax.plot(probe, y, 'd', color=PROBE, markersize=7)
      count = sum(arm['parameters'].values()) / 1e6
      names.append(f'{arm["backbone"]} {label}\n{count:.2f} M parameters')
  top1 = 100 * found['teacher']['top1']
  ax.axvline(top1, color=TEACHER, linestyle=(0, (5, 2)))
  ax.annotate(
    f'teacher {top1:.2f}',
    (top1, 0.75),
    color=TEACHER,
    ha='right',
    xytext=(-4, 0),
    textcoords='offset points',
  )
  ax.plot([], [], 'd', color=PROBE, label='linear probe of the frozen start')
  ax.plot([], [], 'o', color='#444444', alpha=0.5, label='a run')
  ax.plot([], [], '|', color='#444444', markersize=12, mew=2, label='mean')
  ax.legend(loc='lower left', frameon=False, fontsize=8)
  ax.set_yticks([-i for i in range(len(names))], names, fontsize=8)
  ax.set_ylim(0.6 - len(names), 1.2)
  ax.set_xlabel('test top-1, %')
  ax.grid(axis='x', color='#e5e5e5')
  ax.spines[['top', 'right']].set_visible(False)
  fig.savefig(path)
