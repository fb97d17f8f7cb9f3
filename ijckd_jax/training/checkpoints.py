"""Checkpoints of a run: the last few and the best, verified, by Orbax.

Orbax writes them. Which to keep is decided here and not by its manager, because
an old one may go only once a new one is on the disk and was not damaged.
"""

from collections.abc import Callable
from concurrent import futures
import json
import logging
import pathlib
import re
from typing import Any
import zlib

from etils import epath
from flax import serialization
from flax import traverse_util
import jax
import numpy as np
import orbax.checkpoint as ocp

from ijckd_jax.runtime import config_utils
from ijckd_jax.runtime import disk
from ijckd_jax.runtime import hosts

# 1 went through the examples in another order; 2 kept scores apart, and its
# memo without a checksum.
FORMAT_VERSION = 3
DAMAGED = 'damaged'  # The folder of those set aside.
# What a process leaves that was killed as it saved, or removed an old one.
LEFT_OVER = re.compile(r'\d+\.orbax-checkpoint-tmp.*|\.\d+\.removed')
ADVICE = 'start anew with --overwrite, or put back a sound one'

logger = logging.getLogger('ijckd_jax')


class DamagedError(Exception):
  """A checkpoint is not what was saved."""


class Checkpoints:
  """The checkpoints of one run, saved in the background.

  A checkpoint holds a state of arrays, the score that ranks it, and what the
  loop wants to remember, all with checksums. A step's folder appears whole; a
  damaged one is set aside, in the folder `damaged`, and never deleted.

  Every process calls this alike; process 0 alone reads and writes.
  """

  def __init__(self, directory: epath.PathLike, *, keep: int):
    """Opens the folder, which need not be there yet.

    Args:
      directory: of the checkpoints.
      keep: how many of the last ones to keep; the best is kept beside them.

    Raises:
      config_utils.UserError: a checkpoint is of another format.
      OSError: the folder cannot be written.
    """
    self._directory = epath.Path(directory).resolve()
    self._keep = keep
    self._thread = futures.ThreadPoolExecutor(1)
    self._saving = None
    self._orbax = _alone()
    self._scores = hosts.share(self._find)

  def _find(self) -> dict[int, float | None]:
    """Returns the score of each checkpoint; damaged ones are set aside."""
    self._directory.mkdir(parents=True, exist_ok=True)
    scores = {}
    for path in list(self._directory.iterdir()):
      if path.name.isdecimal():
        step = int(path.name)
        try:
          scores[step] = self._content(step)['score']
        except DamagedError as error:
          self._set_aside(step, error)
      elif LEFT_OVER.fullmatch(path.name):
        path.rmtree()
    return scores

  @property
  def best_step(self) -> int | None:
    """The step of the best score, of equals the last; None without a score."""
    scored = [
      (score, step) for step, score in self._scores.items() if score is not None
    ]
    return max(scored)[1] if scored else None

  def save(
    self, step: int, state: Any, *, score: float | None, memo: dict[str, Any]
  ) -> None:
    """Starts to write a checkpoint, once the one before is on the disk.

    Args:
      step: of the state; a step that is there already is left as it is.
      state: flax.struct dataclass of arrays on the host, not to be changed.
      score: what ranks it, higher is better; None where it was not evaluated.
      memo: JSON to be had back by `restore`.

    Raises:
      OSError: the one before could not be written, over many tries.
    """
    self.wait()
    if step in self._scores:
      return
    self._scores[step] = score
    old = self._drop_old()
    if not hosts.is_primary():
      return
    tree = serialization.to_state_dict(state)
    content = {
      'score': score,
      'memo': memo,
      'arrays': {
        name: [*_kind(array), _checksum(array)]
        for name, array in _arrays(tree).items()
      },
    }
    self._saving = self._thread.submit(self._write, step, tree, content, old)

  def _write(self, step, tree, content: dict[str, Any], old: set[int]) -> None:
    """Writes a checkpoint, and then removes old ones."""
    text = json.dumps(content)
    metadata = {
      'format_version': FORMAT_VERSION,
      'content': text,
      'checksum': zlib.crc32(text.encode()),
    }

    def write():
      if not self._directory.exists():
        # Orbax would make it anew, it may be below what is no longer mounted.
        raise FileNotFoundError(f'{self._directory} is no longer there')
      try:
        self._orbax.save(
          self._directory / str(step),
          args=ocp.args.PyTreeSave(tree),
          custom_metadata=metadata,
          force=True,  # Over what a failed try has left, if anything.
        )
      except ValueError as error:  # TensorStore's, for full disks.
        raise OSError(config_utils.short(error)) from error
      self._sync(step)

    disk.retry(write, f'the checkpoint of step {step}')
    self._remove_all(old)

  def _drop_old(self) -> set[int]:
    """Forgets the checkpoints that are not to be kept; returns their steps."""
    kept = {*sorted(self._scores)[-self._keep :], self.best_step}
    old = self._scores.keys() - kept
    for step in old:
      del self._scores[step]
    return old

  def _remove_all(self, steps: set[int]) -> None:
    for other in steps:
      disk.retry(
        lambda other=other: self._remove(other),
        f'the removal of the checkpoint of step {other}',
      )

  def _sync(self, step: int) -> None:
    """Waits until a checkpoint is on the disk; Orbax waits for its arrays."""
    path = self._directory / str(step)
    if not disk.is_remote(path):
      for part in (*pathlib.Path(path).rglob('*'), path, self._directory):
        disk.sync(part)

  def _remove(self, step: int) -> None:
    """Removes a checkpoint; a part of one is never taken for one."""
    path = self._directory / str(step)
    if not path.exists():
      return
    if not disk.is_remote(path):
      path = path.rename(path.with_name(f'.{step}.removed'))
    path.rmtree()

  def restore(self, step: int, like: Any) -> tuple[Any, dict[str, Any]]:
    """Returns a checkpoint's state, on the host, and its memo.

    Args:
      step: one that there is.
      like: a state with the same structure, of arrays or their shapes.

    Raises:
      config_utils.UserError: it does not fit `like`.
      DamagedError: it is not what was saved.
    """
    content = self._content(step)
    tree = serialization.to_state_dict(like)
    wanted = {name: _kind(array) for name, array in _arrays(tree).items()}
    saved = {name: tuple(x[:2]) for name, x in content['arrays'].items()}
    for name in sorted(wanted.keys() | saved.keys()):
      if wanted.get(name) != saved.get(name):
        raise config_utils.UserError(
          f'the checkpoint of step {step} in {self._directory} does not fit: '
          f'{name} is {saved.get(name)} there, and {wanted.get(name)} in this '
          'run; take the code, and the settings of JAX such as '
          'JAX_ENABLE_X64, that have written it'
        )
    abstract = jax.tree.map(lambda x: np.empty(x.shape, x.dtype), tree)
    try:
      tree = self._orbax.restore(
        self._directory / str(step), args=ocp.args.PyTreeRestore(abstract)
      )
    except Exception as error:  # Whatever Orbax raises on damaged files.
      config_utils.raise_outside(error)
      raise DamagedError(config_utils.short(error)) from error
    for name, array in _arrays(tree).items():
      if _checksum(array) != content['arrays'][name][2]:
        raise DamagedError(f'{name} is not what was saved')
    return serialization.from_state_dict(like, tree), content['memo']

  def restore_newest(self, like: Any) -> tuple[Any, dict[str, Any]] | None:
    """Returns the newest sound checkpoint's state and memo; None if none is.

    Damaged ones that are newer are set aside. Old ones are removed that a
    process had still to remove when it was killed.

    Args:
      like: see `restore`.

    Raises:
      config_utils.UserError: there is one, but it does not fit; or there were
        some, and none can be used.
    """
    found = self._restore_first(lambda step: step, like)
    old = self._drop_old()
    hosts.share(lambda: self._remove_all(old))
    return found

  def restore_best(self, like: Any) -> tuple[Any, dict[str, Any]]:
    """Returns the best sound checkpoint's, as `restore_newest` does."""

    def rank(step):
      score = self._scores[step]
      return score is not None, score, step

    return self._restore_first(rank, like)

  def _restore_first(self, rank: Callable[[int], Any], like: Any):
    """Returns what the first sound one holds, by falling rank."""
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), like)
    found, self._scores = hosts.share(lambda: self._first_sound(rank, like))
    return found

  def _first_sound(self, rank, like):
    """Returns what `_restore_first` does, and what scores there still are."""
    for step in sorted(self._scores, key=rank, reverse=True):
      try:
        return self.restore(step, like), self._scores
      except DamagedError as error:
        del self._scores[step]
        self._set_aside(step, error)
    aside = self._directory / DAMAGED
    if aside.exists():
      raise config_utils.UserError(
        f'no checkpoint in {self._directory} can be used; the damaged ones are '
        f'in {aside}: {ADVICE}'
      )
    return None, self._scores

  def _set_aside(self, step: int, error: DamagedError) -> None:
    """Moves a damaged checkpoint out of the way, and says so."""
    aside = self._directory / DAMAGED
    aside.mkdir(exist_ok=True)
    number, place = 0, aside / str(step)
    while place.exists():
      number += 1
      place = aside / f'{step}.{number}'
    (self._directory / str(step)).rename(place)
    logger.warning(
      '%s: the checkpoint of step %d is damaged (%s); it is set aside in %s',
      self._directory,
      step,
      error,
      place,
    )

  def _content(self, step: int) -> dict[str, Any]:
    """Returns what a checkpoint holds beside arrays.

    Raises:
      config_utils.UserError: it is of another format.
      DamagedError: it is not what was saved.
    """
    try:
      path = self._directory / str(step)
      metadata = self._orbax.metadata(path).custom_metadata
      version = metadata['format_version']
      if version == FORMAT_VERSION:
        text = metadata['content']
        if zlib.crc32(text.encode()) != metadata['checksum']:
          raise ValueError('its metadata are not what was saved')
        return json.loads(text)
    except Exception as error:  # Whatever Orbax raises on damaged files.
      config_utils.raise_outside(error)
      raise DamagedError(config_utils.short(error)) from error
    raise config_utils.UserError(
      f'the checkpoint of step {step} in {self._directory} has format '
      f'{config_utils.short(version)}; this version of ijckd_jax reads '
      f'{FORMAT_VERSION}: take the version that has written it'
    )

  def wait(self) -> None:
    """Returns when everything is on the disk.

    Raises:
      OSError: something could not be written, over many tries.
    """
    hosts.share(self._wait)

  def _wait(self) -> None:
    if self._saving is not None:
      saving, self._saving = self._saving, None
      saving.result()

  def close(self) -> None:
    """Waits, for this process alone, and frees what was held.

    Raises:
      OSError: something could not be written, over many tries.
    """
    try:
      self._wait()
    finally:
      self._thread.shutdown()
      self._orbax.close()


def _alone() -> ocp.Checkpointer:
  """Returns Orbax's part, which does not wait for other processes.

  Orbax's v1 API does, in its save, whatever its options say.
  """
  process = jax.process_index()
  options = ocp.options.MultiprocessingOptions(
    primary_host=process,
    active_processes={process},
    barrier_sync_key_prefix=f'process_{process}',
  )
  handler = ocp.PyTreeCheckpointHandler(multiprocessing_options=options)
  return ocp.Checkpointer(handler, multiprocessing_options=options)


def _arrays(tree: Any) -> dict[str, Any]:
  """Returns the arrays of a state's dictionary by name."""
  flat = traverse_util.flatten_dict(tree, sep='/')
  return {name: value for name, value in flat.items() if value is not None}


def _kind(array: Any) -> tuple[str, str]:
  """Returns an array's dtype and shape."""
  return np.dtype(array.dtype).name, str(list(array.shape))


def _checksum(array: Any) -> int:
  """Returns the CRC-32 of an array; Orbax does not verify what it reads."""
  return zlib.crc32(np.ascontiguousarray(array))
