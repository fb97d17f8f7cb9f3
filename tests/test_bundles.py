"""Bundles: whole, self-contained, and never half there."""

import dataclasses
import json
import pathlib
import shutil

from etils import epath
from flax import traverse_util
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from ijckd_jax.bundles import bundles
from ijckd_jax.data import images
from ijckd_jax.distillation import connectors
from ijckd_jax.models import backbone as backbone_lib
from ijckd_jax.models import outputs
from ijckd_jax.runtime import config_utils
from ijckd_jax.runtime import disk
from ijckd_jax.training import experiment
from tests import marks


class Hidden(backbone_lib.Backbone):
  """A convolution, and a hidden layer with a norm after the average."""

  pooled_signed = True  # Though `final` is not.

  def setup(self):
    if not self.truncated:
      self.pool_hidden = nn.Dense(5)
      self.pool_norm = nn.BatchNorm(use_running_average=True)

  @nn.compact
  def __call__(self, images, *, train):
    del train
    x = nn.relu(self.conv(6, 3, 2, name='body')(images))
    return outputs.Features((x,), x, self.pool(x))

  def pool(self, final):
    pooled = super().pool(final)
    if self.truncated:
      return pooled
    return self.pool_norm(self.pool_hidden(pooled))


class Scaled(connectors.Connector):
  """A 1x1 convolution, scaled."""

  scales: tuple[float, ...] = (2.0, 0.5)

  @nn.compact
  def __call__(self, x, *, train):
    del train
    return self.scales[0] * self.conv(self.features)(x)


HIDDEN = f'{__name__}:Hidden'
SCALED = f'{__name__}:Scaled'
POOL_ARRAYS = {
  'params/pool_hidden/kernel': (6, 5),
  'params/pool_hidden/bias': (5,),
  'params/pool_norm/scale': (5,),
  'params/pool_norm/bias': (5,),
  'batch_stats/pool_norm/mean': (5,),
  'batch_stats/pool_norm/var': (5,),
}


def make_bundle(
  method='ijckd', teacher='resnet14x2', student='wrn_16_1', **fields
):
  """Returns the bundle of an untrained student, and its Distiller."""
  config = experiment.default_config(
    dataset='digits', teacher=teacher, student=student, method=method
  )
  config.total_steps = 1
  with config.unlocked():
    config.update_from_flattened_dict(fields)
  exp = experiment.build(config)
  rng = np.random.default_rng(0)

  def random(tree):
    return jax.tree.map(
      lambda x: rng.uniform(0.0, 0.2, x.shape).astype(np.float32), tree
    )

  fresh = jax.eval_shape(
    lambda key: exp.distiller.init(key, (8, 8, 1)), jax.random.key(0)
  )
  frozen = random(exp.frozen)
  return bundles.Bundle(
    network=exp.distiller.deployed_network,
    variables=exp.distiller.deployed(random(fresh), frozen),
    backbone_name=student,
    pool_name=teacher if method == 'ijckd' else student,
    image_shape=(8, 8, 1),
    class_names=tuple('0123456789'),
    info={'anything': [1, 2]},
  )


def logits(bundle):
  pixels = np.random.default_rng(1).integers(0, 256, (3, 8, 8, 1), np.uint8)
  net = bundle.network

  @jax.jit
  def run(variables, images):
    return net(variables, net.preprocessing(images)).logits

  return np.asarray(run(bundle.variables, pixels))


# Of each connector, dtype and pool one is run by default.
CASES = (
  {},
  {'method.connector': 'mlp', 'method.feature_site': 'pooled'},
  {'method': 'srrl', 'student': 'resnet8'},
  {'dtype': 'bfloat16', 'teacher': HIDDEN},
  {'method.connector': SCALED},
)
MORE_CASES = (
  {'method.connector': 'bottleneck_depthwise', 'method.factor': 4},
  {'method.connector': 'linear'},
  {'method': 'ce', 'student': 'resnet8'},
  {'method': 'kd', 'student': 'wrn_16_2'},
  {'dtype': 'bfloat16'},
  {'teacher': HIDDEN, 'student': HIDDEN},
  {'teacher': HIDDEN, 'method.feature_site': 'pooled'},
  {
    'teacher': HIDDEN,
    'method.connector': 'mlp',
    'method.feature_site': 'pooled',
  },
  {'method': 'ce', 'student': HIDDEN},
  {'method': 'srrl', 'student': HIDDEN, 'teacher': HIDDEN},
)


