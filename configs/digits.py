"""scikit-learn's handwritten digits, 8x8 pixels: a smoke test, not a result.

  ijckd train --config digits --workdir runs/digits

The data come with scikit-learn.
"""

import ijckd_jax


def get_config(arg=None):
  arg = ijckd_jax.parse_arg(
    arg, teacher='resnet20', student='resnet8', method='ijckd'
  )
  config = ijckd_jax.default_config(dataset='digits', **arg)
  config.total_epochs = 20.0
  config.batch_size = 60
  config.eval_batch_size = 180
  config.optimizer.schedule = 'cosine'
  config.optimizer.warmup_epochs = 1.0
  config.optimizer.learning_rate = 0.05
  return config
