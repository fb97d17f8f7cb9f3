"""The bounds, each as a number per example that the student's mistake is below.

A `Bound` gives b >= 1[student wrong] (or >= 1[student and teacher differ]) on
every example, for any head, networks and data, with no assumption. So its mean
is above the error of any finite sample, exactly, and over independent examples
a confidence limit of that mean is one of the error. Proofs are in
docs/theory.md, under the same names; they are stated in the spirit of Ben-David
et al. 2010, "A theory of learning from different domains", Machine Learning
79:151-175, and none is a theorem of the IJCKD paper.
"""

from collections.abc import Callable
import dataclasses

import numpy as np

from ijckd_jax.evaluation import pointwise

# Scales of D8 that are tried, fixed before any data is seen.
SCALES = tuple(2.0**power for power in range(-8, 9))
SQRT2 = 2**0.5


@dataclasses.dataclass(frozen=True)
class Part:
  """What a bound adds up.

  Attributes:
    name: what readers call it.
    kind: whose it is: 'teacher', 'alignment' of the two, 'joint head' or 'own
      head'.
    values: (N,) of each example; the bound is the sum over parts.
  """

  name: str
  kind: str
  values: np.ndarray


@dataclasses.dataclass(frozen=True)
class Bound:
  """A statement that holds example by example.

  Attributes:
    key: its name in reports.
    statement: where docs/theory.md proves it.
    title: what it says, for readers.
    of: 'student', whose mistake it bounds; 'own', the mistake of the student's
      own head; or 'disagreement', that student and teacher predict otherwise.
    parts: `Rows -> Parts`; for those of a family, `(Rows, scale) -> Parts`.
    high: largest value of the sum; the smallest is 0.
    needs: fields that the rows must have.
    with_labels: whether labels are needed.
    scales: of a family, one of which is chosen by the data; none: it is one.
  """

  key: str
  statement: str
  title: str
  of: str
  parts: Callable[..., list[Part]]
  high: int
  needs: tuple[str, ...] = ()
  with_labels: bool = True
  scales: tuple[float, ...] = ()

  def values(self, rows: pointwise.Rows, *scale: float) -> np.ndarray:
    """Returns b of each example, (N,)."""
    return sum(part.values for part in self.parts(rows, *scale))

  def applies(self, rows: pointwise.Rows) -> bool:
    """Returns whether the rows have what it needs."""
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
  """Returns what a bound is above, (N,) int."""
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

  Where it is 0, the example is certified: no z_s as near to z_t is misread.
  Proof: h's margin against each class is 1-Lipschitz in units of the distance
  to the boundary.
  """
  near = _int(rows.label_margin <= _reach(rows.feature_distance))
  outside = _int(rows.label_margin <= 0)
  return [
    Part('teacher wrong', 'teacher', outside),
    Part('student as far off as the boundary', 'alignment', near - outside),
  ]


def flip_margin_parts(rows: pointwise.Rows) -> list[Part]:
  """D7a: 1[h(z_s) != h(z_t)] <= 1[rho(z_t) <= dz]; proof as D7b's."""
  near = _int(rows.flip_margin <= _reach(rows.feature_distance))
  return [Part('student as far off as the boundary', 'alignment', near)]


def logit_margin_parts(rows: pointwise.Rows) -> list[Part]:
  """D7c: 1[s wrong] <= 1[m_y <= min(sqrt(2) ||dl||_2, 2 ||dl||_inf)].

  Any two classifiers with logits; dl = l_s - l_t. Proof: e_y - e_j has l2 norm
  sqrt(2) and l1 norm 2.
  """
  off = np.minimum(SQRT2 * rows.logit_distance, 2 * rows.logit_deviation)
  near = _int(rows.logit_margin <= _reach(off))
  outside = _int(rows.logit_margin <= 0)
  return [
    Part('teacher wrong', 'teacher', outside),
    Part('logits as far off as the margin', 'alignment', near - outside),
  ]


def feature_scale_parts(rows: pointwise.Rows, scale: float) -> list[Part]:
  """D8: 1[h(z_s) != y] <= 1[rho_y(z_t) <= g] + min(1, dz^2 / g^2), any g > 0.

  What the feature loss pays for: by D12, E dz^2 <= C times it where z is the
  average of a map. Proof: D7b; dz > g gives dz^2 / g^2 > 1 (Markov).
  """
  return [
    Part(
      'teacher wrong or unsure', 'teacher', _int(rows.label_margin <= scale)
    ),
    Part(
      'features off',
      'alignment',
      _capped(_reach(rows.feature_distance) / scale),
    ),
  ]


def logit_scale_parts(rows: pointwise.Rows, scale: float) -> list[Part]:
  """D8: 1[s wrong] <= 1[m_y <= g] + min(1, 2 ||dl||^2 / g^2), any g > 0.

  What the logit loss pays for: E ||dl||^2 is K times it. Proof: as before, by
  D7c.
  """
  return [
    Part(
      'teacher wrong or unsure', 'teacher', _int(rows.logit_margin <= scale)
    ),
    Part(
      'logits off',
      'alignment',
      _capped(_reach(SQRT2 * rows.logit_distance) / scale),
    ),
  ]


def soft_parts(rows: pointwise.Rows) -> list[Part]:
  """D11: 1[s wrong] <= 2 (1 - p_s,y) <= 2 (1 - p_t,y) + 2 TV(p_t, p_s).

  Any two classifiers with probabilities. Proof: what is wrong has p_y <= 1/2;
  an event's probabilities differ by TV at most.
  """
  return [
    Part("teacher's doubt", 'teacher', 2 * rows.teacher_soft),
    Part('probabilities off', 'alignment', 2 * rows.total_variation),
  ]


def _int(x) -> np.ndarray:
  return np.asarray(x).astype(np.int32)


def _reach(distance) -> np.ndarray:
  return pointwise.reach(np.asarray(distance, np.float64))


def _capped(x) -> np.ndarray:
  """Returns min(1, x^2) of x >= 0, without overflow."""
  return np.square(np.minimum(np.asarray(x, np.float64), 1.0))


IN_TEACHERS_SPACE = ('feature_distance', 'flip_margin', 'label_margin')
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
    'features as far off as the boundary',
    'student',
    label_margin_parts,
    1,
    needs=IN_TEACHERS_SPACE,
  ),
  Bound(
    'logit_margin',
    'D7c',
    'logits as far off as the margin',
    'student',
    logit_margin_parts,
    1,
  ),
  Bound(
    'feature_scale',
    'D8',
    'teacher unsure, or squared feature distance',
    'student',
    feature_scale_parts,
    2,
    needs=IN_TEACHERS_SPACE,
    scales=SCALES,
  ),
  Bound(
    'logit_scale',
    'D8',
    'teacher unsure, or squared logit distance',
    'student',
    logit_scale_parts,
    2,
    scales=SCALES,
  ),
  Bound(
    'soft',
    'D11',
    "twice the teacher's doubt and the distance of probabilities",
    'student',
    soft_parts,
    4,
  ),
  Bound(
    'flip_margin',
    'D7a',
    'features as far off as the boundary',
    'disagreement',
    flip_margin_parts,
    1,
    needs=IN_TEACHERS_SPACE,
    with_labels=False,
  ),
)
