"""Fashion-MNIST, 28x28: minutes an epoch on a CPU, seconds on an accelerator.

  ijckd prepare fashion_mnist --source DIR
  ijckd train --config fashion_mnist --workdir runs/fashion_mnist

DIR holds the four IDX files; Debian's package dataset-fashion-mnist has them.
Without --source they are downloaded, which takes the extra `prepare`.
"""

import ijckd_jax


def get_config(arg=None):
  """Returns the config for `teacher=...,student=...,method=...`."""
  arg = ijckd_jax.parse_arg(
    arg, teacher='resnet20', student='resnet8', method='ijckd'
  )
  config = ijckd_jax.default_config(dataset='fashion_mnist', **arg)
  config.total_epochs = 30.0
  config.batch_size = 128
  config.optimizer.schedule = 'cosine'
  config.optimizer.warmup_epochs = 1.0
  config.optimizer.learning_rate = config.teacher.learning_rate = 0.1
  return config
