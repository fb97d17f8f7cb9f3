"""A teacher written in Flax NNX.

python -m experiments.jax_teachers.nnx_teacher
"""

from flax import nnx
import jax
import jax.numpy as jnp
import optax

import ijckd_jax
from ijckd_jax.data import datasets


class Net(nnx.Module):
  """Two convolutions, an average and a linear layer."""

  def __init__(self, width: int, num_classes: int, *, rngs: nnx.Rngs):
    self.conv1 = nnx.Conv(1, width, (3, 3), rngs=rngs)
    self.conv2 = nnx.Conv(width, width, (3, 3), strides=2, rngs=rngs)
    self.head = nnx.Linear(width, num_classes, rngs=rngs)

  def features(self, images: jax.Array) -> jax.Array:
    """Returns the last map (B, H, W, C)."""
    return nnx.relu(self.conv2(nnx.relu(self.conv1(images))))


def teacher(net: Net, preprocessing: ijckd_jax.Preprocessing):
  """Returns a network as a teacher: a pure function and its arrays."""
  graph, state = nnx.split(net)

  def apply(state, images):
    net = nnx.merge(graph, state)
    final = net.features(images)
    pooled = jnp.mean(final, axis=(1, 2))
    return ijckd_jax.Outputs((final,), final, pooled, net.head(pooled))

  return ijckd_jax.Teacher(
    apply=apply,
    variables=state,
    head={'kernel': net.head.kernel[...], 'bias': net.head.bias[...]},
    preprocessing=preprocessing,
    name='nnx',
    signed=False,  # It ends in a ReLU.
  )


def train(net: Net, images, labels, num_steps: int) -> None:
  """Trains a network in place, on all images at once."""
  optimizer = nnx.Optimizer(net, optax.adam(3e-3), wrt=nnx.Param)

  def loss(net):
    logits = net.head(jnp.mean(net.features(images), axis=(1, 2)))
    return jnp.mean(
      optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    )

  @nnx.jit
  def step(net, optimizer):
    optimizer.update(net, nnx.grad(loss)(net))

  for _ in range(num_steps):
    step(net, optimizer)


def main(num_steps: int = 300, **settings) -> dict[str, float]:
  """Trains a teacher, distils a student, and returns their accuracies."""
  data = datasets.get('digits')()
  size = data.image_shape[:2]
  preprocessing = ijckd_jax.Preprocessing(data.mean, data.std, size)
  net = Net(64, len(data.class_names), rngs=nnx.Rngs(0))
  examples = data.load('train')
  train(net, preprocessing(examples.images), examples.labels, num_steps)
  result = ijckd_jax.distill(
    teacher=teacher(net, preprocessing),
    student='resnet8',
    data='digits',
    settings={'total_epochs': 20.0, **settings},
  )
  summary = result.summary
  return {
    'teacher': summary['teacher']['top1'],
    'student': summary['student']['last']['top1'],
  }


if __name__ == '__main__':
  print(main())
