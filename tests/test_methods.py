"""Methods: one contract for all, and formulas written anew in numpy."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

from ijckd_jax import models
from ijckd_jax.data import augment
from ijckd_jax.distillation import binding
from ijckd_jax.distillation import connectors
from ijckd_jax.distillation import methods
from ijckd_jax.distillation import network
from ijckd_jax.distillation import teachers
from ijckd_jax.models import outputs
from ijckd_jax.runtime import config_utils

NUM_CLASSES = 5


def noise(shapes, seed=0):
  """Returns variables that leave no layer without effect."""
  rng = np.random.RandomState(seed)

  def leaf(path, shape):
    values = rng.randn(*shape.shape)
    if path[-1].key in ('scale', 'var'):
      values = 1 + np.abs(values) / 2
    elif path[-1].key == 'kernel':
      values *= np.sqrt(2 / np.prod(shape.shape[:-1]))
    return values.astype(np.float32)

  return jax.tree_util.tree_map_with_path(leaf, shapes)


def preprocessing(side):
  return augment.Preprocessing((0.5,), (0.25,), (side, side))


@functools.cache
def make_teacher(name, side):
  """Returns a teacher full of noise that reads images of `side` pixels."""
  backbone = models.build(name)
  x = jnp.zeros((1, side, side, 1))
  features, shapes = jax.eval_shape(
    lambda: backbone.init_with_output(jax.random.key(0), x, train=False)
  )
  made = noise(shapes)
  rng = np.random.RandomState(1)
  width = features.pooled.shape[-1]
  head = {
    'kernel': rng.randn(width, NUM_CLASSES).astype(np.float32) / width**0.5,
    'bias': rng.randn(NUM_CLASSES).astype(np.float32),
  }
  net = network.Network(
    backbone, preprocessing(side), None, None, teachers.average_pool
  )
  return teachers.Teacher(
    apply=net,
    variables={
      'params': {'backbone': made['params'], 'head': head},
      'batch_stats': {'backbone': made['batch_stats']},
      'pool': {},
    },
    head=head,
    preprocessing=net.preprocessing,
    signed=backbone.signed,
  )


@dataclasses.dataclass(frozen=True)
class Pair:
  """Teacher and student by name, and the side of the images that they read."""

  teacher: str = 'resnet8'
  student: str = 'plain'
  teacher_side: int = 8
  student_side: int = 8


def bind(method, pair=Pair(), **fields):  # noqa: B008
  """Returns a Distiller and the student's variables, full of noise."""
  distiller = binding.bind(
    **{
      'backbone': models.build(pair.student, tap=method.tap),
      'preprocessing': preprocessing(pair.student_side),
      'method': method,
      'given': (
        (make_teacher(pair.teacher, pair.teacher_side),)
        if method.needs_teacher
        else ()
      ),
      'image_shape': (8, 8, 1),
      'num_classes': NUM_CLASSES,
      'axis_name': None,
      'dtype': jnp.float32,
      **fields,
    }
  )
  variables = jax.eval_shape(
    lambda: distiller.init(jax.random.key(0), (8, 8, 1))
  )
  return distiller, noise(variables, seed=2)


def make_batch(labels=(0, 1, 2, 3, 4, 0)):
  rng = np.random.RandomState(3)
  images = rng.randint(0, 256, (len(labels), 8, 8, 1)).astype(np.uint8)
  return {'image': images, 'label': np.array(labels, np.int32)}


def complete(method, batch, num_examples=20):
  """Returns a batch with all that a method may read of it."""
  rows = np.arange(len(batch['label']), dtype=np.int32)
  batch = {'index': rows, 'epoch': 0 * rows, **batch}
  if method.second_view is not None and 'image' in batch:
    batch['second'] = batch['image'][::-1]
  if method.remembers:
    key = jax.random.key(5)
    batch |= {'memory': method.memory(key, num_examples), 'key': key}
  return batch


