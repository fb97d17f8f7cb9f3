"""Terms and bounds of a pair on held-out examples, with confidence limits.

All limits of a report hold together with probability 1 - delta: each of m
limits is taken at delta / m.
"""

import dataclasses
from typing import Any

import numpy as np

from ijckd_jax.bounds import limits
from ijckd_jax.bounds import selective
from ijckd_jax.bounds import statements
from ijckd_jax.evaluation import pointwise


@dataclasses.dataclass(frozen=True)
class Term:
  """A mean over examples that is reported with a lower and an upper limit.

  Attributes:
    title: name for readers.
    statement: name of the statement in docs/theory.md that it belongs to.
    values: (N,), one for each example.
    low: smallest possible value.
    high: largest possible value.
    with_labels: whether labels are needed.
  """

  title: str
  statement: str
  values: np.ndarray
  low: int
  high: int
  with_labels: bool = True


def terms(rows: pointwise.Rows) -> dict[str, Term]:
  """Returns the terms of the bounds by name."""
  labelled = rows.labelled
  deployed = statements.own_wrong(labelled)
  teacher = statements.teacher_wrong(labelled)
  own = rows.own if rows.own is not None else rows.student
  found = {
    'teacher_error': Term("teacher's error", 'D1', teacher, 0, 1),
    'student_error': Term("student's error", 'D1', deployed, 0, 1),
  }
  if rows.own is not None:
    found['connected_error'] = Term(
      "student's error through the teacher's head",
      'D2',
      statements.student_wrong(labelled),
      0,
      1,
    )
  found |= {
    'disagreement': Term(
      'student and teacher differ',
      'D1',
      (np.asarray(own) != rows.teacher).astype(np.int32),
      0,
      1,
      with_labels=False,
    ),
    'harm': Term(
      'only the teacher is right', 'D1', deployed * (1 - teacher), 0, 1
    ),
    'help': Term(
      'only the student is right', 'D1', teacher * (1 - deployed), 0, 1
    ),
    'gap': Term(
      "student's error minus the teacher's", 'D1', deployed - teacher, -1, 1
    ),
  }
  if rows.joint_teacher is not None:
    wrong = [
      (np.asarray(x) != labelled.label).astype(np.int32)
      for x in (labelled.joint_teacher, labelled.joint_student)
    ]
    found |= {
      'joint_error': Term(
        "joint head's errors on both features, lambda",
        'D3',
        wrong[0] + wrong[1],
        0,
        2,
      ),
      'ijc_gap': Term(
        "errors on both features, teacher's head minus joint head",
        'D6',
        statements.joint_gap(labelled),
        -2,
        2,
      ),
      'discrepancy': Term(
        'signed discrepancy to the joint head',
        'D3',
        statements.discrepancy(rows),
        -1,
        1,
        with_labels=False,
      ),
    }
  return found


def report(
  rows: pointwise.Rows,
  delta: float,
  own_rows: pointwise.Rows | None = None,
  choices: int = 1,
) -> dict[str, Any]:
  """Returns everything that held-out examples say of a pair, as JSON.

  Args:
    rows: held-out examples; at least one has a label. If the student has a
      connector and predicts by a head of its own, these rows are the student
      through the teacher's head, and their field `own` is its own prediction.
    delta: probability that any of the limits fails.
    own_rows: in that case, the teacher and the student's own logits.
    choices: number of pairs of checkpoints among which this one was chosen on
      these examples. Each limit is computed at delta / (claims * choices), so
      that it holds for whichever pair was chosen.

  Returns:
    'delta'; 'choices'; 'claims', the number of limits of each choice;
    'examples' and 'labelled', their numbers; 'terms' by name: 'title',
    'statement', 'value', 'lower', 'upper', 'labels' (whether they are needed);
    'bounds' by name:
    'title', 'statement', 'of', 'measured' (the bounded quantity), 'value',
    'upper', 'parts' and 'labels'; and 'selective', see selective.answer.

  Raises:
    ValueError: no example has a label, or only one of `rows.own` and `own_rows`
      is given.
  """
  if (rows.own is None) != (own_rows is None):
    raise ValueError('give own_rows for rows with own, and only for these')
  labelled = rows.labelled
  if not len(labelled):
    raise ValueError('no example has a label')
  found = terms(rows)
  chosen = [(b.key, b, rows) for b in statements.BOUNDS if b.applies(rows)]
  if own_rows is not None:
    chosen += [
      (f'own_{b.key}', dataclasses.replace(b, of='own'), own_rows)
      for b in statements.BOUNDS
      if b.of == 'student' and b.applies(own_rows)
    ]
  num_claims = 2 * len(found) + len(chosen) + len(selective.SHARES)
  share = limits.shared(delta, num_claims * choices)
  deployed = (rows if own_rows is None else own_rows).labelled
  result: dict[str, Any] = {
    'delta': delta,
    'choices': choices,
    'claims': num_claims,
    'examples': len(rows),
    'labelled': len(labelled),
    'terms': {name: _term(term, share) for name, term in found.items()},
    'bounds': {
      key: _bound(bound, of.labelled if bound.with_labels else of, share)
      for key, bound, of in chosen
    },
    'selective': selective.answer(
      statements.student_wrong(deployed),
      np.asarray(deployed.confidence),
      share * len(selective.SHARES),
    ),
  }
  # D1 adds two terms, whose limits hold together with its own.
  added = sum(
    result['terms'][name]['upper'] for name in ('teacher_error', 'disagreement')
  )
  paired = result['bounds']['paired' if own_rows is None else 'own_paired']
  paired['upper'] = min(paired['upper'], added)
  return result


def _term(term: Term, delta: float) -> dict[str, Any]:
  lower, upper = limits.of_mean(
    term.values, delta, low=term.low, high=term.high
  )
  return {
    'title': term.title,
    'statement': term.statement,
    'value': float(np.mean(term.values, dtype=np.float64)),
    'lower': lower,
    'upper': upper,
    'labels': term.with_labels,
  }


def _bound(
  bound: statements.Bound, rows: pointwise.Rows, delta: float
) -> dict[str, Any]:
  values = bound.values(rows)
  _, upper = limits.of_mean(values, delta, low=0, high=bound.high)
  return {
    'title': bound.title,
    'statement': bound.statement,
    'of': bound.of,
    'measured': float(statements.bounded(bound, rows).mean()),
    'value': float(values.mean(dtype=np.float64)),
    'upper': upper,
    'parts': [
      {
        'name': part.name,
        'kind': part.kind,
        'value': float(part.values.mean(dtype=np.float64)),
      }
      for part in bound.parts(rows)
    ],
    'labels': bound.with_labels,
  }
