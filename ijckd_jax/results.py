"""What a run leaves: evaluated, written, and found again."""

import dataclasses
import importlib.metadata
import json
import logging
import platform
from typing import Any

import jax

from ijckd_jax import bundles
from ijckd_jax import evaluate
from ijckd_jax import hosts
from ijckd_jax import metric_writer
from ijckd_jax import report
from ijckd_jax import train_state
from ijckd_jax import workdirs

PACKAGES = ('ijckd_jax', 'jax', 'flax', 'optax', 'orbax-checkpoint')

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


def found(exp, workdir) -> Result:
  """Returns what a finished run has left."""
  logger.info('%s: already finished', workdir)
  return Result(
    state=None,
    history=metric_writer.read_rows(workdir / workdirs.METRICS),
    # The config of this run names whatever code the bundle does.
    bundle=bundles.load(workdir, dtype=exp.dtype, trust_code=True),
    summary=workdirs.read_json(workdir / workdirs.SUMMARY),
  )


def finish(training, workdir, state, progress, history):
  """Evaluates the last and the best state, and writes what is kept."""
  distiller, config = training.experiment.distiller, training.experiment.config
  states = {'last': state}
  best_step = training.store.best_step
  if best_step != int(state.step):
    states['best'], _ = training.store.restore_best(state)
    best_step = int(states['best'].step)
  frozen = {
    name: training.frozen_of(int(kept.step)) for name, kept in states.items()
  }
  variables = {
    name: distiller.deployed(kept.evaluated, frozen[name])
    for name, kept in states.items()
  }
  if state.ema is not None:
    raw = {'params': state.params, 'batch_stats': state.batch_stats}
    frozen['last_without_ema'] = frozen['last']
    variables['last_without_ema'] = distiller.deployed(raw, frozen['last'])
  evaluator = evaluate.make_evaluator(
    distiller.deployed_network,
    mapper=training.experiment.mapper,
    batch_size=config.eval_batch_size,
    teacher=training.experiment.judge,
    num_workers=config.num_workers,
  )
  test = training.splits['test']
  results = {
    name: evaluator(arrays, frozen[name], test)
    for name, arrays in variables.items()
  }
  chosen = config.bundle if config.bundle in results else 'last'
  student = {name: result.metrics for name, result in results.items()}
  student.setdefault('best', student['last'])
  bundle = _bundle(
    training.experiment, jax.device_get(variables[chosen]), chosen, student
  )
  summary = {
    'student': student,
    'best_step': best_step,
    'best_by': training.ranking_split,
    'steps': int(state.step),
    'test_examples': len(test),
    'images_per_second': progress.images_per_second,
    'damaged_images': [
      training.splits['train'].name_of(index) for index in progress.damaged
    ],
    **_circumstances(training.experiment, bundle, results[chosen].teacher),
  }

  def write():
    bundle.save(workdir / workdirs.BUNDLE)
    report.write(
      workdir,
      summary=summary,
      history=history,
      evaluation=results[chosen],
      arrays=test,
      class_names=bundle.class_names,
    )
    workdirs.write_text(
      workdir / workdirs.SUMMARY, json.dumps(summary, indent=2) + '\n'
    )

  hosts.share(lambda: workdirs.retry(write, 'what the run leaves'))
  return bundle, summary


def _bundle(exp, variables, chosen, student) -> bundles.Bundle:
  """Returns the network that a run leaves, alone."""
  config, judge = exp.config, exp.judge
  backbone_name = config.student.backbone
  reuses_head = exp.distiller.reuses_head
  return bundles.Bundle(
    network=exp.distiller.deployed_network,
    variables=variables,
    backbone_name=backbone_name,
    pool_name=judge.pool_name if reuses_head else backbone_name,
    image_shape=tuple(exp.dataset.image_shape),
    class_names=tuple(exp.dataset.class_names),
    info={
      'which': chosen,
      'test': student[chosen],
      'dataset': config.dataset.to_dict(),
      'method': config.method.to_dict(),
      'teacher': judge and judge.name,
      'eval_batch_size': config.eval_batch_size,
      'ijckd_jax': importlib.metadata.version('ijckd_jax'),
    },
  )


def _circumstances(exp, bundle, judged) -> dict[str, Any]:
  """Returns what a summary says beside the student's numbers."""
  judge = exp.judge
  return {
    'teacher': judged and judged.metrics,
    'teacher_name': judge and judge.name,
    'teacher_origin': judge and judge.origin,
    'heads': exp.fitted,
    'parameters': {
      'student': bundles.num_params(bundle.variables),
      'teacher': judge and judge.num_params,
    },
    'seed': exp.config.seed,
    'config': exp.config.to_dict(),
    'versions': versions(),
    'devices': [device.device_kind for device in jax.devices()],
  }


def versions() -> dict[str, str]:
  """Returns the versions that a run's numbers may depend on."""
  return {
    'python': platform.python_version(),
    **{name: importlib.metadata.version(name) for name in PACKAGES},
  }
