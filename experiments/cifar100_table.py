"""CIFAR-100: the pairs of the published tables, one command each.

  python -m experiments.cifar100_table

writes full_tables/cifar100.md, which says how to make a row of it. No row has
been made here.
"""

from experiments.full_tables import table
from ijckd_jax.runtime import config_utils

Row = table.Row


def _numbers(source: str, names: str, values: str):
  """Returns (source, method, number) of two lists; '-' where there is none."""
  pairs = zip(names.split(), values.split(), strict=True)
  return tuple((source, n, float(v)) for n, v in pairs if v != '-')


def _crd(values: str):
  """Returns RepDistiller's numbers of a pair of one family."""
  names = 'teacher student kd fitnet at sp cc vid rkd pkt ab ft fsp nst crd'
  return _numbers('R', names, values)


def _crd_other(values: str):
  """Returns those of a pair of two families, which have no FSP."""
  names = 'teacher student kd fitnet at sp cc vid rkd pkt ab ft nst crd'
  return _numbers('R', names, values)


def _simkd(values: str):
  """Returns the numbers of SimKD's README, whose teacher has 79.42."""
  names = (
    'teacher student kd fitnet at sp vid crd srrl semckd simkd/8 simkd/4 simkd'
  )
  return _numbers('S', names, f'79.42 {values}')


_BESIDE_KD = {'method.add': 'kd:weight=1.0'}


def _of(source, **methods):
  return tuple((source, name, value) for name, value in methods.items())


