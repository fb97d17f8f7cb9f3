"""The runs of the study: pairs, methods, connectors, weights and seeds.

  python -m experiments.bound_study.train WORKDIR

Run again, it goes on where it was stopped. With `--worker 0 --workers 2`, and
`--worker 1 --workers 2` beside it, two of them share the runs. Fashion-MNIST
must be prepared (see configs/fashion_mnist.py).
"""

import argparse
import gc
import logging
import pathlib

import jax

from ijckd_jax.runtime import compilation_cache
from ijckd_jax.runtime import config_utils
from ijckd_jax.training import experiment
from ijckd_jax.training import train

SEEDS = (0, 1, 2)
EPOCHS = 15.0
# What is trained for each pair: a method, and its fields other than default.
METHODS = {
  'ce': ('ce', {}),
  'kd': ('kd', {}),
  'srrl': ('srrl', {}),
  'simkd': ('simkd', {}),
  'ijckd': ('ijckd', {}),
}
CONNECTORS = {
  'conv1x1': ('ijckd', {'connector': 'conv1x1'}),
  'bottleneck8': ('ijckd', {'factor': 8}),
  'depthwise': ('ijckd', {'connector': 'bottleneck_depthwise'}),
  'mlp': ('ijckd', {'connector': 'mlp', 'feature_site': 'pooled'}),
}
WEIGHTS = {
  'labels': ('ijckd', {'logit_weight': 0.0, 'feature_weight': 0.0}),
  'logits': ('ijckd', {'cross_entropy_weight': 0.0, 'feature_weight': 0.0}),
  'unlabelled': ('ijckd', {'cross_entropy_weight': 0.0}),
}
ALL = {**METHODS, **CONNECTORS, **WEIGHTS}
# Teacher, student, what is trained.
PAIRS = {
  'resnet20_resnet8': ('resnet20', 'resnet8', ALL),
  'resnet14x2_resnet8': ('resnet14x2', 'resnet8', ALL),
  'resnet20_mobilenet': ('resnet20', 'mobilenet_v2_cifar_x0_5', METHODS),
}


def teacher_dir(work: pathlib.Path, teacher: str) -> pathlib.Path:
  """Returns the folder of a teacher's run."""
  return work / 'teachers' / teacher


def run_dir(work: pathlib.Path, pair: str, name: str, seed: int):
  """Returns the folder of a student's run."""
  return work / pair / f'{name}_{seed}'


def all_runs() -> list[tuple[str, str, int]]:
  """Returns the pair, the name and the seed of every student."""
  return [
    (pair, name, seed)
    for pair, (_, _, trained) in PAIRS.items()
    for seed in SEEDS
    for name in trained
  ]


def config_of(student: str, method: str, num_train: int, epochs: float):
  """Returns the config that all runs share, of one network."""
  config = experiment.default_config(
    dataset='fashion_pairs_100', teacher='', student=student, method=method
  )
  config.dataset.resolution = 'half'
  config.dataset.num_train = num_train
  config.total_epochs = config.eval_epochs = epochs
  config.batch_size = 128
  config.optimizer.schedule = 'cosine'
  config.optimizer.warmup_epochs = 1.0
  config.optimizer.learning_rate = 0.1
  return config


def train_teacher(work: pathlib.Path, teacher: str) -> None:
  """Trains a teacher, on twice as many pairs as the students see."""
  config = config_of(teacher, 'ce', 10_000, EPOCHS)
  config.seed = 1000
  train.train_and_evaluate(config, teacher_dir(work, teacher))


def train_student(work, pair: str, name: str, seed: int) -> None:
  """Trains one student of a pair."""
  teacher, student, trained = PAIRS[pair]
  method, fields = trained[name]
  config = config_of(student, method, 5_000, EPOCHS)
  config_utils.override(
    config, {f'method.{field}': value for field, value in fields.items()}
  )
  config.seed = seed
  config.teacher.backbone = teacher
  config.teacher.checkpoint = str(teacher_dir(work, teacher))
  if name not in ('ce', 'labels'):  # What the others read of the teacher.
    config.teacher.store.views = 1
  train.train_and_evaluate(config, run_dir(work, pair, name, seed))


def main() -> None:
  """Trains what is not trained yet."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('work', type=pathlib.Path)
  parser.add_argument('--worker', type=int, default=0)
  parser.add_argument('--workers', type=int, default=1)
  flags = parser.parse_args()
  logging.basicConfig(level=logging.INFO, format='%(message)s')
  compilation_cache.enable(compilation_cache.DEFAULT)
  for teacher in dict.fromkeys(teacher for teacher, _, _ in PAIRS.values()):
    try:
      train_teacher(flags.work, teacher)
    except config_utils.UserError as error:  # Another worker is at it.
      logging.warning('%s', error)
  for run in all_runs()[flags.worker :: flags.workers]:
    train_student(flags.work, *run)
    jax.clear_caches()
    gc.collect()


if __name__ == '__main__':
  main()
