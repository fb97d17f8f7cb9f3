"""A teacher's outputs on the disk: one record for each view of each image.

A store is a folder. `manifest.json` says whose outputs it holds and how they
are laid out; ArrayRecord files hold them, each a stretch of the training
stream. A file's name tells which positions it covers and which process's rows
of them it has, so the names alone show whether anything is missing; its last
record tells the (view, image) of the records before it. Files come into being
when they are complete, and ArrayRecord checks what it reads by hashes.
"""

from collections.abc import Mapping
from collections.abc import Sequence
import contextlib
import dataclasses
import itertools
import json
import math
import re
import shutil
from typing import Any

from array_record.python import array_record_module
from etils import epath
import numpy as np

from ijckd_jax import config_utils
from ijckd_jax import workdirs

FORMAT_VERSION = 1
MANIFEST = 'manifest.json'
FILE_BYTES = 256 * 2**20  # A file is closed once it is this large.
GIB = 2**30
NAME = re.compile(r'(\d{12})-(\d{12})\.(\d{5})-of-(\d{5})\.array_record')


@dataclasses.dataclass(frozen=True)
class Layout:
  """What a store holds, and how a record is cut into arrays.

  Attributes:
    num_examples: N images.
    views: M of each.
    dtype: of what is stored.
    leaves: shape by name, without the rows; in the order of a record.
  """

  num_examples: int
  views: int
  dtype: np.dtype
  leaves: Mapping[str, Sequence[int]]

  @property
  def size(self) -> int:
    """How many records there are."""
    return self.views * self.num_examples

  @property
  def record_bytes(self) -> int:
    """Bytes of a record."""
    return self.dtype.itemsize * sum(map(math.prod, self.leaves.values()))

  @property
  def num_bytes(self) -> int:
    """Bytes of all records."""
    return self.size * self.record_bytes

  def pack(self, arrays: Mapping[str, np.ndarray]) -> np.ndarray:
    """Returns the records (b, record_bytes) uint8 of rows by name."""
    parts = [
      np.ascontiguousarray(arrays[name]).reshape(len(arrays[name]), -1)
      for name in self.leaves
    ]
    return np.concatenate([part.view(np.uint8) for part in parts], axis=1)

  def unpack(self, records: np.ndarray) -> dict[str, np.ndarray]:
    """Returns the rows by name, as `pack` takes them."""
    sizes = [
      self.dtype.itemsize * math.prod(shape) for shape in self.leaves.values()
    ]
    parts = np.split(records, np.cumsum(sizes)[:-1], axis=1)
    return {
      name: np.ascontiguousarray(part).view(self.dtype).reshape(-1, *shape)
      for (name, shape), part in zip(self.leaves.items(), parts, strict=True)
    }


@dataclasses.dataclass(frozen=True)
class _File:
  """A complete file, as its name describes it."""

  path: epath.Path
  start: int
  end: int
  process: int
  num_processes: int


def _name(start, end, process, num_processes) -> str:
  return (
    f'{start:012d}-{end:012d}.{process:05d}-of-{num_processes:05d}.array_record'
  )


