"""The files of a data set of pictures: written by several processes, resumable.

Every shard has notes beside it, of its size and of what became of each picture.
They are written last, so a shard with notes that fit is complete.
"""

from collections.abc import Callable
from collections.abc import Mapping
from collections.abc import Sequence
import contextlib
import dataclasses
import hashlib
import json
import math
import multiprocessing
from multiprocessing import connection
from multiprocessing import resource_tracker
import os
import pathlib
import signal
from typing import Any

import numpy as np

from ijckd_jax.data.datasets import image_files
from ijckd_jax.data.datasets import image_layout
from ijckd_jax.runtime import config_utils
from ijckd_jax.runtime import disk
from ijckd_jax.runtime import workers

# Small enough to share among processes, few enough to be open all at once.
SHARD_BYTES = 64 * 2**20
MAX_SHARDS = 512
NOTES = 'notes'

Examples = Sequence[image_layout.Example]


def features(class_names: Sequence[str]):
  """Returns tfds's features of the data set; no label without classes."""
  import tensorflow_datasets as tfds

  found = {'image': tfds.features.Image()}  # In its own encoding.
  if class_names:
    found['label'] = tfds.features.ClassLabel(names=class_names)
  found['file_name'] = tfds.features.Text()
  return tfds.features.FeaturesDict(found)


def template(folder: pathlib.Path, name: str, split: str):
  """Returns how tfds calls the files of a split."""
  import tensorflow_datasets as tfds

  return tfds.core.ShardedFileTemplate(
    data_dir=folder,
    dataset_name=name,
    split=split,
    filetype_suffix='array_record',
  )


def divide(
  folder: pathlib.Path, name: str, split: str, examples: Examples
) -> dict[pathlib.Path, Examples]:
  """Returns what each file of a split is to hold.

  Shuffled, always alike, so that a part of it (tfds's `train[:10%]`) is a
  sample of all.
  """
  num_bytes = sum(example.num_bytes for example in examples)
  count = min(
    max(math.ceil(num_bytes / SHARD_BYTES), 1), MAX_SHARDS, len(examples)
  )
  order = np.random.RandomState(0).permutation(len(examples))
  return {
    pathlib.Path(path): [examples[i] for i in order[index::count]]
    for index, path in enumerate(
      template(folder, name, split).sharded_filepaths(count)
    )
  }


def notes(shard: pathlib.Path) -> Mapping[str, Any] | None:
  """Returns what is noted of a shard, or None where it is not complete."""
  try:
    found = disk.read_json(_notes_path(shard))
    return found if shard.stat().st_size == found['file_bytes'] else None
  except (OSError, ValueError):
    return None


def _notes_path(shard):
  return shard.parent / NOTES / f'{shard.name}.json'


@dataclasses.dataclass(frozen=True)
class Writer:
  """Writes shards, in whatever process.

  Attributes:
    source: the folder of the pictures.
    class_names: as `features` takes them.
  """

  source: pathlib.Path
  class_names: Sequence[str]

  def write(
    self,
    shard: pathlib.Path,
    examples: Examples,
    report: Callable[[int], object],
  ) -> None:
    """Writes a shard and its notes.

    Args:
      shard: the file; its folder has one for notes.
      examples: what it is to hold.
      report: called with 1 for each of them.

    Raises:
      OSError: it cannot be written.
    """
    import tensorflow_datasets as tfds

    feature = features(self.class_names)
    serializer = tfds.core.example_serializer.ExampleSerializer(
      feature.get_serialized_info()
    )
    partial = shard.with_name(f'{shard.name}.partial')
    outcomes, num_bytes = [], 0
    with _array_record(partial) as write:
      for example in examples:
        report(1)
        try:
          data, outcome = self._read(example)
        except (OSError, image_files.Unreadable) as error:
          reason = getattr(error, 'strerror', None) or str(error)
          outcomes.append({'skipped': reason})
          continue
        fields = {'image': data, 'file_name': os.fsencode(example.path)}
        if self.class_names:
          fields['label'] = example.label
        record = serializer.serialize_example(feature.encode_example(fields))
        write(record)
        num_bytes += len(record)
        outcomes.append(outcome)
    with partial.open('rb+') as file:
      os.fsync(file)
    partial.rename(shard)
    content = {
      'file_bytes': shard.stat().st_size,
      'num_bytes': num_bytes,
      'outcomes': outcomes,
    }
    disk.write_text(_notes_path(shard), json.dumps(content))

  def _read(self, example):
    """Returns what to store of a picture, and what to note of it."""
    data = image_files.load(self.source / example.path)
    picture = image_files.read(data)
    return picture.data, {
      'sha256': hashlib.sha256(data).hexdigest(),
      'format': picture.format,
      'size': picture.size,
      'change': picture.change,
      'warning': picture.warning,
    }


@contextlib.contextmanager
def _array_record(path):
  """Gives a function that writes a record; full disks raise OSError."""
  from array_record.python import array_record_module

  try:
    writer = array_record_module.ArrayRecordWriter(str(path), 'group_size:1')
    yield writer.write
    writer.close()
  except RuntimeError as error:
    raise OSError(str(error)) from error


def write(
  writer: Writer,
  shards: Mapping[pathlib.Path, Examples],
  num_workers: int,
  report: Callable[[int], object],
) -> None:
  """Writes shards.

  Args:
    writer: how.
    shards: what each of them is to hold.
    num_workers: processes to share them; 1 is this one.
    report: called with 1 for each picture, in this process.

  Raises:
    OSError: one cannot be written, or a process was killed.
  """
  if num_workers > 1:
    _share(writer, list(shards.items()), num_workers, report)
  else:
    for shard, examples in shards.items():
      writer.write(shard, examples, report)


def _share(writer, shards, num_workers, report):
  """Lets processes write the shards, each a part of them."""
  workers.check_start()
  context = multiprocessing.get_context('spawn')
  processes = {}
  try:
    # Ctrl-C reaches every process of a terminal, but this one ends the others.
    # The tracker would unblock it, where it began with the first of them.
    resource_tracker.ensure_running()
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
      for index in range(num_workers):
        reader, sender = context.Pipe(duplex=False)
        process = context.Process(
          target=_work,
          args=(writer, shards[index::num_workers], sender),
          name=f'ijckd shards {index}',
          daemon=True,
        )
        process.start()
        sender.close()
        processes[reader] = process
    finally:
      signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    running = dict(processes)
    while running:
      for reader in connection.wait(list(running)):
        try:
          message = reader.recv()
        except EOFError:
          message = None
        if message is None:
          _check_end(running.pop(reader))
          continue
        if isinstance(message, OSError):
          raise message
        report(message)
  finally:
    for process in processes.values():
      process.terminate()
      process.join()


def _check_end(process):
  process.join()
  if process.exitcode:
    raise workers.ended(process.exitcode)


def _work(writer, shards, sender):
  """Writes shards, and sends what `report` is called with, or an OSError."""
  # The pipe breaks when the process that waits for it has gone.
  with contextlib.suppress(BrokenPipeError):
    try:
      for shard, examples in shards:
        writer.write(shard, examples, sender.send)
    except OSError as error:
      sender.send(error)
    except Exception as error:
      if cause := config_utils.cause_outside(error):
        sender.send(OSError(cause))
      else:
        raise
