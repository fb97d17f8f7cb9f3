"""Students that end at a stage by its number, from a config to their files."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from ijckd_jax import models
from ijckd_jax.bundles import bundles
from ijckd_jax.deploy import deployed as deployed_lib
from ijckd_jax.deploy import onnx_files
from ijckd_jax.deploy import safetensors_files
from ijckd_jax.deploy import stablehlo_files
from ijckd_jax.distillation import methods
from ijckd_jax.pytorch import importer
from ijckd_jax.pytorch import published_names
from ijckd_jax.pytorch import state_dicts
from ijckd_jax.runtime import config_utils
from ijckd_jax.runtime import workdirs
from ijckd_jax.training import experiment
from ijckd_jax.training import train
from tests import marks
from tests import test_bundles

# Methods that connect the student to the teacher.
CONNECTED = tuple(
  name
  for name in methods.METHODS
  if methods.get(name).build_connector
  is not methods.base.Method.build_connector
)


def logits(bundle, images):
  @jax.jit
  def run(variables, images):
    network = bundle.network
    return network(variables, network.preprocessing(images)).logits

  return np.asarray(run(bundle.variables, images))


@pytest.fixture(scope='module')
def images(data_dir, small_config):
  dataset = experiment.build(small_config()).dataset
  return dataset.load('test').images[:7]


@pytest.mark.parametrize('name', methods.METHODS)
def test_methods_with_a_connector_have_a_tap_among_their_fields(name):
  fields = {field.name for field in dataclasses.fields(methods.get(name))}
  assert ('tap' in fields) == (name in CONNECTED)


def test_the_methods_that_connect_are_found():
  assert {'ijckd', 'simkd', 'srrl', 'vkd'} <= set(CONNECTED)


@pytest.mark.parametrize('number', marks.slow_but([1], range(3)))
@pytest.mark.parametrize('method', marks.slow_but(['ijckd', 'srrl'], CONNECTED))
def test_a_run(method, number, finished_run, small_config, tmp_path, images):
  """It trains, and all that it leaves ends at its tap."""
  settings = {
    'teacher.checkpoint': str(finished_run[0] / 'teacher'),
    'total_steps': 4,
  }
  config = small_config(method, **{**settings, 'method.tap': f'stage{number}'})
  result = train.train_and_evaluate(config, tmp_path / 'run')
  losses = [row['train/loss'] for row in result.history if 'train/loss' in row]
  assert losses and np.isfinite(losses).all()
  # The student's backbone is the plain one: three convolutions.
  layers = {
    f'{kind}_{layer}'
    for kind in ('Conv', 'BatchNorm')
    for layer in range(number + 1)
  }
  assert result.state.params['backbone'].keys() == layers
  loaded = bundles.load(tmp_path / 'run')
  assert loaded.variables['params']['backbone'].keys() == layers
  np.testing.assert_array_equal(
    logits(loaded, images), logits(result.bundle, images)
  )
  whole = small_config(method, **{**settings, 'method.tap': 'stage'})
  shapes = jax.eval_shape(experiment.build(whole).init, jax.random.key(0))
  last = sum(
    leaf.size for leaf in jax.tree.leaves(shapes['params']['backbone'])
  )
  count = bundles.num_params(loaded.variables)['backbone']
  assert count < last if number < 2 else count == last
  summary = json.loads((tmp_path / 'run' / workdirs.SUMMARY).read_text())
  assert summary['parameters']['student']['backbone'] == count


@pytest.mark.parametrize('method', CONNECTED)
@pytest.mark.parametrize(
  'tap, said',
  [
    ('stages', "unknown tap 'stages'; did you mean 'stage'"),
    (
      'stage3',
      "unknown tap 'stage3'; .* known: final, stage, stage0, stage1, ",
    ),
    ('', "unknown tap ''; known: "),
  ],
)
def test_a_tap_that_is_not_there(method, tap, said, small_config):
  with pytest.raises(config_utils.UserError, match=said):
    experiment.build(small_config(method, **{'method.tap': tap}))


def test_a_sum_ends_where_its_first_method_does(small_config):
  config = small_config(
    'ijckd', **{'method.tap': 'stage1', 'method.add': 'srrl+at:weight=1'}
  )
  distiller = experiment.build(config).distiller
  assert distiller.network.backbone.tap == 'stage1'
  config.method.add = 'fitnet:stage=2'
  with pytest.raises(
    config_utils.UserError,
    match='stage=2: .* have stages 0 to 1; a student has none after its tap',
  ):
    experiment.build(config)
  config.method.add = 'srrl:tap=stage0'
  with pytest.raises(
    config_utils.UserError, match='the student ends at the tap of the first'
  ):
    experiment.build(config)


def test_weights_to_start_from(small_config, tmp_path):
  """A whole backbone gives what the cut one has; not the other way round."""
  whole = test_bundles.make_bundle('ce', student='resnet8')
  whole.save(tmp_path / 'whole')
  settings = {
    'student.backbone': 'resnet8',
    'teacher.backbone': 'resnet8',
    'student.init_from': str(tmp_path / 'whole'),
    'method.tap': 'stage2',
  }
  exp = experiment.build(small_config(**settings))
  made = exp.init(jax.random.key(0))['params']['backbone']
  given = whole.variables['params']['backbone']
  assert given.keys() - made.keys() == {
    name for name in given if name.startswith('layer3')
  }
  for name, layer in made.items():
    jax.tree.map(np.testing.assert_array_equal, layer, given[name])
  cut = test_bundles.make_bundle(student='resnet8', **{'method.tap': 'stage1'})
  cut.save(tmp_path / 'cut')
  settings['student.init_from'] = str(tmp_path / 'cut')
  with pytest.raises(
    config_utils.UserError,
    match='no backbone.*layer2.* ends at tap=stage1, and',
  ):
    experiment.build(small_config(**settings))


@pytest.mark.parametrize('method', ['ijckd', 'simkd', 'srrl', 'vkd'])
def test_a_run_of_before_goes_on(method, small_config, tmp_path):
  """Its config has no tap: it was the method's own."""
  folder = bundles.epath.Path(tmp_path / 'run')
  config = small_config(method)
  workdirs.claim([(folder, config)], overwrite=False)
  path = tmp_path / 'run' / workdirs.CONFIG
  content = json.loads(path.read_text())
  if method != 'ijckd':  # It had one.
    del content['method']['tap']
    path.write_text(json.dumps(content))
  workdirs.check([(folder, config)], overwrite=False)
  config.method.tap = 'stage1'
  with pytest.raises(config_utils.UserError, match="method.tap: '.*' -> 'stag"):
    workdirs.check([(folder, config)], overwrite=False)


