"""CRD: tell the teacher's embedding of an image from those of other classes.

Source: Tian et al. 2020, "Contrastive Representation Distillation",
https://arxiv.org/abs/1910.10699; the numbers are RepDistiller's.
"""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp

from ijckd_jax.data import augment
from ijckd_jax.distillation.methods import auxiliary
from ijckd_jax.distillation.methods import base
from ijckd_jax.models import losses
from ijckd_jax.runtime import config_utils

EPSILON = 1e-7
NETWORKS = ('student', 'teacher')


class Embeddings(auxiliary.Auxiliary, kw_only=True):
  """Pooled features of both networks, linearly, as vectors of length one.

  Attributes:
    width: of the vectors.
  """

  width: int

  @nn.compact
  def __call__(self, student, teacher, *, train):
    """Returns (B, width) float32 by network."""
    del train
    found = {}
    for name, seen in zip(NETWORKS, (student, teacher), strict=True):
      found[name] = losses.normalize(self.linear(seen.pooled, self.width, name))
    return found


@dataclasses.dataclass(frozen=True)
class Method(base.Method):
  """Cross-entropy, and contrasts with a memory of all training images.

  The memory is two vectors for each image, which stay on every device: 51 MB
  for CIFAR-100, 1.3 GB for ImageNet. Each row is contrasted with images that
  are not known to be of its class: of another one, or not seen yet; a row
  without a label with any but itself, and a row for which the memory holds
  nothing else with any. They are drawn without replacement, or with it where
  there are fewer than asked for. All products of a batch with the memory are
  computed: that takes (B, N) numbers, and no gathering of (B, K, width). The
  normaliser Z of each network is estimated in the first step, and constant
  after it.

  With a `queue` the memory does not grow with the training set: it is the
  vectors of the latest images, N of them, as they were when they were seen; at
  the start they are random, as the memory of all images is. The positive of a
  row is then the other network's vector of the same image in this step, without
  a gradient. That part is not the authors': it is the queue of He et al. 2020,
  "Momentum Contrast", https://arxiv.org/abs/1911.05722, without a slow copy of
  the networks.

  Attributes:
    cross_entropy_weight: weight of the labels' cross-entropy.
    weight: of the contrast, the sum of both networks' sides, mean over B.
    num_negatives: K, for each row.
    temperature: tau.
    momentum: of the memory; a queue has none.
    width: of the vectors.
    queue: N, of the latest images; 0: all training images.
  """

  cross_entropy_weight: float = 1.0
  weight: float = 0.8
  num_negatives: int = 16384
  temperature: float = 0.07
  momentum: float = 0.5
  width: int = 128
  queue: int = 0

  remembers = True

  def __post_init__(self):
    config_utils.check_positive('temperature', self.temperature)
    config_utils.check_positive('num_negatives', self.num_negatives)
    config_utils.check_positive('width', self.width)
    if self.queue < 0:
      raise config_utils.UserError(
        f'queue={self.queue}: give 0 for a memory of all images, or how many '
        'of the latest ones it holds'
      )
    if not 0 <= self.momentum < 1:
      raise config_utils.UserError(
        f'momentum={self.momentum}: it must be at least 0 and less than 1'
      )

  def auxiliary(self, student, teacher):
    """Returns the embeddings."""
    del student, teacher
    return Embeddings(width=self.width)

  def memory(self, key: jax.Array, num_examples: int):
    """Returns vectors at random, no labels, and no normalisers yet (zero)."""
    bound = (self.width / 3) ** -0.5
    keys = zip(NETWORKS, jax.random.split(key), strict=True)
    start = {}
    if self.queue:
      num_examples = self.queue
      start['index'] = jnp.full(self.queue, -1, jnp.int32)
      start['oldest'] = jnp.zeros((), jnp.int32)  # The next to be overwritten.
    return {
      **start,
      'vectors': {
        name: jax.random.uniform(
          own, (num_examples, self.width), minval=-bound, maxval=bound
        )
        for name, own in keys
      },
      'label': jnp.full(num_examples, -1, jnp.int32),
      'normaliser': dict.fromkeys(NETWORKS, jnp.zeros(())),
    }

  def loss(self, student, teacher, batch):
    """Returns the weighted sum and its terms."""
    del teacher

    def contrast():
      noise = self.num_negatives / len(batch['memory']['label'])
      return sum(
        _contrast(positives, negatives, noise)
        for positives, negatives, _ in self._scores(student, batch)
      )

    return losses.combine(
      cross_entropy=(
        self.cross_entropy_weight,
        lambda: losses.cross_entropy(student.logits, batch['label']),
      ),
      contrast=(self.weight, contrast),
    )

  def notes(self, student, batch):
    """Returns the rows that the memory is to hold, and their normalisers."""
    found, rows = self._scores(student, batch), len(batch['index'])
    return {
      'index': batch['index'],
      'label': losses.single_labels(batch['label']),
      'vectors': student.auxiliary,
      'normaliser': {
        name: jnp.full(rows, normaliser)
        for name, (*_, normaliser) in zip(NETWORKS, found, strict=True)
      },
    }

  def remember(self, memory, notes):
    """Returns the memory with the rows of all devices noted."""
    normaliser = {
      name: jnp.where(old > 0, old, jnp.mean(notes['normaliser'][name]))
      for name, old in memory['normaliser'].items()
    }
    remembered = self._enqueue if self.queue else self._replace
    return {**remembered(memory, notes), 'normaliser': normaliser}

  def _enqueue(self, memory, notes):
    """Returns the queue after the rows of all devices have joined it."""
    named = ('index', 'label', 'vectors')
    latest = jax.tree.map(
      lambda x: x[-self.queue :], {n: notes[n] for n in named}
    )
    count = len(latest['index'])
    place = (memory['oldest'] + jnp.arange(count)) % self.queue
    joined = jax.tree.map(
      lambda old, new: old.at[place].set(new),
      {name: memory[name] for name in named},
      latest,
    )
    return {**joined, 'oldest': (memory['oldest'] + count) % self.queue}

  def _replace(self, memory, notes):
    """Returns the memory of all images with new vectors for those noted.

    Of rows of one image, in a batch that crosses epochs, the first one counts.
    """
    index, count = notes['index'], len(memory['label'])
    earlier = jnp.tril(index[:, None] == index[None], -1).any(axis=1)
    place = jnp.where(earlier, count, index)  # Out of range: not noted.
    vectors = {}
    for name, old in memory['vectors'].items():
      mixed = self.momentum * old[index]
      mixed += (1 - self.momentum) * notes['vectors'][name]
      vectors[name] = old.at[place].set(losses.normalize(mixed), mode='drop')
    label = memory['label'].at[place].set(notes['label'], mode='drop')
    return {'vectors': vectors, 'label': label}

  def _negatives(self, batch):
    """Returns indices (B, K) in the memory, of each row's own key."""
    known, index = batch['memory']['label'], batch['index']
    labels = losses.single_labels(batch['label'])
    same = (known[None] == labels[:, None]) & (labels[:, None] >= 0)
    held = batch['memory'].get('index', jnp.arange(len(known)))
    allowed = ~(same | (held[None] == index[:, None]))
    allowed |= ~jnp.any(allowed, axis=1, keepdims=True)
    keys = jax.vmap(augment.example_key, in_axes=(None, 0, 0))(
      batch['key'], batch['epoch'], index
    )

    def without(key, allowed):
      order = jax.random.uniform(key, allowed.shape)
      _, chosen = jax.lax.top_k(
        jnp.where(allowed, order, -1.0), self.num_negatives
      )
      return chosen

    def replaced(key, allowed):
      ends = jnp.cumsum(allowed)
      drawn = jax.random.randint(key, (self.num_negatives,), 0, ends[-1])
      return jnp.searchsorted(ends, drawn, side='right')

    if self.num_negatives >= len(known):
      return jax.vmap(replaced)(keys, allowed)
    enough = jnp.all(jnp.sum(allowed, axis=1) >= self.num_negatives)
    return jax.lax.cond(
      enough, jax.vmap(without), jax.vmap(replaced), keys, allowed
    )

  def _scores(self, student, batch):
    """Returns (positives (B,), negatives (B, K), normaliser) by network.

    Each network's vectors are compared with the other one's memory.
    """
    memory, vectors = batch['memory'], student.auxiliary
    negatives = self._negatives(batch)
    count, found = len(memory['label']), []
    for name, other in zip(NETWORKS, reversed(NETWORKS), strict=True):
      held = memory['vectors'][other]
      products = jnp.matmul(vectors[name], held.T, precision='highest')
      if self.queue:
        own = jax.lax.stop_gradient(vectors[other])
      else:
        own = held[batch['index']]
      positive = jnp.sum(vectors[name] * own, axis=1, keepdims=True)
      scores = jnp.concatenate(
        [positive, jnp.take_along_axis(products, negatives, axis=1)], axis=1
      )
      scores = jnp.exp(scores / self.temperature)
      first = jax.lax.stop_gradient(jnp.mean(scores)) * count
      fixed = memory['normaliser'][name]
      normaliser = jnp.where(fixed > 0, fixed, first)
      scores = scores / normaliser
      found.append((scores[:, 0], scores[:, 1:], normaliser))
    return found


def _contrast(positives, negatives, noise):
  """Returns the contrast of one network: the mean over the rows."""
  own = jnp.log(positives / (positives + noise + EPSILON))
  others = jnp.log(noise / (negatives + noise + EPSILON))
  return -jnp.mean(own + jnp.sum(others, axis=1))
