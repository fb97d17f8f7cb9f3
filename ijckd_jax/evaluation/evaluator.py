"""Evaluation of networks on whole splits, beside a teacher if there is one."""

from collections.abc import Callable
import dataclasses
import functools

import jax
from jax.experimental import multihost_utils
import jax.numpy as jnp
import numpy as np

from ijckd_jax.data import input_pipeline
from ijckd_jax.distillation import network as network_lib
from ijckd_jax.evaluation import feature_extraction
from ijckd_jax.evaluation import metrics
from ijckd_jax.evaluation import pointwise
from ijckd_jax.models import cpu_conv
from ijckd_jax.runtime import parallel


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


def make(
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
    connected: the network through the teacher's head, see eval_step.
    num_workers: processes that decode images which do not lie in memory.

  Returns:
    A function of the network's variables, Teacher.arrays as the mapper placed
    them (None without a teacher), datasets.Arrays and, where `connected`
    is another network, its variables.
  """
  p_eval_step = mapper.map(
    functools.partial(eval_step, network=network, connected=connected),
    rows_in=(False, False, True),
    rows_out=True,
  )
  batches = functools.partial(
    input_pipeline.eval_batches,
    batch_size=batch_size,
    process_index=jax.process_index(),
    num_processes=jax.process_count(),
    num_workers=num_workers,
  )
  if teacher is not None:
    pooled_by_batch = _make_pooled_by_batch(teacher, mapper, batches)

  def evaluate(
    variables, teacher_arrays, arrays, connected_variables=None
  ) -> Evaluation:
    variables = mapper.replicate(
      {'student': variables, 'connected': connected_variables}
    )
    inputs, joint = batches(arrays), None
    if teacher is not None:
      head = variables[
        'student' if connected_variables is None else 'connected'
      ]
      head = jax.device_get(head['params']['head'])
      joint = {'head': teacher_arrays['head'], 'described': None}
      if connected is not None:
        joint['described'] = mapper.replicate(pointwise.describe(head))
      pairs = zip(inputs, pooled_by_batch(teacher_arrays, arrays), strict=True)
      inputs = ({**batch, 'teacher_pooled': pooled} for batch, pooled in pairs)
    results = (
      (batch, *p_eval_step(variables, joint, mapper.shard(batch)))
      for batch in inputs
    )
    totals, rows = _gather(results, mapper)
    num_classes = variables['student']['params']['head']['bias'].shape[0]
    student = _evaluation('student', totals, rows, num_classes)
    if teacher is None:
      return student
    pair = metrics.summarize_pair(totals['pair'])
    pair |= pointwise.summarize(totals['bounds'], *head['kernel'].shape)
    return dataclasses.replace(
      student,
      metrics={**student.metrics, **pair},
      teacher=_evaluation('teacher', totals, rows, num_classes),
    )

  return evaluate


def _make_pooled_by_batch(teacher, mapper, batches):
  """Returns a function that gives the teacher's pooled features of a split.

  They are a list of this process's rows, by batch, which stays in memory when a
  head is fitted again, because a fit only reads them.
  """
  p_teach_step = feature_extraction.make_step(
    lambda teacher_arrays, images: teacher(teacher_arrays, images).pooled,
    mapper,
  )
  known = {}  # The split, which keeps its id from being used again; features.

  def pooled_by_batch(teacher_arrays, arrays) -> list[np.ndarray]:
    if id(arrays) not in known:
      found = (
        p_teach_step(teacher_arrays, mapper.shard(batch), None)
        for batch in batches(arrays, what='running the teacher')
      )
      pooled = [mapper.rows(rows['rows']) for _, rows in parallel.ahead(found)]
      known[id(arrays)] = arrays, pooled
    return known[id(arrays)][1]

  return pooled_by_batch


def _gather(results, mapper):
  """Returns the sums over all batches, and the rows of each example in order.

  Args:
    results: of each batch: itself, and the sums and rows of eval_step.
    mapper: parallel.Mapper.
  """
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
  return totals, {name: values[chosen] for name, values in joined.items()}


def _evaluation(name, totals, rows, num_classes) -> Evaluation:
  """Returns what one network does; `name` is 'student' or 'teacher'."""
  return Evaluation(
    metrics.summarize(totals[name]),
    _confusion(rows['label'], rows[name], num_classes),
    rows[name],
    rows['label'],
  )


def _confusion(labels, predictions, num_classes):
  """Returns (K, K) int64 counts of the labelled examples."""
  counts = np.zeros((num_classes, num_classes), np.int64)
  labelled = labels >= 0
  np.add.at(counts, (labels[labelled], predictions[labelled]), 1)
  return counts


@cpu_conv.fast_convolutions()
def eval_step(variables, joint, batch, *, network, connected):
  """Evaluates a network that predicts alone, beside a teacher if there is one.

  Args:
    variables: 'student' of the network and, where `connected` is another one,
      'connected' of that.
    joint: the teacher's 'head', and 'described', the pointwise.Head of
      `connected`; None without a teacher.
    batch: this device's rows, with 'mask'; and with 'teacher_pooled', the
      teacher's pooled features, where there is one.
    network: network.Network.
    connected: the student through the teacher's head, a network.Network; None
      where it has no connector to the teacher, or there is none.

  Returns:
    Sums over all devices by 'student', and where there is a teacher 'teacher',
    'pair' and 'bounds'; and rows: the predicted classes (B,) of each.
  """
  images, labels, mask = batch['image'], batch['label'], batch['mask']
  student = network(variables['student'], network.preprocessing(images))
  sums = {'student': metrics.prediction_sums(student.logits, labels, mask)}
  rows = {'student': jnp.argmax(student.logits, axis=-1)}
  if joint is not None:
    teacher_logits = network_lib.classify(
      joint['head'], batch['teacher_pooled']
    )
    sums['teacher'] = metrics.prediction_sums(teacher_logits, labels, mask)
    sums['pair'] = metrics.pair_sums(student.logits, teacher_logits, mask)
    rows['teacher'] = jnp.argmax(teacher_logits, axis=-1)
    if connected is None:
      compared = pointwise.from_logits(teacher_logits, student.logits, labels)
    else:
      connected_outputs, is_another = student, connected is not network
      if is_another:
        connected_outputs = connected(
          variables['connected'], connected.preprocessing(images)
        )
      compared = pointwise.from_features(
        batch['teacher_pooled'],
        connected_outputs.pooled,
        labels,
        joint['described'],
      )
      if is_another:
        compared = compared.replace(own=rows['student'])
    sums['bounds'] = pointwise.sums(compared, mask)
  return jax.lax.psum(sums, parallel.AXIS), rows
