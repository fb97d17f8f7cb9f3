"""A run of the study: a data set and a cell by name; plan.md says why.

  ijckd train --workdir runs/thesis/glyphs/teacher \
    --config experiments/thesis/config.py:data=glyphs,cell=teacher
  ijckd train --workdir runs/thesis/glyphs/ijckd \
    --config experiments/thesis/config.py:data=glyphs,cell=ijckd \
    --config.teacher.checkpoint=runs/thesis/glyphs/teacher

The teacher of data=garments is EfficientNet-Lite0 with ImageNet's weights
(experiments/pretrained_teacher/prepare.py imports it) and a head of its own:

  ijckd probe --bundle runs/garments/data/lite0 --output T \
    --dataset experiments.thesis.garments:Dataset --dataset_fields \
    num_train=10000,num_labelled=1000,keep_unlabelled=False,num_test=5000
"""

from ijckd_jax.distillation import methods
from ijckd_jax.runtime import config_utils
from ijckd_jax.training import experiment

TEACHER, STUDENT = 'resnet14x2', 'resnet8'
TEACHER_SEED = 1000  # Of no student.
NUM_TRAIN, NUM_TEST = 10_000, 10_000
BATCH_SIZE, EPOCHS = 128, 15.0
# A method and its fields other than default.
CELLS = {
  'ijckd': ('ijckd', {}),
  'fresh_head': ('ijckd', {'head': 'fresh'}),
  'copied_head': ('ijckd', {'head': 'copy'}),
  'no_features': ('ijckd', {'feature_weight': 0.0}),
  'own_head': (
    'kd',
    {'cross_entropy_weight': 1.0, 'weight': 0.0, 'logit_weight': 1.0},
  ),
  # 20 of mdistiller's 240 epochs, of 15; the default would never end.
  'dkd': ('dkd', {'warm_up_epochs': 1.25}),
  'dkd_default': ('dkd', {}),
  'control': (
    'ijckd',
    {'head': 'fresh', 'logit_weight': 0.0, 'feature_weight': 0.0},
  ),
  'ce': ('ce', {}),
  'teacher': ('ce', {}),
  'kd': ('kd', {}),
  'srrl': ('srrl', {}),
  'simkd': ('simkd', {}),
  'wttm': ('wttm', {}),
  'pefd': ('pefd', {}),
  'srd': ('srd', {}),
  'mlkd': ('mlkd', {}),
  'atsc': ('atsc', {}),
}
DATA = {
  'pairs': 'fashion_pairs_100',
  'glyphs': 'experiments.glyphs.dataset:Dataset',
  'garments': 'experiments.thesis.garments:Dataset',
}
# Images (0: all) and epochs of the teacher's run.
TEACHERS = {'pairs': (NUM_TRAIN, 30.0), 'glyphs': (0, 6.0)}
PRETRAINED = 'tf_efficientnet_lite0'
# How many of the training images have a label, and on which data.
LABELS = {'all': NUM_TRAIN, 'tenth': 1_000, 'hundredth': 100}
LABELLED = {
  'pairs': ('all',),
  'glyphs': ('all', 'tenth', 'hundredth'),
  'garments': ('tenth',),
}


def get_config(arg=None):
  """Returns the config for `data=...,cell=...,labels=...`."""
  arg = config_utils.parse_arg(arg, data='pairs', cell='ijckd', labels='all')
  for what, value, known in (
    ('data', arg.data, DATA),
    ('cell', arg.cell, CELLS),
    ('labels', arg.labels, LABELS),
  ):
    if value not in known:
      raise config_utils.unknown(what, value, known)
  if arg.labels not in LABELLED[arg.data]:
    raise config_utils.UserError(
      f'data={arg.data} takes labels={" or ".join(LABELLED[arg.data])}'
    )
  is_teacher = arg.cell == 'teacher'
  if is_teacher and arg.data not in TEACHERS:
    raise config_utils.UserError(
      f'data={arg.data}: no run trains its teacher, ijckd probe makes it'
    )
  method, fields = CELLS[arg.cell]
  needs_teacher = methods.get(method).needs_teacher
  teacher = TEACHER if arg.data in TEACHERS else PRETRAINED
  config = experiment.default_config(
    dataset=DATA[arg.data],
    teacher=teacher if needs_teacher else '',
    student=TEACHER if is_teacher else STUDENT,
    method=method,
  )
  if arg.data == 'garments':
    config.dataset.crop_padding, config.dataset.flip = 0, False
    config.student.max_growth = 2.5
    if 'factor' in config.method:
      config.method.factor = config_utils.AUTO
  else:
    config.dataset.resolution = 'half'
  config.dataset.num_train, config.dataset.num_test = NUM_TRAIN, NUM_TEST
  config.method.update(fields)
  config.batch_size = BATCH_SIZE
  # As many updates for all students, on however many images.
  config.total_steps = config.eval_steps = int(EPOCHS * NUM_TRAIN / BATCH_SIZE)
  config.eval_epochs = 0.0
  config.optimizer.schedule = 'cosine'
  config.optimizer.warmup_steps = NUM_TRAIN // BATCH_SIZE
  config.optimizer.learning_rate = 0.1
  config.bounds.fit_examples = 0
  if is_teacher:
    config.seed = TEACHER_SEED
    config.dataset.num_train, epochs = TEACHERS[arg.data]
    config.dataset.crop_padding = 2
    config.total_steps = config.eval_steps = 0
    config.total_epochs = config.eval_epochs = epochs
    config.optimizer.warmup_steps = 0
    config.optimizer.warmup_epochs = 1.0
  elif arg.cell not in ('ce', 'control', 'mlkd', 'atsc'):
    # The students see no crops: one output for each image is all there is. The
    # control reads none; mlkd's second view is another one in each epoch; and
    # atsc's teacher moves.
    config.teacher.store.views = 1
  if arg.labels != 'all':
    config.dataset.num_labelled = number = LABELS[arg.labels]
    if not needs_teacher:
      config.dataset.keep_unlabelled = False
    elif 'cross_entropy_weight' in config.method:
      # The sum over the labels is divided by all images.
      config.method.cross_entropy_weight *= NUM_TRAIN / number
  return config