def value_and_gradients(distiller, variables, batch):
  """Returns total, terms, and gradients for the student's and teacher's."""
  frozen = distiller.frozen
  batch = complete(distiller.method, batch)

  @jax.jit
  def run(params, frozen):
    def loss(params, frozen):
      given = distiller.run_teachers(
        frozen, batch['image'], batch.get('second')
      )
      total, (terms, *_) = distiller.objective(
        {**variables, 'params': params}, frozen, given, batch
      )
      return total, terms

    return jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(
      params, frozen
    )

  (total, terms), gradients = run(variables['params'], frozen)
  return total, terms, *gradients


@functools.cache
def arrays(method, seed=0, *, num_rows=6, teacher_size=2):
  """Returns Outputs of a student and a teacher, as a Distiller makes them."""
  rng = np.random.RandomState(seed)

  def normal(*shape):
    return rng.randn(num_rows, *shape).astype(np.float32)

  connected = normal(2, 2, 4)
  connected = outputs.Connected(
    connected, connected.mean((1, 2)), normal(NUM_CLASSES)
  )
  if getattr(method, 'connects', 'map') == 'pooled':
    connected = connected.replace(map=None)
  final = normal(2, 2, 3)
  reused = method.predicts_with == 'teacher'
  student = outputs.Outputs(
    stages=(normal(4, 4, 2), normal(4, 4, 5), final),
    final=final,
    pooled=final.mean((1, 2)),
    logits=connected.logits if reused else normal(NUM_CLASSES),
    connected=connected,
  )
  final = normal(teacher_size, teacher_size, 4)
  stages = (normal(8, 8, 2), normal(8, 8, 2), final)
  teacher = outputs.Outputs(
    stages=stages,
    final=final,
    pooled=final.mean((1, 2)),
    logits=normal(NUM_CLASSES),
    before=tuple(stage - 0.5 for stage in stages),
  )
  if method.second_view is not None:
    student, teacher = (
      seen.replace(second=seen.replace(logits=normal(NUM_CLASSES)))
      for seen in (student, teacher)
    )
  if method.adapts_teacher:
    teacher = teacher.replace(change=np.float32(0.3))
  module = method.auxiliary(student, teacher)
  if module is not None:
    seen = (student, teacher)
    shapes = jax.eval_shape(
      lambda: module.init(jax.random.key(0), *seen, train=False)
    )
    apply = functools.partial(module.apply, train=True, mutable=['batch_stats'])
    made, _ = jax.jit(apply)(noise(shapes), *seen)
    student = student.replace(auxiliary=jax.device_get(made))
  return student, teacher


def weights_of(method):
  """Returns the weight of each term that has one, by the term's name."""
  return {
    term: getattr(method, field) for term, field in fields_of(method).items()
  }


# What a method's `weight` weighs.
WEIGHED = {
  'at': 'attention',
  'crd': 'contrast',
  'fitnet': 'hint',
  'kd': 'distillation',
  'pefd': 'angle',
  'reviewkd': 'review',
  'sp': 'similarity',
  'srd': 'feature',
  'vid': 'information',
  'vkd': 'feature',
  'wttm': 'divergence',
}


def fields_of(method):
  """Returns the field that holds the weight of each term, by the term."""
  own = WEIGHED.get(type(method).__module__.rpartition('.')[2])
  return {
    own if field.name == 'weight' else field.name.removesuffix('_weight'): (
      field.name
    )
    for field in dataclasses.fields(method)
    if field.name.endswith('weight')
  }


@pytest.mark.parametrize('name', methods.METHODS)
def test_contract(name):
  cls = methods.get(name)
  method = cls()
  assert method.predicts_with in ('teacher', 'own', 'copy')
  assert method.tap in ('stage', 'final')
  assert cls.__doc__
  with pytest.raises(dataclasses.FrozenInstanceError):
    method.anything = 1
  section = config_utils.section(cls, name)
  for field in dataclasses.fields(cls):
    assert type(section[field.name]) in (bool, int, float, str), field.name
  assert config_utils.instantiate('method', cls, section) == method
  with pytest.raises(config_utils.UserError, match="has no field 'nothing'"):
    config_utils.instantiate('method', cls, {'name': name, 'nothing': 1})


