"""DKD: the label's probability, and how the other classes share the rest.

Source: Zhao et al. 2022, "Decoupled Knowledge Distillation",
https://arxiv.org/abs/2203.08679; weights and warm-up as in mdistiller.
"""

import dataclasses

import jax
import jax.numpy as jnp
import optax

from ijckd_jax.distillation.methods import base
from ijckd_jax.models import losses
from ijckd_jax.runtime import config_utils

# What a label's logit is lessened by where it is to have no probability.
FAR = 1000.0


@dataclasses.dataclass(frozen=True)
class Method(base.Method):
  """Cross-entropy, and KD in two parts, each T^2 KL of softened predictions.

  A row without a label counts nothing, in either part; that of a mixed image
  has the label of its larger part.

  Attributes:
    cross_entropy_weight: weight of the labels' cross-entropy.
    target_weight: of the divergence between the label and all others (alpha).
    nontarget_weight: of that among the others (beta); mdistiller takes 1, 2, 6
      or 8 for its pairs.
    temperature: T.
    warm_up_epochs: over which both weights grow from nothing.
    standardize: standardise logits first (losses.standardize_logits).
  """

  cross_entropy_weight: float = 1.0
  target_weight: float = 1.0
  nontarget_weight: float = 8.0
  temperature: float = 4.0
  warm_up_epochs: float = 20.0
  standardize: bool = False

  def __post_init__(self):
    config_utils.check_positive('temperature', self.temperature)

  def loss(self, student, teacher, batch):
    """Returns the weighted sum and its terms."""
    ours, theirs = (
      logits / self.temperature
      for logits in losses.read_logits(
        student.logits, teacher.logits, self.standardize
      )
    )
    growth = losses.warm_up(batch, self.warm_up_epochs)
    labels = losses.single_labels(batch['label'])
    rows = jax.nn.one_hot(jnp.maximum(labels, 0), ours.shape[-1], dtype=bool)

    def divergence(split):
      found = optax.losses.kl_divergence_with_log_targets(
        split(ours, rows), split(theirs, rows)
      )
      found = jnp.where(labels >= 0, found, 0.0)
      return self.temperature**2 * growth * jnp.mean(found)

    return losses.combine(
      cross_entropy=(
        self.cross_entropy_weight,
        lambda: losses.cross_entropy(student.logits, batch['label']),
      ),
      target=(self.target_weight, lambda: divergence(_target)),
      nontarget=(self.nontarget_weight, lambda: divergence(_nontarget)),
    )


def _target(logits, rows):
  """Returns the log probabilities (B, 2) of the label and of all others."""
  label = jnp.sum(jnp.where(rows, logits, 0.0), axis=-1)
  others = jax.nn.logsumexp(logits, axis=-1, where=~rows)
  return jax.nn.log_softmax(jnp.stack([label, others], axis=-1))


def _nontarget(logits, rows):
  """Returns the log probabilities (B, K) among the others."""
  return jax.nn.log_softmax(logits - FAR * rows)
