"""What a run leaves: evaluated, written, and found again."""

import dataclasses
import importlib.metadata
import json
import logging
import math
from typing import Any

import jax

from ijckd_jax.bounds import held_out
from ijckd_jax.bounds import measure
from ijckd_jax.bounds import pairs
from ijckd_jax.bundles import bundles
from ijckd_jax.bundles import model_card
from ijckd_jax.data import datasets
from ijckd_jax.distillation import train_state
from ijckd_jax.reports import report
from ijckd_jax.runtime import config_utils
from ijckd_jax.runtime import disk
from ijckd_jax.runtime import hosts
from ijckd_jax.runtime import workdirs
from ijckd_jax.training import costs
from ijckd_jax.training import experiment
from ijckd_jax.training import metric_writer
from ijckd_jax.training import run_record

# Of a config, what a bundle says of how its network was trained: always, and
# where it is not as by default.
RECIPE = (
  'batch_size',
  'dtype',
  'optimizer.name',
  'optimizer.learning_rate',
  'optimizer.schedule',
  'optimizer.weight_decay',
)
MORE = (
  'accumulation',
  'augment',
  'ema_decay',
  'optimizer',
  'sync_batch_norm',
  'unbiased_variance',
)

logger = logging.getLogger('ijckd_jax')


@dataclasses.dataclass(frozen=True)
class Result:
  """What a run leaves.

  Attributes:
    state: after the last step; None where a finished run was found.
    history: rows of `metrics.jsonl`.
    bundle: the network, self-contained.
    summary: as in `summary.json`.
  """

  state: train_state.TrainState | None
  history: list[dict[str, float]]
  bundle: bundles.Bundle
  summary: dict[str, Any]


def found(exp, workdir) -> Result | None:
  """Returns what a finished run has left; None where it is not finished.

  Nor is one of which something is damaged or missing: that is logged, and the
  run, when it is continued, makes it again from its checkpoints.

  Raises:
    config_utils.UserError: something is, and there is no checkpoint to make it
      from; or the metrics are damaged, which nothing can be made from.
  """
  if not hosts.share(lambda: _is_whole(exp, workdir)):
    return None
  history = metric_writer.read_rows(workdir / workdirs.METRICS)
  summary = disk.read_json(workdir / workdirs.SUMMARY)
  if summary['steps'] not in [row['step'] for row in history]:
    logger.warning(
      '%s: the last rows of %s are missing', workdir, workdirs.METRICS
    )
  bundle = _load(exp, workdir / workdirs.BUNDLE)
  return Result(state=None, history=history, bundle=bundle, summary=summary)


def _is_whole(exp, workdir) -> bool:
  """Returns whether a run has come to its end and all of it is there."""
  there = (workdirs.SUMMARY, workdirs.BUNDLE, workdirs.CONNECTED)
  if not any((workdir / name).exists() for name in there):
    return False
  checkpoints = workdir / workdirs.CHECKPOINTS
  can_continue = checkpoints.exists() and any(checkpoints.iterdir())
  damage = _damage(exp, workdir)
  if damage and not can_continue:
    raise config_utils.UserError(
      f'{workdir}: {damage}, and there is no checkpoint to make it from: put '
      'back a sound copy, or remove the folder'
    )
  if not (damage or report.is_complete(workdir)):
    damage = f'{workdirs.REPORT} and what it shows are not all there'
    if not can_continue:
      logger.warning(
        '%s: %s, and no checkpoint to make them from', workdir, damage
      )
      return True
  if damage:
    logger.warning(
      '%s: %s; it is made again from the checkpoints', workdir, damage
    )
  return not damage


def _damage(exp, workdir) -> str:
  """Returns what of a finished run's numbers and networks cannot be read."""
  try:
    summary = disk.read_json(workdir / workdirs.SUMMARY)
    report.table(summary), summary['steps']
  except Exception as error:  # Damaged numbers raise errors of any type.
    what = f'{type(error).__name__}: {config_utils.short(error)}'
    return f'{workdirs.SUMMARY} cannot be read ({what})'
  names = [workdirs.BUNDLE]
  distiller = exp.distiller
  if distiller.connected_network is not None and not distiller.reuses_head:
    names.append(workdirs.CONNECTED)
  try:
    for name in names:
      _load(exp, workdir / name)
      if not (workdir / name / model_card.FILE).stat().length:
        return f'{name}/{model_card.FILE} is empty'
  except (OSError, config_utils.UserError) as error:
    return str(error)
  return ''


