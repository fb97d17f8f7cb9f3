"""Gathers the runs of run.sh into results.json and a picture.

python experiments/first_look/collect.py WORKDIR
"""

import json
import pathlib
import sys

from matplotlib import figure
import numpy as np

HERE = pathlib.Path(__file__).parent
METHODS = {
  'ijckd': ('resnet8 by IJCKD', '#0072B2'),
  'ce': ('resnet8 alone', '#767676'),
}
FIELDS = ('top1', 'nll', 'ece', 'agreement', 'kl')


def read(workdir):
  """Returns the teacher's and each run's results by name."""
  results = {}
  for path in sorted(workdir.glob('*_[0-9]*/summary.json')):
    summary = json.loads(path.read_text())
    rows = map(json.loads, (path.parent / 'metrics.jsonl').open())
    results[path.parent.name] = {
      'last': {key: summary['student']['last'][key] for key in FIELDS},
      'best': {'top1': summary['student']['best']['top1']},
      'best_step': summary['best_step'],
      'parameters': summary['parameters']['student'],
      'images_per_second': summary['images_per_second'],
      'versions': summary['versions'],
      'curve': [
        [round(row['epoch'], 2), row['test/top1']]
        for row in rows
        if 'test/top1' in row
      ],
    }
    results['teacher'] = {
      **summary['teacher'],
      'parameters': summary['parameters']['teacher'],
    }
  return results


def draw(results, path):
  """Draws test accuracy by epoch."""
  fig = figure.Figure(figsize=(8, 3.6), dpi=150, layout='constrained')
  ax = fig.add_subplot()
  teacher = 100 * results['teacher']['top1']
  ax.axhline(teacher, color='#D55E00', linestyle='--')
  ends = [(teacher, 'teacher, resnet20', f'{teacher:.2f}', '#D55E00')]
  for method, (label, color) in METHODS.items():
    curves = [
      np.array(result['curve'])
      for name, result in results.items()
      if name.startswith(f'{method}_')
    ]
    for curve in curves:
      ax.plot(curve[:, 0], 100 * curve[:, 1], color=color, linewidth=1.3)
    last = [100 * curve[-1, 1] for curve in curves]
    number = f'{np.mean(last):.2f} ± {np.std(last, ddof=1):.2f}'
    ends.append((np.mean(last), label, number, color))
  below = np.inf
  for value, label, number, color in sorted(ends, reverse=True):
    below = min(value, below - 2.4)  # Labels must not run into each other.
    ax.annotate(
      f'{label} {number}',
      (1.01, below + 1),
      xycoords=('axes fraction', 'data'),
      color=color,
      verticalalignment='center',
      fontsize=9,
    )
  ax.set_xlabel('epoch')
  ax.set_ylabel('test top-1, %')
  ax.set_ylim(bottom=40)
  ax.set_xlim(0, curves[0][-1, 0])
  ax.xaxis.get_major_locator().set_params(integer=True)
  ax.grid(color='#e5e5e5')
  ax.set_axisbelow(True)
  ax.spines[['top', 'right']].set_visible(False)
  fig.savefig(path)


def main(workdir):
  """Writes results.json and curves.png beside this file."""
  results = read(pathlib.Path(workdir))
  text = json.dumps(results, indent=1)
  (HERE / 'results.json').write_text(text + '\n')
  draw(results, HERE / 'curves.png')
  for name, result in results.items():
    top1 = result['top1'] if name == 'teacher' else result['last']['top1']
    print(f'{name}: {100 * top1:.2f}')


if __name__ == '__main__':
  main(sys.argv[1])
