"""Students in PyTorch: a module that computes what the network does."""

import ast
import functools
import pathlib
import subprocess
import sys

from flax import traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ijckd_jax import models
from ijckd_jax.data import augment
from ijckd_jax.distillation import connectors
from ijckd_jax.distillation import network as network_lib
from ijckd_jax.distillation import teachers
from ijckd_jax.models import mobilenet_v3
from ijckd_jax.pytorch import backbone_source
from ijckd_jax.pytorch import student_source
from ijckd_jax.runtime import config_utils

torch_networks = pytest.importorskip('tests.torch_networks')
torch = torch_networks.torch

NUM_CLASSES = 7
NUM_FEATURES = 24  # Of the teacher.
# A backbone for each kind of text.
LAYOUTS = (
  'resnet14x2',
  'resnet18_cifar',
  'resnet50_cifar',
  'resnet18',
  'resnext50_32x4d',
  'wrn_16_2',
  'torchdistill_wrn_16_8',
  'vgg8',
  'mobilenet_v1',
  'mobilenet_v2_cifar_x0_5',
  'mobilenet_v2',
  'mobilenet_v3_small',
  'shufflenet_v1_cifar',
  'shufflenet_v2_cifar_x0_5',
  'shufflenet_v2_x0_5',
  'deit_small_patch16_224',
)
# Backbones with layers after their last stage that can be written.
LONGER = (
  'wrn_16_1',
  'shufflenet_v2_cifar_x0_5',
  'torchdistill_wrn_16_8',
  'mobilenet_v2_cifar_x0_5',
  'mobilenet_v2',
  'shufflenet_v2_x0_5',
)
LEAVES = {
  'kernel': 'weight',
  'scale': 'weight',
  'mean': 'running_mean',
  'var': 'running_var',
}


def make(
  name,
  connector='bottleneck',
  *,
  size=(32, 32),
  channels=3,
  signed=False,
  takes=None,
  tap='stage',
  connect_size=(1, 2),
  pool_backbone=None,
):
  """Returns a network and the text that runs it in PyTorch."""
  backbone = models.build(name, tap=tap)
  fields = {} if takes is None else {'takes': takes}
  features = NUM_FEATURES
  if connector == 'identity':
    features = features_of(backbone, (*size, channels)).final.shape[-1]
  connector = connectors.CONNECTORS[connector](features, signed, **fields)
  pool = teachers.average_pool
  if pool_backbone is not None:
    pool = network_lib.pool_of(pool_backbone)
  network = network_lib.Network(
    backbone,
    augment.Preprocessing((0.25,) * channels, (0.5,) * channels, size),
    connector,
    connect_size if connector.takes == 'map' else None,
    pool,
  )
  text = student_source.source(
    network,
    backbone_name=name,
    pool_backbone=pool_backbone,
    image_shape=(28, 28, channels),
    num_classes=NUM_CLASSES,
  )
  return network, text


@functools.cache
def features_of(backbone, image_shape):
  """Returns the shapes of a backbone's Features of one image."""
  features, _ = jax.eval_shape(
    lambda x: backbone.init_with_output(jax.random.key(0), x, train=False),
    jax.ShapeDtypeStruct((1, *image_shape), jnp.float32),
  )
  return features


