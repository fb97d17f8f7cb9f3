"""The pairs of the study: teachers on Fashion-MNIST, and their students.

  python -m experiments.shift_study.train WORKDIR

Run again, it goes on where it was stopped. Fashion-MNIST must be prepared (see
configs/fashion_mnist.py).
"""

import argparse
import logging
import pathlib

from ijckd_jax.runtime import compilation_cache
from ijckd_jax.training import experiment
from ijckd_jax.training import train

# The calibrated estimate was designed on students of the first teacher, and was
# fixed before any student of the second one was trained.
TEACHERS, STUDENT = ('resnet20', 'wrn_16_1'), 'resnet8'
METHODS = ('ijckd', 'simkd', 'srrl', 'kd', 'ce')
# 12,000 images to train on; 48,000 that are labelled and not trained on.
HELD_OUT = 0.8


def methods(teacher: str) -> tuple[str, ...]:
  """Returns the methods of a teacher's students.

  Without a teacher, there is one student: it is beside the first teacher.
  """
  return tuple(x for x in METHODS if x != 'ce' or teacher == TEACHERS[0])


def config_of(backbone: str, method: str):
  """Returns the config that all runs share, of one network."""
  config = experiment.default_config(
    dataset='fashion_mnist', teacher='', student=backbone, method=method
  )
  config.dataset.validation_fraction = HELD_OUT
  config.dataset.crop_padding = 0
  config.dataset.flip = False
  config.total_epochs = config.eval_epochs = 12.0
  config.batch_size = 128
  config.optimizer.schedule = 'cosine'
  config.optimizer.warmup_epochs = 1.0
  config.optimizer.learning_rate = 0.1
  return config


def main() -> None:
  """Trains what is not trained yet."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('work', type=pathlib.Path)
  flags = parser.parse_args()
  logging.basicConfig(level=logging.INFO, format='%(message)s')
  compilation_cache.enable(compilation_cache.DEFAULT)
  for backbone in TEACHERS:
    teacher = config_of(backbone, 'ce')
    teacher.seed = 1000
    checkpoint = flags.work / backbone / 'teacher'
    train.train_and_evaluate(teacher, checkpoint)
    for method in methods(backbone):
      config = config_of(STUDENT, method)
      if method != 'ce':
        config.teacher.backbone = backbone
        config.teacher.checkpoint = str(checkpoint)
        config.teacher.store.views = 1
      train.train_and_evaluate(config, flags.work / backbone / method)


if __name__ == '__main__':
  main()
