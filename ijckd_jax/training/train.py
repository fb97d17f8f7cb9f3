"""Runs: a teacher, a student, what they were worth, what is kept."""

from collections.abc import Mapping
from collections.abc import Sequence
import contextlib
import dataclasses
import logging
import os
import tempfile
from typing import Any

from etils import epath
import jax
import ml_collections

from ijckd_jax import models
from ijckd_jax.data import datasets
from ijckd_jax.distillation import teachers
from ijckd_jax.runtime import backend
from ijckd_jax.runtime import config_utils
from ijckd_jax.runtime import hosts
from ijckd_jax.runtime import locks
from ijckd_jax.runtime import progress as progress_lib
from ijckd_jax.runtime import workdirs
from ijckd_jax.runtime import workers
from ijckd_jax.training import experiment
from ijckd_jax.training import feeding
from ijckd_jax.training import head_fitting
from ijckd_jax.training import loop
from ijckd_jax.training import metric_writer
from ijckd_jax.training import one_run
from ijckd_jax.training import output_recorder
from ijckd_jax.training import results
from ijckd_jax.training import run_record
from ijckd_jax.training import trackers

# Where hosts may differ: in where things lie, and how many hands they have.
HOST_FIELDS = (
  'compilation_cache',
  'dataset.data_dir',
  'num_workers',
  'teacher.checkpoint',
  'teacher.others',
  'teacher.store.directory',
)
NOT_KEPT = 'nothing is kept, because no workdir was given'

logger = logging.getLogger('ijckd_jax')


def distill(
  *,
  teacher: config_utils.PathLike
  | teachers.Teacher
  | Sequence[config_utils.PathLike]
  | Sequence[teachers.Teacher],
  student: str | type[models.Backbone],
  data: str | datasets.Dataset,
  method: str = 'ijckd',
  workdir: config_utils.PathLike | None = None,
  settings: Mapping[str, Any] | None = None,
  writers: Sequence[metric_writer.MetricWriter] = (),
  overwrite: bool = False,
  progress: bool = True,
) -> results.Result:
  """Distils a student from Python, as `main` does from a config.

  Args:
    teacher: folder of a bundle or a run; a teachers.Teacher; several of either,
      the one whose head is the joint classifier first; or the name of a
      backbone, which is then trained first.
    student: name of a backbone (models.BACKBONES), or `package.module:Name`, or
      the class that has this name.
    data: name of a data set (datasets.DATASETS), `package.module:Name`, or a
      datasets.ArrayDataset.
    method: name of a method (methods.METHODS), or `package.module:Name`.
    workdir: the run's folder; None keeps nothing on the disk, which takes a
      single process.
    settings: other fields of the config by their dotted names, such as
      {'total_epochs': 30.0, 'method.factor': 4}; see
      experiment.default_config.
    writers: trackers of the student's metrics.
    overwrite: start anew where the folder holds another run.
    progress: say on standard error how far the run is; False: only warnings.

  Returns:
    The state after training, the history, the bundle and the summary.

  Raises:
    config_utils.UserError: something asked for is unknown or does not fit.
    loop.Diverged: a metric is not finite.
  """
  _check_given(data, teacher, settings)
  name = models.name_of(student)
  workers.check_script()
  backend.start()
  if workdir is None and jax.process_count() > 1:
    raise config_utils.UserError(
      f'no workdir, but {jax.process_count()} processes: give a folder that '
      'all of them see'
    )
  dataset = None if isinstance(data, str) else data
  config = experiment.default_config(
    dataset=data if isinstance(data, str) else None,
    teacher='',
    student=name,
    method=method,
  )
  if dataset is not None and hasattr(dataset, 'fingerprint'):
    config.dataset.fingerprint = dataset.fingerprint()
  first, *others = teacher if isinstance(teacher, list | tuple) else (teacher,)
  given: Any = None
  if isinstance(first, teachers.Teacher):
    config.teacher.backbone, given = first.name, teacher
  elif models.is_name(str(first)) and not others:
    config.teacher.backbone = str(first)
  else:
    config.teacher.checkpoint = str(first)
    config.teacher.others = tuple(map(str, others))
  config_utils.override(config, settings or {})
  with (
    tempfile.TemporaryDirectory() as scratch,
    progress_lib.shown(progress),
  ):
    try:
      return train_and_evaluate(
        config,
        scratch if workdir is None else workdir,
        dataset=dataset,
        teacher=given,
        writers=writers,
        overwrite=overwrite,
      )
    except loop.Interrupted as error:
      if workdir is None:
        raise loop.Interrupted(error.where, error.number, NOT_KEPT) from None
      raise
    except loop.Diverged as error:
      if workdir is None:
        raise loop.Diverged(error.step, error.what, NOT_KEPT) from None
      raise


