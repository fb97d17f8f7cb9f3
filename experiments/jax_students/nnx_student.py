"""A student written in Flax NNX.

python -m experiments.jax_students.nnx_student
"""

from flax import nnx

import ijckd_jax


class Net(nnx.Module):
  """Three convolutions, each with a batch norm: images to three maps."""

  def __init__(self, width: int, *, rngs: nnx.Rngs):
    widths = (1, width, 2 * width, 4 * width)
    self.convs = nnx.List(
      nnx.Conv(a, b, (3, 3), strides=2 if a > 1 else 1, rngs=rngs)
      for a, b in zip(widths, widths[1:], strict=False)
    )
    # At 0.99, the default, the statistics of a short run would lag behind.
    self.norms = nnx.List(
      nnx.BatchNorm(width, momentum=0.9, rngs=rngs) for width in widths[1:]
    )

  def __call__(self, x):
    stages = []
    for conv, norm in zip(self.convs, self.norms, strict=True):
      x = nnx.relu(norm(conv(x)))
      stages.append(x)
    return tuple(stages)


class Student(ijckd_jax.NnxBackbone):
  """The network as a backbone."""

  width: int = 16

  signed = False  # It ends in a ReLU.

  def network(self, rngs):
    """Returns a fresh network."""
    return Net(self.width, rngs=rngs)


def main(**settings) -> dict[str, float]:
  """Trains a teacher, distils the student, and returns their accuracies."""
  result = ijckd_jax.distill(
    teacher='resnet8',
    student='experiments.jax_students.nnx_student:Student',
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
