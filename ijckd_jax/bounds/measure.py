"""From a pair of networks and held-out images to a report of bounds.

Features are gathered, a joint head is fitted on training images, and the bounds
follow from the rows of `pointwise`.
"""

from collections.abc import Callable
from collections.abc import Sequence
import dataclasses
from typing import Any

import jax
import numpy as np

from ijckd_jax.bounds import certify
from ijckd_jax.bounds import held_out
from ijckd_jax.bounds import pairs
from ijckd_jax.bounds import shift
from ijckd_jax.data import duplicates
from ijckd_jax.evaluation import feature_extraction
from ijckd_jax.evaluation import logistic
from ijckd_jax.evaluation import pointwise
from ijckd_jax.runtime import config_utils
from ijckd_jax.runtime import hosts
from ijckd_jax.runtime import parallel

# Random stream that picks the images for fitting the joint head. Must differ
# from those of `steps` and `logistic`.
FIT_STREAM = 4
MIN_FIT = 2  # Labelled images: logistic.fit holds one out.


@dataclasses.dataclass(frozen=True)
class Measured:
  """Report and rows of a pair.

  Attributes:
    report: of certify.report, JSON; with 'left_out', the reason why a part does
      not apply, by its name, and 'joint_head', the accuracy of the joint head
      where one was fitted.
    rows: of the test images, as certify.report takes them.
  """

  report: dict[str, Any]
  rows: pointwise.Rows


