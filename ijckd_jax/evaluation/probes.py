"""What frozen features are worth: a linear probe, and nearest neighbours.

The features are those that the network's head reads, or would read.
"""

from typing import Any

import numpy as np

from ijckd_jax.evaluation import feature_extraction
from ijckd_jax.evaluation import logistic
from ijckd_jax.runtime import config_utils
from ijckd_jax.runtime import parallel

# Of the weights exp(cosine / temperature) that neighbours vote with. Source: Wu
# et al. 2018, https://arxiv.org/abs/1805.01978, section 3.4.
TEMPERATURE = 0.07


def features(
  network: Any,
  variables: Any,
  arrays: Any,
  *,
  mapper: parallel.Mapper,
  batch_size: int,
  num_workers: int = 0,
) -> logistic.Features:
  """Returns a network's features of the labelled images of a split.

  Args:
    network: see network.Network.
    variables: of it.
    arrays: datasets.Arrays.
    mapper: see parallel.
    batch_size: rows of all devices together.
    num_workers: processes that decode images which do not lie in memory.

  Raises:
    config_utils.UserError: a feature is not finite.
  """

  def pooled(variables, images):
    return network(variables, network.preprocessing(images)).pooled

  rows = feature_extraction.of_split(
    feature_extraction.make_step(pooled, mapper),
    mapper.replicate(variables),
    arrays,
    mapper=mapper,
    batch_size=batch_size,
    num_workers=num_workers,
  )
  found = logistic.Features(rows['rows'], rows['label'], rows['index'])
  if not np.isfinite(found.pooled).all():
    raise config_utils.UserError(
      'the features are not finite, so nothing can be said of them'
    )
  return found.labelled


def check(train: logistic.Features, neighbours: int) -> None:
  """Raises UserError where there are too few labels.

  Args:
    train: labelled.
    neighbours: how many vote.
  """
  if len(train) < 2:
    raise config_utils.UserError(
      f'the training split has {len(train)} labels, and a probe is fitted on '
      'two at least: give a data set with classes'
    )
  if not 1 <= neighbours <= len(train):
    raise config_utils.UserError(
      f'--neighbours {neighbours}: it must be from 1 to {len(train)}, the '
      'labelled training images'
    )


def linear(
  fitted: logistic.Fitted, test: logistic.Features
) -> dict[str, float]:
  """Returns the top-1 of a fitted head on test images, and its penalty."""
  _, correct = logistic.evaluate(fitted.kernel, fitted.bias, test)
  penalty = fitted.report['penalty']
  return {'top1': float(correct.mean()), 'penalty': penalty}


def nearest(
  train: logistic.Features, test: logistic.Features, neighbours: int
) -> dict[str, float]:
  """Returns the top-1 on test images of a vote of training images.

  The neighbours of an image are those whose features have the largest cosine
  with its own, and vote with exp(cosine / TEMPERATURE).

  Args:
    train: that vote.
    test: to score.
    neighbours: how many vote.
  """
  from sklearn import neighbors

  voters = neighbors.KNeighborsClassifier(
    neighbours,
    metric='cosine',
    weights=lambda distance: np.exp((1 - distance) / TEMPERATURE),
  )
  voters.fit(train.pooled, train.labels)
  return {'top1': float(voters.score(test.pooled, test.labels))}


def score(
  network: Any,
  variables: Any,
  splits: dict[str, Any],
  num_classes: int,
  *,
  batch_size: int,
  num_workers: int = 0,
  neighbours: int = 20,
) -> tuple[dict[str, Any], logistic.Fitted]:
  """Returns what a network's features are worth on a labelled data set.

  Args:
    network: see network.Network.
    variables: of it.
    splits: datasets.Arrays of 'train', 'validation' and 'test'.
    num_classes: K.
    batch_size: rows of all devices together.
    num_workers: processes that decode images which do not lie in memory.
    neighbours: how many vote in `nearest`.

  Returns:
    JSON: 'train' and 'test', the numbers of labelled images; 'linear' and
    'nearest', what these functions return. And the head of the linear probe.

  Raises:
    config_utils.UserError: there are too few labels.
  """
  mapper, none = parallel.Mapper(), np.zeros(0, np.int32)
  width = variables['params']['head']['kernel'].shape[0]
  nothing = logistic.Features(np.zeros((0, width), np.float32), none, none)
  found = {
    name: features(
      network,
      variables,
      arrays,
      mapper=mapper,
      batch_size=batch_size,
      num_workers=num_workers,
    )
    if len(arrays)
    else nothing
    for name, arrays in splits.items()
  }
  check(found['train'], neighbours)
  fitted = logistic.fit(
    found['train'], found['validation'], num_classes, seed=0
  )
  return {
    'train': len(found['train']),
    'test': len(found['test']),
    'linear': linear(fitted, found['test']),
    'nearest': nearest(found['train'], found['test'], neighbours),
  }, fitted
