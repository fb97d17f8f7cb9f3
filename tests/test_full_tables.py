"""The published tables: every row is a run that could start."""

import json

import pytest

from experiments import cifar100_table
from experiments import imagenet_table
from experiments.full_tables import table
from ijckd_jax.commands import sweep
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


@pytest.mark.parametrize('name, row', first_of_each())
def test_every_number_that_can_be_made_has_a_config(name, row):
  found = TABLES[name]
  for source, entry in found.entries(row):
    config = found.config(row, source, entry)
    assert config.method.name == table.method_of(entry)
    said = table.called(found, row, config.to_dict())
    assert said['name'] == entry and not said['differs']
    assert not source or source in said['sources']
    assert 'seed=0..9' in found.command(row, source, entry)


def test_weights_are_those_of_the_pair():
  """mdistiller, configs/cifar100/dkd/wrn40_2_wrn_16_2.yaml:19 and others;
  ReviewKD, CIFAR-100/script/reviewKD.sh; its ImageNet/README.md:38-48.
  """
  found = TABLES['cifar100']

  def method(key, name, source=''):
    return found.config(found.row(key), source, name).method

  assert method('wrn_40_2_wrn_16_2', 'dkd').nontarget_weight == 6
  assert method('resnet56_resnet20', 'dkd').nontarget_weight == 2
  assert method('resnet32x4_resnet8x4', 'dkd').nontarget_weight == 8
  assert method('resnet56_resnet20', 'reviewkd').weight == 0.6
  assert method('resnet32x4_resnet8x4', 'reviewkd').weight == 5
  assert method('resnet32x4_shufflenet_v2_cifar_x1_0', 'reviewkd').weight == 8
  dist = method('resnet32x4_resnet8x4', 'dist')
  assert (dist.inter_weight, dist.intra_weight, dist.temperature) == (2, 2, 4)
  hint = method('resnet32x4_resnet8x4', 'fitnet', 'S')
  assert (hint.stage, hint.add) == (1, 'kd:weight=1.0')
  assert method('resnet32x4_resnet8x4', 'fitnet', 'R').stage == 2
  for teacher, student, review, dkd in (
    ('resnet34', 'resnet18', 1, 0.5),
    ('resnet50', 'mobilenet_v1', 8, 2),
    ('resnet50', 'resnet18', 5, 8),  # Of which nothing was published.
  ):
    arg = f'imagenet:teacher={teacher},student={student}'
    assert config_utils.load(f'{arg},method=reviewkd').method.weight == review
    config = config_utils.load(f'{arg},method=dkd').method
    assert config.nontarget_weight == dkd
  moving = 'imagenet:teacher=resnet50,student=resnet18,method=atsc'
  assert config_utils.load(moving).method.change_weight == 10
  views = config_utils.load('imagenet:method=mlkd').method
  assert (views.temperature, views.cross_entropy_weight) == (1, 0.5)
  assert views.distillation_weight == views.batch_level_weight == 0.5
  assert views.class_level_weight == 0.5


def test_mobile_teachers_have_their_own_learning_rate():
  """RepDistiller, train_teacher.py: 0.01 for MobileNetV2 and ShuffleNets."""
  config = config_utils.load(
    'cifar100:teacher=shufflenet_v2_cifar_x1_0,student=resnet8x4'
  )
  assert config.teacher.learning_rate == 0.01
  assert config.optimizer.learning_rate == 0.05


def test_a_command_is_taken_as_it_stands(monkeypatch, capsys):
  """As far as the teacher, which is not there."""
  found = TABLES['imagenet']
  command = found.command(found.rows[0], name='srrl')
  words = command.split()
  assert words[:2] == ['ijckd', 'sweep']
  with pytest.raises(config_utils.UserError, match='teachers/resnet34'):
    sweep.main(words[2:])


def finished(folder, config, seed, top1, teacher=0.7561):
  """Writes what a finished run of a config leaves."""
  folder.mkdir(parents=True)
  summary = {
    'seed': seed,
    'student': {'last': {'top1': top1}, 'best': {'top1': 0.77}},
    'teacher': {'top1': teacher},
    'config': {**config.to_dict(), 'seed': seed},
    'versions': {'jax': '0.10.2', 'ijckd_jax': '0.2.0'},
    'devices': ['NVIDIA H200'],
  }
  (folder / 'summary.json').write_text(json.dumps(summary))


@pytest.fixture
def no_numbers_yet(monkeypatch, tmp_path):
  monkeypatch.setattr(table, 'MEASURED', tmp_path / 'measured.jsonl')


def test_the_runs_of_a_sweep_are_added_once(no_numbers_yet, tmp_path):
  found = TABLES['cifar100']
  row = found.row('resnet32x4_resnet8x4')
  for seed, top1 in ((0, 0.75), (1, 0.76)):
    config = found.config(row, 'S', 'fitnet')
    finished(tmp_path / 'row/sweep' / f'seed={seed}', config, seed, top1)
  finished(tmp_path / 'row/sweep/teacher_0badcafe', config, 0, 0.1)
  assert len(table.add(found, tmp_path / 'row')) == 2
  # Another machine's number of the same seed is no second seed.
  finished(tmp_path / 'again', config, 1, 0.70)
  assert 'this seed is there' in table.add(found, tmp_path / 'again')[0]
  page = table.render(found)
  assert 'fitnet (as in S) 75.50 ± 0.71 (2), best 77.00' in page
  (line,) = (line for line in page.splitlines() if 'NVIDIA H200' in line)
  cells = [cell.strip() for cell in line.strip('|').split('|')]
  assert cells[:5] == ['resnet32x4_resnet8x4', 'fitnet', 'S', '', '0, 1']
  # Of two values a and b: 12.706 |a - b| / 2, by Student's t.
  assert cells[5:9] == ['75.50', '± 6.35', '77.00', '75.61']
  assert cells[9] == 'NVIDIA H200, jax 0.10.2, ijckd_jax 0.2.0'


