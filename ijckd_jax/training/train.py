"""Runs: a teacher, a student, what they were worth, what is kept."""

from collections.abc import Mapping
from collections.abc import Sequence
import contextlib
import dataclasses
import json
import logging
import math
import os
import tempfile
from typing import Any

from etils import epath
import jax
import ml_collections

from ijckd_jax import models
from ijckd_jax.data import datasets
from ijckd_jax.data import input_pipeline
from ijckd_jax.distillation import steps
from ijckd_jax.distillation import teachers
from ijckd_jax.distillation import train_state
from ijckd_jax.runtime import backend
from ijckd_jax.runtime import config_utils
from ijckd_jax.runtime import disk
from ijckd_jax.runtime import hosts
from ijckd_jax.runtime import locks
from ijckd_jax.runtime import workdirs
from ijckd_jax.runtime import workers
from ijckd_jax.training import checkpoints
from ijckd_jax.training import experiment
from ijckd_jax.training import head_fitting
from ijckd_jax.training import loop
from ijckd_jax.training import metric_writer
from ijckd_jax.training import results
from ijckd_jax.training import run_record
from ijckd_jax.training import teacher_outputs

# What may be left, at the end, of the running statistics' start. A MobileNetV3
# of 188 steps tested at 10% with 15% left; once more images had brought that to
# 2 and to 0.4%, without any training, at 49 and at 70%.
MAX_OF_FIRST_STATISTICS = 0.01
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
ONE_STEP = (
  'The same command with --config.checkpoint_epochs=0 '
  '--config.checkpoint_examples=0 --config.checkpoint_steps=1 saves the state '
  'before this step; the same command once more then makes this step alone.'
)

logger = logging.getLogger('ijckd_jax')


