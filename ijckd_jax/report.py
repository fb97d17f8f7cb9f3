"""What a run was worth: a table, and a page with plots."""

import collections
from collections.abc import Mapping
from collections.abc import Sequence
import io
import itertools
import math
from typing import Any
from typing import NamedTuple

from etils import epath
import numpy as np

from ijckd_jax import config_utils
from ijckd_jax import methods
from ijckd_jax import workdirs

# Of each metric: its column's title, what it is multiplied by, its format.
COLUMNS = {
  'top1': ('top-1 %', 100, '.2f'),
  'top5': ('top-5 %', 100, '.2f'),
  'nll': ('NLL', 1, '.4f'),
  'ece': ('ECE %', 100, '.2f'),
  'agreement': ('agreement %', 100, '.2f'),
  'kl': ('KL to teacher', 1, '.4f'),
}
NOT_LOSSES = ('accuracy', 'gradient_norm', 'images_per_second', 'learning_rate')
MAX_NAMED = 20  # More names do not fit beside a matrix.
MAX_CELLS = 250  # More cells in a row would fade between pixels.
MAX_CONFUSIONS = 10
MAX_IMAGES = 24
WIDTH = 8.0  # Inches: at 150 dpi a little more than a page of Markdown shows.
COLOR_TICKS = (0, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1)

# After Okabe and Ito, whose colours the colour-blind tell apart as well.
INK, GREY, PALE = '#222222', '#767676', '#e5e5e5'
STUDENT, TEACHER = '#0072B2', '#D55E00'
TERMS = ('#0072B2', '#009E73', '#B0508A', '#D98E00', '#56B4E9')
STYLE = {
  'axes.axisbelow': True,
  'axes.edgecolor': '#b0b0b0',
  'axes.grid': True,
  'axes.labelcolor': INK,
  'axes.spines.right': False,
  'axes.spines.top': False,
  'axes.titlelocation': 'left',
  'axes.titlesize': 9,
  'figure.constrained_layout.use': True,
  'figure.dpi': 150,
  'font.size': 9,
  'grid.color': PALE,
  'grid.linewidth': 0.7,
  'legend.edgecolor': 'white',
  'lines.linewidth': 1.4,
  'savefig.bbox': 'tight',  # The layout of square axes can overflow.
  'savefig.pad_inches': 0.05,
  'text.color': INK,
  'text.parse_math': False,  # A class may be called '$'.
  'xtick.color': GREY,
  'xtick.labelcolor': INK,
  'ytick.color': GREY,
  'ytick.labelcolor': INK,
}


class _Section(NamedTuple):
  """A part of the page; `figure` is None where there is nothing to draw."""

  title: str
  stem: str
  figure: Any
  text: str


def table(summary: Mapping[str, Any]) -> str:
  """Returns the run's result as a short Markdown table, its columns aligned.

  Args:
    summary: as in `summary.json`.
  """
  learner, student = _learner(summary), summary['student']
  best_by = 'the test set' if summary['best_by'] == 'test' else 'validation'
  best = f'{learner}, best by {best_by} (step {summary["best_step"]:,})'
  rows = {
    'teacher': summary['teacher'],
    f'{learner}, last': student['last'],
    best: student['best'],
    f'{learner}, last without EMA': student.get('last_without_ema'),
  }
  rows = {name: metrics for name, metrics in rows.items() if metrics}
  shown = [key for key in COLUMNS if any(key in row for row in rows.values())]
  cells = [['', *(COLUMNS[key][0] for key in shown)]]
  for name, metrics in rows.items():
    cells.append([name])
    for key in shown:
      _, factor, form = COLUMNS[key]
      cells[-1].append(
        f'{factor * metrics[key]:{form}}' if key in metrics else ''
      )
  return '\n'.join([_grid(cells), '', *(f'- {x}' for x in _counts(summary))])


