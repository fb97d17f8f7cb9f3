"""Batches as functions of (seed, step), and every test example once."""

from collections.abc import Callable
from collections.abc import Iterator

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
  order = grain.MapDataset.range(len(arrays)).seed(seed).shuffle().repeat()

  def gather(step: int, indices: np.ndarray) -> Batch:
    positions = step * batch_size + np.arange(batch_size)
    indices = indices[rows].astype(np.int32)
    epochs = (positions[rows] // len(arrays)).astype(np.int32)
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

  batches = order.batch(batch_size).map_with_index(gather)
  yield from batches[start_step:num_steps].to_iter_dataset(
    grain.ReadOptions(num_threads=1, prefetch_buffer_size=4)
  )


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
