"""From a pair of networks and held-out images to what can be claimed of them.

Features are gathered, a joint head and the domain
classifiers are fitted on training images, and the rest is bounds.
"""

import dataclasses
from typing import Any

import numpy as np

from ijckd_jax.bounds import certify
from ijckd_jax.bounds import divergence
from ijckd_jax.bounds import pairs
from ijckd_jax.evaluation import feature_extraction
from ijckd_jax.evaluation import logistic
from ijckd_jax.evaluation import pointwise
from ijckd_jax.runtime import config_utils
from ijckd_jax.runtime import hosts
from ijckd_jax.runtime import parallel

# Draws the images that the joint head is fitted on; no stream of `steps` or
# `logistic` has this number.
FIT_STREAM = 4
DOMAIN_EXAMPLES = 2000  # Of each kind: two classes are soon told apart.
AVERAGE_TOLERANCE = 1e-4  # Of features, below which a pool is the average.


@dataclasses.dataclass(frozen=True)
class Measured:
  """What was found of a pair.

  Attributes:
    report: of certify.report, JSON; with 'joint_head', what the joint head is
      worth where one was fitted.
    rows: of the test images, as Sample has them.
    classes: of certify.by_class.
  """

  report: dict[str, Any]
  rows: pointwise.Rows
  classes: dict[str, np.ndarray]


class Viewer:
  """Gathers what a pair makes of images."""

  def __init__(
    self,
    pair: pairs.Pair,
    variables: Any,
    *,
    mapper: parallel.Mapper,
    batch_size: int,
    num_workers: int = 0,
  ):
    """Takes a pair; all processes make it, and call it, alike.

    Args:
      pair: teacher and student.
      variables: as pairs.Pair.view takes them.
      mapper: see parallel.
      batch_size: rows of all devices and processes together.
      num_workers: processes that decode images which do not lie in memory.
    """
    self._pair = pair
    self._step = feature_extraction.make_step(pair.view, mapper)
    self._variables = mapper.replicate(variables)
    self._how = dict(
      mapper=mapper,
      batch_size=batch_size,
      num_workers=num_workers,
      what='measuring the bound',
    )

  def __call__(self, arrays) -> dict[str, Any]:
    """Returns feature_extraction.of_split's rows of datasets.Arrays."""
    return feature_extraction.of_split(
      self._step, self._variables, arrays, **self._how
    )

  def sample(self, arrays, most: int, seed: int) -> dict[str, Any]:
    """Returns the same of at most so many of them, drawn by a seed."""
    order = np.random.default_rng((seed, FIT_STREAM)).permutation(len(arrays))
    return self(arrays.subset(np.sort(order[:most])))

  @property
  def head(self) -> dict[str, np.ndarray]:
    """The head by which the teacher is read."""
    if self._pair.connected is None:
      return _on_host(self._variables['teacher']['head'])
    return _on_host(self._variables['connected']['params']['head'])

  @property
  def own_head(self) -> dict[str, np.ndarray] | None:
    """The student's own; None where it reuses the teacher's."""
    if self._pair.reuses_head:
      return None
    return _on_host(self._variables['student']['params']['head'])


def _on_host(head) -> dict[str, np.ndarray]:
  return {name: np.asarray(head[name]) for name in ('kernel', 'bias')}


def measure(
  pair: pairs.Pair,
  variables: Any,
  splits: dict[str, Any],
  *,
  delta: float,
  fit_examples: int,
  seed: int,
  **how,
) -> Measured:
  """Returns what held-out images say of a pair; all processes call it alike.

  Args:
    pair: teacher and student.
    variables: as pairs.Pair.view takes them.
    splits: 'test', which neither was trained or chosen on, and 'train', from
      which images are drawn to fit on.
    delta: probability that any certified limit fails.
    fit_examples: at most so many training images are fitted on; 0: nothing that
      takes fitting is measured.
    seed: of which these are.
    **how: see Viewer.
  """
  viewer = Viewer(pair, variables, **how)
  test, train = viewer(splits['test']), None
  if pair.connected is not None and fit_examples:
    train = viewer.sample(splits['train'], fit_examples, seed)
  head = viewer.head
  return hosts.share(
    lambda: from_views(pair, test, train, head, delta=delta, seed=seed)
  )


