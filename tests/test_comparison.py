"""The comparison of methods: what is run, and the statistics of its tables."""

import json
import math
import shutil

import jax
import numpy as np
import pytest
from scipy import stats

from experiments import compare_methods
from experiments.comparison import analyse
from experiments.comparison import grid
from ijckd_jax.distillation import methods
from ijckd_jax.runtime import config_utils
from ijckd_jax.training import experiment
from ijckd_jax.training import sweep


@pytest.fixture(autouse=True)
def rates(monkeypatch):
  monkeypatch.setattr(grid, 'learning_rate', lambda pair: 0.1)


def row(name, seed, top1, pair='same', count=100, device='cpu'):
  return {
    'pair': pair,
    'devices': [device],
    'settings': {},
    'name': name,
    'seed': seed,
    'last': {'top1': top1},
    'best': {'top1': top1 + 0.01},
    'parameters': {'backbone': count, 'connector': 0, 'head': 0},
    'images_per_second': 1000.0,
    'seconds': 36.0,
    'teacher': {'name': 'teacher', 'fingerprint': 1, 'top1': 0.8},
  }


def test_runs_are_told_apart_and_the_first_part_comes_first():
  runs = grid.runs()
  names = [grid.run_name(*run) for run in runs]
  assert len(set(names)) == len(names)
  assert len(names) == sum(cell.num_seeds for cell in grid.CELLS)
  assert {cell.name for cell, _ in runs[:60]} == {
    cell.name for cell in grid.CELLS if 'methods' in cell.parts
  }
  # All cells of a seed before the next seed: what is there is paired.
  assert [seed for _, seed in runs[:12]] == [0] * 6 + [1] * 6
  assert names[0] == 'same/ijckd/0'


@pytest.mark.parametrize('cell', grid.CELLS, ids=lambda c: f'{c.pair} {c.name}')
def test_every_cell_is_a_config(cell):
  config = cell.config('', 3)
  method = methods.build(config.method)
  for field, value in cell.fields.items():
    assert getattr(method, field) == value
  assert config.seed == 3
  # Stored are the outputs of the image itself: there is no augmentation.
  views = config.teacher.store.views
  assert not views or not (config.dataset.crop_padding or config.dataset.flip)


@pytest.mark.slow
@pytest.mark.parametrize('cell', grid.CELLS, ids=lambda c: f'{c.pair} {c.name}')
def test_every_cell_builds(cell):
  config = cell.config('', 0)
  config.teacher.refit, config.teacher.refit_epochs = '', ()
  exp = experiment.build(config)
  assert (exp.stored is not None) == (config.teacher.store.views > 0)


def test_intervals_are_students():
  values = [0.1, 0.4, -0.2, 0.5]
  mean, half = analyse.interval(values)
  found = stats.ttest_1samp(values, 0.0).confidence_interval(0.95)
  np.testing.assert_allclose((mean - half, mean + half), found)
  assert math.isnan(analyse.interval([1.0])[1])


def test_differences_are_of_the_same_seed():
  rows = [row('ijckd', 0, 0.8), row('ijckd', 2, 0.81), row('ijckd', 3, 0.9)]
  rows += [row('ce', 2, 0.75), row('ce', 0, 0.7), row('ce', 1, 0.5)]
  rows += [row('ce', 3, 0.1, pair='cross')]
  np.testing.assert_allclose(
    analyse.differences(rows, 'same', 'ijckd', 'ce'), [10, 6]
  )


def test_differences_are_of_the_same_machine():
  rows = [row('ijckd', 0, 0.8), row('ijckd', 0, 0.7, device='gpu')]
  rows += [row('crd', 0, 0.6, device='gpu'), row('crd', 1, 0.5)]
  np.testing.assert_allclose(
    analyse.differences(rows, 'same', 'crd', 'ijckd'), [-10]
  )
  # What was repeated counts once, as it was made first.
  np.testing.assert_allclose(analyse.scores(rows, 'same', 'ijckd'), [80])
  assert not analyse.differences(rows, 'same', 'ijckd', 'crd')
  assert list(analyse.repeats(rows)) == ['gpu']
  ((_, values),) = analyse.repeats(rows)['gpu'].items()
  np.testing.assert_allclose(values, [-10])
  said = analyse.tables(rows)
  assert '2 runs on cpu, 0.0 hours' in said
  assert '1 of the runs on gpu repeat others, and end -10.00 points' in said


def test_holms_procedure_by_hand():
  np.testing.assert_allclose(
    analyse.holm([0.01, 0.04, 0.03]), [0.03, 0.06, 0.06]
  )
  np.testing.assert_allclose(analyse.holm([0.6, 0.7]), [1, 1])