def _grid(cells: Sequence[Sequence[str]]) -> str:
  """Returns a Markdown table; its first row holds the titles."""
  widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
  rule = [f':{"-" * (widths[0] - 1)}']
  rule.extend(f'{"-" * (width - 1)}:' for width in widths[1:])
  lines = []
  for row in (cells[0], rule, *cells[1:]):
    first, *numbers = zip(row, widths, strict=True)
    padded = [first[0].ljust(first[1])]
    padded.extend(cell.rjust(width) for cell, width in numbers)
    lines.append(f'| {" | ".join(padded)} |')
  return '\n'.join(lines)


def _counts(summary):
  """Yields lines about parameters and speed."""
  totals = {}
  for who in ('student', 'teacher'):
    parts = summary['parameters'][who]
    if not parts:
      continue
    totals[who] = sum(parts.values())
    listed = ', '.join(f'{part} {count:,}' for part, count in parts.items())
    name = _learner(summary) if who == 'student' else who
    name = f'{name} {summary["config"][who]["backbone"]}'.rstrip()
    yield f'{name}: {totals[who]:,} parameters ({listed})'
  if len(totals) == 2:
    share = totals['student'] / totals['teacher']
    yield f"the student's share of the teacher's parameters: {share:.1%}"
  speed = summary['images_per_second']
  speed = 'not measured' if speed is None else f'{speed:,.0f} images per second'
  yield f'training: {speed}'


def write(
  workdir: epath.Path,
  *,
  summary: Mapping[str, Any],
  history: Sequence[Mapping[str, float]],
  evaluation,
  arrays,
  class_names: Sequence[str],
) -> None:
  """Writes `report.md`, and before it the plots that it shows.

  Args:
    workdir: the run's folder.
    summary: as in `summary.json`.
    history: rows of `metrics.jsonl`.
    evaluation: evaluate.Evaluation of the network that is bundled, on the test
      split.
    arrays: datasets.Arrays of the test split.
    class_names: K names.
  """
  from matplotlib import style

  workdir = epath.Path(workdir)
  plots = workdir / workdirs.PLOTS
  plots.mkdir(parents=True, exist_ok=True)
  with style.context(['default', STYLE]):
    sections = [
      *([_losses(summary, history)] if history else []),
      *([_accuracy(summary, history)] if history else []),
      _confusions(summary, evaluation, class_names),
      _images(summary, evaluation, arrays, class_names),
    ]
    for section in sections:
      if section.figure is not None:
        png = io.BytesIO()
        section.figure.savefig(png, format='png')
        (plots / f'{section.stem}.png').write_bytes(png.getvalue())
  parts = [_headline(summary, evaluation, arrays), table(summary)]
  if summary['best_by'] == 'test':
    parts.append(
      "'Best' was chosen on the test set, so its numbers flatter: compare runs "
      'by their last step, or hold out a validation split '
      '(`--config.dataset.validation_fraction=0.1`).'
    )
  for title, stem, figure, text in sections:
    parts.append(f'## {title}')
    if figure is not None:
      parts.append(f'![{title}]({workdirs.PLOTS}/{stem}.png)')
    parts.append(text)
  parts.append(_circumstances(workdir, summary))
  workdirs.write_text(workdir / workdirs.REPORT, '\n\n'.join(parts) + '\n')


def _join(*sentences: str | bool) -> str:
  """Joins those sentences that there are."""
  return ' '.join(filter(None, sentences))


def _learner(summary):
  return 'student' if summary['teacher'] else 'network'


