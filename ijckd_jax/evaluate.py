"""Evaluation of networks on whole splits, and of bundles by command.

ijckd evaluate --bundle runs/digits --dataset digits
"""

import argparse
from collections.abc import Callable
import dataclasses
import functools
import json
import sys

import numpy as np

from ijckd_jax import config_utils

PROG = 'python -m ijckd_jax.evaluate'


@dataclasses.dataclass(frozen=True)
class Evaluation:
  """What a network, and its teacher if there is one, do on a split.

  Attributes:
    metrics: 'top1', 'top5' (for more than 5 classes), 'nll', 'ece', and where
      there is a teacher 'agreement' with it and 'kl' to it.
    confusion: (K, K) int64, true class by predicted, of labelled examples.
    predictions: (N,) predicted classes.
    labels: (N,) the true classes; -1 where there is none.
    teacher: the same of the teacher; None where there is none.
  """

  metrics: dict[str, float]
  confusion: np.ndarray
  predictions: np.ndarray
  labels: np.ndarray
  teacher: 'Evaluation | None' = None


def make_evaluator(
  network,
  *,
  mapper,
  batch_size: int,
  teacher=None,
  connected=None,
  num_workers: int = 0,
) -> Callable[..., Evaluation]:
  """Returns a compiled evaluation that counts every example once.

  The teacher runs on a split once; its pooled features are kept in memory.

  Args:
    network: network.Network.
    mapper: parallel.Mapper.
    batch_size: rows of all devices together.
    teacher: teachers.Teacher to compare with, or None.
    connected: the network through the teacher's head, see steps.eval_step.
    num_workers: processes that decode images which do not lie in memory.

  Returns:
    A function of the network's variables, the teacher's arrays as the mapper
    placed them (None without a teacher), datasets.Arrays and, where `connected`
    is another network, its variables.
  """
  import jax
  from jax.experimental import multihost_utils

  from ijckd_jax import features
  from ijckd_jax import input_pipeline
  from ijckd_jax import metrics
  from ijckd_jax import parallel
  from ijckd_jax import steps
  from ijckd_jax.bounds import pointwise

  p_eval_step = mapper.map(
    functools.partial(steps.eval_step, network=network, connected=connected),
    rows_in=(False, False, True),
    rows_out=True,
  )
  taught = {}  # By split: the teacher does not change, but for its head.
  if teacher is not None:
    p_teach_step = features.make_step(
      lambda frozen, images: teacher(frozen, images).pooled, mapper
    )

  def batches(arrays):
    return input_pipeline.eval_batches(
      arrays,
      batch_size=batch_size,
      process_index=jax.process_index(),
      num_processes=jax.process_count(),
      num_workers=num_workers,
    )

  def teach(frozen, arrays) -> list[np.ndarray]:
    """Returns the pooled features of this process's rows, by batch."""
    if id(arrays) not in taught:
      found = (
        p_teach_step(frozen, mapper.shard(batch), None)
        for batch in batches(arrays)
      )
      pooled = [mapper.rows(rows['rows']) for _, rows in parallel.ahead(found)]
      taught[id(arrays)] = arrays, pooled
    return taught[id(arrays)][1]

  def evaluate(variables, frozen, arrays, seen=None) -> Evaluation:
    variables = mapper.replicate({'student': variables, 'connected': seen})
    inputs, judge, head = batches(arrays), None, None
    if teacher is not None:
      head = variables['student' if seen is None else 'connected']
      head = jax.device_get(head['params']['head'])
      judge = {'head': frozen['head'], 'described': None}
      if connected is not None:
        judge['described'] = mapper.replicate(pointwise.describe(head))
      pairs = zip(inputs, teach(frozen, arrays), strict=True)
      inputs = ({**batch, 'taught': pooled} for batch, pooled in pairs)
    results = (
      (batch, *p_eval_step(variables, judge, mapper.shard(batch)))
      for batch in inputs
    )
    totals, rows = None, []
    for batch, sums, predicted in parallel.ahead(results):
      sums = jax.tree.map(lambda x: np.asarray(x, np.float64), sums)
      if totals is None:
        totals = sums
      else:
        totals = jax.tree.map(np.add, totals, sums)
      about = {name: batch[name] for name in ('index', 'label', 'mask')}
      rows.append({**mapper.rows(predicted), **about})
    joined = {name: np.concatenate([r[name] for r in rows]) for name in rows[0]}
    if jax.process_count() > 1:
      joined = multihost_utils.process_allgather(joined, tiled=True)
    chosen = np.flatnonzero(joined['mask'])
    chosen = chosen[np.argsort(joined['index'][chosen])]
    joined = {name: values[chosen] for name, values in joined.items()}
    num_classes = variables['student']['params']['head']['bias'].shape[0]

    def evaluation(name, more, below):
      return Evaluation(
        {**metrics.summarize(totals[name]), **more},
        _confusion(joined['label'], joined[name], num_classes),
        joined[name],
        joined['label'],
        below,
      )

    if teacher is None:
      return evaluation('student', {}, None)
    pair = metrics.summarize_pair(totals['pair'])
    pair |= pointwise.summarize(totals['bounds'], *head['kernel'].shape)
    return evaluation('student', pair, evaluation('teacher', {}, None))

  return evaluate


