"""The joint classifier of a run, fitted: a linear head on frozen features."""

from collections.abc import Callable
from collections.abc import Sequence
import json
import logging
import math
from typing import Any

from etils import epath
import jax
import numpy as np
import safetensors.numpy

from ijckd_jax.data import input_pipeline
from ijckd_jax.distillation import distiller
from ijckd_jax.evaluation import feature_extraction as features_lib
from ijckd_jax.evaluation import logistic
from ijckd_jax.runtime import config_utils
from ijckd_jax.runtime import disk
from ijckd_jax.runtime import hosts
from ijckd_jax.runtime import progress
from ijckd_jax.runtime import workdirs
from ijckd_jax.training import durations

logger = logging.getLogger('ijckd_jax')


def features(
  functions: Sequence[Callable[[Any, jax.Array], jax.Array]],
  variables: Sequence[Any],
  arrays,
  exp,
  *,
  views: int = 0,
) -> list[logistic.Features]:
  """Returns what networks make of a split, in every process all of it.

  Args:
    functions: `(variables, images) -> pooled` each.
    variables: of each, as the mapper placed them.
    arrays: datasets.Arrays.
    exp: experiment.Experiment, of which the mapper, the batches and the
      augmentation are.
    views: augmented ones of each image that are added: those that a run of
      the same seed sees in its first epochs.
  """
  config, mapper = exp.config, exp.mapper
  variables = tuple(variables)

  def function(variables, images):
    pairs = zip(functions, variables, strict=True)
    return tuple(function(own, images) for function, own in pairs)

  parts = [
    features_lib.of_split(
      features_lib.make_step(function, mapper),
      variables,
      arrays,
      mapper=mapper,
      batch_size=config.eval_batch_size,
      num_workers=config.num_workers,
    )
  ]
  if views:
    size = config.batch_size
    batches = input_pipeline.train_batches(
      arrays,
      batch_size=size,
      seed=config.seed,
      start_step=0,
      stop_step=-(-len(arrays) * views // size),
      rows=hosts.rows_of_process(size),
      num_workers=config.num_workers,
    )
    parts.append(
      features_lib.of_batches(
        features_lib.make_step(function, mapper, exp.augmentation),
        variables,
        progress.watched(
          batches,
          'reading augmented views',
          'images',
          len(arrays) * views,
          size,
        ),
        lambda batch: batch['epoch'] < views,
        mapper=mapper,
        key=mapper.replicate(jax.random.key(config.seed)),
      )
    )
  return [
    logistic.join(
      [
        logistic.Features(part['rows'][number], part['label'], part['index'])
        for part in parts
      ]
    )
    for number in range(len(functions))
  ]


def fit_teachers(exp, workdir: epath.Path, splits) -> list[logistic.Fitted]:
  """Returns heads for a run's teachers, fitted on its training set.

  What was fitted before, by the same config, is read.

  Args:
    exp: experiment.Experiment, whose teachers' heads are abstract.
    workdir: of the run.
    splits: datasets.Arrays by name.
  """
  teachers = exp.teachers
  paths = [
    workdir / workdirs.HEADS / f'teacher_{number}.safetensors'
    for number in range(len(teachers))
  ]
  if not hosts.share(lambda: all(path.exists() for path in paths)):
    functions = tuple(
      lambda variables, images, teacher=teacher: (
        teacher.apply(variables, teacher.preprocessing(images)).pooled
      )
      for teacher in teachers
    )
    variables = [exp.mapper.replicate(t.variables) for t in teachers]
    train, validation = (
      features(functions, variables, splits[split], exp, views=views)
      if len(splits[split])
      else [_nothing(teacher.num_features) for teacher in teachers]
      for split, views in (
        ('train', exp.config.teacher.head_views),
        ('validation', 0),
      )
    )

    def write():
      for rows, held_out, teacher, path in zip(
        train, validation, teachers, paths, strict=True
      ):
        fitted = logistic.fit(
          rows, held_out, teacher.num_classes, seed=exp.config.seed
        )
        disk.retry(lambda p=path, f=fitted: save(f, p), 'a fitted head')
        _say(workdir, f'the head of teacher {teacher.name}', fitted)

    hosts.share(write)
  return [load(path) for path in paths]


def _nothing(width: int) -> logistic.Features:
  empty = np.zeros(0, np.int32)
  return logistic.Features(np.zeros((0, width), np.float32), empty, empty)


def _say(workdir, what: str, fitted: logistic.Fitted) -> None:
  report = fitted.report
  logger.info(
    '%s: %s is fitted on %d rows, penalty %g: top-1 %.4f on them, %.4f on '
    'images held out',
    workdir,
    what,
    report['examples'],
    report['penalty'],
    report['train_top1'],
    report['validation_top1'],
  )


def save(fitted: logistic.Fitted, path: epath.Path) -> None:
  """Writes a head; the file appears whole or not at all."""
  data = safetensors.numpy.save(
    {name: np.ascontiguousarray(x) for name, x in fitted.head.items()},
    metadata={'report': json.dumps(fitted.report)},
  )
  path.parent.mkdir(parents=True, exist_ok=True)
  disk.write_bytes(path, data)


def load(path: epath.Path) -> logistic.Fitted:
  """Returns a head that was saved.

  Raises:
    config_utils.UserError: it is damaged.
  """
  try:
    data = path.read_bytes()
    arrays = safetensors.numpy.load(data)
    report = json.loads(disk.safetensors_metadata(data)['report'])
    return logistic.Fitted(arrays['kernel'], arrays['bias'], report)
  except Exception as error:  # Whatever a damaged file may raise.
    config_utils.raise_outside(error)
    raise config_utils.UserError(
      f'{path} is damaged ({config_utils.short(error)}): remove it, and it is '
      'fitted again'
    ) from error


class Refits:
  """The joint classifier of a run, fitted again at stated epochs.

  Each is kept in the run's folder before anything is trained through it, so
  that a run that continues after it takes the same.
  """

  def __init__(self, exp, workdir: epath.Path, splits):
    """Takes a run.

    Args:
      exp: experiment.Experiment.
      workdir: of the run.
      splits: datasets.Arrays by name.
    """
    self._exp = exp
    self._workdir = workdir
    self._splits = splits
    self._steps = [
      durations.epoch_end(epoch, len(splits['train']), exp.config.batch_size)
      for epoch in exp.config.teacher.refit_epochs
    ]

  def is_due(self, step: int) -> bool:
    """Returns whether the head changes after a step."""
    return step in self._steps

  def next_due(self, step: int) -> float:
    """Returns the first step after `step` after which the head changes."""
    return min((n for n in self._steps if n > step), default=math.inf)

  def before(self, step: int, frozen) -> distiller.Frozen:
    """Returns the arrays beside which a student of that step is evaluated.

    Args:
      step: of the student.
      frozen: distiller.Frozen with the head of the start, placed.
    """
    return self._with(frozen, [n for n in self._steps if n < step])

  def after(self, step: int, state, frozen) -> distiller.Frozen:
    """Returns the arrays with the head for what follows a step.

    A head that is due and not there is fitted, and kept.

    Args:
      step: that was made.
      state: train_state.TrainState after it.
      frozen: distiller.Frozen, placed.
    """
    if self.is_due(step) and not hosts.share(self._path(step).exists):
      self._fit(step, state, frozen)
    return self._with(frozen, [n for n in self._steps if n <= step])

  def _with(self, frozen, made):
    """Returns arrays with the last of the heads that were made, if any was."""
    if not made:
      return frozen
    head = load(self._path(made[-1])).head
    return frozen.with_joint_head(self._exp.mapper.replicate(head))

  def _fit(self, step: int, state, frozen) -> None:
    """Fits the head on the features of teacher and student, and keeps it."""
    exp = self._exp
    teacher, network = exp.teacher, exp.distiller.deployed_network
    student = exp.distiller.deployed(state.evaluated, frozen)
    functions = (
      lambda own, images: teacher(own, images).pooled,
      lambda own, images: network(own, network.preprocessing(images)).pooled,
    )
    variables = (frozen.joint, exp.mapper.replicate(student))
    train, validation = (
      logistic.join(features(functions, variables, self._splits[split], exp))
      if len(self._splits[split])
      else _nothing(teacher.num_features)
      for split in ('train', 'validation')
    )

    def write():
      fitted = logistic.fit(
        train, validation, teacher.num_classes, seed=exp.config.seed
      )
      disk.retry(lambda: save(fitted, self._path(step)), 'a fitted head')
      _say(self._workdir, f'the joint head after step {step}', fitted)

    hosts.share(write)

  def _path(self, step: int) -> epath.Path:
    return self._workdir / workdirs.HEADS / f'step_{step:08}.safetensors'
