"""What networks make of images, gathered on the host, in the images' order."""

from collections.abc import Callable
from collections.abc import Iterable
import functools
from typing import Any

import jax
from jax.experimental import multihost_utils
import numpy as np

from ijckd_jax.data import input_pipeline
from ijckd_jax.distillation import steps
from ijckd_jax.models import cpu_conv
from ijckd_jax.runtime import parallel


@cpu_conv.fast_convolutions()
def feature_step(variables, batch, key, *, function, augmentation=None):
  """Returns what a function makes of this device's rows.

  Args:
    variables: of the function.
    batch: this device's rows.
    key: the run's key; None where nothing is augmented.
    function: `(variables, images) -> rows`, of images of 0 to 255.
    augmentation: as steps.train_step takes it; None: the images as they are.

  Returns:
    Nothing that is the same everywhere, and rows: 'index' and 'label' (B,), and
    'rows' as the function returns them.
  """
  images = batch['image']
  if augmentation is not None:
    stream = jax.random.fold_in(key, steps.AUGMENTATION_STREAM)
    images = augmentation(stream, images, batch['epoch'], batch['index'])
  rows = function(variables, images)
  return {}, {'index': batch['index'], 'label': batch['label'], 'rows': rows}


def make_step(
  function: Callable[[Any, jax.Array], Any],
  mapper: parallel.Mapper,
  augmentation=None,
) -> Callable:
  """Returns feature_step of a function, mapped; it compiles once.

  Args:
    function: `(variables, images) -> rows`, of images of 0 to 255.
    mapper: see parallel.
    augmentation: as feature_step takes it.
  """
  return mapper.map(
    functools.partial(
      feature_step, function=function, augmentation=augmentation
    ),
    rows_in=(False, True, False),
    rows_out=True,
  )


def of_split(
  step: Callable,
  variables: Any,
  arrays,
  *,
  mapper: parallel.Mapper,
  batch_size: int,
  num_workers: int = 0,
  what: str = 'reading features',
) -> dict[str, Any]:
  """Returns rows of every example once, in every process all of them.

  Args:
    step: of `make_step`.
    variables: of its function, as the mapper placed them.
    arrays: datasets.Arrays.
    mapper: see parallel.
    batch_size: rows of all devices and processes together.
    num_workers: processes that decode images which do not lie in memory.
    what: name of the work; see progress.watched.

  Returns:
    'index' and 'label' (N,), and 'rows' as the function returns them.
  """
  batches = input_pipeline.eval_batches(
    arrays,
    batch_size=batch_size,
    process_index=jax.process_index(),
    num_processes=jax.process_count(),
    num_workers=num_workers,
    what=what,
  )
  return of_batches(
    step, variables, batches, lambda batch: batch['mask'], mapper=mapper
  )


def of_batches(
  step: Callable,
  variables: Any,
  batches: Iterable[dict[str, np.ndarray]],
  chosen: Callable[[dict[str, np.ndarray]], np.ndarray],
  *,
  mapper: parallel.Mapper,
  key: jax.Array | None = None,
) -> dict[str, Any]:
  """Returns rows of batches, by epoch and index; see `of_split`.

  Args:
    step: as `of_split` takes it.
    variables: as `of_split` takes them.
    batches: of this process.
    chosen: of a batch, which of its rows are wanted, (b,) bool.
    mapper: see parallel.
    key: of the augmentation, placed.
  """
  found = []
  for batch in batches:
    batch = {name: x for name, x in batch.items() if name != 'bad'}
    _, rows = step(variables, mapper.shard(batch), key)
    rows = {**mapper.rows(rows), 'chosen': chosen(batch)}
    rows['epoch'] = batch.get('epoch', np.zeros(len(batch['index']), np.int32))
    found.append(rows)
  joined = jax.tree.map(lambda *x: np.concatenate(x), *found)
  if jax.process_count() > 1:
    joined = multihost_utils.process_allgather(joined, tiled=True)
  order = np.lexsort((joined['index'], joined.pop('epoch')))
  order = order[joined.pop('chosen')[order]]
  return jax.tree.map(lambda x: x[order], joined)
