"""What became of a folder of pictures: counts, changes, and what is missing."""

import collections
from collections.abc import Iterable
from collections.abc import Mapping
import statistics
from typing import Any

from ijckd_jax.data.datasets import image_layout
from ijckd_jax.runtime import config_utils
from ijckd_jax.runtime import markdown

MAX_SKIPPED = 0.05  # The part of a split that may be unreadable.
FEW = 10  # Training pictures of a class.
SHOWN = 20  # Of a list in the text; report.json has all.

Report = Mapping[str, Any]


def summarise(
  layout: image_layout.Layout,
  outcomes: Iterable[tuple[image_layout.Example, Mapping[str, Any]]],
) -> Report:
  """Returns the report, as it is kept in report.json.

  Args:
    layout: what was to be written.
    outcomes: for each of its examples `{'skipped': reason}`, or the picture's
      `sha256`, `format`, `size`, `change` and, perhaps, `warning`.
  """
  splits = list(dict.fromkeys(example.split for example in layout.examples))
  splits.sort(key=('train', 'validation', 'test').index)
  counts = {split: [0] * (len(layout.class_names) or 1) for split in splits}
  contents = {split: [] for split in splits}
  formats, changes = collections.Counter(), collections.Counter()
  widths, heights, skipped, converted, dark = [], [], {}, {}, {}
  for example, outcome in outcomes:
    if 'skipped' in outcome:
      skipped[example.path] = outcome['skipped']
      continue
    counts[example.split][example.label] += 1  # -1 is the only one there is.
    contents[example.split].append((outcome['sha256'], example.path))
    formats[outcome['format']] += 1
    widths.append(outcome['size'][0])
    heights.append(outcome['size'][1])
    if outcome['change']:
      changes[outcome['change']] += 1
      converted[example.path] = outcome['change']
    if outcome.get('warning'):
      dark[example.path] = outcome['warning']
  return {
    'num_examples': {split: sum(counts[split]) for split in splits},
    'classes': {
      name: {split: counts[split][label] for split in splits}
      for label, name in enumerate(layout.class_names)
    },
    'width': _distribution(widths),
    'height': _distribution(heights),
    'formats': dict(formats.most_common()),
    'changes': dict(changes.most_common()),
    'in_several_splits': _leaks(contents),
    'skipped': dict(sorted(skipped.items())),
    'converted': dict(sorted(converted.items())),
    'dark': dict(sorted(dark.items())),
    'ignored': dict(layout.ignored),
  }


def _distribution(values):
  if not values:
    return {}
  return {
    'min': min(values),
    'median': statistics.median_low(values),
    'max': max(values),
  }


def _leaks(contents):
  """Returns {path: path of the same content in an earlier split}."""
  known, leaks = {}, {}
  for files in contents.values():
    leaks |= {path: known[sha] for sha, path in files if sha in known}
    known = dict(files) | known
  return dict(sorted(leaks.items()))


def check(layout: image_layout.Layout, report: Report) -> None:
  """Raises UserError where too much was unreadable."""
  skipped = report['skipped']
  totals = collections.Counter(example.split for example in layout.examples)
  shown = '; '.join(_pairs(skipped, 3))
  for split, count in report['num_examples'].items():
    lost = totals[split] - count
    if lost > MAX_SKIPPED * totals[split]:
      raise config_utils.UserError(
        f'{lost} of {totals[split]} pictures of {split} cannot be read, more '
        f'than {MAX_SKIPPED:.0%} ({shown}): mend or remove them'
      )
  for name, counts in report['classes'].items():
    for split, count in counts.items():
      if not count:
        raise config_utils.UserError(
          f'no picture of class {name} in {split} can be read ({shown}): mend '
          'them'
        )


def lines(report: Report) -> list[str]:
  """Returns the report in a few lines."""
  ignored = collections.Counter(report['ignored'].values())
  found = [f'formats: {_counted(report["formats"])}']
  for side in ('width', 'height'):
    found.append(
      f'{side} in pixels: {report[side]["min"]} to {report[side]["max"]}, '
      f'median {report[side]["median"]}'
    )
  if report['classes']:
    train = {name: of['train'] for name, of in report['classes'].items()}
    few = {name: count for name, count in train.items() if count < FEW}
    found.append(
      f'{len(train)} classes, {min(train.values())} to {max(train.values())} '
      'training pictures each'
    )
    if few:
      found.append(
        f'fewer than {FEW} training pictures: {_counted(few, SHOWN)}'
      )
  else:
    found.append('without labels')
  if report['changes']:
    count = sum(report['changes'].values())
    found.append(f'converted to PNG: {count} ({_counted(report["changes"])})')
  if report['skipped']:
    shown = '; '.join(_pairs(report['skipped'], SHOWN))
    found.append(f'skipped: {len(report["skipped"])} ({shown})')
  if ignored:
    found.append(
      f'ignored: {ignored.total()} ({_counted(dict(ignored.most_common()))})'
    )
  dark = report.get('dark', {})  # Earlier reports have none.
  if dark:
    shown = '; '.join(_pairs(dark, 3))
    found.append(
      f'WARNING: 16 bits that hold fewer, as 12-bit cameras write them: '
      f'{len(dark)} ({shown}); if they look too dark, scale such pictures to '
      'all of the 16 bits and prepare them anew'
    )
  leaks = report['in_several_splits']
  if leaks:
    shown = '; '.join(_pairs(leaks, 3, ' is '))
    found.append(
      f'WARNING: copies in two splits, which make accuracy look better than it '
      f'is: {len(leaks)} ({shown})'
    )
  return found


def as_markdown(name: str, report: Report) -> str:
  """Returns the report as a page."""
  listed = '\n'.join(f'- {markdown.escape(line)}' for line in lines(report))
  parts = [f'# {markdown.escape(name)}', listed]
  splits = list(report['num_examples'])
  rows = [['class', *splits]]
  for class_name, counts in report['classes'].items():
    rows.append([_cell(class_name), *(str(counts[split]) for split in splits)])
  totals = report['num_examples'].values()
  parts.append(markdown.grid([*rows, ['all', *map(str, totals)]]))
  for key, title in (
    ('skipped', 'Skipped'),
    ('in_several_splits', 'In two splits'),
    ('converted', 'Converted'),
    ('dark', '16 bits that hold fewer'),
    ('ignored', 'Ignored'),
  ):
    if report.get(key):
      rows = [[_cell(path), _cell(why)] for path, why in _first(report[key])]
      parts.append(f'## {title}: {len(report[key])}')
      parts.append(markdown.grid([['file', ''], *rows]))
      if len(report[key]) > SHOWN:
        parts.append('All of them are in report.json.')
  return '\n\n'.join(parts) + '\n'


def _first(mapping, most=SHOWN):
  return list(mapping.items())[:most]


def _pairs(mapping, most, between=': '):
  """Returns the first entries of a mapping, each in one line."""
  pairs = [
    f'{config_utils.short(key)}{between}{config_utils.short(value)}'
    for key, value in _first(mapping, most)
  ]
  return pairs + ['...'] * (len(mapping) > most)


def _counted(counts: Mapping[str, int], most: int = SHOWN) -> str:
  return ', '.join(_pairs(counts, most, ' '))


def _cell(text: str) -> str:
  return markdown.escape(config_utils.short(text))