def noise(network, channels, pool_backbone):
  """Returns variables that leave no layer without effect."""
  key, features = jax.random.key(0), network.connector.features
  shapes = jax.eval_shape(lambda: network.init(key, (28, 28, channels), None))
  shapes['pool'], width = {}, features
  if pool_backbone is not None and network.connector.takes == 'map':
    final = jax.ShapeDtypeStruct((1, 1, 1, features), jnp.float32)
    shapes['pool'] = jax.eval_shape(
      lambda x: pool_backbone.init(key, x, method='pool'), final
    )
    width = mobilenet_v3.POOLED_WIDTH
  shapes['params']['head'] = {
    'kernel': jax.ShapeDtypeStruct((width, NUM_CLASSES), jnp.float32),
    'bias': jax.ShapeDtypeStruct((NUM_CLASSES,), jnp.float32),
  }
  rng = np.random.default_rng(0)
  flat = traverse_util.flatten_dict(shapes)
  for path, leaf in flat.items():
    values = rng.standard_normal(leaf.shape, dtype=np.float32)
    if path[-1] == 'kernel':
      values *= np.sqrt(2 / np.prod(leaf.shape[:-1]), dtype=np.float32)
    elif path[-1] == 'var':
      values = 1 + np.abs(values) / 2
    elif path[-1] == 'scale':  # So that residual sums stay small.
      values = 0.4 + np.abs(values) / 3
    else:
      values *= 0.3
    flat[path] = values
  return {'batch_stats': {}, 'pool': {}, **traverse_util.unflatten_dict(flat)}


def state_dict(network, variables, pool_backbone):
  """Returns the variables as PyTorch has them."""
  names = {
    'backbone': network.backbone.torch_name,
    'connector': student_source.connector_name(network.connector).get,
    'pool': student_source.pool_name(pool_backbone).get,
  }
  flat = {}
  for kind in ('params', 'batch_stats'):
    for path, leaf in traverse_util.flatten_dict(variables[kind]).items():
      flat[path] = leaf
  for path, leaf in traverse_util.flatten_dict(variables['pool']).items():
    flat['pool', *path[1:]] = leaf
  state = {}
  for (part, *layers, leaf), value in flat.items():
    if part == 'head':
      key = f'head.{LEAVES.get(leaf, leaf)}'
    elif layers:
      layer = names[part]('_'.join(layers))
      key = f'{part}.{layer}.{LEAVES.get(leaf, leaf)}'
    else:  # A token of a DeiT.
      key = f'{part}.{names[part](leaf)}'
    if leaf == 'kernel':
      value = value.transpose(3, 2, 0, 1) if value.ndim == 4 else value.T
    state[key] = torch.from_numpy(np.ascontiguousarray(value))
  return state


def check(name, *args, channels=3, pool_backbone=None, **kwargs):
  """Asserts that both give the same logits; returns PyTorch's module."""
  network, text = make(
    name, *args, channels=channels, pool_backbone=pool_backbone, **kwargs
  )
  namespace = {}
  exec(compile(text, 'student.py', 'exec'), namespace)
  student = namespace['Student']()
  variables = noise(network, channels, pool_backbone)
  state = state_dict(network, variables, pool_backbone)
  student.load_state_dict(state, strict=True)
  shape = (2, *network.preprocessing.size, channels)
  images = np.random.RandomState(1).randn(*shape).astype(np.float32)
  # Compiling takes most of a small test's time.
  forward = jax.jit(lambda variables, x: network(variables, x).logits)
  expected = np.asarray(forward(variables, images))
  inputs = torch.from_numpy(images.transpose(0, 3, 1, 2).copy())
  with torch.no_grad():
    logits = student.eval()(inputs).numpy()
  assert expected.std() > 1e-3
  scale = np.abs(expected).max()
  np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-5 * scale)
  return student, inputs


def image_shape(name):
  """Returns the settings of images that a backbone is tested on."""
  if type(models.build(name)) is models.DeiT:
    return {'size': (32, 48), 'channels': 1}
  if models.build(name).usual_size == 32:
    return {'size': (32, 32), 'channels': 1}
  return {'size': (64, 64), 'channels': 3}


WRITTEN = [
  name
  for name in models.BACKBONES
  if type(models.build(name)) in backbone_source.WRITERS
]


def test_timms_convolutional_networks_are_not_written():
  others = set(models.BACKBONES) - set(WRITTEN) - {'plain'}  # The tests' own.
  assert others == set(torch_networks.TIMM_STAGES)
  message = (
    'a ConvNeXt cannot be written .*, DeiT; give ijckd export the format'
  )
  with pytest.raises(config_utils.UserError, match=message):
    check('convnext_atto', size=(64, 64), channels=3)