@pytest.mark.parametrize('name', methods.METHODS)
def test_gradients_reach_all_that_is_trained_and_nothing_else(name):
  method = methods.get(name)()
  distiller, variables = bind(method)
  total, terms, trained, frozen = value_and_gradients(
    distiller, variables, make_batch()
  )
  assert np.isfinite(total) and total > 0
  assert all(np.isfinite(value) for value in terms.values())
  weights = weights_of(method)
  np.testing.assert_allclose(
    total,
    sum(weights.get(term, 1.0) * value for term, value in terms.items()),
    rtol=1e-6,
  )
  parts = {'backbone'}
  if method.predicts_with in ('own', 'copy'):
    parts.add('head')
  if distiller.connected_network is not None:
    parts.add('connector')
  if distiller.auxiliary is not None:
    parts.add('auxiliary')
  if method.adapts_teacher:
    parts.add('teacher')
  assert trained.keys() == variables['params'].keys() == parts
  idle = [
    jax.tree_util.keystr(path)
    for path, gradient in jax.tree_util.tree_leaves_with_path(trained)
    if not np.any(gradient)
  ]
  assert not idle
  assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(trained))
  for arrays in frozen.teachers:
    leaves = jax.tree.leaves(arrays['network'])
    assert leaves and not any(np.any(leaf) for leaf in leaves)


@pytest.mark.parametrize('name', methods.METHODS)
def test_a_term_of_weight_zero_is_absent(name):
  method = methods.get(name)()
  student, teacher = arrays(method)
  batch = complete(method, make_batch())
  weights, fields = weights_of(method), fields_of(method)
  # Weights that are zero by default are given one.
  method = dataclasses.replace(
    method, **{fields[term]: w or 0.5 for term, w in weights.items()}
  )
  _, terms = method.loss(student, teacher, batch)
  assert terms.keys() >= weights.keys()
  for term in weights if len(weights) > 1 else ():
    without = dataclasses.replace(method, **{fields[term]: 0.0})
    total, others = without.loss(student, teacher, batch)
    assert others.keys() == terms.keys() - {term}
    for other, value in others.items():
      assert value == terms[other]
    np.testing.assert_allclose(
      total,
      sum(
        weights_of(without)[other] * value for other, value in others.items()
      ),
      rtol=1e-6,
    )


@pytest.mark.parametrize('name', sorted(set(methods.METHODS) - {'ce', 'simkd'}))
def test_a_term_of_weight_zero_cannot_spoil_the_others(name):
  """Of all methods whose cross-entropy has a weight."""
  method = methods.get(name)(cross_entropy_weight=0.0)
  student, teacher = arrays(method)
  # Labels out of range make the cross-entropy not a number.
  batch = complete(method, {'label': np.full(6, NUM_CLASSES + 3)})
  total, _ = method.loss(student, teacher, batch)
  assert np.isfinite(total)


@pytest.mark.parametrize('name', methods.METHODS)
def test_unlabelled_rows_train_on_the_teachers_terms_alone(name):
  method = methods.get(name)()
  student, teacher = arrays(method)
  labels = np.array([0, -1, 2, -1, -1, 1])

  def gradient(method, labels):
    """Returns those for the student's and the connected logits and map."""

    def loss(logits, connected):
      seen = student.replace(logits=logits, connected=connected)
      if method.predicts_with == 'teacher':
        seen = seen.replace(logits=connected.logits)
      batch = complete(method, {'label': labels})
      return method.loss(seen, teacher, batch)[0]

    return jax.grad(loss, argnums=(0, 1))(student.logits, student.connected)

  mixed = gradient(method, labels)
  none = gradient(method, np.full(6, -1))
  for a, b in zip(jax.tree.leaves(mixed), jax.tree.leaves(none), strict=True):
    np.testing.assert_allclose(a[labels < 0], b[labels < 0], atol=1e-7)
  # What DKD compares is divided by the label.
  if hasattr(method, 'cross_entropy_weight') and name != 'dkd':
    alone = dataclasses.replace(method, cross_entropy_weight=0.0)
    expected = gradient(alone, labels)
    for a, b in zip(
      jax.tree.leaves(none), jax.tree.leaves(expected), strict=True
    ):
      np.testing.assert_allclose(a, b, atol=1e-7)
  uses_labels = name not in ('atsc', 'simkd')
  assert uses_labels == any(
    np.any(np.abs(a - b)[labels >= 0] > 1e-4)
    for a, b in zip(jax.tree.leaves(mixed), jax.tree.leaves(none), strict=True)
  )


