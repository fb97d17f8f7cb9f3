"""What a report of bounds says, in words and tables."""

from collections.abc import Mapping
from typing import Any

from ijckd_jax.runtime import markdown

OF = {
  'student': "student, through the teacher's head",
  'own': 'student, by its own head',
  'deployed': 'student, without its labels',
  'disagreement': 'disagreement',
}


def tell(report: Mapping[str, Any]) -> str:
  """Returns all of a report (certify.report) as Markdown."""
  parts = [
    _gist(report),
    _terms(report),
    _assumption(report),
    _bounds(report),
    _risks(report),
    _left_out(report),
    _unlabelled(report),
  ]
  return '\n\n'.join(filter(None, parts))


def of_deployed(report: Mapping[str, Any]) -> list[Mapping[str, Any]]:
  """Returns the bounds of what the student predicts, the lowest limit first."""
  has_own = 'connected_error' in report['terms']
  chosen = ('own' if has_own else 'student', 'deployed')
  bounds = [b for b in report['bounds'].values() if b['of'] in chosen]
  return sorted(bounds, key=lambda bound: bound['upper'])


def _gist(report) -> str:
  bounds, error = of_deployed(report), report['terms']['student_error']
  vacuous = sum(bound['upper'] >= 1 for bound in bounds)
  best = bounds[0]
  if best['upper'] < 1:
    gist = (
      f"The lowest bound on the student's error is {best['upper']:.2%} "
      f'({best["statement"]}: {best["title"]}); {error["value"]:.2%} were '
      f'measured on {report["labelled"]:,} images.'
    )
  else:
    gist = 'No bound says anything: all of them are above 100%.'
  return markdown.join(
    gist,
    vacuous
    and best['upper'] < 1
    and f'Of {len(bounds)} bounds {vacuous} say nothing: they are above 100%.',
    'With labels, the measured error is the better certificate: the bounds say '
    'where it comes from, and what can be said where there are none.',
    'Everything that is certified holds together with '
    f'{1 - report["delta"]:.0%} confidence ({report["claims"]} limits share '
    'the rest).',
  )


def _terms(report) -> str:
  cells = [['term', 'value', 'at least', 'at most', 'as a', 'labels']]
  for name, term in report['terms'].items():
    is_share = not name.startswith('pad_')
    show = _percent if is_share else _plain
    cells.append(
      [
        f'{term["title"]}{", %" if is_share else ""}',
        *(show(term[name]) for name in ('value', 'lower', 'upper')),
        term['role'],
        'yes' if term['labels'] else 'no',
      ]
    )
  return markdown.grid(cells)


def _percent(value: float | None) -> str:
  return '' if value is None else f'{100 * value:.2f}'


def _plain(value: float | None) -> str:
  return '' if value is None else f'{value:.4f}'


def _assumption(report) -> str:
  """Says what the test of the ideal joint classifier found."""
  gap = report['terms'].get('ijc_gap')
  if gap is None:
    return ''
  fitted = report['joint_head']
  more = 'more' if gap['value'] > 0 else 'fewer'
  num = fitted['examples'] // 2
  found = (
    f'A joint head was fitted on both representations of {num:,} '
    f"training images. The teacher's head makes {abs(gap['value']):.2%} {more} "
    'errors than that, counted on both'
  )
  if gap['lower'] > 0:
    return (
      f'{found}, surely {gap["lower"]:.2%}: **there is a better joint '
      "classifier than the teacher's head, which speaks against taking it for "
      'the ideal one**.'
    )
  return (
    f'{found}{" (which may be chance)" if gap["value"] > 0 else ""}: nothing '
    'here speaks against taking it for the ideal joint classifier.'
  )


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


def _risks(report) -> str:
  cells = [['bound of a loss', 'of', 'measured', 'bound', 'about at most']]
  for risk in report['risks'].values():
    cells.append(
      [
        f'{risk["statement"]}: {risk["title"]}',
        risk['of'],
        *(_plain(risk[name]) for name in ('measured', 'value', 'upper')),
      ]
    )
  return (
    'Losses have no bounded range, so these limits are right for large samples '
    'only (asymptotic), and certify nothing:\n\n' + markdown.grid(cells)
  )


def _left_out(report) -> str:
  return '\n'.join(
    f'- {name} does not apply: {reason}.'
    for name, reason in report['left_out'].items()
  )


def _unlabelled(report) -> str:
  found = report.get('unlabelled')
  if found is None:
    return ''
  cells = [['on the unlabelled images', 'value %', 'at most %']]
  for name, title in (
    ('disagreement', 'student and teacher differ'),
    ('same_distribution', "student's error, if they are like the labelled"),
    ('shifted', "student's error, by Dis² on the teacher"),
    ('student', "student's error, by Dis² on itself"),
    ('shifted_logits', 'the same on the teacher, critics on logits'),
    ('student_logits', 'the same on itself, critics on logits'),
  ):
    limit = found[name]
    cells.append([title, *(_percent(limit[x]) for x in ('value', 'upper'))])
  if 'true_error' in found:
    title = "student's error, by the labels that there are"
    cells.append([title, _percent(found['true_error']), ''])
  return (
    f'{found["examples"]:,} images without labels; each limit by itself holds '
    f'with {1 - found["delta"]:.0%} confidence, those by Dis² if the true '
    'labels are no more adversarial than the critic that was found, which '
    'nothing here can check:\n\n' + markdown.grid(cells)
  )
