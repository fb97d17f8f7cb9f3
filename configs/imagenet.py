"""ImageNet by the recipes of the distillation tables.

Its two archives come from https://image-net.org, and tfds looks for them in a
folder of its own:

  pip install -e '.[prepare,torch]'
  mkdir -p ~/tensorflow_datasets/downloads/manual
  mv ILSVRC2012_img_train.tar ILSVRC2012_img_val.tar \
    ~/tensorflow_datasets/downloads/manual
  ijckd prepare imagenet2012

The teachers are torchvision's, with their first weights:

  wget https://download.pytorch.org/models/resnet34-b627a593.pth
  ijckd weights import --output teachers/resnet34 \
    --checkpoint resnet34-b627a593.pth --backbone resnet34
  ijckd train --workdir runs/imagenet --config.num_workers=16 \
    --config imagenet:teacher=resnet34,student=resnet18 \
    --config.teacher.checkpoint=teachers/resnet34

and resnet50-0676ba61.pth for `teacher=resnet50,student=mobilenet_v1`. The same
command continues a run that was stopped. `--config.dtype=bfloat16` computes in
half precision; `num_workers` are the processes of each host that decode.

`recipe=pod` is for a batch of 4,096 on 16 chips, see docs/tpu.md:

  ijckd train --workdir runs/imagenet --config.num_workers=64 \
    --config imagenet:teacher=resnet34,student=resnet18,recipe=pod \
    --config.teacher.checkpoint=teachers/resnet34

Neither has been run here. Published with this recipe for resnet34 -> resnet18:
top-1 71.73 by SRRL, 71.03 by KD, 69.76 without a teacher; the last step is what
counts.

Source of the recipe: the official scripts of IJCKD and SRRL agree on SGD with
momentum 0.9, weight decay 1e-4, times 0.1 after epochs 30, 60 and 90, without
warm-up; resnet34 -> resnet18 takes 120 epochs of batch 256 at learning rate
0.1, resnet50 -> mobilenet_v1 100 epochs of batch 512 at 0.2. The pod's: Goyal
et al. 2017, https://arxiv.org/abs/1706.02677. kd, dkd and reviewkd have the
weights of mdistiller's configs/imagenet, reviewkd the width of its own code,
mlkd (configs/imagenet/r34_r18) and atsc (README) what their authors' code has.
"""

import ijckd_jax

RECIPES = ('official', 'pod')
PAIRS = ('resnet34', 'resnet18'), ('resnet50', 'mobilenet_v1')
# Fields of a method by teacher and student, where they are not its defaults.
BY_PAIR = {
  'kd': {
    pair: {'cross_entropy_weight': 0.5, 'weight': 0.5, 'temperature': 1.0}
    for pair in PAIRS
  },
  'dkd': {
    pair: {
      'nontarget_weight': weight,
      'temperature': 1.0,
      'warm_up_epochs': 1.0,
    }
    for pair, weight in zip(PAIRS, (0.5, 2.0), strict=True)
  },
  'reviewkd': {
    pair: {
      'weight': weight,
      'warm_up_epochs': 1.0,
      'width': width,
      'before_relu': True,
    }
    for pair, weight, width in zip(PAIRS, (1.0, 8.0), (512, 256), strict=True)
  },
  'mlkd': {
    PAIRS[0]: {
      'cross_entropy_weight': 0.5,
      'distillation_weight': 0.5,
      'batch_level_weight': 0.5,
      'class_level_weight': 0.5,
      'temperature': 1.0,
    }
  },
  'atsc': {('resnet50', 'resnet18'): {'change_weight': 10.0}},
}


def get_config(arg=None):
  """Returns the config for `teacher=...,student=...,method=...,recipe=...`."""
  arg = ijckd_jax.parse_arg(
    arg,
    teacher='resnet34',
    student='resnet18',
    method='ijckd',
    recipe=RECIPES,
  )
  config = ijckd_jax.default_config(
    dataset='imagenet2012',
    teacher=arg.teacher,
    student=arg.student,
    method=arg.method,
  )
  mobile = arg.student.startswith(('mobilenet', 'shufflenet'))
  config.total_epochs = 100.0 if mobile else 120.0
  config.batch_size = 512 if mobile else 256
  config.optimizer.schedule = 'step'
  config.optimizer.decay_epochs = (30.0, 60.0, 90.0)
  config.optimizer.weight_decay = 1e-4
  if arg.recipe == 'pod':
    config.batch_size = 4096
    config.dtype = 'bfloat16'
    config.optimizer.warmup_epochs = 5.0
    config.optimizer.decay_norm_and_bias = False
  rate = 0.1 * config.batch_size / 256
  config.optimizer.learning_rate = config.teacher.learning_rate = rate
  fields = BY_PAIR.get(arg.method, {}).get((arg.teacher, arg.student), {})
  config.method.update(fields)
  return config
