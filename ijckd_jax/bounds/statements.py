"""Each bound as a per-example upper limit on the student's mistake.

A `Bound` gives b >= 1[student wrong] (or >= 1[student and teacher differ]) on
every example, for any head, networks and data, without an assumption. The mean
of b is therefore above the error on any finite sample, and over independent
examples a confidence limit of that mean is a limit of the error. docs/theory.md
has the proofs under the same names. They follow Ben-David et al. 2010, "A
theory of learning from different domains", Machine Learning 79:151-175; none is
a theorem of the IJCKD paper.
"""

from collections.abc import Callable
import dataclasses

import numpy as np

from ijckd_jax.evaluation import pointwise


@dataclasses.dataclass(frozen=True)
class Part:
  """A summand of a bound.

  Attributes:
    name: shown to readers.
    kind: the source of this part of the error: 'teacher', 'alignment' of
      student and teacher, 'joint head' or 'own head'.
    values: (N,), one for each example.
  """

  name: str
  kind: str
  values: np.ndarray


@dataclasses.dataclass(frozen=True)
class Bound:
  """A statement that holds example by example.

  Attributes:
    key: name in reports.
    statement: name in docs/theory.md, which proves it.
    title: the statement in words, for readers.
    of: the bounded quantity: 'student', the mistakes of the student through the
      teacher's head; 'own', those of the student's own head; 'disagreement',
      the examples on which student and teacher predict different classes.
    parts: `Rows -> Parts`, whose sum is the bound.
    high: largest value of the sum; the smallest is 0.
    needs: fields that the rows must have.
    with_labels: whether labels are needed.
  """

  key: str
  statement: str
  title: str
  of: str
  parts: Callable[[pointwise.Rows], list[Part]]
  high: int
  needs: tuple[str, ...] = ()
  with_labels: bool = True

  def values(self, rows: pointwise.Rows) -> np.ndarray:
    """Returns b of each example, (N,)."""
    return sum(part.values for part in self.parts(rows))

  def applies(self, rows: pointwise.Rows) -> bool:
    """Returns whether the rows have the fields that the bound needs."""
    return all(getattr(rows, name) is not None for name in self.needs)


def student_wrong(rows: pointwise.Rows) -> np.ndarray:
  """Returns 1[h(z_s) != y], (N,) int."""
  return _int(rows.student != rows.label)


def teacher_wrong(rows: pointwise.Rows) -> np.ndarray:
  """Returns 1[h(z_t) != y], (N,) int."""
  return _int(rows.teacher != rows.label)


def differ(rows: pointwise.Rows) -> np.ndarray:
  """Returns 1[h(z_s) != h(z_t)], (N,) int."""
  return _int(rows.student != rows.teacher)


def own_wrong(rows: pointwise.Rows) -> np.ndarray:
  """Returns 1[deployed prediction != y], (N,) int."""
  deployed = rows.student if rows.own is None else rows.own
  return _int(deployed != rows.label)


def bounded(bound: Bound, rows: pointwise.Rows) -> np.ndarray:
  """Returns the quantity that a bound limits, (N,) int."""
  of = {'student': student_wrong, 'own': own_wrong, 'disagreement': differ}
  return of[bound.of](rows)


def paired_parts(rows: pointwise.Rows) -> list[Part]:
  """D1: 1[s wrong] <= 1[t wrong] + 1[s and t differ].

  Any two classifiers of paired inputs. Proof: the triangle inequality of the
  discrete metric.
  """
  return [
    Part('teacher wrong', 'teacher', teacher_wrong(rows)),
    Part('student disagrees', 'alignment', differ(rows)),
  ]


def own_head_parts(rows: pointwise.Rows) -> list[Part]:
  """D2: 1[own wrong] <= 1[t wrong] + 1[own != h(z_s)] + 1[h(z_s) != h(z_t)].

  For a student that predicts by its own head and has a connector to the
  teacher's. Proof: D1's triangle, twice.
  """
  return [
    Part('teacher wrong', 'teacher', teacher_wrong(rows)),
    Part('student disagrees', 'alignment', differ(rows)),
    Part(
      "own head differs from the teacher's",
      'own head',
      _int(rows.own != rows.student),
    ),
  ]


def joint_parts(rows: pointwise.Rows) -> list[Part]:
  """D3: 1[h(z_s) != y] <= 1[h(z_t) != y] + lambda_r + Delta_r.

  lambda_r = 1[r(z_t) != y] + 1[r(z_s) != y] is what the joint head r costs, and
  Delta_r = 1[h(z_s) != r(z_s)] - 1[h(z_t) != r(z_t)] the signed discrepancy.
  Any head r fixed before the examples are seen; r = h says nothing. Above by 2
  lambda_r at most. Source: Ben-David et al. 2010, Theorem 2, for one reference.
  """
  joint_error = _int(rows.joint_teacher != rows.label) + _int(
    rows.joint_student != rows.label
  )
  return [
    Part('teacher wrong', 'teacher', teacher_wrong(rows)),
    Part('joint head wrong, on both', 'joint head', joint_error),
    Part('discrepancy', 'alignment', discrepancy(rows)),
  ]


