"""The command `ijckd`: names the commands, and runs the one that is asked for.

  ijckd COMMAND ...
  python -m ijckd_jax COMMAND ...

Each command is the `main` of a module, which is imported when it runs, so that
the help is there at once.
"""

from collections.abc import Sequence
import functools
import importlib
import sys

from ijckd_jax.runtime import streams

COMMANDS = {
  'train': 'train a teacher, and distil a student from it',
  'sweep': 'train many: seeds, settings, methods, as one command',
  'evaluate': 'measure the accuracy of a student or a teacher',
  'probe': 'measure what features are worth, by a linear probe',
  'predict': 'say what is on pictures',
  'export': 'write a student as a file that runs by itself',
  'bounds': "measure the bound on a student's error",
  'prepare': 'prepare a data set, or your own images',
  'models': 'list the backbones, with their sizes',
  'estimate': 'estimate what a training step costs on a TPU',
  'weights': 'import weights from PyTorch, or export them',
  'convert': 'make any PyTorch classifier a teacher',
}
HELP, VERSION = ('-h', '--help', 'help'), ('-V', '--version')


def usage(prog: str) -> str:
  """Returns the help, with a line for each command."""
  lines = [f'  {name:<10}{line}' for name, line in COMMANDS.items()]
  return '\n'.join(
    [f'usage: {prog} COMMAND ...', '', *lines, '']
    + [f'{prog} COMMAND --help says more, {prog} --version the version']
  )


def main(argv: list[str], prog: str = 'ijckd') -> int | None:
  """Runs a command; returns its exit code.

  Args:
    argv: the command's name, and its arguments.
    prog: how the user called this program, for usage and messages.

  Raises:
    config_utils.UserError: there is no such command, or its arguments are
      wrong.
  """
  name, *rest = argv or ['']
  if not name:  # A script that lost its command must not go on.
    print(usage(prog), file=sys.stderr)
    return 2
  if name in HELP:
    print(usage(prog))
    return 0
  if name in VERSION:
    from importlib import metadata

    print(f'ijckd_jax {metadata.version("ijckd_jax")}')
    return 0
  if name not in COMMANDS:
    from ijckd_jax.runtime import config_utils

    known = [*COMMANDS, *(flag for flag in HELP + VERSION if len(flag) > 2)]
    raise config_utils.unknown('command', name, known)
  place = 'main' if name == 'train' else f'commands.{name}'
  module = importlib.import_module(f'ijckd_jax.{place}')
  return module.main(rest, prog=f'{prog} {name}')


def run(prog: str, user_path: Sequence[str] = ()) -> None:
  """Runs the command that `sys.argv` names, and exits.

  Args:
    prog: see `main`.
    user_path: see config_utils.user_path.
  """
  streams.use_utf8()
  streams.prepare()
  argv = sys.argv[1:]
  if not argv or argv[0] in HELP + VERSION:
    sys.exit(streams.guard(lambda: main(argv, prog)))

  from ijckd_jax.runtime import config_utils  # Takes longer than the help may.

  config_utils.user_path.extend(user_path)
  config_utils.run_command(functools.partial(main, prog=prog))


def console() -> None:
  """Runs the program `ijckd`, and exits."""
  # Backbones, methods and the like of the user's own are found in the working
  # directory, as by `python -m`.
  run('ijckd', user_path=[] if sys.flags.safe_path else [''])


if __name__ == '__main__':
  run('python -m ijckd_jax')
