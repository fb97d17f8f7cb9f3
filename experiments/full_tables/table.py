"""A published table: its rows, our commands, and what they gave here.

A published number stands with its protocol, because teachers, weights and the
step that is reported differ: compare only inside one.
"""

import argparse
from collections.abc import Mapping
import dataclasses
import json
import pathlib
import sys
from typing import Any

import ml_collections
import numpy as np

from ijckd_jax.distillation import methods
from ijckd_jax.reports import sweep_table
from ijckd_jax.runtime import config_utils
from ijckd_jax.runtime import markdown
from ijckd_jax.runtime import workdirs

FOLDER = pathlib.Path(__file__).parent
MEASURED = FOLDER / 'measured.jsonl'
SEEDS = '0..9'
NONE = ' No row has been run here.'
OURS = 'ijckd'
# What a published name is called here, where that is another.
NAMES = {'student': 'ce'}
# Fields that may differ from a row's command without changing what is measured,
# and the teacher's, which has its own place.
FREE = {
  *workdirs.RUNTIME_FIELDS,
  *('seed', 'eval_batch_size'),
  *('teacher.checkpoint', 'teacher.fingerprint', 'teacher.backbone'),
} - {'dtype'}


@dataclasses.dataclass(frozen=True)
class Row:
  """A pair of teacher and student.

  Attributes:
    teacher: name of its backbone.
    student: name of its backbone.
    published: (source, name, top-1 in per cent), of a key of Table.sources.
  """

  teacher: str
  student: str
  published: tuple[tuple[str, str, float], ...]

  @property
  def key(self) -> str:
    """Names the row in files, and on the command line."""
    return f'{self.teacher}_{self.student}'


@dataclasses.dataclass(frozen=True)
class Table:
  """Rows, and how all of them are run.

  Attributes:
    name: of the table's page, and of its config's file.
    title: of the page.
    recipe: what the config does, in words.
    data: the commands that prepare the data set.
    teacher: the command that makes teachers/{teacher}.
    teachers: where the teachers come from, in words and commands.
    sources: what each letter of a published number stands for.
    settings: by source and published name, the config's fields that its
      protocol sets otherwise than the config does.
    options: further flags of a command, with {teacher} and {student}.
    rows: see Row.
  """

  name: str
  title: str
  recipe: str
  data: tuple[str, ...]
  teacher: str
  teachers: str
  sources: dict[str, str]
  settings: Mapping[str, Mapping[str, Mapping[str, Any]]]
  options: str
  rows: tuple[Row, ...]

  def row(self, key: str) -> Row:
    """Returns the row of that key."""
    found = {row.key: row for row in self.rows}
    if key not in found:
      raise config_utils.unknown('row', key, found)
    return found[key]

  def entries(self, row: Row) -> list[tuple[str, str]]:
    """Returns (source, name) of each number that can be repeated here.

    IJCKD itself comes first, with '' for a source.
    """
    return [('', OURS)] + [
      (source, name) for source, name, _ in row.published if method_of(name)
    ]

  def arg(self, row: Row, name: str = OURS) -> str:
    """Returns what `--config` takes for a row."""
    pair = f'teacher={row.teacher},student={row.student}'
    return f'{self.name}:{pair},method={method_of(name)}'

  def fields(self, source: str, name: str) -> Mapping[str, Any]:
    """Returns the fields that the protocol of a source sets."""
    return self.settings.get(source, {}).get(name, {})

  def command(self, row: Row, source: str = '', name: str = OURS) -> str:
    """Returns what makes a number of a row, over ten seeds."""
    folder = f'{source}_{name}'.strip('_').replace('/', '_')
    fields = self.fields(source, name).items()
    return ' '.join(
      [
        f'ijckd sweep --workdir runs/{self.name}/{row.key}/{folder}',
        f'--config {self.arg(row, name)} --over seed={SEEDS}',
        *(f'--config.{field}={value}' for field, value in fields),
        self.options.format(teacher=row.teacher, student=row.student),
      ]
    ).strip()

  def config(
    self, row: Row, source: str = '', name: str = OURS
  ) -> ml_collections.ConfigDict:
    """Returns the config of a command, but for its paths and seed."""
    config = config_utils.load(self.arg(row, name))
    config_utils.override(config, dict(self.fields(source, name)))
    return config