def log_softmax(x, temperature=1.0):
  return scipy.special.log_softmax(x.astype(np.float64) / temperature, axis=1)


def standardised(logits):
  logits = logits.astype(np.float64)
  mean = logits.mean(axis=1, keepdims=True)
  return (logits - mean) / (logits.std(axis=1, ddof=1, keepdims=True) + 1e-7)


def by_hand(
  student,
  teacher,
  labels,
  *,
  a=0,
  g=0,
  f=0,
  phi=None,
  d=0,
  t=4.0,
  z=False,
  own=False,
):
  """Returns a CE + g mse(logits) + f mse(phi(features)) + d T^2 KL.

  With z, of standardised logits but in the cross-entropy; with `own`, g is of
  the own head's logits.
  """
  total = 0.0
  read = standardised if z else lambda logits: logits
  if a:
    rows = -log_softmax(student.logits)[np.arange(len(labels)), labels]
    total += a * rows[labels >= 0].sum() / len(labels)
  if g:
    seen = student if own else student.connected
    error = read(seen.logits) - read(teacher.logits)
    total += g * (error**2).sum() / error.size
  if f:
    error = phi(student.connected) - phi(teacher)
    total += f * (error**2).sum() / error.size
  if d:
    log_p, log_q = (
      log_softmax(read(teacher.logits), t),
      log_softmax(read(student.logits), t),
    )
    kl = (np.exp(log_p) * (log_p - log_q)).sum(axis=1)
    total += d * t**2 * kl.mean()
  return total


def the_map(seen):
  return seen.map if isinstance(seen, outputs.Connected) else seen.final


def the_pooled(seen):
  return seen.pooled


TABLE = [
  ('ce', {}, {'a': 1}),
  ('ijckd', {}, {'a': 1, 'g': 1, 'f': 1, 'phi': the_map}),
  (
    'ijckd',
    {'feature_site': 'pooled'},
    {'a': 1, 'g': 1, 'f': 1, 'phi': the_pooled},
  ),
  (
    'ijckd',
    {'cross_entropy_weight': 0.3, 'logit_weight': 2.0, 'feature_weight': 5.0},
    {'a': 0.3, 'g': 2, 'f': 5, 'phi': the_map},
  ),
  ('simkd', {}, {'f': 1, 'phi': the_map}),
  ('simkd', {'feature_weight': 3.0}, {'f': 3, 'phi': the_map}),
  ('srrl', {}, {'a': 1, 'g': 1, 'f': 1, 'phi': the_pooled}),
  (
    'srrl',
    {'connects': 'pooled', 'distillation_weight': 1.0},
    {'a': 1, 'g': 1, 'f': 1, 'phi': the_pooled, 'd': 1},
  ),
  (
    'ijckd',
    {'standardize': True},
    {'a': 1, 'g': 1, 'f': 1, 'phi': the_map, 'z': True},
  ),
  (
    'srrl',
    {'standardize': True, 'distillation_weight': 1.0},
    {'a': 1, 'g': 1, 'f': 1, 'phi': the_pooled, 'd': 1, 'z': True},
  ),
  ('kd', {'standardize': True, 'weight': 9.0}, {'a': 0.1, 'd': 9, 'z': True}),
  (
    'srrl',
    {'logit_weight': 5.0, 'distillation_weight': 2.0, 'temperature': 2.0},
    {'a': 1, 'g': 5, 'f': 1, 'phi': the_pooled, 'd': 2, 't': 2.0},
  ),
  ('kd', {}, {'a': 0.1, 'd': 0.9}),
  ('kd', {'weight': 0.0, 'logit_weight': 3.0}, {'a': 0.1, 'g': 3, 'own': True}),
  (
    'kd',
    {
      'cross_entropy_weight': 0.5,
      'weight': 0.5,
      'temperature': 1.0,
    },
    {'a': 0.5, 'd': 0.5, 't': 1.0},
  ),
]


