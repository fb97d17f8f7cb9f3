"""A report's plots, each with what to look for in it."""

from collections.abc import Mapping
from collections.abc import Sequence
import io
import itertools
import math
from typing import Any
from typing import NamedTuple
import warnings

import numpy as np

from ijckd_jax.runtime import config_utils
from ijckd_jax.runtime import markdown
from ijckd_jax.runtime import progress

NOT_LOSSES = ('accuracy', 'gradient_norm', 'images_per_second', 'learning_rate')
MAX_NAMED = 20  # More names do not fit beside a matrix.
MAX_CELLS = 250  # More cells in a row would fade between pixels.
MAX_IMAGES = 24
IMAGES = 'images'  # The stem of the picture that is made of them.
WIDTH = 5.0  # Inches, as of a phone, on which text keeps the size of STYLE.
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
  'axes.titlesize': 10,
  'figure.constrained_layout.use': True,
  'figure.dpi': 150,
  'font.size': 10,
  'grid.color': PALE,
  'grid.linewidth': 0.7,
  'legend.edgecolor': 'white',
  'lines.linewidth': 1.4,
  'svg.hashsalt': 'ijckd_jax',  # Or the same figure would be another file.
  'savefig.bbox': 'tight',  # The layout of square axes can overflow.
  'savefig.pad_inches': 0.05,
  'text.color': INK,
  'text.parse_math': False,  # A class may be called '$'.
  'xtick.color': GREY,
  'xtick.labelcolor': INK,
  'ytick.color': GREY,
  'ytick.labelcolor': INK,
}


class Section(NamedTuple):
  """A part of the page; `pictures` are by format, none: nothing is drawn."""

  title: str
  stem: str
  pictures: dict[str, bytes]
  text: str


def draw(
  summary: Mapping[str, Any],
  history: Sequence[Mapping[str, float]],
  evaluation,
  arrays,
  class_names: Sequence[str],
) -> list[Section]:
  """Returns the sections of a report; arguments are those of `report.write`."""
  from matplotlib import style

  with style.context(['default', STYLE]):
    sections = [
      *([_losses(summary, history)] if history else []),
    ]
    if evaluation is not None:
      sections += [
        *([_accuracy(summary, history)] if history else []),
        _confusions(summary, evaluation, class_names),
        _images(summary, evaluation, arrays, class_names),
      ]
    return finish(sections, 'png')


def finish(
  drawn: Sequence[tuple[str, str, Any, str]], *formats: str
) -> list[Section]:
  """Returns sections whose figures are rendered; says how far it is.

  Args:
    drawn: title, stem, figure or None, and text of each section.
    *formats: of the pictures.
  """
  return [
    Section(title, stem, render(figure, *formats), text)
    for title, stem, figure, text in progress.watched(
      drawn, 'drawing the report', 'plots', len(drawn)
    )
  ]


def render(figure, *formats: str) -> dict[str, bytes]:
  """Returns a figure by format; nothing where there is none."""
  pictures = {}
  for form in formats if figure else ():
    stream = io.BytesIO()
    # Without a date, the same figure is the same file.
    undated = {'Date': None} if form == 'svg' else {}
    with warnings.catch_warnings():
      # Of characters that no font has; a box is drawn in the place of each.
      warnings.filterwarnings('ignore', 'Glyph .* missing from')
      figure.savefig(stream, format=form, metadata=undated)
    pictures[form] = stream.getvalue()
  return pictures


def new_figure(width: float, height: float):
  """Returns an empty figure of a size in inches."""
  from matplotlib import figure  # Not pyplot: it keeps figures and a backend.

  return figure.Figure(figsize=(width, height))


def points_of(history, key, factor=1):
  """Returns epochs and values of the rows that hold a number for `key`."""
  rows = [row for row in history if math.isfinite(row.get(key, math.nan))]
  return [row['epoch'] for row in rows], [factor * row[key] for row in rows]


