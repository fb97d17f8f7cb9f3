"""CIFAR-100 by the recipe that the distillation tables share.

  ijckd prepare cifar100
  ijckd train --config cifar100:teacher=resnet32x4,student=resnet8x4 \
    --workdir runs/cifar100

240 epochs of SGD for the teacher and as many for the student. A teacher that is
there already is named by `--config.teacher.checkpoint=runs/cifar100/teacher`.

Source of the recipe: RepDistiller, SimKD and mdistiller agree on it: batch 64,
learning rate 0.05 (0.01 for MobileNet and ShuffleNet), times 0.1 after epochs
150, 180 and 210, momentum 0.9, weight decay 5e-4 on everything, crop out of 4
pixels of padding, flip. A method has the weights by which its authors made the
number of a pair: dkd those of mdistiller's configs/cifar100/dkd, reviewkd those
of its script/reviewKD.sh, dist those of its dist_cifar.yaml.
"""

import ijckd_jax

MOBILE = 'mobilenet', 'shufflenet'
# Fields of a method by teacher and student, where they are not its defaults.
BY_PAIR = {
  'dkd': {
    ('resnet56', 'resnet20'): {'nontarget_weight': 2.0},
    ('resnet110', 'resnet32'): {'nontarget_weight': 2.0},
    ('vgg13', 'vgg8'): {'nontarget_weight': 6.0},
    ('vgg13', 'mobilenet_v2_cifar_x0_5'): {'nontarget_weight': 6.0},
    ('wrn_40_2', 'wrn_16_2'): {'nontarget_weight': 6.0},
    ('wrn_40_2', 'wrn_40_1'): {'nontarget_weight': 6.0},
  },
  'reviewkd': {
    ('resnet32x4', 'shufflenet_v2_cifar_x1_0'): {'weight': 8.0},
    ('resnet56', 'resnet20'): {'weight': 0.6},
    ('resnet110', 'resnet32'): {'weight': 1.0},
  },
}


def get_config(arg=None):
  """Returns the config for `teacher=...,student=...,method=...`."""
  arg = ijckd_jax.parse_arg(
    arg, teacher='resnet32x4', student='resnet8x4', method='ijckd'
  )
  config = ijckd_jax.default_config(dataset='cifar100', **arg)
  config.total_epochs = 240.0
  config.batch_size = 64
  config.optimizer.schedule = 'step'
  config.optimizer.decay_epochs = (150.0, 180.0, 210.0)
  config.optimizer.learning_rate = (
    0.01 if arg.student.startswith(MOBILE) else 0.05
  )
  config.teacher.learning_rate = (
    0.01 if arg.teacher.startswith(MOBILE) else 0.05
  )
  fields = BY_PAIR.get(arg.method, {}).get((arg.teacher, arg.student), {})
  config.method.update(fields)
  if arg.method == 'dist':
    config.method.temperature = 4.0
  return config
