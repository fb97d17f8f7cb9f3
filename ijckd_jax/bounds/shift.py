"""What can be said of a student on images without labels.

Of images like the labelled ones, by the teacher's error there and how often the
student disagrees here. Of images that are otherwise, only under an assumption,
which divergence.dis2 states.
"""

from typing import Any

import numpy as np

from ijckd_jax.bounds import divergence
from ijckd_jax.bounds import limits
from ijckd_jax.runtime import config_utils

SPLIT_STREAM = 5  # Of which examples the critics are fitted on.


def bound(
  source: dict[str, Any],
  target: dict[str, Any],
  head: dict[str, np.ndarray],
  own_head: dict[str, np.ndarray] | None,
  *,
  delta: float,
  seed: int,
) -> dict[str, Any]:
  """Returns limits of the student's error on unlabelled images.

  The critics are fitted on one half of either sample, drawn by the seed, and
  measured on the other; disagreement is counted on all of the target.

  Args:
    source: labelled examples, of feature_extraction.of_split, by Pair.view.
    target: the same of examples whose labels are not looked at, but for
      'true_error'.
    head: 'kernel' and 'bias' by which the teacher is read.
    own_head: the same of a student that has its own; else None.
    delta: probability that a limit fails; of each limit by itself.
    seed: of the halves.

  Returns:
    JSON: 'examples' of the target; 'disagreement' there, with 'upper';
    'same_distribution', the student's limit if the target is like the source;
    'shifted', its limit by Dis^2 on the teacher and the disagreement, and
    'teacher', that Dis^2; 'student', by Dis^2 on the student's own
    representation; these three again with '_logits', by critics on logits;
    and 'true_error' of the student and 'true_teacher_error', where the target
    has labels.
  """
  labelled = source['label'] >= 0
  labels = source['label'][labelled]
  teacher = _read(source, target, 'z_t', head)
  where = ('z_s', head) if own_head is None else ('z_own', own_head)
  student = _read(source, target, *where)
  differs = student[1].predicted != teacher[1].predicted
  num = len(differs)
  teacher_wrong = teacher[0].predicted[labelled] != labels
  pi = limits.clopper_pearson_upper(int(differs.sum()), num, delta / 2)
  found, by_teacher = {}, {}
  for on_logits, suffix in ((False, ''), (True, '_logits')):
    how = dict(seed=seed, on_logits=on_logits)
    found[f'teacher{suffix}'] = limit = by_critic(
      *teacher, head, source['label'], delta=delta / 2, **how
    )
    found[f'student{suffix}'] = by_critic(
      *student, own_head or head, source['label'], delta=delta, **how
    )
    by_teacher[f'shifted{suffix}'] = {
      'value': limit['value'] + float(differs.mean()),
      'upper': min(1.0, limit['upper'] + pi),
    }
  result = {
    'examples': num,
    'delta': delta,
    'disagreement': {'value': float(differs.mean()), 'upper': pi},
    'same_distribution': {
      'value': float(teacher_wrong.mean() + differs.mean()),
      'upper': limits.label_free(
        int(teacher_wrong.sum()),
        len(labels),
        int(differs.sum()),
        num,
        delta,
      ),
    },
    **by_teacher,
    **found,
  }
  known = target['label'] >= 0
  if known.any():
    for name, (_, seen) in (
      ('true_error', student),
      ('true_teacher_error', teacher),
    ):
      wrong = seen.predicted[known] != target['label'][known]
      result[name] = float(wrong.mean())
  return result


def _read(source, target, name, head) -> list[divergence.Read]:
  parts = [part['rows'][name] for part in (source, target)]
  return [divergence.read(pooled, head) for pooled in parts]


def by_critic(
  source: divergence.Read,
  target: divergence.Read,
  head: dict[str, np.ndarray],
  labels: np.ndarray,
  *,
  delta: float,
  seed: int,
  on_logits: bool = False,
) -> dict[str, float]:
  """Returns divergence.dis2 of one classifier on its representation.

  Args:
    source: of labelled examples.
    target: of examples without labels.
    head: that reads both.
    labels: of the source, (n_S,) int; -1 where there is none.
    delta: probability of failure, the condition given.
    seed: of the halves on which the critic is fitted.
    on_logits: whether the critic reads the K logits in place of the D features.
      It can do less then: the limit is lower, and the assumption stronger.

  Raises:
    config_utils.UserError: too few examples have a label.
  """
  if on_logits:
    source, target = (
      divergence.Read(divergence.logits(part.pooled, head), part.predicted)
      for part in (source, target)
    )
    num = len(head['bias'])
    head = {
      'kernel': np.eye(num, dtype=np.float32),
      'bias': np.zeros(num, np.float32),
    }
  rng = np.random.default_rng((seed, SPLIT_STREAM))
  fitted = [rng.permutation(len(part)) % 2 == 0 for part in (source, target)]
  held = ~fitted[0] & (labels >= 0)
  if not held.any() or len(target) < 2:
    raise config_utils.UserError(
      f'{(labels >= 0).sum()} labelled and {len(target)} other images are too '
      'few to bound errors by'
    )
  critic = divergence.fit_critic(
    source.where(fitted[0]), target.where(fitted[1]), head
  )
  source, target = source.where(held), target.where(~fitted[1])
  return divergence.dis2(
    (source.predicted != labels[held]).astype(np.int32),
    source.differs(critic),
    target.differs(critic),
    delta,
  )
