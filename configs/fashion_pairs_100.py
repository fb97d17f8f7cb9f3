"""A hundred classes out of Fashion-MNIST: two garments side by side.

  ijckd prepare fashion_mnist --source DIR
  ijckd train --workdir runs/pairs \
    --config fashion_pairs_100:resolution=half,num_train=10000

DIR as in fashion_mnist.py. At half resolution, 14x28, a step costs a quarter of
one at 28x56. Baselines share the teacher: `method=ce`, and
`--config.teacher.checkpoint=runs/pairs/teacher`.
"""

import ijckd_jax


def get_config(arg=None):
  """Returns the config for `teacher=...,resolution=...,num_train=...` etc."""
  arg = ijckd_jax.parse_arg(
    arg,
    teacher='resnet20',
    student='resnet8',
    method='ijckd',
    resolution='full',
    num_train='50000',
    num_test='10000',
  )
  config = ijckd_jax.default_config(
    dataset='fashion_pairs_100',
    teacher=arg.teacher,
    student=arg.student,
    method=arg.method,
  )
  config.dataset.resolution = arg.resolution
  config.dataset.num_train = int(arg.num_train)
  config.dataset.num_test = int(arg.num_test)
  config.total_epochs = 30.0
  config.batch_size = 128
  config.optimizer.schedule = 'cosine'
  config.optimizer.warmup_epochs = 1.0
  config.optimizer.learning_rate = config.teacher.learning_rate = 0.1
  return config
