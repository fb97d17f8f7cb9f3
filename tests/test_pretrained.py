"""Backbones that start from a bundle's weights, under a fresh head."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from experiments.benchmarks import classifiers
from ijckd_jax import models
from ijckd_jax.bundles import bundles
from ijckd_jax.runtime import config_utils
from ijckd_jax.training import experiment
from ijckd_jax.training import train
from tests import marks


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
    f'{tmp_path / "run" / "teacher"}: starts with the backbone of {source}, '
    'and draws the rest afresh'
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
    dataclasses.replace(start, variables=wrong).fill(
      bundle.variables, bundle.network.backbone
    )


def connected(small_config, workdir, **fields):
  """Returns the config of a run that goes on with a connected student.

  By the labels alone; the student is its own teacher, for its head and width.
  """
  return small_config(
    **{
      'student.init_from': str(workdir),
      'student.init_parts': ('backbone', 'connector', 'head'),
      'teacher.checkpoint': str(workdir),
      'method.head': 'copy',
      'method.feature_weight': 0.0,
      'method.logit_weight': 0.0,
      **fields,
    }
  )


def test_a_connected_student_is_fine_tuned(
  finished_run, small_config, tmp_path, caplog
):
  """Nothing changes at a rate of nearly nothing, head and connector too.

  Nor does the moving average, which has the same arrays.
  """
  workdir, _ = finished_run
  rates = {'optimizer.learning_rate': 1e-12, 'ema_decay': 0.9}
  config = connected(small_config, workdir, **rates)
  with caplog.at_level('INFO', logger='ijckd_jax'):
    train.train_and_evaluate(config, tmp_path / 'run')
  said = f'starts with the backbone, connector, head of {workdir}, and draws'
  assert any(said in message for message in caplog.messages)
  start, end = (bundles.load(x) for x in (workdir, tmp_path / 'run'))
  assert end.variables['params'].keys() == {'backbone', 'connector', 'head'}
  jax.tree.map(
    lambda x, y: np.testing.assert_allclose(x, y, atol=1e-6),
    start.variables['params'],
    end.variables['params'],
  )


@pytest.mark.parametrize(
  'method, fields, message',
  [
    (
      'ce',
      {'student.init_parts': ('backbone', 'connector')},
      'no connector is',
    ),
    ('ijckd', {'student.init_parts': ('head',)}, 'no head is trained here'),
    ('ijckd', {'student.init_parts': ('heads',)}, "did you mean 'head'"),
    ('ijckd', {'student.init_parts': ()}, r'init_parts=\(\): name what'),
    (
      'ijckd',
      {'student.init_parts': ('connector',), 'method.factor': 4},
      'connector.* must be .* take its connector .bottleneck, factor=2',
    ),
  ],
)
def test_parts_that_do_not_fit_are_refused(
  finished_run, small_config, method, fields, message
):
  workdir, _ = finished_run
  settings = {
    'student.init_from': str(workdir),
    'teacher.checkpoint': str(workdir / 'teacher'),
  }
  with pytest.raises(config_utils.UserError, match=message):
    experiment.build(small_config(method, **{**settings, **fields}))


def test_a_bundle_without_a_connector_gives_none(finished_run, small_config):
  teacher = str(finished_run[0] / 'teacher')
  settings = {
    'student.init_from': teacher,
    'student.init_parts': ('backbone', 'connector'),
    'teacher.checkpoint': teacher,
  }
  with pytest.raises(config_utils.UserError, match='holds no connector, but'):
    experiment.build(small_config(**settings))


def test_a_backbone_that_ends_early_cannot_start_a_whole_one(
  small_config, tmp_path
):
  bundle = classifiers.alone('mobilenet_v2_cifar_x0_5', (8, 8, 1), 10)
  backbone = models.build(bundle.backbone_name, tap='stage')
  variables = {
    'params': dict(bundle.variables['params']),
    'batch_stats': dict(bundle.variables['batch_stats']),
    'pool': {},
  }
  for kind in ('params', 'batch_stats'):
    layers = bundle.variables[kind]['backbone'].items()
    variables[kind]['backbone'] = {
      name: x for name, x in layers if not name.startswith('conv2')
    }
  head = variables['params']['head']
  variables['params']['head'] = {**head, 'kernel': head['kernel'][:160]}
  network = dataclasses.replace(bundle.network, backbone=backbone)
  dataclasses.replace(bundle, network=network, variables=variables).save(
    tmp_path / 'early'
  )
  settings = {'student.init_from': str(tmp_path / 'early')}
  name = bundle.backbone_name
  message = 'its backbone ends at tap=stage, and a student that starts from it'
  with pytest.raises(config_utils.UserError, match=message):
    experiment.build(small_config('ce', backbone=name, **settings))


def test_positions_are_resized_for_images_of_another_size():
  """Hand-made: a ramp stays one, and the class token stays as it is."""
  ramp = np.linspace(0, 1, 4)[:, None] + np.zeros((4, 4))
  grid = np.stack([ramp, 2 * ramp.T], axis=-1).reshape(1, 16, 2)
  old = {'pos_embed': np.concatenate([np.full((1, 1, 2), 7.0), grid], axis=1)}
  backbone = models.DeiT(width=2)
  made = backbone.fit_to_size(old, (64, 64), (128, 128))['pos_embed']
  np.testing.assert_array_equal(made[0, 0], [7, 7])
  made = made[0, 1:].reshape(8, 8, 2)
  assert (np.diff(made[:, 0, 0]) > 0).all() and np.ptp(made[3, :, 0]) < 1e-6
  np.testing.assert_allclose(made[..., 1], 2 * made[..., 0].T, atol=1e-6)
  assert backbone.fit_to_size(old, (64, 64), (64, 64)) is old


SmallDeiT = functools.partial(
  models.DeiT, width=8, depth=4, num_heads=2, patch=4
)


@pytest.mark.parametrize(
  'size', marks.slow_but([(4, 16)], [(8, 8), (4, 16), (16, 16)])
)
def test_a_run_starts_from_weights_for_another_size(
  size, small_config, tmp_path, caplog
):
  """It says so, also where as many positions lie in another shape."""
  name = f'{__name__}:SmallDeiT'
  classifiers.alone(name, (*size, 1), 10).save(tmp_path / 'source')
  config = small_config(
    'ce',
    backbone=name,
    total_steps=1,
    **{
      'student.init_from': str(tmp_path / 'source'),
      'optimizer.learning_rate': 1e-12,
    },
  )
  with caplog.at_level('INFO', logger='ijckd_jax'):
    train.train_and_evaluate(config, tmp_path / 'run')
  said = f'embedding of positions from images of {size[0]}x{size[1]} to 8x8'
  said = any(message.endswith(said) for message in caplog.messages)
  assert said == (size != (8, 8))
  start, end = (
    bundles.load(tmp_path / folder, trust_code=True).variables['params']
    for folder in ('source', 'run')
  )
  wanted = SmallDeiT().fit_to_size(start['backbone'], size, (8, 8))
  jax.tree.map(
    lambda x, y: np.testing.assert_allclose(x, y, atol=1e-6),
    dict(wanted),
    end['backbone'],
  )
