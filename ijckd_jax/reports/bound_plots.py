"""The bounds of a pair, drawn and told."""

from collections.abc import Mapping
from collections.abc import Sequence

import numpy as np

from ijckd_jax.evaluation import pointwise
from ijckd_jax.reports import bound_wording
from ijckd_jax.reports import plots
from ijckd_jax.runtime import markdown

FORMATS = ('png', 'svg')
COLORS = {
  'measured': plots.INK,
  'teacher': plots.TEACHER,
  'joint head': '#009E73',
  'own head': '#B0508A',
  'alignment': plots.STUDENT,
}
LABELS = {
  'measured': "the student's error, as measured",
  'teacher': "the teacher's part",
  'alignment': 'how far the student is from it',
  'joint head': "the joint head's own errors",
  'own head': "between the student's two heads",
}
MAX_POINTS = 2000
MAX_CLASSES = 12


def draw(
  measured,
  class_names: Sequence[str],
  history: Sequence[Mapping[str, float]] = (),
  split: str = 'test',
) -> list[plots.Section]:
  """Returns the sections of a report that are about the bound.

  Args:
    measured: measure.Measured.
    class_names: K names.
    history: rows of `metrics.jsonl`; none where it is not known.
    split: whose metrics the history holds.
  """
  from matplotlib import style

  with style.context(['default', plots.STYLE]):
    sections = [
      _bounds(measured),
      *_history(history, split),
      *_scatter(measured),
      *_classes(measured, class_names),
    ]
    return plots.finish(sections, *FORMATS)


def _bounds(measured) -> tuple:
  """Draws what the student's error is at most, and tells all of it."""
  report = measured.report
  shown = bound_wording.of_deployed(report)
  error = report['terms']['student_error']
  figure = plots.new_figure(plots.WIDTH, 1.4 + 0.42 * len(shown))
  ax = figure.subplots()
  ax.barh(0, error['value'], color=COLORS['measured'], height=0.6)
  _whisker(ax, 0, error['lower'], error['upper'])
  ticks = ["the student's error"]
  kinds = ['measured']
  for row, bound in enumerate(shown, 1):
    ticks.append(f'{bound["title"]} ({bound["statement"]})')
    right = 0.0
    for part in sorted(bound['parts'], key=_order):
      kinds.append(part['kind'])
      hatch = {} if part['value'] >= 0 else {'hatch': '////', 'fill': False}
      ax.barh(
        row,
        part['value'],
        left=right,
        height=0.6,
        edgecolor='white' if not hatch else COLORS[part['kind']],
        color=COLORS[part['kind']],
        linewidth=0.8,
        **hatch,
      )
      right += part['value']
    _whisker(ax, row, bound['value'], bound['upper'])
  for row, bound in enumerate([error, *shown]):
    said = f'{bound["value"]:.1%}, at most {bound["upper"]:.1%}'
    ax.text(1.01, row, said, va='center', transform=ax.get_yaxis_transform())
  ax.axvline(error['value'], color=COLORS['measured'], linestyle=(0, (2, 2)))
  ax.axvline(1, color=plots.GREY)
  ax.axvspan(1, 2, color=plots.PALE, zorder=0)
  ax.text(
    1.1, -0.75, 'says\nnothing', color=plots.GREY, fontsize=7, ha='center'
  )
  ax.set(xlim=(0, 1.2), ylim=(len(shown) + 0.6, -1.1))
  ax.set_yticks(range(len(ticks)), ticks)
  ax.set_xlabel('share of test images')
  ax.grid(axis='y', visible=False)
  from matplotlib import patches

  ax.legend(
    handles=[
      patches.Patch(color=COLORS[kind], label=LABELS[kind])
      for kind in COLORS
      if kind in kinds
    ],
    loc='upper center',
    bbox_to_anchor=(0.3, -1.1 / len(ticks)),
    ncols=2,
    frameon=False,
  )
  return ('The bound', 'bounds', figure, bound_wording.tell(report))


def _order(part) -> tuple:
  """Returns what parts are sorted by: as the legend is, what is taken last."""
  return part['value'] < 0, list(COLORS).index(part['kind'])


def _whisker(ax, row, lower, upper):
  """Draws a limit, cut off where the picture ends."""
  ax.plot([lower, min(upper, 1.19)], [row, row], color=plots.INK, linewidth=1.2)
  marker = '>' if upper > 1.19 else '|'
  ax.plot(
    min(upper, 1.19), row, marker, color=plots.INK, markersize=7, clip_on=False
  )


