"""The study of the thesis: its runs are known again, and its verdicts."""

import json

import numpy as np
import pytest
from scipy import stats

from experiments.thesis import analyse
from experiments.thesis import config as study
from experiments.thesis import garments
from ijckd_jax.data import datasets
from ijckd_jax.data.datasets import fashion_mnist
from ijckd_jax.runtime import config_utils
from ijckd_jax.training import experiment


def row(cell, seed, top1, data='pairs', labels='all'):
  return {
    'data': data,
    'cell': cell,
    'labels': labels,
    'seed': seed,
    'top1': top1,
    'teacher': 7,
    'teacher_top1': 80.0,
    'deployed': 1000,
    'training_seconds': 60,
    'devices': ['cpu'],
    'versions': {'jax': '0.10.2'},
  }


def runs(cell, differences, data='pairs'):
  """Returns runs of IJCKD, and of a cell that is below it by so much."""
  found = []
  for seed, difference in enumerate(differences):
    found.append(row('ijckd', seed, 70.0 + seed, data))
    found.append(row(cell, seed, 70.0 + seed - difference, data))
  return found


def write_run(folder, arg, seed=0, **changes):
  config = study.get_config(arg)
  config_utils.override(config, changes)
  folder.mkdir(parents=True)
  summary = {
    'config': json.loads(config.to_json_best_effort()),
    'seed': seed,
    'steps': 1171,
    'images_per_second': 1171.0,
    'student': {'last': {'top1': 0.5}},
    'teacher': {'top1': 0.8},
    'parameters': {'student': {'backbone': 7, 'head': 3}},
    'devices': ['cpu'],
    'versions': {'jax': '0.10.2'},
  }
  (folder / 'summary.json').write_text(json.dumps(summary))


@pytest.mark.parametrize('cell', sorted(set(study.CELLS) - {'teacher'}))
def test_each_cell_can_run(cell):
  """On other data, which are always there; what it stores must be read."""
  method, fields = study.CELLS[cell]
  config = experiment.default_config(
    dataset='digits', teacher='resnet8', student='resnet8', method=method
  )
  config.method.update(fields)
  config.total_epochs = 1.0
  config.teacher.store = study.get_config(f'cell={cell}').teacher.store
  experiment.build(config)


def test_runs_are_known_by_their_configs(tmp_path):
  cells = [cell for cell in study.CELLS if cell != 'teacher']
  for number, cell in enumerate(study.CELLS):
    write_run(tmp_path / f'{number}', f'data=glyphs,cell={cell}', seed=3)
  write_run(
    tmp_path / 'few',
    'data=glyphs,cell=kd,labels=tenth',
    seed=1,
    **{'dataset.path': '/elsewhere'},
  )
  found = analyse.gather(tmp_path)
  everything = {(r['cell'], r['labels'], r['seed']) for r in found}
  assert everything == {(cell, 'all', 3) for cell in cells} | {
    ('kd', 'tenth', 1)
  }
  assert found[0]['deployed'] == 10 and found[0]['training_seconds'] == 128
  # A run that is known is not taken again.
  other = [{**found[0], 'top1': 1.0}]
  assert analyse.add(found, other) == analyse.add(found, [])
  assert len(analyse.add(found, found)) == len(found)
  students = [{**one, 'teacher': number} for number, one in enumerate(found, 1)]
  with pytest.raises(SystemExit, match='glyphs: the students have'):
    analyse.add(students, [])


@pytest.mark.parametrize(
  'field, value',
  [
    ('method.temperature', 2.0),
    ('optimizer.learning_rate', 0.05),
    ('batch_size', 64),
    ('dataset.num_train', 20_000),
  ],
)
def test_a_run_of_other_settings_is_refused(field, value, tmp_path):
  write_run(tmp_path / 'other', 'data=glyphs,cell=kd', **{field: value})
  with pytest.raises(SystemExit, match='other is no run of this study'):
    analyse.gather(tmp_path)


