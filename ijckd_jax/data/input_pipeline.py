"""Batches as functions of (seed, step), and every test example once."""

from collections.abc import Callable
from collections.abc import Iterator
import contextlib
import errno
import functools
import itertools
import multiprocessing
from multiprocessing import connection
import os
import re
import signal
import threading

from absl import flags
import grain
import numpy as np

from ijckd_jax.runtime import progress
from ijckd_jax.runtime import workers

# Grain's words.
WORKER_ENDED = r'Worker process was terminated .* exit code (-?\d+)'

Batch = dict[str, np.ndarray]


def train_batches(
  arrays,
  *,
  batch_size: int,
  seed: int,
  start_step: int,
  stop_step: int,
  rows: slice,
  views: int = 0,
  num_workers: int = 0,
  teacher: Callable[[np.ndarray, np.ndarray], Batch] | None = None,
) -> Iterator[Batch]:
  """Yields the batches of an endless, shuffled stream of epochs.

  A batch may cross from one epoch to the next; all are full. Position p of the
  stream belongs to epoch p // N, and each epoch has an order of its own.

  Args:
    arrays: datasets.Arrays, or photos.Photos, with N examples.
    batch_size: rows of the global batch.
    seed: of the order, and of what views there are.
    start_step: batches to leave out at the start.
    stop_step: before which the batches end.
    rows: this process's part of the global batch.
    views: how many there are of an image, in turn; 0: a new one in each epoch.
    num_workers: processes that decode; see `_read`.
    teacher: `(indices, epochs) -> rows by name`, stored outputs to go with the
      images; None for none.

  Yields:
    'image' uint8 (b, H, W, C), 'label', 'index' and 'epoch' int32 (b,),
    'teacher' where there are stored outputs, and 'bad' bool (b,) where images
    are decoded: which could not be, and were replaced.
  """

  def gather(step: int) -> Batch:
    indices, epochs = examples(
      step, batch_size=batch_size, seed=seed, num_examples=len(arrays)
    )
    indices, epochs = indices[rows], epochs[rows]
    batch = {
      **arrays.train_views(indices, epochs % views if views else epochs, seed),
      'index': indices,
      'epoch': epochs,
    }
    if teacher is not None:
      batch['teacher'] = teacher(indices, epochs)
    return batch

  batches = grain.MapDataset.range(start_step, stop_step).map(gather)
  yield from _read(batches, 0 if arrays.in_memory else num_workers)


def examples(
  step: int,
  *,
  batch_size: int,
  seed: int,
  num_examples: int,
  num_steps: int = 1,
) -> tuple[np.ndarray, np.ndarray]:
  """Returns which examples are seen: indices and epochs, (S * B,) int32 each.

  Args:
    step: the first of the steps, counted from 0.
    batch_size: B rows of the global batch.
    seed: of the order.
    num_examples: in the training set.
    num_steps: S steps, whose batches follow each other in the result.
  """
  positions = step * batch_size + np.arange(num_steps * batch_size)
  epochs, places = np.divmod(positions, num_examples)
  indices = np.concatenate(
    [
      permutation(seed, epoch, num_examples)[places[epochs == epoch]]
      for epoch in range(epochs[0], epochs[-1] + 1)
    ]
  )
  return indices, epochs.astype(np.int32)


# Two, since a batch may cross from one epoch to the next.
@functools.lru_cache(maxsize=2)
def permutation(seed: int, epoch: int, num_examples: int) -> np.ndarray:
  """Returns the order of an epoch: int32 (num_examples,), not to be changed."""
  # RandomState's streams, unlike Generator's, are promised never to change.
  bits = np.random.MT19937(np.random.SeedSequence((seed, epoch)))
  order = np.arange(num_examples, dtype=np.int32)
  np.random.RandomState(bits).shuffle(order)
  return order


def eval_batches(
  arrays,
  *,
  batch_size: int,
  process_index: int,
  num_processes: int,
  num_workers: int = 0,
  what: str = 'evaluating',
) -> Iterator[Batch]:
  """Yields every example once, over all processes, in full batches.

  The last batches are filled up with copies of the first example, which the
  mask leaves out.

  Args:
    arrays: datasets.Arrays, or photos.Photos.
    batch_size: rows of the global batch.
    process_index: which part of each batch is yielded.
    num_processes: in how many parts a batch is cut.
    num_workers: processes that decode; see `_read`.
    what: name of the work; see progress.watched.

  Yields:
    'image', 'label', 'index' int32 and 'mask' bool, (b, ...) each.
  """
  part = batch_size // num_processes

  def gather(start: int) -> Batch:
    first = start + process_index * part
    indices = np.arange(first, first + part, dtype=np.int32)
    mask = indices < len(arrays)
    indices = np.where(mask, indices, 0)
    chosen = arrays.take(indices)
    return {
      'image': chosen.images,
      'label': chosen.labels.astype(np.int32),
      'index': indices,
      'mask': mask,
    }

  if arrays.in_memory:
    batches = map(gather, range(0, len(arrays), batch_size))
  else:
    starts = grain.MapDataset.range(0, len(arrays), batch_size)
    batches = _read(starts.map(gather), num_workers)
  yield from progress.watched(batches, what, 'images', len(arrays), batch_size)


def _read(batches: grain.MapDataset, num_workers: int) -> Iterator[Batch]:
  """Yields batches in their order, made ahead of their use.

  Args:
    batches: by their number.
    num_workers: processes that make them, a batch each; 0: a thread does.
  """
  dataset = batches.to_iter_dataset(
    grain.ReadOptions(
      num_threads=1, prefetch_buffer_size=1 if num_workers else 4
    )
  )
  if num_workers:
    workers.check_script()
    workers.check_start()
    # Grain has some, which its workers look at.
    if not flags.FLAGS.is_parsed():
      flags.FLAGS.mark_as_parsed()
    dataset = dataset.mp_prefetch(
      grain.MultiprocessingOptions(
        num_workers=num_workers, per_worker_buffer_size=2
      ),
      worker_init_fn=_end_with_the_run,
    )
  iterator = iter(dataset)
  try:
    # The first one starts the workers.
    with _signals_blocked():
      first = list(itertools.islice(iterator, 1))
    yield from first
    yield from iterator
  except OSError as error:
    if num_workers and error.errno == errno.ENOSPC:  # They write nowhere else.
      raise OSError(workers.SHARED_MEMORY) from error
    raise
  except RuntimeError as error:
    if found := re.search(WORKER_ENDED, str(error)):
      raise workers.ended(int(found[1])) from error
    raise
  finally:
    iterator.close()  # The workers, and memory shared with them.


@contextlib.contextmanager
def _signals_blocked():
  """Starts processes that never get SIGINT and SIGTERM; this one does, later.

  A terminal sends Ctrl-C to workers as well, and a batch system SIGTERM: they
  would be gone before the run has saved.
  """
  stops = (signal.SIGINT, signal.SIGTERM)
  before = signal.pthread_sigmask(signal.SIG_BLOCK, stops)
  try:
    yield
  finally:
    signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _end_with_the_run(worker: int, num_workers: int) -> None:
  """Ends a worker whose run was killed, and could not end it."""
  del worker, num_workers

  def watch():
    connection.wait([multiprocessing.parent_process().sentinel])
    os._exit(1)

  threading.Thread(target=watch, daemon=True).start()