def _history(history, split) -> list[tuple]:
  """Draws the terms over training."""
  lines = {
    'student_error': ("student's error", plots.STUDENT),
    'teacher_error': ("teacher's error", plots.TEACHER),
    'disagreement': ('disagreement', '#B0508A'),
    'harm': ('only the teacher right', plots.GREY),
    'help': ('only the student right', '#009E73'),
    'uncertified': ('not certified', plots.INK),
  }
  history = [
    {
      **row,
      f'{split}/disagreement': 1 - row[f'{split}/agreement'],
      **(
        {f'{split}/uncertified': 1 - row[f'{split}/certified']}
        if f'{split}/certified' in row
        else {}
      ),
    }
    for row in history
    if f'{split}/student_error' in row
  ]
  if not history:
    return []
  figure = plots.new_figure(plots.WIDTH, 3.6)
  ax = figure.subplots()
  ends = []
  for name, (label, color) in lines.items():
    epochs, values = plots.points_of(history, f'{split}/{name}', factor=100)
    if epochs:
      plots.draw_line(ax, epochs, values, color)
      ends.append((values[-1], f'{label} {values[-1]:.1f}', color))
  ax.set_ylabel(f'share of the {split} images, %')
  # The square root: a good student's errors would be lost on the axis.
  ax.set_yscale('function', functions=(np.sqrt, np.square))
  ax.set_ylim(0, 103)
  ax.set_yticks((0, 1, 5, 10, 20, 40, 60, 80, 100))
  plots.scale_epochs(ax, history)
  plots.label_ends(ax, ends)
  distances = ', '.join(
    f'{label} from {first:.4g} to {last:.4g}'
    for name, label in (
      ('feature_mse', "the features' mean squared error"),
      ('logit_mse', "the logits'"),
    )
    if (values := plots.points_of(history, f'{split}/{name}')[1])
    for first, last in [(values[0], values[-1])]
  )
  text = markdown.join(
    "The student's error is the teacher's, plus what only the teacher gets "
    "right, less what only the student gets right; and at most the teacher's "
    'plus the disagreement.',
    'The scale is that of square roots.',
    f'Over these evaluations went {distances}.',
  )
  return [('The terms over training', 'terms', figure, text)]


def _scatter(measured) -> list[tuple]:
  """Draws the margin of each image against the student's distance."""
  rows = measured.rows
  if rows.feature_distance is None:
    return []
  rows = rows.labelled
  rows = rows.where(np.isfinite(rows.label_margin))
  if len(rows) < 2:
    return []
  far = np.asarray(pointwise.reach(rows.feature_distance))
  certified = rows.label_margin > far
  wrong = rows.student != rows.label
  spread = np.unique(
    np.linspace(0, len(rows) - 1, min(len(rows), MAX_POINTS)).astype(int)
  )
  figure = plots.new_figure(0.75 * plots.WIDTH, 4.4)
  ax = figure.subplots()
  right = 1.1 * float(np.quantile(far, 0.995))
  low, high = np.quantile(rows.label_margin, (0.005, 0.995))
  low, high = min(1.1 * float(low), 0.0), max(1.1 * float(high), 0.3 * right)
  ends = np.array([0.0, right])
  ax.fill_between(ends, ends, max(high, right), color='#009E73', alpha=0.12)
  ax.axhline(0, color=plots.GREY, linewidth=0.8)
  for chosen, color, label in (
    (~wrong, plots.STUDENT, 'student right'),
    (wrong, plots.TEACHER, 'student wrong'),
  ):
    points = spread[chosen[spread]]
    ax.scatter(
      far[points],
      rows.label_margin[points],
      s=5,
      color=color,
      alpha=0.5,
      linewidths=0,
      label=label,
    )
  ax.text(
    0.02,
    0.97,
    f'certified: {certified.mean():.1%}',
    color='#00664d',
    va='top',
    transform=ax.transAxes,
  )
  ax.set(xlim=(0, right), ylim=(low, high))
  ax.set_xlabel("distance of the student's features from the teacher's")
  ax.set_ylabel("distance of the teacher's features from the boundary")
  ax.legend(loc='lower right', markerscale=2)
  text = (
    f'Above the diagonal (green) the student cannot be wrong, whatever the '
    'direction in which it is off: the boundary is farther away. That is '
    f'{certified.mean():.2%} of the images; the student is right on '
    f'{1 - wrong.mean():.2%}. Below the line at 0 the teacher is wrong. '
    + (
      f'{len(spread):,} images are drawn, evenly spread over the split.'
      if len(spread) < len(rows)
      else ''
    )
  )
  return [('Margin against distance', 'margins', figure, text.rstrip())]


def _classes(measured, class_names) -> list[tuple]:
  """Draws the classes in which the joint head gains most on the teacher's."""
  classes = measured.classes
  if 'ijc_gap' not in classes:
    return []
  gap, error = classes['ijc_gap'], classes['ijc_gap_error']
  title = 'Where the assumption fails first'
  order = np.argsort(-gap, kind='stable')[:MAX_CLASSES]
  order = order[gap[order] > 0]
  if not len(order):
    text = (
      'In no class the trained joint head makes fewer errors than the '
      "teacher's: nothing to show."
    )
    return [(title, 'classes', None, text)]
  figure = plots.new_figure(plots.WIDTH, 0.9 + 0.26 * len(order))
  ax = figure.subplots()
  names = [class_names[classes['class'][i]] for i in order]
  ax.barh(
    range(len(order)),
    100 * gap[order],
    xerr=100 * error[order],
    color=COLORS['joint head'],
    ecolor=plots.GREY,
    height=0.6,
  )
  ax.axvline(0, color=plots.INK, linewidth=0.8)
  ax.set_yticks(range(len(order)), [plots.shorten(name, 28) for name in names])
  ax.invert_yaxis()
  ax.grid(axis='y', visible=False)
  ax.set_xlabel("teacher's head's errors less the joint head's, both, %")
  clear = int(np.sum(gap > 2 * error))
  text = (
    f'Classes in which the assumption fails first ({len(order)} shown): there '
    "the trained joint head makes fewer errors than the teacher's, on both "
    'representations together. The lines are one standard error from the '
    f'choice of images; {clear} of {len(gap)} classes are more than two above '
    'zero (about one in forty would be by chance).'
  )
  return [(title, 'classes', figure, text)]
