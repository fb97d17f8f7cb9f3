"""CIFAR-100 by the recipe that the distillation tables share.

  ijckd prepare cifar100
  ijckd train --config cifar100:teacher=resnet32x4,student=resnet8x4 \
    --workdir runs/cifar100

240 epochs of SGD for the teacher and as many for the student. A teacher that is
there already is named by `--config.teacher.checkpoint=runs/cifar100/teacher`.

Source of the recipe: RepDistiller, SimKD and mdistiller agree on it: batch 64,
learning rate 0.05 (0.01 for MobileNet and ShuffleNet students), times 0.1 after
epochs 150, 180 and 210, momentum 0.9, weight decay 5e-4 on everything, crop out
of 4 pixels of padding, flip.
"""

from ijckd_jax.runtime import config_utils
from ijckd_jax.training import experiment


def get_config(arg=None):
  """Returns the config for `teacher=...,student=...,method=...`."""
  arg = config_utils.parse_arg(
    arg, teacher='resnet32x4', student='resnet8x4', method='ijckd'
  )
  config = experiment.default_config(dataset='cifar100', **arg)
  config.total_epochs = 240.0
  config.batch_size = 64
  config.optimizer.schedule = 'step'
  config.optimizer.decay_epochs = (150.0, 180.0, 210.0)
  config.optimizer.learning_rate = config.teacher.learning_rate = 0.05
  if arg.student.startswith(('mobilenet', 'shufflenet')):
    config.optimizer.learning_rate = 0.01
  return config
