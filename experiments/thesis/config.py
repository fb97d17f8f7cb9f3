"""A run of the study: a data set and a cell by name; plan.md says why.

  ijckd train --workdir runs/thesis/glyphs/teacher \
    --config experiments/thesis/config.py:data=glyphs,cell=teacher
  ijckd train --workdir runs/thesis/glyphs/ijckd \
    --config experiments/thesis/config.py:data=glyphs,cell=ijckd \
    --config.teacher.checkpoint=runs/thesis/glyphs/teacher
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
  'dkd': ('dkd', {}),
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
# Name, and of the teacher's run the images (0: all) and the epochs.
DATA = {
  'pairs': ('fashion_pairs_100', NUM_TRAIN, 30.0),
  'glyphs': ('experiments.glyphs.dataset:Dataset', 0, 6.0),
}
# How many of the glyphs' training images have a label.
LABELS = {'all': NUM_TRAIN, 'tenth': 1_000, 'hundredth': 100}


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
  if arg.labels != 'all' and arg.data != 'glyphs':
    raise config_utils.UserError(f'labels={arg.labels} needs data=glyphs')
  dataset, teachers_images, teachers_epochs = DATA[arg.data]
  method, fields = CELLS[arg.cell]
  is_teacher = arg.cell == 'teacher'
  needs_teacher = methods.get(method).needs_teacher
  config = experiment.default_config(
    dataset=dataset,
    teacher=TEACHER if needs_teacher else '',
    student=TEACHER if is_teacher else STUDENT,
    method=method,
  )
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
    config.dataset.num_train = teachers_images
    config.dataset.crop_padding = 2
    config.total_steps = config.eval_steps = 0
    config.total_epochs = config.eval_epochs = teachers_epochs
    config.optimizer.warmup_steps = 0
    config.optimizer.warmup_epochs = 1.0
  elif arg.cell not in ('ce', 'mlkd', 'atsc'):
    # The students see no crops: one output for each image is all there is. Of
    # mlkd the second view is another one in each epoch; atsc's teacher moves.
    config.teacher.store.views = 1
  if arg.labels != 'all':
    config.dataset.num_labelled = number = LABELS[arg.labels]
    if not needs_teacher:
      config.dataset.keep_unlabelled = False
    elif 'cross_entropy_weight' in config.method:
      # The sum over the labels is divided by all images.
      config.method.cross_entropy_weight *= NUM_TRAIN / number
  return config