@pytest.mark.parametrize(
  'fields', marks.slow_but(CASES, CASES + MORE_CASES), ids=str
)
def test_what_is_loaded_computes_the_same(tmp_path, fields):
  bundle = make_bundle(**fields)
  bundle.save(tmp_path / 'bundle')
  loaded = bundles.load(tmp_path / 'bundle', trust_code=True)
  np.testing.assert_array_equal(logits(loaded), logits(bundle))
  assert loaded.info == bundle.info
  assert loaded.class_names == bundle.class_names
  assert loaded.network.pooled_signed == bundle.network.pooled_signed
  expected = dataclasses.replace(bundle.network, pool=None)
  assert dataclasses.replace(loaded.network, pool=None) == expected
  assert [path.name for path in tmp_path.iterdir()] == ['bundle']


@pytest.mark.parametrize(
  'name, value, said',
  [
    ('params/head/bias', np.nan, 'not finite'),
    ('params/backbone/block1_0_conv1/kernel', -np.inf, 'not finite'),
    ('batch_stats/backbone/block1_0_bn1/mean', np.inf, 'not finite'),
    ('batch_stats/backbone/block1_0_bn1/var', -1e-6, 'a negative variance'),
    ('batch_stats/backbone/block1_0_bn1/var', np.nan, 'not finite'),
    ('batch_stats/connector/BatchNorm_0/var', -1.0, 'a negative variance'),
  ],
)
def test_arrays_that_no_training_leaves(tmp_path, name, value, said):
  bundle = make_bundle()
  flat = traverse_util.flatten_dict(bundle.variables, sep='/')
  flat[name] = np.array(flat[name])
  flat[name].flat[0] = value
  variables = traverse_util.unflatten_dict(flat, sep='/')
  for kind in bundle.variables:
    variables.setdefault(kind, {})
  dataclasses.replace(bundle, variables=variables).save(tmp_path / 'bundle')
  with pytest.raises(config_utils.UserError, match=f'{name} holds .*{said}'):
    bundles.load(tmp_path / 'bundle')


def test_as_teacher_its_head_reads_its_pooled_features():
  bundle = make_bundle()
  teacher = bundle.teacher()
  images = np.random.default_rng(1).integers(0, 256, (3, 8, 8, 1), np.uint8)
  out = teacher(teacher.arrays, jnp.asarray(images))
  np.testing.assert_allclose(out.logits, logits(bundle), rtol=1e-5)
  by_hand = out.pooled @ teacher.head['kernel'] + teacher.head['bias']
  np.testing.assert_allclose(out.logits, by_hand, rtol=1e-5)
  pooled = teacher.pool(teacher.pool_variables, out.final)
  np.testing.assert_array_equal(out.pooled, pooled)
  assert not teacher.signed and (np.asarray(out.final) >= 0).all()


def test_a_new_one_replaces_the_old(tmp_path):
  make_bundle().save(tmp_path / 'bundle')
  other = make_bundle('ce', student='resnet8')
  # What two saves left that were killed, and what only looks like that.
  stale = [tmp_path / f'.bundle.{digit * 32}' for digit in 'a0']
  kept = [tmp_path / f'.{name}' for name in (f'other.{"a" * 32}', 'bundle.a')]
  for folder in (*stale, *kept):
    folder.mkdir()
    (folder / 'file').touch()
  other.save(tmp_path / 'bundle')
  assert bundles.load(tmp_path).backbone_name == 'resnet8'
  assert set(tmp_path.iterdir()) == {tmp_path / 'bundle', *kept}


def arrays_of(tree):
  return traverse_util.flatten_dict(tree, sep='/')


def test_dtype_is_the_runs_unless_another_is_asked_for(tmp_path):
  bundle = make_bundle(dtype='bfloat16')
  bundle.save(tmp_path / 'bundle')
  exact = bundles.load(tmp_path, dtype=jnp.float32)
  assert exact.network.backbone.dtype == jnp.float32
  assert exact.network.connector.dtype == jnp.float32
  assert not np.array_equal(logits(exact), logits(bundle))


