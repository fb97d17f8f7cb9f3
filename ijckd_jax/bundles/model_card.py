"""A model card: what a bundle holds, what it was made of and is good for."""

import json
import math
from typing import Any

from ijckd_jax.models import programs as programs_lib
from ijckd_jax.runtime import config_utils
from ijckd_jax.runtime import markdown

FILE = 'README.md'  # As the hub calls it.
UNSTATED = 'not stated'


def describe(bundle) -> str:
  """Returns in a line what a bundle's network is.

  Args:
    bundle: bundles.Bundle.
  """
  info, name = bundle.info, bundle.backbone_name
  method = _get(info, 'method', 'name')
  if not method:
    origin = _section(info, 'origin')
    found = origin.get('hub') or origin.get('file')
    return f'{name}, imported' + (f' from {found}' if found else '')
  teacher = _taught_by(info)
  data = _get(info, 'features_dataset', 'name') or _get(info, 'dataset', 'name')
  done = f'distilled from {teacher} by {method}' if teacher else f'by {method}'
  return config_utils.short(f'{name}, {done} on {data}')


def as_markdown(bundle, num_params: dict[str, int]) -> str:
  """Returns the card of a bundle.

  Args:
    bundle: bundles.Bundle.
    num_params: of 'backbone', 'connector' and 'head'.
  """
  parts = [
    _header(bundle),
    f'# {markdown.escape(describe(bundle))}',
    _table(bundle, num_params),
  ]
  if accuracy := _accuracy(bundle):
    parts += ['## Accuracy', accuracy]
  parts += ['## Use', _use(bundle), '## Limits', _limits(bundle)]
  return '\n\n'.join(parts) + '\n'


def _header(bundle) -> str:
  """Returns what the hub reads of a card."""
  task = 'classification' if bundle.class_names else 'feature-extraction'
  lines = ['library_name: ijckd_jax', f'pipeline_tag: image-{task}']
  licence = _get(bundle.info, 'origin', 'licence')
  if licence and licence != UNSTATED:
    lines.append(f'license: {json.dumps(config_utils.short(licence))}')
  return '\n'.join(['---', *lines, '---'])


def _table(bundle, num_params) -> str:
  info, net = bundle.info, bundle.network
  height, width, channels = bundle.image_shape
  colours = {1: 'grey', 3: 'RGB'}.get(channels, f'{channels} channels')
  connector = net.connector and type(net.connector).__name__
  counts = ', '.join(f'{k} {v:,}' for k, v in num_params.items() if v)
  rows = {
    'classes': f'{len(bundle.class_names)}: {_some(bundle.class_names)}'
    if bundle.class_names
    else 'none: it has no head, and gives features',
    'images': f'{height}x{width}, {colours}, uint8; their preprocessing stands '
    'in bundle.json, and whatever loads it applies it',
    'pictures': bundle.crop
    and f'the shorter side is resized to {bundle.crop.resize} '
    f'({bundle.crop.interpolation}), and the centre is cut out',
    'parameters': f'{sum(num_params.values()):,} ({counts})',
    'connector': connector
    and f'{connector}, between the backbone and the head; see method',
    'data': _fields(_section(info, 'dataset')),
    'data of the features': _fields(_section(info, 'features_dataset')),
    'head': _probe(info),
    'method': _fields(_section(info, 'method')),
    'teacher': _teacher(info),
    'recipe': _recipe(_section(info, 'run')),
    'weights from': _origin(_section(info, 'origin')),
    "the teacher's weights from": _origin(_section(info, 'teacher_origin')),
    'programs': _programs(net),
    'made by': info.get('ijckd_jax') and f'ijckd_jax {info["ijckd_jax"]}',
  }
  cells = [f'| {name} | {_cell(text)} |' for name, text in rows.items() if text]
  return '\n'.join(['| | |', '| :-- | :-- |', *cells])


def _programs(net) -> str:
  """Returns until when programs can be read; '' where there are none."""
  if not net.programs:
    return ''
  return programs_lib.lifetime(programs_lib.oldest(net.programs))[0]


def _accuracy(bundle) -> str:
  """Returns the last and the best step's metrics, where they are known."""
  run = _section(bundle.info, 'run')
  rows = {
    f'last step ({run.get("steps", 0):,})': _get(run, 'test', 'last'),
    f'best step ({run.get("best_step") or 0:,})': _get(run, 'test', 'best'),
  }
  rows = {name: metrics for name, metrics in rows.items() if metrics}
  if not rows:
    return ''
  count, which = run.get('test_examples', 0), bundle.info.get('which')
  said = [
    markdown.metrics(rows),
    f'On {count:,} test images, of one run with seed '
    f'{_cell(run.get("seed"))}. The {_cell(which)} step is the one in this '
    'bundle.',
  ]
  top1 = _get(run, 'test', which, 'top1')
  if count and top1 is not None:
    error = 100 * math.sqrt(top1 * (1 - top1) / count)
    error *= markdown.HALF_WIDTH
    said[1] += (
      f' The choice of test images alone makes top-1 ± {error:.2f} (95% '
      'interval).'
    )
  if run.get('best_by') == 'test':
    said[1] += " 'Best' was chosen on the test images, so it flatters."
  return '\n\n'.join(said)


