"""Processes that decode and write for a run: how they start, and their ends.

They are spawned, so that each first imports the script that starts them.
"""

import multiprocessing
import os
import signal
import sys

from ijckd_jax.runtime import config_utils

NAMES = ('ijckd', 'grain')  # How those begin that this package starts.
# Exit code of a worker whose script would have done its whole work in it.
UNGUARDED = 97
GUARD = (
  'each worker process imports the script that starts it, which would do all '
  "of its work once more: put that work under if __name__ == '__main__':, or "
  'set num_workers=0 (1 to prepare pictures)'
)
SHARED_MEMORY = (
  'the shared memory, /dev/shm, is full: enlarge it (docker run --shm-size), '
  'or set fewer num_workers'
)
CAUSES = {
  -signal.SIGKILL: (
    'it was killed, mostly because memory ran out: fewer num_workers take less'
  ),
  -signal.SIGBUS: SHARED_MEMORY,
}


def check_script() -> None:
  """Ends a worker in which its script does what is for the first process.

  To be called first by whatever may start workers.

  Raises:
    config_utils.UserError: another program has spawned this process.
  """
  process = multiprocessing.current_process()
  # Set while a spawned process imports its script.
  if getattr(process, '_inheriting', False):
    if process.name.startswith(NAMES):
      os._exit(UNGUARDED)  # The process that has started it tells the user.
    raise config_utils.UserError(GUARD)


def check_start() -> None:
  """Raises UserError where workers could not import the script."""
  path = getattr(sys.modules['__main__'], '__file__', None) or ''
  if os.path.basename(path) == '<stdin>':
    raise config_utils.UserError(
      'worker processes cannot import a script from standard input: save it to '
      'a file, or set num_workers=0 (1 to prepare pictures)'
    )


def ended(exit_code: int) -> Exception:
  """Returns the error of a worker that ended before its work was done."""
  if exit_code == UNGUARDED:
    return config_utils.UserError(GUARD)
  cause = CAUSES.get(exit_code, 'what it has printed says why')
  return OSError(f'a worker process ended with exit code {exit_code}: {cause}')