def _confusion(labels, predictions, num_classes):
  """Returns (K, K) int64 counts of the labelled examples."""
  counts = np.zeros((num_classes, num_classes), np.int64)
  labelled = labels >= 0
  np.add.at(counts, (labels[labelled], predictions[labelled]), 1)
  return counts


def add_flags(parser: argparse.ArgumentParser) -> None:
  """Adds what says which network is run, on what, and how."""
  add_data_flags(parser)
  parser.add_argument(
    '--batch_size', type=int, help='default: as in the run that made the bundle'
  )
  parser.add_argument(
    '--num_workers',
    type=int,
    default=0,
    help='processes that decode images which do not lie in memory',
  )


def add_data_flags(parser: argparse.ArgumentParser) -> None:
  """Adds what says which network is run, and on what."""
  parser.add_argument(
    '--bundle', required=True, help='folder of a bundle, or of a finished run'
  )
  parser.add_argument(
    '--dataset',
    help='name or package.module:Name; default: what the bundle was trained on',
  )
  parser.add_argument(
    '--dataset_fields', help='key=value,key=value; default: as in training'
  )
  parser.add_argument('--data_dir', help='where the data sets lie')
  parser.add_argument(
    '--classes_by_number',
    action='store_true',
    help="class i is the data set's class i, whatever their names are",
  )
  parser.add_argument(
    '--trust_code',
    action='store_true',
    help='the bundle may name code outside the package, which is imported, or '
    'hold programs',
  )


def main(argv: list[str], prog: str = PROG) -> None:
  """Runs the command."""
  parser = config_utils.ArgumentParser(
    prog=prog, description='Evaluates a bundle, by itself, on a data set.'
  )
  add_flags(parser)
  parser.add_argument(
    '--split', default='test', choices=('train', 'validation', 'test')
  )
  parser.add_argument('--teacher', help='bundle or run to compare with')
  parser.add_argument('--json', action='store_true', help='print JSON')
  flags = parser.parse_args(argv)

  from ijckd_jax import bundles
  from ijckd_jax import compilation_cache
  from ijckd_jax import pairs
  from ijckd_jax import parallel

  compilation_cache.enable(compilation_cache.DEFAULT)
  bundle = bundles.load(flags.bundle, trust_code=flags.trust_code)
  batch_size = batch_size_of(bundle, flags)
  dataset = dataset_of(bundle, flags)
  check_fits('bundle', bundle, dataset)
  bundle = in_class_order('the bundle', bundle, dataset, flags)
  teacher, connected = None, None
  if flags.teacher:
    judge = bundles.load(flags.teacher, trust_code=flags.trust_code)
    check_fits('teacher', judge, dataset)
    judge = in_class_order(
      'the teacher', judge, dataset, flags, beside=bundle.class_names
    )
    teacher = judge.teacher()
    if pairs.sees(bundle.network, bundle.variables, teacher):
      connected = bundle.network
  arrays = dataset.load(flags.split)
  if not len(arrays):
    raise config_utils.UserError(f'the split {flags.split!r} is empty')
  mapper = parallel.Mapper()
  evaluator = make_evaluator(
    bundle.network,
    mapper=mapper,
    batch_size=batch_size,
    teacher=teacher,
    connected=connected,
    num_workers=flags.num_workers,
  )
  frozen = mapper.replicate(teacher.frozen) if teacher else None
  result = evaluator(bundle.variables, frozen, arrays)
  named = {'student' if teacher else 'network': result.metrics}
  if teacher:
    named['teacher'] = result.teacher.metrics
  if flags.json:
    print(json.dumps({'examples': len(arrays), **named}))
    return
  print(f'{len(arrays)} examples of {flags.split}')
  for name, values in named.items():
    shown = '  '.join(f'{key} {value:.6f}' for key, value in values.items())
    print(f'{name}: {shown}')


