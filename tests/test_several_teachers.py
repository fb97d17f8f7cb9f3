"""Several teachers, whose losses are averaged; one has the joint classifier."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.benchmarks import classifiers
import ijckd_jax
from ijckd_jax.bundles import bundles
from ijckd_jax.runtime import config_utils
from ijckd_jax.training import experiment
from ijckd_jax.training import train


@pytest.fixture(scope='module')
def folders(tmp_path_factory, finished_run):
  """Two bundles of other widths: a resnet8's and a resnet8x4's."""
  other = tmp_path_factory.mktemp('other') / 'bundle'
  bundle = classifiers.alone('resnet8x4', (8, 8, 1), num_classes=10)
  bundle.save(other)
  return [str(finished_run[0] / 'teacher'), str(other)]


@pytest.fixture
def config_of(folders, small_config):
  """Returns a function that gives a config with both teachers."""

  def make(method='ijckd', **fields):
    return small_config(
      method,
      **{
        'teacher.checkpoint': folders[0],
        'teacher.others': (folders[1],),
        **fields,
      },
    )

  return make


def bound(config):
  """Returns an experiment's distiller, its variables and a batch."""
  distiller = experiment.build(config).distiller
  init = jax.jit(distiller.init, static_argnums=1)
  variables = init(jax.random.key(0), (8, 8, 1))
  rng = np.random.default_rng(0)
  batch = {
    'image': rng.integers(0, 256, (6, 8, 8, 1)).astype(np.uint8),
    'label': rng.integers(-1, 10, 6).astype(np.int32),
    'index': np.arange(6, dtype=np.int32),
    'epoch': np.zeros(6, np.int32),
  }
  return distiller, variables, batch


def run(distiller, variables, frozen, batch):
  """Returns the student's Outputs for each link, statistics, the teachers'."""
  students, stats = distiller.run_student(variables, frozen, batch['image'])
  return students, stats, distiller.run_teachers(frozen, batch['image'])


@pytest.mark.parametrize(
  'method, weights',
  [('ijckd', ()), ('ijckd', (3.0, 1.0)), ('srrl', (3.0, 1.0)), ('kd', ())],
)
def test_the_loss_is_the_mean_of_the_losses(config_of, method, weights):
  """Each of the student, as it is connected to that teacher alone."""
  config = config_of(method, **{'teacher.weights': weights})
  distiller, variables, batch = bound(config)
  students, _, given = jax.jit(functools.partial(run, distiller))(
    variables, distiller.frozen, batch
  )
  total, terms = distiller.loss(students, given, batch)
  values = []
  for teacher, student in zip(distiller.teachers, students, strict=True):
    alone = jax.jit(teacher.__call__)(teacher.arrays, batch['image'])
    values.append(distiller.method.loss(student, alone, batch))
  shares = np.array(weights or (1.0, 1.0)) / sum(weights or (1.0, 1.0))
  wanted = sum(
    share * value[0] for share, value in zip(shares, values, strict=True)
  )
  np.testing.assert_allclose(total, wanted, rtol=1e-5)
  for name, term in terms.items():
    wanted = sum(
      s * value[1][name] for s, value in zip(shares, values, strict=True)
    )
    np.testing.assert_allclose(term, wanted, rtol=1e-5)
  assert values[0][0] != values[1][0]


def test_each_has_a_connector_and_one_is_deployed(config_of, folders):
  distiller, variables, batch = bound(config_of())
  assert set(variables['params']) == {'backbone', 'connector', 'connector_1'}
  widths = [teacher.num_features for teacher in distiller.teachers]
  assert widths == [32, 256]
  students, stats, _ = jax.eval_shape(
    functools.partial(run, distiller), variables, distiller.frozen, batch
  )
  assert [s.connected.pooled.shape for s in students] == [(6, 32), (6, 256)]
  assert set(stats) == {'backbone', 'connector', 'connector_1'}
  deployed = distiller.deployed(variables, distiller.frozen)
  assert set(deployed['params']) == {'backbone', 'connector', 'head'}
  assert set(deployed['batch_stats']) == {'backbone', 'connector'}
  # Those to the first are as without the other.
  config = config_of(**{'teacher.others': ()})
  alone = bound(config)[1]
  for part in ('backbone', 'connector'):
    jax.tree.map(
      np.testing.assert_array_equal,
      alone['params'][part],
      variables['params'][part],
    )