@pytest.mark.parametrize('labels', [(0, 1, 2, 3, 4, 0), (0, -1, 2, -1, -1, 1)])
@pytest.mark.parametrize('name, fields, formula', TABLE)
def test_formula(name, fields, formula, labels):
  method = methods.get(name)(**fields)
  student, teacher = arrays(method)
  batch = {'label': np.array(labels)}
  total, _ = method.loss(student, teacher, batch)
  expected = by_hand(student, teacher, np.array(labels), **formula)
  np.testing.assert_allclose(total, expected, rtol=1e-5)


@pytest.mark.parametrize('name', ['ijckd', 'simkd'])
def test_a_larger_map_of_the_teacher_is_averaged_down(name):
  method = methods.get(name)()
  student, teacher = arrays(method, teacher_size=4)
  _, terms = method.loss(student, teacher, make_batch())
  down = teacher.final.reshape(6, 2, 2, 2, 2, 4).mean((2, 4))
  expected = ((student.connected.map - down) ** 2).mean()
  np.testing.assert_allclose(terms['feature'], expected, rtol=1e-5)


PAIRS = {
  'equal maps': Pair(),
  'larger map of the teacher': Pair(teacher_side=16),
  'wide, larger map of the student': Pair('wrn_16_2', 'wrn_16_1', 8, 24),
}


@pytest.mark.slow
@pytest.mark.parametrize('pair', PAIRS.values(), ids=PAIRS)
def test_simkd_is_ijckd_without_cross_entropy_and_logits(pair):
  """Their losses and gradients are the same, bit by bit."""
  ijckd = methods.get('ijckd')(
    cross_entropy_weight=0.0, logit_weight=0.0, feature_weight=1.0
  )
  batch = make_batch()
  simkd, variables = bind(methods.get('simkd')(), pair)
  ijckd, others = bind(ijckd, pair)
  jax.tree.map(np.testing.assert_array_equal, variables, others)
  expected = value_and_gradients(simkd, variables, batch)
  result = value_and_gradients(ijckd, variables, batch)
  assert jax.tree.leaves(expected)
  jax.tree.map(np.testing.assert_array_equal, result, expected)
  np.testing.assert_allclose(
    expected[0], simkd_by_hand(simkd, variables, batch, pair), rtol=1e-4
  )


def simkd_by_hand(distiller, variables, batch, pair):
  """Returns SimKD's loss from its parts: the smaller map wins."""
  net, (teacher,) = distiller.connected_network, distiller.teachers

  def train(module, part, x):
    parts = {kind: variables[kind][part] for kind in variables}
    result, _ = module.apply(parts, x, train=True, mutable=['batch_stats'])
    return result

  images = batch['image']
  features = train(net.backbone, 'backbone', net.preprocessing(images))
  source = np.asarray(features.stages[-1])
  target = np.asarray(teacher(teacher.arrays, images).final)
  side, teacher_side = pair.student_side // 4, pair.teacher_side // 4
  assert source.shape[1:3] == (side, side)
  assert target.shape[1:3] == (teacher_side, teacher_side)
  size = min(side, teacher_side)

  def smaller(x):
    factor = x.shape[1] // size
    return x.reshape(len(x), size, factor, size, factor, -1).mean((2, 4))

  connected = np.asarray(train(net.connector, 'connector', smaller(source)))
  return ((connected - smaller(target)) ** 2).mean()


def test_ijckd_reads_the_connected_features_through_the_teachers_head():
  distiller, variables = bind(methods.get('ijckd')())
  frozen, images = distiller.frozen, make_batch()['image']
  (student,), _ = distiller.run_student(variables, frozen, images)
  head = frozen.joint['head']
  pooled = np.asarray(student.connected.map).mean((1, 2))
  np.testing.assert_allclose(
    student.logits, pooled @ head['kernel'] + head['bias'], rtol=1e-4, atol=1e-5
  )
  np.testing.assert_array_equal(student.logits, student.connected.logits)


