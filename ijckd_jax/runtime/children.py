"""Processes that this package starts; on Linux they die with their parent.

python -m ijckd_jax.runtime.children PARENT CORES MODULE [ARGUMENT ...]
"""

from collections.abc import Collection
from collections.abc import Sequence
import contextlib
import ctypes
import os
import signal
import subprocess
import sys

PR_SET_PDEATHSIG = 1  # Of Linux's prctl.


def start(
  module: str,
  arguments: Sequence[str] = (),
  *,
  cores: Collection[int] = (),
  user_path: Sequence[str] = (),
  env: dict[str, str] | None = None,
  **options,
) -> subprocess.Popen:
  """Starts `python -m MODULE ARGUMENT ...`, which dies with this process.

  On Linux the kernel kills it as soon as this process has ended, however that
  happened. It imports modules from where this process does.

  Args:
    module: with a `__main__` part.
    arguments: of the command line.
    cores: numbers of the CPU's cores that it may use; empty: those that this
      process may use. Where the system cannot restrict a process, all.
    user_path: folders in which modules are looked for after all others.
    env: variables that it gets beside those of this process.
    **options: of subprocess.Popen.
  """
  path = [os.path.abspath(folder) for folder in (*sys.path, *user_path)]
  said = ','.join(map(str, sorted(cores)))
  return subprocess.Popen(
    # -P: without it, the working directory would come first.
    [sys.executable, '-P', '-m', __name__, f'{os.getpid()}', said]
    + [module, *arguments],
    env={**os.environ, 'PYTHONPATH': os.pathsep.join(path), **(env or {})},
    **options,
  )


def _bind(parent: int) -> None:
  """Has the kernel kill this process when its parent ends.

  Elsewhere than on Linux nothing is done.
  """
  with contextlib.suppress(AttributeError, OSError):
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
  if os.getppid() != parent:  # It ended before.
    sys.exit(128 + signal.SIGKILL)


def main(argv: Sequence[str]) -> None:
  """Becomes the program that the arguments name."""
  parent, cores, *program = argv
  _bind(int(parent))
  if cores and hasattr(os, 'sched_setaffinity'):
    os.sched_setaffinity(0, set(map(int, cores.split(','))))
  # Both outlive exec: what happens when the parent ends, and the cores.
  os.execv(sys.executable, [sys.executable, '-P', '-m', *program])


if __name__ == '__main__':
  main(sys.argv[1:])
