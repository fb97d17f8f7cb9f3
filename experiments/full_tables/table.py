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
OURS = 'ijckd'
# What a published name is called here, where that is another.
NAMES = {'student': 'ce'}
# Fields that may differ from a row's command without changing what is measured.
FREE = {*workdirs.RUNTIME_FIELDS, 'seed', 'teacher.checkpoint'}


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
    data: the command that prepares the data set.
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
  data: str
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
    """Returns (source, name) of what can be run; ours has no source."""
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


def flat(config: Mapping[str, Any], prefix: str = '') -> dict[str, Any]:
  """Returns a config's fields by their dotted names, lists as tuples."""
  found = {}
  for key, value in config.items():
    if isinstance(value, Mapping):
      found |= flat(value, f'{prefix}{key}.')
    else:
      found[prefix + key] = tuple(value) if isinstance(value, list) else value
  return found


def called(table: Table, row: Row, config: Mapping[str, Any]) -> dict[str, Any]:
  """Returns of which numbers of a row a config is, and what differs.

  Returns:
    'name'; 'sources', those whose protocol it follows; and 'differs', the
    fields that are not those of the nearest protocol.
  """
  ours, candidates = flat(config), []
  for source, name in table.entries(row):
    theirs = flat(table.config(row, source, name).to_dict())
    if theirs['method.name'] != ours['method.name']:
      continue
    differs = {
      field: ours.get(field)
      for field in ours.keys() | theirs.keys()
      if field not in FREE and ours.get(field) != theirs.get(field)
    }
    candidates.append((source, name, differs))
  if not candidates:
    return {'name': ours['method.name'], 'sources': [], 'differs': {}}
  _, name, differs = min(candidates, key=lambda found: len(found[2]))
  sources = [s for s, n, d in candidates if s and n == name and d == differs]
  return {
    'name': name,
    'sources': [] if differs else sources,
    'differs': dict(sorted(differs.items())),
  }


def add(table: Table, folder: pathlib.Path) -> list[str]:
  """Adds finished runs to what was measured.

  Args:
    table: that they belong to.
    folder: of a run, or of a sweep.

  Returns:
    What was done, a line for each run.

  Raises:
    config_utils.UserError: it holds no finished run, or one of another pair;
      nothing is added.
  """
  paths = [folder / workdirs.SUMMARY]
  if not paths[0].exists():
    paths = sorted(folder.glob(f'*/{workdirs.SUMMARY}'))
    paths = [p for p in paths if not p.parent.name.startswith('teacher')]
  if not paths:
    raise config_utils.UserError(f'{folder} holds no finished run')
  known = [json.loads(line) for line in _lines()]
  added, said = [], []
  for path in paths:
    summary = json.loads(path.read_text())
    config = summary['config']
    backbones = config['teacher']['backbone'], config['student']['backbone']
    rows = [r for r in table.rows if (r.teacher, r.student) == backbones]
    if not rows:
      raise config_utils.UserError(
        f'{path.parent}: {" -> ".join(backbones)} is no row of {table.name}'
      )
    run = {
      'table': table.name,
      'row': rows[0].key,
      **called(table, rows[0], config),
      'seed': summary['seed'],
      'last': summary['student']['last']['top1'],
      'best': summary['student']['best']['top1'],
      'teacher': summary['teacher'] and summary['teacher']['top1'],
      'config': config,
      'versions': summary['versions'],
      'devices': summary['devices'],
    }
    run = json.loads(json.dumps(run))
    is_known = run in [*known, *added]
    if not is_known:
      added.append(run)
    said.append(f'{path.parent}: {"known already" if is_known else "added"}')
  with MEASURED.open('a') as file:
    file.writelines(json.dumps(run) + '\n' for run in added)
  return said


def _lines() -> list[str]:
  return MEASURED.read_text().splitlines() if MEASURED.exists() else []


def measured(table: Table, row: Row) -> list[list[dict]]:
  """Returns what was measured of a row: a list of runs for each setting."""
  found = {}
  for run in map(json.loads, _lines()):
    if (run['table'], run['row']) == (table.name, row.key):
      found.setdefault((run['name'], str(run['differs'])), []).append(run)
  return list(found.values())


def render(table: Table) -> str:
  """Returns the page of a table, as Markdown."""
  module = f'python -m experiments.{table.name}_table'
  lines = [f'# {table.title}', '', table.recipe, '', '## A row of your own', '']
  lines += [
    'In a clone of this repository, on a machine with one GPU:',
    '',
    f'    {table.data}',
    f'    {table.command(table.rows[0])}',
    f'    {module} add runs/{table.name}/{table.rows[0].key}/{OURS}',
    '',
    'The second command makes ten runs, and goes on where it was stopped; the '
    'last one writes the row, its interval and where it was made into this '
    'page. The commands of all rows are below.',
    '',
    '## Teachers',
    '',
    table.teachers,
    '',
    '## Published, and measured here',
    '',
    'Top-1, %. A letter says whose number, under which protocol; compare only '
    'within one letter. The last column is filled by whoever runs the row.',
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
    f'`{module} commands ROW` prints those of all methods of a row whose '
    'numbers are above, each by the protocol of its source; ROW is '
    '`teacher_student`.',
  ]
  cells = [['source', 'name', 'fields']]
  for source, names in table.settings.items():
    for name, fields in names.items():
      cells.append([source, name, _fields(fields)])
  if table.settings:
    lines += ['', 'What a source sets otherwise than the config:', '']
    lines += [markdown.grid(cells)]
  runs = [_long(runs) for row in table.rows for runs in measured(table, row)]
  if runs:
    head = 'row,name,follows,differs,seeds,last step %,95%,best %,teacher %,on'
    lines += ['', '## Where the numbers were made', '']
    lines += [markdown.grid([head.split(','), *runs])]
  return '\n'.join(lines) + '\n'


def _short(runs: list[dict]) -> str:
  """Returns what was measured of one setting, for the table."""
  last, best = (
    100 * np.array([run[key] for run in runs]) for key in ('last', 'best')
  )
  name = runs[0]['name'] + (' (other settings)' if runs[0]['differs'] else '')
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
  if flags.command in ('commands', 'add') and not flags.what:
    raise config_utils.UserError(f'{flags.command}: of what?')
  if flags.command == 'commands':
    row = table.row(flags.what)
    for source, name in table.entries(row):
      print(f'# {name}' + (f', as {source} has it' if source else ''))
      print(table.command(row, source, name))
    return
  if flags.command == 'add':
    print('\n'.join(add(table, pathlib.Path(flags.what))))
  (FOLDER / f'{table.name}.md').write_text(render(table))
  print(f'written: {FOLDER / table.name}.md')