def _check_given(data: Any, teacher: Any, settings: Any) -> None:
  """Raises UserError where something is of another type than can be."""
  needed = ('load', 'image_shape', 'class_names', 'mean', 'std')
  if not isinstance(data, str) and (
    isinstance(data, type) or not all(hasattr(data, x) for x in needed)
  ):
    raise config_utils.UserError(
      f'data is {_kind(data)}: give the name of a data set, or '
      'ijckd_jax.ArrayDataset(train=ijckd_jax.Arrays(images, labels), '
      'test=..., class_names=..., mean=..., std=...)'
    )
  several = isinstance(teacher, list | tuple)
  for one in teacher if several else (teacher,):
    if not isinstance(one, str | os.PathLike | teachers.Teacher):
      raise config_utils.UserError(
        f'a teacher is {_kind(one)}: give the folder of a '
        'bundle or a run, the name of a backbone, or an ijckd_jax.Teacher; a '
        'module of PyTorch becomes one by '
        'ijckd_jax.pytorch.converter.convert(...).bundle.teacher()'
      )
  if several and not teacher:
    raise config_utils.UserError('no teacher is given')
  if settings is not None and not isinstance(settings, Mapping):
    raise config_utils.UserError(
      f'settings is {_kind(settings)}: give a dict of fields by their dotted '
      "names, such as {'batch_size': 64}"
    )


def _kind(value: Any) -> str:
  """Returns what a value is, in words."""
  if isinstance(value, type):
    return f'the class {value.__name__}'
  return f'of type {type(value).__name__}'


def train_and_evaluate(
  config: ml_collections.ConfigDict,
  workdir: config_utils.PathLike,
  *,
  dataset: datasets.Dataset | None = None,
  teacher: teachers.Teacher | Sequence[teachers.Teacher] | None = None,
  writers: Sequence[metric_writer.MetricWriter] = (),
  overwrite: bool = False,
) -> results.Result:
  """Trains a student, and its teacher first if there is none yet.

  A run that was stopped continues; one that is finished is returned. Where
  there are several processes, all call this alike.

  Args:
    config: see experiment.default_config.
    workdir: the run's folder, which all processes see; a teacher that is
      trained goes to `teacher/`.
    dataset: overrides `config.dataset`.
    teacher: overrides `config.teacher`; one, or several as it lists them.
    writers: further writers of the student's metrics.
    overwrite: start anew where the folder holds a run. A teacher in it that was
      trained by the same config is kept.

  Raises:
    config_utils.UserError: the config, the data or the folder is not right.
    loop.Diverged: a metric is not finite.
    loop.Interrupted: SIGINT or SIGTERM came; everything is saved.
    OSError: something could not be written, over many tries.
  """
  workers.check_script()
  if not str(workdir):
    raise config_utils.UserError('no workdir is given')
  path = epath.Path(config_utils.expand(workdir))
  exp = experiment.build(config, dataset=dataset, teacher=teacher)
  if exp.teachers and exp.teacher_run is None:
    exp = _with_fingerprint(exp)
  runs = [(exp, path)]
  if exp.teacher_run is not None:
    runs.insert(0, (exp.teacher_run, path / 'teacher'))
  folders = [(folder, run.config) for run, folder in runs]
  _check_hosts_agree(exp.config)
  hosts.share(lambda: workdirs.check(folders, overwrite=overwrite))
  finished = None if overwrite else results.found(exp, path)
  try:
    splits, record = _load_data(exp)
  except config_utils.UserError as error:
    if finished is None:
      raise
    logger.warning(
      '%s: finished, but its data could not be compared: %s', path, error
    )
    return finished
  hosts.check_agree({'data': record['data']})
  stale = hosts.share(
    lambda: _check_records(folders, record, overwrite=overwrite)
  )
  if finished is not None:
    logger.info('%s: already finished', path)
    return finished
  factories = trackers.factories(exp.config.writers)
  check_durations(exp, len(splits['train']))
  for run, folder in runs:
    output_recorder.check(run, folder, splits['train'], overwrite=overwrite)
    feeding.check(run, splits['train'])
  with contextlib.ExitStack() as stack:
    hosts.share(lambda: _take(stack, folders, overwrite, stale))
    hosts.check_seen(path)
    trained = results.found(*runs[0]) if exp.teacher_run is not None else None
    if trained is not None:
      logger.info('%s: already finished', runs[0][1])
    if hosts.is_primary():
      made = [f(exp.config.to_dict(), str(path)) for f in factories]
      writers = (*writers, *made)
    stop = stack.enter_context(loop.StopSignals())
    if exp.teacher_run is not None:
      trained = trained or one_run.run(*runs[0], splits, (), stop, record)
      exp = exp.with_teachers((trained.bundle.teacher(),))
    if exp.config.teacher.head:
      exp = _with_fitted_heads(exp, path, splits)
    return one_run.run(exp, path, splits, writers, stop, record)