def draw_line(ax, epochs, values, color) -> None:
  """Draws values over epochs."""
  # A single point makes no line, and few are worth telling apart.
  marker = 'o' if len(epochs) <= 25 else ''
  ax.plot(epochs, values, color=color, marker=marker, markersize=3.5)


def scale_decades(ax, num_decades):
  """Makes the axis logarithmic, with plain numbers."""
  from matplotlib import ticker

  subs = (1,) if num_decades > 3 else (1, 2, 5)
  ax.set_yscale('log')
  ax.yaxis.set_major_locator(ticker.LogLocator(subs=subs))
  ax.yaxis.set_major_formatter(ticker.StrMethodFormatter('{x:g}'))
  ax.yaxis.set_minor_locator(ticker.NullLocator())


def scale_epochs(ax, history) -> None:
  """Makes the horizontal axis one of epochs."""
  from matplotlib import ticker

  last = history[-1]['epoch']
  ax.set_xlim(0, 1.03 * last)
  ax.set_xlabel('epoch')
  ax.xaxis.set_major_locator(
    ticker.MaxNLocator(10, integer=last >= 3, steps=(1, 2, 5, 10))
  )


def label_ends(ax, ends):
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


def _losses(summary, history) -> tuple:
  """Draws every term of the loss, and the total."""
  keys = dict.fromkeys(key for row in history for key in row)
  names = [key[len('train/') :] for key in keys if key.startswith('train/')]
  terms = [name for name in names if name not in ('loss', *NOT_LOSSES)]
  colors = itertools.cycle(TERMS)
  looks = {name: (name, next(colors)) for name in terms}
  looks['loss'] = ('total', INK)
  series = {name: points_of(history, f'train/{name}') for name in looks}
  if len(terms) == 1 and series['loss'] == series[terms[0]]:
    del series[terms[0]]  # The total would hide it.
    looks['loss'] = (f'{terms[0]} = total', INK)
  figure = new_figure(WIDTH, 3.4)
  ax = figure.subplots()
  ends = []
  for name, (epochs, values) in series.items():
    label, color = looks[name]
    draw_line(ax, epochs, values, color)
    ends.append((values[-1], label, color))
  ax.set_ylabel('loss in training')
  values = np.concatenate([values for _, values in series.values()])
  logarithmic = values.min() > 0 and values.max() > 30 * values.min()
  if logarithmic:
    scale_decades(ax, math.log10(values.max() / values.min()))
  else:
    ax.set_ylim(bottom=min(0, values.min()))
  scale_epochs(ax, history)
  label_ends(ax, ends)
  method = summary['config']['method']
  weights = ', '.join(
    f'{name} {method[f"{name}_weight"]:g}'
    for name in terms
    if f'{name}_weight' in method
  )
  text = markdown.join(
    'Look for a term that still falls at the end: train longer.',
    len(terms) > 1
    and 'One that hardly moves has too small a weight or nothing to teach; one '
    'that makes up nearly all of the total drowns the others.',
    logarithmic and 'The scale is logarithmic.',
    weights and f'Terms are drawn before their weights ({weights}).',
  )
  return ('Loss terms', 'losses', figure, text)


def _accuracy(summary, history) -> tuple:
  """Draws training and test or validation accuracy, and the teacher's."""
  split, teacher = summary['best_by'], summary['teacher']
  figure = new_figure(WIDTH, 3.4)
  ax = figure.subplots()
  ends, settled = [], []
  for key, label, color in (
    ('train/accuracy', 'training', GREY),
    (f'{split}/top1', split, STUDENT),
  ):
    epochs, values = points_of(history, key, factor=100)
    if epochs:
      draw_line(ax, epochs, values, color)
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
  # Outside of the axes, where it hides no curve.
  figure.legend(loc='outside lower left')
  # The first epochs would otherwise press everything else to the ceiling.
  settled += [y for y, _, _ in ends]
  room = 0.08 * max(max(settled) - min(settled), 1)
  ax.set_ylim(min(settled) - room, max(settled) + room)
  scale_epochs(ax, history)
  label_ends(ax, ends)
  text = markdown.join(
    f'Look how far {split} stays below training (over-fitting), and whether it '
    'has levelled off.',
    teacher and 'The dashed line is the mark to reach: the teacher.',
    'Training accuracy is counted while the network still learns, on images as '
    'they are augmented, so it may be the lower one.',
    'The axis starts where the later epochs need it, so that the first may lie '
    'below it.',
    split != 'test' and 'The marks are test accuracy, off the curve.',
    summary['config']['ema_decay'] > 0
    and f'The {split} curve is that of the moving average.',
  )
  return ('Accuracy', 'accuracy', figure, text)


