"""Trains and distils what a config says.

ijckd train --config digits --workdir runs/digits
"""

import logging
import os
import sys
import textwrap

from ijckd_jax.runtime import config_utils
from ijckd_jax.runtime import cpu_memory

PROG = 'python -m ijckd_jax.main'
USAGE = """\
usage: {prog} --config NAME[:key=value,...] --workdir DIR
         [--config.FIELD=VALUE ...] [--overwrite]
         [--coordinator HOST:PORT --num_processes N --process_id I]

Trains the teacher (unless the config points at one), distils the student, and
writes checkpoints, metrics, a report and the student's bundle to DIR. The same
command continues a run that was stopped, and shows one that is finished.

  --config NAME        one of the shipped configs, listed below; or the path of
                       your own, which ends in .py or has a slash (Python code,
                       which is run). What stands after a colon goes to its
                       get_config: digits:method=kd. A path that ends in .json
                       is a config as ijckd sweep writes it
  --config.FIELD=VALUE sets a field: --config.total_epochs=3
                       --config.optimizer.learning_rate=0.1
  --workdir DIR        the run's folder; all hosts must see it
  --overwrite          start anew where DIR holds a run; a teacher in it that
                       was trained under the same settings is kept
  --coordinator, --num_processes, --process_id
                       for several processes, each with the same command: the
                       address of process 0, how many there are, and which one
                       this is. Not needed on Cloud TPU, Slurm, Open MPI and
                       GKE, which are found by themselves
  --help               this text

Shipped configs:
{configs}

Exit codes: 0 finished; 1 failed; 2 a wrong request; 130 and 143 stopped by
SIGINT or SIGTERM, 134 because another host died or did not come: run the same
command again, and it continues."""


def main(argv: list[str], prog: str = PROG) -> int:
  """Runs the command; returns its exit code."""
  if '--help' in argv or '-h' in argv:
    names = ', '.join(config_utils.shipped_configs())
    print(USAGE.format(prog=prog, configs=textwrap.fill(names, 80)))
    return 0
  config, flags = _parse(argv, prog)
  _start(config, flags)

  from ijckd_jax.runtime import hosts
  from ijckd_jax.training import loop
  from ijckd_jax.training import train

  try:
    result = train.train_and_evaluate(
      config, flags.workdir, overwrite=flags.overwrite
    )
  except loop.Interrupted as error:
    print(config_utils.printable(error), file=sys.stderr)
    return 128 + error.number  # As shells have it, and batch systems know.
  except loop.Diverged as error:
    print(f'error: {config_utils.printable(error)}', file=sys.stderr)
    return 1
  except OSError as error:
    said = (
      f'error: {error}; once that is mended, the same command continues from '
      f'the last checkpoint in {flags.workdir}'
    )
    print(config_utils.printable(said), file=sys.stderr)
    return 1
  if hosts.is_primary():
    _show(result, flags.workdir)
  return 0


def _start(config, flags) -> None:
  """Starts logging, JAX, the processes of the run and the compilation cache.

  Raises:
    config_utils.UserError: there is no such device, or no such process.
  """
  handler = logging.StreamHandler()
  handler.setFormatter(config_utils.LineFormatter())
  logging.basicConfig(handlers=[handler])
  os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '2')

  import jax

  from ijckd_jax.training import config_checks

  config_checks.check_num_cpu_devices(config)
  if config.num_cpu_devices != 1:
    jax.config.update('jax_num_cpu_devices', config.num_cpu_devices)

  from ijckd_jax.runtime import backend
  from ijckd_jax.runtime import compilation_cache
  from ijckd_jax.runtime import hosts

  hosts.initialize(
    coordinator=flags.coordinator,
    num_processes=flags.num_processes,
    process_id=flags.process_id,
    heartbeat_timeout_seconds=config.heartbeat_timeout_seconds,
  )
  backend.start()
  if hosts.is_primary():  # The others would only say the same.
    logging.getLogger('ijckd_jax').setLevel(logging.INFO)
  if jax.default_backend() == 'cpu':
    cpu_memory.keep_freed()
  compilation_cache.enable(config.compilation_cache)


def _show(result, workdir: str) -> None:
  """Prints what a finished run was worth, and what to do with its student."""
  import shlex

  from etils import epath

  from ijckd_jax.reports import report

  print(report.table(result.summary))
  more = f'{workdir}/report.md shows more; '
  if not (epath.Path(workdir) / 'report.md').exists():
    more = ''
  print(f'\n{more}the student is in {workdir}/bundle')
  if result.bundle.class_names:  # Without classes there is nothing to name.
    bundle = f'--bundle {shlex.quote(str(workdir))}'
    print('next:')
    print(f'  ijckd predict {bundle} image.png')
    print(f'  ijckd export {bundle} --format onnx --output student.onnx')


def _parse(argv: list[str], prog: str):
  """Returns the config and the flags beside it.

  Raises:
    config_utils.UserError: a flag, the file or a field is wrong; in one line.
  """
  parser = config_utils.ArgumentParser(
    prog=prog, add_help=False, allow_abbrev=False
  )
  parser.add_argument('--config', required=True)
  parser.add_argument('--workdir', required=True)
  parser.add_argument('--overwrite', action='store_true')
  parser.add_argument('--coordinator')
  parser.add_argument('--num_processes', type=int)
  parser.add_argument('--process_id', type=int)
  known, overrides = parser.parse_known_args(argv)
  config = config_utils.load(known.config)
  config_utils.apply_flags(config, overrides)
  return config, known


if __name__ == '__main__':
  config_utils.run_command(main)
