"""Trains many runs by one command, and compares them in a table.

ijckd sweep --config digits --over seed=0..9 --workdir runs/seeds
"""

import sys

from ijckd_jax.commands import sweep_flags
from ijckd_jax.runtime import config_utils
from ijckd_jax.runtime import progress

PROG = 'python -m ijckd_jax sweep'
USAGE = """\
usage: {prog} --config NAME[:key=value,...] [--config ...] --workdir DIR
         [--over FIELD=VALUES ...] [--jobs N] [--config.FIELD=VALUE ...]

Trains every config with every combination of the values, each run in a folder
of its own in DIR, as ijckd train does. Runs whose teachers are the same train
that teacher once, in DIR/teacher_*. At the end there is a table, a row for each
setting: means over the seeds, and differences to the first setting in pairs of
the same seed. The same command continues what was stopped, and repeats nothing
that is finished. Machines that see DIR at the same path can share a sweep.

  --config NAME        as ijckd train takes it; give several to compare them
  --over FIELD=VALUES  a field and what it is set to: seed=0..9 (both ends
                       included), or values with commas between them, each as
                       --config.FIELD=VALUE takes it; give several for all
                       combinations
  --config.FIELD=VALUE sets a field of all runs
  --workdir DIR        the sweep's folder: NAME/ is a run, NAME.log what it
                       printed, NAME.json its config; sweep.md is the table
  --jobs N             runs that are made side by side (default 1); each gets
                       its share of the CPU's cores
  --help               this text

Exit codes: 0 all runs are finished, or still at work in other processes; 1 a
run failed; 2 a wrong request, and nothing was started; 130 and 143 stopped by
SIGINT or SIGTERM: the runs have saved, or the last line names those that have
not, and the same command continues."""


def main(argv: list[str], prog: str = PROG) -> int:
  """Runs the command; returns its exit code."""
  if '--help' in argv or '-h' in argv:
    print(USAGE.format(prog=prog))
    return 0
  parser = config_utils.ArgumentParser(
    prog=prog, add_help=False, allow_abbrev=False
  )
  parser.add_argument('--config', action='append', required=True)
  parser.add_argument('--over', action='append', default=[])
  parser.add_argument('--workdir', required=True)
  parser.add_argument('--jobs', type=int, default=1)
  flags, overrides = parser.parse_known_args(argv)
  configs = sweep_flags.configs_of(flags.config, flags.over, overrides)
  progress.log_to_stderr()

  from ijckd_jax.training import loop
  from ijckd_jax.training import sweep

  try:
    outcome = sweep.run(configs, flags.workdir, jobs=flags.jobs)
  except loop.Interrupted as error:
    print(config_utils.printable(error), file=sys.stderr)
    return 128 + error.number
  print(outcome.table)
  print(f'the table is in {flags.workdir}/{sweep.TABLE}')
  if outcome.held:
    said = (
      f'still at work elsewhere: {", ".join(outcome.held)}; the same command '
      'shows them when they are finished'
    )
    print(config_utils.printable(said), file=sys.stderr)
  if outcome.failed:
    said = f'error: failed: {", ".join(outcome.failed)}'
    print(config_utils.printable(said), file=sys.stderr)
  return 1 if outcome.failed else 0
