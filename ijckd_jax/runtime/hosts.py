"""Several processes as one run: they find each other, and agree.

Every process runs the same program. Process 0 alone writes to the run's folder,
which all of them see; what it finds there, or what goes wrong, it shares.
"""

from collections.abc import Callable
from collections.abc import Mapping
import contextlib
import hashlib
import json
import os
import pathlib
import pickle
import signal
import threading
from typing import Any
from typing import TypeVar
import uuid

from etils import epath
import jax
from jax.experimental import multihost_utils
import numpy as np

from ijckd_jax.runtime import config_utils
from ijckd_jax.runtime import streams

# JAX's words where there is no cluster, and where JAX is in use already.
NO_CLUSTER = 'coordinator_address should be defined'
IN_USE = 'must be called before any JAX calls'
# Where Slurm and Open MPI say how many processes there are, and which one this
# is; and by what else JAX knows them.
CLUSTERS = {
  ('SLURM_NTASKS', 'SLURM_PROCID'): (
    *('SLURM_JOB_ID', 'SLURM_STEP_NODELIST', 'SLURM_LOCALID'),
  ),
  ('OMPI_COMM_WORLD_SIZE', 'OMPI_COMM_WORLD_RANK'): ('OMPI_MCA_orte_hnp_uri',),
}
# How long processes wait for each other at the start.
WAIT_SECONDS = 300
# As if another process had died later: batch systems start all of them again.
NOT_JOINED = 128 + signal.SIGABRT

T = TypeVar('T')


def initialize(
  *,
  coordinator: str | None,
  num_processes: int | None,
  process_id: int | None,
  heartbeat_timeout_seconds: int,
) -> None:
  """Joins the processes of a cluster, before anything else is done with JAX.

  Args:
    coordinator: HOST:PORT of process 0; None: Cloud TPU, Slurm, Open MPI and
      GKE are found by themselves, and without them, or where JAX is in use
      already, this process stays as it is.
    num_processes: of the cluster; None like `coordinator`.
    process_id: of this process, from 0 on; None like `coordinator`.
    heartbeat_timeout_seconds: after which a silent process is taken for dead,
      and the others are aborted.

  Raises:
    config_utils.UserError: they cannot be joined.
  """
  given = (coordinator, num_processes, process_id)
  if None in given and given != (None, None, None):
    raise config_utils.UserError(
      '--coordinator, --num_processes and --process_id go together: give all '
      'three, or none where the cluster is known (Cloud TPU, Slurm, Open MPI, '
      'GKE)'
    )
  if coordinator is not None:
    _, separator, port = coordinator.rpartition(':')
    if not (separator and port.isdecimal()):
      raise config_utils.UserError(
        f'--coordinator {coordinator}: give HOST:PORT of process 0'
      )
    if not 0 <= process_id < num_processes:
      raise config_utils.UserError(
        f'--process_id {process_id}: it must be from 0 to '
        f'{num_processes - 1}, one less than --num_processes'
      )
  counts = [os.environ.get(count) for count, _ in CLUSTERS]
  if coordinator is None and '1' in counts:
    return  # Of a cluster's GPUs JAX would give a lone task the first only.
  try:
    with _waiting(*_joining(*given)):
      jax.distributed.initialize(
        coordinator,
        num_processes,
        process_id,
        cluster_detection_method=None if coordinator is None else 'deactivate',
        initialization_timeout=2 * WAIT_SECONDS,
        heartbeat_timeout_seconds=heartbeat_timeout_seconds,
        shutdown_timeout_seconds=heartbeat_timeout_seconds,
      )
  except (RuntimeError, ValueError) as error:
    known = NO_CLUSTER in str(error) or IN_USE in str(error)
    if not known or coordinator is not None:
      raise config_utils.UserError(
        f'the processes could not be joined: {config_utils.short(error)}'
      ) from error
  if jax.distributed.is_initialized():
    # CPUs would work on two evaluation steps at once, and hosts exchange their
    # sums in another order each.
    jax.config.update('jax_cpu_enable_async_dispatch', False)


def _joining(coordinator, num_processes, process_id) -> tuple[str, str, str]:
  """Returns this process's number, what says so, and how to run it alone.

  By the flags, or by the variables of a cluster that JAX knows; empty where it
  may know another one.
  """
  if coordinator is not None:
    said = f'--num_processes {num_processes} --process_id {process_id}'
    return f'{process_id}', said, 'leave these flags out'
  for (count, process), others in CLUSTERS.items():
    if all(name in os.environ for name in (count, process, *others)):
      number = os.environ[process]
      said = f'{count}={os.environ[count]} {process}={number}'
      return number, said, f'{count}=1 ijckd train ...'
  return '', '', ''


