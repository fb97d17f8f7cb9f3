"""The standard streams of a command, and Ctrl-C while it starts.

Imports nothing slow, because it must be at work before anything that is.
"""

from collections.abc import Callable
import os
import signal
import sys

STREAMS = (('stdin', 'r'), ('stdout', 'w'), ('stderr', 'w'))


def prepare() -> None:
  """Makes the standard streams usable, and Ctrl-C quiet."""
  for number, (name, mode) in enumerate(STREAMS):
    if getattr(sys, name) is None:  # Closed, as by `2>&-`.
      # Otherwise the next file that is opened would get its number, and with it
      # whatever libraries print there.
      null = os.open(os.devnull, os.O_RDWR)
      if null != number:
        os.dup2(null, number)
        os.close(null)
      setattr(sys, name, open(number, mode, closefd=False))
  # A shell lets a command that it starts in the background ignore Ctrl-C.
  if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, _interrupt)


def use_utf8() -> None:
  """Starts the program once more, in UTF-8, where the locale is another one.

  Files are written in UTF-8, and libraries in C++ take paths as that.
  """
  if sys.getfilesystemencoding() != 'utf-8':
    python, *argv = sys.orig_argv
    os.execvp(python, [python, '-X', 'utf8', *argv])


def say(line: str) -> None:
  """Prints a line on standard error, if it can be written to."""
  try:
    print(line, file=sys.stderr, flush=True)
  except OSError:
    _silence(sys.stderr)


def guard(action: Callable[[], int | None]) -> int:
  """Calls an action that prints, and returns its exit code.

  Args:
    action: what it raises because of files, of its output or of Ctrl-C becomes
      at most one line on standard error.
  """
  failure = None
  try:
    code = action() or 0
  except KeyboardInterrupt:
    say('interrupted')
    code = 128 + signal.SIGINT
  except OSError as error:
    code, failure = 1, error
  try:
    sys.stdout.flush()
  except OSError as error:
    code, failure = 1, error
    _silence(sys.stdout)
  if isinstance(failure, BrokenPipeError):
    # Whoever read the output has gone, as `head` does when it has its lines.
    return 128 + signal.SIGPIPE
  if failure is not None:
    say(f'error: {failure}')
  return code


def _silence(stream) -> None:
  """Lets a stream's content go, which Python would write again at its end."""
  null = os.open(os.devnull, os.O_WRONLY)
  os.dup2(null, stream.fileno())
  os.close(null)


def _interrupt(number, frame):
  """Raises KeyboardInterrupt, but ends the process during an import.

  Nothing is to be cleaned up there, and libraries may catch the exception or
  print where they were.
  """
  inside = frame
  while inside is not None:
    if inside.f_code.co_filename.startswith('<frozen importlib'):
      os.write(2, b'interrupted\n')
      os._exit(128 + number)
    inside = inside.f_back
  signal.default_int_handler(number, frame)
