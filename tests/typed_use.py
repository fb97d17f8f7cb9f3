"""What a user writes, for a type checker: it is read and never run.

An ignored error stands where the user is wrong. One that is not found there is
itself an error, by `warn_unused_ignores`.
"""

from collections.abc import Mapping
from typing import Any
from typing import assert_type

import flax.linen as nn
import jax
import numpy as np

import ijckd_jax
from ijckd_jax.distillation import connectors
from ijckd_jax.models import losses

images, labels = np.zeros((8, 8, 8, 1), np.uint8), np.zeros(8, np.int32)
arrays = ijckd_jax.Arrays(images, labels)
data = ijckd_jax.ArrayDataset(
  train=arrays, test=arrays, class_names=['a', 'b'], mean=[0.5], std=[0.5]
)


class Small(ijckd_jax.Backbone):
  """A backbone of one layer."""

  width: int = 16

  @nn.compact
  def __call__(self, images: jax.Array, *, train: bool) -> ijckd_jax.Features:
    """Returns the features of images."""
    x = nn.relu(self.norm(train)(self.conv(self.width, 3)(images)))
    return ijckd_jax.Features((x,), x, self.pool(x))


class Method(ijckd_jax.Method):
  """Cross-entropy, through a connector."""

  predicts_with = 'teacher'

  def build_connector(
    self, student: ijckd_jax.Shapes, teacher: ijckd_jax.Shapes
  ) -> ijckd_jax.Connector:
    """Returns the connector."""
    return connectors.build('conv1x1', teacher)

  def loss(
    self,
    student: ijckd_jax.Outputs,
    teacher: ijckd_jax.Outputs,
    batch: Mapping[str, Any],
  ) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Returns the total and its term."""
    return losses.combine(
      labels=(1.0, lambda: losses.cross_entropy(student.logits, batch['label']))
    )


class Tracker:
  """A tracker that keeps nothing."""

  def write(self, step: int, scalars: dict[str, float]) -> None:
    """Takes a row."""

  def close(self) -> None:
    """Ends."""


def apply(variables: dict[str, jax.Array], x: jax.Array) -> ijckd_jax.Outputs:
  """Returns the outputs of a teacher without layers."""
  return ijckd_jax.Outputs((x,), x, x.mean((1, 2)), x)


teacher = ijckd_jax.Teacher(
  apply=apply,
  variables={},
  head={'kernel': jax.numpy.zeros((1, 2)), 'bias': jax.numpy.zeros(2)},
  preprocessing=ijckd_jax.Preprocessing((0.5,), (0.5,), (8, 8)),
)
assert_type(teacher.num_params, dict[str, int])

result = ijckd_jax.distill(
  teacher=[teacher, teacher],
  student='resnet8',
  data=data,
  settings={'total_epochs': 1.0},
  writers=[Tracker()],
)
assert_type(result, ijckd_jax.Result)
assert_type(result.bundle, ijckd_jax.Bundle)
assert_type(ijckd_jax.load_bundle('runs/digits').teacher(), ijckd_jax.Teacher)
dataset: ijckd_jax.Dataset = data
writer: ijckd_jax.MetricWriter = Tracker()

# What is wrong.
ijckd_jax.distill(teacher=3, student='resnet8', data='digits')  # type: ignore[arg-type]
ijckd_jax.distill(teacher='A', student='resnet8', data=images)  # type: ignore[arg-type]
ijckd_jax.distill(teacher='A', student='resnet8')  # type: ignore[call-arg]
ijckd_jax.distill(
  teacher='A',
  student='resnet8',
  data='digits',
  writers=[print],  # type: ignore[list-item]
)
ijckd_jax.Preprocessing(0.5, (0.5,), (8, 8))  # type: ignore[arg-type]
ijckd_jax.load_bundle(3)  # type: ignore[arg-type]
ijckd_jax.nothing  # type: ignore[attr-defined]  # noqa: B018
result.sumary  # type: ignore[attr-defined]  # noqa: B018
Small(widht=8)  # type: ignore[call-arg]