@pytest.mark.parametrize('method', ['ce', 'srrl'])
def test_a_pool_with_parameters_as_teacher(tmp_path, method):
  """Its arrays are cut out of the backbone's, before and after loading."""
  made = make_bundle(method, student=HIDDEN)
  made.save(tmp_path / 'bundle')
  for bundle in (made, bundles.load(tmp_path, trust_code=True)):
    teacher = bundle.teacher()
    shapes = {k: v.shape for k, v in arrays_of(teacher.pool_variables).items()}
    assert shapes == POOL_ARRAYS
    images = np.random.default_rng(1).integers(0, 256, (3, 8, 8, 1), np.uint8)
    out = teacher(teacher.arrays, jnp.asarray(images))
    pooled = teacher.pool(teacher.pool_variables, out.final)
    np.testing.assert_array_equal(out.pooled, pooled)
    assert out.pooled.shape == (3, 5)
    assert (teacher.signed, teacher.pooled_signed) == (False, True)
    # The body's 3x3x1x6, the hidden layer and the norm; the pool is its own.
    num_params = {'backbone': 54 + 6 * 5 + 15, 'connector': 0, 'head': 60}
    assert teacher.num_params == num_params
    by_hand = (
      out.final.mean((1, 2))
      @ teacher.pool_variables['params']['pool_hidden']['kernel']
    )
    assert not np.allclose(by_hand, pooled)  # There are a bias and a norm.


def test_a_student_takes_its_teachers_pool_along(tmp_path):
  made = make_bundle(teacher=HIDDEN)
  made.save(tmp_path / 'bundle')
  loaded = bundles.load(tmp_path, trust_code=True)
  for bundle in (made, loaded):
    shapes = {
      k: v.shape for k, v in arrays_of(bundle.variables['pool']).items()
    }
    assert shapes == POOL_ARRAYS
    teacher = bundle.teacher()
    assert teacher.pool_variables is bundle.variables['pool']
    assert (teacher.signed, teacher.pooled_signed) == (False, True)
    assert teacher.num_params['head'] == 60 + 6 * 5 + 15
  stored = safetensors.numpy.load_file(
    tmp_path / 'bundle' / bundles.ARRAYS_FILE
  )
  names = {name for name in stored if name.startswith('pool/')}
  assert names == {f'pool/{name}' for name in POOL_ARRAYS}


def test_a_student_connected_behind_the_pool_has_none(tmp_path):
  fields = {'method.connector': 'mlp', 'method.feature_site': 'pooled'}
  bundle = make_bundle(teacher=HIDDEN, **fields)
  assert bundle.variables['pool'] == {}
  assert bundle.network.connector.signed  # As what it must reach.
  assert not bundle.teacher().pools_map


def test_a_backbone_that_ends_at_a_stage_is_pooled_by_the_average():
  bundle = make_bundle('ce', student=HIDDEN)
  params = bundle.variables['params']
  cut = dataclasses.replace(
    bundle,
    network=dataclasses.replace(bundle.network, backbone=Hidden(tap='stage')),
    variables={
      **bundle.variables,
      'params': {**params, 'backbone': {'body': params['backbone']['body']}},
      'batch_stats': {'backbone': {}},
    },
  )
  teacher = cut.teacher()
  assert teacher.pool_variables == {}
  assert teacher.pool_name == 'average'


SECRET = 'stranger_in_a_bundle'


@pytest.mark.parametrize('field', ['backbone', 'pool', 'connector'])
def test_code_is_not_imported_unasked(tmp_path, monkeypatch, field):
  make_bundle().save(tmp_path / 'bundle')
  mark = tmp_path / 'was_here'
  module = tmp_path / f'{SECRET}_{field}.py'
  module.write_text(f'open({str(mark)!r}, "w").close()\nX = int\n')
  monkeypatch.syspath_prepend(tmp_path)
  name = f'{module.stem}:X'
  spec = json.loads((tmp_path / 'bundle' / bundles.SPEC_FILE).read_text())
  value = {**spec['connector'], 'name': name} if field == 'connector' else name
  edit_spec(**{field: value})(tmp_path / 'bundle')
  message = failure(tmp_path / 'bundle')
  assert f'names code outside the package ({name}); load it with' in message
  assert 'trust_code=True (--trust_code)' in message
  # A config that names code of one package trusts no other.
  for trusted in ('resnet8', 'another_package.module:X'):
    assert 'names code' in failure(tmp_path / 'bundle', trust_code=trusted)
  assert not mark.exists()
  for trusted in (True, f'{module.stem}:Y'):
    assert name in failure(tmp_path / 'bundle', trust_code=trusted)
  assert mark.exists()