def _use(bundle) -> str:
  name = config_utils.printable(bundle.backbone_name)
  if not bundle.class_names:
    return '\n'.join(
      [
        '    ijckd probe --bundle DIR --dataset NAME --output NEW',
        '',
        'says what its features are worth, and writes it with a head for your '
        'classes.',
      ]
    )
  return '\n'.join(
    [
      '    ijckd evaluate --bundle DIR',
      '    ijckd predict --bundle DIR PICTURE...',
      '    ijckd export --bundle DIR --format onnx --output FILE',
      '',
      '`ijckd_jax.load_bundle(DIR)` in Python. As a teacher:',
      '',
      '    ijckd train --config NAME --workdir RUN '
      f'--config.teacher.checkpoint=DIR --config.teacher.backbone={name}',
    ]
  )


def _limits(bundle) -> str:
  data = _cell(_get(bundle.info, 'dataset', 'name'))
  known = (
    _get(bundle.info, 'run', 'test')
    or bundle.info.get('test')
    or _probe(bundle.info)
  )
  lines = [
    f'It names one of {len(bundle.class_names)} classes whatever it sees, also '
    'where the picture shows none of them.'
    if bundle.class_names
    else 'It names nothing: what its features are worth depends on the head '
    'behind them.',
    f'Nothing is known of other images than those of {data}: of other cameras, '
    'places or times it may be right less often, and just as sure.'
    if known
    else 'How often it is right is not known of this bundle.'
    if _get(bundle.info, 'method', 'name')
    else 'It was imported; its accuracy was not measured here.',
    'No test of fairness, of harm or of deliberately misleading images was '
    'made.',
  ]
  teacher = _taught_by(bundle.info)
  if teacher:
    lines.append(
      f'It was taught by {_cell(teacher)}, whose mistakes and leanings it may '
      'have.'
    )
  return '\n'.join(f'- {line}' for line in lines)


def _taught_by(info) -> str | None:
  """Returns the teacher that a network learned from, not one that judged it."""
  return info.get('teacher') if info.get('taught', True) else None


def _teacher(info) -> str:
  name, top1 = info.get('teacher'), _get(info, 'run', 'teacher', 'top1')
  if not name:
    return ''
  role = '' if _taught_by(info) else ', to compare with only'
  said = f', top-1 {top1:.2%} on the same images' if top1 else ''
  return f'{name}{role}{said}'


def _recipe(run) -> str:
  if not run:
    return ''
  recipe = run.get('recipe', {})
  return f'{run.get("steps", 0):,} steps; {_fields(recipe)}'


def _probe(info) -> str:
  """Returns what is known of a head that is a linear probe."""
  top1 = _get(info, 'probe', 'linear', 'top1')
  train, test = (_get(info, 'probe', split) for split in ('train', 'test'))
  if not all(isinstance(number, int | float) for number in (top1, train, test)):
    return ''
  return (
    f'a linear probe, fitted on {train:,} labelled images; top-1 {top1:.2%} on '
    f'{test:,} test images'
  )


def _origin(origin) -> str:
  if not origin:
    return ''
  licence = origin.get('licence') or UNSTATED
  rest = {k: v for k, v in origin.items() if k != 'licence'}
  return f'{_fields(rest)}; licence: {licence}'


def _fields(fields: Any) -> str:
  """Returns what a flat or nested mapping says, its name first."""
  if not fields:
    return ''
  flat = config_utils.flatten(
    {k: v for k, v in fields.items() if k not in ('name', 'data_dir')}
  )
  said = ', '.join(
    f'{key}={value}'
    for key, value in flat.items()
    if not (value is None or value is False or value == '')
  )
  name = fields.get('name')
  return f'{name} ({said})' if name and said else name or said


def _some(names, most=10) -> str:
  more = f', and {len(names) - most:,} more' if len(names) > most else ''
  return ', '.join(map(config_utils.short, names[:most])) + more


def _cell(text) -> str:
  """Returns a text that fits into a table's cell."""
  return markdown.escape(' '.join(str(text).split()))


def _section(info, name: str) -> dict[str, Any]:
  """Returns what a bundle says under a name; strangers may say anything."""
  found = info.get(name)
  return found if isinstance(found, dict) else {}


def _get(mapping, *keys):
  """Returns what lies below the keys; None where there is nothing."""
  for key in keys:
    if not isinstance(mapping, dict):
      return None
    mapping = mapping.get(key)
  return mapping
