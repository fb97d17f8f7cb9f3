"""Flags of the sweep: which configs, and which fields have which values."""

import itertools
import math
import re
import zlib

import ml_collections

from ijckd_jax.runtime import config_utils

MAX_RUNS = 10_000


def configs_of(references, over, overrides):
  """Returns the config of every run by its name.

  Args:
    references: of configs, as config_utils.load takes them.
    over: FIELD=VALUES of each field that is swept.
    overrides: `--config.FIELD=VALUE`, as config_utils.apply_flags takes them.

  Raises:
    config_utils.UserError: a config, a field or a value is wrong, or there are
      two runs of one name.
  """
  swept = _swept(over, overrides)
  number = len(references) * math.prod(map(len, swept.values()))
  if number > MAX_RUNS:
    raise config_utils.UserError(f'{number} runs are more than {MAX_RUNS}')
  configs = {}
  for reference in references:
    loaded = config_utils.load(reference)
    for values in itertools.product(*swept.values()):
      config = loaded.copy_and_resolve_references()
      chosen = [f'{k}={v}' for k, v in zip(swept, values, strict=True)]
      try:
        config_utils.apply_flags(config, overrides)
        for one in chosen:
          _set(config, one)
      except config_utils.UserError as error:
        where = f'{reference}: ' if len(references) > 1 else ''
        raise config_utils.UserError(f'{where}{error}') from error
      name = ','.join(map(_as_name, (reference, *chosen)))
      if name in configs:
        raise config_utils.UserError(f'{name} is the same run twice')
      configs[name] = config
  return configs


def _set(config, chosen: str) -> None:
  """Sets a field of a config to one of its values, as FIELD=VALUE.

  Raises:
    config_utils.UserError: there is no such field, or the value is not one.
  """
  field, _, value = chosen.partition('=')
  if isinstance(config.get(field), ml_collections.ConfigDict):
    raise config_utils.UserError(
      f'--over {chosen}: {field} has fields of its own: give --config '
      f'NAME:{field}={value} for each of them'
    )
  try:
    config_utils.apply_flags(config, [f'--config.{chosen}'])
  except config_utils.UserError as error:
    hint = '; a range FIRST..LAST stands alone' if '..' in value else ''
    raise config_utils.UserError(f'--over {chosen}: {error}{hint}') from error


def _swept(over, overrides) -> dict[str, list[str]]:
  """Returns the values of each field that is swept, as they are written."""
  fixed = {
    flag.removeprefix('--config.').partition('=')[0] for flag in overrides
  }
  swept = {}
  for given in over:
    field, separator, values = given.partition('=')
    if not separator or not field:
      raise config_utils.UserError(
        f'--over {given}: give FIELD=VALUES, such as seed=0..9'
      )
    if field in swept or field in fixed:
      other = '--over ' if field in swept else '--config.'
      raise config_utils.UserError(
        f'--over {given}: {other}{field}= sets that field too'
      )
    swept[field] = _values(given, values)
  return swept


def _values(given: str, text: str) -> list[str]:
  """Returns the values of a range, or of a list with commas."""
  if not text:
    raise config_utils.UserError(f'--over {given}: give at least one value')
  found = re.fullmatch(r'(-?\d+)\.\.(-?\d+)', text)
  if not found:
    return _split(text)
  first, last = int(found[1]), int(found[2])
  if last < first:
    raise config_utils.UserError(
      f'--over {given}: the range goes backwards; give {last}..{first}'
    )
  if last - first >= MAX_RUNS:
    raise config_utils.UserError(
      f'--over {given}: these are more than {MAX_RUNS} runs'
    )
  return list(map(str, range(first, last + 1)))


def _split(text: str) -> list[str]:
  """Returns what stands between commas that are in no brackets or quotes."""
  parts, depth, quote = [''], 0, ''
  for char in text:
    if char == ',' and not depth and not quote:
      parts.append('')
      continue
    parts[-1] += char
    if quote:
      quote = '' if char == quote else quote
    elif char in '\'"':
      quote = char
    else:
      depth += (char in '([{') - (char in ')]}')
  return parts


def _as_name(text: str) -> str:
  """Returns text as a part of a file's name, which differs if the text does."""
  name = re.sub(r'[^\w.,=+-]', '_', text, flags=re.ASCII).lstrip('.')[:80]
  if name == text.replace(':', '_'):
    return name
  return f'{name}~{zlib.crc32(text.encode()):08x}'