def test_contrasts_and_what_the_plan_says_of_them():
  alike = [0.1, -0.1, 0.1, -0.05, 0.05] * 2
  wide = [3.0, -3.0, 2.0, -2.0, 0.5] * 2
  surely = [1.0, 1.1, 0.9, 1.0, 1.05] * 2
  a_little = [0.1, 0.11, 0.09, 0.1, 0.12] * 2
  rows = [
    *runs('fresh_head', alike),
    *runs('own_head', wide),
    *runs('dkd', surely, 'glyphs'),
    *runs('fresh_head', [-x for x in surely], 'glyphs'),
    *runs('own_head', a_little, 'glyphs'),
    *runs('copied_head', surely[:9], 'glyphs'),
  ]
  found = analyse.contrasts(rows)
  verdicts = {(r['data'], r['other']): r['verdict'] for r in found}
  assert verdicts == {
    ('pairs', 'fresh_head'): 'alike within 0.3',
    ('pairs', 'own_head'): 'open',
    ('glyphs', 'dkd'): 'better',
    ('glyphs', 'fresh_head'): 'worse',
    ('glyphs', 'own_head'): 'better, alike within 0.3',
    ('glyphs', 'copied_head'): 'incomplete',
  }
  best = next(r for r in found if r['other'] == 'dkd')
  seeds = np.arange(10)
  expected = stats.ttest_rel(70 + seeds, 70 + seeds - surely)
  np.testing.assert_allclose(best['p'], expected.pvalue, rtol=1e-6)
  # The smallest of ten, of which four are not there.
  by_p = sorted(contrast['p'] for contrast in found)
  assert best['p'] in by_p[:3]
  np.testing.assert_allclose(
    best['p_holm'], (10 - by_p.index(best['p'])) * best['p'], rtol=1e-6
  )
  low, high = stats.t.interval(0.95, 9, np.mean(surely), stats.sem(surely))
  np.testing.assert_allclose(best['half_width'], (high - low) / 2, rtol=1e-6)
  # Two one-sided tests are the 90% interval.
  for contrast, values in ((found[0], alike), (best, surely)):
    low, high = stats.t.interval(0.9, 9, np.mean(values), stats.sem(values))
    inside = -0.3 < low and high < 0.3
    assert (contrast['p_alike'] < 0.05) == inside
  # A seed beyond the ten of the plan decides nothing.
  more = [row('ijckd', 10, 99.0, 'glyphs'), row('dkd', 10, 0.0, 'glyphs')]
  again = analyse.contrasts(rows + more)
  assert next(r for r in again if r['other'] == 'dkd') == best
  text = analyse.tables(rows)
  assert '| `dkd` | glyphs | 10 | +1.01 ± 0.05 |' in ' '.join(text.split())


def test_a_label_for_few_images_weighs_as_much_as_one_for_all():
  few = study.get_config('data=glyphs,cell=ijckd,labels=hundredth')
  assert few.method.cross_entropy_weight == 100
  assert few.dataset.num_labelled == 100 and few.dataset.keep_unlabelled
  alone = study.get_config('data=glyphs,cell=ce,labels=hundredth')
  assert not alone.dataset.keep_unlabelled
  assert few.total_steps == alone.total_steps == 1171
  with pytest.raises(config_utils.UserError, match='takes labels=all'):
    study.get_config('data=pairs,labels=tenth')
  with pytest.raises(config_utils.UserError, match='ijckd probe makes it'):
    study.get_config('data=garments,cell=teacher,labels=tenth')


def test_garments_have_three_channels_and_few_labels():
  grey = np.arange(2 * 28 * 28).reshape(2, 28, 28, 1).astype(np.uint8)
  arrays = datasets.Arrays(grey, np.array([0, 1]))
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(fashion_mnist.Dataset, 'load', lambda self, split: arrays)
    found = garments.Dataset(num_labelled=1).load('train')
    np.testing.assert_array_equal(found.images, np.repeat(grey, 3, axis=3))
    assert sorted(found.labels) in ([-1, 0], [-1, 1])
    assert len(garments.Dataset(num_test=1).load('test')) == 1
