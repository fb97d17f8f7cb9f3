"""Names, durations and typed fields: what stands between a config and code."""

import argparse
from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Mapping
from collections.abc import Sequence
import contextlib
import dataclasses
import difflib
import errno
import importlib
import json
import logging
import math
import os
import pathlib
import re
import runpy
import sys
import traceback
from typing import Any
from typing import NoReturn

from absl import flags
import ml_collections
from ml_collections import config_flags

from ijckd_jax.runtime import streams

# Words of libraries whose errors are no MemoryError; and JAX's where what it
# reads is damaged.
_NO_MEMORY = ('RESOURCE_EXHAUSTED', 'allocate')
INVALID = 'INVALID_ARGUMENT'
# What `auto` means in the fields AUTOMATIC, which hold whole numbers.
AUTO = 0
AUTOMATIC = ('method.factor',)
# Where modules that a user names are found, after all others. The program
# `ijckd` puts the working directory here rather than on Python's own path, on
# which JAX and others look for modules that need not be installed.
user_path: list[str] = []
# As etils' own, which type checkers do not see.
PathLike = str | os.PathLike[str]


class UserError(ValueError):
  """A request that cannot be met; the message says what is allowed."""


def printable(value: object) -> str:
  """Returns what a value says in one line, which a terminal shows as text.

  Names and paths come from anybody: no line break, no escape sequence and no
  mark of the writing direction is left in them.
  """
  return ''.join(
    char if char.isprintable() else ' ' if char.isspace() else '?'
    for char in str(value)
  )


def short(value: object) -> str:
  """Returns the first 120 characters of `printable(value)`, in one line."""
  line = ' '.join(printable(value).split())
  if not line and isinstance(value, BaseException):
    line = type(value).__name__
  return line if len(line) <= 120 else f'{line[:117]}...'


class LineFormatter(logging.Formatter):
  """Formats a log message as one line that a terminal shows as text."""

  def formatMessage(self, record: logging.LogRecord) -> str:
    return printable(super().formatMessage(record))


def reason(error: OSError) -> str:
  """Returns why a file could not be written, without a name of our own.

  Files are written under a hidden name first, which says nothing to users.
  """
  hidden = os.path.basename(str(error.filename or '')).startswith('.')
  return str(error.strerror if hidden else error)


def unknown(kind: str, name: str, known: Sequence[str]) -> UserError:
  """Returns the error for a `name` that is not among the `known` ones."""
  nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
  hint = f'; did you mean {nearest[0]!r}?' if nearest else ';'
  return UserError(
    f'unknown {kind} {name!r}{hint} known: {", ".join(sorted(known))}'
  )


def check_positive(name: str, value: float) -> None:
  """Raises UserError unless a number is positive and finite."""
  if not (math.isfinite(value) and value > 0):
    raise UserError(f'{name}={value}: it must be positive and finite')


def use_user_path() -> None:
  """Lets what a user names be imported from `user_path`."""
  sys.path.extend(path for path in user_path if path not in sys.path)


def resolve(kind: str, name: str, table: Mapping[str, object]) -> Any:
  """Returns what `name` stands for.

  Args:
    kind: what is looked for ('backbone', 'method', ...), for the message.
    name: a key of `table`, or `package.module:Name` for an object outside it.
    table: known names; a value that is a string is itself such a reference,
      imported only when it is asked for.

  Raises:
    UserError: the name is unknown, or what it points at cannot be imported.
  """
  target = table.get(name)
  if target is not None and not isinstance(target, str):
    return target
  reference = target or name
  module_name, separator, attribute = reference.partition(':')
  if not separator or not all(module_name.split('.')):
    raise UserError(
      f'{unknown(kind, name, list(table))}; or package.module:Name'
    )
  if not target:
    use_user_path()
  try:
    module = importlib.import_module(module_name)
  except ModuleNotFoundError as error:
    if not f'{module_name}.'.startswith(f'{error.name}.'):
      raise  # The module is there; something that it imports is not.
    raise UserError(
      f'{kind} {name!r}: there is no module {module_name!r}; it must be '
      'importable from where this command runs'
    ) from error
  if not hasattr(module, attribute):
    known = [key for key in vars(module) if not key.startswith('_')]
    raise unknown(f'{kind} in {module_name}', attribute, known)
  return getattr(module, attribute)


def reference(value: object, table: Mapping[str, object]) -> str:
  """Returns the name under which `resolve` finds the class of `value`."""
  cls = type(value)
  for name, known in table.items():
    if known is cls:
      return name
  return f'{cls.__module__}:{cls.__qualname__}'