@pytest.fixture(scope='module')
def student():
  """A resnet8 that ends at stage 1, as a bundle."""
  return test_bundles.make_bundle(student='resnet8', **{'method.tap': 'stage1'})


SESSIONS = {
  'onnx': lambda data: onnx_files.Session(data, 'it'),
  'safetensors': lambda data: safetensors_files.Session(data, 'it'),
  'stablehlo': lambda data: stablehlo_files.Session(data, 'it', {}),
}


@pytest.mark.parametrize('form', SESSIONS)
def test_exported_files(form, student, images):
  """They compute the same, and hold none of the later layers' arrays."""
  deployed = deployed_lib.deploy(student)
  assert not [name for name in deployed.arrays if 'layer2' in name]
  assert [name for name in deployed.arrays if 'layer1' in name]
  data = {
    'onnx': lambda: onnx_files.encode(deployed),
    'safetensors': lambda: safetensors_files.encode(student, deployed),
    'stablehlo': lambda: stablehlo_files.encode(deployed),
  }[form]()
  given, wanted = SESSIONS[form](data)(images)[0], logits(student, images)
  np.testing.assert_allclose(given, wanted, atol=1e-5 * np.abs(wanted).max())


def test_pytorchs_weights_come_back(student, images, tmp_path):
  path = tmp_path / 'student.safetensors'
  arrays = published_names.state_dict(student)
  assert not [name for name in arrays if name.startswith('backbone.layer2')]
  state_dicts.write(path, arrays, published_names.metadata(student))
  bundle, _ = importer.read(str(path), importer.Request())
  assert bundle.network.backbone == student.network.backbone
  np.testing.assert_array_equal(logits(bundle, images), logits(student, images))


def layers_by_stage(name, tap='final'):
  backbone = models.build(name, tap=tap)
  images = jax.ShapeDtypeStruct((1, 32, 32, 3), np.float32)
  found = backbone.stages_of_layers(images)
  return {
    number: {layer for layer, stage in found.items() if stage == number}
    for number in range(max(found.values()) + 1)
  }


def test_each_layer_has_the_first_stage_that_needs_it():
  found = layers_by_stage('mobilenet_v2_cifar_x0_5')
  assert len(found) == 6  # Five stages, and the convolution after them.
  assert found[5] == {'conv2_0', 'conv2_1'}
  truncated = layers_by_stage('mobilenet_v2_cifar_x0_5', tap='stage2')
  assert truncated == {number: found[number] for number in range(3)}
  plain = layers_by_stage('experiments.extension_example.backbone:PlainNet')
  assert plain == {n: {f'Conv_{n}', f'BatchNorm_{n}'} for n in range(3)}


def test_a_run_slows_the_early_layers(small_config):
  """The first layer's change beside that of a run without layer_decay."""
  changes = []
  for decay in (1.0, 0.5):
    config = small_config('ce', **{'optimizer.layer_decay': decay})
    exp = experiment.build(config)
    tx, _ = exp.optimizer(48)
    params = exp.init(jax.random.key(0))['params']
    ones = jax.tree.map(np.ones_like, params)
    changes.append(tx.update(ones, tx.init(params), params)[0])
  shares = jax.tree.map(lambda a, b: np.mean(b / a), *changes)
  for number in range(3):
    for layer in ('Conv', 'BatchNorm'):
      for share in shares['backbone'][f'{layer}_{number}'].values():
        np.testing.assert_allclose(share, 0.5 ** (3 - number), rtol=1e-6)
  for share in shares['head'].values():
    assert share == 1