def method_of(name: str) -> str:
  """Returns the method of a published name; '' for one that is not here."""
  name = NAMES.get(name, name.split('/')[0])
  return name if name in methods.METHODS else ''


def _plain(config: Mapping[str, Any]) -> dict[str, Any]:
  """Returns a config's fields by their dotted names, as JSON has them."""
  return config_utils.flatten(json.loads(json.dumps(config)))


def called(table: Table, row: Row, config: Mapping[str, Any]) -> dict[str, Any]:
  """Returns which published numbers of a row a config repeats.

  Returns:
    'name'; 'sources', those with whose settings it was made; and 'differs', the
    fields that are not the config's, for settings of no source.
  """
  method = config['method']['name']
  added = workdirs.ADDED_FIELDS | workdirs.ADDED_METHOD_FIELDS.get(method, {})
  ours = _plain(added) | _plain(config)

  def differs(source, name):
    theirs = _plain(table.config(row, source, name).to_dict())
    return {
      field: ours.get(field)
      for field in sorted(ours.keys() | theirs.keys())
      if field not in FREE and ours.get(field) != theirs.get(field)
    }

  found = {}
  for source, name in table.entries(row):
    if method_of(name) == method and not differs(source, name):
      found.setdefault(name, []).append(source)
  if found:
    name, sources = next(iter(found.items()))
    return {'name': name, 'sources': list(filter(None, sources)), 'differs': {}}
  return {'name': method, 'sources': [], 'differs': differs('', method)}


def add(table: Table, folder: pathlib.Path) -> list[str]:
  """Adds finished runs to what was measured.

  Args:
    table: that they belong to.
    folder: of a run, or above runs, such as that of a sweep.

  Returns:
    What was done, a line for each run. A seed that is there already by the same
    settings and teacher is not added again.

  Raises:
    config_utils.UserError: it holds no finished run, or one that is damaged, or
      of another pair or data set; nothing is added.
  """
  # Below the folder of a sweep or a run there are its teachers, too.
  paths = sorted(
    path
    for path in folder.rglob(workdirs.SUMMARY)
    if not any(p.startswith('teacher') for p in path.relative_to(folder).parts)
  )
  if not paths:
    raise config_utils.UserError(f'{folder} holds no finished run')
  runs, said = [], []
  known = {_key(run) for run in _measured()}
  for path in paths:
    try:
      run = _describe(table, json.loads(path.read_text()))
    except config_utils.UserError as error:
      raise config_utils.UserError(f'{path.parent}: {error}') from error
    except (AttributeError, KeyError, TypeError, ValueError) as error:
      raise config_utils.UserError(
        f'{path} is no summary of a run: {config_utils.short(error)}'
      ) from error
    is_known = _key(run) in known
    known.add(_key(run))
    if not is_known:
      runs.append(run)
    done = 'left out, this seed is there already' if is_known else 'added'
    said.append(f'{path.parent}: {done}')
  with MEASURED.open('a') as file:
    file.writelines(json.dumps(run) + '\n' for run in runs)
  return said


def _describe(table: Table, summary) -> dict[str, Any]:
  """Returns what is kept of a run."""
  config, student = summary['config'], summary['student']
  backbones = config['teacher']['backbone'], config['student']['backbone']
  rows = [
    row
    for row in table.rows
    if backbones in ((row.teacher, row.student), ('', row.student))
  ]
  data = config['dataset']['name']
  if not rows or data != table.config(rows[0]).dataset.name:
    raise config_utils.UserError(
      f'{" -> ".join(backbones)} on {data} is no row of {table.name}'
    )
  numbers = {
    'last': float(student['last']['top1']),
    'best': float(student['best']['top1']),
    'teacher': summary['teacher'] and float(summary['teacher']['top1']),
  }
  if not np.isfinite([x or 0.0 for x in numbers.values()]).all():
    raise config_utils.UserError(f'its accuracies are no numbers: {numbers}')
  run = {
    'table': table.name,
    'row': rows[0].key,
    **called(table, rows[0], config),
    'seed': summary['seed'],
    **numbers,
    'fingerprint': config['teacher']['fingerprint'],
    'versions': summary['versions'],
    'devices': summary['devices'],
  }
  return json.loads(json.dumps(run))


