"""The bounds of a pair as a figure."""

from collections.abc import Mapping
from typing import Any

from ijckd_jax.reports import bound_wording
from ijckd_jax.reports import plots

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
  'teacher': "the teacher's errors or doubt",
  'alignment': "the student's distance from the teacher",
  'joint head': "the joint head's own errors",
  'own head': "between the student's two heads",
}
MAX_BOUNDS = 5  # Beside the measured error.
HEIGHT = 0.4  # Of a bar, under its title, where a row is 1.
MOST_SHOWN = 1.2  # Right end of the axis; above 1 a bound says nothing.


def draw(report: Mapping[str, Any]) -> list[plots.Section]:
  """Returns the section of a page that is about the bound.

  Args:
    report: of certify.report.
  """
  from matplotlib import style

  with style.context(['default', plots.STYLE]):
    section = (
      'The bound',
      'bounds',
      _figure(report),
      bound_wording.brief(report),
    )
    return plots.finish([section], *FORMATS)


def _figure(report):
  """Draws the student's error, and the parts of each bound on it."""
  from matplotlib import patches
  from matplotlib import ticker

  shown = bound_wording.of_deployed(report)[:MAX_BOUNDS]
  error = report['terms']['student_error']
  right = min(MOST_SHOWN, 1.1 * max(x['upper'] for x in (error, *shown)))
  figure = plots.new_figure(plots.WIDTH, 1.7 + 0.5 * len(shown))
  ax = figure.subplots()
  ax.barh(0, error['value'], color=COLORS['measured'], height=HEIGHT)
  _whisker(ax, 0, error['lower'], error['upper'], right)
  titles = ["the student's error (dashed)"]
  kinds = ['measured']
  for row, bound in enumerate(shown, 1):
    titles.append(f'{bound["title"]} ({bound["statement"]})')
    left = 0.0
    for part in sorted(bound['parts'], key=_order):
      kinds.append(part['kind'])
      hatch = {} if part['value'] >= 0 else {'hatch': '////', 'fill': False}
      ax.barh(
        row,
        part['value'],
        left=left,
        height=HEIGHT,
        edgecolor='white' if not hatch else COLORS[part['kind']],
        color=COLORS[part['kind']],
        linewidth=0.8,
        **hatch,
      )
      left += part['value']
    _whisker(ax, row, bound['value'], bound['upper'], right)
  whole = ax.get_yaxis_transform()
  for row, (title, bound) in enumerate(
    zip(titles, [error, *shown], strict=True)
  ):
    look = dict(va='center', fontsize=9, transform=whole)
    # Nothing is to cross the words.
    room = dict(facecolor='white', edgecolor='none', pad=0.5)
    ax.text(0.005, row - 0.4, f'{title}:', bbox=room, **look)
    said = f'{bound["value"]:.1%}, at most {bound["upper"]:.1%}'
    ax.text(1.01, row, said, **look)
  ax.axvline(
    error['value'], color=COLORS['measured'], linestyle=(0, (2, 2)), zorder=0
  )
  ax.xaxis.set_major_locator(ticker.MaxNLocator(5))
  ax.xaxis.set_major_formatter(ticker.PercentFormatter(1, symbol=''))
  if right > 1:
    ax.axvline(1, color=plots.GREY)
    ax.axvspan(1, 2, color=plots.PALE, zorder=0)
    ax.text(
      1.1, -0.95, 'says\nnothing', color=plots.GREY, fontsize=8, ha='center'
    )
  ax.set(xlim=(0, right), ylim=(len(shown) + 0.4, -0.8), yticks=())
  ax.set_xlabel('% of the images; lines end at the limits')
  figure.legend(
    handles=[
      patches.Patch(color=COLORS[kind], label=LABELS[kind])
      for kind in COLORS
      if kind in kinds
    ],
    loc='outside lower left',
    frameon=False,
  )
  return figure


def _order(part) -> tuple:
  """Returns what parts are sorted by: as the legend is, what is taken last."""
  return part['value'] < 0, list(COLORS).index(part['kind'])


def _whisker(ax, row, lower, upper, right):
  """Draws a limit, cut off at the right end of the picture."""
  end = min(upper, 0.995 * right)
  ax.plot([lower, end], [row, row], color=plots.INK, linewidth=1.2)
  marker = '>' if upper > end else '|'
  ax.plot(end, row, marker, color=plots.INK, markersize=7, clip_on=False)
