"""Where metrics go: a file, TensorBoard, and any other tracker."""

from collections.abc import Sequence
import json
import logging
import os
import tempfile
import time
from typing import Any
from typing import Protocol

from etils import epath

from ijckd_jax.runtime import config_utils
from ijckd_jax.runtime import disk

logger = logging.getLogger('ijckd_jax')


class MetricWriter(Protocol):
  """What a tracker must offer; nothing needs to be inherited."""

  def write(self, step: int, scalars: dict[str, float]) -> None:
    """Takes metrics by names such as 'train/loss' and 'test/top1'."""

  def close(self) -> None:
    """Is called once, at the end.

    A writer may also have `flush()`, called before a checkpoint is saved, and
    `finish()`, called before `close` where the run is finished: its folder then
    has the pictures and the bundle. Rows of a run that continues start at the
    step that was saved last: a writer that keeps rows for good leaves out those
    that it has.
    """


class JsonLinesWriter:
  """One JSON object per line: {"step": 100, "train/loss": 0.5, ...}."""

  def __init__(
    self,
    path: epath.PathLike,
    *,
    resume_step: int,
    num_rows: int = 0,
  ):
    """Opens the file and drops what was written past the restored step.

    Args:
      path: of the file, made if it is not there.
      resume_step: rows of later steps are dropped: they will be written again.
      num_rows: as many were written up to that step; it is logged where some of
        them are missing.
    """
    self._path = epath.Path(path)
    kept = [row for row in read_rows(path) if row['step'] <= resume_step]
    if len(kept) < num_rows:
      logger.warning(
        '%s: %d of the %d rows up to step %d are missing; the run goes on '
        'without them',
        path,
        num_rows - len(kept),
        num_rows,
        resume_step,
      )
    self._old = ''.join(json.dumps(row) + '\n' for row in kept)
    self._new = ''
    disk.write_text(self._path, self._old)

  def write(self, step: int, scalars: dict[str, float]) -> None:
    self._new += json.dumps({'step': step, **scalars}) + '\n'

  def flush(self) -> None:
    """Hands everything to the disk, or the bucket.

    Raises:
      OSError: it could not be written, and may be tried again.
    """
    if disk.is_remote(self._path):
      self._path.write_text(self._old + self._new)  # Objects cannot grow.
    else:
      # Opened each time: a file of a folder that has vanished would take all.
      with open(self._path, 'r+') as file:
        file.seek(len(self._old))  # What a failed try has written goes.
        file.truncate()
        file.write(self._new)
        file.flush()
        os.fsync(file.fileno())
    self._old, self._new = self._old + self._new, ''

  def close(self) -> None:
    self.flush()


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
    except (KeyError, RecursionError, TypeError, ValueError) as error:
      if number == len(lines) and not line.endswith(b'\n'):
        break  # The process was killed as it wrote.
      raise config_utils.UserError(
        f'{path}, line {number}: not a row of metrics; mend or remove it'
      ) from error
    rows.append(row)
  return rows


class TensorBoardWriter:
  """TensorBoard events, by tensorboardX; in a bucket, as often as flushed.

  By its plain writer of events: its SummaryWriter has a thread that dies when
  the disk is full, and the run would wait for it for ever.
  """

  def __init__(self, directory: epath.PathLike, *, resume_step: int):
    """Opens a new event file; TensorBoard hides older rows past the step."""
    # They take a while; only runs that write need them.
    from tensorboardX import event_file_writer
    from tensorboardX import summary
    from tensorboardX.proto import event_pb2

    self._remote = self._scratch = None
    if disk.is_remote(directory):
      self._remote = epath.Path(directory)
      self._remote.mkdir(parents=True, exist_ok=True)
      self._scratch = tempfile.TemporaryDirectory()
      directory = self._scratch.name
    epath.Path(directory).mkdir(parents=True, exist_ok=True)
    self._writer = event_file_writer.EventsWriter(f'{directory}/events')
    self._event, self._scalar = event_pb2.Event, summary.scalar
    restart = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
    self._write(resume_step + 1, session_log=restart)

  def _write(self, step: int, **fields: Any) -> None:
    event = self._event(wall_time=time.time(), step=step, **fields)
    self._writer.write_event(event)

  def write(self, step: int, scalars: dict[str, float]) -> None:
    for name, value in scalars.items():
      self._write(step, summary=self._scalar(name, value))

  def flush(self) -> None:
    """Hands everything to the disk, or the bucket."""
    self._writer.flush()
    self._copy()

  def close(self) -> None:
    self._writer.close()
    self._copy()
    if self._scratch is not None:
      self._scratch.cleanup()

  def _copy(self) -> None:
    if self._remote is not None and self._scratch is not None:
      for path in epath.Path(self._scratch.name).iterdir():
        (self._remote / path.name).write_bytes(path.read_bytes())


class Writers:
  """Several writers as one."""

  def __init__(self, writers: Sequence[MetricWriter]):
    self._writers = writers

  def write(self, step: int, scalars: dict[str, float]) -> None:
    for writer in self._writers:
      writer.write(step, scalars)

  def flush(self) -> None:
    """Flushes those writers that can.

    Raises:
      OSError: one could not write, over many tries.
    """
    for writer in self._writers:
      if hasattr(writer, 'flush'):
        disk.retry(writer.flush, f'metrics ({type(writer).__name__})')

  def finish(self) -> None:
    """Tells those writers that ask for it that the run is finished."""
    for writer in self._writers:
      if hasattr(writer, 'finish'):
        writer.finish()

  def close(self) -> None:
    for writer in self._writers:
      writer.close()