class Viewer:
  """Gathers the outputs of a pair on images."""

  def __init__(
    self,
    pair: pairs.Pair,
    variables: Any,
    *,
    mapper: parallel.Mapper,
    batch_size: int,
    num_workers: int = 0,
  ):
    """Takes a pair; all processes make and call the viewer alike.

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
    """Returns the rows of at most `most` of them, drawn by a seed."""
    order = np.random.default_rng((seed, FIT_STREAM)).permutation(len(arrays))
    return self(arrays.subset(np.sort(order[:most])))

  @property
  def head(self) -> dict[str, np.ndarray]:
    """The head by which the teacher is read."""
    if self._pair.connected is None:
      return _on_host(self._variables['teacher']['head'])
    return _on_host(self._variables['connected']['params']['head'])


def _on_host(head) -> dict[str, np.ndarray]:
  return {name: np.asarray(head[name]) for name in ('kernel', 'bias')}


def measure(
  pair: pairs.Pair,
  variables: Any,
  splits: dict[str, Any],
  *,
  trained: Sequence,
  delta: float,
  fit_examples: int,
  seed: int,
  choices: int = 1,
  relabel: Callable[[np.ndarray], np.ndarray] = lambda labels: labels,
  **how,
) -> Measured:
  """Returns the report of a pair on held-out images; all processes call it.

  Args:
    pair: teacher and student.
    variables: as pairs.Pair.view takes them.
    splits: 'test', the held-out images; 'train', from which images for the
      joint head are drawn; and optionally 'unlabelled', other held-out images.
    trained: splits on which teacher or student were trained; None for one that
      is not known. Copies of their images are left out.
    delta: probability that any limit fails.
    fit_examples: largest number of training images on which the joint head is
      fitted; 0: there is no joint head.
    seed: of the draw.
    choices: see certify.report.
    relabel: from labels of 'unlabelled' to those of 'test'.
    **how: see Viewer.

  Raises:
    config_utils.UserError: the images are not held out; or see `from_views` and
      shift.bound.
  """
  held = [name for name in ('test', 'unlabelled') if name in splits]
  fits_head = pair.connected is not None and fit_examples > 0
  if fits_head and not any(x is splits['train'] for x in trained):
    trained = [*trained, splits['train']]

  def find_copies():
    found = {
      name: duplicates.find(
        splits[name], trained, [splits['test']] if name != 'test' else ()
      )
      for name in held
    }
    for name in held:
      what = 'labelled' if name == 'test' else name
      held_out.check(found[name], f'the {what} images')
    return found

  copies = hosts.share(find_copies)
  viewer = Viewer(pair, variables, **how)
  views, train = {name: viewer(splits[name]) for name in held}, None
  if fits_head and len(splits['train']):
    train = viewer.sample(splits['train'], fit_examples, seed)
  views = {
    name: jax.tree.map(lambda x, name=name: x[copies[name].kept], rows)
    for name, rows in views.items()
  }
  head = viewer.head

  def report():
    # All limits of the report hold together.
    share = delta / len(held)
    found = from_views(
      pair, views['test'], train, head, delta=share, seed=seed, choices=choices
    )
    found.report.update(delta=delta, copies=copies['test'].report())
    if 'unlabelled' in held:
      target = views['unlabelled']
      target['label'] = relabel(target['label'])
      found.report['unlabelled'] = {
        **shift.bound(
          views['test'], target, head, delta=share / choices, seed=seed
        ),
        'delta': delta,
        'copies': copies['unlabelled'].report(),
      }
    return found

  return hosts.share(report)


def from_views(
  pair: pairs.Pair,
  test: dict[str, Any],
  train: dict[str, Any] | None,
  head: dict[str, np.ndarray],
  *,
  delta: float,
  seed: int,
  choices: int = 1,
) -> Measured:
  """Returns the report of a pair by its gathered rows.

  Args:
    pair: teacher and student.
    test: of feature_extraction.of_split, by pairs.Pair.view.
    train: the same of training images; None: there is no joint head.
    head: 'kernel' and 'bias' that read the representations.
    delta: probability that any limit fails.
    seed: of the images on which the joint head's penalty is chosen.
    choices: see certify.report.

  Raises:
    config_utils.UserError: no test image has a label, or a feature or logit is
      not finite.
  """
  labels, views = test['label'], test['rows']
  if labels.max() >= len(head['bias']):
    raise config_utils.UserError(
      f'labels go up to {labels.max()}, but the head has {len(head["bias"])} '
      'classes: mend the data set'
    )
  for part in (test, train or test):
    for name, values in part['rows'].items():
      if not np.isfinite(values).all():
        raise config_utils.UserError(
          f'{name} is not finite, so that nothing can be said of it'
        )
  if not (labels >= 0).any():
    raise config_utils.UserError(
      'no image has a label: errors cannot be measured. Give labelled images '
      'as --dataset, and these as --unlabelled'
    )
  own_rows, joint_report, left_out = None, {}, {}
  if pair.connected is None:
    left_out['features and joint head'] = NO_CONNECTOR
    rows = pointwise.compute_from_logits(
      pointwise.read(views['z_t'], head), views['l_own'], labels
    )
  else:
    joint = None
    if train is None or (train['label'] >= 0).sum() < MIN_FIT:
      left_out['joint head'] = NO_FIT
    else:
      fitted = fit_joint(train, len(head['bias']), seed=seed)
      joint, joint_report = fitted.head, {'joint_head': fitted.report}
    rows = pointwise.compute(
      views['z_t'], views['z_s'], labels, **head, joint=joint
    )
    if 'l_own' in views:
      own = views['l_own'].argmax(axis=-1).astype(np.int32)
      rows = rows.replace(own=own)
      own_rows = pointwise.compute_from_logits(
        pointwise.read(views['z_t'], head), views['l_own'], labels
      )
    else:
      left_out['own head'] = SAME_HEAD
  report = {
    **certify.report(rows, delta, own_rows, choices),
    'left_out': left_out,
    **joint_report,
  }
  return Measured(report, rows)


NO_CONNECTOR = (
  'the student has no connector to the teacher, so its features are not in the '
  "teacher's space"
)
NO_FIT = f'fewer than {MIN_FIT} labelled training images to fit it on'
SAME_HEAD = "the student predicts through the teacher's head alone"


def fit_joint(
  train: dict[str, Any], num_classes: int, *, seed: int
) -> logistic.Fitted:
  """Returns a joint head r, fitted on both representations.

  Args:
    train: of feature_extraction.of_split, by pairs.Pair.view.
    num_classes: K.
    seed: of the tenth of the images on which the penalty is chosen.
  """
  rows = logistic.join(
    [
      logistic.Features(train['rows'][name], train['label'], train['index'])
      for name in ('z_t', 'z_s')
    ]
  )
  nothing = rows.where(np.zeros(len(rows), bool))
  return logistic.fit(rows, nothing, num_classes, seed=seed)