def failure(folder, **settings):
  """Returns the one short line with which a bundle is refused."""
  with pytest.raises(config_utils.UserError) as error:
    bundles.load(folder, **settings)
  message = str(error.value)
  assert str(folder) in message
  assert len(message.replace(str(folder), '')) < 250
  assert '\n' not in message
  return message


def edit_spec(**fields):
  def change(folder):
    spec = json.loads((folder / bundles.SPEC_FILE).read_text())
    (folder / bundles.SPEC_FILE).write_text(json.dumps({**spec, **fields}))

  return change


@pytest.fixture(scope='module')
def sound(tmp_path_factory):
  """The folder of a bundle with a connector."""
  folder = tmp_path_factory.mktemp('sound') / 'bundle'
  make_bundle().save(folder)
  return folder


@pytest.fixture
def copy(sound, tmp_path):
  return shutil.copytree(sound, tmp_path / 'bundle')


@pytest.mark.parametrize(
  'file, content, said',
  [
    (bundles.SPEC_FILE, b'[]', 'not a bundle'),
    (bundles.SPEC_FILE, b'{', 'cannot be read'),
    (bundles.SPEC_FILE, b'\xff', 'cannot be read'),
    (bundles.SPEC_FILE, b'[' * 200_000, 'cannot be read'),
    (bundles.SPEC_FILE, b'{"format_version": 99}', 'format 99'),
    (bundles.ARRAYS_FILE, b'', 'cannot be read'),
    (bundles.ARRAYS_FILE, b'\xff' * 99, 'cannot be read'),
  ],
)
def test_what_is_no_bundle(copy, file, content, said):
  (copy / file).write_bytes(content)
  assert said in failure(copy)


def test_arrays_cut_off_or_gone(copy):
  path = copy / bundles.ARRAYS_FILE
  path.write_bytes(path.read_bytes()[:-9])
  assert 'cannot be read' in failure(copy)
  path.unlink()
  assert 'cannot be read' in failure(copy)


@pytest.mark.parametrize('value', [None, 'wrong', 7, -1, 0.5, True, [], {}])
@pytest.mark.parametrize(
  'path',
  [
    *(('backbone',), ('pool',), ('truncated',), ('dtype',), ('class_names',)),
    *(('class_names', 0), ('image_shape',), ('image_shape', 1)),
    *(('preprocessing',), ('preprocessing', 'mean'), ('preprocessing', 'std')),
    *(('preprocessing', 'mean', 0), ('preprocessing', 'std', 0)),
    *(('preprocessing', 'size'), ('preprocessing', 'size', 0)),
    *(('connector',), ('connect_size',), ('connect_size', 1), ('info',)),
    *(('connector', 'name'), ('connector', 'features'), ('connector', 'takes')),
    *(('connector', 'signed'), ('connector', 'factor')),
    *(('info', 'eval_batch_size'), ('info', 'dataset')),
  ],
  ids=str,
)
def test_a_mutated_field(copy, path, value):
  spec = json.loads((copy / bundles.SPEC_FILE).read_text())
  parent = spec
  for key in path[:-1]:
    parent = parent[key]
  wrong = not fits(path, value)
  parent[path[-1]] = value
  (copy / bundles.SPEC_FILE).write_text(json.dumps(spec))
  if wrong:
    failure(copy)
  else:
    bundles.load(copy)


def fits(path, value):
  """Returns whether a bundle may say so, there."""
  where, kind = path[-1], type(value)
  if value == 7:  # Sizes that could have been.
    if path in (('image_shape', 1), ('connect_size', 1)):
      return True
  if value is True and where in ('truncated', 'signed'):
    return True
  if path[-2:-1] in (('mean',), ('std',)):
    return kind in (int, float) and (value > 0 or path[-2] == 'mean')
  if path in (('preprocessing', 'size', 0), ('info', 'eval_batch_size')):
    return kind is int and value > 0
  if path == ('class_names', 0):
    return kind is str
  return where in ('info', 'dataset') and kind is dict


