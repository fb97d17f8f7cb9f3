"""The objectives by name; `base.Method` says what each must be.

A method of your own is a class like these, or any class with the same members,
and is named in a config as `package.module:Name`.
"""

from collections.abc import Mapping

import ml_collections

from ijckd_jax.distillation.methods import added
from ijckd_jax.distillation.methods import base
from ijckd_jax.runtime import config_utils

METHODS = {
  'at': 'ijckd_jax.distillation.methods.at:Method',
  'atsc': 'ijckd_jax.distillation.methods.atsc:Method',
  'ce': 'ijckd_jax.distillation.methods.ce:Method',
  'crd': 'ijckd_jax.distillation.methods.crd:Method',
  'dist': 'ijckd_jax.distillation.methods.dist:Method',
  'dkd': 'ijckd_jax.distillation.methods.dkd:Method',
  'fitnet': 'ijckd_jax.distillation.methods.fitnet:Method',
  'ijckd': 'ijckd_jax.distillation.methods.ijckd:Method',
  'kd': 'ijckd_jax.distillation.methods.kd:Method',
  'mlkd': 'ijckd_jax.distillation.methods.mlkd:Method',
  'pefd': 'ijckd_jax.distillation.methods.pefd:Method',
  'reviewkd': 'ijckd_jax.distillation.methods.reviewkd:Method',
  'rkd': 'ijckd_jax.distillation.methods.rkd:Method',
  'simkd': 'ijckd_jax.distillation.methods.simkd:Method',
  'sp': 'ijckd_jax.distillation.methods.sp:Method',
  'srd': 'ijckd_jax.distillation.methods.srd:Method',
  'srrl': 'ijckd_jax.distillation.methods.srrl:Method',
  'vid': 'ijckd_jax.distillation.methods.vid:Method',
  'vkd': 'ijckd_jax.distillation.methods.vkd:Method',
  'wttm': 'ijckd_jax.distillation.methods.wttm:Method',
}
# The labels' weight in a method that is added to another: it has them already.
LABELS = 'cross_entropy_weight'


def get(name: str) -> type:
  """Returns the method class called `name`, or at `package.module:Name`."""
  return base.complete(config_utils.resolve('method', name, METHODS))


def section(name: str) -> ml_collections.ConfigDict:
  """Returns the `method` section of a config: its fields, and `add`."""
  found = config_utils.section(get(name), name)
  found.add = ''
  return found


def build(config: Mapping[str, object]):
  """Returns the method that a `method` section describes.

  Args:
    config: 'name', its fields, and `add`: `NAME:FIELD=VALUE,...` of a further
      method whose terms are added to its loss, or several with `+` between.

  Raises:
    config_utils.UserError: there is no such method or field, or what is added
      does not fit.
  """
  fields = {key: value for key, value in config.items() if key != 'add'}
  method = config_utils.instantiate('method', get(config['name']), fields)
  specs = [spec.strip() for spec in config.get('add', '').split('+')]
  if specs == ['']:
    return method
  return added.Sum(method, tuple(map(_parse, specs)), tuple(map(_label, specs)))


def _parse(spec: str):
  """Returns the method of `NAME:FIELD=VALUE,...`, without labels of its own."""
  name, values = _split(spec)
  cls = get(name)
  defaults = config_utils.section(cls, name)
  if LABELS in defaults:
    defaults[LABELS] = 0.0
  elif not cls.needs_teacher:
    raise config_utils.UserError(
      f'method.add={spec!r}: {name} has no terms but that of the labels, which '
      'the first method has already'
    )
  for part in filter(None, values.split(',')):
    field, separator, value = part.partition('=')
    if not separator or field == 'name' or field not in defaults:
      known = [key for key in defaults if key != 'name']
      raise config_utils.unknown(f'field of {name} in method.add', part, known)
    if field == 'tap':
      raise config_utils.UserError(
        f'method.add: {part!r}: the student ends at the tap of the first '
        f'method; set method.tap, or take {name} first and add the other to it'
      )
    try:
      defaults[field] = config_utils.parse_value(value, defaults[field])
    except ValueError as error:
      raise config_utils.UserError(f'method.add: {part!r}: {error}') from error
  return config_utils.instantiate('method', cls, defaults)


def _split(spec: str) -> tuple[str, str]:
  """Returns the name and the fields of `NAME:FIELD=VALUE,...`."""
  name, _, values = spec.rpartition(':')
  # `package.module:Name` has a colon of its own.
  return (name, values) if '=' in values else (spec, '')


def _label(spec: str) -> str:
  """Returns what the terms of an added method are called after."""
  return _split(spec)[0].rpartition(':')[2]