def _headline(summary, evaluation, arrays):
  """Returns a title, what was done, and what that was worth."""
  config, judge = summary['config'], evaluation.teacher
  method = config_utils.instantiate(
    'method', methods.get(config['method']['name']), config['method']
  )
  by, on = config['method']['name'], config['dataset']['name']
  name = config['student']['backbone']
  teacher = config['teacher']['backbone'] or config['teacher']['checkpoint']
  if judge is None:
    done = f'trained without a teacher by **{by}** on **{on}**'
  elif getattr(method, 'needs_teacher', True):
    done = f'distilled from **{teacher}** by **{by}** on **{on}**'
  else:
    done = f'trained by **{by}** on **{on}**, only judged by **{teacher}**'
  if judge is not None and method.predicts_with == 'teacher':
    done += ", and predicts through the teacher's own head"
  best = config['bundle'] == 'best' and summary['best_step'] < summary['steps']
  count, mine = summary['test_examples'], evaluation.metrics['top1']
  worth = (
    f'The {"best" if best else "last"} step, which is bundled and shown below, '
    f'gets **{mine:.2%}** of the {count:,} test images right'
  )
  if judge is not None:
    theirs = judge.metrics['top1']
    worth += (
      f', the teacher **{theirs:.2%}**: {100 * (mine - theirs):+.2f} points'
    )
  labels = arrays.labels[evaluation.indices]
  if judge is not None and len(labels) == len(arrays):
    ours = evaluation.predictions == labels
    won = np.sum(ours & (judge.predictions != labels))
    lost = np.sum(~ours & (judge.predictions == labels))
    error = math.sqrt(won + lost - (won - lost) ** 2 / count) / count
    worth += (
      f' ± {100 * error:.2f} (standard error of the paired difference, from '
      f'the choice of test images alone). The student alone is right on '
      f'{won:,}, the teacher alone on {lost:,}'
    )
  return f'# {name} by {by} on {on}\n\n**{name}** was {done}. {worth}.'


def _circumstances(workdir, summary):
  """Returns seed, devices, versions and config."""
  devices = collections.Counter(summary['devices']).items()
  versions = summary['versions'].items()
  lines = [
    '## Circumstances',
    '',
    f'- seed {summary["seed"]}, {summary["steps"]:,} steps',
    '- devices: ' + ', '.join(f'{count} x {kind}' for kind, count in devices),
    '- versions: ' + ', '.join(f'{name} {number}' for name, number in versions),
  ]
  page = f'teacher/{workdirs.REPORT}'
  if summary['teacher'] and (workdir / page).exists():
    lines.append(f"- [the teacher's own report]({page})")
  lines += ['', '<details><summary>The whole config</summary>', '', '```text']
  fields = config_utils.flatten(summary['config']).items()
  lines += [f'{name} = {value!r}' for name, value in fields]
  return '\n'.join([*lines, '```', '', '</details>'])


def _figure(width, height):
  from matplotlib import figure  # Not pyplot: it keeps figures and a backend.

  return figure.Figure(figsize=(width, height))


def _series(history, key, factor=1):
  """Returns epochs and values of the rows that hold a number for `key`."""
  rows = [row for row in history if math.isfinite(row.get(key, math.nan))]
  return [row['epoch'] for row in rows], [factor * row[key] for row in rows]


def _draw(ax, epochs, values, color):
  # A single point makes no line, and few are worth telling apart.
  marker = 'o' if len(epochs) <= 25 else ''
  ax.plot(epochs, values, color=color, marker=marker, markersize=3.5)


def _scale_decades(ax, num_decades):
  """Makes the axis logarithmic, with plain numbers."""
  from matplotlib import ticker

  subs = (1,) if num_decades > 3 else (1, 2, 5)
  ax.set_yscale('log')
  ax.yaxis.set_major_locator(ticker.LogLocator(subs=subs))
  ax.yaxis.set_major_formatter(ticker.StrMethodFormatter('{x:g}'))
  ax.yaxis.set_minor_locator(ticker.NullLocator())


def _scale_epochs(ax, history):
  from matplotlib import ticker

  last = history[-1]['epoch']
  ax.set_xlim(0, 1.03 * last)
  ax.set_xlabel('epoch')
  ax.xaxis.set_major_locator(
    ticker.MaxNLocator(10, integer=last >= 3, steps=(1, 2, 5, 10))
  )


def _label_ends(ax, ends):
  """Writes (y, text, colour) right of the axes, apart where they would meet."""
  ax.get_ylim()  # Scales the axes to what is drawn.
  to_axes = ax.transData + ax.transAxes.inverted()
  ends = sorted(ends)
  heights = np.array([to_axes.transform((1, y))[1] for y, _, _ in ends])
  gap = 0.9 * 13 / 72 / (ax.figure.get_figheight() - 0.6)
  for _ in range(100):  # Neighbours push each other off until all have room.
    push = np.maximum(gap - np.diff(heights), 0) / 2
    heights += np.append(0, push) - np.append(push, 0)
  for height, (_, text, color) in zip(heights, ends, strict=True):
    ax.text(
      1.015, height, text, color=color, va='center', transform=ax.transAxes
    )