@pytest.mark.parametrize(
  'field',
  [
    *('backbone', 'truncated', 'dtype', 'connector', 'connect_size', 'pool'),
    *('preprocessing', 'image_shape', 'class_names', 'info'),
  ],
)
def test_a_missing_field(copy, field):
  spec = json.loads((copy / bundles.SPEC_FILE).read_text())
  del spec[field]
  (copy / bundles.SPEC_FILE).write_text(json.dumps(spec))
  assert field in failure(copy)


@pytest.mark.parametrize('field', ['name', 'features', 'signed', 'takes'])
def test_a_missing_field_of_the_connector(copy, field):
  spec = json.loads((copy / bundles.SPEC_FILE).read_text())
  del spec['connector'][field]
  edit_spec(connector=spec['connector'])(copy)
  assert field in failure(copy)


@pytest.mark.parametrize(
  'fields, said',
  [
    ({'backbone': 'resnet8x5'}, "unknown backbone 'resnet8x5'; did you mean"),
    ({'pool': 'max'}, "unknown backbone 'max'"),
    ({'backbone': 'x' * 10_000}, 'unknown backbone'),
    ({'backbone': 'x:' + 'y' * 10_000}, 'names code outside'),
    ({'backbone': 'resnet14'}, 'do not fit'),
    ({'backbone': 'wrn_16_2'}, 'do not fit'),
    ({'truncated': False}, 'do not fit'),
    ({'tap': 'stage'}, 'tap must be a name, or not there where truncated is'),
    ({'class_names': ['a', 'b']}, 'do not fit'),
    ({'image_shape': [800_000, 800_000, 1]}, 'image_shape must be'),
    ({'image_shape': [0, 0, 1]}, 'image_shape must be'),
    ({'image_shape': [0, 0]}, 'image_shape must be'),
    ({'image_shape': [8, 8, 3]}, 'mean must be a list of 3 numbers'),
    ({'connect_size': [0, 0]}, 'connect_size must be'),
    ({'connect_size': [9, 8]}, 'connect_size must be'),
    ({'connect_size': None}, 'does not fit'),
    ({'info': {'eval_batch_size': '9'}}, 'eval_batch_size must be'),
    ({'info': {'eval_batch_size': 10**12}}, 'eval_batch_size must be'),
  ],
  ids=str,
)
def test_what_cannot_be(copy, fields, said):
  edit_spec(**fields)(copy)
  assert said in failure(copy)


@pytest.fixture(scope='module')
def cut(tmp_path_factory):
  """The folder of a bundle whose backbone ends at stage 2."""
  folder = tmp_path_factory.mktemp('cut') / 'bundle'
  make_bundle(student='resnet8', **{'method.tap': 'stage2'}).save(folder)
  return folder


def test_a_bundle_that_ends_at_a_stage_says_so(cut):
  spec = json.loads((cut / bundles.SPEC_FILE).read_text())
  assert (spec['tap'], spec['format_version']) == ('stage2', 3)
  assert 'truncated' not in spec
  bundle = bundles.load(cut)
  assert bundle.network.backbone.tap == 'stage2'
  layers = bundle.variables['params']['backbone']
  assert 'layer2_0_conv1' in layers
  assert not [name for name in layers if name.startswith('layer3')]
  whole = make_bundle(student='resnet8')
  count = bundles.num_params(bundle.variables)['backbone']
  # The last stage of a resnet8: two 3x3 convolutions, a 1x1, three batch norms.
  last = 9 * 32 * 64 + 9 * 64 * 64 + 32 * 64 + 3 * 2 * 64
  assert bundles.num_params(whole.variables)['backbone'] - count == last


@pytest.mark.parametrize(
  'tap, said',
  [
    ('stage3', 'do not fit'),
    ('stage1', 'do not fit'),
    ('stage9', "unknown tap 'stage9'; did you mean 'stage'"),
    ('stage2 ', "unknown tap 'stage2 '; did you mean 'stage2'"),
    ('x' * 10_000, 'unknown tap'),
    (2, 'tap must be a name'),
    (None, 'tap must be a name'),
  ],
)
def test_taps_that_cannot_be(cut, tmp_path, tap, said):
  folder = shutil.copytree(cut, tmp_path / 'bundle')
  edit_spec(tap=tap)(folder)
  assert said in failure(folder)


