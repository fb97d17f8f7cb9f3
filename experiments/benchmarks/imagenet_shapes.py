"""ImageNet's shapes without its images, to count what a step costs.

  python -m ijckd_jax.compile --topology v5e:2x2 \
    --config experiments/benchmarks/imagenet_shapes.py

The arguments are those of `configs/cifar100.py`: teacher, student and method.
"""

import dataclasses

from ijckd_jax import config_utils
from ijckd_jax import experiment


@dataclasses.dataclass(frozen=True)
class Dataset:
  """A thousand classes of 224x224 images, cropped before they arrive.

  mean and std are those of torchvision's published networks.
  """

  crop_padding: int = 0
  flip: bool = True

  image_shape = (224, 224, 3)
  class_names = tuple(f'class {i}' for i in range(1000))
  mean = (0.485, 0.456, 0.406)
  std = (0.229, 0.224, 0.225)

  def load(self, split):
    """Raises: there are no images."""
    raise config_utils.UserError(
      f'imagenet_shapes has no {split} images: it is there for the budgets of '
      'python -m ijckd_jax.compile'
    )


def get_config(arg=None):
  """Returns the config for `teacher=...,student=...,method=...`.

  Source of the recipe: IJCKD's official r34_r18.yaml: 120 epochs, batch 256,
  learning rate 0.1, times 0.1 after epochs 30, 60 and 90, weight decay 1e-4.
  """
  arg = config_utils.parse_arg(
    arg, teacher='resnet34', student='resnet18', method='ijckd'
  )
  config = experiment.default_config(
    dataset='experiments.benchmarks.imagenet_shapes:Dataset', **arg
  )
  config.total_epochs = 120.0
  config.batch_size = 256
  config.dtype = 'bfloat16'
  config.optimizer.learning_rate = config.teacher.learning_rate = 0.1
  config.optimizer.decay_epochs = (30.0, 60.0, 90.0)
  config.optimizer.weight_decay = 1e-4
  return config
