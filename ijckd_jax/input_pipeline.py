"""Batches as functions of (seed, step), and every test example once."""

from collections.abc import Callable
from collections.abc import Iterator
import functools

import grain
import numpy as np

Batch = dict[str, np.ndarray]


def train_batches(
  arrays,
  *,
  batch_size: int,
  seed: int,
  start_step: int,
  num_steps: int,
  rows: slice,
  teacher: Callable[[np.ndarray, np.ndarray], Batch] | None = None,
) -> Iterator[Batch]:
  """Yields the batches of an endless, shuffled stream of epochs.

  A batch may cross from one epoch to the next; all are full. Position p of the
  stream belongs to epoch p // N, and each epoch has an order of its own.

  Args:
    arrays: datasets.Arrays with N examples.
    batch_size: rows of the global batch.
    seed: of the order.
    start_step: batches to leave out at the start.
    num_steps: where to end, counted from the start of the stream.
    rows: this process's part of the global batch.
    teacher: `(indices, epochs) -> rows by name`, stored outputs to go with the
      images; None for none.

  Yields:
    'image' uint8 (b, H, W, C), 'label', 'index' and 'epoch' int32 (b,), and
    'teacher' where there are stored outputs.
  """
  num_examples = len(arrays)
  # Two, since a batch may cross from one epoch to the next.
  epoch_order = functools.lru_cache(2)(
    functools.partial(permutation, seed, num_examples=num_examples)
  )

  def gather(step: int) -> Batch:
    positions = (step * batch_size + np.arange(batch_size))[rows]
    epochs, places = np.divmod(positions, num_examples)
    indices = np.concatenate(
      [
        epoch_order(epoch)[places[epochs == epoch]]
        for epoch in range(epochs[0], epochs[-1] + 1)
      ]
    )
    epochs = epochs.astype(np.int32)
    chosen = arrays.take(indices)
    batch = {
      'image': chosen.images,
      'label': chosen.labels.astype(np.int32),
      'index': indices,
      'epoch': epochs,
    }
    if teacher is not None:
      batch['teacher'] = teacher(indices, epochs)
    return batch

  batches = grain.MapDataset.range(start_step, num_steps).map(gather)
  yield from batches.to_iter_dataset(
    grain.ReadOptions(num_threads=1, prefetch_buffer_size=4)
  )


def permutation(seed: int, epoch: int, *, num_examples: int) -> np.ndarray:
  """Returns the order of an epoch: int32 (num_examples,)."""
  # RandomState's streams, unlike Generator's, are promised never to change.
  bits = np.random.MT19937(np.random.SeedSequence((seed, epoch)))
  order = np.arange(num_examples, dtype=np.int32)
  np.random.RandomState(bits).shuffle(order)
  return order


def eval_batches(
  arrays, *, batch_size: int, process_index: int, num_processes: int
) -> Iterator[Batch]:
  """Yields every example once, over all processes, in full batches.

  The last batches are filled up with copies of the first example, which the
  mask leaves out.

  Args:
    arrays: datasets.Arrays.
    batch_size: rows of the global batch.
    process_index: which part of each batch is yielded.
    num_processes: in how many parts a batch is cut.

  Yields:
    'image', 'label', 'index' int32 and 'mask' bool, (b, ...) each.
  """
  part = batch_size // num_processes
  for start in range(0, len(arrays), batch_size):
    first = start + process_index * part
    indices = np.arange(first, first + part, dtype=np.int32)
    mask = indices < len(arrays)
    indices = np.where(mask, indices, 0)
    chosen = arrays.take(indices)
    yield {
      'image': chosen.images,
      'label': chosen.labels.astype(np.int32),
      'index': indices,
      'mask': mask,
    }
