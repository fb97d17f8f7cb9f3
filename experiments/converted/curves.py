"""200 IJCKD steps on digits under a converted teacher of each of five families.

  python -m experiments.converted.curves WORKDIR

Each teacher is made at random and converted, and keeps the head that it was
made with; the student is a resnet8, on one device and on eight. Writes
curves.json and curves.png.
"""

import json
import os
import pathlib
import subprocess
import sys

from ijckd_jax.data import augment

NUM_STEPS = 200
GREY = augment.Preprocessing((0.3,), (0.3,), (32, 32))
VIT = {'img_size': 32, 'patch_size': 8, 'depth': 4}
TEACHERS = {
  'ResNet': ('resnet10t', {}),
  'ConvNeXt': ('convnext_atto', {}),
  'ViT, class token': ('vit_tiny_patch16_224', VIT),
  'ViT, average': ('vit_tiny_patch16_224', {**VIT, 'global_pool': 'avg'}),
  'EfficientNet': ('efficientnet_b0', {}),
}
# A class token does not follow from the map.
POOLED = {'method.connector': 'mlp', 'method.feature_site': 'pooled'}
HERE = pathlib.Path(__file__).parent


def convert(family: str, folder: pathlib.Path) -> None:
  """Writes a family's teacher, made at random."""
  import timm
  import torch

  from experiments.converted import families
  from ijckd_jax.pytorch import converter

  name, fields = TEACHERS[family]
  torch.manual_seed(0)
  model = timm.create_model(name, in_chans=1, num_classes=10, **fields)
  families.randomise(model)
  converter.convert(
    model, name=f'timm:{name}', preprocessing=GREY, origin={}
  ).bundle.save(folder)


def run(family: str, teacher: pathlib.Path, workdir, devices: int):
  """Returns the losses of a run's steps."""
  name, _ = TEACHERS[family]
  fields = {
    'teacher.checkpoint': teacher,
    'teacher.backbone': f'timm:{name}',
    'total_epochs': 0.0,
    'total_steps': NUM_STEPS,
    'log_epochs': 0.0,
    'log_steps': 1,
    'batch_size': 32,
    'eval_batch_size': 120,
    'eval_epochs': 0.0,
    'eval_steps': NUM_STEPS,
    'sync_batch_norm': True,
    'num_cpu_devices': devices,
    'optimizer.clip_norm': 10.0,
    **(POOLED if family == 'ViT, class token' else {}),
  }
  subprocess.run(
    [sys.executable, '-m', 'ijckd_jax.main', '--workdir', str(workdir)]
    + ['--config', 'configs/digits.py']
    + [f'--config.{field}={value}' for field, value in fields.items()],
    check=True,
    env={**os.environ, 'JAX_PLATFORMS': 'cpu'},
  )
  lines = (pathlib.Path(workdir) / 'metrics.jsonl').read_text().splitlines()
  rows = map(json.loads, lines)
  return [row['train/loss'] for row in rows if 'train/loss' in row]


def plot(curves, path: pathlib.Path) -> None:
  """Draws the losses over their steps."""
  import matplotlib

  matplotlib.use('Agg')
  from matplotlib import pyplot

  figure, axes = pyplot.subplots(figsize=(7, 4), layout='constrained')
  for colour, (family, found) in enumerate(curves.items()):
    for devices, style in (('1', '-'), ('8', ':')):
      axes.plot(
        found[devices],
        style,
        color=f'C{colour}',
        linewidth=1.5 if style == '-' else 2.5,
        label=family if style == '-' else None,
      )
  axes.set(
    xlabel='step',
    ylabel='loss (log scale)',
    yscale='log',
    title='resnet8 by IJCKD under converted teachers, digits\n'
    'solid: 1 device, dotted: 8 devices, batch norm over all',
  )
  axes.legend()
  figure.savefig(path, dpi=120)


def main(work: str) -> None:
  """Converts, trains and draws."""
  curves = {}
  for number, family in enumerate(TEACHERS):
    teacher = pathlib.Path(work) / f'teacher_{number}'
    if not teacher.exists():
      convert(family, teacher)
    curves[family] = {
      str(devices): run(
        family, teacher, pathlib.Path(work) / f'run_{number}_{devices}', devices
      )
      for devices in (1, 8)
    }
    one, eight = curves[family]['1'], curves[family]['8']
    print(
      f'{family}: {one[0]:.4g} -> {one[-1]:.4g} on 1 device, '
      f'{eight[0]:.4g} -> {eight[-1]:.4g} on 8',
      flush=True,
    )
  (HERE / 'curves.json').write_text(json.dumps(curves) + '\n')
  plot(curves, HERE / 'curves.png')


if __name__ == '__main__':
  main(sys.argv[1])
