"""A run of the study: a data set and a cell by name; plan.md says why.

  ijckd train --workdir runs/thesis/glyphs/teacher \
    --config experiments/thesis/config.py:data=glyphs,cell=teacher
  ijckd train --workdir runs/thesis/glyphs/ijckd \
    --config experiments/thesis/config.py:data=glyphs,cell=ijckd \
    --config.teacher.checkpoint=runs/thesis/glyphs/teacher
"""

from ijckd_jax.runtime import config_utils
from ijckd_jax.training import experiment

TEACHER, STUDENT = 'resnet14x2', 'resnet8'
TEACHER_SEED = 1000  # Of no student.
EPOCHS = 30.0
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
}
DATA = {
  'pairs': (
    'fashion_pairs_100',
    {'resolution': 'half', 'num_train': 10_000, 'num_test': 10_000},
  ),
  'glyphs': (
    'experiments.glyphs.dataset:Dataset',
    {'resolution': 'half', 'num_train': 10_000, 'num_test': 10_000},
  ),
}
# How many of the glyphs' training images have a label.
LABELS = {'all': 0, 'tenth': 1_000, 'hundredth': 100}


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
  dataset, fields = DATA[arg.data]
  method, method_fields = CELLS[arg.cell]
  is_teacher = arg.cell == 'teacher'
  config = experiment.default_config(
    dataset=dataset,
    teacher='' if method == 'ce' else TEACHER,
    student=TEACHER if is_teacher else STUDENT,
    method=method,
  )
  config.dataset.update(fields)
  config.method.update(method_fields)
  config.total_epochs = config.eval_epochs = EPOCHS
  config.batch_size = 128
  config.optimizer.schedule = 'cosine'
  config.optimizer.warmup_epochs = 1.0
  config.optimizer.learning_rate = 0.1
  config.bounds.fit_examples = 0
  if is_teacher:
    config.seed = TEACHER_SEED
    config.dataset.crop_padding = 2
  elif method != 'ce':
    config.teacher.store.views = 1
  if arg.labels != 'all':
    config.dataset.num_labelled = LABELS[arg.labels]
  return config
