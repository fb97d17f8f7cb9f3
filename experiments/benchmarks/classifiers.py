"""The classifiers whose inference is timed: bundles with random weights.

What an image costs does not depend on what was learned.
"""

import dataclasses

from flax import traverse_util
import jax
import jax.numpy as jnp
import numpy as np

from ijckd_jax import models
from ijckd_jax.bundles import bundles
from ijckd_jax.data import augment
from ijckd_jax.distillation import binding
from ijckd_jax.distillation import methods
from ijckd_jax.distillation import network as network_lib

BATCH_SIZES = (1, 64)


@dataclasses.dataclass(frozen=True)
class Case:
  """A teacher and its student.

  Attributes:
    teacher, student: names in models.BACKBONES.
    image_shape: (H, W, C).
    num_classes: K.
    connectors: (name, factor) of each student that is timed, the official one
      first.
  """

  teacher: str
  student: str
  image_shape: tuple[int, int, int]
  num_classes: int
  connectors: tuple[tuple[str, int], ...] = (('bottleneck', 2),)

  def __str__(self):
    size = 'x'.join(map(str, self.image_shape))
    return f'{self.teacher} -> {self.student}, {size}'

  def bundle(self, which: str) -> bundles.Bundle:
    """Returns one of its classifiers.

    Args:
      which: 'teacher', 'alone' (the student with its own head), or a connector
        and its factor, as in 'bottleneck:2'.
    """
    if which in ('teacher', 'alone'):
      name = self.teacher if which == 'teacher' else self.student
      return alone(name, self.image_shape, self.num_classes)
    name, _, factor = which.partition(':')
    fields = methods.section('ijckd').to_dict()
    fields |= {'connector': name, 'factor': int(factor)}
    teacher = alone(self.teacher, self.image_shape, self.num_classes).teacher()
    bound = binding.bind(
      backbone=models.build(self.student, tap='stage'),
      preprocessing=preprocessing(self.image_shape),
      method=methods.build(fields),
      given=(teacher,),
      image_shape=self.image_shape,
      num_classes=self.num_classes,
      axis_name=None,
      dtype=jnp.float32,
    )
    shapes = jax.eval_shape(
      lambda: bound.init(jax.random.key(0), self.image_shape)
    )
    return bundles.Bundle(
      network=bound.deployed_network,
      variables=bound.deployed(random_arrays(shapes), bound.frozen),
      backbone_name=self.student,
      pool_name=teacher.pool_name,
      image_shape=self.image_shape,
      class_names=tuple(map(str, range(self.num_classes))),
      info={},
    )


def alone(
  name: str, image_shape: tuple[int, int, int], num_classes: int
) -> bundles.Bundle:
  """Returns a backbone under a head of its own, with random arrays."""
  backbone = models.build(name)
  network = network_lib.Network(
    backbone,
    preprocessing(image_shape),
    None,
    None,
    network_lib.pool_of(backbone),
  )
  shapes = jax.eval_shape(
    lambda: network.init(jax.random.key(0), image_shape, num_classes)
  )
  found = {'batch_stats': {'backbone': {}}, 'pool': {}, **random_arrays(shapes)}
  return bundles.Bundle(
    network=network,
    variables=found,
    backbone_name=name,
    pool_name=name,
    image_shape=image_shape,
    class_names=tuple(map(str, range(num_classes))),
    info={},
  )


def preprocessing(image_shape: tuple[int, int, int]) -> augment.Preprocessing:
  """Returns one of images that need no resizing."""
  height, width, channels = image_shape
  return augment.Preprocessing(
    (0.5,) * channels, (0.25,) * channels, (height, width)
  )


def random_arrays(shapes):
  """Returns arrays that keep the scale of what runs through a network.

  Args:
    shapes: of a network's variables, nested.
  """
  random, made = np.random.RandomState(0), {}
  for path, shape in traverse_util.flatten_dict(shapes).items():
    if path[-1] in ('var', 'scale'):
      value = random.uniform(0.5, 1.5, shape.shape)
    else:
      width = np.prod(shape.shape[:-1]) if len(shape.shape) > 1 else 100
      value = random.normal(size=shape.shape) * np.sqrt(2 / width)
    made[path] = value.astype(np.float32)
  return traverse_util.unflatten_dict(made)


BOTTLENECKS = (
  *(('bottleneck', 2), ('bottleneck', 4), ('bottleneck', 8)),
  ('bottleneck_depthwise', 2),
)
CASES = {
  # All that experiments/comparison trains.
  'fashion_pairs': Case(
    'resnet14x2',
    'resnet8',
    (14, 28, 1),
    100,
    (*BOTTLENECKS, ('conv1x1', 2), ('linear', 2)),
  ),
  'resnet32x4': Case('resnet32x4', 'resnet8x4', (32, 32, 3), 100),
  'mobile': Case('vgg13', 'mobilenet_v2_cifar_x0_5', (32, 32, 3), 100),
  'shuffle': Case('resnet32x4', 'shufflenet_v2_cifar_x0_5', (32, 32, 3), 100),
  'imagenet': Case('resnet34', 'resnet18', (224, 224, 3), 1000),
  'mobilenet_v1': Case(
    'resnet50', 'mobilenet_v1', (224, 224, 3), 1000, BOTTLENECKS
  ),
}
