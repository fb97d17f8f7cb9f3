"""What the commands that write a file or a bundle do about --output."""

import argparse
from collections.abc import Callable

from etils import epath

from ijckd_jax.runtime import config_utils


def add_output(parser: argparse.ArgumentParser, help_text: str) -> None:
  """Adds the flag that says where a command writes."""
  parser.add_argument(
    '--output', type=config_utils.expand, required=True, help=help_text
  )


def add_overwrite(parser: argparse.ArgumentParser) -> None:
  """Adds the flag that lets a command replace what is there."""
  parser.add_argument(
    '--overwrite', action='store_true', help='replace what is there'
  )


def check_free(path: epath.Path, overwrite: bool) -> None:
  """Raises where something is in the way."""
  if path.exists() and not overwrite:
    raise config_utils.UserError(
      f'{path} is already there: give --overwrite to replace it'
    )


def check_bundle(folder: epath.Path, overwrite: bool) -> None:
  """Raises unless a bundle can be written there, and nothing else is lost."""
  check_free(folder, overwrite)
  if not folder.exists():
    return

  from ijckd_jax.bundles import bundles

  there = [path.name for path in folder.iterdir()] if folder.is_dir() else ['']
  foreign = [name for name in there if name not in bundles.FILES]
  if foreign or bundles.SPEC_FILE not in there:
    what = f' (it has {foreign[0]})' if foreign and foreign[0] else ''
    raise config_utils.UserError(
      f'{folder} is no bundle alone{what}, so it is not replaced: give another '
      '--output'
    )


def write(save: Callable[[], object], path: epath.Path | str) -> None:
  """Calls `save`; a disk that cannot be written is the user's to mend."""
  try:
    save()
  except OSError as error:
    raise config_utils.UserError(
      f'cannot write {path}: {config_utils.reason(error)}'
    ) from error
