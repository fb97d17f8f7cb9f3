"""A teacher's outputs on the disk: one record for each view of each image.

A store is a folder: `manifest.json` says whose outputs it holds and how a
record is cut into arrays, output_files hold them. It is filled as a run passes
the first M epochs, and read from then on, by other runs as well.
"""

from collections.abc import Mapping
from collections.abc import Sequence
import dataclasses
import json
import math
import shutil
from typing import Any

from etils import epath
import numpy as np

from ijckd_jax.runtime import config_utils
from ijckd_jax.runtime import disk
from ijckd_jax.training import output_files

FORMAT_VERSION = 1
MANIFEST = 'manifest.json'
GIB = 2**30


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
    self._manifest = {
      'format_version': FORMAT_VERSION,
      **identity,
      'num_examples': layout.num_examples,
      'views': layout.views,
      'dtype': layout.dtype.name,
      'leaves': {name: list(shape) for name, shape in layout.leaves.items()},
      'owner': owner,
    }
    self._writer = output_files.Writer(self.directory, process, num_processes)
    self._reader, self._stored = None, layout

  @property
  def complete(self) -> bool:
    """Whether all views of all images are there."""
    files = output_files.find(self.directory)
    return output_files.covered(files) == self.layout.size

  @property
  def is_own(self) -> bool:
    """Whether it is this run that fills it, or has filled it."""
    owner = self._manifest['owner']
    # A run's folder may have been moved: a store inside is still that run's.
    if self.directory.resolve().is_relative_to(owner):
      return True
    return disk.read_json(self.directory / MANIFEST)['owner'] == owner

  def check(self, *, ignore: Sequence[str] = ()) -> Layout:
    """Returns what the store holds, or will hold where it is not there yet.

    Args:
      ignore: fields of the identity that are not known yet.

    Raises:
      config_utils.UserError: the folder holds another store, or something else.
    """
    path = self.directory / MANIFEST
    if not path.exists():
      # What was left by a process killed is hidden.
      if any(self.directory.glob('[!.]*')):
        raise config_utils.UserError(
          f'{self.directory} is not empty, and no store of teacher outputs: '
          'take another teacher.store.directory'
        )
      return self.layout
    try:
      old = disk.read_json(path)
      stored = {name: tuple(old['leaves'][name]) for name in old['leaves']}
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
      raise config_utils.UserError(
        f'{path} is damaged ({config_utils.short(error)}): remove the folder, '
        'or take another teacher.store.directory'
      ) from error
    new = dict(self._manifest)
    if self.complete or self.directory.resolve().is_relative_to(new['owner']):
      # A run's folder may have been moved: see `is_own`.
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
    there = sum(
      (self.directory / file.name).stat().length
      for file in output_files.find(self.directory)
    )
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
    files = output_files.find(self.directory)
    kept = [file for file in files if file.end <= covered]
    wanted = min(covered, self.layout.size)
    if output_files.covered(kept) != wanted:
      raise config_utils.UserError(
        f'{self.directory} lacks {output_files.gap(kept, wanted)}, which the '
        'run has written before its last checkpoint: put it back, or start '
        'anew with --overwrite'
      )
    try:
      self.directory.mkdir(parents=True, exist_ok=True)
      for path in self.directory.glob('.*.partial'):
        path.unlink()
      for file in set(files) - set(kept):
        (self.directory / file.name).unlink()
      text = json.dumps(self._manifest, indent=2)
      disk.write_text(self.directory / MANIFEST, text + '\n')
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
    self._writer.write(
      start,
      min(end, self.layout.size),
      self._key(indices, epochs)[wanted],
      self.layout.pack(arrays)[wanted],
    )

  def close_file(self) -> None:
    """Completes the file that is being written, if there is one."""
    self._writer.close()

  def load(self) -> None:
    """Opens a complete store for `read`.

    Raises:
      config_utils.UserError: it is another, or something is missing or damaged.
    """
    self._stored = self.check()
    self._reader = output_files.Reader(self.directory, self.layout.size)

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
    records = self._reader.read(
      self._key(indices, epochs), self._stored.record_bytes
    )
    arrays = self._stored.unpack(records)
    return {name: arrays[name] for name in self.layout.leaves}

  def _key(self, indices: np.ndarray, epochs: np.ndarray) -> np.ndarray:
    """Returns the keys (b,) int64 of the views that epochs show of images."""
    views = (epochs % self.layout.views).astype(np.int64)
    return views * self.layout.num_examples + indices
