"""What can be claimed of a pair from held-out examples, and how surely.

Everything that is certified here holds together with probability 1 - delta:
each of m limits is taken at delta / m.
"""

from collections.abc import Mapping
import dataclasses
from typing import Any

import numpy as np

from ijckd_jax.bounds import limits
from ijckd_jax.bounds import risks
from ijckd_jax.bounds import statements
from ijckd_jax.evaluation import pointwise

# How surely a number is known.
CERTIFICATE = 'certificate'  # By a limit that holds for any distribution.
DIAGNOSTIC = 'diagnostic'  # A lower estimate of something larger.

DIAGNOSTIC_TITLES = {
  'pad_features': 'proxy A-distance of the features',
  'pad_logits': 'proxy A-distance of the logits',
  'disparity': "disparity of the teacher's head",
}


@dataclasses.dataclass(frozen=True)
class Sample:
  """Held-out examples of a pair, and what was fixed before they were seen.

  Attributes:
    rows: of teacher and student. Where the student predicts by a head of its
      own and has a connector too, `rows` is the student through the teacher's
      head, with `own` filled in.
    own_rows: in that case, of the teacher and the student's own logits.
    head: the teacher's, where the student is seen in its space; else None.
    map_square: mean over positions of ||F_s - F_t||^2, (N,), where z is the
      average of a map; else None.
    diagnostics: of each, a number per example whose mean is a lower estimate,
      and the range of these: {name: (values, low, high)}.
    left_out: why what is missing does not apply, by name.
  """

  rows: pointwise.Rows
  own_rows: pointwise.Rows | None = None
  head: pointwise.Head | None = None
  map_square: np.ndarray | None = None
  diagnostics: Mapping[str, tuple[np.ndarray, float, float]] = (
    dataclasses.field(default_factory=dict)
  )
  left_out: Mapping[str, str] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Term:
  """A mean over examples, to be claimed.

  Attributes:
    title: what it is, for readers.
    statement: where docs/theory.md speaks of it.
    values: (N,) of each example.
    low, high: their range.
    sides: 'both', 'lower' or 'upper' limits.
    with_labels: whether labels are needed.
    role: CERTIFICATE or DIAGNOSTIC.
  """

  title: str
  statement: str
  values: np.ndarray
  low: float
  high: float
  sides: str = 'both'
  with_labels: bool = True
  role: str = CERTIFICATE

  @property
  def num_claims(self) -> int:
    """How many limits it takes."""
    return 2 if self.sides == 'both' else 1


