"""Bounds of losses, which have no bounded range: D9 to D12.

Their means are above what they bound on any finite sample, exactly; their
limits are right for large samples only, and certify nothing.
"""

import math
from typing import Any

import numpy as np

from ijckd_jax.bounds import limits
from ijckd_jax.evaluation import pointwise

ROLE = 'asymptotic'


def bound(
  rows: pointwise.Rows,
  all_rows: pointwise.Rows,
  head: pointwise.Head | None,
  map_square: np.ndarray | None,
  delta: float,
) -> dict[str, dict[str, Any]]:
  """Returns what losses are at most, by name, JSON.

  Args:
    rows: the labelled ones.
    all_rows: these, and those without a label.
    head: the teacher's, where the student is seen in its space; else None.
    map_square: as certify.Sample has it, of all rows; or None.
    delta: of each limit.

  Returns:
    'title', 'statement', 'of' (what is bounded), its 'measured' mean, the
    bound's 'value', 'lower' and 'upper' limits, and 'role'.
  """
  rows = {
    name: np.asarray(value, np.float64)
    for name, value in vars(rows).items()
    if value is not None
  }
  nll, square = rows['student_nll'], np.square(rows['logit_distance'])

  def mean_of(title, statement, of, measured, values):
    lower, upper = limits.asymptotic(values, delta)
    return {
      'title': title,
      'statement': statement,
      'of': of,
      'measured': float(measured.mean()),
      'value': float(values.mean()),
      'lower': lower,
      'upper': upper,
      'role': ROLE,
    }

  def by_brier(teacher, brier, square):
    return teacher + np.sqrt(brier * square) + square / 4

  columns = [rows['teacher_nll'], rows['brier'], square]
  wrong = (rows['student'] != rows['label']).astype(np.float64)
  risks = {
    'nll_range': mean_of(
      "teacher's NLL, and the range of the logits' difference",
      'D9',
      'NLL',
      nll,
      rows['teacher_nll'] + rows['logit_range'],
    ),
    'nll_brier': {
      'title': "teacher's NLL, its Brier score and squared logit distance",
      'statement': 'D10',
      'of': 'NLL',
      'measured': float(nll.mean()),
      'value': float(by_brier(*(x.mean() for x in columns))),
      'lower': None,
      'upper': limits.bootstrap_upper(columns, by_brier, delta),
      'role': ROLE,
    },
    'error_nll': mean_of(
      "student's NLL over log 2", 'D10', 'error', wrong, nll / math.log(2)
    ),
    'kl_square': mean_of(
      'squared logit distance over 4', 'D10', 'KL', rows['kl'], square / 4
    ),
  }
  if head is not None:
    distance = float(head.largest_distance) * rows['feature_distance']
    risks['nll_features'] = mean_of(
      "teacher's NLL, and L_D times the feature distance",
      'D9',
      'NLL',
      nll,
      rows['teacher_nll'] + distance,
    )
    risks['soft_features'] = mean_of(
      "teacher's doubt, and L_D / 4 times the feature distance",
      'D11',
      'doubt',
      rows['student_soft'],
      rows['teacher_soft'] + distance / 4,
    )
  if map_square is not None:
    risks['feature_map'] = mean_of(
      'squared distance of maps, mean over positions',
      'D12',
      'squared feature distance',
      np.square(np.asarray(all_rows.feature_distance, np.float64)),
      np.asarray(map_square, np.float64),
    )
  return risks