def batch_size_of(bundle, flags: argparse.Namespace) -> int:
  """Returns the rows of a batch, which the devices share."""
  import jax

  batch_size = flags.batch_size
  if batch_size is None:
    batch_size = bundle.info.get('eval_batch_size', 256)
  num_devices = jax.local_device_count()
  if batch_size < 1 or batch_size % num_devices:
    raise config_utils.UserError(
      f'--batch_size {batch_size}: it must be a positive multiple of the '
      f'{num_devices} devices'
    )
  return batch_size


def check_fits(what: str, bundle, dataset, *, has_head: bool = True) -> None:
  """Raises where a bundle cannot be evaluated on a data set.

  Args:
    what: how messages call it.
    bundle: bundles.Bundle.
    dataset: see datasets.
    has_head: whether its own head is to predict.
  """
  num_classes = len(dataset.class_names)
  if has_head and num_classes != len(bundle.class_names):
    raise config_utils.UserError(
      f'the {what} tells {len(bundle.class_names)} classes apart, but the data '
      f'set has {num_classes}'
    )
  if dataset.image_shape[-1] not in (1, bundle.image_shape[-1]):
    raise config_utils.UserError(
      f'the {what} reads images of {bundle.image_shape[-1]} channels, but the '
      f"data set's have {dataset.image_shape[-1]}"
    )


def in_class_order(
  what: str, bundle, dataset, flags: argparse.Namespace, *, beside=()
):
  """Returns a bundle with its classes in the data set's order.

  A note is printed if the order was changed, or could not be compared.

  Args:
    what: how messages call the bundle.
    bundle: bundles.Bundle that `check_fits` has passed.
    dataset: see datasets.
    flags: of `add_data_flags`.
    beside: class names of the bundle that it is compared with, which count
      where the data set's classes have none.

  Raises:
    config_utils.UserError: its classes are others.
  """
  from ijckd_jax import classes

  order = class_order(what, bundle, dataset, flags, beside=beside)
  if order is None:
    return bundle
  names = classes.first_named(dataset.class_names, beside)
  return bundle.in_order(order, names)


def class_order(
  what: str, bundle, dataset, flags: argparse.Namespace, *, beside=()
):
  """Returns what classes.match does; see `in_class_order`."""
  from ijckd_jax import classes

  names = classes.first_named(dataset.class_names, beside)
  of = 'the data set' if names is dataset.class_names else 'the bundle'
  order, note = classes.match(
    bundle.class_names,
    names,
    what=what,
    of=of,
    by_number=flags.classes_by_number,
  )
  if note:
    print(f'note: {note}', file=sys.stderr)
  return order


def dataset_of(bundle, flags: argparse.Namespace):
  """Returns the data set that the flags ask for."""
  from ijckd_jax import datasets

  made_on = bundle.info.get('dataset', {})
  name = flags.dataset or made_on.get('name')
  if not name or not isinstance(name, str):
    raise config_utils.UserError('the bundle names no data set: give --dataset')
  if not flags.dataset:
    if name == 'arrays':
      raise config_utils.UserError(
        'the bundle was trained on arrays from Python, which it does not hold: '
        'give --dataset'
      )
    if name not in datasets.DATASETS and not flags.trust_code:
      raise config_utils.UserError(
        f'the bundle was trained on {name!r}, which is code outside the '
        'package: give --trust_code to import it, or --dataset'
      )
  cls = datasets.get(name)
  fields = config_utils.section(cls, name)
  if name == made_on.get('name'):
    config_utils.override(fields, made_on)
  try:
    _set_fields(fields, flags.dataset_fields)
  except config_utils.UserError as error:
    raise config_utils.UserError(f'--dataset_fields: {error}') from error
  if flags.data_dir is not None:
    fields.data_dir = flags.data_dir
  return config_utils.instantiate('dataset', cls, fields)


def _set_fields(fields, arg: str | None) -> None:
  """Sets the fields that `key=value,key=value` names, by their types."""
  unset = {key: None for key in fields if key != 'name'}
  for key, text in config_utils.parse_arg(arg, **unset).items():
    if text is None:
      continue
    try:
      fields[key] = config_utils.parse_value(text, like=fields[key])
    except (TypeError, ValueError) as error:
      kind = type(fields[key]).__name__
      raise config_utils.UserError(
        f'{key}={text!r} is not of type {kind}'
      ) from error


if __name__ == '__main__':
  config_utils.run_command(main)