def test_a_gradient_reaches_all_connectors(config_of):
  distiller, variables, batch = bound(config_of())

  def loss(params):
    students, _, given = run(
      distiller, {**variables, 'params': params}, distiller.frozen, batch
    )
    return distiller.loss(students, given, batch)[0]

  gradients = jax.jit(jax.grad(loss))(variables['params'])
  for part in gradients.values():
    assert any(jnp.any(leaf != 0) for leaf in jax.tree.leaves(part))


def test_another_may_have_the_joint_classifier(config_of, folders):
  distiller, _, _ = bound(
    config_of(**{'teacher.joint': 1, 'teacher.weights': (3.0, 1.0)})
  )
  assert [t.num_features for t in distiller.teachers] == [256, 32]
  assert [link.weight for link in distiller.links] == [1.0, 3.0]


@pytest.mark.slow
def test_a_run_from_python_stands_alone(folders, tmp_path, data_dir):
  """With stored outputs of both, it ends like one whose teachers run."""
  results = []
  for views in (0, 1):
    results.append(
      ijckd_jax.distill(
        teacher=folders,
        student='resnet8',
        data='digits',
        workdir=tmp_path / str(views),
        settings={
          'dataset.data_dir': data_dir,
          'total_epochs': 0.0,
          'total_steps': 34,
          'batch_size': 48,
          'eval_batch_size': 120,
          'teacher.store.views': views,
          'teacher.store.dtype': 'float32',
        },
      )
    )
  last = [result.summary['student']['last'] for result in results]
  assert last[0]['nll'] == pytest.approx(last[1]['nll'], rel=0.05)
  manifest = json.loads(
    (tmp_path / '1' / 'teacher_outputs' / 'manifest.json').read_text()
  )
  assert set(manifest['leaves']) == {
    f'{number}/{name}' for number in (0, 1) for name in ('final', 'logits')
  }
  bundle = bundles.load(tmp_path / '0')
  assert set(bundle.variables['params']) == {'backbone', 'connector', 'head'}
  own = bundles.load(folders[0]).variables['params']['head']['kernel']
  np.testing.assert_array_equal(
    bundle.variables['params']['head']['kernel'], own
  )


@pytest.mark.slow
def test_heads_are_fitted_for_all(config_of, tmp_path):
  config = config_of(**{'teacher.head': 'fit', 'total_steps': 2})
  result = train.train_and_evaluate(config, tmp_path)
  assert len(result.summary['heads']) == 2


@pytest.mark.parametrize(
  'fields, said',
  [
    ({'teacher.weights': (1.0,)}, 'has 1 numbers, for 2 teachers'),
    ({'teacher.weights': (1.0, -1.0)}, 'none may be negative'),
    ({'teacher.weights': (float('inf'), 1.0)}, 'or infinite'),
    ({'teacher.weights': (float('nan'), 1.0)}, 'or infinite'),
    ({'teacher.weights': (0.0, 0.0)}, 'not all zero'),
    ({'teacher.joint': 2}, 'there are 2 teachers'),
    ({'teacher.others': ('/nowhere',)}, 'there is no bundle in /nowhere'),
    ({'teacher.checkpoint': ''}, 'give teacher.checkpoint'),
    (
      {'teacher.checkpoint': '', 'teacher.others': (), 'teacher.joint': 1},
      'give teacher.checkpoint',
    ),
  ],
)
def test_what_cannot_be_is_said(config_of, fields, said):
  with pytest.raises(config_utils.UserError, match=said):
    experiment.build(config_of(**fields))


def test_one_teacher_is_a_mean_over_one(config_of):
  """Whatever its weight, the loss is the method's."""
  config = config_of(**{'teacher.others': (), 'teacher.weights': (7.0,)})
  distiller, variables, batch = bound(config)
  assert [link.weight for link in distiller.links] == [7.0]
  students, _, given = jax.jit(functools.partial(run, distiller))(
    variables, distiller.frozen, batch
  )
  jax.tree.map(
    np.testing.assert_array_equal,
    distiller.loss(students, given, batch),
    distiller.method.loss(students[0], given[0], batch),
  )


def test_weights_without_a_teacher_are_refused(small_config):
  config = small_config('ce', **{'teacher.weights': (1.0,)})
  with pytest.raises(config_utils.UserError, match='1 numbers, for 0 teachers'):
    experiment.build(config)