def test_the_variance_is_pooled_over_cells():
  """Differences of 1, 2, 3 and of 0, 0, 3 points: variances of 1 and 3."""
  rows = [row('ijckd', seed, 0.7) for seed in range(3)]
  rows += [row('dkd', seed, 0.71 + seed / 100) for seed in range(3)]
  rows += [row('crd', seed, 0.7 + 0.03 * (seed == 2)) for seed in range(3)]
  std, freedom = analyse.pooled(rows)
  assert (std, freedom) == (pytest.approx(2**0.5), 4)
  dkd, crd = sorted(analyse.others(rows), key=lambda found: -found['mean'])
  assert (dkd['name'], crd['name']) == ('dkd', 'crd')
  assert dkd['mean'] == pytest.approx(2)
  error = (2 / 3) ** 0.5
  t = stats.t(4)
  assert dkd['half_width'] == pytest.approx(t.ppf(0.975) * error)
  assert dkd['p'] == pytest.approx(2 * t.sf(2 / error))
  assert dkd['p_holm'] == pytest.approx(2 * dkd['p'])
  assert crd['p_own'] == pytest.approx(stats.ttest_1samp([0, 0, 3], 0.0).pvalue)


def test_what_was_not_run_stays_empty():
  rows = [row('ijckd', 0, 0.8), row('ijckd', 1, 0.82), row('ce', 0, 0.7)]
  text = analyse.tables(rows)
  lines = text.splitlines()
  ijckd = next(line for line in lines if line.startswith('| ijckd |'))
  assert '81.00 ± 1.41' in ijckd and '+10.00' in ijckd
  kd = next(line for line in lines if line.startswith('| kd |'))
  assert not kd.removeprefix('| kd |').strip('| ')
  assert 'ijckd - srrl' not in text and 'nan' not in text


def test_committed_results_are_of_the_plan():
  rows = analyse.read(compare_methods.RESULTS)
  keys = [(r['pair'], r['name'], r['seed'], *r['devices']) for r in rows]
  planned = {(c.pair, c.name, seed) for c, seed in grid.runs()}
  assert len(set(keys)) == len(keys) and {k[:3] for k in keys} <= planned
  assert len({r['teacher']['fingerprint'] for r in rows}) <= 1
  for r in rows:
    cell = grid.find(r['pair'], r['name'])
    settings = json.loads(json.dumps(cell.settings))
    assert (r['fields'], r['settings']) == (cell.fields, settings)
  page = grid.FOLDER / 'tables.md'
  assert not rows or page.read_text() == analyse.tables(rows)


def test_collected_lines_are_added_and_kept(monkeypatch, tmp_path, capsys):
  results = tmp_path / 'results.jsonl'
  monkeypatch.setattr(compare_methods, 'RESULTS', results)
  results.write_text(json.dumps(row('ijckd', 1, 0.5)) + '\n')
  for seed in (0, 1):
    folder = tmp_path / 'work/same/ijckd' / str(seed)
    folder.mkdir(parents=True)
    (folder / 'row.json').write_text(json.dumps(row('ijckd', seed, 0.9)))
  compare_methods.main(['collect', str(tmp_path / 'work')])
  found = [(r['seed'], r['last']['top1']) for r in analyse.read(results)]
  assert found == [(0, 0.9), (1, 0.5)]
  # Another machine's are kept beside, and after it.
  other = row('ijckd', 1, 0.4, device='a GPU')
  (folder / 'row.json').write_text(json.dumps(other))
  compare_methods.main(['collect', str(tmp_path / 'work')])
  found = [(r['seed'], r['last']['top1']) for r in analyse.read(results)]
  assert found == [(0, 0.9), (1, 0.5), (1, 0.4)]


@pytest.fixture
def begun(monkeypatch, tmp_path):
  """The runs that are asked for, which are not made; beside a teacher."""
  names = []

  def note(configs, workdir, *, jobs, finished):
    assert workdir == tmp_path
    names.append(dict(configs))
    return sweep.Outcome(dict.fromkeys(configs), {}, tuple(configs), [])

  monkeypatch.setattr(compare_methods.sweep, 'run', note)
  monkeypatch.setattr(compare_methods, 'RESULTS', tmp_path / 'results.jsonl')
  (tmp_path / 'teacher').mkdir()
  (tmp_path / 'teacher/summary.json').touch()
  return names


