"""When a run fills a store of teacher outputs, and when it reads it.

The teacher of a run with `config.teacher.store.views = M` sees M fixed views of
each image. In the first M epochs it runs, and what the method reads of it
(`stored_outputs.plan` decides that) is rounded and stored; from then on it is
read. The student learns from the rounded values in both, so that it does not
matter when a step is made. What a store is, and whose: `output_store`; its
files: `output_files`.
"""

import collections
import hashlib
import logging
import math
from typing import Any

from etils import epath
import jax
import numpy as np

from ijckd_jax.runtime import config_utils
from ijckd_jax.runtime import disk
from ijckd_jax.runtime import hosts
from ijckd_jax.runtime import workdirs
from ijckd_jax.training import output_store
from ijckd_jax.training import run_record

# How far writing is behind the steps, lest it wait for the devices.
STEPS_BEHIND = 8

logger = logging.getLogger('ijckd_jax')


class Recorder:
  """What a loop knows of a store: whether to fill it, and when to read."""

  def __init__(self, store: output_store.Store, mapper, batch_size: int):
    """Takes a store that is open.

    Args:
      store: of the teacher's outputs.
      mapper: parallel.Mapper of the filling steps.
      batch_size: rows of a step, of all devices and processes.
    """
    # The step after which there is nothing left to fill. A run that goes
    # through these steps again, from an older checkpoint, finds the store that
    # it has filled itself. It runs the teacher once more all the same: the
    # program that reads would round otherwise, and end with other bits.
    self._is_full, self.last_filling_step = store.complete, 0
    if store.is_own or not self._is_full:
      self.last_filling_step = math.ceil(store.layout.size / batch_size)
    self._store = store
    self._mapper = mapper
    self._batch_size = batch_size
    self._pending = collections.deque()

  def add(self, step: int, rows: Any) -> None:
    """Takes the rows of steps.train_step, counted from 1; does not wait."""
    if self._is_full:
      return
    self._pending.append((step, rows))
    while len(self._pending) > STEPS_BEHIND:
      self._write()

  def flush(self) -> None:
    """Waits until all that was added is written."""
    while self._pending:
      self._write()

  def close_file(self) -> None:
    """Completes the file that is written, so that a checkpoint can follow."""
    self.flush()
    self._store.close_file()

  def reader(self):
    """Returns `(indices, epochs) -> rows by name`, once all is stored."""
    self.close_file()
    hosts.wait('teacher outputs stored')
    self._store.load()
    return self._store.read

  def _write(self) -> None:
    step, rows = self._pending.popleft()
    rows = self._mapper.rows(rows)
    end = step * self._batch_size
    self._store.write(
      end - self._batch_size,
      end,
      rows['index'],
      rows['epoch'],
      rows['teacher'],
    )


def check(exp, folder: epath.Path, arrays, *, overwrite: bool) -> None:
  """Raises where a run's outputs cannot be stored; nothing is written.

  Args:
    exp: experiment.Experiment.
    folder: of the run.
    arrays: datasets.Arrays that it trains on.
    overwrite: whether what the folder holds will be removed.

  Raises:
    config_utils.UserError: too large, or the place is taken.
  """
  if exp.stored is None:
    return
  if disk.is_remote(exp.config.teacher.store.directory or folder):
    raise config_utils.UserError(
      'stored teacher outputs are ArrayRecord files, which lie on a disk, not '
      'in a bucket: give a local teacher.store.directory'
    )
  store = _store(exp, folder, arrays)
  if exp.config.teacher.store.directory or not overwrite:
    unknown = ('teacher',) if _is_abstract(exp.frozen) else ()
    store.check(ignore=unknown)
    if store.complete:
      return
  store.check_size(exp.config.teacher.store.limit_gib)
  num_examples = exp.total_steps(len(arrays)) * exp.config.batch_size
  if store.layout.size > num_examples:
    raise config_utils.UserError(
      f'teacher.store.views={store.layout.views}: the run is shorter than so '
      'many epochs, and would never read what it stores: take fewer, or 0'
    )


def start(exp, folder: epath.Path, arrays, step: int) -> Recorder | None:
  """Opens a run's store after a step; None where it has none.

  Args:
    exp: experiment.Experiment, whose teacher is there.
    folder: of the run.
    arrays: datasets.Arrays that it trains on.
    step: how many were made before.

  Raises:
    config_utils.UserError: it is another store, or something is missing.
  """
  if exp.stored is None or step == exp.total_steps(len(arrays)):
    return None
  store, batch_size = _store(exp, folder, arrays), exp.config.batch_size
  hosts.share(lambda: store.open(step * batch_size))
  layout = store.layout
  logger.info(
    '%s: %s: %.3g GiB, %d views of %d images, %d bytes each (%s in %s)%s',
    folder,
    store.directory,
    layout.num_bytes / output_store.GIB,
    layout.views,
    layout.num_examples,
    layout.record_bytes,
    ', '.join(layout.leaves),
    layout.dtype,
    '; complete' if store.complete else '',
  )
  return Recorder(store, exp.mapper, batch_size)


def _store(exp, folder, arrays) -> output_store.Store:
  """Returns the store that a run's config describes."""
  settings = exp.config.teacher.store
  teacher_arrays = run_record.arrays_of(exp.teachers)
  layout = output_store.Layout(
    len(arrays), settings.views, exp.stored.dtype, exp.stored.shapes
  )
  identity = {
    'teacher': f'{exp.teacher.name} {_digest(teacher_arrays)}',
    'preprocessing': ' '.join(str(t.preprocessing) for t in exp.teachers),
    'compute_dtype': exp.config.dtype,
    'dataset': exp.config.dataset.name,
    'examples': arrays.digest(),
    'augmentation': exp.augmentation.identity,
    'seed': exp.config.seed,
  }
  second_view = exp.distiller.method.second_view
  if second_view is not None:
    identity['second_view'] = ' '.join(map(str, second_view))
  return output_store.Store(
    config_utils.expand(settings.directory)
    or folder / workdirs.TEACHER_OUTPUTS,
    layout,
    identity,
    owner=str(folder.resolve()),
    process=jax.process_index(),
    num_processes=jax.process_count(),
  )


def _is_abstract(tree) -> bool:
  """Returns whether there are shapes in place of arrays."""
  return any(
    isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(tree)
  )


def _digest(tree) -> str:
  """Returns a hash of a tree's arrays; '' where they are not there yet."""
  if _is_abstract(tree):
    return ''
  digest = hashlib.sha256()
  for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
    array = np.ascontiguousarray(leaf)
    digest.update(f'{path}{array.shape}{array.dtype}'.encode())
    digest.update(array.view(np.uint8))
  return digest.hexdigest()[:16]