def distill(
  *,
  teacher: str
  | epath.PathLike
  | teachers.Teacher
  | Sequence[str | epath.PathLike]
  | Sequence[teachers.Teacher],
  student: str,
  data: Any,
  method: str = 'ijckd',
  workdir: epath.PathLike | None = None,
  settings: Mapping[str, Any] | None = None,
  writers: Sequence[metric_writer.MetricWriter] = (),
  overwrite: bool = False,
) -> results.Result:
  """Distils a student from Python, as `main` does from a config.

  Args:
    teacher: folder of a bundle or a run; a teachers.Teacher; several of either,
      the one whose head is the joint classifier first; or the name of a
      backbone, which is then trained first.
    student: name of a backbone (models.BACKBONES), or `package.module:Name`.
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

  Returns:
    The state after training, the history, the bundle and the summary.

  Raises:
    config_utils.UserError: something asked for is unknown or does not fit.
    loop.Diverged: a metric is not finite.
  """
  workers.check_script()
  backend.start()
  if workdir is None and jax.process_count() > 1:
    raise config_utils.UserError(
      f'no workdir, but {jax.process_count()} processes: give a folder that '
      'all of them see'
    )
  _check_given(data, teacher)
  named = isinstance(data, str)
  config = experiment.default_config(
    dataset=data if named else None,
    teacher='',
    student=student,
    method=method,
  )
  if not named:
    if hasattr(data, 'fingerprint'):
      config.dataset.fingerprint = data.fingerprint()
  several = isinstance(teacher, list | tuple)
  first, *others = teacher if several else (teacher,)
  if isinstance(first, teachers.Teacher):
    config.teacher.backbone = first.name
  elif models.is_name(str(first)) and not others:
    config.teacher.backbone, teacher = str(first), None
  else:
    config.teacher.checkpoint, teacher = str(first), None
    config.teacher.others = tuple(map(str, others))
  config_utils.override(config, settings or {})
  with tempfile.TemporaryDirectory() as scratch:
    try:
      return train_and_evaluate(
        config,
        scratch if workdir is None else workdir,
        dataset=None if named else data,
        teacher=teacher,
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


def _check_given(data: Any, teacher: Any) -> None:
  """Raises UserError where data or teacher are of another type than can be."""
  needed = ('load', 'image_shape', 'class_names', 'mean', 'std')
  if not isinstance(data, str) and not all(hasattr(data, x) for x in needed):
    raise config_utils.UserError(
      f'data is of type {type(data).__name__}: give the name of a data set, or '
      'ijckd_jax.ArrayDataset(train=ijckd_jax.Arrays(images, labels), '
      'test=..., class_names=..., mean=..., std=...)'
    )
  several = isinstance(teacher, list | tuple)
  for one in teacher if several else (teacher,):
    if not isinstance(one, str | os.PathLike | teachers.Teacher):
      raise config_utils.UserError(
        f'a teacher is of type {type(one).__name__}: give the folder of a '
        'bundle or a run, the name of a backbone, or an ijckd_jax.Teacher; a '
        'module of PyTorch becomes one by '
        'ijckd_jax.pytorch.converter.convert(...).bundle.teacher()'
      )
  if several and not teacher:
    raise config_utils.UserError('no teacher is given')


def train_and_evaluate(
  config: ml_collections.ConfigDict,
  workdir: epath.PathLike,
  *,
  dataset: Any = None,
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
  workdir = epath.Path(config_utils.expand(workdir))
  exp = experiment.build(config, dataset=dataset, teacher=teacher)
  if exp.teacher_run is None and exp.teacher is not None:
    exp = _with_fingerprint(exp)
  runs = [(exp, workdir)]
  if exp.teacher_run is not None:
    runs.insert(0, (exp.teacher_run, workdir / 'teacher'))
  folders = [(folder, run.config) for run, folder in runs]
  _check_hosts_agree(exp.config)
  hosts.share(lambda: workdirs.check(folders, overwrite=overwrite))
  finished = None if overwrite else results.found(exp, workdir)
  try:
    splits, record = _load_data(exp)
  except config_utils.UserError as error:
    if finished is None:
      raise
    logger.warning(
      '%s: finished, but its data could not be compared: %s', workdir, error
    )
    return finished
  stale = hosts.share(
    lambda: _check_records(folders, record, overwrite=overwrite)
  )
  if finished is not None:
    logger.info('%s: already finished', workdir)
    return finished
  factories = [
    config_utils.resolve('writer', name, {}) for name in exp.config.writers
  ]
  for run, folder in runs:
    _check_durations(run, len(splits['train']), is_teacher=folder != workdir)
    teacher_outputs.check(run, folder, splits['train'], overwrite=overwrite)
  with contextlib.ExitStack() as stack:
    hosts.share(lambda: _take(stack, folders, overwrite, stale))
    hosts.check_seen(workdir)
    trained = results.found(*runs[0]) if exp.teacher_run is not None else None
    if trained is not None:
      logger.info('%s: already finished', runs[0][1])
    if hosts.is_primary():
      made = [f(exp.config.to_dict(), str(workdir)) for f in factories]
      writers = (*writers, *made)
    stop = stack.enter_context(loop.StopSignals())
    if exp.teacher_run is not None:
      trained = trained or _run(*runs[0], splits, (), stop, record)
      exp = exp.with_teachers((trained.bundle.teacher(),))
    if exp.config.teacher.head:
      exp = _with_fitted_heads(exp, workdir, splits)
    return _run(exp, workdir, splits, writers, stop, record)


def _with_fingerprint(exp):
  """Returns a run whose config tells its teachers, should they change later."""
  config = ml_collections.ConfigDict(exp.config.to_dict())
  config.teacher.fingerprint = run_record.checksum(exp.frozen.teachers)
  return dataclasses.replace(exp, config=config)


def _load_data(exp):
  """Returns datasets.Arrays by split, and the run's record of them.

  Raises:
    config_utils.UserError: a host lacks the data, or has others.
  """
  splits, record, missing = {}, {}, None
  try:
    splits = {split: exp.dataset.load(split) for split in datasets.SPLITS}
    record = run_record.make(exp.dataset, splits, exp.config)
  except config_utils.UserError as error:
    missing = error
  hosts.check_agree({'data': 'there' if missing is None else str(missing)})
  if missing is not None:
    raise missing
  hosts.check_agree({'data': record['data']})
  return splits, record


def _check_durations(exp, num_examples: int, *, is_teacher: bool) -> None:
  """Raises UserError where the durations of a run's config do not fit."""
  try:
    exp.optimizer(num_examples)
  except config_utils.UserError as error:
    if not is_teacher:
      raise
    raise config_utils.UserError(
      f'of the teacher, which is trained first (see teacher.total_epochs): '
      f'{error}'
    ) from error


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


def _record(exp, workdir, record, continues: bool) -> None:
  """Writes a run's record, and compares it with the one that was there.

  Raises:
    config_utils.UserError: a run that continues began with another teacher.
  """
  record = {**record, 'teachers': run_record.of_teachers(exp.teachers)}
  if continues and not run_record.exists(workdir):
    logger.warning(
      '%s: there is no %s, so that it cannot be told whether the data and the '
      'code are those that the run began with',
      workdir,
      workdirs.RECORD,
    )
  if continues:
    run_record.check_teachers(workdir, record)
    for change in run_record.code_changes(workdir, record):
      logger.warning(
        '%s: goes on with other code or versions than it began with: %s',
        workdir,
        change,
      )
  run_record.write(workdir, record)


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


def _warn_of_unsettled_statistics(exp, workdir, num_examples):
  """Warns where batch norm's first statistics would count in the last ones."""
  momentum = exp.distiller.network.backbone.momentum
  num_steps = exp.total_steps(num_examples)
  updates = exp.config.accumulation  # In a step.
  remaining = momentum ** (num_steps * updates)
  if remaining > MAX_OF_FIRST_STATISTICS:
    enough = math.log(MAX_OF_FIRST_STATISTICS) / math.log(momentum) / updates
    logger.warning(
      '%s: %d steps are few for the batch norm of %s, which keeps %g of its '
      'running statistics at each update: at the end %.0f%% of them will be '
      'what they started as, before any image, and test accuracy may be far '
      'below that of training. %d steps leave less than %.0f%%',
      workdir,
      num_steps,
      exp.config.student.backbone,
      momentum,
      100 * remaining,
      math.ceil(enough),
      100 * MAX_OF_FIRST_STATISTICS,
    )


def _announce(exp, workdir) -> None:
  """Logs what a run trains, and what is to be known of its start."""
  config = exp.config
  logger.info(
    '%s: %s by %s on %s',
    workdir,
    config.student.backbone,
    config.method.name,
    config.dataset.name,
  )
  if exp.teacher is not None and exp.teacher.origin:
    said = (f'{name} {value}' for name, value in exp.teacher.origin.items())
    logger.info('%s: the teacher is of %s', workdir, ', '.join(said))
  for note in exp.notes:
    logger.warning('%s: %s', workdir, note)
  if exp.start is not None:
    logger.info(
      '%s: the backbone starts with the weights of %s, the rest afresh',
      workdir,
      exp.start.path,
    )


def _start(exp, workdir, key, num_examples: int, store):
  """Returns the state, fresh or from a checkpoint, and its loop.Progress.

  Args:
    exp: experiment.Experiment.
    workdir: of the run.
    key: the run's.
    num_examples: of the training set.
    store: checkpoints.Checkpoints of the run.

  Returns:
    The state on the host, the progress, and whether the run continues.
  """
  state = train_state.create(
    exp.init(jax.random.fold_in(key, steps.INIT_STREAM)),
    exp.optimizer(num_examples)[0],
    with_ema=exp.config.ema_decay > 0,
    memory=exp.memory(key, num_examples),
  )
  if state.batch_stats['backbone'] and exp.start is None:
    _warn_of_unsettled_statistics(exp, workdir, num_examples)
  if found := store.restore_newest(state):
    state, memo = found
    logger.info('%s: continues after step %d', workdir, int(state.step))
    return state, loop.Progress(**memo), True
  metrics_file = workdir / workdirs.METRICS
  if hosts.share(lambda: bool(metric_writer.read_rows(metrics_file))):
    logger.warning(
      '%s: there is no checkpoint to continue from: the run starts anew, and '
      'the rows of %s go',
      workdir,
      workdirs.METRICS,
    )
  return state, loop.Progress(), False


def _open_writers(workdir, writers, start: int, num_rows: int):
  """Returns the Writers of a run: its files', and those that are given."""
  own = []

  def open_own():
    own.append(
      metric_writer.JsonLinesWriter(
        workdir / workdirs.METRICS, resume_step=start, num_rows=num_rows
      )
    )
    own.append(
      metric_writer.TensorBoardWriter(
        workdir / workdirs.TENSORBOARD, resume_step=start
      )
    )

  hosts.share(open_own)
  return metric_writer.Writers((*own, *writers) if hosts.is_primary() else ())


def _run(exp, workdir, splits, writers, stop, record) -> results.Result:
  """Trains one network on loaded data, from where it was stopped."""
  config, mapper, num_examples = exp.config, exp.mapper, len(splits['train'])
  _announce(exp, workdir)
  key = jax.random.key(config.seed)
  store = checkpoints.Checkpoints(
    workdir / workdirs.CHECKPOINTS, keep=config.keep_checkpoints
  )
  state, progress, continues = _start(exp, workdir, key, num_examples, store)
  start = int(state.step)
  hosts.share(lambda: _record(exp, workdir, record, continues))
  state = mapper.replicate(state)
  recorder = teacher_outputs.start(exp, workdir, splits['train'], start)
  writer = _open_writers(workdir, writers, start, progress.rows)
  training = loop.Loop(
    experiment=exp,
    splits=splits,
    store=store,
    writer=writer,
    frozen=mapper.replicate(exp.frozen),
    key=mapper.replicate(key),
    recorder=recorder,
    refits=head_fitting.Refits(exp, workdir, splits)
    if config.teacher.refit
    else None,
    name='student' if exp.distiller.links else config.student.backbone,
  )
  try:
    state = training.run(state, start, progress, stop)
    hosts.share(writer.close)
    store.wait()
  except BaseException as error:
    with contextlib.suppress(OSError):  # The first error is the one to tell.
      store.close()
    with contextlib.suppress(OSError):
      writer.close()
    if isinstance(error, loop.Diverged):
      place = workdir / workdirs.DIVERGED
      described = _describe(error, exp, num_examples)
      hosts.share(lambda: disk.write_text(place, described))
      more = (
        f'checkpoints saved before are kept, and {place} holds its batch, and '
        'how to make that one step again'
      )
      raise loop.Diverged(error.step, error.what, more) from error
    raise
  history = metric_writer.read_rows(workdir / workdirs.METRICS)
  try:
    bundle, summary = results.finish(
      training, workdir, state, progress, history
    )
  finally:
    store.close()
  return results.Result(state, history, bundle, summary)


def _describe(error: loop.Diverged, exp, num_examples: int) -> str:
  """Returns what it takes to make the step again after which a run diverged."""
  indices, epochs = input_pipeline.examples(
    error.step - 1,
    batch_size=exp.config.batch_size,
    seed=exp.config.seed,
    num_examples=num_examples,
  )
  content = {
    'step': error.step,
    'what': error.what,
    'indices': indices.tolist(),
    'epochs': epochs.tolist(),
    'again': ONE_STEP,
  }
  return json.dumps(content, indent=2) + '\n'
