"""One run, from a fresh start or a checkpoint to bundle, summary and report."""

import contextlib
import json
import logging
import math

import jax

from ijckd_jax.data import datasets
from ijckd_jax.data import input_pipeline
from ijckd_jax.distillation import steps
from ijckd_jax.distillation import train_state
from ijckd_jax.runtime import disk
from ijckd_jax.runtime import hosts
from ijckd_jax.runtime import workdirs
from ijckd_jax.training import checkpoints as checkpoints_lib
from ijckd_jax.training import head_fitting
from ijckd_jax.training import loop
from ijckd_jax.training import metric_writer
from ijckd_jax.training import output_recorder
from ijckd_jax.training import results
from ijckd_jax.training import run_record
from ijckd_jax.training import sizes

# Largest share that the initial running statistics may keep at the end. A
# MobileNetV3 trained for 188 steps tested at 10% with a share of 15%. Further
# images, without any training, took the share to 2% and the test to 49%, then
# to 0.4% and 70%.
MAX_OF_FIRST_STATISTICS = 0.01
ONE_STEP = (
  'The same command with --config.checkpoint_epochs=0 '
  '--config.checkpoint_examples=0 --config.checkpoint_steps=1 saves the state '
  'before this step; the same command once more then makes this step alone.'
)

logger = logging.getLogger('ijckd_jax')


def run(exp, workdir, splits, writers, stop, record) -> results.Result:
  """Trains one network on loaded data, from where it was stopped.

  Args:
    exp: experiment.Experiment, whose teachers' arrays are there.
    workdir: of the run.
    splits: datasets.Arrays by name.
    writers: trackers of the metrics, beside the run's own files.
    stop: loop.StopSignals.
    record: of the run, see run_record.

  Raises:
    config_utils.UserError: the run began with other teachers.
    loop.Diverged: a metric is not finite.
    loop.Interrupted: SIGINT or SIGTERM came; everything is saved.
    OSError: something could not be written, over many tries.
  """
  config, mapper, num_examples = exp.config, exp.mapper, len(splits['train'])
  _announce(exp, workdir)
  key = jax.random.key(config.seed)
  checkpoints = checkpoints_lib.Checkpoints(
    workdir / workdirs.CHECKPOINTS, keep=config.keep_checkpoints
  )
  state, progress, continues = _start(
    exp, workdir, key, num_examples, checkpoints
  )
  start = int(state.step)
  hosts.share(lambda: _record(exp, workdir, record, continues))
  state = mapper.replicate(state)
  recorder = output_recorder.start(exp, workdir, splits['train'], start)
  writer = _open_writers(workdir, writers, start, progress.rows)
  training = loop.Loop(
    experiment=exp,
    splits=splits,
    checkpoints=checkpoints,
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
    hosts.share(writer.flush)
    checkpoints.wait()
  except BaseException as error:
    with contextlib.suppress(OSError):  # The first error is the one to tell.
      checkpoints.close()
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
    hosts.share(writer.finish)
  finally:
    checkpoints.close()
    writer.close()
  return results.Result(state, history, bundle, summary)


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


def _say_sizes(exp, workdir, state) -> None:
  """Logs how large the student will be, and warns if it is not small."""
  variables = {'params': state.params, 'batch_stats': state.batch_stats}
  found = sizes.of(exp, variables)
  logger.info('%s: %s', workdir, sizes.line(exp, found))
  if warning := sizes.warning(exp, found):
    logger.warning('%s: %s', workdir, warning)


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
  if not datasets.has_classes(exp.dataset):
    logger.info(
      '%s: the images have no classes: features alone are learned, and nothing '
      'is evaluated; ijckd probe judges the bundle',
      workdir,
    )
  if exp.start is None and exp.config.student.freeze_statistics:
    logger.warning(
      '%s: freeze_statistics=True has no effect on a backbone that starts at '
      'random: give init_from, whose running statistics are to stay',
      workdir,
    )
  if exp.start is not None:
    logger.info(
      '%s: starts with the %s of %s, and draws the rest afresh',
      workdir,
      ', '.join(exp.start.parts),
      exp.start.path,
    )
    if exp.start.resizes(exp.distiller.network.backbone):
      both = (exp.start.size, exp.start.preprocessing.size)
      logger.info(
        '%s: resizes its embedding of positions from images of %s to %s',
        workdir,
        *(f'{height}x{width}' for height, width in both),
      )


def _start(exp, workdir, key, num_examples: int, checkpoints):
  """Returns the state, fresh or from a checkpoint, and its loop.Progress.

  Args:
    exp: experiment.Experiment.
    workdir: of the run.
    key: the run's.
    num_examples: of the training set.
    checkpoints: checkpoints.Checkpoints of the run.

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
  if exp.distiller.links:
    _say_sizes(exp, workdir, state)
  if found := checkpoints.restore_newest(state):
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


def _describe(error: loop.Diverged, exp, num_examples: int) -> str:
  """Returns, as JSON, how to repeat the step in which a run diverged."""
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