@pytest.mark.parametrize('connects', ['map', 'pooled'])
def test_srrl_connects_before_or_after_the_pool(connects):
  method = methods.get('srrl')(connects=connects)
  distiller, variables = bind(method)
  net, frozen = distiller.connected_network, distiller.frozen
  images = make_batch()['image']
  (student,), _ = distiller.run_student(variables, frozen, images)
  head = frozen.joint['head']
  source = {
    'map': student.final,
    'pooled': student.pooled[:, None, None, :],
  }[connects]
  connected, _ = net.connector.apply(
    {kind: variables[kind]['connector'] for kind in variables},
    source,
    train=True,
    mutable=['batch_stats'],
  )
  pooled = np.asarray(connected).mean((1, 2))
  np.testing.assert_allclose(
    student.connected.pooled, pooled, rtol=1e-4, atol=1e-5
  )
  np.testing.assert_allclose(
    student.connected.logits,
    pooled @ head['kernel'] + head['bias'],
    rtol=1e-4,
    atol=1e-5,
  )
  assert (student.connected.map is None) == (connects == 'pooled')
  own = variables['params']['head']
  np.testing.assert_allclose(
    student.logits,
    np.asarray(student.pooled) @ own['kernel'] + own['bias'],
    rtol=1e-4,
    atol=1e-5,
  )


def teacher_shapes(signed=False):
  return outputs.Shapes(
    stages=(),
    final=jax.ShapeDtypeStruct((1, 2, 2, 8), jnp.float32),
    pooled=jax.ShapeDtypeStruct((1, 8), jnp.float32),
    signed=signed,
  )


@pytest.mark.parametrize('signed', [False, True])
@pytest.mark.parametrize(
  'name, fields, expected',
  [
    ('ce', {}, None),
    ('kd', {}, None),
    ('ijckd', {}, connectors.Bottleneck(8, factor=2)),
    ('ijckd', {'factor': 4}, connectors.Bottleneck(8, factor=4)),
    ('ijckd', {'connector': 'linear'}, connectors.Linear(8)),
    (
      'ijckd',
      {'connector': 'mlp', 'feature_site': 'pooled'},
      connectors.Mlp(8),
    ),
    ('simkd', {}, connectors.Bottleneck(8, factor=2)),
    ('simkd', {'factor': 8}, connectors.Bottleneck(8, factor=8)),
    ('srrl', {}, connectors.Conv1x1(8)),
    (
      'srrl',
      {'connects': 'pooled'},
      connectors.Conv1x1(8, takes='pooled', torch_init=True),
    ),
  ],
)
def test_connectors_of_methods(name, fields, expected, signed):
  connector = methods.get(name)(**fields).build_connector(
    teacher_shapes(), teacher_shapes(signed)
  )
  if expected is not None:
    expected = expected.clone(signed=signed)
  assert connector == expected


@pytest.mark.parametrize(
  'name, fields, message',
  [
    ('ijckd', {'feature_site': 'maps'}, "feature_site 'maps'.*mean 'map'"),
    ('srrl', {'connects': 'pool'}, "connects 'pool'.*mean 'pooled'"),
  ],
)
def test_wrong_choices_are_said_at_once(name, fields, message):
  with pytest.raises(config_utils.UserError, match=message):
    methods.get(name)(**fields)


@pytest.mark.parametrize(
  'fields, message',
  [
    ({'connector': 'bottleneks'}, "unknown connector.*mean 'bottleneck'"),
    ({'connector': 'mlp'}, "no map to compare: set method.feature_site='pool"),
  ],
)
def test_wrong_connectors_are_said_when_they_are_built(fields, message):
  method = methods.get('ijckd')(**fields)
  with pytest.raises(config_utils.UserError, match=message):
    method.build_connector(teacher_shapes(), teacher_shapes())


