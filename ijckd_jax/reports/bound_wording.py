"""What a report of bounds says, in words and tables."""

from collections.abc import Mapping
from typing import Any

from ijckd_jax.runtime import markdown

OF = {
  'student': "student, through the teacher's head",
  'own': 'student, by its own head',
  'disagreement': 'disagreement',
}
# Terms of the short table, in its order.
SHORT = (
  'student_error',
  'teacher_error',
  'disagreement',
  'harm',
  'help',
  'ijc_gap',
)


def brief(report: Mapping[str, Any]) -> str:
  """Returns the result of a report (certify.report) for practitioners.

  At most three sentences and six rows, in Markdown.
  """
  terms = report['terms']
  shown = {name: terms[name] for name in SHORT if name in terms}
  return '\n\n'.join([_gist(report), _terms(shown)])


def full(report: Mapping[str, Any]) -> str:
  """Returns all terms and bounds of a report, and what does not apply."""
  said = [
    f'All {report["claims"]} limits hold together with '
    f'{_confidence(report["delta"])} confidence, for images of the same '
    'distribution on which nothing was trained or chosen.',
    *_held_out(report),
    _terms(report['terms']),
    _bounds(report),
    'The most images that the student can answer so that the error of its '
    'answers is at most a target:',
    _selective(report),
    *(
      f'{name} does not apply: {reason}.'
      for name, reason in report['left_out'].items()
    ),
  ]
  return '\n\n'.join(said)


def unlabelled(found: Mapping[str, Any]) -> str:
  """Returns what shift.bound found, in Markdown."""
  cells = [['on the unlabelled images', 'value %', 'at most %']]
  for name, title in (
    ('disagreement', 'student and teacher differ'),
    ('same_distribution', "student's error, if they are like the labelled"),
    ('shifted', "student's error, by Dis²"),
  ):
    limit = found[name]
    cells.append([title, *(_percent(limit[x]) for x in ('value', 'upper'))])
  if 'true_error' in found:
    title = "student's error, by the labels that there are"
    cells.append([title, _percent(found['true_error']), ''])
  return (
    f'On {found["examples"]:,} images without labels, these limits hold '
    f'together with {_confidence(found["delta"])} confidence, if the student '
    'was not trained on them. The limit by Dis² also assumes that the true '
    'labels are no more adversarial than the critic that was found, which '
    'cannot be checked.\n\n' + markdown.grid(cells)
  )


def of_deployed(report: Mapping[str, Any]) -> list[Mapping[str, Any]]:
  """Returns the bounds of the student's prediction, the lowest limit first."""
  chosen = 'own' if 'connected_error' in report['terms'] else 'student'
  bounds = [b for b in report['bounds'].values() if b['of'] == chosen]
  return sorted(bounds, key=lambda bound: bound['upper'])


def _gist(report) -> str:
  student, teacher = (
    report['terms'][f'{who}_error'] for who in ('student', 'teacher')
  )
  return markdown.join(
    f'Of {report["labelled"]:,} held-out images the student gets '
    f'{student["value"]:.2%} wrong, and its teacher {teacher["value"]:.2%}; of '
    f'all images like these, the student gets at most {student["upper"]:.2%} '
    f'wrong, with {_confidence(report["delta"])} confidence in all limits '
    'together.',
    _answers(report),
    _assumption(report),
  )


def _answers(report) -> str:
  """Says how many images can be answered with few errors."""
  found = [one for one in report['selective'] if one['answered']]
  if not found:
    return ''
  best = found[0]
  if best['answered'] == 1:
    return ''  # The limit of its error says as much.
  return (
    'If it answers only where its confidence is above '
    f'{best["threshold"]:.3f}, which is on {best["answered"]:.0%} of the '
    f'images, at most {best["target"]:.0%} of the answers are wrong.'
  )


def _selective(report) -> str:
  cells = [
    ['target error %', 'answered %', 'confidence above', 'wrong %', 'at most %']
  ]
  for one in report['selective']:
    numbers = ['0', '', '', '']
    if one['answered']:
      numbers = [
        f'{100 * one["answered"]:.0f}',
        f'{one["threshold"]:.3f}',
        _percent(one['error']),
        _percent(one['upper']),
      ]
    cells.append([f'{100 * one["target"]:.0f}', *numbers])
  return markdown.grid(cells)


def _confidence(delta: float) -> str:
  return f'{100 * (1 - delta):.4g}%'


def _held_out(report) -> list[str]:
  """Returns sentences about copies of images, and about choices on them."""
  said = []
  copies = report.get('copies')
  if copies is not None:
    said.append(
      f'Of {copies["images"]:,} images, {copies["repeated"]:,} repeat an '
      f'earlier one{_trained(copies)}; the numbers are of the '
      f'{copies["distinct"]:,} others.'
    )
  if report['choices'] > 1:
    said.append(
      f'Student and teacher are the best of {report["choices"]:,} pairs of '
      'checkpoints on these images, and each limit allows for that choice.'
    )
  return said


def _trained(copies) -> str:
  if copies['trained'] is None:
    return ' (copies of training images were not looked for)'
  return f' and {copies["trained"]:,} are training images'


def _assumption(report) -> str:
  """Says what the test of the ideal joint classifier found."""
  gap = report['terms'].get('ijc_gap')
  if gap is None:
    return ''
  if gap['lower'] > 0:
    return (
      '**A head that was fitted on both representations makes at least '
      f"{gap['lower']:.2%} fewer errors on them than the teacher's head, which "
      'speaks against taking that for the ideal joint classifier.**'
    )
  return (
    'A head that was fitted on both representations is not surely better than '
    "the teacher's head: nothing here speaks against taking that for the ideal "
    'joint classifier.'
  )


def _terms(terms) -> str:
  cells = [['%', 'value', 'at least', 'at most']]
  for term in terms.values():
    numbers = (_percent(term[name]) for name in ('value', 'lower', 'upper'))
    cells.append([term['title'], *numbers])
  return markdown.grid(cells)


def _percent(value: float) -> str:
  return f'{100 * value:.2f}'


def _bounds(report) -> str:
  cells = [['bound', 'of', 'measured %', 'bound %', 'at most %']]
  for bound in report['bounds'].values():
    cells.append(
      [
        f'{bound["statement"]}: {bound["title"]}',
        OF[bound['of']],
        _percent(bound['measured']),
        _percent(bound['value']),
        'vacuous' if bound['upper'] >= 1 else _percent(bound['upper']),
      ]
    )
  return markdown.grid(cells)
