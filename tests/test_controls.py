"""Controls: other heads behind the connector, and runs that start alike."""

import jax
import numpy as np
import pytest

from ijckd_jax.bundles import bundles
from ijckd_jax.distillation import methods
from ijckd_jax.distillation import network
from ijckd_jax.distillation import steps
from ijckd_jax.models import outputs
from ijckd_jax.runtime import config_utils
from ijckd_jax.training import experiment
from ijckd_jax.training import run_record
from ijckd_jax.training import train

NO_TARGET = {'method.logit_weight': 0.0, 'method.feature_weight': 0.0}


@pytest.fixture
def config_of(finished_run, small_config):
  """Returns a function that gives a config with the finished run's teacher."""
  checkpoint = {'teacher.checkpoint': str(finished_run[0] / 'teacher')}
  return lambda method='ijckd', **fields: small_config(
    method, **checkpoint, **fields
  )


def start(config):
  """Returns an experiment and the variables with which it starts."""
  exp = experiment.build(config)
  key = jax.random.fold_in(jax.random.key(config.seed), steps.INIT_STREAM)
  return exp, exp.init(key)


def same(a, b) -> bool:
  return all(
    np.array_equal(x, y)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
  )


# Each is a whole run; one shows a head that is trained and deployed.
@pytest.mark.parametrize(
  'head',
  [
    pytest.param(head, marks=() if head == 'copy' else pytest.mark.slow)
    for head in outputs.HEADS
  ],
)
def test_a_head_predicts_is_trained_or_not_and_is_deployed(
  head, config_of, tmp_path
):
  config = config_of(**{'method.head': head, 'seed': 3, 'total_steps': 4})
  exp, first = start(config)
  teachers_head = exp.teacher.head
  trained = head in ('own', 'copy', 'fresh')
  assert ('head' in first['params']) == trained
  result = train.train_and_evaluate(config, tmp_path)
  kept = result.bundle.variables['params']['head']
  assert same(kept, teachers_head) == (head == 'teacher')
  if head == 'copy':
    assert same(first['params']['head'], teachers_head)
  if head == 'random':
    assert same(kept, network.random_head(3, *kept['kernel'].shape))
    assert not same(kept, network.random_head(4, *kept['kernel'].shape))
  if trained:
    assert not same(kept, first['params']['head'])
  # The teacher is the same one, whatever head the student has.
  found = result.summary['config']['teacher']['fingerprint']
  assert found == run_record.checksum(exp.teacher.arrays)
  # What was evaluated is what predicts in training, and what is deployed.
  has_connector = head != 'own'
  assert ('connector' in result.bundle.variables['params']) == has_connector
  bundle = bundles.load(tmp_path)
  arrays = exp.dataset.load('test')
  logits, found = (
    jax.jit(lambda variables, x, net=made.network: net(variables, x).logits)(
      made.variables, made.network.preprocessing(arrays.images[:200])
    )
    for made in (bundle, result.bundle)
  )
  np.testing.assert_array_equal(logits, found)
  # As the teacher's head sees it is kept beside it, where that is another one.
  assert (tmp_path / 'connected').exists() == (head != 'teacher')
  if head != 'teacher':
    connected = bundles.load(tmp_path / 'connected')
    assert same(connected.variables['params']['head'], teachers_head)
  report = (tmp_path / 'report.md').read_text()
  assert ("predicts through the teacher's own head" in report) == (
    head == 'teacher'
  )


@pytest.mark.parametrize('head', outputs.HEADS)
def test_the_labels_alone_reach_all_that_is_trained(head, config_of):
  """The matched control: the connector's capacity, and no teacher's word."""
  config = config_of(**{'method.head': head, **NO_TARGET})
  exp, variables = start(config)
  rng = np.random.default_rng(0)
  images = rng.integers(0, 256, (6, 8, 8, 1)).astype(np.uint8)

  def loss(params):
    students, _ = exp.distiller.run_student(
      {**variables, 'params': params}, exp.frozen, images
    )
    total, terms = exp.distiller.loss(
      students, (None,), {'label': np.arange(6, dtype=np.int32)}
    )
    assert terms.keys() == {'cross_entropy'}
    return total

  gradients = jax.jit(jax.grad(loss))(variables['params'])
  idle = {
    path[0].key
    for path, leaf in jax.tree_util.tree_leaves_with_path(gradients)
    if not np.any(leaf)
  }
  # Before the connector, the own head leaves that nothing to learn.
  assert idle == ({'connector'} if head == 'own' else set())


def test_students_of_one_seed_start_alike(config_of):
  made = {
    (method, *fields.items()): start(config_of(method, **fields))[1]['params']
    for method, fields in (
      ('ce', {}),
      ('kd', {}),
      ('srrl', {}),
      ('simkd', {}),
      ('ijckd', {}),
      ('ijckd', {'method.head': 'fresh', **NO_TARGET}),
      ('ijckd', {'method.head': 'random'}),
      ('ijckd', {'method.connector': 'linear'}),
    )
  }
  first = made[('ce',)]
  for params in made.values():
    assert same(params['backbone'], first['backbone'])
  # Own heads, and connectors of one kind, as well.
  assert same(made[('kd',)]['head'], first['head'])
  assert same(made[('srrl',)]['head'], first['head'])
  connector = made[('ijckd',)]['connector']
  assert same(made[('simkd',)]['connector'], connector)
  for name, params in made.items():
    if ('method.head', 'fresh') in name or ('method.head', 'random') in name:
      assert same(params['connector'], connector)
  other = start(config_of('ce', seed=1))[1]['params']
  assert not same(other['backbone'], first['backbone'])


def test_an_unknown_head_is_named():
  with pytest.raises(config_utils.UserError, match="did you mean 'random'"):
    methods.get('ijckd')(head='randm')
