"""A report's tables: what the networks cost, and how each class fares."""

from collections.abc import Mapping
from collections.abc import Sequence
from typing import Any

import numpy as np

from ijckd_jax.reports import plots
from ijckd_jax.runtime import markdown
from ijckd_jax.runtime import progress

MAX_CLASSES = 20  # More are folded away.


def size_and_speed(summary: Mapping[str, Any]) -> str:
  """Returns size and speed, the student's beside the teacher's, in Markdown.

  Args:
    summary: as in `summary.json`; runs of older versions have fewer numbers.
  """
  learner = markdown.learner(summary)
  numbers = {
    who: _costs(summary, who)
    for who in ('student', 'teacher')
    if summary['parameters'][who]
  }
  cells = [['', *(learner if x == 'student' else x for x in numbers)]]
  if len(numbers) == 2:
    cells[0].append('share')
  for name, (_, form) in numbers['student'].items():
    found = [of_one.get(name, (None,))[0] for of_one in numbers.values()]
    if not any(found):
      continue
    row = [name, *('' if x is None else f'{x:{form}}' for x in found)]
    if len(numbers) == 2:
      row.append(f'{found[0] / found[1]:.1%}' if all(found) else '')
    cells.append(row)
  return f'{markdown.grid(cells)}\n\n{_times(summary)}'


def _costs(summary, who) -> dict[str, tuple[float | None, str]]:
  """Returns what a network costs: numbers with their formats, by name."""

  def of(key):
    return (summary.get(key) or {}).get(who)

  parts, multiply_adds, weight_bytes = (
    of(key) for key in ('parameters', 'multiply_adds', 'weight_bytes')
  )
  return {
    'parameters': (sum(parts.values()), ',d'),
    **{f'in the {part}': (count, ',d') for part, count in parts.items()},
    'weights, MB': (weight_bytes and weight_bytes / 1e6, ',.2f'),
    'multiply-adds for an image, M': (
      multiply_adds and multiply_adds / 1e6,
      ',.1f',
    ),
    **{
      f'{_images(count)}, ms': (taken, ',.2f')
      for count, taken in (of('milliseconds') or {}).items()
    },
  }


def _images(count: str) -> str:
  return 'one image' if count == '1' else f'{count} images'


def _times(summary) -> str:
  """Returns how long training took, and what was timed."""
  seconds = summary.get('training_seconds') or {}
  took = {who: x and progress.duration(x) for who, x in seconds.items()}
  speed = summary['images_per_second']
  return markdown.join(
    took.get('student')
    and f'Training took {took["student"]}, with evaluations and checkpoints.',
    took.get('teacher')
    and f"The teacher's training before it took {took['teacher']}.",
    speed is not None
    and f'The training steps alone made {speed:,.0f} images per second.',
    any((summary.get('milliseconds') or {}).values())
    and 'Milliseconds are medians of a prediction by JAX, as `ijckd predict` '
    'makes it, on one device of this run '
    f'({markdown.escape(summary["devices"][0])}): on another machine they '
    'differ.',
  )


def classes(
  summary: Mapping[str, Any], evaluation, class_names: Sequence[str]
) -> list[list[str]]:
  """Returns a row of cells for each class, the titles first.

  The class of which the network gets the least right comes first; one without
  images is left out.

  Args:
    summary: as in `summary.json`.
    evaluation: evaluator.Evaluation of the network.
    class_names: K names.
  """
  learner, teacher = markdown.learner(summary), evaluation.teacher
  confusion = evaluation.confusion
  counts = confusion.sum(axis=1)
  wrong = confusion * (1 - np.eye(len(counts), dtype=np.int64))
  judge = ['teacher %'] if teacher is not None else []
  cells = [['class', f'{learner} %', *judge, 'most often taken for', 'images']]
  rates = confusion.diagonal() / np.maximum(counts, 1)
  names = [markdown.escape(plots.shorten(name)) for name in class_names]
  for row in np.argsort(rates, kind='stable'):
    if not counts[row]:
      continue
    taken = np.argmax(wrong[row])
    line = [names[row], f'{100 * rates[row]:.1f}']
    if teacher is not None:
      right = teacher.confusion[row, row] / counts[row]
      line.append(f'{100 * right:.1f}')
    times = wrong[row, taken]
    line.append(f'{names[taken]} ({times:,})' if times else '')
    cells.append([*line, f'{counts[row]:,}'])
  return cells
