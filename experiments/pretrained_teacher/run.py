"""Trains the students of this experiment, judges and ships them.

  python -m experiments.pretrained_teacher.run

after .prepare, in the same folder. The same command continues what was stopped.
Leaves runs/garments: a folder for each arm and seed; start.json, what frozen
starts are worth; student.onnx in eight bits and page, with student and teacher.
What follows the command is given to each training: --config.total_epochs=1.
"""

import json
import pathlib
import subprocess
import sys

from experiments.pretrained_teacher import config

FOLDER = pathlib.Path('runs/garments')
FILE = pathlib.Path(config.__file__)
SEEDS = (0, 1, 2)
DATASET = (
  *('--dataset', 'image_folder', '--data_dir', config.DATA_DIR),
  *(
    '--dataset_fields',
    f'folder=garments,size={config.SIDE},resize={config.SIDE}',
  ),
)


def main(more: list[str]) -> None:
  """Runs everything that is not there yet."""
  teacher = FOLDER / 'data/teacher'
  if not teacher.exists():
    probe = ('--bundle', FOLDER / 'data/lite2', '--output', teacher)
    _keep('teacher', 'probe', *probe, *DATASET)
  for seed in SEEDS:
    for arm in config.EPOCHS:
      _ijckd(
        *('train', '--config', f'{FILE}:{arm}', f'--config.seed={seed}'),
        *('--workdir', FOLDER / f'{arm}_{seed}', *more),
      )
  _keep(
    'pretrained_start', 'probe', '--bundle', FOLDER / 'data/lite0', *DATASET
  )
  student = FOLDER / 'fresh_ijckd_0'
  export = ('export', '--bundle', student, *DATASET, '--overwrite')
  _ijckd(
    *(*export, '--format', 'onnx', '--weights', 'int8'),
    *('--output', FOLDER / 'student.onnx'),
  )
  _ijckd(
    *(*export, '--format', 'web', '--teacher', teacher),
    *('--output', FOLDER / 'page'),
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


def _keep(name: str, *arguments) -> None:
  """Runs a command, and keeps what it says in a file of JSON."""
  path = FOLDER / f'{name}.json'
  if not path.exists():
    found = json.loads(_ijckd(*arguments, '--json'))
    path.write_text(json.dumps(found, indent=1) + '\n')


if __name__ == '__main__':
  main(sys.argv[1:])