def _losses(summary, history) -> _Section:
  """Draws every term of the loss, and the total."""
  keys = dict.fromkeys(key for row in history for key in row)
  names = [key[len('train/') :] for key in keys if key.startswith('train/')]
  terms = [name for name in names if name not in ('loss', *NOT_LOSSES)]
  colors = itertools.cycle(TERMS)
  looks = {name: (name, next(colors)) for name in terms}
  looks['loss'] = ('total', INK)
  series = {name: _series(history, f'train/{name}') for name in looks}
  if len(terms) == 1 and series['loss'] == series[terms[0]]:
    del series[terms[0]]  # The total would hide it.
    looks['loss'] = (f'{terms[0]} = total', INK)
  figure = _figure(WIDTH, 3.4)
  ax = figure.subplots()
  ends = []
  for name, (epochs, values) in series.items():
    label, color = looks[name]
    _draw(ax, epochs, values, color)
    ends.append((values[-1], label, color))
  ax.set_ylabel('loss in training')
  values = np.concatenate([values for _, values in series.values()])
  logarithmic = values.min() > 0 and values.max() > 30 * values.min()
  if logarithmic:
    _scale_decades(ax, math.log10(values.max() / values.min()))
  else:
    ax.set_ylim(bottom=min(0, values.min()))
  _scale_epochs(ax, history)
  _label_ends(ax, ends)
  method = summary['config']['method']
  weights = ', '.join(
    f'{name} {method[f"{name}_weight"]:g}'
    for name in terms
    if f'{name}_weight' in method
  )
  text = _join(
    'Look for a term that still falls at the end: train longer.',
    len(terms) > 1
    and 'One that hardly moves has too small a weight or nothing to teach; one '
    'that makes up nearly all of the total drowns the others.',
    logarithmic and 'The scale is logarithmic.',
    weights and f'Terms are drawn before their weights ({weights}).',
  )
  return _Section('Loss terms', 'losses', figure, text)


