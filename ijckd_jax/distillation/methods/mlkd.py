"""MLKD: predictions of two views, by image, by batch and by class.

Source: Jin et al. 2023, "Multi-level Logit Distillation",
https://openaccess.thecvf.com/content/CVPR2023/papers/Jin_Multi-Level_Logit_Distillation_CVPR_2023_paper.pdf;
where the paper and the authors' code differ, the code.
"""

import dataclasses

import jax
import jax.numpy as jnp

from ijckd_jax.data import randaugment
from ijckd_jax.distillation.methods import base
from ijckd_jax.models import losses
from ijckd_jax.runtime import config_utils

# Temperatures beside the chosen one. The authors' code has the second view at
# the first two only, and the first view at the last two twice.
BOTH_VIEWS, FIRST_VIEW = (3.0, 5.0), (2.0, 6.0)


@dataclasses.dataclass(frozen=True)
class Method(base.Method):
  """Cross-entropy of both views, and three distances between predictions.

  With P the softened predictions (B, K) of the first view, at each of five
  temperatures: KL by image, squared distances of P P^T by batch, and of P^T P
  by class. KL is of the second view too, at three of the temperatures. The
  terms of the first view are multiplied by a share: of the images whose largest
  probability by the teacher is at most the median, or of the classes whose sum
  of probabilities is. It is about a half, and more where there are ties. (A
  mask of images is what the paper has; the code multiplies by its mean.)
  P P^T and P^T P are of the images of one device (and of one piece, where the
  batch is worked through in pieces).

  The second view is a RandAugment of the image. The authors' has operations of
  a strength that is drawn, and cuts out a square.

  Attributes:
    cross_entropy_weight: weight of the labels' cross-entropy, of both views.
    distillation_weight: of KL.
    batch_level_weight: of the distance of P P^T.
    class_level_weight: of that of P^T P.
    temperature: T, beside those of BOTH_VIEWS and FIRST_VIEW; the authors take
      1 on ImageNet, and 0.5 for all weights.
    standardize: standardise logits in KL (losses.standardize_logits); its
      authors take 9 for the weights of the distances and temperature=2 then.
    randaugment_layers: operations on each image of the second view.
    randaugment_magnitude: of these, 0 to randaugment.MAX_MAGNITUDE.
  """

  cross_entropy_weight: float = 0.1
  distillation_weight: float = 0.9
  batch_level_weight: float = 0.9
  class_level_weight: float = 0.9
  temperature: float = 4.0
  standardize: bool = False
  randaugment_layers: int = 2
  randaugment_magnitude: int = 10

  def __post_init__(self):
    config_utils.check_positive('temperature', self.temperature)
    config_utils.check_positive('randaugment_layers', self.randaugment_layers)
    if not 0 <= self.randaugment_magnitude <= randaugment.MAX_MAGNITUDE:
      raise config_utils.UserError(
        f'randaugment_magnitude={self.randaugment_magnitude}: it must be from '
        f'0 to {randaugment.MAX_MAGNITUDE}'
      )

  @property
  def second_view(self):
    """What makes it."""
    return (
      randaugment.RandAugment(
        self.randaugment_layers, self.randaugment_magnitude
      ),
    )

  def loss(self, student, teacher, batch):
    """Returns the weighted sum and its terms."""
    sure = _softened(teacher, 1.0)
    images = _share_below_median(jnp.max(sure, axis=1))
    classes = _share_below_median(jnp.sum(sure, axis=0))
    of_both = (self.temperature, *BOTH_VIEWS)
    of_first = (*of_both, *FIRST_VIEW)

    def divergence(temperatures, ours, theirs):
      return sum(
        losses.distillation(
          ours.logits, theirs.logits, t, standardize=self.standardize
        )
        for t in temperatures
      )

    def distillation():
      first = divergence(of_first, student, teacher)
      once_more = divergence(FIRST_VIEW, student, teacher)
      second = divergence(of_both, student.second, teacher.second)
      return images * first + once_more + second

    def relation(of):
      return sum(
        _squared_distance(*(of(_softened(x, t)) for x in (student, teacher)))
        for t in of_first
      )

    return losses.combine(
      cross_entropy=(
        self.cross_entropy_weight,
        lambda: sum(
          losses.cross_entropy(view.logits, batch['label'])
          for view in (student, student.second)
        ),
      ),
      distillation=(self.distillation_weight, distillation),
      batch_level=(
        self.batch_level_weight,
        lambda: images * relation(lambda p: _products(p, p.T)),
      ),
      class_level=(
        self.class_level_weight,
        lambda: classes * relation(lambda p: _products(p.T, p)),
      ),
    )


def _softened(seen, temperature):
  """Returns the predictions (B, K) float32 of one network."""
  return jax.nn.softmax(losses.at_least_float32(seen.logits) / temperature)


def _products(x, y):
  # The default precision of a TPU's product is bfloat16's.
  return jnp.matmul(x, y, precision='highest')


def _share_below_median(x):
  """Returns which part of (N,) numbers is not above their median."""
  return jnp.mean(x <= jnp.median(x))


def _squared_distance(x, y):
  """Returns the squared distance of (N, N) matrices, by row."""
  return jnp.sum(jnp.square(x - y)) / len(x)