def test_a_teacher_that_does_not_pool_its_map_needs_pooled_features():
  teacher = dataclasses.replace(make_teacher('resnet14', 8), pools_map=False)
  with pytest.raises(config_utils.UserError, match='does not pool its map'):
    bind(methods.get('ijckd')(), given=(teacher,))
  fits = methods.get('ijckd')(connector='mlp', feature_site='pooled')
  distiller, _ = bind(fits, given=(teacher,))
  assert distiller.connected_network.connect_size is None


def test_unknown_name_names_the_nearest():
  with pytest.raises(
    config_utils.UserError, match="unknown method 'simkdd'.*mean 'simkd'"
  ):
    methods.get('simkdd')


@pytest.mark.parametrize('name', ['ce', 'ijckd', 'kd', 'simkd', 'srrl'])
def test_equal_shards_average_to_the_batch(name):
  """Methods that compare no example with another do not see the sharding."""
  method = methods.get(name)()
  student, teacher = arrays(method)
  labels = np.array([0, -1, -1, 3, 4, -1])

  def loss(rows):
    parts = jax.tree.map(lambda x: x[rows], (student, teacher))
    return method.loss(*parts, {'label': labels[rows]})[0]

  shards = [loss(rows) for rows in np.split(np.arange(6), 3)]
  np.testing.assert_allclose(np.mean(shards), loss(np.arange(6)), rtol=1e-5)


def test_losses_are_float32_whatever_comes_in():
  for name in methods.METHODS:
    method = methods.get(name)()
    student, teacher = jax.tree.map(
      lambda x: jnp.asarray(x, jnp.bfloat16), arrays(method)
    )
    batch = complete(method, make_batch())
    total, terms = method.loss(student, teacher, batch)
    exact, _ = method.loss(
      *jax.tree.map(lambda x: x.astype(jnp.float32), (student, teacher)), batch
    )
    for value in (total, *terms.values()):
      assert value.dtype == jnp.float32, name
    np.testing.assert_array_equal(total, exact, err_msg=name)


def test_a_class_without_the_base_has_its_defaults():
  name = 'experiments.extension_example.method:Method'
  cls = methods.get(name)
  assert methods.get(name) is cls and issubclass(cls, methods.base.Method)
  method = cls(cosine_weight=0.5)
  assert repr(method).startswith('Method(cosine_weight=0.5')
  assert method.needs_teacher and not method.remembers
  assert method.auxiliary(None, None) is None
  assert method.predicts_with == 'teacher'


def test_a_teacher_that_adapts():
  """Its kernels' squared change; what moves its maps, its head and its bias."""
  method = methods.get('atsc')()
  distiller, variables = bind(method)
  teacher = distiller.teachers[0]
  start = teacher.variables['params']['backbone']
  head = {name: jnp.asarray(value) for name, value in teacher.head.items()}
  # Batch norm's scales, and the biases, are no kernels.
  params = variables['params'] | {
    'teacher': jax.tree.map(lambda x: x + 0.1, start),
    'head': {'kernel': head['kernel'] + 0.1, 'bias': head['bias'] + 0.1},
  }
  count = sum(x.size for x in jax.tree.leaves((start, head)) if x.ndim > 1)
  batch = make_batch()

  def run(**weights):
    chosen = dataclasses.replace(method, **weights)
    return value_and_gradients(
      dataclasses.replace(distiller, method=chosen),
      {**variables, 'params': params},
      batch,
    )[1:3]

  terms, trained = run()
  np.testing.assert_allclose(terms['change'], 0.01 * count, rtol=1e-4)
  # It is in training mode: batch norm follows this batch.
  x = teacher.preprocessing(batch['image'])
  features, stats = network.run(
    teacher.apply.backbone,
    {
      'params': params['teacher'],
      'batch_stats': variables['batch_stats']['teacher'],
    },
    x,
    train=True,
  )
  logits = network.classify(params['head'], features.pooled)
  np.testing.assert_allclose(
    terms['cross_entropy'],
    np.mean(
      [
        -log_softmax(z[None])[0, y]
        for z, y in zip(np.asarray(logits), batch['label'], strict=True)
      ]
    ),
    rtol=1e-4,
  )
  _, (_, _, updated) = jax.jit(distiller.objective)(
    {**variables, 'params': params}, distiller.frozen, None, batch
  )
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5),
    updated['teacher'],
    stats,
  )
  moved = {
    'feature_weight': ('backbone', 'connector', 'teacher'),
    'change_weight': ('teacher', 'kernel'),
    'cross_entropy_weight': ('bias',),
  }
  for field, parts in moved.items():
    others = {name: 0.0 for name in moved if name != field}
    _, trained = run(**others)
    trained |= trained.pop('head')
    found = {
      name
      for name, tree in trained.items()
      if any(np.any(leaf) for leaf in jax.tree.leaves(tree))
    }
    assert found == set(parts), field