def terms(sample: Sample) -> dict[str, Term]:
  """Returns the means that the bounds are made of, by name."""
  rows, labelled = sample.rows, sample.rows.labelled
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
      "student's error less the teacher's", 'D1', deployed - teacher, -1, 1
    ),
  }
  if rows.joint_teacher is not None:
    wrong = [
      (np.asarray(x) != labelled.label).astype(np.int32)
      for x in (labelled.joint_teacher, labelled.joint_student)
    ]
    found |= {
      'joint_error': Term(
        "joint head's errors on both, lambda", 'D3', wrong[0] + wrong[1], 0, 2
      ),
      'ijc_gap': Term(
        "teacher's head's errors on both, less the joint head's",
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
  if rows.feature_distance is not None:
    far, farther = (
      pointwise.reach(x.feature_distance) for x in (labelled, rows)
    )
    found |= {
      'certified': Term(
        'right by margin: certified',
        'D7b',
        (labelled.label_margin > far).astype(np.int32),
        0,
        1,
      ),
      'certified_agreement': Term(
        'agrees by margin: certified',
        'D7a',
        (rows.flip_margin > farther).astype(np.int32),
        0,
        1,
        with_labels=False,
      ),
    }
  for name, (values, low, high) in sample.diagnostics.items():
    found[name] = Term(
      DIAGNOSTIC_TITLES[name],
      'D13',
      values,
      low,
      high,
      sides='lower',
      with_labels=False,
      role=DIAGNOSTIC,
    )
  return found


def report(sample: Sample, delta: float) -> dict[str, Any]:
  """Returns all that can be said of a pair, JSON.

  Args:
    sample: held-out examples; at least one has a label.
    delta: probability that any of the certified limits fails.

  Returns:
    'delta', 'claims' (how many limits share it), 'examples', 'labelled';
    'terms' by name: 'title', 'statement', 'value', 'lower', 'upper', 'role',
    'labels' (whether it needs them); 'bounds' by name: the same, with 'of',
    'measured' (what it bounds), 'parts' and for families the 'scale'; 'risks':
    the same of losses that have no bounded range; 'head', its constants; and
    'left_out', why what is missing does not apply.

  Raises:
    ValueError: no example has a label.
  """
  rows = sample.rows
  labelled = rows.labelled
  if not len(labelled):
    raise ValueError('no example has a label')
  found = terms(sample)
  chosen = [(b.key, b, rows) for b in statements.BOUNDS if b.applies(rows)]
  if sample.own_rows is not None:
    chosen += [
      (f'own_{b.key}', dataclasses.replace(b, of='own'), sample.own_rows)
      for b in statements.BOUNDS
      if b.of == 'student' and b.applies(sample.own_rows)
    ]
  num_claims = sum(term.num_claims for term in found.values()) + len(chosen) + 1
  share = limits.shared(delta, num_claims)
  result = {
    'delta': delta,
    'claims': num_claims,
    'examples': len(rows),
    'labelled': len(labelled),
    'terms': {name: _term(term, share) for name, term in found.items()},
    'bounds': {
      key: _bound(bound, of.labelled if bound.with_labels else of, share)
      for key, bound, of in chosen
    },
    'risks': risks.bound(
      labelled, sample.rows, sample.head, sample.map_square, share
    ),
    'left_out': dict(sample.left_out),
  }
  result['bounds']['label_free'] = _label_free(found, share)
  if sample.head is not None:
    result['head'] = {
      'spectral_norm': float(sample.head.spectral_norm),
      'largest_distance': float(sample.head.largest_distance),
    }
  return result


def _term(term: Term, delta: float) -> dict[str, Any]:
  lower, upper = limits.of_mean(
    term.values, delta, low=term.low, high=term.high
  )
  return {
    'title': term.title,
    'statement': term.statement,
    'value': float(np.mean(term.values, dtype=np.float64)),
    'lower': lower if term.sides != 'upper' else None,
    'upper': upper if term.sides != 'lower' else None,
    'role': term.role,
    'labels': term.with_labels,
  }


def _bound(bound, rows, delta: float) -> dict[str, Any]:
  """Returns a bound, of a family the one with the lowest limit."""
  scales = [(scale,) for scale in bound.scales] or [()]
  tried = []
  for scale in scales:
    values = bound.values(rows, *scale)
    _, upper = limits.of_mean(
      values, delta / len(scales), low=0, high=bound.high
    )
    tried.append((upper, float(values.mean(dtype=np.float64)), scale))
  upper, value, scale = min(tried)
  measured = statements.bounded(bound, rows)
  return {
    'title': bound.title,
    'statement': bound.statement,
    'of': bound.of,
    'measured': float(measured.mean()),
    'value': value,
    'upper': upper,
    'parts': [
      _part(part.name, part.kind, part.values)
      for part in bound.parts(rows, *scale)
    ],
    'scale': scale[0] if scale else None,
    'role': CERTIFICATE,
    'labels': bound.with_labels,
  }


def _part(name: str, kind: str, values: np.ndarray) -> dict[str, Any]:
  value = float(values.mean(dtype=np.float64))
  return {'name': name, 'kind': kind, 'value': value}


def _label_free(found: Mapping[str, Term], delta: float) -> dict[str, Any]:
  """Returns what would bound the student's error without its labels."""
  teacher, differ = found['teacher_error'].values, found['disagreement'].values
  parts = [
    _part('teacher wrong', 'teacher', teacher),
    _part('student disagrees', 'alignment', differ),
  ]
  return {
    'title': "teacher's error, and disagreement without labels",
    'statement': 'D1',
    'of': 'deployed',
    'measured': float(found['student_error'].values.mean()),
    'value': sum(part['value'] for part in parts),
    'upper': limits.label_free(
      int(teacher.sum()), len(teacher), int(differ.sum()), len(differ), delta
    ),
    'parts': parts,
    'scale': None,
    'role': CERTIFICATE,
    'labels': False,
  }


def by_class(rows: pointwise.Rows) -> dict[str, np.ndarray]:
  """Returns terms of each class that has a labelled example.

  Args:
    rows: held-out examples.

  Returns:
    'class' and 'examples' (k,) int; 'teacher_error', 'student_error', 'harm',
    'disagreement', and where there is a joint head 'ijc_gap' and its standard
    error 'ijc_gap_error', (k,) float.
  """
  rows = rows.labelled
  classes, which = np.unique(rows.label, return_inverse=True)
  counts = np.bincount(which)

  def means(values):
    return np.bincount(which, weights=values) / counts

  student = statements.own_wrong(rows)
  teacher = statements.teacher_wrong(rows)
  deployed = rows.student if rows.own is None else rows.own
  result = {
    'class': classes,
    'examples': counts,
    'teacher_error': means(teacher),
    'student_error': means(student),
    'harm': means(student * (1 - teacher)),
    'disagreement': means(np.asarray(deployed) != rows.teacher),
  }
  if rows.joint_teacher is not None:
    gap = statements.joint_gap(rows).astype(np.float64)
    mean = means(gap)
    variance = np.maximum(means(np.square(gap)) - np.square(mean), 0)
    result['ijc_gap'] = mean
    result['ijc_gap_error'] = np.sqrt(variance / counts)
  return result
