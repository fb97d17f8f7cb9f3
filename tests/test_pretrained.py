"""Backbones that start from a bundle's weights, under a fresh head."""

import dataclasses

import jax
import numpy as np
import pytest

from ijckd_jax.bundles import bundles
from ijckd_jax.runtime import config_utils
from ijckd_jax.training import experiment
from ijckd_jax.training import train


@pytest.fixture(scope='module')
def source(finished_run, tmp_path_factory):
  """A folder with the teacher of a run: its mean is not the data set's."""
  workdir, _ = finished_run
  bundle = bundles.load(workdir / 'teacher')
  own = dataclasses.replace(bundle.network.preprocessing, mean=(0.123,))
  network = dataclasses.replace(bundle.network, preprocessing=own)
  folder = tmp_path_factory.mktemp('bundles') / 'source'
  dataclasses.replace(bundle, network=network).save(folder)
  return folder


def assert_part_of(some, whole):
  flat = jax.tree_util.tree_leaves_with_path(some)
  assert len(flat) > 5
  for path, leaf in flat:
    value = whole
    for key in path:
      value = value[key.key]
    np.testing.assert_array_equal(leaf, value)


@pytest.mark.parametrize('method', ['ce', 'ijckd'])
def test_the_backbone_is_taken_and_nothing_else(source, small_config, method):
  settings = {'student.init_from': str(source)}
  fresh = experiment.build(small_config(method))
  exp = experiment.build(small_config(method, **settings))
  key = jax.random.key(3)
  before, after = fresh.init(key), exp.init(key)
  assert jax.tree.structure(before) == jax.tree.structure(after)
  taken = bundles.load(source).variables
  for kind in ('params', 'batch_stats'):
    assert_part_of(after[kind]['backbone'], taken[kind]['backbone'])
    rest = (
      {key: part for key, part in variables[kind].items() if key != 'backbone'}
      for variables in (before, after)
    )
    jax.tree.map(np.testing.assert_array_equal, *rest)
  assert exp.distiller.network.preprocessing.mean == (0.123,)


@pytest.mark.slow
def test_a_run_fine_tunes_its_teacher(source, small_config, tmp_path, caplog):
  config = small_config(
    **{'teacher.init_from': str(source), 'teacher.learning_rate': 1e-9}
  )
  with caplog.at_level('INFO', logger='ijckd_jax'):
    train.train_and_evaluate(config, tmp_path / 'run')
  said = [r.getMessage() for r in caplog.records if str(source) in r.message]
  assert said == [
    f'{tmp_path / "run" / "teacher"}: the backbone starts with the weights of '
    f'{source}, the rest afresh'
  ]
  teacher, start = bundles.load(tmp_path / 'run/teacher'), bundles.load(source)
  for own, taken in zip(
    jax.tree.leaves(teacher.variables['params']['backbone']),
    jax.tree.leaves(start.variables['params']['backbone']),
    strict=True,
  ):
    np.testing.assert_allclose(own, taken, atol=1e-6)
  heads = (b.variables['params']['head']['kernel'] for b in (teacher, start))
  assert np.abs(next(heads) - next(heads)).max() > 0.01
  assert teacher.network.preprocessing.mean == (0.123,)


@pytest.mark.parametrize(
  'settings, message',
  [
    ({'student.backbone': 'resnet14'}, 'holds a plain'),
    ({'teacher.checkpoint': 'x', 'teacher.init_from': 'y'}, 'give one of them'),
    ({'student.init_from': 'nowhere'}, 'nowhere'),
  ],
)
def test_what_does_not_fit_is_refused(source, small_config, settings, message):
  settings = {'student.init_from': str(source), **settings}
  with pytest.raises(config_utils.UserError, match=message):
    experiment.build(small_config(**settings))


def test_another_shape_is_refused(source, small_config, tmp_path):
  bundle = bundles.load(source)
  start = experiment.build(
    small_config(**{'student.init_from': str(source)})
  ).start
  wrong = jax.tree.map(lambda x: np.zeros((*x.shape, 1)), start.variables)
  with pytest.raises(config_utils.UserError, match='must be'):
    dataclasses.replace(start, variables=wrong).fill(bundle.variables)