def parse_arg(
  arg: str | None, **defaults: str | tuple[str, ...]
) -> ml_collections.ConfigDict:
  """Reads a config file's argument, `key=value,key=value`.

  Args:
    arg: what stands after the colon in `--config FILE:ARG`, or None.
    **defaults: every key that the file takes, with its default; a tuple has all
      values that the key takes, the default first.

  Raises:
    UserError: a part is not `key=value`, or its key is not among `defaults`, or
      its value not in the tuple.
  """
  choices = {
    k: v if isinstance(v, tuple) else (v,) for k, v in defaults.items()
  }
  values = {key: given[0] for key, given in choices.items()}
  for part in (arg or '').split(','):
    if not part:
      continue
    key, separator, value = part.partition('=')
    if not separator:
      raise UserError(
        f'config argument {part!r}: give key=value, with a key of '
        f'{", ".join(defaults)}'
      )
    if key not in defaults:
      raise unknown('config argument', key, list(defaults))
    if isinstance(defaults[key], tuple) and value not in choices[key]:
      raise unknown(key, value, choices[key])
    values[key] = value
  return ml_collections.ConfigDict(values)


def section(cls: type, name: str) -> ml_collections.ConfigDict:
  """Returns a config section: `name`, and the fields of `cls` by default."""
  values = {field.name: field.default for field in _fields(cls, name)}
  return ml_collections.ConfigDict({'name': name, **values})


def _fields(cls: type, name: str) -> tuple[dataclasses.Field, ...]:
  """Returns the fields of a method or data set that a name stands for."""
  if not (isinstance(cls, type) and dataclasses.is_dataclass(cls)):
    raise UserError(
      f'{name!r} is no dataclass, as methods and data sets must be'
    )
  return dataclasses.fields(cls)


def instantiate(kind: str, cls: type, config: Mapping[str, object]) -> Any:
  """Returns `cls` with the fields that a config section holds.

  Raises:
    UserError: the section has a field that `cls` does not know.
  """
  fields = {field.name: field for field in _fields(cls, str(config['name']))}
  values = {key: value for key, value in config.items() if key != 'name'}
  for key in values:
    if key not in fields:
      raise UserError(
        f'{kind} {config["name"]!r} has no field {key!r}; it has: '
        f'{", ".join(fields) or "none"} (choose another {kind} by '
        f'--config FILE:{kind}=NAME, which brings its own fields)'
      )
  return cls(**values)


def flatten(tree: Mapping[str, object], prefix: str = '') -> dict[str, object]:
  """Returns nested mappings as one, with dotted keys."""
  flat = {}
  for key, value in tree.items():
    if isinstance(value, Mapping | ml_collections.ConfigDict):
      flat.update(flatten(value, f'{prefix}{key}.'))
    else:
      flat[f'{prefix}{key}'] = value
  return flat


def shipped_configs() -> dict[str, pathlib.Path]:
  """Returns the file of each config that the package ships, by its name.

  An installed package holds them as `ijckd_jax/configs`; in a checkout, that
  folder stands beside the package.
  """
  package = pathlib.Path(__file__).parents[1]
  folder = package / 'configs'
  if not folder.is_dir():
    folder = package.parent / 'configs'
  return {path.stem: path for path in sorted(folder.glob('[!_]*.py'))}


def _config_file(name: str) -> str:
  """Returns the path of the config file that a name or a path stands for."""
  shipped = shipped_configs()
  if not name.endswith(('.py', '.json')) and '/' not in name:
    if name not in shipped:
      raise UserError(
        f'{unknown("config", name, list(shipped))}; or a path, which ends in '
        '.py or has a slash'
      )
    return str(shipped[name])
  if not os.path.isfile(name):
    stem, hint = pathlib.PurePath(name).stem, ''
    if stem in shipped:
      hint = f'; the package ships one, --config {stem}'
    raise UserError(f'there is no config file {name!r}{hint}')
  return name


def _split(reference: str) -> tuple[str, str, str]:
  """Returns name, colon and argument of `NAME:ARG`; paths may have colons."""
  if os.path.isfile(expand(reference)):
    return reference, '', ''
  for colon in re.finditer(':', reference):
    name, arg = reference[: colon.start()], reference[colon.end() :]
    if os.path.isfile(expand(name)):
      return name, ':', arg
  return reference.partition(':')


