"""Function matching: the student sees what its teacher sees, mixed, and long.

  ijckd train --config cifar100 --workdir runs/cifar100
  ijckd train --workdir runs/function_matching \
    --config function_matching:teacher=resnet32x4,student=resnet8x4 \
    --config.teacher.checkpoint=runs/cifar100/teacher

1200 epochs of KL to the teacher, and nothing else: labels are not used, and may
be missing (-1). Without a checkpoint the teacher is trained first, from labels
and without mixing. `dataset=NAME` takes any data set of images that fit into
memory; for one of n training images, total_epochs=60000000/n is as long.

What to expect: `train/distillation`, the KL, falls for as long as it trains.
Training accuracy means little on mixed images. It has not been run at this
length: no result is claimed.

Source: Beyer et al. 2022, "Knowledge distillation: A good teacher is patient
and consistent", https://arxiv.org/abs/2106.05237; numbers from the settings
that its authors published for Flowers102 (100,000 epochs, T = 1) and ImageNet
(1200 epochs). docs/augmentation.md says what is the same and what is not.
"""

import ijckd_jax


def get_config(arg=None):
  """Returns the config for `dataset=...,teacher=...,student=...`."""
  arg = ijckd_jax.parse_arg(
    arg, dataset='cifar100', teacher='resnet32x4', student='resnet8x4'
  )
  config = ijckd_jax.default_config(**arg, method='kd')
  config.method.cross_entropy_weight = 0.0
  config.method.weight = 1.0
  config.method.temperature = 1.0
  config.augment.inception_crop = True
  config.augment.inception_area = (0.05, 1.0)
  config.augment.mixup_alpha = 1.0
  config.total_epochs = 1200.0
  config.teacher.total_epochs = 240.0
  config.eval_epochs = 10.0
  config.batch_size = 512
  config.optimizer.name = 'adamw'
  config.optimizer.learning_rate = config.teacher.learning_rate = 0.001
  config.optimizer.momentum, config.optimizer.beta2 = 0.9, 0.999
  config.optimizer.weight_decay = 0.1  # Times the learning rate: 1e-4.
  config.optimizer.decay_norm_and_bias = False
  config.optimizer.clip_norm = 1.0
  config.optimizer.schedule = 'cosine'
  config.optimizer.warmup_epochs = 15.0  # Of CIFAR, 1,465 steps.
  return config
