"""A published table: its rows, our command for each, and what that gave here.

A published number stands with its protocol, because teachers, weights and the
step that is reported differ: compare only inside one.
"""

import argparse
import dataclasses
import json
import pathlib
import sys

import numpy as np

from ijckd_jax.runtime import config_utils

FOLDER = pathlib.Path(__file__).parent
MEASURED = FOLDER / 'measured.jsonl'


@dataclasses.dataclass(frozen=True)
class Row:
  """A pair of teacher and student.

  Attributes:
    teacher: name of its backbone.
    student: name of its backbone.
    published: (source, method, top-1 in per cent), of a key of Table.sources.
  """

  teacher: str
  student: str
  published: tuple[tuple[str, str, float], ...]

  @property
  def key(self) -> str:
    """Names the row in files."""
    return f'{self.teacher}_{self.student}'


@dataclasses.dataclass(frozen=True)
class Table:
  """Rows, and how all of them are run.

  Attributes:
    name: of the table's page, and of its config's file.
    title: of the page.
    recipe: what the config does, in words.
    teachers: where the teachers come from, in words and commands.
    sources: what each letter of a published number stands for.
    options: further flags of a command, with {teacher} and {student}.
    rows: see Row.
  """

  name: str
  title: str
  recipe: str
  teachers: str
  sources: dict[str, str]
  options: str
  rows: tuple[Row, ...]

  def arg(self, row: Row, method: str = 'ijckd') -> str:
    """Returns what `--config` takes for a row."""
    pair = f'teacher={row.teacher},student={row.student}'
    return f'{self.name}:{pair},method={method}'

  def command(self, row: Row, method: str = 'ijckd', seed: int = 0) -> str:
    """Returns what makes a row's number."""
    options = self.options.format(teacher=row.teacher, student=row.student)
    return (
      f'ijckd train --workdir runs/{self.name}/{row.key}/{method}_{seed} '
      f'--config {self.arg(row, method)} --config.seed={seed} {options}'
    ).strip()

  def config(self, row: Row, method: str = 'ijckd'):
    """Returns the config of a row's command, but for its paths and seed."""
    return config_utils.load(self.arg(row, method))


def measured(table: Table, row: Row) -> dict[str, list[dict]]:
  """Returns what was measured of a row, by method."""
  found = {}
  if MEASURED.exists():
    for line in MEASURED.read_text().splitlines():
      run = json.loads(line)
      if (run['table'], run['row']) == (table.name, row.key):
        found.setdefault(run['method'], []).append(run)
  return found


def add(table: Table, workdir: pathlib.Path) -> None:
  """Adds a finished run to what was measured."""
  summary = json.loads((workdir / 'summary.json').read_text())
  config = summary['config']
  backbones = config['teacher']['backbone'], config['student']['backbone']
  rows = [r for r in table.rows if (r.teacher, r.student) == backbones]
  if not rows:
    raise config_utils.UserError(
      f'{workdir}: {" -> ".join(backbones)} is no row of {table.name}'
    )
  run = {
    'table': table.name,
    'row': rows[0].key,
    'method': config['method']['name'],
    'seed': summary['seed'],
    'last': summary['student']['last']['top1'],
    'best': summary['student']['best']['top1'],
    'teacher': summary['teacher']['top1'],
    'config': config,
    'versions': summary['versions'],
    'devices': summary['devices'],
  }
  with MEASURED.open('a') as file:
    file.write(json.dumps(run) + '\n')


def render(table: Table) -> str:
  """Returns the page of a table, as Markdown."""
  lines = [f'# {table.title}', '', table.recipe, '', '## Teachers', '']
  lines += [table.teachers, '', '## Published, and measured here', '']
  lines += [
    'Top-1, %. A letter says whose number, under which protocol; compare only '
    'within one letter. The last column is filled by whoever runs the row: '
    'mean, standard deviation and number of seeds at the last step, then the '
    'best one.',
    '',
  ]
  lines += [f'- **{name}**: {text}' for name, text in table.sources.items()]
  head = ['teacher -> student', *table.sources, 'measured here']
  lines += ['', f'| {" | ".join(head)} |', '| :-- ' * len(head) + '|']
  for row in table.rows:
    cells = [f'{row.teacher} -> {row.student}']
    for source in table.sources:
      said = [
        f'{method} {value:.2f}'
        for name, method, value in row.published
        if name == source
      ]
      cells.append('<br>'.join(said))
    cells.append('<br>'.join(_said(measured(table, row))))
    lines.append(f'| {" | ".join(cells)} |')
  lines += [
    '',
    '## Commands',
    '',
  ]
  for row in table.rows:
    lines += [f'    {table.command(row)}']
  lines += [
    '',
    'Other methods by `method=NAME`, other seeds by `--config.seed`. A '
    'finished run goes into the table by `python -m '
    f'experiments.{table.name}_table add WORKDIR`.',
  ]
  return '\n'.join(lines) + '\n'


def _said(found) -> list[str]:
  """Returns a line for each method that was measured."""
  lines = []
  for method, runs in found.items():
    last, best = (
      100 * np.array([run[which] for run in runs]) for which in ('last', 'best')
    )
    spread = f' ± {np.std(last, ddof=1):.2f}' if len(runs) > 1 else ''
    lines.append(
      f'{method} {np.mean(last):.2f}{spread} ({len(runs)}), best '
      f'{np.mean(best):.2f}'
    )
  return lines


def main(table: Table, argv: list[str] = sys.argv[1:]) -> None:
  """Writes the page; with a command, what that says."""
  parser = config_utils.ArgumentParser(
    prog=f'python -m experiments.{table.name}_table',
    formatter_class=argparse.RawDescriptionHelpFormatter,
    description='write: the page. add WORKDIR: a finished run to the table.',
  )
  parser.add_argument('command', choices=['write', 'add'], nargs='?')
  parser.add_argument('workdir', type=pathlib.Path, nargs='?')
  flags = parser.parse_args(argv)
  if flags.command == 'add':
    if flags.workdir is None or not (flags.workdir / 'summary.json').exists():
      raise config_utils.UserError('add takes the folder of a finished run')
    add(table, flags.workdir)
  text = render(table)
  (FOLDER / f'{table.name}.md').write_text(text)
  print(text)
