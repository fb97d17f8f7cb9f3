"""IJCKD: learn the teacher's representation, and predict with its classifier.

Source: Li et al. 2023, "Knowledge Distillation Under Ideal Joint Classifier
Assumption", https://arxiv.org/abs/2304.11004.
"""

import dataclasses

from ijckd_jax.distillation import connectors
from ijckd_jax.distillation.methods import base
from ijckd_jax.models import losses
from ijckd_jax.models import outputs
from ijckd_jax.runtime import config_utils

SITES = ('map', 'pooled')


@dataclasses.dataclass(frozen=True)
class Method(base.Method):
  """Cross-entropy, logit and feature matching, through the teacher's head.

  Attributes:
    cross_entropy_weight: weight of the labels' cross-entropy.
    logit_weight: weight of the logits' squared error, mean over B K.
    standardize: standardise logits (losses.standardize_logits) before that.
    feature_weight: weight of the features' squared error, mean over all
      elements.
    feature_site: where features are compared: 'map', before the pool, or
      'pooled', after it.
    connector: name in connectors.CONNECTORS, or `package.module:Name`.
    factor: width divisor of the bottleneck connectors; 0, which a command line
      may call auto: the smallest that keeps to `config.student.max_growth`.
    tap: the student's map that is connected, see base.Method.
    head: what predicts: 'teacher', the teacher's head as it is. The others are
      controls: behind the connector 'copy', the same trained on, 'fresh', one
      that is trained from the start, or 'random', one that is not trained; and
      'own', the student's own on its own features.
  """

  cross_entropy_weight: float = 1.0
  logit_weight: float = 1.0
  standardize: bool = False
  feature_weight: float = 1.0
  feature_site: str = 'map'
  connector: str = 'bottleneck'
  factor: int = 2
  tap: str = 'stage'
  head: str = 'teacher'

  @property
  def predicts_with(self) -> str:
    """Which head predicts."""
    return self.head

  def __post_init__(self):
    if self.head not in outputs.HEADS:
      raise config_utils.unknown('head', self.head, outputs.HEADS)
    if self.feature_site not in SITES:
      raise config_utils.unknown('feature_site', self.feature_site, SITES)

  def build_connector(self, student, teacher):
    """Returns the connector; it must give a map where maps are compared."""
    del student
    connector = connectors.build(self.connector, teacher, factor=self.factor)
    if connector.takes == 'pooled' and self.feature_site == 'map':
      raise config_utils.UserError(
        f'connector {self.connector!r} works on pooled features, so there is '
        "no map to compare: set method.feature_site='pooled'"
      )
    return connector

  def loss(self, student, teacher, batch):
    """Returns the weighted sum and its terms."""
    return losses.combine(
      cross_entropy=(
        self.cross_entropy_weight,
        lambda: losses.cross_entropy(student.logits, batch['label']),
      ),
      logit=(
        self.logit_weight,
        lambda: losses.mean_squared_error(
          *losses.read_logits(student.logits, teacher.logits, self.standardize)
        ),
      ),
      feature=(
        self.feature_weight,
        lambda: losses.feature_distance(
          student.connected, teacher, self.feature_site
        ),
      ),
    )
