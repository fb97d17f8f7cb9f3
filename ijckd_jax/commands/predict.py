"""Says what is on pictures.

  ijckd predict --bundle DIR picture.jpg folder '*.png'

DIR is a bundle's or a run's folder, or a file that `ijckd export` wrote.
Pictures may be of any size; folders are searched. One that cannot be read is
named on standard error (with --json, in its entry), and the exit code is 1.
"""

import argparse
import json
import sys

from ijckd_jax.runtime import config_utils

PROG = 'python -m ijckd_jax predict'
MAX_NAME = 24  # Columns for a class's name; a longer name shifts the next ones.


def main(argv: list[str], prog: str = PROG) -> int:
  """Runs the command; returns its exit code."""
  flags = _parser(prog).parse_args(argv)
  for name in ('top', 'batch_size'):
    config_utils.check_positive(f'--{name}', getattr(flags, name))

  from ijckd_jax.deploy import pictures
  from ijckd_jax.deploy import sessions

  paths = pictures.find(flags.pictures)
  session = sessions.load(flags.bundle, trust_code=flags.trust_code)
  names = sessions.class_names(session, flags.bundle)
  widths = [
    max(len(_shown(path)) for path in paths),
    min(max((len(_shown(name)) for name in names), default=0), MAX_NAME),
  ]
  found = []
  num_bad = 0
  for read, probabilities in pictures.classify(
    session, paths, flags.batch_size
  ):
    if probabilities.shape[1] != len(names):
      raise config_utils.UserError(
        f'{flags.bundle} tells {probabilities.shape[1]} classes apart, but '
        f'names {len(names)}'
      )
    entries = [
      pictures.entry(picture, row, names, flags.top)
      for picture, row in zip(read, probabilities, strict=True)
    ]
    num_bad += sum('error' in entry for entry in entries)
    for picture in read:
      if picture.warning:
        print(
          f'warning: {_shown(picture.path)}: {picture.warning}', file=sys.stderr
        )
    if flags.json:
      found += entries
    else:
      _print(entries, widths)
  if flags.json:
    print(json.dumps(found, indent=2))
  if num_bad:
    print(f'{num_bad} of {len(paths)} pictures cannot be read', file=sys.stderr)
  return 1 if num_bad else 0


def _parser(prog: str) -> argparse.ArgumentParser:
  parser = config_utils.ArgumentParser(
    prog=prog,
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  parser.add_argument(
    '--bundle', required=True, help='a folder, or an exported file'
  )
  parser.add_argument(
    'pictures', nargs='+', metavar='PICTURE', help='file, folder or glob'
  )
  parser.add_argument('--top', type=int, default=3, help='classes to name')
  parser.add_argument('--batch_size', type=int, default=64)
  parser.add_argument('--json', action='store_true', help='print JSON')
  parser.add_argument(
    '--trust_code',
    action='store_true',
    help='it may name code outside the package, which is imported, or hold '
    'programs',
  )
  return parser


def _print(entries, widths) -> None:
  """Prints a line for each picture: its path, and its likeliest classes."""
  for entry in entries:
    path = _shown(entry['picture'])
    if 'error' in entry:
      print(f'error: {path}: {entry["error"]}', file=sys.stderr)
      continue
    cells = [path.ljust(widths[0])] + [
      f'{found["probability"]:6.1%} {_shown(found["name"]).ljust(widths[1])}'
      for found in entry['classes']
    ]
    print('  '.join(cells).rstrip())
  sys.stdout.flush()


def _shown(text) -> str:
  """Returns text without what moves a terminal's cursor, or cannot be printed.

  Names of files are bytes, and may hold line breaks and escape sequences.
  """
  text = ''.join(
    char if char.isprintable() else char.encode('unicode_escape').decode()
    for char in str(text)
  )
  encoding = sys.stdout.encoding or 'utf-8'
  return text.encode(encoding, 'backslashreplace').decode(encoding)