def _load(exp, folder) -> bundles.Bundle:
  # Where the config names code, the bundle may name the same.
  trust_code = bool(run_record.modules(exp.config))
  return bundles.load(
    folder, dtype=exp.dtype, trust_code=trust_code, trust_programs=True
  )


def finish(training, workdir, state, progress, history):
  """Evaluates the last and the best state, and writes what is kept.

  Args:
    training: loop.Loop that has come to its end.
    workdir: of the run.
    state: train_state.TrainState after the last step.
    progress: loop.Progress at that step.
    history: rows of the metrics.

  Returns:
    The bundle and the summary.
  """
  # Long, because its order decides what a kill leaves: bundle, summary, report.
  exp, config = training.experiment, training.experiment.config
  kept, best_step = _kept(training, state)
  chosen = config.bundle if config.bundle in kept else 'last'
  evaluation, student, teacher = None, {}, None
  if datasets.has_classes(exp.dataset):  # Or nothing is right or wrong.
    results = {
      name: training.evaluate(*arrays, 'test') for name, arrays in kept.items()
    }
    student = {name: result.metrics for name, result in results.items()}
    student.setdefault('best', student['last'])
    evaluation = results[chosen]
    _warn_of_ruin(student[chosen]['nll'], exp, workdir)
    teacher = evaluation.teacher and evaluation.teacher.metrics
  teachers = hosts.share(lambda: _teachers(config, workdir))
  facts = {
    'best_step': best_step if student else None,
    'best_by': training.ranking_split if student else None,
    'steps': int(state.step),
    'test_examples': len(training.splits['test']) if student else 0,
    'choices': _choices(training, workdir, history, teachers),
  }
  # First: whatever is said of it, the student is kept.
  bundle = _write_bundles(
    exp,
    workdir,
    kept[chosen],
    {'which': chosen, **_made(exp)},
    {
      **({'test': student[chosen]} if student else {}),
      'run': {
        'test': student,
        'teacher': teacher,
        'seed': config.seed,
        'recipe': _recipe(config),
        **facts,
      },
    },
  )
  measured = failure = None
  try:
    measured = _measure(
      training,
      workdir,
      *kept[chosen],
      trained=_trained_on(training, teachers),
      choices=facts['choices'] if training.ranking_split == 'test' else 1,
    )
  except Exception as error:  # Whatever it is, it must not cost the run.
    failure = error
  summary = {
    'student': student,
    **facts,
    'images_per_second': progress.images_per_second,
    'training_seconds': {
      'student': progress.wall_seconds or None,  # Of an older version.
      'teacher': hosts.share(lambda: _teacher_seconds(exp, workdir)),
    },
    'damaged_images': [
      training.splits['train'].name_of(index) for index in progress.damaged
    ],
    'bounds': measured and measured.report,
    **_circumstances(exp, bundle, teacher),
  }
  hosts.share(
    lambda: disk.retry(lambda: _write_summary(summary, workdir), 'the summary')
  )

  def write_report():
    report.write(
      workdir,
      summary=summary,
      history=history,
      evaluation=evaluation,
      arrays=training.splits['test'],
      class_names=bundle.class_names,
      measured=measured,
    )

  hosts.share(lambda: _try_report(write_report, failure, workdir))
  return bundle, summary


def _warn_of_ruin(nll: float, exp, workdir) -> None:
  """Warns where a student is worse than one that gives all classes alike."""
  guessed = math.log(len(exp.dataset.class_names))
  if nll > guessed:
    logger.warning(
      '%s: the NLL on the test images is %.4g, and that of guessing %.4g: if '
      'the run was not merely short, lower the learning rate, or clip the '
      'gradient (optimizer.clip_norm)',
      workdir,
      nll,
      guessed,
    )


