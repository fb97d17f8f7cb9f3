"""Exported students: the same model in every format, or no file at all."""

import dataclasses
import functools
import hashlib
import itertools
import json
import os
import resource
import subprocess
import sys

import flax.linen as nn
import jax
from jax import export as jax_export
import numpy as np
import onnx
import onnxruntime
import pytest
import safetensors

from experiments.benchmarks import classifiers
from ijckd_jax import models
from ijckd_jax.bundles import bundles
from ijckd_jax.commands import export
from ijckd_jax.data import datasets
from ijckd_jax.data import images
from ijckd_jax.data.datasets import digits
from ijckd_jax.deploy import checks
from ijckd_jax.deploy import deployed as deployed_lib
from ijckd_jax.deploy import onnx_files
from ijckd_jax.deploy import pictures
from ijckd_jax.deploy import safetensors_files
from ijckd_jax.deploy import sessions
from ijckd_jax.deploy import stablehlo_files
from ijckd_jax.distillation import connectors
from ijckd_jax.distillation import network as network_lib
from ijckd_jax.models import backbone as backbone_lib
from ijckd_jax.models import outputs
from ijckd_jax.models import programs
from ijckd_jax.runtime import config_utils
from tests import photographs

SIDE = 32
FILES = ('onnx', 'stablehlo', 'safetensors')  # For 'web', see test_web.


@pytest.fixture
def command(run_command):
  return functools.partial(run_command, export.main)


@pytest.fixture
def refused(command, tmp_path):
  """Returns a function that exports in vain: its one line; nothing is there."""

  def run(*argv):
    folder = tmp_path / 'new'
    code, out, err = command('--output', folder / 'student', *argv)
    assert (code, out) == (2, '')
    assert err.startswith('error: ') and err.count('\n') == 1, err
    assert not folder.exists()
    return err

  return run


@pytest.fixture(scope='module')
def digits_flags(finished_run, data_dir):
  return ('--bundle', finished_run[0], '--data_dir', data_dir)


@pytest.fixture(scope='module')
def test_images(data_dir):
  return digits.Dataset(data_dir=data_dir).load('test')


def logits_of(bundle, images):
  @jax.jit
  def apply(variables, images):
    network = bundle.network
    return network(variables, network.preprocessing(images)).logits

  return np.asarray(apply(bundle.variables, images))


def random_bundle(name, side=SIDE):
  """Returns a bundle of a backbone with random weights and statistics."""
  return classifiers.alone(name, (side, side, 3), num_classes=7)


def random_images(shape, count=5):
  random = np.random.RandomState(1)
  return random.randint(0, 256, (count, *shape)).astype(np.uint8)


def assert_gives_the_same(session, bundle, count=5, limit=1e-5):
  """Asserts that a file's logits are the bundle's, to a part of the largest."""
  images = random_images(bundle.image_shape, count)
  wanted = logits_of(bundle, images)
  np.testing.assert_allclose(
    session(images)[0], wanted, atol=limit * np.abs(wanted).max()
  )


def num_layout_changes(model):
  """Returns how often a map is transposed; a shuffle of channels is none."""
  return sum(
    node.op_type == 'Transpose' and len(node.attribute[0].ints) == 4
    for node in model.graph.node
  )


# A process of its own, which exports; the tests below export in this one.
@pytest.mark.slow
def test_the_check_is_made_on_the_cpu(published_run, data_dir, tmp_path):
  # JAX would fail here if it were asked for the GPU's results.
  output = tmp_path / 'student.safetensors'
  flags = ('--format', 'safetensors', '--output', output)
  flags += ('--bundle', published_run[0], '--data_dir', data_dir)
  subprocess.run(
    [sys.executable, '-m', 'ijckd_jax', 'export', *map(str, flags)],
    env={**os.environ, 'JAX_PLATFORMS': 'cuda'},
    check=True,
  )
  assert output.exists()


# Each format once, each kind of weights once, and what is refused.
BY_DEFAULT = (
  *(('onnx', 'float32'), ('onnx', 'int8'), ('safetensors', 'float16')),
  *(('stablehlo', 'float32'), ('stablehlo', 'int8'), ('safetensors', 'int8')),
)


