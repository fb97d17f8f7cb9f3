"""Stretches of a training stream in ArrayRecord files, one record a row.

A file's name says which positions of the stream it covers and whose rows of
each batch it holds, so the names alone show whether anything is missing. Its
last record holds the keys of the records before it. A file is there once it is
complete; what is read from it, ArrayRecord checks by hashes.
"""

from collections.abc import Sequence
import contextlib
import dataclasses
import itertools
import re

from etils import epath
import numpy as np

from ijckd_jax.runtime import config_utils

MAX_BYTES = 256 * 2**20  # A file is closed once it is this large.
PATTERN = re.compile(r'(\d{12})-(\d{12})\.(\d{5})-of-(\d{5})\.array_record')


@dataclasses.dataclass(frozen=True, order=True)
class File:
  """One process's rows of a stretch of the stream.

  Attributes:
    start: the stretch's first position.
    end: the position behind it.
    num_processes: how many wrote it, each its own rows to its own file.
    process: whose rows these are.
  """

  start: int
  end: int
  num_processes: int
  process: int

  @property
  def name(self) -> str:
    """The name of the file."""
    return (
      f'{self.start:012d}-{self.end:012d}.'
      f'{self.process:05d}-of-{self.num_processes:05d}.array_record'
    )


def find(directory: epath.Path) -> list[File]:
  """Returns the files of a folder, in the stream's order."""
  if not directory.exists():
    return []
  names = (PATTERN.fullmatch(path.name) for path in directory.iterdir())
  return sorted(
    File(int(name[1]), int(name[2]), int(name[4]), int(name[3]))
    for name in names
    if name
  )


def covered(files: Sequence[File]) -> int:
  """Returns the position of the stream before which nothing is missing."""
  position = 0
  for (start, end, count), group in itertools.groupby(
    files, key=lambda file: (file.start, file.end, file.num_processes)
  ):
    if start != position or len(list(group)) != count:
      break
    position = end
  return position


def gap(files: Sequence[File], end: int) -> str:
  """Names what is missing first, before the position `end`."""
  position = covered(files)
  there = {file for file in files if file.start == position}
  if there:
    one = min(there)
    wanted = [
      dataclasses.replace(one, process=process)
      for process in range(one.num_processes)
    ]
    return ', '.join(file.name for file in wanted if file not in there)
  end = min([end, *(file.start for file in files if file.start > position)])
  return f'the outputs of images {position} to {end} of the training stream'


class Writer:
  """Writes one process's files, one after the other."""

  def __init__(self, directory: epath.Path, process: int, num_processes: int):
    """Takes the folder, which must be there, and which process this is."""
    self._directory = directory
    self._partial = directory / f'.{process:05d}.partial'
    self._process = process
    self._num_processes = num_processes
    self._writer, self._keys, self._num_bytes = None, [], 0
    self._start = self._end = 0

  def write(
    self, start: int, end: int, keys: np.ndarray, records: np.ndarray
  ) -> None:
    """Adds this process's rows of a stretch.

    Args:
      start: the stretch's first position.
      end: the position behind it.
      keys: (b,) int64, by which the rows are found again.
      records: (b, bytes) uint8.

    Raises:
      OSError: the disk is full.
    """
    from array_record.python import array_record_module

    with _naming_full_disks():
      if self._writer is None:
        self._start = start
        self._writer = array_record_module.ArrayRecordWriter(
          str(self._partial), 'group_size:1,uncompressed'
        )
      for record in records:
        self._writer.write(record.tobytes())
    self._end = end
    self._keys.append(keys)
    self._num_bytes += records.nbytes
    if self._num_bytes >= MAX_BYTES:
      self.close()

  def close(self) -> None:
    """Completes the file, if one is begun; the next rows begin another."""
    if self._writer is None:
      return
    with _naming_full_disks():
      self._writer.write(np.concatenate(self._keys).tobytes())
      self._writer.close()
    file = File(self._start, self._end, self._num_processes, self._process)
    self._partial.rename(self._directory / file.name)
    self._writer, self._keys, self._num_bytes = None, [], 0


class Reader:
  """Reads records by their keys, out of many files."""

  def __init__(self, directory: epath.Path, size: int):
    """Opens the files of a folder.

    Args:
      directory: of the files.
      size: how many records there must be, with keys from 0 on.

    Raises:
      config_utils.UserError: something is missing or damaged.
    """
    from array_record.python import array_record_module

    self._arguments = directory, size
    files = find(directory)
    if covered(files) != size:
      raise config_utils.UserError(f'{directory} lacks {gap(files, size)}')
    self._location = np.full(size, -1)
    self._readers, starts, total = [], [], 0
    for path in (directory / file.name for file in files):
      with _naming_damage(path):
        reader = array_record_module.ArrayRecordReader(
          str(path), 'readahead_buffer_size:0'
        )
        count = reader.num_records() - 1
        keys = np.frombuffer(reader.read([count])[0], np.int64)
        if len(keys) != count:
          raise ValueError(f'{count} records for {len(keys)} keys')
        self._location[keys] = total + np.arange(count)
      self._readers.append((path, reader))
      starts.append(total)
      total += count
    self._starts = np.array(starts)
    if total != size or self._location.min() < 0:
      raise config_utils.UserError(
        f'{directory} holds {total} records where there must be {size}, one '
        'for each view: its files do not belong together; remove the folder '
        'and fill it again'
      )

  def __reduce__(self):
    # Open files cannot cross to processes that decode: they open them anew.
    return type(self), self._arguments

  def read(self, keys: np.ndarray, record_bytes: int) -> np.ndarray:
    """Returns the records (b, record_bytes) uint8 of keys (b,).

    Raises:
      config_utils.UserError: a file is damaged.
    """
    where = self._location[keys]
    of_file = np.searchsorted(self._starts, where, side='right') - 1
    records = np.empty((len(keys), record_bytes), np.uint8)
    for number in np.unique(of_file):
      rows = np.flatnonzero(of_file == number)
      path, reader = self._readers[number]
      with _naming_damage(path):
        found = reader.read((where[rows] - self._starts[number]).tolist())
        for row, record in zip(rows, found, strict=True):
          records[row] = np.frombuffer(record, np.uint8)
    return records


@contextlib.contextmanager
def _naming_full_disks():
  """Turns ArrayRecord's errors of writing into OSError."""
  try:
    yield
  except RuntimeError as error:
    raise OSError(
      f'teacher outputs could not be written: {config_utils.short(error)}'
    ) from error


@contextlib.contextmanager
def _naming_damage(path: epath.Path):
  """Turns whatever ArrayRecord raises on damaged files into one line."""
  try:
    yield
  except Exception as error:
    config_utils.raise_outside(error)
    raise config_utils.UserError(
      f'{path} is damaged ({config_utils.short(error)}): put a sound copy in '
      'its place, or remove the folder and fill it again with --overwrite'
    ) from error
