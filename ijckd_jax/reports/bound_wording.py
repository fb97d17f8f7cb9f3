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
    'distribution on which the student was neither trained nor chosen.',
    _terms(report['terms']),
    _bounds(report),
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
  terms = report['terms']
  student, teacher = terms['student_error'], terms['teacher_error']
  without = min(1.0, teacher['upper'] + terms['disagreement']['upper'])
  return markdown.join(
    f'Of {report["labelled"]:,} held-out images the student gets '
    f'{student["value"]:.2%} wrong, and its teacher {teacher["value"]:.2%}.',
    f'With {_confidence(report["delta"])} confidence in all limits together, '
    f"the student's error on images like these is at most "
    f'{student["upper"]:.2%}'
    + (
      f'; from the errors of its teacher and their disagreement alone, without '
      f'labels for the student, at most {without:.2%}.'
      if without < 1
      else '.'
    ),
    _assumption(report),
  )


def _confidence(delta: float) -> str:
  return f'{100 * (1 - delta):.4g}%'


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
