"""Where metrics go: a file, TensorBoard, and any other tracker."""

from collections.abc import Sequence
import json
import os
from typing import Protocol

from etils import epath


class MetricWriter(Protocol):
  """What a tracker must offer; nothing needs to be inherited."""

  def write(self, step: int, scalars: dict[str, float]) -> None:
    """Takes metrics by names such as 'train/loss' and 'test/top1'."""

  def close(self) -> None:
    """Is called once, at the end."""


class JsonLinesWriter:
  """One JSON object per line: {"step": 100, "train/loss": 0.5, ...}."""

  def __init__(self, path: epath.PathLike, *, resume_step: int):
    """Opens the file and drops what was written past the restored step.

    Args:
      path: of the file, made if it is not there.
      resume_step: rows of later steps are dropped: they will be written again.
    """
    self._path = epath.Path(path)
    kept = [row for row in read_rows(path) if row['step'] <= resume_step]
    partial = self._path.with_name(f'.{self._path.name}.partial')
    partial.write_text(''.join(json.dumps(row) + '\n' for row in kept))
    partial.replace(self._path)
    self._file = self._path.open('a')

  def write(self, step, scalars):
    self._file.write(json.dumps({'step': step, **scalars}) + '\n')

  def flush(self) -> None:
    """Hands everything to the disk."""
    self._file.flush()
    os.fsync(self._file.fileno())

  def close(self):
    self._file.close()


def read_rows(path: epath.PathLike) -> list[dict]:
  """Returns the rows of a metrics file, without a half-written last one."""
  path = epath.Path(path)
  if not path.exists():
    return []
  rows = []
  for line in path.read_text().splitlines():
    try:
      rows.append(json.loads(line))
    except json.JSONDecodeError:
      break
  return rows


class TensorBoardWriter:
  """TensorBoard events, by tensorboardX."""

  def __init__(self, directory: epath.PathLike, *, resume_step: int):
    """Opens a new event file; TensorBoard hides older rows past the step."""
    import tensorboardX  # Takes a while; only runs that write need it.

    self._writer = tensorboardX.SummaryWriter(
      str(directory), purge_step=resume_step + 1 if resume_step else None
    )

  def write(self, step, scalars):
    for name, value in scalars.items():
      self._writer.add_scalar(name, value, step)

  def close(self):
    self._writer.close()


class Writers:
  """Several writers as one."""

  def __init__(self, writers: Sequence[MetricWriter]):
    self._writers = writers

  def write(self, step, scalars):
    for writer in self._writers:
      writer.write(step, scalars)

  def flush(self) -> None:
    """Flushes those writers that can."""
    for writer in self._writers:
      if hasattr(writer, 'flush'):
        writer.flush()

  def close(self):
    for writer in self._writers:
      writer.close()