def _kept(training, state):
  """Returns the states that are evaluated at the end, and the best one's step.

  They are (variables, Frozen) by 'last', and where they are others 'best' and
  'last_without_ema'.
  """
  states = {'last': state}
  best_step = training.checkpoints.best_step
  if best_step is None:  # None was evaluated.
    best_step = int(state.step)
  if best_step != int(state.step):
    states['best'], _ = training.checkpoints.restore_best(state)
    best_step = int(states['best'].step)
  kept = {
    name: (one.evaluated, training.frozen_of(int(one.step)))
    for name, one in states.items()
  }
  if state.ema is not None:
    raw = {'params': state.params, 'batch_stats': state.batch_stats}
    kept['last_without_ema'] = raw, kept['last'][1]
  return kept, best_step


def _write_bundles(exp, workdir, arrays, info, more) -> bundles.Bundle:
  """Writes the student's bundle, and where it is another the connected one.

  Args:
    exp: experiment.Experiment.
    workdir: of the run.
    arrays: the student's variables and Frozen.
    info: what both bundles say of themselves.
    more: what the student's bundle says too.

  Returns:
    The student's bundle.
  """
  distiller = exp.distiller
  bundle = _bundle(
    exp,
    distiller.deployed_network,
    distiller.deployed(*arrays),
    {**info, **more},
  )
  connected = distiller.connected_variables(*arrays)
  if connected is not None:
    connected = _bundle(exp, distiller.connected_network, connected, info)

  def write():
    bundle.save(workdir / workdirs.BUNDLE)
    if connected is not None:
      connected.save(workdir / workdirs.CONNECTED)

  hosts.share(lambda: disk.retry(write, 'the bundle'))
  return bundle


def _write_summary(summary, workdir) -> None:
  # By its report a run is known to be whole: an old one is not of this end.
  (workdir / workdirs.WEB_REPORT).unlink(missing_ok=True)
  text = json.dumps(summary, indent=2) + '\n'
  disk.write_text(workdir / workdirs.SUMMARY, text)


def _try_report(write, failure, workdir) -> None:
  """Writes the report; a failure, also one before, is logged."""
  try:
    if failure is not None:
      raise failure
    disk.retry(write, 'the report')
  except Exception as error:  # Whatever it is, it must not cost the run.
    logger.debug('the report failed', exc_info=True)
    logger.warning(
      '%s: the report could not be made (%s: %s); the student and %s are '
      'there, and the same command tries again',
      workdir,
      type(error).__name__,
      config_utils.short(error),
      workdirs.SUMMARY,
    )


def _teachers(config, workdir) -> list[dict[str, Any]]:
  """Returns what the bundles of a run's teachers say of how they were made."""
  trained = str(workdir / 'teacher')
  found = []
  for path in (config.teacher.checkpoint or trained, *config.teacher.others):
    try:
      folder = bundles.find(path)
    except config_utils.UserError:  # None is there.
      continue
    try:
      found.append(disk.read_json(folder / bundles.SPEC_FILE)['info'])
    except (OSError, KeyError, TypeError, ValueError):
      found.append({})  # Damaged since it was loaded: nothing is known of it.
  return found


def _teacher_seconds(exp, workdir) -> float | None:
  """Returns how long the run trained its teacher; None where it did not."""
  if exp.teacher_run is None:
    return None
  try:
    found = disk.read_json(workdir / 'teacher' / workdirs.SUMMARY)
    return found['training_seconds']['student']
  except (OSError, KeyError, TypeError, ValueError):
    return None  # Of an older version, or damaged since.


def _choices(training, workdir, history, teachers) -> int | None:
  """Returns among how many checkpoints, teachers' included, this was chosen.

  None where a teacher's number is damaged, which is logged.
  """
  try:
    number = math.prod(
      held_out.choices(info, training.ranking_split) for info in teachers
    )
  except config_utils.UserError as error:
    logger.warning(
      '%s: the bound is not measured: a teacher: %s', workdir, error
    )
    return None
  if training.experiment.config.bundle != 'best':
    return number
  ranked_by = f'{training.ranking_split}/top1'
  return number * max(1, sum(ranked_by in row for row in history))


