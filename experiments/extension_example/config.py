"""Everything in this folder at once.

  ijckd train --workdir runs/extension \
    --config experiments/extension_example/config.py
"""

import ijckd_jax

HERE = 'experiments.extension_example'


def get_config():
  """Returns the config."""
  config = ijckd_jax.default_config(
    dataset=f'{HERE}.dataset:Dataset',
    teacher='resnet8',
    student=f'{HERE}.backbone:PlainNet',
    method=f'{HERE}.method:Method',
  )
  config.total_epochs = 10.0
  config.batch_size = 60
  config.eval_batch_size = 180
  config.optimizer.schedule = 'cosine'
  return config
