"""What a run was worth: a table, and a page with plots."""

import collections
from collections.abc import Mapping
from collections.abc import Sequence
import json
import math
import re
from typing import Any

from etils import epath
import numpy as np

from ijckd_jax.distillation import methods
from ijckd_jax.reports import bound_plots
from ijckd_jax.reports import bound_wording
from ijckd_jax.reports import plots
from ijckd_jax.reports import tables
from ijckd_jax.reports import web_page
from ijckd_jax.runtime import config_utils
from ijckd_jax.runtime import disk
from ijckd_jax.runtime import markdown
from ijckd_jax.runtime import workdirs

IN_FULL = 'The bound in full'  # Title of the folded tables.


def table(summary: Mapping[str, Any]) -> str:
  """Returns the run's result as a short Markdown table, its columns aligned.

  Args:
    summary: as in `summary.json`.
  """
  counts = '\n'.join(f'- {line}' for line in _counts(summary))
  return '\n\n'.join([*_metrics(summary), counts])


def _metrics(summary) -> list[str]:
  """Returns the table of accuracies; none where the images have no classes."""
  learner, student = markdown.learner(summary), summary['student']
  if not student:
    return []
  best_by = 'the test set' if summary['best_by'] == 'test' else 'validation'
  best = f'{learner}, best by {best_by} (step {summary["best_step"]:,})'
  rows = {
    'teacher': summary['teacher'],
    f'{learner}, last': student['last'],
    best: student['best'],
    f'{learner}, last without EMA': student.get('last_without_ema'),
  }
  rows = {name: metrics for name, metrics in rows.items() if metrics}
  return [markdown.metrics(rows)]


def _counts(summary):
  """Yields lines about parameters and speed."""
  totals = {}
  for who in ('student', 'teacher'):
    parts = summary['parameters'][who]
    if not parts:
      continue
    totals[who] = sum(parts.values())
    listed = ', '.join(f'{part} {count:,}' for part, count in parts.items())
    name = markdown.learner(summary) if who == 'student' else who
    backbone = summary['config']['student']['backbone']
    found = backbone if who == 'student' else summary['teacher_name']
    name += f' {markdown.escape(found)}'
    yield f'{name}: {totals[who]:,} parameters ({listed})'
  if len(totals) == 2:
    share = totals['student'] / totals['teacher']
    yield f"the student's share of the teacher's parameters: {share:.1%}"
  # Runs of before have none.
  counts = summary.get('multiply_adds') or {}
  counts = {who: count for who, count in counts.items() if count}
  if counts:
    said = ', '.join(f'{who} {x / 1e6:,.1f} M' for who, x in counts.items())
    yield f'multiply-adds for an image: {said}'
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
  measured=None,
) -> None:
  """Writes `report.md`, the plots that it shows, and `report.html`.

  Nothing is written before all of it is made.

  Args:
    workdir: the run's folder.
    summary: as in `summary.json`.
    history: rows of `metrics.jsonl`.
    evaluation: evaluator.Evaluation of the network that is bundled, on the test
      split; None where the images have no classes.
    arrays: datasets.Arrays of the test split.
    class_names: K names.
    measured: measure.Measured of the pair; None without a teacher.
  """
  workdir = epath.Path(workdir)
  sections = plots.draw(summary, history, evaluation, arrays, class_names)
  details = {}
  if measured is not None:
    sections += bound_plots.draw(measured.report)
    details[IN_FULL] = bound_wording.full(measured.report)
  parts = [_headline(summary, evaluation), *_metrics(summary)]
  if summary['best_by'] == 'test' and evaluation is not None:
    parts.append(
      "'Best' was chosen on the test set, so its numbers flatter: compare runs "
      'by their last step, or hold out a validation split '
      '(`--config.dataset.validation_fraction=0.1`).'
    )
  parts += ['## Size and speed', tables.size_and_speed(summary)]
  if evaluation is not None:
    rows = tables.classes(summary, evaluation, class_names)
    shown = rows[: 1 + tables.MAX_CLASSES]
    parts += ['## Each class, the worst first', markdown.grid(shown)]
    if rows[len(shown) :]:
      title = f'All {len(rows) - 1:,} classes'
      parts.append(f"'{title}' is folded away at the end of this page.")
      details[title] = markdown.grid(rows)
  parts += _tell(sections)
  parts.append(_circumstances(workdir, summary))
  fields = config_utils.flatten(summary['config']).items()
  lines = '\n'.join(f'{name} = {value!r}' for name, value in fields)
  details['The whole config'] = f'```text\n{lines}\n```'
  _write_pages(workdir, parts, sections, details)