def _setting(run) -> tuple:
  """Returns what runs share that are averaged."""
  differs = json.dumps(run['differs'], sort_keys=True)
  return run['name'], tuple(run['sources']), differs, run['fingerprint']


def _key(run) -> tuple:
  return run['table'], run['row'], run['seed'], *_setting(run)


def _measured() -> list[dict]:
  """Returns all runs that were added.

  Raises:
    config_utils.UserError: the file is damaged.
  """
  if not MEASURED.exists():
    return []
  try:
    return [json.loads(line) for line in MEASURED.read_text().splitlines()]
  except ValueError as error:
    raise config_utils.UserError(
      f'{MEASURED} is damaged: {config_utils.short(error)}; remove that line'
    ) from error


def measured(table: Table, row: Row) -> list[list[dict]]:
  """Returns what was measured of a row: a list of runs for each setting."""
  found = {}
  for run in _measured():
    if (run['table'], run['row']) == (table.name, row.key):
      found.setdefault(_setting(run), []).append(run)
  return list(found.values())


def render(table: Table) -> str:
  """Returns the page of a table, as Markdown."""
  module = f'python -m experiments.{table.name}_table'
  example = table.rows[0]
  lines = [f'# {table.title}', '', table.recipe, '', '## A row of your own', '']
  lines += [
    'In a clone of this repository, on a machine with one GPU (`cuda13`, or '
    'another extra of the README):',
    '',
    "    pip install -e '.[cuda13]'",
    *(f'    {line}' for line in table.data),
    f'    {table.teacher.format(teacher=example.teacher)}',
    f'    {table.command(example)}',
    f'    {module} add runs/{table.name}/{example.key}/{OURS}',
    '',
    'The sweep makes ten runs, and goes on where it was stopped; the last '
    'command writes the row into the table below, and its interval and where '
    'it was made into another one at the end of the page. All ten have one '
    'teacher: the interval is over students alone.',
    '',
    '## Teachers',
    '',
    table.teachers,
    '',
    '## Published, and measured here',
    '',
    'Top-1, %. The letter names the source and its protocol; compare only '
    'within one letter. "student" is the student alone. The last column is '
    'filled by whoever runs the row: mean and standard deviation at the last '
    'step, the number of seeds, and the mean of the best step.'
    + ('' if any(measured(table, row) for row in table.rows) else NONE),
    '',
  ]
  lines += [f'- **{name}**: {text}' for name, text in table.sources.items()]
  cells = [['teacher -> student', *table.sources, 'measured here']]
  for row in table.rows:
    said = []
    for source in table.sources:
      numbers = [
        f'{name} {value:.2f}' for s, name, value in row.published if s == source
      ]
      said.append('<br>'.join(numbers))
    ours = '<br>'.join(_short(runs) for runs in measured(table, row))
    cells.append([f'{row.teacher} -> {row.student}', *said, ours])
  lines += ['', *(f'| {" | ".join(line)} |' for line in cells)]
  lines.insert(-len(table.rows), '| :-- ' * len(cells[0]) + '|')
  lines += ['', '## Commands', '']
  lines += [f'    {table.command(row)}' for row in table.rows]
  lines += [
    '',
    f'`{module} commands ROW` prints those of the other methods of a row that '
    'the package has, each with the weights of its source, in the recipe of '
    'the config; ROW is `teacher_student`. Methods without a published number '
    'are run by `method=NAME`, and added like the others.',
  ]
  cells = [['source', 'name', 'fields']]
  for source, names in table.settings.items():
    for name, fields in names.items():
      cells.append([source, name, _fields(fields)])
  if table.settings:
    lines += ['', 'Fields in which a source differs from the config:', '']
    lines += [markdown.grid(cells)]
  runs = [_long(runs) for row in table.rows for runs in measured(table, row)]
  if runs:
    head = 'row,name,as in,differs,seeds,last step %,95%,best %,teacher %,on'
    lines += ['', '## Where the numbers were made', '']
    lines += [markdown.grid([head.split(','), *runs])]
  return '\n'.join(lines) + '\n'


