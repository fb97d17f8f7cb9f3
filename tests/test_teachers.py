"""Teachers from anywhere, and what a student must know to be tied to one."""

import dataclasses
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ijckd_jax import models
from ijckd_jax.bundles import bundles
from ijckd_jax.data import augment
from ijckd_jax.distillation import binding
from ijckd_jax.distillation import connectors
from ijckd_jax.distillation import methods
from ijckd_jax.distillation import network
from ijckd_jax.distillation import teachers
from ijckd_jax.distillation.methods import base
from ijckd_jax.models import outputs
from ijckd_jax.runtime import config_utils
from ijckd_jax.training import experiment
from ijckd_jax.training import train
from tests import test_models as shared

PREPROCESSING = augment.Preprocessing((0.0,), (1.0,), (8, 8))


def centred(variables, final):
  """Pools a map to its average less the mean of its channels."""
  pooled = teachers.average_pool(variables, final)
  return pooled - jnp.mean(pooled, axis=-1, keepdims=True)


def make_teacher(pool=teachers.average_pool, **fields):
  """Returns a teacher of 3 classes whose map is its input, in 4 channels."""
  head = {'kernel': np.eye(4, 3, dtype=np.float32), 'bias': np.zeros(3)}

  def apply(variables, images):
    del variables
    final = images * jnp.arange(1.0, 5.0)
    pooled = pool({}, final)
    logits = network.classify(head, pooled)
    return outputs.Outputs((final,), final, pooled, logits)

  return teachers.Teacher(
    apply=apply,
    variables={},
    head=head,
    preprocessing=PREPROCESSING,
    pool=pool,
    **fields,
  )


def bind(teacher, method):
  return binding.bind(
    backbone=models.build('resnet8', tap=method.tap),
    preprocessing=PREPROCESSING,
    method=method,
    given=() if teacher is None else (teacher,),
    image_shape=(8, 8, 1),
    num_classes=3,
    axis_name=None,
    dtype=jnp.float32,
  )


def test_a_pool_of_its_own_needs_a_name():
  with pytest.raises(
    config_utils.UserError, match='give as pool_name'
  ) as error:
    make_teacher(centred, name='mine')
  assert str(error.value).startswith('teacher mine: ')
  assert '\n' not in str(error.value)
  assert make_teacher(centred, pool_name='my.nets:Centred').pool is centred


@pytest.mark.parametrize('signed', [False, True])
def test_pooled_features_are_signed_as_the_map_is_unless_it_is_said(signed):
  for pooled_signed, expected in ((None, signed), (False, False), (True, True)):
    teacher = make_teacher(signed=signed, pooled_signed=pooled_signed)
    assert teacher.pooled_signed is expected
    shapes = teacher.shapes((8, 8, 1))
    assert (shapes.signed, shapes.pooled_signed) == (signed, expected)


@pytest.mark.parametrize(
  'method, fields, signed, pooled_signed',
  [
    ('ijckd', {'connector': 'mlp', 'feature_site': 'pooled'}, True, True),
    ('ijckd', {'feature_site': 'pooled'}, False, True),
    ('simkd', {}, False, True),
    ('srrl', {'connects': 'pooled'}, True, True),
    ('srrl', {'connects': 'map'}, False, True),
  ],
)
def test_a_connector_can_reach_what_it_must(
  method, fields, signed, pooled_signed
):
  """The map has no negative values here, but the pooled features have."""
  teacher = make_teacher(
    centred, pool_name='my.nets:Centred', signed=False, pooled_signed=True
  )
  net = bind(teacher, methods.get(method)(**fields)).connected_network
  assert net.connector.signed == signed
  assert net.pooled_signed == pooled_signed


def test_a_students_sign_follows_from_its_connector_and_pool():
  teacher = make_teacher(signed=False)
  net = bind(teacher, methods.get('ijckd')()).connected_network
  assert not net.connector.signed and not net.pooled_signed
  linear = methods.get('ijckd')(connector='linear')
  net = bind(teacher, linear).connected_network
  assert net.connector.signed and net.pooled_signed


@pytest.mark.parametrize(
  'name', ['json:loads', 'collections:OrderedDict', 'flax.linen:Dense']
)
def test_what_is_no_connector(name):
  shapes = make_teacher().shapes((8, 8, 1))
  with pytest.raises(
    config_utils.UserError, match='is not a connector'
  ) as error:
    connectors.build(name, shapes)
  assert name in str(error.value)
  assert '\n' not in str(error.value)