def _accuracy(summary, history) -> _Section:
  """Draws training and test or validation accuracy, and the teacher's."""
  split, teacher = summary['best_by'], summary['teacher']
  figure = _figure(WIDTH, 3.4)
  ax = figure.subplots()
  ends, settled = [], []
  for key, label, color in (
    ('train/accuracy', 'training', GREY),
    (f'{split}/top1', split, STUDENT),
  ):
    epochs, values = _series(history, key, factor=100)
    if epochs:
      _draw(ax, epochs, values, color)
      ends.append((values[-1], f'{label} {values[-1]:.2f}', color))
      settled += values[len(values) // 5 :]
  if teacher:
    top1 = 100 * teacher['top1']
    ax.axhline(top1, color=TEACHER, linestyle=(0, (5, 2)), zorder=1.5)
    ends.append((top1, f'teacher, test {top1:.2f}', TEACHER))
  marks = [('last', summary['steps'], 'o', 7)]
  marks.append(('best', summary['best_step'], '*', 14))
  if summary['best_step'] == summary['steps']:
    marks = [('last and best', summary['steps'], '*', 14)]
  epochs = {row['step']: row['epoch'] for row in history}
  for name, step, marker, size in marks:
    top1 = 100 * summary['student'][name.split()[0]]['top1']
    settled.append(top1)
    look = dict(color=STUDENT, markeredgecolor='white', linestyle='', zorder=3)
    look |= dict(marker=marker, markersize=size)
    look['label'] = f'{name} (step {step:,}): test {top1:.2f}'
    ax.plot(epochs.get(step, math.nan), top1, **look)
  ax.set_ylabel('top-1 accuracy, %')
  ax.legend()
  # The first epochs would otherwise press everything else to the ceiling.
  settled += [y for y, _, _ in ends]
  room = 0.08 * max(max(settled) - min(settled), 1)
  ax.set_ylim(min(settled) - room, max(settled) + room)
  _scale_epochs(ax, history)
  _label_ends(ax, ends)
  text = _join(
    f'Look how far {split} stays below training (over-fitting), and whether it '
    'has levelled off.',
    teacher and 'The dashed line is the mark to reach: the teacher.',
    'Training accuracy is counted while the network still learns, on images as '
    'they are augmented, so it may be the lower one.',
    'The axis starts where the later epochs need it, so that the first may lie '
    'below it.',
    summary['config']['ema_decay'] > 0
    and f'The {split} curve is that of the moving average.',
  )
  return _Section('Accuracy', 'accuracy', figure, text)


def _confusions(summary, evaluation, class_names) -> _Section:
  """Draws the network's errors by class, beside the teacher's."""
  import matplotlib
  from matplotlib import colors

  panels = {_learner(summary): evaluation, 'teacher': evaluation.teacher}
  panels = {name: panel for name, panel in panels.items() if panel}
  num_classes = len(class_names)
  named = num_classes <= MAX_NAMED
  rates = [
    panel.confusion / np.maximum(panel.confusion.sum(axis=1, keepdims=True), 1)
    for panel in panels.values()
  ]
  errors = [rate * (1 - np.eye(num_classes)) for rate in rates]
  block = -(-num_classes // MAX_CELLS)
  for axis in (0, 1):
    starts = range(0, num_classes, block)
    errors = [np.maximum.reduceat(error, starts, axis) for error in errors]
  # A network that is nearly always right should not look alarming.
  highest = max(0.1, *map(np.max, errors))
  norm = colors.PowerNorm(0.5, 0, highest)
  # Pale yellow would be lost on white, where nothing went wrong.
  ramp = matplotlib.colormaps['YlOrRd'](np.linspace(0.2, 1, 256))
  diagonal = np.where(np.eye(num_classes), 0, np.nan)
  figure = _figure(WIDTH if len(panels) == 2 else WIDTH / 2 + 0.6, 4.1)
  axes = figure.subplots(1, len(panels), squeeze=False, sharey=True)[0]
  for ax, name, rate, error in zip(axes, panels, rates, errors, strict=True):
    image = ax.imshow(
      np.ma.masked_equal(error, 0), cmap=colors.ListedColormap(ramp), norm=norm
    )
    if block == 1:
      ax.imshow(diagonal, cmap=colors.ListedColormap([PALE]))
    ax.set_title(f'{name}: {panels[name].metrics["top1"]:.2%} right')
    ax.set_xlabel('predicted class')
    if named:
      ticks = [_shorten(name, 14) for name in class_names]
      upright = 90 if sum(map(len, ticks)) > 40 else 0
      ax.set_xticks(range(num_classes), ticks, rotation=upright)
      ax.set_yticks(range(num_classes), ticks)
      ax.grid(False)
      _write_cells(ax, rate, error > 0.3 * highest)
    else:
      tenths = np.linspace(0, len(error), 11) - 0.5
      ax.set(xticks=tenths, yticks=tenths)
      ax.tick_params(length=0, labelleft=False, labelbottom=False)
  axes[0].set_ylabel('true class')
  ticks = [tick for tick in COLOR_TICKS if tick <= highest]
  bar = figure.colorbar(image, ax=axes, aspect=30, pad=0.02, shrink=0.8)
  bar.set_ticks(ticks, labels=[f'{tick:.0%}' for tick in ticks])
  bar.set_label('share of the true class')
  bar.outline.set_visible(False)
  text = _join(
    'Look for errors that gather in a cell or a column.',
    len(panels) == 2
    and 'Which does the student make and the teacher does not?',
    "Colour is the share of a true class's images that were taken for another, "
    'on a square-root scale; white is none. Right answers, on the diagonal, '
    'are left grey: they would outshine every error.',
    block > 1 and f'A cell is the worst of {block} x {block} pairs of classes.',
    'Numbers are rounded percent of the true class.'
    if named
    else f"The {num_classes} classes are in the data set's order, with a line "
    f'after each tenth.\n\n{_frequent(panels, class_names)}',
  )
  return _Section('Confusion by class', 'confusion', figure, text)


def _frequent(panels, class_names):
  """Returns the network's most frequent errors as a Markdown table."""
  counts = [panel.confusion for panel in panels.values()]
  wrong = counts[0] * (1 - np.eye(len(class_names), dtype=np.int64))
  order = np.argsort(-wrong, axis=None, kind='stable')[:MAX_CONFUSIONS]
  cells = [['true → predicted', *panels, 'images of the class']]
  for i, j in zip(*np.unravel_index(order, wrong.shape), strict=True):
    if wrong[i, j]:
      pair = f'{class_names[i]} → {class_names[j]}'.replace('|', '\\|')
      numbers = (*(count[i, j] for count in counts), counts[0][i].sum())
      cells.append([pair, *(f'{number:,}' for number in numbers)])
  if len(cells) == 1:
    return 'No class was taken for another.'
  return f'The most frequent errors, counted:\n\n{_grid(cells)}'


def _write_cells(ax, rates, dark):
  """Writes rounded percentages, but for zeros, into a matrix's cells."""
  percent = np.round(100 * rates)
  look = dict(ha='center', va='center', fontsize=min(8, 110 / len(rates)))
  for i, j in np.argwhere(percent > 0):
    color = 'white' if dark[i, j] else INK
    ax.text(j, i, f'{percent[i, j]:.0f}', color=color, **look)


def _shorten(name, width):
  return name if len(name) <= width else f'{name[: width - 1]}…'


def _images(summary, evaluation, arrays, class_names) -> _Section:
  """Draws test images that the network gets wrong and the teacher right."""
  learner, judge = _learner(summary), evaluation.teacher
  shown = arrays.take(evaluation.indices)
  wrong = evaluation.predictions != shown.labels
  title = f'Test images that the {learner} gets wrong'
  text = f'The {learner} gets {np.sum(wrong):,} of {len(shown):,} test images'
  text += ' wrong' if len(shown) == len(arrays) else ' of this process wrong'
  if judge is not None:
    wrong &= judge.predictions == shown.labels
    title += ' and the teacher right'
    text += f', and the teacher is right on {np.sum(wrong):,} of these'
  rows = np.flatnonzero(wrong)
  if not len(rows):
    return _Section(title, 'images', None, f'{text}: nothing to show.')
  if len(rows) > MAX_IMAGES:
    text += f'; {MAX_IMAGES} are shown, evenly spread over the split'
    spread = np.linspace(0, len(rows) - 1, MAX_IMAGES)
    rows = rows[spread.round().astype(int)]
  figure = _draw_images(
    shown.images[rows],
    [class_names[label] for label in shown.labels[rows]],
    [class_names[label] for label in evaluation.predictions[rows]],
  )
  text += (
    '. Look whether you would have known, and what they have in common. Above '
    'each: true class → predicted class.'
  )
  return _Section(title, 'images', figure, text)


def _draw_images(images, labels, predictions):
  """Draws images in a grid, each under its true and its predicted class."""
  _, height, width, channels = images.shape
  longest = max(map(len, (*labels, *predictions)))
  columns = 4 if width > 1.5 * height else 8 if longest <= 14 else 6
  cell_width = WIDTH / columns
  columns = min(columns, len(images))
  num_rows = -(-len(images) // columns)
  num_lines = 1 if longest <= 4 else 2
  cell_height = (cell_width - 0.06) * height / width + 0.13 * num_lines + 0.07
  figure = _figure(columns * cell_width, num_rows * cell_height)
  figure.get_layout_engine().set(h_pad=0.02, w_pad=0.02, hspace=0, wspace=0)
  grid = figure.subplots(num_rows, columns, squeeze=False)
  for ax in grid.flat:
    ax.axis('off')
  for ax, *shown in zip(grid.flat, images, labels, predictions, strict=False):
    image, *names = shown
    if channels != 3:
      image = image.mean(axis=-1)
    ax.imshow(image, cmap='gray', vmin=0, vmax=255, interpolation='nearest')
    room = int(cell_width / 0.065) - 2
    label, prediction = (_shorten(name, room) for name in names)
    title = f'{label}{" " if num_lines == 1 else chr(10)}→ {prediction}'
    ax.set_title(title, fontsize=7.5, loc='center', pad=3)
  return figure