def write_bounds(folder: epath.Path, found: Mapping[str, Any]) -> None:
  """Writes `bounds.json`, and `report.md` and `report.html` with its figure.

  Args:
    folder: is there.
    found: measured.report, and 'unlabelled', where there are such images.
  """
  sections = bound_plots.draw(found)
  disk.write_text(folder / 'bounds.json', json.dumps(found, indent=2))
  parts = _tell(sections)
  if 'unlabelled' in found:
    parts.append(bound_wording.unlabelled(found['unlabelled']))
  details = {IN_FULL: bound_wording.full(found)}
  _write_pages(folder, parts, sections, details)


def is_complete(workdir: epath.Path) -> bool:
  """Returns whether a run's report is there, with the plots that it shows."""
  try:
    # The last one of its files.
    if not (workdir / workdirs.WEB_REPORT).read_bytes().endswith(b'</html>\n'):
      return False
    text = (workdir / workdirs.REPORT).read_bytes().decode()
    shown = re.findall(rf'^!\[.*\]\(({workdirs.PLOTS}/.*)\)$', text, re.M)
    return bool(text) and all(
      (workdir / picture).stat().length for picture in shown
    )
  except (OSError, ValueError):
    return False


def _tell(sections) -> list[str]:
  """Returns sections (plots.Section each) in Markdown."""
  parts = []
  for title, stem, pictures, text in sections:
    parts.append(f'## {title}')
    if pictures:
      parts.append(f'![{title}]({workdirs.PLOTS}/{stem}.png)')
    parts.append(text)
  return parts


def _write_pages(folder: epath.Path, parts, sections, details) -> None:
  """Writes a page as `report.md`, and whole as `report.html`, and its pictures.

  Args:
    folder: where; the pictures go to a folder in it.
    parts: of the page, in Markdown.
    sections: plots.Section each, whose pictures it shows.
    details: Markdown at its end, folded away, by title.
  """
  text = '\n\n'.join(parts)
  folded = [
    f'<details><summary>{title}</summary>\n\n{words}\n\n</details>'
    for title, words in details.items()
  ]
  page = web_page.page(
    # A page of its own links to pages of their own.
    text.replace(f'/{workdirs.REPORT})', f'/{workdirs.WEB_REPORT})'),
    {
      f'{workdirs.PLOTS}/{stem}.png': pictures['png']
      for _, stem, pictures, _ in sections
      if pictures
    },
    frozenset({f'{workdirs.PLOTS}/{plots.IMAGES}.png'}),
    details,
  )
  plots_folder = folder / workdirs.PLOTS
  plots_folder.mkdir(parents=True, exist_ok=True)
  for partial in plots_folder.glob('.*.partial'):  # Left by a process killed.
    partial.unlink()
  whole = '\n\n'.join([text, *folded]) + '\n'
  disk.write_files(
    {
      **{
        plots_folder / f'{stem}.{form}': picture
        for _, stem, pictures, _ in sections
        for form, picture in pictures.items()
      },
      folder / workdirs.REPORT: whole.encode(),
      folder / workdirs.WEB_REPORT: page.encode(),
    }
  )