@pytest.mark.slow
@pytest.mark.parametrize('name', WRITTEN)
def test_every_backbone(name):
  unusual = type(models.build(name)) in (models.MobileNetV3Small, models.DeiT)
  student, inputs = check(
    name,
    'bottleneck_depthwise' if unusual else 'bottleneck',
    signed=unusual,
    **image_shape(name),
  )
  # It trains as well: each parameter is used, by PyTorch's own layers.
  student.train()(inputs).square().sum().backward()
  assert not [
    key for key, value in student.named_parameters() if value.grad is None
  ]
  original = dict.fromkeys(['backbone', 'connector'], (1e-5, 0.1))
  if name == 'mobilenet_v3_small':
    original['backbone'] = (1e-3, 0.01)
  for key, layer in student.named_modules():
    if isinstance(layer, torch.nn.BatchNorm2d):
      assert (layer.eps, layer.momentum) == original[key.split('.')[0]]
      assert layer.num_batches_tracked == 1


@pytest.mark.parametrize(
  'name',
  [
    pytest.param(name, marks=() if i < 2 else pytest.mark.slow)
    for i, name in enumerate(LONGER)
  ],
)
def test_backbones_that_are_not_cut_at_their_last_stage(name):
  check(name, tap='final', **image_shape(name))


@pytest.mark.parametrize('tap', ['stage0', 'stage1', 'stage2', 'stage3'])
def test_a_resnet_that_ends_at_a_stage(tap):
  """It has the layers up to there, no others, and the same results."""
  student, _ = check('resnet8', tap=tap, **image_shape('resnet8'))
  names = [name for name, _ in student.backbone.named_children()]
  stages = [f'layer{i + 1}' for i in range(int(tap[-1]))]
  assert names == ['conv1', 'bn1', 'relu', *stages]
  assert f'\n\nThe backbone ends at {tap}.\n\n' in make('resnet8', tap=tap)[1]


@pytest.mark.slow
@pytest.mark.parametrize('name', LAYOUTS)
def test_every_layout_ends_at_every_stage(name):
  settings = image_shape(name)
  sizes = (*settings['size'], settings['channels'])
  for number in range(len(features_of(models.build(name), sizes).stages)):
    check(name, tap=f'stage{number}', **settings)


def test_a_vgg_pools_large_maps_once_more():
  check('vgg8', 'conv1x1', size=(64, 80), connect_size=(3, 4))


@pytest.mark.parametrize('signed', [False, True])
@pytest.mark.parametrize('connector', student_source.CONNECTORS)
def test_every_connector(connector, signed):
  check('resnet8', connector, signed=signed, size=(8, 8))


def test_an_orthogonal_connector_is_refused():
  with pytest.raises(config_utils.UserError, match='for bottleneck, .*, mlp$'):
    check('resnet8', 'orthogonal', signed=True, size=(8, 8))


@pytest.mark.parametrize('connector', ['linear', 'bottleneck'])
def test_connectors_of_pooled_features(connector):
  check('resnet8', connector, takes='pooled', size=(8, 8))


@pytest.mark.parametrize('connector', ['bottleneck', 'mlp'])
def test_the_pool_of_a_mobilenet_v3(connector):
  """Its hidden layer is run on maps, and not on features that are pooled."""
  pool_backbone = models.build('mobilenet_v3_small')
  student, _ = check(
    'resnet8', connector, size=(8, 8), pool_backbone=pool_backbone
  )
  assert [key for key, _ in student.pool.named_parameters()] == (
    ['2.weight', '2.bias'] if connector == 'bottleneck' else []
  )


def written(name, connector='bottleneck', tap='stage'):
  """Returns the text of a student of its usual size, with long numbers."""
  side = models.build(name).usual_size
  network = network_lib.Network(
    models.build(name, tap=tap),
    augment.Preprocessing(
      (0.507075, 0.486550, 0.440919),
      (0.267334, 0.256438, 0.276150),
      2 * (side,),
    ),
    connectors.CONNECTORS[connector](2048),
    (14, 14),
    teachers.average_pool,
  )
  return student_source.source(
    network,
    backbone_name=name,
    pool_backbone=models.build('mobilenet_v3_small'),
    image_shape=(side, side, 3),
    num_classes=1000,
  )