@pytest.mark.parametrize('truncated, tap', [(True, 'stage'), (False, 'final')])
def test_a_bundle_says_whether_it_is_truncated_or_names_its_tap(
  tmp_path, truncated, tap
):
  """By the one older versions of the library read it, both mean the same."""
  bundle = make_bundle(**{'method.tap': tap})
  bundle.save(tmp_path / 'bundle')
  path = tmp_path / 'bundle' / bundles.SPEC_FILE
  spec = json.loads(path.read_text())
  assert (spec.pop('truncated'), spec['format_version']) == (truncated, 1)
  assert 'tap' not in spec
  for field in ({'truncated': truncated}, {'tap': tap}):
    path.write_text(json.dumps({**spec, **field}))
    loaded = bundles.load(tmp_path / 'bundle')
    assert loaded.network.backbone == bundle.network.backbone
    assert loaded.network.backbone.tap == tap
    assert loaded.spec() == bundle.spec()


@pytest.mark.parametrize(
  'fields, said',
  [
    ({'extra': 1}, "no field 'extra'"),
    ({'axis_name': 'batch'}, "no field 'axis_name'"),
    ({'name': 'bottelneck'}, "did you mean 'bottleneck'"),
    ({'features': 10**30}, 'do not fit'),
    ({'features': 10**9}, 'do not fit'),
    ({'features': 0}, 'does not fit'),
    ({'factor': 4}, 'do not fit'),
  ],
  ids=str,
)
def test_a_connector_that_cannot_be(copy, fields, said):
  spec = json.loads((copy / bundles.SPEC_FILE).read_text())
  edit_spec(connector={**spec['connector'], **fields})(copy)
  assert said in failure(copy)


@pytest.mark.parametrize(
  'mean, said',
  [
    ([0.5, 0.5], 'mean must be a list of 1 numbers'),
    ('1', 'mean must be'),
    ([float('nan')], 'mean must be'),
    ([10**400], 'mean must be'),
    ([1e300], 'mean must be'),
  ],
)
def test_preprocessing_that_cannot_be(copy, mean, said):
  edit_spec(preprocessing={'mean': mean, 'std': [1], 'size': [8, 8]})(copy)
  assert said in failure(copy)


CROP = images.CentreCrop(9, 'bicubic')


def test_a_crop_is_kept(copy, tmp_path):
  """Without one, nothing is said, as by versions that knew of none."""
  plain = bundles.load(copy)
  assert plain.crop is None and 'crop' not in plain.spec()
  dataclasses.replace(plain, crop=CROP).save(tmp_path / 'cropped')
  assert bundles.load(tmp_path / 'cropped').crop == CROP
  card = (tmp_path / 'cropped/README.md').read_text()
  assert 'the shorter side is resized to 9 (bicubic)' in card


@pytest.mark.parametrize(
  'fields, said',
  [
    ({'resize': 7}, "resize must be from 8, the images' height, to 4096"),
    ({'resize': 8.5}, 'resize must be from 8'),
    ({'resize': 10**9}, 'resize must be from 8'),
    ({'interpolation': 'random'}, 'must be one of bilinear, bicubic'),
    ({'keeps_size': 1}, 'keeps_size must be true or false'),
    ({'pad': 1}, 'crop must be an object with interpolation'),
  ],
)
def test_a_crop_that_cannot_be(copy, fields, said):
  edit_spec(crop={**dataclasses.asdict(CROP), **fields})(copy)
  assert said in failure(copy)
  edit_spec(crop=[9])(copy)
  assert 'crop must be an object' in failure(copy)


def edit_arrays(folder, change):
  path = folder / bundles.ARRAYS_FILE
  arrays = safetensors.numpy.load_file(path)
  change(arrays)
  safetensors.numpy.save_file(arrays, path)


KERNEL = 'params/backbone/block1_0_conv1/kernel'
MEAN = 'batch_stats/connector/BatchNorm_0/mean'


@pytest.mark.parametrize(
  'name',
  [
    *('params/backbone/conv9/kernel', 'params/neck/kernel', 'pool/params/x'),
    *('other/x', 'x', f'{KERNEL}/x', 'params/head/scale'),
  ],
)
def test_an_array_too_many(copy, name):
  edit_arrays(copy, lambda arrays: arrays.update({name: np.zeros(1)}))
  assert 'do not fit' in failure(copy)