@pytest.mark.parametrize(
  'form, weights',
  [
    pytest.param(*pair, marks=() if pair in BY_DEFAULT else pytest.mark.slow)
    for pair in itertools.product(FILES, ('float32', 'float16', 'int8'))
  ],
)
def test_command(
  form, weights, command, refused, digits_flags, test_images, tmp_path
):
  """The file alone does what the bundle does, and says what it is."""
  flags = ('--format', form, '--weights', weights, *digits_flags)
  if weights == 'int8' and form != 'onnx':
    assert '--weights int8 is for --format onnx or web' in refused(*flags)
    return
  # A dozen steps leave a student that tells little apart.
  flags = (*flags, '--max_drop', 0.3, '--check_images', 200)
  output = tmp_path / f'student.{form}'
  code, out, err = command('--output', output, *flags)
  assert not code, err
  bundle = bundles.load(digits_flags[1])
  wanted = logits_of(bundle, test_images.images)
  session = sessions.load(str(output), trust_code=True)
  logits, probabilities = session(test_images.images)
  np.testing.assert_allclose(probabilities, jax.nn.softmax(logits), atol=1e-6)
  limit = {'float32': 1e-5, 'float16': 5e-3, 'int8': 0.5}[weights]
  scale = np.abs(wanted).max()
  error = np.abs(logits - wanted).max()
  assert error <= limit * scale
  if weights != 'float32':
    assert error > 1e-5 * scale  # They are stored so indeed.
  assert session(test_images.images[:1])[0].shape == (1, 10)
  about = json.loads((tmp_path / f'student.{form}.json').read_text())
  assert about['bytes'] == len(output.read_bytes())
  assert about['check']['images'] == 200
  assert about['metadata'] == {
    key: session.metadata[key] for key in about['metadata']
  }
  assert sessions.class_names(session, '') == list(bundle.class_names)
  assert about['metadata']['description'] == (
    'plain, distilled from plain by ijckd on digits'
  )
  assert 'data_dir' not in json.dumps(session.metadata)
  assert f'{about["check"]["agreement"]:.2%}' in out
  # It is only replaced if that is asked for.
  code, _, err = command('--output', output, *flags)
  assert code == 2 and 'give --overwrite' in err
  assert command('--output', output, '--overwrite', *flags)[0] == 0


def test_weights_are_stored_as_asked(digits_flags):
  """Half of the bytes, but for what is no matrix."""
  bundle = bundles.load(digits_flags[1])
  deployed = deployed_lib.deploy(bundle)
  whole = onnx_files.encode(deployed)
  for full, half in (
    (whole, onnx_files.halve(whole)),
    *(
      (encode(), encode(half=True))
      for encode in (
        lambda **kw: stablehlo_files.encode(deployed, **kw),
        lambda **kw: safetensors_files.encode(bundle, deployed, **kw),
      )
    ),
  ):
    saved = len(full) - len(half)
    matrices = sum(x.size for x in deployed.arrays.values() if x.ndim > 1)
    # Names and casts take a little of it.
    assert 1.9 * matrices < saved < 2.05 * matrices


def test_nothing_but_what_is_run(finished_run):
  """No batch norm, no array that is not read, a bias for each convolution."""
  bundle = bundles.load(finished_run[0])
  deployed = deployed_lib.deploy(bundle)
  assert not any('BatchNorm' in name for name in deployed.arrays)
  assert not any(name.startswith('batch_stats') for name in deployed.arrays)
  kernels = [x for x in deployed.arrays if x.endswith('kernel')]
  biases = [x for x in deployed.arrays if x.endswith('bias')]
  assert len(kernels) == len(biases) > 6
  model = onnx.load_from_string(onnx_files.encode(deployed))
  kinds = [node.op_type for node in model.graph.node]
  assert kinds.count('Conv') == len(kernels) - 1  # The head is a product.
  # The images as bytes, once, and no more than a subtraction on them.
  assert num_layout_changes(model) == 1
  assert kinds[:4] == ['Transpose', 'Cast', 'Sub', 'Conv']
  read = {name for node in model.graph.node for name in node.input}
  assert {x.name for x in model.graph.initializer} <= read
  assert not {'BatchNormalization', 'Sqrt', 'Max', 'Identity'} & set(kinds)
  assert [x.domain for x in model.opset_import] == ['']


