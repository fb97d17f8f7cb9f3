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
  'gap',
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
    "Bounds on the student's error say where it comes from. With labels, its "
    'own limit, above, is all that is needed.',
    _bounds(report),
    'How many images the student can answer, if it only answers where its '
    'own confidence is high, so that the error of its answers is surely within '
    'a target:',
    _selective(report),
    *(
      f'Not measured, {name}: {reason}.'
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
    if limit is None:  # Too few images.
      continue
    cells.append([title, *(_percent(limit[x]) for x in ('value', 'upper'))])
  calibrated, said = found.get('calibrated'), ''
  if calibrated is not None:
    title = "student's error, calibrated"
    cells.append(
      [title, *(_percent(calibrated[x]) for x in ('value', 'upper'))]
    )
    said = (
      ' The calibrated estimate is valid only if these images could have been '
      f'one more of the {calibrated["known"]} known shifts, of '
      f'{calibrated["families"]} kinds. It aims at '
      f'{_confidence(calibrated["delta"])} of such shifts, and is no bound.'
    )
  if 'true_error' in found:
    title = "student's error, by the labels that there are"
    cells.append([title, _percent(found['true_error']), ''])
  copies = f'{_copies(found["copies"])} ' if 'copies' in found else ''
  return (
    f'{copies}On these {found["examples"]:,} images without '
    'labels, the limits below and all others of this report hold together with '
    f'{_confidence(found["delta"])} confidence, if the student was not trained '
    'on them. The limit by Dis² also assumes that the '
    "student's true errors grow no more than the critic's disagreement, which "
    f'cannot be checked.{said}\n\n' + markdown.grid(cells)
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
    f'The student gets {student["value"]:.2%} of {report["labelled"]:,} '
    'held-out images '
    f'wrong, and its teacher {teacher["value"]:.2%}; on new '
    'images from the same source the student gets at most '
    f'{student["upper"]:.2%} wrong, with {_confidence(report["delta"])} '
    'confidence that all limits of this report hold at once.',
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
    f'{best["threshold"]:.9g}, which is on {best["answered"]:.0%} of the '
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
        # All digits: the limit is about this threshold, and no other.
        f'{one["threshold"]:.9g}',
        _percent(one['error']),
        _percent(one['upper']),
      ]
    cells.append([f'{100 * one["target"]:.0f}', *numbers])
  return markdown.grid(cells)


def _confidence(delta: float) -> str:
  return f'{100 - 100 * delta:.12g}%'


def _held_out(report) -> list[str]:
  """Returns sentences about copies of images, and about choices on them."""
  said = []
  copies = report.get('copies')
  if copies is not None:
    said.append(_copies(copies))
  if report.get('choices', 1) > 1:
    said.append(
      'Student and teacher were chosen on these images, among up to '
      f'{report["choices"]:,} pairs of checkpoints, and each limit allows for '
      'that choice.'
    )
  return said


def _copies(copies) -> str:
  """Says how many images repeat others, or were trained on."""
  if copies['kept'] == copies['images']:
    said = f'None of the {copies["images"]:,} images repeats another, and none'
  else:
    said = (
      f'Of {copies["images"]:,} images, {copies["repeated"]:,} repeat another '
      f'one and {copies["trained"]:,} are training images. All numbers are of '
      f'the other {copies["kept"]:,}: each image counts once, and none'
    )
  said += ' is an exact copy of a training image'
  if copies['unknown']:
    said += (
      ', as far as is known (training sets that could not be compared: '
      f'{copies["unknown"]})'
    )
  return f'{said}.'


def _assumption(report) -> str:
  """Says what the test of the ideal joint classifier found."""
  gap = report['terms'].get('ijc_gap')
  if gap is None:
    return ''
  head = 'A joint head, which is fitted on the features of both, makes '
  if gap['lower'] > 0:
    return (
      f"**{head}surely fewer errors on them than the teacher's head, which "
      'therefore is not the ideal joint classifier.**'
    )
  if gap['upper'] < 0:
    return (
      f"{head}surely more errors on them than the teacher's head, so that "
      'nothing speaks against taking that as the ideal joint classifier.'
    )
  return (
    f'{head}neither surely fewer nor surely more errors on them than the '
    "teacher's head: these images cannot tell which one is better."
  )


def _terms(terms) -> str:
  cells = [['%', 'measured', 'truly at least', 'truly at most']]
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