def _confusions(summary, evaluation, class_names) -> tuple:
  """Draws the network's errors by class, above the teacher's."""
  panels = {
    markdown.learner(summary): evaluation,
    'teacher': evaluation.teacher,
  }
  panels = {name: panel for name, panel in panels.items() if panel}
  num_classes = len(class_names)
  block = -(-num_classes // MAX_CELLS)
  figure = _draw_matrices(panels, class_names, block)
  text = markdown.join(
    'Look for errors that gather in a cell or a column.',
    len(panels) == 2
    and 'Which does the student make and the teacher does not?',
    "Colour is the share of a true class's images that were taken for another, "
    'on a square-root scale; white is none. Right answers, on the diagonal, '
    'are left grey: they would outshine every error.',
    block > 1 and f'A cell is the worst of {block} x {block} pairs of classes.',
    'Numbers are rounded percent of the true class.'
    if num_classes <= MAX_NAMED
    else f"The {num_classes} classes are in the data set's order, with a line "
    'after each tenth.',
  )
  return ('Confusion by class', 'confusion', figure, text)


def _draw_matrices(panels, class_names, block):
  """Draws a matrix of errors for each of panels (evaluations by name)."""
  import matplotlib
  from matplotlib import colors

  rates = [
    panel.confusion / np.maximum(panel.confusion.sum(axis=1, keepdims=True), 1)
    for panel in panels.values()
  ]
  errors = [_errors(rate, block) for rate in rates]
  # A network that is nearly always right should not look alarming.
  highest = max(0.1, *map(np.max, errors))
  norm = colors.PowerNorm(0.5, 0, highest)
  # Pale yellow would be lost on white, where nothing went wrong.
  ramp = matplotlib.colormaps['YlOrRd'](np.linspace(0.2, 1, 256))
  diagonal = np.where(np.eye(len(class_names)), 0, np.nan)
  figure = new_figure(WIDTH, 0.9 + 4.5 * len(panels))
  axes = figure.subplots(len(panels), squeeze=False)[:, 0]
  for ax, name, rate, error in zip(axes, panels, rates, errors, strict=True):
    image = ax.imshow(
      np.ma.masked_equal(error, 0), cmap=colors.ListedColormap(ramp), norm=norm
    )
    if block == 1:
      ax.imshow(diagonal, cmap=colors.ListedColormap([PALE]))
    ax.set_title(f'{name}: {panels[name].metrics["top1"]:.2%} right')
    ax.set(xlabel='predicted class', ylabel='true class')
    if len(class_names) <= MAX_NAMED:
      _name_classes(ax, class_names)
      # Of ink and white the one that stands out, on dark pages too.
      _write_cells(ax, rate, error > 0.18 * highest)
    else:
      tenths = np.linspace(0, len(error), 11) - 0.5
      ax.set(xticks=tenths, yticks=tenths)
      ax.tick_params(length=0, labelleft=False, labelbottom=False)
  ticks = [tick for tick in COLOR_TICKS if tick <= highest]
  bar = figure.colorbar(
    image, ax=axes, location='bottom', aspect=30, pad=0.02, shrink=0.8
  )
  bar.set_ticks(ticks, labels=[f'{tick:.0%}' for tick in ticks])
  bar.set_label('share of the true class')
  bar.outline.set_visible(False)
  return figure


def _errors(rate, block) -> np.ndarray:
  """Returns the off-diagonal rates, the worst of each block x block of them."""
  errors = rate * (1 - np.eye(len(rate)))
  starts = range(0, len(rate), block)
  for axis in (0, 1):
    errors = np.maximum.reduceat(errors, starts, axis)
  return errors


def _name_classes(ax, class_names) -> None:
  """Writes the classes beside both axes."""
  ticks = [shorten(name, 14) for name in class_names]
  upright = 90 if sum(map(len, ticks)) > 40 else 0
  look = dict(fontsize=min(10, 160 / len(ticks)))
  ax.set_xticks(range(len(ticks)), ticks, rotation=upright, **look)
  ax.set_yticks(range(len(ticks)), ticks, **look)
  ax.grid(False)


def _write_cells(ax, rates, dark):
  """Writes rounded percentages, but for zeros, into a matrix's cells."""
  percent = np.round(100 * rates)
  look = dict(ha='center', va='center', fontsize=min(9, 130 / len(rates)))
  for i, j in np.argwhere(percent > 0):
    color = 'white' if dark[i, j] else INK
    ax.text(j, i, f'{percent[i, j]:.0f}', color=color, **look)


def shorten(name: str, width: int = 60) -> str:
  """Returns the start of a name from outside, as text that can be drawn."""
  name = config_utils.short(name)
  return name if len(name) <= width else f'{name[: width - 1]}…'


def _images(summary, evaluation, arrays, class_names) -> tuple:
  """Draws test images that the network gets wrong and the teacher right."""
  learner, teacher_evaluation = markdown.learner(summary), evaluation.teacher
  labels, num = evaluation.labels, len(evaluation.labels)
  wrong = evaluation.predictions != labels
  title = f'Test images that the {learner} gets wrong'
  text = f'The {learner} gets {np.sum(wrong):,} of {num:,} test images wrong'
  if teacher_evaluation is not None:
    wrong &= teacher_evaluation.predictions == labels
    title += ' and the teacher right'
    text += f', and the teacher is right on {np.sum(wrong):,} of these'
  rows = np.flatnonzero(wrong)
  if not len(rows):
    return (title, IMAGES, None, f'{text}: nothing to show.')
  if len(rows) > MAX_IMAGES:
    text += f'; {MAX_IMAGES} are shown, evenly spread over the split'
    spread = np.linspace(0, len(rows) - 1, MAX_IMAGES)
    rows = rows[spread.round().astype(int)]
  figure = _draw_images(
    arrays.take(rows).images,
    [class_names[label] for label in labels[rows]],
    [class_names[label] for label in evaluation.predictions[rows]],
  )
  text += (
    '. Look whether you would have known, and what they have in common. Above '
    'each: true class → predicted class.'
  )
  return (title, IMAGES, figure, text)


def _draw_images(images, labels, predictions):
  """Draws images in a grid, each under its true and its predicted class."""
  _, height, width, channels = images.shape
  longest = max(map(len, (*labels, *predictions)))
  columns = 3 if width > 1.5 * height else 6 if longest <= 4 else 4
  cell_width = WIDTH / columns
  columns = min(columns, len(images))
  num_rows = -(-len(images) // columns)
  num_lines = 1 if longest <= 4 else 2
  cell_height = (cell_width - 0.06) * height / width + 0.15 * num_lines + 0.07
  figure = new_figure(columns * cell_width, num_rows * cell_height)
  figure.get_layout_engine().set(h_pad=0.02, w_pad=0.02, hspace=0, wspace=0)
  grid = figure.subplots(num_rows, columns, squeeze=False)
  for ax in grid.flat:
    ax.axis('off')
  for ax, *shown in zip(grid.flat, images, labels, predictions, strict=False):
    image, *names = shown
    if channels != 3:
      image = image.mean(axis=-1)
    ax.imshow(image, cmap='gray', vmin=0, vmax=255, interpolation='nearest')
    room = int(cell_width / 0.075) - 2
    label, prediction = (shorten(name, room) for name in names)
    title = f'{label}{" " if num_lines == 1 else chr(10)}→ {prediction}'
    ax.set_title(title, fontsize=8.5, loc='center', pad=3)
  return figure