@dataclasses.dataclass(frozen=True)
class Unconnected(base.Method):
  """A method that predicts with a head that nothing leads to."""

  predicts_with = 'teacher'
  tap = 'stage'

  def loss(self, student, teacher, batch):
    del teacher, batch
    return jnp.sum(student.logits), {'sum': jnp.sum(student.logits)}


@pytest.mark.parametrize('teacher', [None, make_teacher()])
def test_a_reused_head_needs_a_connector(teacher):
  with pytest.raises(
    config_utils.UserError, match=r'^Unconnected\(\) .* builds none'
  ):
    bind(teacher, Unconnected())


def test_pool_variables_are_those_named_so():
  variables = {
    'params': {'conv': 1, 'pool_norm': {'scale': 2}, 'pooling': 3},
    'batch_stats': {'conv': 4},
  }
  assert models.build('resnet8').pool_variables(variables) == {
    'params': {'pool_norm': {'scale': 2}}
  }


@pytest.mark.parametrize('name', shared.by_default(shared.ONE_OF_EACH))
def test_the_pools_variables_are_all_that_the_pool_needs(name):
  """Of every backbone, whole, and ending at its last stage."""
  for tap in ('final', 'stage'):
    backbone = models.build(name, tap=tap)

    def pooled_twice(x, backbone=backbone):
      features, variables = backbone.init_with_output(
        jax.random.key(0), x, train=False
      )
      share = backbone.pool_variables(variables)
      again = network.pool_of(backbone)(share, features.final)
      return features.pooled, again, share

    pooled, again, share = jax.eval_shape(
      pooled_twice, jax.ShapeDtypeStruct((2, 32, 32, 3), jnp.float32)
    )
    assert (pooled.shape, pooled.dtype) == (again.shape, again.dtype)
    assert not (tap == 'stage' and share)


def test_arrays_take_the_place_of_shapes(small_config, finished_run):
  """Bound before its teacher is trained, a run is as if it were given."""
  teacher = bundles.load(finished_run[0] / 'teacher').teacher()
  later = experiment.build(small_config()).with_teachers([teacher])
  given = experiment.build(small_config(), teacher=teacher)
  assert later.distiller.teachers[0] is later.teacher is teacher
  variables = jax.jit(lambda key: given.distiller.init(key, (8, 8, 1)))(
    jax.random.key(0)
  )
  images = np.random.default_rng(0).integers(0, 256, (6, 8, 8, 1), np.uint8)

  def losses(exp):
    @jax.jit
    def run(variables, frozen):
      batch = {'image': images, 'label': np.arange(6, dtype=np.int32)}
      outputs = exp.distiller.run_teachers(frozen, images)
      total, (terms, *_) = exp.distiller.objective(
        variables, frozen, outputs, batch
      )
      return total, terms

    return run(variables, exp.frozen)

  jax.tree.map(np.testing.assert_array_equal, losses(later), losses(given))


def test_a_teacher_of_other_shapes_is_refused(small_config, finished_run):
  exp = experiment.build(small_config())
  assert exp.teacher_run is not None
  teacher = bundles.load(finished_run[0] / 'teacher').teacher()
  wider = {
    'kernel': np.zeros((teacher.num_features, 11), np.float32),
    'bias': np.zeros(11, np.float32),
  }
  with pytest.raises(config_utils.UserError, match='arrays of other shapes'):
    exp.with_teachers([teacher.with_head(wider)])


def test_a_start_binds_once(small_config, finished_run, monkeypatch, tmp_path):
  """The student, and the teacher that is trained first."""
  shutil.copytree(finished_run[0] / 'teacher', tmp_path / 'teacher')
  bind, made, runs = binding.bind, [], []

  def counted(**settings):
    made.append(settings['method'])
    return bind(**settings)

  monkeypatch.setattr(binding, 'bind', counted)
  monkeypatch.setattr(train.one_run, 'run', lambda exp, *_: runs.append(exp))
  train.train_and_evaluate(small_config(), tmp_path)
  assert [type(method) for method in made] == [
    methods.get('ce'),
    methods.get('ijckd'),
  ]
  (exp,) = runs
  saved = bundles.load(tmp_path / 'teacher').teacher()
  jax.tree.map(np.testing.assert_array_equal, exp.frozen.joint, saved.arrays)