@pytest.mark.parametrize('name', [KERNEL, MEAN, 'params/head/bias'])
def test_an_array_too_few_or_of_another_kind(copy, name):
  # A single number would do for all, by broadcasting.
  edit_arrays(
    copy, lambda arrays: arrays.update({name: arrays[name].sum(keepdims=True)})
  )
  assert 'do not fit' in failure(copy)
  edit_arrays(copy, lambda arrays: arrays.pop(name))
  assert 'do not fit' in failure(copy)


@pytest.mark.parametrize('name', [KERNEL, MEAN, 'params/head/bias'])
def test_an_array_of_another_dtype(copy, name):
  edit_arrays(
    copy, lambda arrays: arrays.update({name: arrays[name].astype('float16')})
  )
  assert f'{name} is float16' in failure(copy)


def test_arrays_of_the_pool_are_checked(tmp_path):
  make_bundle(teacher=HIDDEN).save(tmp_path / 'bundle')
  name = 'pool/batch_stats/pool_norm/mean'
  edit_arrays(
    tmp_path / 'bundle', lambda arrays: arrays.update({name: np.zeros((1,))})
  )
  message = failure(tmp_path / 'bundle', trust_code=True)
  assert f'{name} is float64[1], not float32[5]' in message


def test_there_is_none(tmp_path):
  with pytest.raises(config_utils.UserError, match='no bundle in'):
    bundles.load(tmp_path)


def test_numbers_and_names_of_any_kind_are_written(tmp_path):
  bundle = make_bundle('ce', student='resnet8')
  preprocessing = dataclasses.replace(
    bundle.network.preprocessing, mean=(np.float32(0.5),)
  )
  bundle = dataclasses.replace(
    bundle,
    network=dataclasses.replace(bundle.network, preprocessing=preprocessing),
    class_names=range(10),
  )
  bundle.save(tmp_path / 'bundle')
  loaded = bundles.load(tmp_path)
  assert loaded.class_names == tuple('0123456789')
  assert loaded.network.preprocessing == preprocessing


@pytest.mark.parametrize('error', [KeyboardInterrupt, OSError('full')])
@pytest.mark.parametrize('call', [1, 2])
def test_a_save_that_is_interrupted_keeps_the_old_one(
  tmp_path, monkeypatch, error, call
):
  """Whether the old bundle was set aside already or not."""
  bundle = make_bundle(method='ce', student='resnet8')
  bundle.save(tmp_path / 'bundle')
  before = sorted(path.name for path in tmp_path.rglob('*'))
  rename, calls = pathlib.Path.rename, []

  def failing(self, target):
    calls.append(target)
    if len(calls) == call:
      raise error
    return rename(self, target)

  monkeypatch.setattr(type(epath.Path(tmp_path)), 'rename', failing)
  with pytest.raises(error if isinstance(error, type) else type(error)):
    bundle.save(tmp_path / 'bundle')
  monkeypatch.undo()
  assert sorted(path.name for path in tmp_path.rglob('*')) == before
  bundles.load(tmp_path / 'bundle')


def test_a_bundle_set_aside_by_a_killed_save_is_not_lost(tmp_path, monkeypatch):
  """Neither by the next save, if it fails as well."""
  bundle = make_bundle(method='ce', student='resnet8')
  bundle.save(tmp_path / 'bundle')
  before = (tmp_path / 'bundle' / 'variables.safetensors').read_bytes()
  # What a kill between the two renames leaves.
  (tmp_path / 'bundle').rename(tmp_path / f'.bundle.{"0" * 32}.old')
  (tmp_path / f'.bundle.{"0" * 32}').mkdir()

  def full(path, data):
    raise OSError('full')

  monkeypatch.setattr(disk, '_write', full)
  with pytest.raises(OSError, match='full'):
    bundle.save(tmp_path / 'bundle')
  assert [path.name for path in tmp_path.iterdir()] == ['bundle']
  after = (tmp_path / 'bundle' / 'variables.safetensors').read_bytes()
  assert after == before


def test_weights_of_pytorch_are_to_be_imported_first(tmp_path):
  (tmp_path / 'net.pth').write_bytes(b'x')
  with pytest.raises(
    config_utils.UserError, match='ijckd weights import --checkpoint .*net.pth'
  ):
    bundles.load(tmp_path / 'net.pth')