def test_only_what_is_used_is_copied():
  tree = ast.parse(make('resnet8')[1])
  assert [node.name for node in tree.body if hasattr(node, 'name')] == [
    'conv',
    'conv_norm',
    'stage',
    'BasicBlock',
    'Student',
  ]


def test_texts_are_linted(tmp_path):
  """No name is unused or missing, and no line has more than 88 columns."""
  texts = {f'{name}_stage': written(name) for name in LAYOUTS}
  for name in LONGER:
    texts[f'{name}_final'] = written(name, tap='final')
  for name in LAYOUTS:
    texts[f'{name}_stage0'] = written(name, tap='stage0')
  for connector in set(student_source.CONNECTORS) - {'identity'}:
    texts[f'resnet8_{connector}'] = written('resnet8', connector)
  for name, text in texts.items():
    assert 'ijckd' not in text
    (tmp_path / f'{name}.py').write_text(text)
  config = pathlib.Path(__file__).parents[1] / 'pyproject.toml'
  command = [sys.executable, '-m', 'ruff', 'check', '--line-length=88']
  result = subprocess.run(
    [*command, '--config', config, tmp_path], capture_output=True, text=True
  )
  assert result.returncode == 0, result.stdout


def test_the_docstring_says_how_to_load_it_and_what_it_takes():
  _, text = make('resnet8', size=(28, 32))
  said = ' '.join(compile(text, 'student.py', 'exec').co_consts[0].split())
  assert said.startswith("resnet8, bottleneck connector, teacher's head of 7 ")
  assert 'load_state_dict(safetensors.torch.load_file(PATH))' in said
  assert 'Input (B, 3, 28, 32): (pixels / 255 - mean) / std' in said
  assert said.endswith(' mean = (0.25, 0.25, 0.25) std = (0.5, 0.5, 0.5)')
  many = make('resnet8', size=(8, 8), channels=60)[1]
  assert '(pixels / 255 - mean) / std' in many and 'mean =' not in many


class OtherConnector(connectors.Conv1x1):
  """Not of the package."""


class OtherBackbone(models.CifarResNet):
  """Not of the package."""

  def pool(self, final):
    return 2 * super().pool(final)


@pytest.mark.parametrize(
  'backbone, connector, pool_backbone, said',
  [
    (OtherBackbone(), connectors.Mlp(8), None, 'a OtherBackbone cannot be'),
    (
      models.CifarResNet(),
      OtherConnector(8),
      None,
      'a OtherConnector connector .* bottleneck, ',
    ),
    (
      models.CifarResNet(),
      connectors.Conv1x1(8),
      OtherBackbone(),
      'the pool of a OtherBackbone cannot be',
    ),
    (models.DeiT(), connectors.Mlp(8), None, r"DeiT .*method\.tap='stage'"),
    (models.MobileNetV3Small(), connectors.Mlp(8), None, "tap='stage'"),
    (models.CifarResNet(), None, None, 'has no connector'),
  ],
)
def test_what_cannot_be_written_is_said(
  backbone, connector, pool_backbone, said
):
  network = network_lib.Network(
    backbone,
    augment.Preprocessing((0.5,), (0.5,), (32, 32)),
    connector,
    (8, 8),
    teachers.average_pool,
  )
  with pytest.raises(config_utils.UserError, match=said):
    student_source.source(
      network,
      backbone_name='resnet20',
      pool_backbone=pool_backbone,
      image_shape=(32, 32, 1),
      num_classes=2,
    )


def test_a_name_from_outside_is_not_copied_into_the_code():
  network, _ = make('resnet8')
  text = student_source.source(
    network,
    backbone_name='a"""\nimport evil\n"""',
    pool_backbone=None,
    image_shape=(32, 32, 3),
    num_classes=2,
  )
  assert 'evil' not in text and text.startswith('"""CifarResNet, ')
