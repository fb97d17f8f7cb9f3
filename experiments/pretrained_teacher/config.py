"""The runs of this experiment, by their arm.

  ARM is teacher, fresh_ijckd, fresh_ce, pretrained_ijckd or pretrained_ce

Students from a fresh start are a shufflenet_v2_x0_5; from ImageNet's weights, a
tf_efficientnet_lite0. Their teacher is a tf_efficientnet_lite2 with ImageNet's
weights, fine-tuned on the labelled images behind the head of a linear probe. ce
learns from the labelled images alone. What starts from ImageNet's weights keeps
its running statistics: 1,000 images are few for new ones.
"""

import pathlib

from ijckd_jax.runtime import config_utils
from ijckd_jax.training import experiment

DATA = pathlib.Path('runs/garments/data')
DATA_DIR = str(DATA / 'tensorflow_datasets')
SIDE = 96
TEACHER = 'tf_efficientnet_lite2'
BACKBONES = {
  'teacher': TEACHER,
  'fresh': 'shufflenet_v2_x0_5',
  'pretrained': 'tf_efficientnet_lite0',
}
# Epochs of all 11,000 images for ijckd, and of the 1,000 labelled ones for ce.
# Both fresh students make 4,400 steps.
EPOCHS = {
  'teacher': 15.0,
  'fresh_ijckd': 20.0,
  'fresh_ce': 220.0,
  'pretrained_ijckd': 1.0,
  'pretrained_ce': 15.0,
}


def get_config(arm=None):
  """Returns the config of an arm."""
  if arm not in EPOCHS:
    raise config_utils.unknown('arm', arm or '', list(EPOCHS))
  start, method = arm.split('_') if '_' in arm else (arm, 'ce')
  config = experiment.default_config(
    dataset='image_folder',
    teacher=TEACHER,
    student=BACKBONES[start],
    method=method,
  )
  config.dataset.folder = 'garments'
  config.dataset.data_dir = DATA_DIR
  config.dataset.size = config.dataset.resize = SIDE
  config.dataset.min_area = 0.5
  config.dataset.flip = True
  config.total_epochs = EPOCHS[arm]
  config.eval_epochs = EPOCHS[arm]
  config.log_epochs = EPOCHS[arm] / 10
  config.batch_size = config.eval_batch_size = 50
  config.optimizer.name = 'adamw'
  config.optimizer.learning_rate = 2e-3 if start == 'fresh' else 5e-4
  config.optimizer.weight_decay = 0.05
  config.optimizer.decay_norm_and_bias = False
  config.optimizer.schedule = 'cosine'
  config.optimizer.warmup_epochs = EPOCHS[arm] / 20
  config.augment.label_smoothing = 0.1
  config.bounds.fit_examples = 0
  config.student.freeze_statistics = start != 'fresh'
  if start == 'pretrained':
    config.student.init_from = str(DATA / 'lite0')
  if start == 'teacher':
    config.student.init_from = str(DATA.parent / 'probed')
    config.student.init_parts = ('backbone', 'head')
  if method == 'ijckd':
    config.dataset.unlabelled = 'heap'
    config.teacher.checkpoint = str(DATA.parent / 'teacher')
    config.method.factor = config_utils.AUTO
    if start == 'fresh':
      config.teacher.store.views = 2
      config.student.max_growth = 2.5
  return config
