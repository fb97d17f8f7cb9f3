"""A process that makes steps when it is told to, and says how long they took.

It is kept apart from the other library's: their threads would wait for each
other. Over its pipes go lines: it says 'ready', reads a number of steps, makes
them, and answers with the seconds.
"""

from collections.abc import Callable
from collections.abc import Mapping
import contextlib
import json
import os
import pathlib
import select
import signal
import subprocess
import sys
import time

FACTS = 'facts'  # A request in place of a kind of step.


def serve(
  step: Callable[[], None],
  wait: Callable[[], None],
  facts: Callable[[], Mapping[str, float]] | None = None,
) -> None:
  """Makes steps as standard input says, until it ends.

  Args:
    step: makes one, perhaps without waiting for it.
    wait: returns when all are made.
    facts: returns numbers about the step by name, when asked for.
  """
  serve_kinds({'': step}, wait, facts)


def serve_kinds(
  steps: Mapping[str, Callable[[], None]],
  wait: Callable[[], None],
  facts: Callable[[], Mapping[str, float]] | None = None,
) -> None:
  """Makes steps of several kinds, of which each line names one.

  Args:
    steps: as `serve` takes one, by kind, which is a word.
    wait: see `serve`.
    facts: see `serve`.
  """
  for step in steps.values():
    for _ in range(2):  # The first compiles.
      step()
  wait()
  print('ready', flush=True)
  for line in sys.stdin:
    count, _, kind = line.strip().partition(' ')
    if kind == FACTS:
      print(json.dumps(facts()), flush=True)
      continue
    step = steps[kind]
    start = time.perf_counter()
    for _ in range(int(count)):
      step()
    wait()
    print(time.perf_counter() - start, flush=True)


class Worker:
  """The other end of a process that serves steps."""

  def __init__(
    self,
    module: str,
    *arguments: str,
    env: dict[str, str],
    python: str = sys.executable,
    cores: int | None = None,
    limit: float | None = None,
  ):
    """Starts `python -m module arguments`.

    Args:
      module: a module that calls `serve`.
      *arguments: of its command line.
      env: its environment.
      python: the interpreter.
      cores: to how many it is pinned; None: to none.
      limit: seconds that an answer may take; None: any.
    """

    def pin():
      if cores is not None:
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:cores])

    self._limit = limit
    self._process = subprocess.Popen(
      [python, '-m', module, *arguments],
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
      text=True,
      env=env,
      preexec_fn=pin,
      process_group=0,  # With what it starts, for `pause`.
    )

  def wait_until_ready(self) -> None:
    """Returns when it has compiled."""
    self._answer('ready')

  def seconds(self, num_steps: int, kind: str = '') -> float:
    """Returns how long so many steps take, of a kind if there are several."""
    self.start_steps(num_steps, kind)
    return self.finish_steps()

  def start_steps(self, num_steps: int, kind: str = '') -> None:
    """Has it begin with so many steps, without waiting for them."""
    self._ask(f'{num_steps} {kind}')

  def finish_steps(self) -> float:
    """Waits for the steps that were started; returns how long they took."""
    return float(self._answer())

  def facts(self) -> dict[str, float]:
    """Returns numbers about its step by name."""
    self._ask(f'0 {FACTS}')
    return json.loads(self._answer())

  def pause(self) -> None:
    """Stops it, and what it started, until `go`."""
    os.killpg(self._process.pid, signal.SIGSTOP)

  def go(self) -> None:
    """Lets it go on."""
    os.killpg(self._process.pid, signal.SIGCONT)

  def peak_memory(self) -> list[float]:
    """Returns MB that the process, and each that it started, took at most."""
    first = self._process.pid
    children = pathlib.Path(f'/proc/{first}/task').glob('*/children')
    peaks = []
    for pid in (first, *' '.join(x.read_text() for x in children).split()):
      status = pathlib.Path(f'/proc/{pid}/status').read_text()
      (line,) = (x for x in status.splitlines() if x.startswith('VmHWM'))
      peaks.append(int(line.split()[1]) / 1000)
    return peaks

  def close(self) -> None:
    """Ends the process."""
    self._process.stdin.close()
    self._process.wait()

  def kill(self) -> None:
    """Ends the process, and what it started, at once."""
    with contextlib.suppress(ProcessLookupError):
      os.killpg(self._process.pid, signal.SIGKILL)
    self._process.wait()

  def _ask(self, line):
    try:
      self._process.stdin.write(f'{line}\n')
      self._process.stdin.flush()
    except BrokenPipeError as error:
      raise RuntimeError(f'{self._process.args[2:]} ended') from error

  def _answer(self, expected=None):
    stdout = self._process.stdout
    if not select.select([stdout], [], [], self._limit)[0]:
      raise RuntimeError(f'{self._process.args[2:]}: no answer in time')
    line = stdout.readline().strip()
    if not line or expected not in (None, line):
      raise RuntimeError(f'{self._process.args[2:]} ended, or said {line!r}')
    return line