def from_views(
  pair: pairs.Pair,
  test: dict[str, Any],
  train: dict[str, Any] | None,
  head: dict[str, np.ndarray],
  *,
  delta: float,
  seed: int,
) -> Measured:
  """Returns what gathered rows say of a pair.

  Args:
    pair: whose they are.
    test: of feature_extraction.of_split, by pairs.Pair.view.
    train: the same of training images; None: nothing is fitted.
    head: 'kernel' and 'bias' that the representations are read by.
    delta: probability that any certified limit fails.
    seed: of what is held out in the fits.

  Raises:
    config_utils.UserError: no test image has a label, or a feature or logit is
      not finite.
  """
  labels, views = test['label'], test['rows']
  for part in (test, train or test):
    for name, values in part['rows'].items():
      if name != 'off_average' and not np.isfinite(values).all():
        raise config_utils.UserError(
          f'{name} is not finite, so that nothing can be said of it'
        )
  if not (labels >= 0).any():
    raise config_utils.UserError(
      'no image has a label: errors cannot be measured. Give labelled images '
      'as --dataset, and these as --unlabelled'
    )
  own_rows, report = None, {}
  if pair.connected is None:
    l_t = divergence.logits(views['z_t'], head)
    rows = pointwise.compute_from_logits(l_t, views['l_own'], labels)
    sample = certify.Sample(rows, left_out={'features': NO_CONNECTOR})
  else:
    joint, diagnostics, left_out = None, {}, {}
    if train is None or not (train['label'] >= 0).any():
      left_out['joint'] = NO_FIT
    else:
      fitted = fit_joint(train, len(head['bias']), seed=seed)
      joint, report['joint_head'] = fitted.head, fitted.report
      diagnostics = diagnose(train, test, head, seed=seed)
    rows = pointwise.compute(
      views['z_t'], views['z_s'], labels, **head, joint=joint
    )
    if 'l_own' in views:
      own = views['l_own'].argmax(axis=-1).astype(np.int32)
      rows = rows.replace(own=own)
      own_rows = pointwise.compute_from_logits(
        divergence.logits(views['z_t'], head), views['l_own'], labels
      )
    else:
      left_out['own_head'] = SAME_HEAD
    map_square = views.get('map_square')
    if map_square is None:
      left_out['feature_map'] = NO_MAPS
    else:
      size = max(1.0, np.abs(views['z_t']).max(), np.abs(views['z_s']).max())
      if views['off_average'].max() > AVERAGE_TOLERANCE * size:
        map_square, left_out['feature_map'] = None, NO_AVERAGE
    sample = certify.Sample(
      rows,
      own_rows,
      pointwise.describe(head),
      map_square,
      diagnostics,
      left_out,
    )
  report = {**certify.report(sample, delta), **report}
  return Measured(report, rows, certify.by_class(rows))


NO_CONNECTOR = (
  'the student has no connector to the teacher, so its features are not in the '
  "teacher's space: what compares features, and a joint head, do not apply"
)
NO_FIT = 'no labelled training image was given to fit it on'
SAME_HEAD = "the student predicts through the teacher's head alone"
NO_MAPS = "the pair's maps cannot be compared position by position"
NO_AVERAGE = 'the representation is not the average of a map'


def fit_joint(
  train: dict[str, Any], num_classes: int, *, seed: int
) -> logistic.Fitted:
  """Returns a joint head r, fitted on both representations.

  Args:
    train: of feature_extraction.of_split, by pairs.Pair.view.
    num_classes: K.
    seed: of the tenth of images by which the penalty is chosen.
  """
  rows = logistic.join(
    [
      logistic.Features(train['rows'][name], train['label'], train['index'])
      for name in ('z_t', 'z_s')
    ]
  )
  nothing = rows.where(np.zeros(len(rows), bool))
  return logistic.fit(rows, nothing, num_classes, seed=seed)


def diagnose(
  train: dict[str, Any],
  test: dict[str, Any],
  head: dict[str, np.ndarray],
  *,
  seed: int,
) -> dict[str, tuple[np.ndarray, float, float]]:
  """Returns lower estimates of how far the representations lie apart.

  Each is fitted on training images and measured on test images.

  Args:
    train: of feature_extraction.of_split, by pairs.Pair.view.
    test: the same.
    head: that both are read by.
    seed: of what is held out in the fits.
  """
  found = {}
  for name, change in (
    ('pad_features', lambda z: z),
    ('pad_logits', lambda z: divergence.logits(z, head)),
  ):
    fit_on, measured = (
      [change(part['rows'][which]) for which in ('z_t', 'z_s')]
      for part in (train, test)
    )
    fit_on = [z[:DOMAIN_EXAMPLES] for z in fit_on]
    domain = divergence.domain_head(*fit_on, seed=seed)
    values = divergence.proxy_a_distance(*measured, domain)
    found[name] = (values, -2.0, 2.0)
  fit_on, measured = (
    [divergence.read(part['rows'][which], head) for which in ('z_t', 'z_s')]
    for part in (train, test)
  )
  values = divergence.disparity(fit_on, measured, head)
  found['disparity'] = (values, -1.0, 1.0)
  return found
