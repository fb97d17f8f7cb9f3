"""Checkpoints of a run: the last few and the best, verified, by Orbax."""

import contextlib
from typing import Any
import zlib

from etils import epath
from flax import serialization
from flax import traverse_util
import jax
import numpy as np
from orbax.checkpoint import v1 as ocp

from ijckd_jax import config_utils

FORMAT_VERSION = 2  # 1 went through the examples in another order.
ADVICE = 'remove its folder to continue from the one before'


class Checkpoints:
  """The checkpoints of one run, saved in the background.

  A checkpoint holds a state of arrays, the score that ranks it, and a small
  JSON: format version, checksums, and what the loop wants to remember.
  """

  def __init__(
    self,
    directory: epath.PathLike,
    *,
    keep: int,
    sharding: jax.sharding.Sharding,
  ):
    """Opens the folder, which need not be there yet.

    Args:
      directory: of the checkpoints.
      keep: how many of the last ones to keep; the best is kept beside them.
      sharding: where restored arrays are put.
    """
    training = ocp.training
    best = training.preservation_policies.BestN(
      get_metric_fn=lambda metrics: metrics['score'],
      n=1,
      keep_checkpoints_without_metrics=False,
    )
    last = training.preservation_policies.LatestN(keep)
    self._directory = epath.Path(directory).resolve()
    self._sharding = sharding
    with self._naming_damage('the checkpoints'):
      self._orbax = training.Checkpointer(
        self._directory,
        save_decision_policy=(
          training.save_decision_policies.FixedIntervalPolicy(1)
        ),
        preservation_policy=(
          training.preservation_policies.AnyPreservationPolicy([last, best])
        ),
      )

  @property
  def last_step(self) -> int | None:
    """The step of the newest checkpoint; None where there is none."""
    latest = self._orbax.latest
    return None if latest is None else latest.step

  @property
  def best_step(self) -> int | None:
    """The step of the best score, of equals the last; None without a score."""
    scored = [
      (checkpoint.metrics['score'], checkpoint.step)
      for checkpoint in self._orbax.checkpoints
      if checkpoint.metrics
    ]
    return max(scored)[1] if scored else None

  def save(
    self, step: int, state: Any, *, score: float | None, memo: dict[str, Any]
  ) -> None:
    """Starts to write a checkpoint, and returns.

    Args:
      step: of the state; a step that is there already is left as it is.
      state: flax.struct dataclass of arrays on the host: fetched once, however
        often they are looked at here.
      score: what ranks it, higher is better; None where it was not evaluated.
      memo: JSON to be had back by `restore`.
    """
    if any(known.step == step for known in self._orbax.checkpoints):
      return
    tree = serialization.to_state_dict(state)
    with _naming_full_disks():
      self._orbax.save_async(
        step,
        tree,
        force=True,
        metrics=None if score is None else {'score': score},
        custom_metadata={
          'format_version': FORMAT_VERSION,
          'checksums': _checksums(tree),
          'memo': memo,
        },
      )

  def restore(self, step: int, like: Any) -> tuple[Any, dict[str, Any]]:
    """Returns a checkpoint's state and memo.

    Args:
      step: one that there is.
      like: a state with the same structure, of arrays or their shapes.

    Raises:
      config_utils.UserError: it is of another format, does not fit `like`, or
        its data is damaged.
    """
    where = f'the checkpoint {step}'
    abstract = jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=self._sharding),
      serialization.to_state_dict(like),
    )
    with self._naming_damage(where):
      meta = self._orbax.metadata(step).custom_metadata
      version = meta['format_version']
      if version == FORMAT_VERSION:
        tree = self._orbax.load(step, abstract)
        wrong = [
          key
          for key, checksum in _checksums(tree).items()
          if meta['checksums'].get(key) != checksum
        ]
    if version != FORMAT_VERSION:
      raise config_utils.UserError(
        f'{where} in {self._directory} has format {version}; this version of '
        f'ijckd_jax reads {FORMAT_VERSION}'
      )
    if wrong:
      raise config_utils.UserError(
        f'{where} in {self._directory} is damaged: {wrong[0]} is not what was '
        f'saved; {ADVICE}'
      )
    return serialization.from_state_dict(like, tree), meta['memo']

  def wait(self) -> None:
    """Returns when everything is on the disk.

    Raises:
      OSError: something could not be written.
    """
    with _naming_full_disks():
      self._orbax.wait()

  def close(self) -> None:
    """Waits and frees what was held."""
    with _naming_full_disks():
      self._orbax.close()

  @contextlib.contextmanager
  def _naming_damage(self, what: str):
    """Turns whatever Orbax raises on damaged files into one line."""
    try:
      yield
    except Exception as error:
      message = ' '.join(f'{type(error).__name__}: {error}'.split())
      raise config_utils.UserError(
        f'{what} in {self._directory} cannot be read ({message[:120]}); '
        f'{ADVICE}'
      ) from error


@contextlib.contextmanager
def _naming_full_disks():
  """Turns TensorStore's errors of writing into OSError."""
  try:
    yield
  except ValueError as error:
    message = ' '.join(str(error).split())
    raise OSError(
      f'a checkpoint could not be written: {message[:200]}'
    ) from error


def _checksums(tree: Any) -> dict[str, int]:
  """Returns the CRC-32 of each array; Orbax does not verify what it reads."""
  flat = traverse_util.flatten_dict(tree, sep='/')
  return {
    key: zlib.crc32(np.ascontiguousarray(value).tobytes())
    for key, value in flat.items()
    if value is not None
  }
