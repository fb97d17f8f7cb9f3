"""The published tables: every row is a run that could start."""

import json

import pytest

from experiments import cifar100_table
from experiments import imagenet_table
from experiments.full_tables import table
from ijckd_jax import main
from ijckd_jax.distillation import methods
from ijckd_jax.runtime import config_utils
from ijckd_jax.training import experiment

TABLES = {t.name: t for t in (cifar100_table.TABLE, imagenet_table.TABLE)}
ROWS = [(name, row) for name, found in TABLES.items() for row in found.rows]


def first_of_each():
  """Returns the rows as parameters; all but each table's first are slow."""
  return [
    pytest.param(
      *(name, row),
      marks=() if row == TABLES[name].rows[0] else pytest.mark.slow,
      id=f'{name}-{row.key}',
    )
    for name, row in ROWS
  ]


@pytest.mark.parametrize('name, row', first_of_each())
def test_every_row_builds(name, row):
  exp = experiment.build(TABLES[name].config(row))
  assert exp.teacher.name == row.teacher
  assert exp.config.student.backbone == row.student
  assert exp.distiller.reuses_head


@pytest.mark.parametrize('name', TABLES)
def test_the_page_is_what_the_rows_say(name):
  page = (table.FOLDER / f'{name}.md').read_text()
  assert page == table.render(TABLES[name])


@pytest.mark.parametrize('name', TABLES)
def test_rows_are_told_apart_and_their_numbers_have_sources(name):
  found = TABLES[name]
  assert len({row.key for row in found.rows}) == len(found.rows)
  for row in found.rows:
    for source, method, value in row.published:
      assert source in found.sources and method and 50 < value < 90
    said = [(source, method) for source, method, _ in row.published]
    assert len(set(said)) == len(said)


def test_a_command_is_taken_as_it_stands(monkeypatch, capsys):
  """As far as the teacher, which is not there."""
  found = TABLES['imagenet']
  command = found.command(found.rows[0], method='srrl', seed=3)
  words = command.split()
  assert words[:2] == ['ijckd', 'train']
  with pytest.raises(config_utils.UserError, match='teachers/resnet34'):
    main.main(words[2:])


def test_a_finished_run_is_added(monkeypatch, tmp_path):
  found, row = TABLES['cifar100'], TABLES['cifar100'].rows[0]
  monkeypatch.setattr(table, 'MEASURED', tmp_path / 'measured.jsonl')
  for seed, top1 in ((0, 0.75), (1, 0.76)):
    config = found.config(row)
    summary = {
      'seed': seed,
      'student': {'last': {'top1': top1}, 'best': {'top1': 0.77}},
      'teacher': {'top1': 0.7561},
      'config': config.to_dict(),
      'versions': {},
      'devices': [],
    }
    (tmp_path / 'summary.json').write_text(json.dumps(summary))
    table.add(found, tmp_path)
  assert 'ijckd 75.50 ± 0.71 (2), best 77.00' in table.render(found)
  config.student.backbone = 'resnet8'
  summary['config'] = config.to_dict()
  (tmp_path / 'summary.json').write_text(json.dumps(summary))
  with pytest.raises(config_utils.UserError, match='is no row of cifar100'):
    table.add(found, tmp_path)
  assert set(methods.METHODS) >= {
    run['method'] for run in map(json.loads, table.MEASURED.open())
  }
