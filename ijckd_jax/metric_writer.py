"""Where metrics go: a file, TensorBoard, and any other tracker."""

from collections.abc import Sequence
import json
import os
import tempfile
from typing import Protocol

from etils import epath

from ijckd_jax import config_utils
from ijckd_jax import workdirs


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
    partial = self._path.with_name(f'.{self._path.name}.rows.partial')
    text = ''.join(json.dumps(row) + '\n' for row in kept)
    partial.write_text(text)
    partial.replace(self._path)
    self._file = None
    if workdirs.is_remote(path):
      self._text = text
    else:
      self._file = self._path.open('a')

  def write(self, step, scalars):
    line = json.dumps({'step': step, **scalars}) + '\n'
    if self._file is None:
      self._text += line
    else:
      self._file.write(line)

  def flush(self) -> None:
    """Hands everything to the disk, or the bucket."""
    if self._file is None:
      self._path.write_text(self._text)  # Objects in buckets cannot grow.
    else:
      self._file.flush()
      os.fsync(self._file.fileno())

  def close(self):
    if self._file is None:
      self.flush()
    else:
      self._file.close()


def read_rows(path: epath.PathLike) -> list[dict]:
  """Returns the rows of a metrics file, without a half-written last one.

  Raises:
    config_utils.UserError: another line is not a row.
  """
  path = epath.Path(path)
  if not path.exists():
    return []
  lines = path.read_bytes().splitlines(keepends=True)
  rows = []
  for number, line in enumerate(lines, 1):
    try:
      row = json.loads(line)
      row['step'] + 0
    except (KeyError, TypeError, ValueError) as error:
      if number == len(lines) and not line.endswith(b'\n'):
        break  # The process was killed as it wrote.
      raise config_utils.UserError(
        f'{path}, line {number}: not a row of metrics; mend or remove it'
      ) from error
    rows.append(row)
  return rows


class TensorBoardWriter:
  """TensorBoard events, by tensorboardX; in a bucket, as often as flushed."""

  def __init__(self, directory: epath.PathLike, *, resume_step: int):
    """Opens a new event file; TensorBoard hides older rows past the step."""
    import tensorboardX  # Takes a while; only runs that write need it.

    self._remote = self._scratch = None
    if workdirs.is_remote(directory):
      self._remote = epath.Path(directory)
      self._remote.mkdir(parents=True, exist_ok=True)
      self._scratch = tempfile.TemporaryDirectory()
      directory = self._scratch.name
    self._writer = tensorboardX.SummaryWriter(
      str(directory), purge_step=resume_step + 1
    )

  def write(self, step, scalars):
    for name, value in scalars.items():
      self._writer.add_scalar(name, value, step)

  def flush(self) -> None:
    """Hands everything to the disk, or the bucket."""
    self._writer.flush()
    self._copy()

  def close(self):
    self._writer.close()
    self._copy()
    if self._scratch is not None:
      self._scratch.cleanup()

  def _copy(self):
    if self._remote is not None:
      for path in epath.Path(self._scratch.name).iterdir():
        (self._remote / path.name).write_bytes(path.read_bytes())


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
