"""Your own images: fine-tune a teacher, then distil a small student.

  ijckd prepare image_folder --source DIR --name pets
  wget https://download.pytorch.org/models/resnet34-b627a593.pth
  ijckd weights import --output imagenet/resnet34 \
    --checkpoint resnet34-b627a593.pth --backbone resnet34
  ijckd train --workdir runs/pets --config.num_workers=2 \
    --config image_folder:folder=pets,student=resnet18 \
    --config.teacher.init_from=imagenet/resnet34

DIR holds `train/CLASS/*.jpg` and `val/CLASS/*.jpg`, or the class folders alone,
of which a part is then held out. The teacher keeps the backbone's weights and
gets a head of its own, for your classes. A student may start from weights as
well, by `--config.student.init_from`.

Images without classes help too, since the teacher tells the student what it
sees in them: prepare their folder under another name, and give it as
`unlabelled=NAME`. They are mixed in with the training images. Given alone, as
`folder=NAME,method=simkd` with a teacher.checkpoint, they teach features.

`size=64` and the like are for small images, or for little time.

The recipe is short, for a teacher that starts from ImageNet's weights: cosine
schedule, 30 epochs of batch 64. From random weights a teacher needs far more.

  recipe=mobile    a small student, long: 200 epochs of AdamW, TrivialAugment,
                   smoothed labels, a moving average, and the largest connector
                   that keeps the student small (method.factor=auto)
  recipe=finetune  a network that starts from weights (student.init_from): 30
                   epochs of AdamW, whose early layers learn slowly, stochastic
                   depth, frozen statistics of batch norm, and the same
                   augmentation; method=ce needs no teacher
"""

import ijckd_jax
from ijckd_jax import models


def get_config(arg=None):
  """Returns the config for `folder=...,unlabelled=...,size=...` etc."""
  arg = ijckd_jax.parse_arg(
    arg,
    folder='',
    unlabelled='',
    teacher='resnet34',
    student='resnet18',
    method='ijckd',
    size='224',
    recipe=tuple(RECIPES),
  )
  config = ijckd_jax.default_config(
    dataset='image_folder',
    teacher=arg.teacher,
    student=arg.student,
    method=arg.method,
  )
  config.dataset.folder = arg.folder
  config.dataset.unlabelled = arg.unlabelled
  config.dataset.size = int(arg.size)
  config.dataset.resize = round(256 / 224 * config.dataset.size)
  config.total_epochs = 30.0
  config.batch_size = 64
  config.eval_batch_size = 64
  config.optimizer.schedule = 'cosine'
  config.optimizer.warmup_epochs = 1.0
  config.optimizer.weight_decay = 1e-4
  config.optimizer.learning_rate = 0.05
  config.teacher.learning_rate = 0.01
  RECIPES[arg.recipe](config)
  return config


def _mobile(config):
  """Makes the recipe one for a small student."""
  _use_adamw(config)
  config.total_epochs = 200.0
  config.teacher.total_epochs = 30.0  # It starts from weights, as in `short`.
  config.optimizer.warmup_epochs = 5.0
  config.optimizer.learning_rate = 1e-3
  if 'factor' in config.method:
    config.method.factor = 0  # As `auto` on the command line.


def _finetune(config):
  """Makes the recipe one for a student that starts from weights."""
  _use_adamw(config)
  config.optimizer.learning_rate = 3e-4
  config.student.freeze_statistics = True
  config.optimizer.layer_decay = 0.7
  name = config.student.backbone
  # Any other name may be that of a converted network.
  if name in models.BACKBONES and models.build(name).has_branches:
    config.student.drop_path = 0.1


def _use_adamw(config):
  """Sets what both recipes share.

  Weight decay and label smoothing are those of Liu et al. 2022,
  https://arxiv.org/abs/2201.03545, table 5; the other numbers are not tuned.
  """
  config.optimizer.name = 'adamw'
  config.optimizer.weight_decay = 0.05
  config.optimizer.decay_norm_and_bias = False
  config.teacher.learning_rate = 3e-4
  config.teacher.freeze_statistics = True
  config.augment.trivialaugment = True
  config.augment.label_smoothing = 0.1
  config.ema_decay = 0.999


RECIPES = {
  'short': lambda config: None,
  'mobile': _mobile,
  'finetune': _finetune,
}