def discrepancy(rows: pointwise.Rows) -> np.ndarray:
  """Returns Delta_r = 1[h(z_s) != r(z_s)] - 1[h(z_t) != r(z_t)], (N,) int."""
  return _int(rows.student != rows.joint_student) - _int(
    rows.teacher != rows.joint_teacher
  )


def joint_gap(rows: pointwise.Rows) -> np.ndarray:
  """Returns eta_r, h's errors on both representations less r's, (N,) int.

  D6: of a mean clearly above 0, the trained r is a better joint classifier than
  the teacher's head, which is evidence against the assumption that the
  teacher's head is the ideal one.
  """
  wrong = [
    _int(predicted != rows.label)
    for predicted in (
      rows.teacher,
      rows.student,
      rows.joint_teacher,
      rows.joint_student,
    )
  ]
  return wrong[0] + wrong[1] - wrong[2] - wrong[3]


def label_margin_parts(rows: pointwise.Rows) -> list[Part]:
  """D7b: 1[h(z_s) != y] <= 1[rho_y(z_t) <= dz].

  Where it is 0, the example is certified: h reads every z_s as near to z_t
  correctly. dz is measured in the span of the differences w_i - w_j, because
  no other movement changes a prediction. Proof: h's margin against each class
  is 1-Lipschitz in units of the distance to the boundary.
  """
  near = _int(rows.label_margin <= _reach(rows.head_distance))
  outside = _int(rows.label_margin <= 0)
  return [
    Part('teacher wrong', 'teacher', outside),
    Part('student as far off as the boundary', 'alignment', near - outside),
  ]


def flip_margin_parts(rows: pointwise.Rows) -> list[Part]:
  """D7a: 1[h(z_s) != h(z_t)] <= 1[rho(z_t) <= dz]; proof as D7b's."""
  near = _int(rows.flip_margin <= _reach(rows.head_distance))
  return [Part('student as far off as the boundary', 'alignment', near)]


def logit_margin_parts(rows: pointwise.Rows) -> list[Part]:
  """D7c: 1[s wrong] <= 1[m_y <= max_k dl_k - min_k dl_k], dl = l_s - l_t.

  Any two classifiers with logits. Proof: where s prefers j, the gap l_y - l_j
  has shrunk from at least m_y to at most 0, by dl_j - dl_y.
  """
  near = _int(rows.logit_margin <= _reach(rows.logit_range))
  outside = _int(rows.logit_margin <= 0)
  return [
    Part('teacher wrong', 'teacher', outside),
    Part('logits as far off as the margin', 'alignment', near - outside),
  ]


def soft_parts(rows: pointwise.Rows) -> list[Part]:
  """D11: 1[s wrong] <= 2 (1 - p_s,y) <= 2 (1 - p_t,y) + 2 TV(p_t, p_s).

  Any two classifiers with probabilities. Proof: a wrong prediction has
  p_s,y <= 1/2, and two probabilities of an event differ by TV at most.
  """
  return [
    Part("teacher's doubt", 'teacher', 2 * rows.teacher_soft),
    Part('probabilities off', 'alignment', 2 * rows.total_variation),
  ]


def _int(x) -> np.ndarray:
  return np.asarray(x).astype(np.int32)


def _reach(distance) -> np.ndarray:
  return pointwise.reach(np.asarray(distance, np.float64))


IN_TEACHERS_SPACE = ('head_distance', 'flip_margin', 'label_margin')
BOUNDS = (
  Bound(
    'paired',
    'D1',
    'teacher wrong, or student disagrees',
    'student',
    paired_parts,
    2,
  ),
  Bound(
    'own_head',
    'D2',
    'teacher wrong, or student disagrees, or its two heads do',
    'own',
    own_head_parts,
    3,
    needs=('own',),
  ),
  Bound(
    'joint',
    'D3',
    'teacher wrong, with a trained joint head as reference',
    'student',
    joint_parts,
    4,
    needs=('joint_teacher', 'joint_student'),
  ),
  Bound(
    'label_margin',
    'D7b',
    'teacher wrong, or features moved as far as the boundary',
    'student',
    label_margin_parts,
    1,
    needs=IN_TEACHERS_SPACE,
  ),
  Bound(
    'logit_margin',
    'D7c',
    'teacher wrong, or logits moved as far as the margin',
    'student',
    logit_margin_parts,
    1,
  ),
  Bound(
    'soft',
    'D11',
    "twice the teacher's doubt, and the distance of probabilities",
    'student',
    soft_parts,
    4,
  ),
  Bound(
    'flip_margin',
    'D7a',
    'features moved as far as the boundary',
    'disagreement',
    flip_margin_parts,
    1,
    needs=IN_TEACHERS_SPACE,
    with_labels=False,
  ),
)