def _short(runs: list[dict]) -> str:
  """Returns what was measured of one setting, for the table."""
  last, best = (
    100 * np.array([run[key] for run in runs]) for key in ('last', 'best')
  )
  name, sources = runs[0]['name'], runs[0]['sources']
  if runs[0]['differs']:
    name += ' (other settings)'
  elif sources:
    name += f' (as in {", ".join(sources)})'
  spread = f' ± {np.std(last, ddof=1):.2f}' if len(runs) > 1 else ''
  return (
    f'{name} {np.mean(last):.2f}{spread} ({len(runs)}), best '
    f'{np.mean(best):.2f}'
  )


def _long(runs: list[dict]) -> list[str]:
  """Returns the same with where it comes from, a cell for each column."""
  last, best = (
    100 * np.array([run[key] for run in runs]) for key in ('last', 'best')
  )
  teachers = [100 * run['teacher'] for run in runs if run['teacher']]
  places = {
    f'{", ".join(dict.fromkeys(run["devices"]))}, jax '
    f'{run["versions"].get("jax", "?")}, ijckd_jax '
    f'{run["versions"].get("ijckd_jax", "?")}'
    for run in runs
  }
  half = f'± {sweep_table.half_width(list(last)):.2f}' if len(runs) > 1 else ''
  return [
    runs[0]['row'],
    runs[0]['name'],
    ', '.join(runs[0]['sources']),
    _fields(runs[0]['differs']),
    ', '.join(str(seed) for seed in sorted(run['seed'] for run in runs)),
    f'{np.mean(last):.2f}',
    half,
    f'{np.mean(best):.2f}',
    f'{np.mean(teachers):.2f}' if teachers else '',
    '; '.join(sorted(places)),
  ]


def _fields(fields: Mapping[str, Any]) -> str:
  return ' '.join(f'`{key}={value}`' for key, value in fields.items())


def main(table: Table, argv: list[str] = sys.argv[1:]) -> None:
  """Writes the page, adds runs to it, or prints a row's commands."""
  parser = config_utils.ArgumentParser(
    prog=f'python -m experiments.{table.name}_table',
    formatter_class=argparse.RawDescriptionHelpFormatter,
    description='write: the page. commands ROW: what makes its numbers. add '
    'DIR: the finished runs of a sweep, or one run, to the page.',
  )
  commands = ('write', 'commands', 'add')
  parser.add_argument('command', choices=commands, nargs='?')
  parser.add_argument('what', nargs='?', metavar='ROW or DIR')
  flags = parser.parse_args(argv)
  if (flags.command in ('commands', 'add')) != bool(flags.what):
    raise config_utils.UserError(
      'give commands ROW, add DIR, or write, which takes nothing'
    )
  if flags.command == 'commands':
    row = table.row(flags.what)
    printed = {}
    for source, name in table.entries(row):
      settings = str(table.config(row, source, name).to_dict())
      printed.setdefault(settings, []).append((source, name))
    for entries in printed.values():
      source, name = entries[0]
      print(f'# {name} ' + ', '.join(filter(None, (s for s, _ in entries))))
      print(table.command(row, source, name))
    return
  if flags.command == 'add':
    print('\n'.join(add(table, pathlib.Path(flags.what))))
  (FOLDER / f'{table.name}.md').write_text(render(table))
  print(f'written: {FOLDER / table.name}.md')