def test_the_second_view_runs_after_the_first_with_its_own_statistics():
  method = methods.get('mlkd')()
  distiller, variables = bind(method)
  batch = complete(method, make_batch())
  first, second = batch['image'], batch['second']
  frozen = distiller.frozen
  (student,), stats = distiller.run_student(
    variables, frozen, first, second=second
  )
  (one,), between = distiller.run_student(variables, frozen, first)
  (two,), after = distiller.run_student(
    {**variables, 'batch_stats': between}, frozen, second
  )
  same = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5)
  same(student.logits, one.logits)
  same(student.second.logits, two.logits)
  jax.tree.map(same, stats, after)
  (teacher,) = distiller.run_teachers(frozen, first, second)
  for seen, images in ((teacher, first), (teacher.second, second)):
    same(seen.logits, distiller.run_teachers(frozen, images)[0].logits)


def test_a_teacher_that_cannot_be_trained_is_refused():
  method = methods.get('atsc')()
  with pytest.raises(config_utils.UserError, match='teacher.others'):
    bind(method, given=(make_teacher('resnet8', 8),) * 2)
  function = dataclasses.replace(
    make_teacher('resnet8', 8), apply=lambda *args: teacher.apply(*args)
  )
  teacher = make_teacher('resnet8', 8)
  with pytest.raises(config_utils.UserError, match='is a function'):
    bind(method, given=(function,))
  added = methods.build({'name': 'kd', 'add': 'atsc:feature_weight=1.0'})
  with pytest.raises(config_utils.UserError, match='as method.name'):
    bind(added)
  distilled, variables = bind(methods.get('ijckd')())
  teacher = dataclasses.replace(
    teacher,
    apply=distilled.deployed_network,
    variables=distilled.deployed(variables, distilled.frozen),
  )
  with pytest.raises(config_utils.UserError, match='was distilled'):
    bind(method, given=(teacher,))


def test_a_teacher_that_adapts_sees_both_views():
  method = methods.build({'name': 'atsc', 'add': 'mlkd'})
  distiller, variables = bind(method)
  # Two passes, as of the student: one after the other.
  batch = complete(method, make_batch())
  _, (adapted,), stats = distiller.what_loss_reads(
    variables, distiller.frozen, None, batch
  )
  seen = {'image': batch['second']}
  after_first = distiller.what_loss_reads(
    variables, distiller.frozen, None, {'image': batch['image']}
  )[2]
  _, (second,), after_second = distiller.what_loss_reads(
    {**variables, 'batch_stats': after_first}, distiller.frozen, None, seen
  )
  same = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5)
  same(adapted.second.logits, second.logits)
  jax.tree.map(same, stats['teacher'], after_second['teacher'])


def test_a_teacher_that_adapts_keeps_the_pool_that_is_deployed():
  method = methods.get('atsc')()
  teacher = dataclasses.replace(
    make_teacher('resnet8', 8),
    pool=lambda variables, final: variables * final.mean((1, 2)),
    pool_name='scaled',
    pool_variables=np.float32(3.0),
  )
  distiller, variables = bind(method, given=(teacher,))
  _, (adapted,), _ = distiller.what_loss_reads(
    variables, distiller.frozen, None, make_batch()
  )
  expected = network.classify(
    variables['params']['head'], 3 * adapted.final.mean((1, 2))
  )
  np.testing.assert_allclose(adapted.logits, expected, rtol=1e-4, atol=1e-5)