def _with_fingerprint(exp):
  """Returns a run whose config tells its teachers, should they change later."""
  config = ml_collections.ConfigDict(exp.config.to_dict())
  config.teacher.fingerprint = run_record.checksum(
    run_record.arrays_of(exp.teachers)
  )
  return dataclasses.replace(exp, config=config)


def _load_data(exp):
  """Returns datasets.Arrays by split, and the run's record of them.

  Raises:
    config_utils.UserError: a host lacks the data.
  """
  splits, record, missing = {}, {}, None
  try:
    splits = {split: exp.dataset.load(split) for split in datasets.SPLITS}
    datasets.check_labels(exp.dataset, splits)
    record = run_record.make(exp.dataset, splits, exp.config)
  except config_utils.UserError as error:
    missing = error
  hosts.check_agree({'data': 'there' if missing is None else str(missing)})
  if missing is not None:
    raise missing
  return splits, record


def check_durations(exp: experiment.Experiment, num_examples: int) -> None:
  """Raises UserError where a duration or rate of a run or its teacher is wrong.

  Args:
    exp: whose durations and rates are checked.
    num_examples: of the training set.
  """
  if exp.teacher_run is not None:
    try:
      exp.teacher_run.optimizer(num_examples)
    except config_utils.UserError as error:
      raise config_utils.UserError(
        f'of the teacher, which is trained first (see teacher.total_epochs): '
        f'{error}'
      ) from error
  exp.optimizer(num_examples)


def _with_fitted_heads(exp, workdir, splits):
  """Returns a run whose teachers have heads for the classes of its data."""
  fitted = head_fitting.fit_teachers(exp, workdir, splits)
  exp = exp.with_teachers(
    [
      teacher.with_head(found.head)
      for teacher, found in zip(exp.teachers, fitted, strict=True)
    ]
  )
  return dataclasses.replace(exp, fitted=tuple(f.report for f in fitted))


def _check_records(folders: workdirs.Runs, record, *, overwrite: bool):
  """Compares the records in the folders; returns the folders of other data.

  Raises:
    config_utils.UserError: one holds a run on other data, which is to stay.
  """
  stale = []
  for folder, _ in reversed(folders):
    try:
      run_record.check_data(folder, record)
    except config_utils.UserError:
      if not overwrite:
        raise
      stale.append(folder)
  return stale


def _take(stack, folders: workdirs.Runs, overwrite: bool, stale):
  """Makes the folders ready for their runs, and locks them until the end."""
  for folder, _ in reversed(folders):
    try:
      folder.mkdir(parents=True, exist_ok=True)
      stack.enter_context(locks.Lock(folder))
    except OSError as error:
      raise config_utils.UserError(
        f'the folder {folder} cannot be written: {config_utils.reason(error)}'
      ) from error
  workdirs.claim(folders, overwrite=overwrite, stale=stale)


def _check_hosts_agree(config: ml_collections.ConfigDict) -> None:
  """Raises where the processes of a run do not run the same."""
  if jax.process_count() == 1:
    return
  fields = config_utils.flatten(config.to_dict())
  hosts.check_agree(
    {
      'config': {k: v for k, v in fields.items() if k not in HOST_FIELDS},
      'code': hosts.digest_of_code(),
      'versions': run_record.versions(),
    }
  )