def test_what_is_not_alike_is_not_averaged(no_numbers_yet, tmp_path):
  found = TABLES['cifar100']
  row = found.row('resnet32x4_resnet8x4')
  configs = [found.config(row, source, 'kd') for source in 'RS']
  configs += [found.config(row, 'R', 'kd') for _ in range(2)]
  configs[2].teacher.fingerprint = 7  # Another teacher.
  configs[3].dtype = 'bfloat16'
  for i, config in enumerate(configs):
    finished(tmp_path / str(i), config, 0, 0.7 + i / 100)
    table.add(found, tmp_path / str(i))
  page = table.render(found)
  assert 'kd (as in R) 70.00 (1)' in page and 'kd (as in S) 71.00 (1)' in page
  assert 'kd (as in R) 72.00 (1)' in page
  assert 'kd (other settings) 73.00 (1)' in page and '`dtype=bfloat16`' in page


def test_a_method_without_a_number_says_what_differs(no_numbers_yet, tmp_path):
  found = TABLES['cifar100']
  row = found.row('resnet32x4_resnet8x4')
  config = found.config(row, '', 'srd')
  finished(tmp_path / 'a', config, 0, 0.75)
  config.total_epochs = 1.0
  finished(tmp_path / 'b', config, 1, 0.15)
  for name in 'ab':
    table.add(found, tmp_path / name)
  page = table.render(found)
  assert 'srd 75.00 (1)' in page and 'srd (other settings) 15.00 (1)' in page


def test_a_run_by_other_settings_says_which(no_numbers_yet, tmp_path):
  found = TABLES['cifar100']
  assert table.NONE in table.render(found)
  config = found.config(found.rows[0])
  config.total_epochs = 3.0
  # These change nothing of what is measured.
  config.num_workers = config.eval_batch_size = 7
  del config.augment.mixup_alpha  # As a version before it.
  finished(tmp_path / 'run', config, 0, 0.5)
  table.add(found, tmp_path / 'run')
  page = table.render(found)
  assert 'ijckd (other settings) 50.00 (1)' in page
  assert '`total_epochs=3.0`' in page
  for field in ('num_workers', 'eval_batch_size', 'mixup_alpha', table.NONE):
    assert field not in page


def test_what_is_no_row_is_refused(no_numbers_yet, tmp_path):
  found = TABLES['cifar100']
  config = found.config(found.rows[0])
  finished(tmp_path / 'sweep' / 'a', config, 0, 0.5)
  config.student.backbone = 'resnet8'
  finished(tmp_path / 'sweep' / 'b', config, 0, 0.5)
  with pytest.raises(config_utils.UserError, match='is no row of cifar100'):
    table.add(found, tmp_path / 'sweep')
  config = found.config(found.rows[0])
  config.dataset.name = 'cifar10'
  finished(tmp_path / 'other', config, 0, 0.5)
  with pytest.raises(config_utils.UserError, match='on cifar10 is no row'):
    table.add(found, tmp_path / 'other')
  finished(tmp_path / 'nan', found.config(found.rows[0]), 0, float('nan'))
  with pytest.raises(config_utils.UserError, match='are no numbers'):
    table.add(found, tmp_path / 'nan')
  assert not table.MEASURED.exists()
  (tmp_path / 'none').mkdir()
  with pytest.raises(config_utils.UserError, match='no finished run'):
    table.add(found, tmp_path / 'none')
  with pytest.raises(config_utils.UserError, match='resnet32x4_resnet8x4'):
    table.main(found, ['commands', 'resnet32x4_resnet8'])
  for words in (['commands'], ['add'], ['write', 'more']):
    with pytest.raises(config_utils.UserError, match='takes nothing'):
      table.main(found, words)


@pytest.mark.parametrize(
  'text', ['', '{', '{}', '[]', 'null', '{"config": {}}']
)
def test_damaged_files_are_refused(no_numbers_yet, tmp_path, text):
  found = TABLES['cifar100']
  (tmp_path / 'run').mkdir()
  (tmp_path / 'run' / 'summary.json').write_text(text)
  with pytest.raises(config_utils.UserError, match='no summary of a run'):
    table.add(found, tmp_path / 'run')
  table.MEASURED.write_text('{"table": "cifar')
  with pytest.raises(config_utils.UserError, match='measured.jsonl is damaged'):
    table.render(found)


def test_every_command_is_there_once(capsys):
  found = TABLES['cifar100']
  table.main(found, ['commands', 'resnet32x4_resnet8x4'])
  lines = capsys.readouterr().out.splitlines()
  commands = [line for line in lines if line.startswith('ijckd sweep')]
  settings = [line.partition('--config ')[2] for line in commands]
  assert len(set(settings)) == len(settings) > 15
  assert '# kd R' in lines and '# kd S' in lines and '# simkd S, L' in lines