@contextlib.contextmanager
def _waiting(number: str, said: str, alone: str):
  """Says that this process waits for others, and ends it after WAIT_SECONDS.

  JAX would abort it, with a page of C++, and does not listen to Ctrl-C.

  Args:
    number: see `_joining`, like the others.
    said: what says how many processes there are.
    alone: how to run without them.
  """
  where = f' ({said})' if said else ''
  if number == '0':
    streams.say(
      f'waiting up to {WAIT_SECONDS} s for the other processes{where}; to run '
      f'alone: {alone}'
    )

  def give_up():
    streams.say(
      f'error: the other processes did not come in {WAIT_SECONDS} s{where}: '
      'start all of them' + (f'; to run alone: {alone}' if alone else '')
    )
    os._exit(NOT_JOINED)

  timer = threading.Timer(WAIT_SECONDS, give_up)
  timer.daemon = True
  before = signal.signal(signal.SIGINT, signal.SIG_DFL)
  timer.start()
  try:
    yield
  finally:
    timer.cancel()
    signal.signal(signal.SIGINT, before)


def is_primary() -> bool:
  """Returns whether this is the process that writes."""
  return jax.process_index() == 0


def wait(what: str) -> None:
  """Returns when every process has come to the point so called."""
  if jax.process_count() > 1:
    multihost_utils.sync_global_devices(what)


def exchange(value: Any) -> list[Any]:
  """Returns every process's JSON value, by process."""
  if jax.process_count() == 1:
    return [value]
  return [json.loads(text) for text in _gather(json.dumps(value).encode())]


def share(action: Callable[[], T]) -> T:
  """Calls an action in process 0, and returns what it returns in all.

  Args:
    action: what it returns can be pickled; it may read and write.

  Raises:
    Exception: what the action raised, in all.
  """
  if jax.process_count() == 1:
    return action()
  if not is_primary():
    result, error = pickle.loads(_gather(b'')[0])
    if error is not None:
      raise error
    return result
  try:
    result = action()
  except Exception as error:
    _gather(pickle.dumps((None, _plain(error))))
    raise
  _gather(pickle.dumps((result, None)))
  return result


def check_agree(values: Mapping[str, Any]) -> None:
  """Raises where a value is not the same in every process.

  Args:
    values: JSON by name, nested or not.

  Raises:
    config_utils.UserError: the values and processes that differ, in all.
  """
  first, *others = exchange({'values': values})
  for process, other in enumerate(others, 1):
    changes = config_utils.differences(first['values'], other['values'])
    if changes:
      raise config_utils.UserError(
        f'process {process} is not like process 0 ({"; ".join(changes[:5])}): '
        'start all processes with the same command, code and data'
      )


def check_seen(folder: epath.Path) -> None:
  """Raises unless every process sees the folder that process 0 writes to.

  Raises:
    config_utils.UserError: one does not, in all.
  """
  if jax.process_count() == 1:
    return
  mark = folder / share(lambda: f'.{uuid.uuid4().hex}.partial')
  share(lambda: mark.write_text('') and None)
  seen = exchange(mark.exists())
  if is_primary():
    mark.unlink()
  if not all(seen):
    raise config_utils.UserError(
      f'process {seen.index(False)} does not see what process 0 writes to '
      f'{folder}: give a --workdir that all hosts share'
    )


def rows_of_process(batch_size: int) -> slice:
  """Returns which rows of a global batch are this process's."""
  rows = batch_size // jax.process_count()
  first = rows * jax.process_index()
  return slice(first, first + rows)


def digest_of_code() -> str:
  """Returns a hash of the package's source files."""
  root = pathlib.Path(__file__).parents[1]
  digest = hashlib.sha256()
  for path in sorted(root.rglob('*.py')):
    digest.update(f'{path.relative_to(root)}'.encode() + path.read_bytes())
  return digest.hexdigest()[:16]


def _plain(error: Exception) -> Exception:
  """Returns an error that means the same and can be pickled."""
  for kind in (config_utils.UserError, OSError):
    if isinstance(error, kind):
      return kind(str(error))
  what = f'{type(error).__name__}: {config_utils.short(error)}'
  return RuntimeError(f'process 0 failed: {what}')


def _gather(data: bytes) -> list[bytes]:
  """Returns every process's bytes."""
  sizes = multihost_utils.process_allgather(np.array([len(data)], np.int32))
  sizes = sizes.reshape(-1)
  padded = np.zeros(sizes.max(), np.uint8)
  padded[: len(data)] = np.frombuffer(data, np.uint8)
  rows = multihost_utils.process_allgather(padded)
  rows = rows.reshape(len(sizes), -1)
  return [row[:size].tobytes() for row, size in zip(rows, sizes, strict=True)]
