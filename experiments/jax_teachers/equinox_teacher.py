"""A teacher written in Equinox.

python -m experiments.jax_teachers.equinox_teacher
"""

import equinox as eqx
import jax
import jax.numpy as jnp
import optax

import ijckd_jax
from ijckd_jax.data import datasets


class Net(eqx.Module):
  """Two convolutions, an average and a linear layer."""

  conv1: eqx.nn.Conv2d
  conv2: eqx.nn.Conv2d
  head: eqx.nn.Linear

  def __init__(self, width: int, num_classes: int, *, key: jax.Array):
    keys = jax.random.split(key, 3)
    self.conv1 = eqx.nn.Conv2d(1, width, 3, padding=1, key=keys[0])
    self.conv2 = eqx.nn.Conv2d(width, width, 3, 2, padding=1, key=keys[1])
    self.head = eqx.nn.Linear(width, num_classes, key=keys[2])

  def features(self, image: jax.Array) -> jax.Array:
    """Returns the last map (C, H, W) of an image of that order."""
    return jax.nn.relu(self.conv2(jax.nn.relu(self.conv1(image))))


def teacher(net: Net, preprocessing: ijckd_jax.Preprocessing):
  """Returns a network as a teacher: a pure function and its arrays."""
  arrays, static = eqx.partition(net, eqx.is_array)

  def apply(arrays, images):
    net = eqx.combine(arrays, static)
    # Equinox takes one image, channels first.
    maps = jax.vmap(net.features)(jnp.moveaxis(images, 3, 1))
    final = jnp.moveaxis(maps, 1, 3)
    pooled = jnp.mean(final, axis=(1, 2))
    logits = jax.vmap(net.head)(pooled)
    return ijckd_jax.Outputs((final,), final, pooled, logits)

  return ijckd_jax.Teacher(
    apply=apply,
    variables=arrays,
    head={'kernel': net.head.weight.T, 'bias': net.head.bias},
    preprocessing=preprocessing,
    name='equinox',
    signed=False,  # It ends in a ReLU.
  )


def train(net: Net, images, labels, num_steps: int) -> Net:
  """Returns a network trained on all images at once."""
  tx = optax.adam(3e-3)

  def loss(net):
    maps = jax.vmap(net.features)(jnp.moveaxis(images, 3, 1))
    logits = jax.vmap(net.head)(jnp.mean(maps, axis=(2, 3)))
    return jnp.mean(
      optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    )

  @eqx.filter_jit
  def step(net, opt_state):
    updates, opt_state = tx.update(eqx.filter_grad(loss)(net), opt_state)
    return eqx.apply_updates(net, updates), opt_state

  opt_state = tx.init(eqx.filter(net, eqx.is_array))
  for _ in range(num_steps):
    net, opt_state = step(net, opt_state)
  return net


def main(num_steps: int = 300, **settings) -> dict[str, float]:
  """Trains a teacher, distils a student, and returns their accuracies."""
  data = datasets.get('digits')()
  size = data.image_shape[:2]
  preprocessing = ijckd_jax.Preprocessing(data.mean, data.std, size)
  net = Net(64, len(data.class_names), key=jax.random.key(0))
  examples = data.load('train')
  net = train(net, preprocessing(examples.images), examples.labels, num_steps)
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
