"""A lock on a run's folder: a second run at the same time is told to go away.

It is a file, locked by flock, in which its holder gives a sign of life every
few seconds. The kernel frees the file when its holder dies, however it dies.
Where flock does not reach other hosts (gcsfuse, a bucket, some NFS and Lustre
mounts), a newcomer watches the file for that sign before it takes the folder.
The package filelock has the lock, and no sign of life.
"""

import contextlib
import fcntl
import json
import os
import socket
import threading
import time
import uuid

from etils import epath

from ijckd_jax.runtime import config_utils
from ijckd_jax.runtime import disk

FILE = '.lock'
BEAT_SECONDS = 5
# After so long without a sign of life the holder is taken for dead.
PATIENCE_SECONDS = 30
SIZE = 512  # Bytes of the file.
# Words of the error of a folder that another run holds.
HELD = 'is at work in'


class Lock:
  """Holds a folder, as a context."""

  def __init__(self, folder: epath.PathLike):
    """Takes a folder that is there."""
    self._path = epath.Path(folder) / FILE
    self._file = None
    self._life = {
      'id': uuid.uuid4().hex,
      'host': socket.gethostname(),
      'machine': _machine(),
      'pid': os.getpid(),
      'beats': 0,
    }
    self._ended = threading.Event()

  def __enter__(self):
    """Takes the folder.

    Raises:
      config_utils.UserError: another run holds it.
      OSError: the folder cannot be written.
    """
    reaches = False
    if not disk.is_remote(self._path):
      self._file = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o666)
      try:
        fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        reaches = True
      except BlockingIOError:
        other = self._read()
        os.close(self._file)
        raise self._held(other) from None
      except OSError:  # This file system knows no locks.
        pass
    left = self._read()
    # What a holder on this machine has left, the kernel has freed.
    if left and not (reaches and left.get('machine') == self._life['machine']):
      deadline = time.monotonic() + PATIENCE_SECONDS
      while time.monotonic() < deadline:
        time.sleep(BEAT_SECONDS / 5)
        now = self._read()
        if now and now != left:
          if self._file is not None:
            os.close(self._file)
          raise self._held(now)
    self._write(json.dumps(self._life))
    self._beating = threading.Thread(target=self._beat, daemon=True)
    self._beating.start()
    return self

  def __exit__(self, *_):
    self._ended.set()
    self._beating.join(BEAT_SECONDS)
    with contextlib.suppress(OSError):  # It may be gone, with the folder.
      if self._file is None:
        self._path.unlink()
      else:
        # Never removed: another one may have it open, to lock it.
        self._write('')
    if self._file is not None:
      os.close(self._file)

  def _held(self, other) -> config_utils.UserError:
    who = ''
    if other:
      who = f' (process {other.get("pid")} on {other.get("host")})'
    return config_utils.UserError(
      f'another run{who} {HELD} {self._path.parent}: wait for its end, '
      'or take another --workdir'
    )

  def _beat(self) -> None:
    while not self._ended.wait(BEAT_SECONDS):
      self._life['beats'] += 1
      with contextlib.suppress(OSError):  # The run itself will find out.
        self._write(json.dumps(self._life))

  def _read(self) -> dict | None:
    """Returns the last holder's sign of life; None where it ended well."""
    try:
      life = json.loads(self._path.read_text())
    except (OSError, ValueError):
      return None
    return life if isinstance(life, dict) else None

  def _write(self, text: str) -> None:
    if self._file is None:
      self._path.write_text(text)
    else:
      # In one go, over what was there: a reader never finds it empty between.
      os.pwrite(self._file, text.encode().ljust(SIZE), 0)


def _machine() -> str:
  """Returns what tells this machine, since it was started, from others."""
  try:
    return epath.Path('/proc/sys/kernel/random/boot_id').read_text().strip()
  except OSError:
    return socket.gethostname()
