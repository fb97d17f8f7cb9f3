"""Runs the command, and counts its file operations, or is killed at one.

  python kill_at.py COUNT_FILE K [arguments of ijckd_jax.main]

Kills this very process by SIGKILL at the K-th operation by which Python changes
something below the workdir (0: never), just before it. At each
operation COUNT_FILE is told how many there were, and which it is.
"""

import json
import os
import pathlib
import signal
import sys

# Arguments that name a path, by audit event; `open` is looked at by itself.
EVENTS = {
  'os.mkdir': (0,),
  'os.remove': (0,),
  'os.rename': (0, 1),
  'os.rmdir': (0,),
  'os.truncate': (0,),
}


class Killer:
  """An audit hook."""

  def __init__(self, workdir: str, count_file: str, at: int):
    self.workdir = workdir
    self.count = os.open(count_file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    self.at = at
    self.seen = 0

  def __call__(self, event, arguments):
    if event == 'open':
      path, _, flags = arguments
      writes = isinstance(flags, int) and flags & (os.O_WRONLY | os.O_RDWR)
      paths = [path] if writes else []
    elif event in EVENTS:
      paths = [arguments[number] for number in EVENTS[event]]
    else:
      return
    for path in paths:
      if isinstance(path, str | os.PathLike):
        name = os.fspath(path)
        if name.startswith(self.workdir):
          self.hit(event, name.removeprefix(self.workdir))
          return

  def hit(self, event, name):
    self.seen += 1
    line = json.dumps([self.seen, event, name])
    os.pwrite(self.count, line.ljust(500).encode(), 0)
    if self.seen == self.at:
      os.kill(os.getpid(), signal.SIGKILL)


def main(count_file: str, at: str, *argv: str) -> None:
  workdir = argv[argv.index('--workdir') + 1]
  sys.addaudithook(Killer(workdir, count_file, int(at)))
  from ijckd_jax import main as command
  from ijckd_jax.runtime import config_utils

  sys.argv[1:] = argv
  config_utils.run_command(command.main)


if __name__ == '__main__':
  sys.path.insert(0, str(pathlib.Path(__file__).parents[2]))
  main(*sys.argv[1:])