def load(reference: str) -> ml_collections.ConfigDict:
  """Returns the config that a config file gives, or that a JSON file holds.

  A config file is Python code, and it is run.

  Args:
    reference: `NAME`, or `NAME:ARG` for a `get_config` that takes an argument.
      A name that ends in `.py` or `.json` or contains a slash is a path; any
      other name is that of a shipped config, whatever the working directory
      holds. A `.json` file has all fields of one config, as `to_json` writes
      them.

  Raises:
    UserError: there is no such config, or its code fails.
  """
  name, separator, arg = _split(reference)
  path = _config_file(expand(name))
  if path == expand(name):
    use_user_path()
  if path.endswith('.json'):
    if separator:
      raise UserError(f'{path} is JSON, which takes no argument {arg!r}')
    return _read_json(path)
  try:
    get_config = runpy.run_path(path).get('get_config')
    if get_config is None:
      raise UserError(f'{path} has no get_config()')
    config = get_config(arg) if separator else get_config()
  except UserError:
    raise
  except Exception as error:  # It is the user's code: anything may be raised.
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame.lineno for frame in frames if frame.filename == path]
    line = getattr(error, 'lineno', None) or (lines[-1] if lines else '?')
    raise UserError(
      f'{path}, line {line}: {type(error).__name__}: {error}'
    ) from error
  if not isinstance(config, ml_collections.ConfigDict):
    raise UserError(
      f'{path}: get_config() must return the ml_collections.ConfigDict that '
      f'experiment.default_config() makes, not {type(config).__name__}'
    )
  return config


def _read_json(path: str) -> ml_collections.ConfigDict:
  """Returns the config that a JSON file holds."""
  try:
    return from_json(pathlib.Path(path).read_bytes())
  except (OSError, RecursionError, ValueError) as error:
    raise UserError(f'{path} cannot be read: {short(error)}') from error


def from_json(text: str | bytes) -> ml_collections.ConfigDict:
  """Returns the config that `to_json` has written.

  Raises:
    ValueError: the text is something else.
  """
  content = json.loads(text)
  if not isinstance(content, dict):
    raise ValueError('this is no config: give a JSON object')
  return ml_collections.ConfigDict(_with_tuples(content))


def _with_tuples(value: Any) -> Any:
  """Returns JSON with tuples for its lists: so configs have them."""
  if isinstance(value, dict):
    return {key: _with_tuples(one) for key, one in value.items()}
  return tuple(map(_with_tuples, value)) if isinstance(value, list) else value


def parse_value(text: str, like: Any) -> Any:
  """Returns a bool, int, float or string out of text, as `like` is one.

  Raises:
    ValueError: the text is none of that type.
  """
  if not isinstance(like, bool):
    return type(like)(text)
  # As the flags of configs are read.
  known = {'true': True, '1': True, 'false': False, '0': False}
  if text.lower() not in known:
    raise ValueError(f'{text!r} is neither true nor false')
  return known[text.lower()]


def apply_flags(
  config: ml_collections.ConfigDict, overrides: Sequence[str]
) -> None:
  """Sets the fields of a config that a command line names.

  Args:
    config: is changed.
    overrides: `--config.FIELD=VALUE`, or these two apart.

  Raises:
    UserError: a flag is not of this form, a field is not there, or a value is
      not of the field's type.
  """
  for flag in overrides:
    if flag.startswith('--config.'):
      _check_field(config, flag.removeprefix('--config.').partition('=')[0])
    elif flag.startswith('-'):
      raise UserError(f'unknown flag {flag!r} (see --help)')
  values = flags.FlagValues()
  program = ['', *map(_without_auto, overrides)]
  config_flags.DEFINE_config_dict(
    'config', config, flag_values=values, sys_argv=program
  )
  try:
    rest = values(program)[1:]
  except (flags.Error, TypeError, ValueError) as error:
    raise UserError(' '.join(str(error).split())) from error
  if rest:
    raise UserError(f'unexpected {rest[0]!r} (see --help)')


def _without_auto(flag: str) -> str:
  """Returns a flag with the number that `auto` stands for, if it says so."""
  for name in AUTOMATIC:
    if flag == f'--config.{name}=auto':
      return f'--config.{name}={AUTO}'
  return flag


def override(
  config: ml_collections.ConfigDict, values: Mapping[str, object]
) -> None:
  """Sets fields of a config by their dotted names.

  Raises:
    UserError: there is no such field, or the value is of another type.
  """
  for name, value in values.items():
    _check_field(config, name)
    if name in AUTOMATIC and value == 'auto':
      value = AUTO
    try:
      config.update_from_flattened_dict({name: value})
    except (TypeError, ValueError) as error:
      raise UserError(f'{name}={value!r}: {error}') from error


