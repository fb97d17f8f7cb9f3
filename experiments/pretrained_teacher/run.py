"""Trains the students of this experiment, judges and ships them.

  python -m experiments.pretrained_teacher.run

after .prepare, in the same folder. The same command continues what was stopped.
Leaves runs/garments: the teacher, and in probed what it starts as; in fresh and
pretrained, students by seed with their table (sweep.md); probe_*.json, what
frozen networks are worth;
student.onnx in eight bits, and page, with student and teacher; results.json,
results.png, and a printed table.
What follows the command is given to each training: --config.total_epochs=1.
"""

import json
import os
import subprocess
import sys

import jax

from experiments.pretrained_teacher import config
from experiments.pretrained_teacher import results
from ijckd_jax.bundles import bundles
from ijckd_jax.runtime import config_utils
from ijckd_jax.training import experiment

FOLDER = config.DATA.parent
FILE = os.path.relpath(config.__file__)
DATASET = (
  *('--dataset', 'image_folder', '--data_dir', config.DATA_DIR),
  *(
    '--dataset_fields',
    f'folder=garments,size={config.SIDE},resize={config.SIDE}',
  ),
)


def main(more: list[str]) -> None:
  """Runs everything that is not there yet."""
  if not config.DATA.exists():
    raise config_utils.UserError(
      f'there is no {config.DATA}: run experiments.pretrained_teacher.prepare '
      'in this folder first'
    )
  _probe('teacher', 'lite2', '--output', FOLDER / 'probed')
  _ijckd(
    *('train', '--config', f'{FILE}:teacher'),
    *('--workdir', FOLDER / 'teacher', *more),
  )
  for start in ('fresh', 'pretrained'):
    _ijckd(
      *('sweep', '--config', f'{FILE}:{start}_ce'),
      *('--config', f'{FILE}:{start}_ijckd', '--over', 'seed=0..2'),
      *('--jobs', 2, '--workdir', FOLDER / start, *more),
    )
  untrained = FOLDER / 'data/untrained'
  if not untrained.exists():
    _untrained().save(untrained)
  _probe('fresh', 'untrained')
  _probe('pretrained', 'lite0')
  (student,) = (FOLDER / 'fresh').glob('*fresh_ijckd*seed=0')
  export = ('export', '--bundle', student, *DATASET, '--overwrite')
  _ijckd(
    *(*export, '--format', 'onnx', '--weights', 'int8'),
    *('--output', FOLDER / 'student.onnx'),
  )
  _ijckd(
    *(*export, '--format', 'web', '--teacher', FOLDER / 'teacher'),
    *('--output', FOLDER / 'page'),
  )
  results.write(FOLDER)


def _probe(what: str, bundle: str, *more) -> None:
  """Writes what the frozen features of a bundle are worth."""
  path = FOLDER / f'probe_{what}.json'
  if not path.exists():
    probe = ('probe', '--bundle', FOLDER / 'data' / bundle, *DATASET)
    found = json.loads(_ijckd(*probe, '--json', *more))
    path.write_text(json.dumps(found, indent=1) + '\n')


def _untrained() -> bundles.Bundle:
  """Returns the fresh student before its first step, as ce trains it."""
  exp = experiment.build(config.get_config('fresh_ce'))
  variables = exp.init(jax.random.key(0))
  return bundles.Bundle(
    network=exp.distiller.deployed_network,
    variables=jax.device_get(exp.distiller.deployed(variables, exp.frozen)),
    backbone_name=exp.config.student.backbone,
    pool_name=exp.config.student.backbone,
    image_shape=exp.dataset.image_shape,
    class_names=exp.dataset.class_names,
    info={},
  )


def _ijckd(*arguments) -> str:
  """Runs a command of the package, and returns what it printed."""
  command = [sys.executable, '-m', 'ijckd_jax', *map(str, arguments)]
  print('ijckd', *command[3:], flush=True)
  done = subprocess.run(command, check=False, stdout=subprocess.PIPE, text=True)
  print(done.stdout, flush=True)
  if done.returncode:
    sys.exit(done.returncode)
  return done.stdout


if __name__ == '__main__':
  config_utils.run_command(main)
