"""ImageNet: the pairs of the published tables, one command each.

  python -m experiments.imagenet_table

writes full_tables/imagenet.md, which says how to make a row of it. No row has
been made here.
"""

from experiments.full_tables import table
from ijckd_jax.runtime import config_utils

Row = table.Row

TABLE = table.Table(
  name='imagenet',
  title='ImageNet',
  recipe=(
    'configs/imagenet.py: SGD with momentum 0.9, weight decay 1e-4, times 0.1 '
    'after epochs 30, 60 and 90; for resnet18 120 epochs of batch 256 at '
    'learning rate 0.1, for mobilenet_v1 100 epochs of batch 512 at 0.2: the '
    'official scripts of IJCKD and SRRL.'
  ),
  teachers=(
    "torchvision's first weights (V1), which the published numbers use, are "
    'imported by\n\n'
    '    wget https://download.pytorch.org/models/resnet34-b627a593.pth\n'
    '    ijckd weights import '
    '--output teachers/resnet34 \\\n'
    '      --checkpoint resnet34-b627a593.pth --backbone resnet34\n\n'
    'and resnet50-0676ba61.pth likewise as teachers/resnet50.'
  ),
  sources={
    'L': "logit standardisation's paper, which quotes them: torchvision's "
    'teachers',
    'Q': "SRRL's numbers as the READMEs of NORM, KD++ and WTTM quote them",
    'M': "mdistiller's README: 100 epochs, kd, dkd and at of batch 512 at "
    'learning rate 0.2',
    'T': "torchdistill's README: its own runs",
    'S': "SimKD's issue 5, its ImageNet pair",
  },
  data=('ijckd prepare imagenet2012    # see configs/imagenet.py',),
  teacher=(
    'ijckd weights import --output teachers/{teacher} --backbone {teacher} '
    '--checkpoint FILE    # see below'
  ),
  settings={},
  options=(
    '--config.num_workers=16 --config.teacher.checkpoint=teachers/{teacher}'
  ),
  rows=(
    Row(
      'resnet34',
      'resnet18',
      (
        ('L', 'teacher', 73.31),
        ('L', 'student', 69.75),
        ('L', 'at', 70.69),
        ('L', 'ofd', 70.81),
        ('L', 'crd', 71.17),
        ('L', 'reviewkd', 71.61),
        ('L', 'simkd', 71.59),
        ('L', 'kd, standardised', 71.42),
        ('Q', 'srrl', 71.73),
        ('M', 'kd', 71.03),
        ('M', 'dkd', 71.70),
        ('M', 'dot', 71.72),
        ('T', 'student', 69.76),
        ('T', 'kd', 71.37),
        ('T', 'at', 70.90),
        ('T', 'crd', 70.93),
        ('T', 'reviewkd', 71.64),
        ('T', 'dist', 71.95),
      ),
    ),
    Row(
      'resnet50',
      'mobilenet_v1',
      (
        ('L', 'teacher', 76.16),
        ('L', 'student', 68.87),
        ('L', 'at', 69.56),
        ('L', 'ofd', 71.25),
        ('L', 'crd', 71.37),
        ('L', 'reviewkd', 72.56),
        ('L', 'simkd', 72.25),
        ('L', 'kd, standardised', 72.18),
        ('Q', 'srrl', 72.49),
        ('M', 'kd', 70.50),
        ('M', 'dkd', 72.05),
        ('M', 'dot', 73.09),
      ),
    ),
    Row('resnet50', 'resnet18', (('S', 'simkd', 71.66),)),
  ),
)


if __name__ == '__main__':
  config_utils.run_command(lambda argv: table.main(TABLE, argv))