def _trained_on(training, teachers) -> list:
  """Returns the images that student and teachers were trained on."""
  own = training.splits['train']
  splits = {own.digest(): own}
  for info in teachers:
    for split, _ in held_out.trained_on(info, None, trust_code=False):
      splits.setdefault(split and split.digest(), split)
  return list(splits.values())


def _measure(
  training, workdir, variables, frozen, *, trained, choices
) -> measure.Measured | None:
  """Returns the bound on the test images; None without a teacher.

  Where it cannot be measured, the reason is logged.
  """
  exp, config = training.experiment, training.experiment.config
  if exp.teacher is None or not datasets.has_classes(exp.dataset):
    return None
  if choices is None:
    return None
  distiller = exp.distiller
  student = distiller.deployed(variables, frozen)
  connected_variables = distiller.connected_variables(variables, frozen)
  try:
    return measure.measure(
      pairs.Pair(
        exp.teacher, distiller.deployed_network, distiller.connected_network
      ),
      {
        'teacher': frozen.joint,
        'student': student,
        'connected': student
        if connected_variables is None
        else connected_variables,
      },
      {name: training.splits[name] for name in ('test', 'train')},
      trained=trained,
      mapper=exp.mapper,
      batch_size=config.eval_batch_size,
      num_workers=config.num_workers,
      delta=config.bounds.delta,
      fit_examples=config.bounds.fit_examples,
      seed=config.seed,
      choices=choices,
    )
  except config_utils.UserError as error:
    logger.warning('%s: the bound is not measured: %s', workdir, error)
    return None


def _made(exp) -> dict[str, Any]:
  """Returns what a bundle says of how it was made."""
  config, teacher = exp.config, exp.teacher
  method = config.method.to_dict()
  network = exp.distiller.connected_network
  if network is not None and method.get('factor') == config_utils.AUTO:
    # The one that was taken, lest nobody could take the connector again.
    method['factor'] = getattr(network.connector, 'factor', config_utils.AUTO)
  return {
    'dataset': config.dataset.to_dict(),
    'method': method,
    'teacher': teacher and teacher.name,
    'teacher_origin': teacher and teacher.origin,
    **_origin(exp.start),
    # Methods that learn from labels alone are only judged by it.
    'taught': bool(exp.distiller.links),
    'eval_batch_size': config.eval_batch_size,
    'ijckd_jax': importlib.metadata.version('ijckd_jax'),
  }


def _origin(start) -> dict[str, Any]:
  """Returns where the weights come from that a backbone started from."""
  if start is None or start.origin is None or 'backbone' not in start.parts:
    return {}
  return {'origin': start.origin}


def _recipe(config) -> dict[str, Any]:
  """Returns the fields of a config that say how a network is trained.

  By their dotted names: see RECIPE and MORE.
  """
  plain = experiment.default_config(dataset=None, teacher='', student='')
  plain, found = (config_utils.flatten(x.to_dict()) for x in (plain, config))
  return {
    name: value
    for name, value in found.items()
    if name in RECIPE
    or (name.partition('.')[0] in MORE and value != plain.get(name))
  }


def _bundle(exp, network, variables, info) -> bundles.Bundle:
  """Returns a network that a run leaves, alone."""
  teacher, backbone_name = exp.teacher, exp.config.student.backbone
  return bundles.Bundle(
    network=network,
    variables=jax.device_get(variables),
    backbone_name=backbone_name,
    pool_name=teacher.pool_name
    if network.connector is not None
    else network.backbone.pool_name(backbone_name),
    image_shape=tuple(exp.dataset.image_shape),
    class_names=tuple(exp.dataset.class_names),
    info=info,
  )


def _circumstances(exp, bundle, teacher_metrics) -> dict[str, Any]:
  """Returns what a summary says beside the student's numbers."""
  teacher = exp.teacher
  return {
    'teacher': teacher_metrics,
    'teacher_name': teacher and teacher.name,
    'teacher_origin': teacher and teacher.origin,
    'heads': exp.fitted,
    'parameters': {
      'student': bundles.num_params(bundle.variables),
      'teacher': teacher and teacher.num_params,
    },
    **costs.measure(exp, bundle),
    'seed': exp.config.seed,
    'config': exp.config.to_dict(),
    'versions': run_record.versions(),
    'devices': [device.device_kind for device in jax.devices()],
  }
