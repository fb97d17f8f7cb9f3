"""Trains and distils what a config file says.

python -m ijckd_jax.main --config configs/digits.py --workdir runs/digits
"""

import logging
import os
import sys

from ijckd_jax import config_utils
from ijckd_jax import cpu_memory

USAGE = """\
usage: python -m ijckd_jax.main --config FILE[:key=value,...] --workdir DIR
                                [--config.FIELD=VALUE ...] [--overwrite]
                                [--coordinator HOST:PORT --num_processes N
                                 --process_id I]

Trains the teacher (unless the config points at one), distils the student, and
writes checkpoints, metrics, a report and the student's bundle to DIR. The same
command continues a run that was stopped, and shows one that is finished.

  --config FILE        a file of configs/, or your own (Python code, which is
                       run); what stands after a colon goes to its get_config,
                       such as method=kd
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

Exit codes: 0 finished; 1 failed; 2 a wrong request; 130 and 143 stopped by
SIGINT or SIGTERM, 134 by the death of another host: run the same command again,
and it continues."""


def main(argv: list[str]) -> int:
  """Runs the command; returns its exit code."""
  if '--help' in argv or '-h' in argv:
    print(USAGE)
    return 0
  config, flags = _parse(argv)
  logging.basicConfig(format='%(message)s')
  os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '2')

  import jax

  if config.num_cpu_devices < 1:
    raise config_utils.UserError(
      f'num_cpu_devices={config.num_cpu_devices}: it must be at least 1'
    )
  if config.num_cpu_devices != 1:
    jax.config.update('jax_num_cpu_devices', config.num_cpu_devices)

  from ijckd_jax import hosts

  hosts.initialize(
    coordinator=flags.coordinator,
    num_processes=flags.num_processes,
    process_id=flags.process_id,
    heartbeat_timeout_seconds=config.heartbeat_timeout_seconds,
  )
  if hosts.is_primary():  # The others would only say the same.
    logging.getLogger('ijckd_jax').setLevel(logging.INFO)
  if jax.default_backend() == 'cpu':
    cpu_memory.keep_freed()

  from ijckd_jax import compilation_cache
  from ijckd_jax import loop
  from ijckd_jax import report
  from ijckd_jax import train

  compilation_cache.enable(config.compilation_cache)
  try:
    result = train.train_and_evaluate(
      config, flags.workdir, overwrite=flags.overwrite
    )
  except loop.Interrupted as error:
    print(error, file=sys.stderr)
    return 128 + error.number  # As shells have it, and batch systems know.
  except loop.Diverged as error:
    print(f'error: {error}', file=sys.stderr)
    return 1
  except OSError as error:
    print(
      f'error: {error}; once that is mended, the same command continues from '
      f'the last checkpoint in {flags.workdir}',
      file=sys.stderr,
    )
    return 1
  if hosts.is_primary():
    print(report.table(result.summary))
    where = flags.workdir
    print(f'\n{where}/report.md shows more; the student is in {where}/bundle')
  return 0


def _parse(argv: list[str]):
  """Returns the config and the flags beside it.

  Raises:
    config_utils.UserError: a flag, the file or a field is wrong; in one line.
  """
  parser = config_utils.ArgumentParser(
    prog='python -m ijckd_jax.main', add_help=False, allow_abbrev=False
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