def _headline(summary, evaluation):
  """Returns a title, what was done, and what that was worth."""
  config = summary['config']
  method = methods.build(config['method'])
  by, on, name, teacher = map(
    markdown.escape,
    (
      config['method']['name'],
      config['dataset']['name'],
      config['student']['backbone'],
      summary['teacher_name'],
    ),
  )
  if evaluation is None:
    return (
      f'# {name} by {by} on {on}\n\n**{name}** learned the features of '
      f'**{teacher}** by **{by}** on **{on}**, whose images have no classes. '
      'It has no head: `ijckd probe` says what its features are worth, on '
      'images with classes.'
    )
  teacher_evaluation = evaluation.teacher
  count, mine = summary['test_examples'], evaluation.metrics['top1']
  title = f'# {name} by {by} on {on}'
  worth = f'**{name}** gets **{mine:.2%}** of the {count:,} test images right'
  best = config['bundle'] == 'best' and summary['best_step'] < summary['steps']
  shown = f'The {"best" if best else "last"} step is bundled, and shown here.'
  if teacher_evaluation is None:
    done = f'It was trained without a teacher by **{by}** on **{on}**.'
    return f'{title}\n\n{worth}.\n\n{done} {shown}'
  theirs = teacher_evaluation.metrics['top1']
  sizes = {who: sum(x.values()) for who, x in summary['parameters'].items()}
  share = sizes['student'] / sizes['teacher']
  if method.needs_teacher:
    done = f'The student was distilled by **{by}** on **{on}**'
  else:
    done = (
      f'The student was trained by **{by}** on **{on}**; the teacher is only '
      'there to compare with'
    )
  if method.predicts_with == 'teacher':
    done += ", and predicts through the teacher's own head"
  return (
    f'{title}\n\n{worth}, and the teacher **{teacher}** {theirs:.2%}. '
    f"The student has {share:.0%} of the teacher's parameters.\n\n"
    f'{done}. {shown} {_compared(evaluation)}'
  )


def _compared(evaluation) -> str:
  """Returns the difference to the teacher on the same images, and its error."""
  labels, teacher = evaluation.labels, evaluation.teacher
  right = [e.predictions == labels for e in (evaluation, teacher)]
  won, lost = right[0] & ~right[1], right[1] & ~right[0]
  error = np.std(won.astype(int) - lost) / math.sqrt(len(labels))
  error *= 100 * markdown.HALF_WIDTH
  points = 100 * (evaluation.metrics['top1'] - teacher.metrics['top1'])
  said = (
    f'Student minus teacher: {points:+.2f} points ± {error:.2f} (95% interval '
    'of the paired difference, from the choice of test images alone)'
  )
  if abs(points) <= error:
    said += '; these images cannot tell which one is better'
  return (
    f'{said}. The student alone is right on {np.sum(won):,}, the teacher alone '
    f'on {np.sum(lost):,}.'
  )


def _circumstances(workdir, summary):
  """Returns seed, devices and versions."""
  devices = collections.Counter(summary['devices']).items()
  versions = summary['versions'].items()
  lines = [
    '## Circumstances',
    '',
    f'- seed {summary["seed"]}, {summary["steps"]:,} steps',
    '- devices: '
    + ', '.join(
      f'{count} x {markdown.escape(kind)}' for kind, count in devices
    ),
    '- versions: ' + ', '.join(f'{name} {number}' for name, number in versions),
  ]
  if origin := summary['teacher_origin']:
    said = ', '.join(
      f'{key} {value or "(none)"}' for key, value in origin.items()
    )
    lines.append(f"- the teacher's weights: {markdown.escape(said)}")
  page = f'teacher/{workdirs.REPORT}'
  given = summary['config']['teacher']['checkpoint']
  if summary['teacher'] and not given and (workdir / page).exists():
    lines.append(f"- [the teacher's own report]({page})")
  return '\n'.join(lines)
