"""A student of plain functions.

python -m experiments.jax_students.function_student
"""

import jax
import jax.numpy as jnp

import ijckd_jax

MOMENTUM = 0.9  # What the running mean keeps at a step.


def convolve(images: jax.Array, kernel: jax.Array, stride: int) -> jax.Array:
  """Returns a convolution of (B, H, W, C) with (h, w, C, D)."""
  return jax.lax.conv_general_dilated(
    images,
    kernel,
    (stride, stride),
    'SAME',
    dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
  )


def start(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
  """Returns a random kernel (h, w, C, D), as He et al. 2015 start it."""
  fan_in = shape[0] * shape[1] * shape[2]
  return jax.random.normal(key, shape) * (2 / fan_in) ** 0.5


class Student(ijckd_jax.FunctionBackbone):
  """Two convolutions; the mean over the images is taken from the second."""

  width: int = 32

  signed = False  # It ends in a ReLU.

  def init_fn(self, key, images):
    """Returns fresh parameters, and the state: a running mean."""
    first, second = jax.random.split(key)
    shapes = (
      (3, 3, images.shape[-1], self.width),
      (3, 3, self.width, self.width),
    )
    params = {
      'first': {'kernel': start(first, shapes[0])},
      'second': {
        'kernel': start(second, shapes[1]),
        'bias': jnp.zeros(self.width),
      },
    }
    return params, {'mean': jnp.zeros(self.width)}

  def apply_fn(self, params, state, images, *, train, key):
    """Returns the maps of two stages, and the state after it."""
    del key  # Nothing is dropped.
    x = jax.nn.relu(convolve(images, params['first']['kernel'], 1))
    y = convolve(x, params['second']['kernel'], 2)
    mean = state['mean']
    if train:
      mean = jnp.mean(y, axis=(0, 1, 2))
      state = {'mean': MOMENTUM * state['mean'] + (1 - MOMENTUM) * mean}
    return (x, jax.nn.relu(y - mean + params['second']['bias'])), state


def main(**settings) -> dict[str, float]:
  """Trains a teacher, distils the student, and returns their accuracies."""
  result = ijckd_jax.distill(
    teacher='resnet8',
    student='experiments.jax_students.function_student:Student',
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