def test_what_another_machine_has_made_is_repeated_when_asked(
  begun, monkeypatch, tmp_path
):
  monkeypatch.setattr(compare_methods, '_devices', lambda: ['cpu'])
  results = tmp_path / 'results.jsonl'
  results.write_text(json.dumps(row('ijckd', 0, 0.8, device='a GPU')) + '\n')
  arguments = ['run', str(tmp_path), '--only', 'same/ijckd/0']
  compare_methods.main(arguments)
  assert not begun
  compare_methods.main([*arguments, '--repeat'])
  assert list(begun.pop()) == ['same/ijckd/0']
  results.write_text(json.dumps(row('ijckd', 0, 0.8)) + '\n')
  compare_methods.main([*arguments, '--repeat'])
  # Nor what is there to be collected.
  results.unlink()
  (tmp_path / 'same/ijckd/0').mkdir(parents=True)
  (tmp_path / 'same/ijckd/0/row.json').touch()
  compare_methods.main(arguments)
  assert not begun


def test_without_a_teacher_nothing_is_run(begun, tmp_path):
  (tmp_path / 'teacher/summary.json').unlink()
  with pytest.raises(config_utils.UserError, match='no trained teacher in'):
    compare_methods.main(['run', str(tmp_path)])
  assert not begun


def test_all_runs_of_the_plan_are_a_sweep(begun, tmp_path):
  """Their names are folders, and no two of them are the same run."""
  compare_methods.main(['run', str(tmp_path)])
  (configs,) = begun
  assert list(configs) == [grid.run_name(*run) for run in grid.runs()]
  sweep._check_names(configs)
  settings = set(sweep.setting_names(configs).values())
  assert len(settings) == len(grid.CELLS)
  tasks = sweep._tasks(configs, tmp_path)
  assert all(task.teacher is None for task in tasks)  # It is given.


def test_devices_are_those_of_the_runs():
  here = [device.device_kind for device in jax.devices()]
  assert compare_methods._devices() == here


def test_a_finished_run_leaves_a_line(
  monkeypatch, tmp_path, begun, finished_run
):
  folder = tmp_path / 'same/ijckd/0'
  summary = finished_run[1].summary

  def finish(configs, workdir, *, jobs, finished):
    assert jobs == 3
    (folder / 'checkpoints').mkdir(parents=True)
    finished('same/ijckd/0', summary, 12.5)
    return sweep.Outcome(dict.fromkeys(configs), {}, (), [])

  monkeypatch.setattr(compare_methods.sweep, 'run', finish)
  arguments = ['run', str(tmp_path), '--only', 'same/ijckd/0', '--jobs', '3']
  assert compare_methods.main(arguments) == 0
  found = json.loads((folder / 'row.json').read_text())
  assert compare_methods._key(found) == ('same', 'ijckd', 0)
  assert found['seconds'] == 12.5
  assert found['last'] == summary['student']['last']
  assert not (folder / 'checkpoints').exists()
  # Its students cannot be compared with those of another teacher.
  other = row('ijckd', 1, 0.5)
  assert other['teacher']['fingerprint'] != found['teacher']['fingerprint']
  compare_methods.RESULTS.write_text(json.dumps(other) + '\n')
  shutil.rmtree(folder)
  with pytest.raises(config_utils.UserError, match='not the teacher of'):
    compare_methods.main(arguments)
  assert not (folder / 'row.json').exists()


def test_rates_are_chosen_by_validation(monkeypatch, tmp_path, capsys):
  def make(configs, workdir, *, jobs):
    for name, config in configs.items():
      folder = workdir / name
      folder.mkdir(parents=True)
      rate = config.optimizer.learning_rate
      line = {'step': 1, 'validation/top1': 0.9 - (rate - 0.1) ** 2}
      (folder / 'metrics.jsonl').write_text(json.dumps(line) + '\n')
    summaries = dict.fromkeys(configs, {'images_per_second': 7.0})
    return sweep.Outcome(summaries, {}, (), [])

  monkeypatch.setattr(compare_methods.sweep, 'run', make)
  monkeypatch.setattr(compare_methods, 'RATES', tmp_path / 'rates.json')
  compare_methods.main(['rates', str(tmp_path), '--only', 'same'])
  found = json.loads((tmp_path / 'rates.json').read_text())
  assert list(found) == ['same'] and found['same']['chosen'] == 0.1
  assert found['same']['validation_top1']['0.1'] == 0.9


@pytest.mark.parametrize(
  'arguments, said',
  [
    (['run'], 'takes a WORKDIR'),
    (['fly'], 'invalid choice'),
    (['run', 'nowhere', '--jobs', 'x'], 'invalid int'),
  ],
)
def test_mistakes(arguments, said):
  with pytest.raises(config_utils.UserError, match=said):
    compare_methods.main(arguments)