TABLE = table.Table(
  name='cifar100',
  title='CIFAR-100',
  recipe=(
    'configs/cifar100.py: 240 epochs of SGD, batch 64, learning rate 0.05 '
    '(0.01 for MobileNet and ShuffleNet), times 0.1 after epochs 150, 180 and '
    '210, momentum 0.9, weight decay 5e-4, crops out of 4 pixels of padding, '
    'flips: the recipe on which RepDistiller, SimKD and mdistiller agree. dkd, '
    'reviewkd and dist have the weights that their authors chose for the pair, '
    'where they did.'
  ),
  teachers=(
    'One of each architecture, in `teachers/NAME`, which all its rows share: '
    'trained by the command above, or those of RepDistiller, which the sources '
    'R, M and L use. They are in '
    '`cifar_teachers.tar` of https://github.com/megvii-research/mdistiller, '
    "release `checkpoints`, and are imported (`pip install -e '.[torch]'`) by"
    '\n\n'
    '    ijckd weights import '
    '--output teachers/resnet32x4 --backbone resnet32x4 \\\n'
    '      --checkpoint download_ckpts/cifar_teachers/resnet32x4_vanilla/'
    'ckpt_epoch_240.pth'
  ),
  sources={
    'R': "RepDistiller's README (CRD's tables): its teachers, last epoch, "
    'the method beside CE and without KD (KD: 0.1 CE, 0.9 KD, T 4)',
    'S': "SimKD's README: its own teacher, best epoch, the method beside CE + "
    'KD (KD: 1 CE, 1 KD, T 4), but SimKD alone; simkd/8 and simkd/4: factors '
    '8 and 4 instead of 2',
    'M': "mdistiller's README: RepDistiller's teachers; dot: KD trained with "
    'DOT',
    'L': "logit standardisation's paper: RepDistiller's teachers, mean of 4, "
    'best epoch',
    'Q': 'quoted by others: srrl, simkd and semckd by NORM and SDD, dist by '
    "KD++; mostly RepDistiller's teachers",
  },
  data=(
    'wget https://www.cs.toronto.edu/~kriz/cifar-100-python.tar.gz',
    "ijckd prepare cifar100 --source .    # or where uoft-cs/cifar100's "
    'parquet files are',
  ),
  teacher=(
    'ijckd train --workdir teachers/{teacher} --config '
    'cifar100:student={teacher},method=ce --config.seed=1000'
  ),
  settings={
    'S': {
      'kd': {'method.cross_entropy_weight': 1.0, 'method.weight': 1.0},
      'fitnet': {**_BESIDE_KD, 'method.stage': 1},
      **{name: _BESIDE_KD for name in ('at', 'sp', 'vid', 'crd')},
      'srrl': {'method.connects': 'pooled', 'method.distillation_weight': 1.0},
      'simkd/8': {'method.factor': 8},
      'simkd/4': {'method.factor': 4},
    },
  },
  options='--config.teacher.checkpoint=teachers/{teacher}',
  rows=(
    Row(
      'wrn_40_2',
      'wrn_16_2',
      _crd(
        '75.61 73.26 74.92 73.58 74.08 73.83 73.56 74.11 73.35 74.54 '
        '72.50 73.25 72.91 73.68 75.48'
      )
      + _of('M', dkd=76.23)
      + _of('L', ofd=75.24, reviewkd=76.12, simkd=75.53),
    ),
    Row(
      'wrn_40_2',
      'wrn_40_1',
      _crd(
        '75.61 71.98 73.54 72.24 72.77 72.43 72.21 73.30 72.22 73.45 '
        '72.38 71.59 - 72.24 74.14'
      )
      + _of('M', dkd=74.81)
      + _of('L', ofd=74.33, reviewkd=75.09, simkd=74.53)
      + _of('Q', srrl=74.64, semckd=74.41, dist=74.42),
    ),
    Row(
      'resnet56',
      'resnet20',
      _crd(
        '72.34 69.06 70.66 69.21 70.55 69.67 69.63 70.38 69.61 70.34 '
        '69.47 69.84 69.95 69.60 71.16'
      )
      + _of('M', dkd=71.97)
      + _of('L', ofd=70.98, reviewkd=71.89, simkd=71.05)
      + _of('Q', dist=71.78),
    ),
    Row(
      'resnet110',
      'resnet20',
      _crd(
        '74.31 69.06 70.67 68.99 70.22 70.04 69.48 70.16 69.25 70.25 '
        '69.53 70.22 70.11 69.53 71.46'
      )
      + _of('L', ofd=71.29, reviewkd=71.34, simkd=71.06),
    ),
    Row(
      'resnet110',
      'resnet32',
      _crd(
        '74.31 71.14 73.08 71.06 72.31 72.69 71.48 72.61 71.82 72.61 '
        '70.98 72.37 71.89 71.96 73.48'
      )
      + _of('M', dkd=74.11)
      + _of('L', ofd=73.23, reviewkd=73.89, simkd=73.92),
    ),
    Row(
      'resnet32x4',
      'resnet8x4',
      _crd(
        '79.42 72.50 73.33 73.50 73.44 72.94 72.97 73.09 71.90 73.64 '
        '73.17 72.86 72.62 73.30 75.51'
      )
      + _simkd(
        '73.09 74.42 74.32 75.07 74.29 74.55 75.59 75.39 76.23 76.73 '
        '77.88 78.08'
      )
      + _of('M', dkd=76.32, dot=75.12)
      + _of('L', ofd=74.95, reviewkd=75.63, simkd=78.08)
      + _of('Q', dist=75.79),
    ),
    Row(
      'vgg13',
      'vgg8',
      _crd(
        '74.64 70.36 72.98 71.02 71.43 72.68 70.71 71.23 71.48 72.88 '
        '70.94 70.58 70.23 71.53 73.94'
      )
      + _of('M', dkd=74.68, dot=73.77)
      + _of('L', ofd=73.95, reviewkd=74.84, simkd=74.89)
      + _of('Q', semckd=74.43),
    ),
    Row(
      'vgg13',
      'mobilenet_v2_cifar_x0_5',
      _crd_other(
        '74.64 64.60 67.37 64.14 59.40 66.30 64.86 65.56 64.52 67.13 '
        '66.06 61.78 58.16 69.73'
      )
      + _of('M', dkd=69.71)
      + _of('L', reviewkd=70.37, simkd=69.44)
      + _of('Q', semckd=69.98),
    ),
    Row(
      'resnet50_cifar',
      'mobilenet_v2_cifar_x0_5',
      _crd_other(
        '79.34 64.60 67.35 63.16 58.58 68.08 65.43 67.57 64.43 66.52 '
        '67.20 60.99 64.96 69.11'
      )
      + _of('M', dkd=70.35)
      + _of('L', reviewkd=69.89, simkd=69.97)
      + _of('Q', semckd=68.69, dist=69.17),
    ),
    Row(
      'resnet50_cifar',
      'vgg8',
      _crd_other(
        '79.34 70.36 73.81 70.69 71.84 73.34 70.25 70.30 71.50 73.01 '
        '70.65 70.29 71.28 74.30'
      )
      + _of('Q', semckd=74.18),
    ),
    Row(
      'resnet32x4',
      'shufflenet_v1_cifar',
      _crd_other(
        '79.42 70.50 74.07 73.59 71.73 73.48 71.14 73.38 72.28 74.10 '
        '73.55 71.75 74.12 75.11'
      )
      + _of('M', dkd=76.45)
      + _of('Q', srrl=75.18, simkd=77.18, semckd=76.31, dist=75.23),
    ),
    Row(
      'resnet32x4',
      'shufflenet_v2_cifar_x1_0',
      _crd_other(
        '79.42 71.82 74.45 73.54 72.73 74.56 71.29 73.40 73.21 74.69 '
        '74.31 72.50 74.68 75.65'
      )
      + _of('M', dkd=77.07, dot=75.55)
      + _of('L', reviewkd=77.78, simkd=78.39)
      + _of('Q', semckd=77.62, dist=76.08),
    ),
    Row(
      'wrn_40_2',
      'shufflenet_v1_cifar',
      _crd_other(
        '75.61 70.50 74.83 73.73 73.32 74.52 71.38 73.61 72.21 73.89 '
        '73.34 72.03 74.89 76.05'
      )
      + _of('M', dkd=76.70)
      + _of('Q', semckd=76.06),
    ),
    Row(
      'resnet32x4',
      'vgg8',
      _simkd(
        '70.46 72.73 72.91 71.90 73.12 73.19 73.54 73.23 75.27 74.74 '
        '75.62 75.76'
      ),
    ),
    Row(
      'resnet32x4',
      'shufflenet_v2_cifar_x1_5',
      _simkd(
        '74.15 76.82 77.12 77.51 77.18 77.11 77.66 77.55 79.13 78.96 '
        '79.48 79.54'
      ),
    ),
    Row('resnet32x4', 'wrn_16_2', _of('L', reviewkd=76.11, simkd=77.17)),
    Row('resnet32x4', 'wrn_40_2', _of('L', reviewkd=78.96, simkd=79.29)),
    Row('wrn_40_2', 'resnet8x4', _of('L', reviewkd=74.34, simkd=75.29)),
    Row(
      'wrn_40_2',
      'mobilenet_v2_cifar_x0_5',
      _of('L', reviewkd=71.28, simkd=70.10),
    ),
  ),
)


if __name__ == '__main__':
  config_utils.run_command(lambda argv: table.main(TABLE, argv))