class Hidden(backbone_lib.Backbone):
  """A convolution, and a hidden layer after the average."""

  def setup(self):
    if not self.truncated:
      self.pool_hidden = nn.Dense(5)

  @nn.compact
  def __call__(self, images, *, train):
    del train
    x = nn.relu(self.conv(6, 3, 2, name='body')(images))
    return outputs.Features((x,), x, self.pool(x))

  def pool(self, final):
    pooled = super().pool(final)
    return pooled if self.truncated else self.pool_hidden(pooled)


class Program(backbone_lib.Backbone):
  """One whose last layer is a program, which ONNX has no word for."""

  @nn.compact
  def __call__(self, images, *, train):
    del train
    x = self.conv(6, 3, 2, name='body')(images)
    x = programs.trace(lambda _, x: abs(x), {}, x.shape[1:])({}, x)
    return outputs.Features((x,), x, self.pool(x))


class Tokens(backbone_lib.Backbone):
  """One that shuffles channels on the way to a row of tokens, not to a map."""

  @nn.compact
  def __call__(self, images, *, train):
    del train
    x = self.conv(6, 3, 2, name='body')(images)
    batch, height, width, channels = x.shape
    x = x.reshape(batch, height, width, 2, channels // 2).swapaxes(3, 4)
    x = x.reshape(batch, height * width, channels)[:, ::-1]
    x = self.conv(6, 3, 1, name='last')(x.reshape(batch, height, width, 6))
    return outputs.Features((x,), x, self.pool(x))


NAMES = ('Hidden', 'Program', 'Tokens')
HIDDEN, PROGRAM, TOKENS = (f'{__name__}:{name}' for name in NAMES)


def test_what_is_not_read_is_left_out(finished_run, tmp_path):
  """A student's own pool, where it predicts through the teacher's."""
  bundle = bundles.load(finished_run[0])
  plain = random_bundle(HIDDEN, side=8)
  height, width = bundle.network.connect_size
  network = dataclasses.replace(
    plain.network,
    connector=dataclasses.replace(
      bundle.network.connector, parent=None, name=None
    ),
    connect_size=(height, width),
    pool=bundle.network.pool,
  )
  features = jax.eval_shape(
    lambda v, x: network.backbone.apply(v, x, train=False),
    network_lib.part(plain.variables, 'backbone'),
    np.zeros((1, 8, 8, 3), np.float32),
  )
  connector = jax.device_get(
    network.init_connector(jax.random.key(0), features)
  )
  variables = {
    'params': {
      'backbone': plain.variables['params']['backbone'],
      'connector': connector['params'],
      'head': bundle.variables['params']['head'],
    },
    'batch_stats': {'backbone': {}, 'connector': connector['batch_stats']},
    'pool': bundle.variables['pool'],
  }
  both = dataclasses.replace(
    bundle,
    network=network,
    variables=variables,
    backbone_name=HIDDEN,
    image_shape=(8, 8, 3),
  )
  deployed = deployed_lib.deploy(both)
  assert set(deployed.unread) >= {
    f'params/backbone/pool_hidden/{name}' for name in ('kernel', 'bias')
  }
  images = random_images((8, 8, 3))
  data = safetensors_files.encode(both, deployed)
  session = safetensors_files.Session(data, 'it', trust_code=True)
  np.testing.assert_allclose(
    session(images)[0], logits_of(both, images), atol=1e-5
  )
  with pytest.raises(config_utils.UserError, match='outside the package'):
    safetensors_files.Session(data, 'it')


@pytest.mark.parametrize(
  'name', ('vgg8', 'wrn_16_1', 'mobilenet_v3_small', 'shufflenet_v1_cifar')
)
def test_onnx_of_backbones(name):
  """Pools, shuffles, squeezes: each family's operators, by onnxruntime."""
  bundle = random_bundle(name)
  data = onnx_files.encode(deployed_lib.deploy(bundle))
  model = onnx.load_from_string(data)
  onnx.checker.check_model(model, full_check=True)
  # The images' alone: maps keep their channels first from then on.
  assert num_layout_changes(model) == 1
  assert_gives_the_same(onnx_files.Session(data, name), bundle)


@pytest.mark.parametrize(
  'name',
  [name for name, cls in connectors.CONNECTORS.items() if cls.takes == 'map'],
)
def test_onnx_of_connectors(name):
  case = classifiers.Case('resnet14', 'resnet8', (SIDE, SIDE, 3), 7)
  bundle = case.bundle(f'{name}:2')
  data = onnx_files.encode(deployed_lib.deploy(bundle))
  kinds = [node.op_type for node in onnx.load_from_string(data).graph.node]
  assert kinds.count('Transpose') == 1 and 'Mul' not in kinds
  assert_gives_the_same(onnx_files.Session(data, name), bundle)


def test_a_shuffle_that_makes_no_map():
  bundle = random_bundle(TOKENS, side=8)
  data = onnx_files.encode(deployed_lib.deploy(bundle))
  assert_gives_the_same(onnx_files.Session(data, 'tokens'), bundle)


def test_a_network_that_resizes_its_images():
  """Its preprocessing stays whole, since no convolution reads the images."""
  bundle = random_bundle('resnet8')
  preprocessing = dataclasses.replace(
    bundle.network.preprocessing, size=(40, 48), std=(0.2, 0.25, 0.3)
  )
  network = dataclasses.replace(bundle.network, preprocessing=preprocessing)
  bundle = dataclasses.replace(bundle, network=network)
  data = onnx_files.encode(deployed_lib.deploy(bundle))
  assert_gives_the_same(onnx_files.Session(data, 'resized'), bundle)


def test_an_orthogonal_connector_is_a_matrix_in_the_file():
  """The exponential that trained it is taken once, and not for each image."""
  case = classifiers.Case('resnet14', 'resnet8', (SIDE, SIDE, 3), 7)
  bundle = case.bundle('linear:2')
  linear = bundle.network.connector
  fields = {'features': linear.features, 'axis_name': linear.axis_name}
  network = dataclasses.replace(
    bundle.network, connector=connectors.Orthogonal(**fields)
  )
  free = np.random.RandomState(0).normal(size=2 * (linear.features,))
  params = bundle.variables['params'] | {'connector': {'kernel': free / 8}}
  bundle = dataclasses.replace(
    bundle, network=network, variables={**bundle.variables, 'params': params}
  )
  deployed = deployed_lib.deploy(bundle)
  for session in (
    onnx_files.Session(onnx_files.encode(deployed), 'student'),
    safetensors_files.Session(
      safetensors_files.encode(bundle, deployed), 'student'
    ),
  ):
    assert_gives_the_same(session, bundle)


@pytest.mark.slow
@pytest.mark.parametrize('name', models.BACKBONES)
def test_onnx_of_every_backbone(name):
  sides = {'deit_small_patch16_224': 224}
  # Random weights let its rounding errors grow.
  limits = {'mobilenetv3_large_100': 2e-4}
  bundle = random_bundle(name, side=sides.get(name, 64))
  data = onnx_files.encode(deployed_lib.deploy(bundle))
  session = onnx_files.Session(data, name)
  limit = limits.get(name, 2e-5)
  assert_gives_the_same(session, bundle, count=2, limit=limit)


@pytest.mark.parametrize('form', FILES)
def test_pixels_from_0_to_1(form, command, digits_flags, test_images, tmp_path):
  output = tmp_path / f'student.{form}'
  flags = ('--format', form, '--input', 'float32', *digits_flags)
  assert command('--output', output, *flags)[0] == 0
  session = sessions.load(str(output), trust_code=True)
  assert session.takes == 'float32'
  images = test_images.images[:50]
  found, _ = session(checks.as_taken(images, 'float32'))
  wanted = logits_of(bundles.load(digits_flags[1]), images)
  np.testing.assert_allclose(found, wanted, atol=1e-5 * np.abs(wanted).max())


def test_files_run_without_this_package(command, digits_flags, tmp_path):
  """As their own documentation says: by onnxruntime, and by jax.export."""
  for form in ('onnx', 'stablehlo'):
    flags = ('--format', form, '--output', tmp_path / form, *digits_flags)
    assert command(*flags)[0] == 0
  images = random_images((8, 8, 1))
  session = onnxruntime.InferenceSession(tmp_path / 'onnx')
  logits, _ = session.run(None, {'images': images})
  program = jax_export.deserialize(
    bytearray((tmp_path / 'stablehlo').read_bytes())
  )
  assert set(program.platforms) == set(programs.PLATFORMS)
  np.testing.assert_allclose(program.call(images)[0], logits, atol=1e-4)


def test_a_wrong_file_is_not_written():
  """What is compared is the file's word against the bundle's."""
  bundle = random_bundle('resnet8', side=8)
  images = random_images(bundle.image_shape, 40)
  wanted = logits_of(bundle, images)
  labels = wanted.argmax(1)
  batches = [{'image': images, 'label': labels}]

  class Off:
    takes = 'uint8'

    def __init__(self, change):
      self.change = change

    def __call__(self, images):
      logits = self.change(logits_of(bundle, images))
      return logits, jax.nn.softmax(logits)

  result = checks.compare(bundle, Off(lambda x: x), batches)
  assert result['max_error'] == 0 and result['agreement'] == 1
  assert result['top1'] == {'jax': 1.0, 'file': 1.0}
  for weights in export.WEIGHTS:
    checks.judge(result, weights, max_drop=0.0)
  for change in (
    lambda x: x + 0.01 * np.abs(x).max(),
    lambda x: x[:, ::-1],
    lambda x: np.nan * x,
  ):
    result = checks.compare(bundle, Off(change), batches)
    with pytest.raises(config_utils.UserError, match='not do what the bundle'):
      checks.judge(result, 'float32', max_drop=1.0)

  def miss(x):
    x = x.copy()
    x[:4] = -x[:4]  # Four of forty.
    return x

  result = checks.compare(bundle, Off(miss), batches)
  checks.judge(result, 'int8', max_drop=0.11)
  with pytest.raises(config_utils.UserError, match=r'cost 10.00% of the'):
    checks.judge(result, 'int8', max_drop=0.09)
  unlabelled = [{'image': images, 'label': np.full(40, -1)}]
  result = checks.compare(bundle, Off(miss), unlabelled)
  assert result['top1'] is None
  with pytest.raises(config_utils.UserError, match=r'cost 10.00% of the'):
    checks.judge(result, 'int8', max_drop=0.09)


def test_images_are_taken_from_all_of_a_split():
  class Dataset:
    def load(self, split):
      assert split == 'test'
      images = np.arange(200, dtype=np.uint8).reshape(200, 1, 1, 1)
      return datasets.Arrays(images, np.arange(200))

  found = list(checks.images(Dataset(), 'test', 100))
  assert [len(x['label']) for x in found] == [64, 36]
  labels = np.concatenate([x['label'] for x in found])
  assert labels[0] == 0 and labels[-1] == 199
  assert set(np.diff(labels)) == {2, 3}
  assert sum(
    len(x['label']) for x in checks.images(Dataset(), 'test', 999)
  ) == (200)


def test_what_onnx_has_no_word_for_is_named():
  bundle = random_bundle(PROGRAM, side=8)
  with pytest.raises(
    config_utils.UserError, match='it holds a program'
  ) as caught:
    onnx_files.encode(deployed_lib.deploy(bundle))
  assert '--format stablehlo' in str(caught.value)


def test_weights_too_large_for_half_precision():
  bundle = random_bundle('resnet8', side=8)
  bundle.variables['params']['head']['kernel'][0, 0] = 1e5
  deployed = deployed_lib.deploy(bundle)
  for encode in (
    lambda: onnx_files.halve(onnx_files.encode(deployed)),
    lambda: stablehlo_files.encode(deployed, half=True),
    lambda: safetensors_files.encode(bundle, deployed, half=True),
  ):
    with pytest.raises(config_utils.UserError, match='too large for float16'):
      encode()


@pytest.fixture
def wide(tmp_path):
  """A bundle that names no data set, and a folder of pictures for it."""
  bundle = dataclasses.replace(
    random_bundle('resnet8'),
    crop=images.CentreCrop(36, 'bicubic'),
    class_names=tuple('abcdefg'),
  )
  bundle.save(tmp_path / 'wide')
  (tmp_path / 'pictures').mkdir()
  paths = photographs.write(tmp_path / 'pictures')
  return tmp_path / 'wide', tmp_path / 'pictures', paths


def test_checked_on_pictures(command, wide, tmp_path):
  """They need no labels, and are cropped as the bundle says."""
  folder, where, paths = wide
  output = tmp_path / 'student.onnx'
  flags = ('--bundle', folder, '--format', 'onnx', '--output', output)
  code, out, err = command(*flags, '--pictures', where, '--check_images', 7)
  assert (code, err) == (0, '')
  said = out.splitlines()[-1]
  assert said.startswith('7 images, JAX and file: ')
  assert 'probabilities by' in said and 'top-1' not in said
  about = json.loads((tmp_path / 'student.onnx.json').read_text())
  check = about['check']
  assert (check['split'], check['images'], check['top1']) == (
    'pictures',
    7,
    None,
  )
  assert check['agreement'] == 1 and 0 < check['max_probability_error'] < 1e-5
  assert str(where) not in json.dumps(about)
  bundle = bundles.load(folder)
  (batch,) = pictures.examples(paths, (32, 32, 3), bundle.crop, 7)
  wanted = logits_of(bundle, batch['image'])
  assert check['max_logit'] == pytest.approx(np.abs(wanted).max())
  assert json.loads(about['metadata']['crop']) == {
    'resize': 36,
    'interpolation': 'bicubic',
    'keeps_size': False,
  }


def test_pictures_that_check_nothing(refused, wide, tmp_path):
  folder, where, _ = wide
  flags = ('--format', 'onnx', '--bundle', folder)
  assert 'names no data set: give --dataset' in refused(*flags)
  flags += ('--pictures',)
  (tmp_path / 'empty').mkdir()
  assert 'names no pictures' in refused(*flags, tmp_path / 'empty')
  assert '--weights int8 tells its ranges by training images' in refused(
    *flags, where, '--weights', 'int8'
  )
  assert 'give --pictures or --dataset, not both' in refused(
    *flags, where, '--dataset', 'digits'
  )
  (where / 'bad.png').write_bytes(b'no picture')
  assert 'bad.png cannot be read: not a picture' in refused(*flags, where)


def test_mistakes(refused, command, digits_flags, tmp_path):
  flags = ('--format', 'onnx', *digits_flags)
  assert 'there is no bundle' in refused(
    '--format', 'onnx', '--bundle', tmp_path / 'none'
  )
  assert 'invalid choice' in refused('--format', 'tflite', *digits_flags)
  assert '--check_images' in refused(*flags, '--check_images', 0)
  assert '--teacher is for --format web' in refused(
    *flags, '--teacher', digits_flags[1] / 'teacher'
  )
  assert '10 classes apart, but the data set has 100' in refused(
    *flags, '--dataset', 'fashion_pairs_100'
  )
  assert 'the bundle takes images of 8x8x1' in refused(
    *flags, '--dataset', 'fashion_mnist'
  )
  newer = tmp_path / 'newer'
  newer.mkdir()
  spec = json.loads((digits_flags[1] / 'bundle/bundle.json').read_text())
  (newer / 'bundle.json').write_text(json.dumps({**spec, 'format_version': 99}))
  assert 'has format 99' in refused('--format', 'onnx', '--bundle', newer)
  code, _, err = command('--output', tmp_path, *flags)
  assert code == 2 and 'is a folder: name a file' in err


def test_a_folder_that_cannot_be_written(command, digits_flags, tmp_path):
  """The name under which it is written first is not told."""
  flags = ('--format', 'safetensors', *digits_flags)
  folder = tmp_path / 'folder'
  folder.mkdir()
  # The name fits, and is too long with what is put around it.
  name = 'x' * 250
  code, _, err = command('--output', folder / name, *flags)
  assert code == 2
  assert err == f'error: cannot write {folder}/{name}: File name too long\n'


def test_full_disk(command, digits_flags, tmp_path):
  """Neither the file nor a part of it is left, nor what is beside it."""
  flags = ('--format', 'safetensors', *digits_flags)
  code, _, err = command('--output', '/dev/null/student', *flags)
  assert code == 2
  assert err.startswith('error: cannot write /dev/null/student: ')
  limits = resource.getrlimit(resource.RLIMIT_FSIZE)
  # There is room for what is beside it.
  resource.setrlimit(resource.RLIMIT_FSIZE, (25_000, limits[1]))
  try:
    code, _, err = command('--output', tmp_path / 'student', *flags)
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
  assert code == 2
  assert (
    err
    == f'error: cannot write {tmp_path}/student: [Errno 27] File too large\n'
  )
  assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize('suffix', sessions.SUFFIXES)
def test_damaged_files(suffix, tmp_path):
  path = tmp_path / f'student{suffix}'
  with pytest.raises(config_utils.UserError, match='cannot be read'):
    sessions.load(str(path), trust_code=True)
  path.write_bytes(b'nothing that anybody wrote')
  describe(path)
  with pytest.raises(config_utils.UserError, match=f'student{suffix}'):
    sessions.load(str(path), trust_code=True)
  beside = tmp_path / f'student{suffix}.json'
  for text in ('', '[]', '{"metadata": {}}', '[' * 100_000):
    beside.write_text(text)
    with pytest.raises(config_utils.UserError, match=f'{beside}.*cannot be'):
      sessions.load(str(path), trust_code=True)


def describe(path):
  """Writes what export would write beside a file, of its content."""
  about = {
    'metadata': {'class_names': '[]'},
    'sha256': hashlib.sha256(path.read_bytes()).hexdigest(),
  }
  path.with_name(f'{path.name}.json').write_text(json.dumps(about))


def test_another_file_than_the_one_that_is_described(finished_run, tmp_path):
  """Whole, and of the right kind: nothing else would tell it."""
  deployed = deployed_lib.deploy(bundles.load(finished_run[0]))
  changed = dataclasses.replace(
    deployed, arrays={name: x + 0 for name, x in deployed.arrays.items()}
  )
  head = next(x for name, x in changed.arrays.items() if 'head' in name)
  head[...] += 1
  bundle = bundles.load(finished_run[0])
  for suffix, encode in (
    ('.onnx', onnx_files.encode),
    ('.safetensors', lambda x: safetensors_files.encode(bundle, x)),
    ('.stablehlo', stablehlo_files.encode),
  ):
    path = tmp_path / f'student{suffix}'
    path.write_bytes(encode(deployed))
    describe(path)
    sessions.load(str(path), trust_code=True)
    path.write_bytes(encode(changed))
    with pytest.raises(config_utils.UserError, match='its SHA-256 differs'):
      sessions.load(str(path), trust_code=True)
    path.with_name(f'{path.name}.json').unlink()
    if suffix == '.stablehlo':
      with pytest.raises(config_utils.UserError, match='json is missing'):
        sessions.load(str(path), trust_code=True)
    else:
      sessions.load(str(path), trust_code=True)


def elsewhere(path):
  """Returns a tensor (3, 3) whose numbers lie in another file."""
  tensor = onnx.TensorProto(name='there', dims=[3, 3], data_type=1)
  tensor.data_location = onnx.TensorProto.EXTERNAL
  tensor.external_data.add(key='location', value=str(path))
  return tensor


def reading(path, kind):
  """Returns a model that adds what lies in another file to its images."""
  make = onnx.helper.make_node
  here = onnx.numpy_helper.from_array(np.zeros((3, 3), np.float32), 'here')
  tensor, constants, nodes, functions = elsewhere(path), [], [], []
  if kind == 'initializer':
    constants = [tensor]
  elif kind == 'constant':
    nodes = [make('Constant', [], ['there'], value=tensor)]
  elif kind == 'branch':
    yes = onnx.numpy_helper.from_array(np.array(True), 'yes')
    out = onnx.helper.make_tensor_value_info('out', 1, [3, 3])
    branch = onnx.helper.make_graph(
      [make('Identity', ['there'], ['out'])], 'branch', [], [out], [tensor]
    )
    constants = [yes]
    nodes = [
      make('If', ['yes'], ['there'], then_branch=branch, else_branch=branch)
    ]
  elif kind == 'function':
    functions = [
      onnx.helper.make_function(
        *('here', 'Read', [], ['out']),
        [make('Constant', [], ['out'], value=tensor)],
        [onnx.helper.make_opsetid('', 21)],
      )
    ]
    nodes = [make('Read', [], ['there'], domain='here')]
  else:
    tensor.name = 'here'
    # Both, so that it can be taken for a tensor that is whole.
    tensor.raw_data = here.raw_data
    tensor.data_location = onnx.TensorProto.DEFAULT
    constants = [tensor]
    nodes = [make('Identity', ['here'], ['there'])]
  return onnx.helper.make_model(
    onnx.helper.make_graph(
      [
        *nodes,
        make('Add', ['images', 'there'], ['logits']),
        make('Softmax', ['logits'], ['probabilities']),
      ],
      'graph',
      [onnx.helper.make_tensor_value_info('images', 1, ['B', 3])],
      [
        onnx.helper.make_tensor_value_info(name, 1, ['B', 3])
        for name in ('logits', 'probabilities')
      ],
      constants,
    ),
    opset_imports=[
      onnx.helper.make_opsetid('', 21),
      onnx.helper.make_opsetid('here', 1),
    ],
    functions=functions,
    ir_version=10,
  )


@pytest.mark.parametrize('absolute', [False, True])
@pytest.mark.parametrize(
  'kind', ['initializer', 'constant', 'branch', 'function', 'both']
)
def test_no_other_file_is_read(kind, absolute, monkeypatch, tmp_path):
  secret = np.arange(9, dtype=np.float32)
  secret.tofile(tmp_path / 'secret.bin')
  monkeypatch.chdir(tmp_path)
  path = tmp_path / 'secret.bin' if absolute else 'secret.bin'
  data = reading(path, kind).SerializeToString()
  with pytest.raises(config_utils.UserError, match='lies in .*secret.bin'):
    onnx_files.Session(data, 'it')


def test_a_path_of_many_lines_is_told_in_one():
  data = reading('a\nb' * 1000, 'initializer').SerializeToString()
  with pytest.raises(config_utils.UserError) as caught:
    onnx_files.Session(data, 'it')
  assert str(caught.value).isprintable() and len(str(caught.value)) < 400


def test_onnxruntimes_own_format_is_not_read(finished_run, tmp_path):
  """It is told by four bytes, and has files beside it as well."""
  path, own = tmp_path / 'a.onnx', tmp_path / 'a.ort'
  path.write_bytes(
    onnx_files.encode(deployed_lib.deploy(bundles.load(finished_run[0])))
  )
  options = onnxruntime.SessionOptions()
  options.optimized_model_filepath = str(own)
  options.add_session_config_entry('session.save_model_format', 'ORT')
  options.log_severity_level = 3
  onnxruntime.InferenceSession(path, options)
  assert own.read_bytes()[4:8] == b'ORTM'
  with pytest.raises(config_utils.UserError, match='cannot be read'):
    onnx_files.Session(own.read_bytes(), 'it')


def test_foreign_onnx():
  """A model that is none of ours is told so."""
  x = onnx.helper.make_tensor_value_info('x', onnx.TensorProto.FLOAT, [1])
  y = onnx.helper.make_tensor_value_info('y', onnx.TensorProto.FLOAT, [1])
  node = onnx.helper.make_node('Relu', ['x'], ['y'])
  graph = onnx.helper.make_graph([node], 'g', [x], [y])
  model = onnx.helper.make_model(
    graph, opset_imports=[onnx.helper.make_opsetid('', 21)], ir_version=10
  )
  with pytest.raises(
    config_utils.UserError, match='no model that ijckd export'
  ):
    onnx_files.Session(model.SerializeToString(), 'it')


def test_safetensors_are_plain(command, digits_flags, tmp_path):
  """Any reader of the format finds the arrays, and what they are."""
  output = tmp_path / 'student.safetensors'
  flags = ('--format', 'safetensors', '--output', output, *digits_flags)
  assert command(*flags)[0] == 0
  with safetensors.safe_open(output, 'numpy') as file:
    assert json.loads(file.metadata()['class_names'])[3] == '3'
    assert 'params/head/kernel' in set(file.keys())


def test_stablehlo_must_be_trusted(tmp_path):
  path = tmp_path / 'student.stablehlo'
  path.write_bytes(b'')
  with pytest.raises(config_utils.UserError, match='give --trust_code'):
    sessions.load(str(path))