def _check_field(config: Mapping[str, object], name: str) -> None:
  """Raises unless a config has a field of that dotted name."""
  known = list(flatten(config))
  if name not in known:
    section = name.rpartition('.')[0]
    near = [key for key in known if key.rpartition('.')[0] == section]
    raise unknown('config field', name, near or known)


def to_json(config: ml_collections.ConfigDict) -> str:
  """Returns the config as stable, readable JSON."""
  return json.dumps(config.to_dict(), indent=2, sort_keys=True) + '\n'


def differences(
  old: Mapping[str, object], new: Mapping[str, object]
) -> list[str]:
  """Returns a line `field: old -> new` for every field that differs."""
  old = flatten(json.loads(json.dumps(old)))
  new = flatten(json.loads(json.dumps(new)))
  return [
    f'{key}: {old.get(key, "(none)")!r} -> {new.get(key, "(none)")!r}'
    for key in sorted(old.keys() | new.keys())
    if old.get(key) != new.get(key)
  ]


class ArgumentParser(argparse.ArgumentParser):
  """argparse, with one line instead of a page for a mistake."""

  def error(self, message: str) -> NoReturn:
    raise UserError(f'{message} (see {self.prog} --help)')


def run_command(command: Callable[[list[str]], int | None]) -> None:
  """Runs a command on `sys.argv` and exits.

  A UserError becomes one line on standard error and exit code 2; what the
  machine or the install lacks becomes one line and exit code 1.
  """
  streams.prepare()
  # The libraries' own warnings; of a damaged checkpoint a page for each array.
  for name in ('absl', 'asyncio', 'root'):
    logging.getLogger(name).setLevel(logging.CRITICAL)
  # Python's process that frees what a killed worker had in shared memory takes
  # these options, and would warn that it had to.
  sys.warnoptions.append('ignore:resource_tracker')
  if sys.unraisablehook is sys.__unraisablehook__:  # And not a test's.
    sys.unraisablehook = drop_closed_loops

  def answer() -> int | None:
    try:
      return command(sys.argv[1:])
    except UserError as error:
      streams.say(f'error: {printable(error)}')
      return 2
    except Exception as error:
      cause = cause_outside(error)
      if not cause:
        raise
      streams.say(f'error: {printable(cause)}')
      return 1

  sys.exit(streams.guard(answer))


def drop_closed_loops(
  unraisable: Any, show: Callable[[Any], object] = sys.__unraisablehook__
) -> None:
  """Shows what could not be raised, but for TensorStore's late answers.

  After a checkpoint that could not be written, on a full disk say, TensorStore
  answers for each further array to an event loop that Orbax has closed.
  """
  if str(unraisable.exc_value) != 'Event loop is closed':
    show(unraisable)


def cause_outside(error: Exception) -> str:
  """Returns what the machine or the install lacks, or '' if that is no cause.

  No file and no request is to blame for such an error: memory or open files
  ran out, a device failed, or a module is missing.
  """
  said = short(error)
  if is_no_memory(error):
    return (
      f'the memory does not suffice ({said}): end other programs, or take '
      'smaller batches'
    )
  if isinstance(error, ImportError):
    return f'a module that is needed cannot be imported ({said}): install it'
  if isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE):
    return f'too many files are open ({said}): allow more, by ulimit -n'
  if type(error).__name__ == 'JaxRuntimeError' and INVALID not in str(error):
    return f'JAX has failed: {" ".join(str(error).split())}'
  return ''


def is_no_memory(error: Exception) -> bool:
  """Returns whether memory ran out, in Python, in JAX or in PyTorch."""
  return isinstance(error, MemoryError) or any(
    words in str(error) for words in _NO_MEMORY
  )


def raise_outside(error: Exception) -> None:
  """Raises an error again if no data is to blame for it: see `cause_outside`.

  For those who take whatever else is raised for a sign of damaged data.
  """
  if cause_outside(error):
    raise error


@contextlib.contextmanager
def blame(said: str) -> Iterator[None]:
  """Makes a UserError of whatever its block raises: `said`, and the reason.

  For blocks that read what others have made, which can be wrong in more ways
  than a list could name. `raise_outside` raises what no data is to blame for.
  """
  try:
    yield
  except Exception as error:
    raise_outside(error)
    raise UserError(f'{said}: {short(error)}') from error


def expand(path: str | os.PathLike) -> str:
  """Returns a path that a user gave, with the home folder in place of `~`."""
  return os.path.expanduser(os.fspath(path))
