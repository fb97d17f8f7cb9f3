"""Says what is on pictures.

  ijckd predict --bundle DIR picture.jpg folder '*.png'

DIR is a bundle's or a run's folder, or a file that `ijckd export` wrote.
Pictures may be of any size; folders are searched.
"""

import argparse
import json

import numpy as np

from ijckd_jax import config_utils

PROG = 'python -m ijckd_jax.predict'


def main(argv: list[str], prog: str = PROG) -> None:
  """Runs the command."""
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
  flags = parser.parse_args(argv)
  for name in ('top', 'batch_size'):
    config_utils.check_positive(f'--{name}', getattr(flags, name))

  from ijckd_jax.deploy import checks
  from ijckd_jax.deploy import pictures
  from ijckd_jax.deploy import sessions

  paths = pictures.find(flags.pictures)
  session = sessions.load(flags.bundle, trust_code=flags.trust_code)
  names = sessions.class_names(session, flags.bundle)
  found = []
  for chosen, images in pictures.batches(
    paths,
    session.image_shape,
    sessions.resize_of(session.metadata),
    flags.batch_size,
  ):
    _, probabilities = session(checks.as_taken(images, session.takes))
    if probabilities.shape[1] != len(names):
      raise config_utils.UserError(
        f'{flags.bundle} tells {probabilities.shape[1]} classes apart, but '
        f'names {len(names)}'
      )
    for path, row in zip(chosen, probabilities, strict=True):
      best = np.argsort(-row, kind='stable')[: flags.top]
      classes = [
        {'class': int(i), 'name': names[i], 'probability': float(row[i])}
        for i in best
      ]
      found.append({'picture': str(path), 'classes': classes})
  print(json.dumps(found, indent=2) if flags.json else _table(found))


def _table(found) -> str:
  """Returns a line for each picture: its path, and its likeliest classes."""
  cells = [
    [config_utils.printable(x['picture'])]
    + [
      f'{c["probability"]:6.1%} {config_utils.short(c["name"])}'
      for c in x['classes']
    ]
    for x in found
  ]
  widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
  return '\n'.join(
    '  '.join(map(str.ljust, row, widths)).rstrip() for row in cells
  )


if __name__ == '__main__':
  config_utils.run_command(main)