class Store:
  """The outputs of one teacher on fixed views of one data set.

  Use: `check`, then `open`. An incomplete store is then written, process by
  process, by `write` and `close_file`; once complete, `load` and `read`.
  """

  def __init__(
    self,
    directory: epath.PathLike,
    layout: Layout,
    identity: Mapping[str, Any],
    *,
    owner: str,
    process: int = 0,
    num_processes: int = 1,
  ):
    """Describes a store that need not be there yet; nothing is touched.

    Args:
      directory: of the store.
      layout: what is wanted of it.
      identity: JSON on which the outputs depend, beside the layout.
      owner: the run that fills it, where others may find it meanwhile.
      process: which process this is; it writes its own rows, and reads all.
      num_processes: how many there are.
    """
    self.directory = epath.Path(directory)
    self.layout = layout
    self._process = process
    self._num_processes = num_processes
    self._manifest = {
      'format_version': FORMAT_VERSION,
      **identity,
      'num_examples': layout.num_examples,
      'views': layout.views,
      'dtype': layout.dtype.name,
      'leaves': {name: list(shape) for name, shape in layout.leaves.items()},
      'owner': owner,
    }
    self._writer, self._keys, self._first = None, [], 0
    self._readers, self._starts, self._location = [], None, None
    self._stored = layout

  @property
  def complete(self) -> bool:
    """Whether all views of all images are there."""
    return _covered(self._files()) == self.layout.size

  def check(self, *, ignore: Sequence[str] = ()) -> Layout:
    """Returns what the store holds, or will hold where it is not there yet.

    Args:
      ignore: fields of the identity that are not known yet.

    Raises:
      config_utils.UserError: the folder holds another store, or something else.
    """
    path = self.directory / MANIFEST
    if not path.exists():
      if self.directory.exists() and self._paths():
        raise config_utils.UserError(
          f'{self.directory} is not empty, and no store of teacher outputs: '
          'take another teacher.store.directory'
        )
      return self.layout
    try:
      old = workdirs.read_json(path)
      stored = {name: tuple(old['leaves'][name]) for name in old['leaves']}
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
      raise config_utils.UserError(
        f'{path} is damaged ({config_utils.short(error)}): remove the folder, '
        'or take another teacher.store.directory'
      ) from error
    new = dict(self._manifest)
    if self.complete or self.directory.resolve().is_relative_to(new['owner']):
      # In a run's own folder it is the run's, also where that was moved.
      ignore = (*ignore, 'owner')
    if self.complete:
      # What others have stored beside is no harm.
      wanted = new['leaves'].items()
      if all(old['leaves'].get(name) == shape for name, shape in wanted):
        ignore = (*ignore, 'leaves')
    changes = config_utils.differences(
      *({k: v for k, v in d.items() if k not in ignore} for d in (old, new))
    )
    if changes and all(line.startswith('owner:') for line in changes):
      raise config_utils.UserError(
        f'{self.directory} is being filled by the run in {old["owner"]}: let '
        'that go on until it is full, or take another teacher.store.directory'
      )
    if changes:
      raise config_utils.UserError(
        f'{self.directory} holds other teacher outputs ({"; ".join(changes)}): '
        'take another teacher.store.directory, or remove that one'
      )
    return dataclasses.replace(self.layout, leaves=stored)

  def check_size(self, limit: float) -> None:
    """Raises UserError where it takes more GiB than the limit or the disk."""
    wanted = self.layout.num_bytes
    advice = (
      'take fewer teacher.store.views, dtype float16, or a method that needs '
      "no map (feature_site='pooled')"
    )
    size = (
      f'the stored teacher outputs would take {wanted / GIB:.3g} GiB '
      f'({self.layout.views} views of {self.layout.num_examples} images, '
      f'{self.layout.record_bytes} bytes each: {", ".join(self.layout.leaves)})'
    )
    if wanted > limit * GIB:
      raise config_utils.UserError(
        f'{size}, but teacher.store.limit_gib={limit:g}: {advice}, or raise it'
      )
    there = sum(file.path.stat().length for file in self._files())
    existing = self.directory
    while not existing.exists() and existing != existing.parent:
      existing = existing.parent
    free = shutil.disk_usage(existing).free
    if wanted - there > free:
      raise config_utils.UserError(
        f'{size}, but {existing} has {free / GIB:.3g} GiB left: {advice}, or '
        'another teacher.store.directory'
      )

  def open(self, covered: int) -> None:
    """Makes the folder ready to go on from a position of the stream.

    What lies beyond it in an incomplete store is removed: the run writes it
    again. One process does this, before the others `load` or `write`.

    Raises:
      config_utils.UserError: it is not this store, or lacks what was written
        before that position.
    """
    self.check()
    if self.complete:
      return
    try:
      self.directory.mkdir(parents=True, exist_ok=True)
      for partial in self.directory.glob('.*.partial'):
        partial.unlink()
      for file in self._files():
        if file.end > covered:
          file.path.unlink()
      files = self._files()
      wanted = min(covered, self.layout.size)
      if _covered(files) != wanted:
        raise config_utils.UserError(
          f'{self.directory} lacks {_gap(files, wanted)}, which the run has '
          'written before its last checkpoint: put it back, or start anew with '
          '--overwrite'
        )
      text = json.dumps(self._manifest, indent=2)
      workdirs.write_text(self.directory / MANIFEST, text + '\n')
    except OSError as error:
      raise config_utils.UserError(
        f'{self.directory} cannot be written: {error}'
      ) from error

  def write(
    self,
    start: int,
    end: int,
    indices: np.ndarray,
    epochs: np.ndarray,
    arrays: Mapping[str, np.ndarray],
  ) -> None:
    """Adds this process's rows of a batch; those past the last view are left.

    Args:
      start: position of the batch in the stream.
      end: position behind it.
      indices: (b,) of the images.
      epochs: (b,) of the rows.
      arrays: (b, ...) of the layout's dtype, by name.

    Raises:
      config_utils.UserError: a number is not finite.
      OSError: the disk is full.
    """
    for name in self.layout.leaves:
      if not np.isfinite(arrays[name]).all():
        raise config_utils.UserError(
          f"the teacher's {name} are not finite in {self.layout.dtype.name} "
          f'(images {start} to {end} of the stream): take '
          'teacher.store.dtype=bfloat16 or float32, whose range is larger'
        )
    wanted = epochs < self.layout.views
    end = min(end, self.layout.size)
    with _naming_full_disks():
      if self._writer is None:
        self._first = start
        self._writer = array_record_module.ArrayRecordWriter(
          str(self._partial), 'group_size:1,uncompressed'
        )
      for record in self.layout.pack(arrays)[wanted]:
        self._writer.write(record.tobytes())
    keys = epochs * np.int64(self.layout.num_examples) + indices
    self._keys.append(keys[wanted])
    self._end = end
    if len(keys) * len(self._keys) * self.layout.record_bytes >= FILE_BYTES:
      self.close_file()

  def close_file(self) -> None:
    """Completes the file that is being written, if there is one."""
    if self._writer is None:
      return
    with _naming_full_disks():
      self._writer.write(np.concatenate(self._keys).tobytes())
      self._writer.close()
    name = _name(self._first, self._end, self._process, self._num_processes)
    self._partial.rename(self.directory / name)
    self._writer, self._keys = None, []

  def load(self) -> None:
    """Opens a complete store for `read`.

    Raises:
      config_utils.UserError: something is missing or damaged.
    """
    self._stored = self.check()
    files = self._files()
    if _covered(files) != self.layout.size:
      raise config_utils.UserError(
        f'{self.directory} lacks {_gap(files, self.layout.size)}'
      )
    self._location = np.full(self.layout.size, -1)
    self._readers, starts, total = [], [], 0
    for file in files:
      with _naming_damage(file.path):
        reader = array_record_module.ArrayRecordReader(
          str(file.path), 'readahead_buffer_size:0'
        )
        count = reader.num_records() - 1
        keys = np.frombuffer(reader.read([count])[0], np.int64)
        if len(keys) != count:
          raise ValueError(f'{count} records for {len(keys)} images')
        self._location[keys] = total + np.arange(count)
      self._readers.append((file.path, reader))
      starts.append(total)
      total += count
    self._starts = np.array(starts)
    if total != self.layout.size or self._location.min() < 0:
      raise config_utils.UserError(
        f'{self.directory} holds {total} outputs where there must be '
        f'{self.layout.size}, one for each view: its files do not belong '
        'together; remove the folder and fill it again'
      )

  def read(
    self, indices: np.ndarray, epochs: np.ndarray
  ) -> dict[str, np.ndarray]:
    """Returns the stored rows (b, ...) by name.

    Args:
      indices: (b,) of the images.
      epochs: (b,): the view is the epoch modulo M.

    Raises:
      config_utils.UserError: a file is damaged.
    """
    layout = self.layout
    where = self._location[
      epochs % layout.views * layout.num_examples + indices
    ]
    of_file = np.searchsorted(self._starts, where, side='right') - 1
    records = np.empty((len(where), self._stored.record_bytes), np.uint8)
    for number in np.unique(of_file):
      rows = np.flatnonzero(of_file == number)
      path, reader = self._readers[number]
      with _naming_damage(path):
        found = reader.read((where[rows] - self._starts[number]).tolist())
        for row, record in zip(rows, found, strict=True):
          records[row] = np.frombuffer(record, np.uint8)
    arrays = self._stored.unpack(records)
    return {name: arrays[name] for name in layout.leaves}

  @property
  def _partial(self) -> epath.Path:
    return self.directory / f'.{self._process:05d}.partial'

  def _files(self) -> list[_File]:
    """Returns the complete files, in the stream's order."""
    if not self.directory.exists():
      return []
    names = ((path, NAME.fullmatch(path.name)) for path in self._paths())
    return sorted(
      (_File(path, *map(int, name.groups())) for path, name in names if name),
      key=lambda file: (
        file.start,
        file.end,
        file.num_processes,
        file.process,
      ),
    )

  def _paths(self):
    return sorted(self.directory.iterdir())


def _covered(files: Sequence[_File]) -> int:
  """Returns the position of the stream before which nothing is missing."""
  covered = 0
  for (start, end, count), group in itertools.groupby(
    files, key=lambda file: (file.start, file.end, file.num_processes)
  ):
    if start != covered or len(list(group)) != count:
      break
    covered = end
  return covered


def _gap(files: Sequence[_File], wanted: int) -> str:
  """Names what is missing first, before a position."""
  covered = _covered(files)
  group = [file for file in files if file.start == covered]
  if group:
    there = {file.process for file in group}
    _, start, end, _, count = dataclasses.astuple(group[0])
    missing = [_name(start, end, n, count) for n in range(count)]
    return ', '.join(name for n, name in enumerate(missing) if n not in there)
  end = min([wanted, *(file.start for file in files if file.start > covered)])
  return f'the outputs of images {covered} to {end} of the training stream'


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
    raise config_utils.UserError(
      f'{path} is damaged ({config_utils.short(error)}): put a sound copy in '
      'its place, or remove the folder and fill it again with --overwrite'
    ) from error
