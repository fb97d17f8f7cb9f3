"""PyTorch's weights in and out: the same numbers, bit for bit, and networks."""

import argparse
import copy
import dataclasses
import functools
import json
import re
import runpy

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ijckd_jax import models
from ijckd_jax.bundles import bundles
from ijckd_jax.commands import weights as weights_command
from ijckd_jax.data import augment
from ijckd_jax.distillation import binding
from ijckd_jax.distillation import methods
from ijckd_jax.distillation import network as network_lib
from ijckd_jax.pytorch import hub
from ijckd_jax.pytorch import importer
from ijckd_jax.pytorch import published_names
from ijckd_jax.pytorch import published_weights
from ijckd_jax.pytorch import state_dicts
from ijckd_jax.runtime import config_utils
from tests import conftest

torch_networks = pytest.importorskip('tests.torch_networks')
safetensors_torch = pytest.importorskip(
  'safetensors.torch', reason="needs PyTorch: pip install -e '.[parity]'"
)
torch = torch_networks.torch

# One of each kind; the others are slow, and run by hand.
DEFAULT = (
  'resnet8x4',
  'wrn_16_1',
  'vgg8',
  'resnet18_cifar',
  'mobilenet_v2_cifar_x0_5',
  'shufflenet_v1_cifar',
  'resnet50',
  'mobilenet_v1',
  'mobilenet_v3_small',
  'shufflenet_v2_x0_5',
  'mobilenetv3_large_100',
  'mobilenetv4_conv_small',
  'tf_efficientnet_lite0',
  'convnext_atto',
  'regnety_004',
  'deit_small_patch16_224',
)
BACKBONES = [
  pytest.param(name, marks=[] if name in DEFAULT else pytest.mark.slow)
  for name in models.BACKBONES
]
NUM_CLASSES = 7


def size_for(name):
  """Returns the side of the images on which a network is compared."""
  return 32 if models.build(name).usual_size == 32 else 64


def published(name, channels=3, num_classes=NUM_CLASSES, size=None):
  """Returns a PyTorch network full of noise."""
  size = size or size_for(name)
  net = torch_networks.build(name, num_classes, channels, image_size=size)
  return torch_networks.randomize(net, seed=0)


def request(size, **fields):
  """Returns what is to be said of such a network, but for its backbone."""
  preprocessing = published_weights.Published(
    augment.Preprocessing(3 * (0.5,), 3 * (0.25,), (size, size))
  )
  return importer.Request(
    **{'preprocessing': preprocessing, 'num_classes': NUM_CLASSES, **fields}
  )


@functools.cache
def imported(name, size=None):
  """Returns a PyTorch network, and the bundle that its weights make."""
  size = size or size_for(name)
  net = published(name, size=size)
  asked = request(size, backbone=name)
  bundle, _ = importer.from_state(state_of(net), asked, origin={})
  return net, bundle


def state_of(net):
  """Returns a PyTorch network's state dict as if it had been read."""
  arrays = {key: value.numpy() for key, value in net.state_dict().items()}
  return state_dicts.StateDict(arrays, {}, {}, (), '')


def relative_error(actual, expected):
  """Returns the largest difference, in parts of the largest value."""
  expected = np.asarray(expected)
  if expected.ndim == 4:
    expected = expected.transpose(0, 2, 3, 1)
  assert actual.shape == expected.shape
  return np.abs(actual - expected).max() / np.abs(expected).max()


def errors(name, size=None, dtype='float32'):
  """Returns the errors of an imported network's outputs against PyTorch's."""
  size = size or size_for(name)
  net, bundle = imported(name, size)
  net = copy.deepcopy(net).to(getattr(torch, dtype))
  images = np.random.RandomState(0).randn(2, 3, size, size).astype(dtype)
  theirs = torch_networks.features(net, name, torch.from_numpy(images))
  with jax.enable_x64(dtype == 'float64'):
    network = dataclasses.replace(
      bundle.network, backbone=bundle.network.backbone.clone(dtype=dtype)
    )
    forward = jax.jit(network, compiler_options=conftest.FUSED)
    variables = jax.tree.map(lambda x: x.astype(dtype), bundle.variables)
    ours = jax.tree.map(
      np.asarray, forward(variables, images.transpose(0, 2, 3, 1))
    )
  assert ours.logits.dtype == dtype
  stages = zip(ours.stages, theirs['stages'], strict=True)
  return {
    'stages': max(relative_error(*pair) for pair in stages),
    **{
      key: relative_error(getattr(ours, key), theirs[key])
      for key in ('final', 'pooled', 'logits')
    },
  }


@pytest.mark.parametrize('name', BACKBONES)
def test_parity(name):
  """Stages, final map, pooled features and logits are PyTorch's."""
  assert max(errors(name).values()) < 1e-5


ALIKE = ('deit_tiny_patch16_224', 'vit_tiny_patch16_224')


@pytest.mark.parametrize('name', ALIKE)
def test_networks_that_are_alike_must_be_named(name):
  net, _ = imported(name)
  with pytest.raises(config_utils.UserError) as refused:
    importer.from_state(state_of(net), request(size_for(name)), origin={})
  assert str(refused.value) == (
    'it is a deit_tiny_patch16_224 or a vit_tiny_patch16_224, which are one '
    'network for images that are prepared in different ways: say --backbone '
    'NAME'
  )


BRANCHING = [
  name for name in models.BACKBONES if models.build(name).has_branches
]


@pytest.mark.parametrize('name', BRANCHING)
def test_branches_are_dropped_as_often_as_by_timm(name, monkeypatch):
  """In the order of the forward pass; timm leaves out those of rate 0."""
  size = size_for(name)
  options = {'img_size': size} if name.startswith(('deit', 'vit')) else {}
  net = torch_networks.timm.create_model(name, drop_path_rate=0.5, **options)
  theirs, ours = [], []
  for module in net.modules():
    if isinstance(module, torch_networks.timm.layers.DropPath):
      module.register_forward_hook(
        lambda module, *_: theirs.append(module.drop_prob)
      )
  with torch.no_grad():
    net.train()(torch.zeros(2, 3, size, size))

  def record(self, branch, position, train):
    del self, train
    ours.append(0.5 * position)
    return branch

  monkeypatch.setattr(models.Backbone, 'drop_branch', record)
  images = jax.ShapeDtypeStruct((2, size, size, 3), np.float32)
  backbone = models.build(name)
  jax.eval_shape(
    lambda x: backbone.init(jax.random.key(0), x, train=False), images
  )
  assert theirs
  np.testing.assert_allclose([rate for rate in ours if rate], theirs, rtol=1e-6)


def test_names_of_efficientnet_pytorch_are_those_of_tensorflows_networks():
  """Padded otherwise, and with another epsilon, the same arrays mislead."""
  for name in ('_bn0.weight', '_blocks.3._expand_conv.weight'):
    assert models.build('efficientnet_b0').torch_key(name) == name
    assert models.build('tf_efficientnet_lite0').torch_key(name) != name


# All those before a backbone in the table are tried.
QUICKLY_TOLD = ('resnet8', 'resnet8x4', 'wrn_16_1', 'vgg8', 'mobilenet_v1')


@pytest.mark.slow
@pytest.mark.parametrize(
  'name',
  [
    pytest.param(name, marks=[] if name in QUICKLY_TOLD else pytest.mark.slow)
    for name in models.BACKBONES
    if name not in ALIKE
  ],
)
def test_backbones_are_told_by_their_names(name):
  net, expected = imported(name)
  bundle, notes = importer.from_state(
    state_of(net), request(size_for(name)), origin={}
  )
  assert notes[0] == f'backbone {name}, told by the names'
  assert_same(bundle, expected)


@pytest.mark.parametrize('name', BACKBONES)
def test_export_is_the_state_dict_again(name):
  """With the published names, and strictly loaded into the same network."""
  net, bundle = imported(name)
  state, expected = published_names.state_dict(bundle), net.state_dict()
  assert state.keys() == expected.keys()
  for key, tensor in expected.items():
    if not key.endswith('num_batches_tracked'):
      np.testing.assert_array_equal(state[key], tensor.numpy())
  fresh = torch_networks.build(name, NUM_CLASSES, image_size=size_for(name))
  fresh.load_state_dict(
    {key: torch.from_numpy(value) for key, value in state.items()}, strict=True
  )
  with torch.no_grad():
    images = torch.ones(1, 3, size_for(name), size_for(name))
    assert torch.equal(fresh.eval()(images), net.eval()(images))


def assert_same(bundle, other):
  assert bundle.spec() == other.spec()
  jax.tree.map(np.testing.assert_array_equal, bundle.variables, other.variables)


@pytest.mark.parametrize('name', BACKBONES)
def test_import_of_an_export_is_the_identity(name, tmp_path):
  _, bundle = imported(name)
  state, metadata = (
    published_names.state_dict(bundle),
    published_names.metadata(bundle),
  )
  path = tmp_path / 'weights.safetensors'
  state_dicts.write(path, state, metadata)
  again, _ = importer.read(path, importer.Request())
  assert_same(again, bundle)


# Entries of the published state dicts, counters of batch norm included.
PUBLISHED_KEYS = {
  **{'resnet8': 56, 'resnet14': 92, 'resnet20': 128, 'resnet32': 200},
  **{'resnet38': 236, 'resnet44': 272, 'resnet56': 344, 'resnet110': 668},
  **{'resnet116': 704, 'resnet14x2': 98, 'resnet38x2': 242},
  **{'resnet110x2': 674, 'resnet8x4': 62, 'resnet14x4': 98},
  **{'resnet32x4': 206, 'resnet38x4': 242, 'wrn_16_1': 82, 'wrn_16_2': 83},
  **{'wrn_40_1': 226, 'wrn_40_2': 227, 'vgg8': 37, 'vgg11': 58, 'vgg13': 72},
  **{'vgg16': 93, 'vgg19': 114, 'resnet50_cifar': 320},
  **{'resnet18_cifar': 122, 'mobilenet_v2_cifar_x0_5': 320},
  **{'mobilenet_v2_cifar_x1_0': 320, 'shufflenet_v1_cifar': 296},
  **{'shufflenet_v2_cifar_x1_0': 338, 'shufflenet_v2_cifar_x1_5': 338},
  **{'resnet18': 122, 'resnet34': 218, 'resnet50': 320, 'resnet101': 626},
  **{'resnext50_32x4d': 320, 'wide_resnet50_2': 320, 'mobilenet_v1': 164},
  'mobilenet_v2': 314,
}


@pytest.mark.parametrize('name', PUBLISHED_KEYS)
def test_as_many_entries_as_the_published_state_dicts(name):
  backbone = models.build(name)
  image = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
  variables = jax.eval_shape(
    lambda x: backbone.init(jax.random.key(0), x, train=False), image
  )
  head = {'kernel': np.ones((1, 1)), 'bias': np.ones(1)}
  names = published_names.names_of(
    network_lib.Network(backbone, None, None, None, None),
    {
      'params': {'backbone': variables['params'], 'head': head},
      'batch_stats': {'backbone': variables['batch_stats']},
    },
  )
  counters = sum(name.endswith('.running_var') for name in names)
  assert len(names) + counters == PUBLISHED_KEYS[name]


def random_bundle(method, teacher, student, **fields):
  """Returns a student full of noise, with whatever a method deploys."""
  _, judge = imported(teacher)
  preprocessing = judge.network.preprocessing
  fields = {'factor': 4, **fields} if method == 'ijckd' else fields
  method = methods.get(method)(**fields)
  bound = binding.bind(
    backbone=models.build(student, tap=method.tap),
    preprocessing=preprocessing,
    method=method,
    given=(judge.teacher(),),
    image_shape=judge.image_shape,
    num_classes=NUM_CLASSES,
    axis_name=None,
    dtype=jnp.float32,
  )
  frozen, rng = bound.frozen, np.random.RandomState(0)
  fresh = jax.tree.map(
    lambda x: rng.uniform(0.5, 1.0, x.shape).astype(np.float32) / x.shape[0],
    jax.eval_shape(lambda: bound.init(jax.random.key(0), judge.image_shape)),
  )
  return bundles.Bundle(
    network=bound.deployed_network,
    variables=bound.deployed(fresh, frozen),
    backbone_name=student,
    pool_name=teacher if bound.reuses_head else student,
    image_shape=judge.image_shape,
    class_names=tuple('abcdefg'),
    info={'method': {'name': 'any'}},
  )


@pytest.mark.slow
@pytest.mark.parametrize(
  'method, teacher, student, fields, suffix',
  [
    ('ijckd', 'resnet8x4', 'mobilenet_v2_cifar_x0_5', {}, '.safetensors'),
    ('simkd', 'resnet8x4', 'vgg8', {}, '.pth'),
    ('ijckd', 'mobilenet_v3_small', 'resnet18', {}, '.safetensors'),
    (
      'ijckd',
      'deit_small_patch16_224',
      'shufflenet_v2_x0_5',
      {'connector': 'mlp', 'feature_site': 'pooled'},
      '.safetensors',
    ),
    ('srrl', 'resnet8x4', 'resnet8', {}, '.safetensors'),
    ('srrl', 'resnet8x4', 'resnet8', {}, '.pth'),
  ],
)
def test_students_go_out_and_come_back(
  method, teacher, student, fields, suffix, tmp_path, capsys
):
  """By the commands; what runs them in PyTorch gives the same logits."""
  bundle = random_bundle(method, teacher, student, **fields)
  bundle.save(tmp_path / 'student')
  file = tmp_path / f'weights{suffix}'
  run('export', bundle=tmp_path / 'student', output=file)
  more = {}
  if method == 'srrl' and suffix == '.pth':  # A bare state dict.
    more = {'mean': '0.5,0.5,0.5', 'std': '0.25,0.25,0.25', 'image_size': '32'}
  run('import', checkpoint=file, output=tmp_path / 'again', **more)
  again = bundles.load(tmp_path / 'again')
  jax.tree.map(np.testing.assert_array_equal, again.variables, bundle.variables)
  if not more:
    assert_same(again, bundle)
  side = bundle.image_shape[0]
  images = np.random.RandomState(0).randn(2, 3, side, side).astype(np.float32)
  expected = jax.jit(bundle.network)(
    bundle.variables, images.transpose(0, 2, 3, 1)
  ).logits
  if method == 'srrl':
    assert not (tmp_path / 'weights.py').exists()
    module = torch_networks.build(student, NUM_CLASSES)
  else:
    text = (tmp_path / 'weights.py').read_text()
    loads = {'.pth': "(torch.load(PATH)['state_dict'])"}
    assert loads.get(suffix, '(safetensors.torch.load_file(PATH))') in text
    module = runpy.run_path(str(tmp_path / 'weights.py'))['Student']()
  if suffix == '.pth':
    state = torch.load(file, weights_only=True)
    state = state if method == 'srrl' else state['state_dict']
  else:
    state = safetensors_torch.load_file(file)
  module.load_state_dict(state, strict=True)
  with torch.no_grad():
    logits = module.eval()(torch.from_numpy(images)).numpy()
  assert np.abs(logits - expected).max() < 1e-5 * np.abs(expected).max()
  assert str(file) in capsys.readouterr().out


def run(command, *flags, **options):
  """Runs the command as a user does."""
  words = [word for key in options for word in (f'--{key}', str(options[key]))]
  weights_command.main([command, *words, *flags])


def failure(command, *flags, **options):
  """Returns what a command that must fail says, in one line."""
  with pytest.raises(config_utils.UserError) as error:
    run(command, *flags, **options)
  assert '\n' not in str(error.value)
  return str(error.value)


@functools.cache
def small():
  """Returns a PyTorch resnet8 of a hundred classes."""
  return published('resnet8', num_classes=100)


def last_of_repdistiller(net):
  opt = argparse.Namespace(model='resnet8', trial='0')
  return {'opt': opt, 'model': net, 'optimizer': {'state': {}}}


@pytest.mark.parametrize(
  'wrapped, part',
  [
    (lambda net: net, ''),
    (lambda net: {'epoch': 240, 'model': net, 'best_acc': 70.0}, ''),
    (last_of_repdistiller, ''),
    (lambda net: {'state_dict': net}, ''),
    (lambda net: {f'module.{key}': x for key, x in net.items()}, ''),
    (
      lambda net: {
        'model': {
          f'module.{part}.{key}': x + (part == 'teacher')
          for part in ('student', 'teacher')
          for key, x in net.items()
        }
      },
      'student',
    ),
    (lambda net: {'model': net, 'args': argparse.Namespace(lr=0.1)}, ''),
    (
      lambda net: {k: x for k, x in net.items() if 'num_batches' not in k},
      '',
    ),
  ],
  ids=(
    'kd_srrl repdistiller repdistiller_last state_dict parallel mdistiller '
    'torchdistill torchvision_old'
  ).split(),
)
def test_formats(wrapped, part, tmp_path, capsys):
  """Each is told, unwrapped, and taken whole; CIFAR-100 is assumed and said."""
  file = tmp_path / 'net.pth'
  torch.save(wrapped(small().state_dict()), file)
  options = {'part': part} if part else {}
  run('import', checkpoint=file, output=tmp_path / 'bundle', **options)
  printed = capsys.readouterr().out
  assert 'backbone resnet8, told by the names' in printed
  assert 'all 47 arrays taken, 83,892 parameters, 100 classes' in printed
  assert 'preprocessing cifar100, assumed as it is usual' in printed
  bundle = bundles.load(tmp_path / 'bundle')
  assert bundle.class_names[:2] == ('apple', 'aquarium_fish')
  assert bundle.info['origin']['sha256'] == state_dicts.sha256(file)
  state = published_names.state_dict(bundle)
  for key, tensor in small().state_dict().items():
    if not key.endswith('num_batches_tracked'):
      np.testing.assert_array_equal(state[key], tensor.numpy())


def prefixed(prefix, *, beside=(), times=1):
  """Returns small's state dict under a prefix, and further arrays beside it."""
  state = {
    f'{prefix}{key}': tensor * times
    for key, tensor in small().state_dict().items()
  }
  return state | {name: torch.ones(3, 2) for name in beside}


def imported_as(state, tmp_path, capsys, **options):
  """Imports a state dict: what is printed, and what is then exported."""
  file, output = tmp_path / 'net.pth', tmp_path / 'bundle'
  torch.save(state, file)
  run('import', '--overwrite', checkpoint=file, output=output, **options)
  return capsys.readouterr().out, published_names.state_dict(
    bundles.load(output)
  )


def check_small(state, times=1):
  for key, tensor in small().state_dict().items():
    if not key.endswith('num_batches_tracked'):
      np.testing.assert_array_equal(state[key], times * tensor.numpy())


@pytest.mark.parametrize('backbone', ['', 'resnet8'])
@pytest.mark.parametrize(
  'prefix',
  ['model.', 'net.', 'model._orig_mod.', 'features.module.', 'a.b-c.d.e.'],
)
def test_names_under_a_prefix(prefix, backbone, tmp_path, capsys):
  options = {'backbone': backbone} if backbone else {}
  printed, state = imported_as(prefixed(prefix), tmp_path, capsys, **options)
  assert f'- took {prefix} off the names\n' in printed
  assert 'left out' not in printed
  check_small(state)


@pytest.mark.parametrize('backbone', ['', 'resnet8'])
def test_arrays_beside_those_under_a_prefix(backbone, tmp_path, capsys):
  beside = ('head.0.weight', 'head.2.weight', 'temperature')
  options = {'backbone': backbone} if backbone else {}
  printed, state = imported_as(
    prefixed('encoder.', beside=beside), tmp_path, capsys, **options
  )
  assert '- took encoder. off the names\n' in printed
  assert (
    '- left out, beside encoder.*: head (2 arrays), temperature (1 arrays)\n'
  ) in printed
  check_small(state)


@pytest.mark.parametrize(
  'beside', ['extra.weight', 'layer1.0.se.fc.weight', 'fc.extra']
)
def test_without_a_prefix_nothing_is_left_out(beside, tmp_path, monkeypatch):
  """A network with more arrays is another network: it computes otherwise."""
  known = {name: models.BACKBONES[name] for name in ('resnet14', 'resnet8')}
  monkeypatch.setattr(models, 'BACKBONES', known)
  file = tmp_path / 'net.pth'
  torch.save(prefixed('', beside=(beside,)), file)
  said = failure('import', checkpoint=file, output=tmp_path / 'bundle')
  assert 'nearest is resnet8, 47 of its 47 arrays fit, but 1 arrays are' in said
  assert beside in said
  torch.save(prefixed('model.', beside=(f'model.{beside}',)), file)
  said = failure('import', checkpoint=file, output=tmp_path / 'bundle')
  assert '47 of its 47 arrays fit under model.*, but 1 arrays' in said


def test_several_networks_under_prefixes(tmp_path, capsys):
  """As in momentum contrast: which one is meant must be said."""
  both = prefixed('encoder_q.') | prefixed('encoder_k.', times=2)
  file = tmp_path / 'net.pth'
  torch.save(both, file)
  said = failure('import', checkpoint=file, output=tmp_path / 'bundle')
  assert (
    'it holds several of resnet8, encoder_q.*, encoder_k.*: --part encoder_q '
    'takes the first'
  ) in said
  for part, times in (('encoder_q', 1), ('encoder_k', 2)):
    printed, state = imported_as(both, tmp_path, capsys, part=part)
    assert f'took {part}.*' in printed
    check_small(state, times)


def test_a_moving_average_is_taken_where_it_is_named(tmp_path, capsys):
  content = {
    'state_dict': prefixed('module.'),
    'state_dict_ema': prefixed('module.', times=2),
    'epoch': np.float64(3),
    'best_acc': np.int64(70),
  }
  printed, state = imported_as(content, tmp_path, capsys)
  assert "- took 'state_dict'\n" in printed
  assert '--part state_dict_ema takes it' in printed
  assert '- left out: epoch, best_acc\n' in printed
  check_small(state)
  printed, state = imported_as(content, tmp_path, capsys, part='state_dict_ema')
  assert "- took 'state_dict_ema', a moving average\n" in printed
  check_small(state, 2)


def test_nearest_without_a_classifier(tmp_path, monkeypatch):
  """The arrays that fit tell it, though there is no head to start from."""
  names = ('vgg8', 'deit_small_patch16_224', 'resnet8')
  known = {name: models.BACKBONES[name] for name in names}
  monkeypatch.setattr(models, 'BACKBONES', known)
  for prefix in ('', 'encoder.', 'online.net.'):
    state = {
      key: tensor
      for key, tensor in prefixed(prefix).items()
      if not key.startswith(f'{prefix}fc.')
    }
    torch.save(state, tmp_path / 'net.pth')
    said = failure(
      'import',
      checkpoint=tmp_path / 'net.pth',
      output=tmp_path / 'bundle',
      # A DeiT cannot have images of that size.
      **{'mean': '0.5', 'std': '0.5', 'image_size': '40'},
    )
    under = f' under {prefix}*' if prefix else ''
    assert (
      f'nearest is resnet8, 45 of its 47 arrays fit{under}, but 2 of its '
      'arrays are missing (fc.weight, fc.bias)'
    ) in said


def test_half_precision_and_timm(tmp_path, capsys):
  """A safetensors file in half precision, of another size and resizing."""
  net = published('resnet18').half()
  file = tmp_path / 'model.safetensors'
  safetensors_torch.save_file(net.state_dict(), file)
  run(
    *('import', '--backbone', 'resnet18'),
    checkpoint=file,
    output=tmp_path / 'bundle',
    **{'mean': '0.5,0.5,0.5', 'std': '0.2,0.2,0.2'},
    **{'image_size': 160, 'interpolation': 'bicubic'},
  )
  assert 'half precision (float16)' in capsys.readouterr().out
  bundle = bundles.load(tmp_path / 'bundle')
  assert bundle.network.preprocessing.size == (160, 160)
  assert bundle.network.preprocessing.interpolation == 'bicubic'
  assert bundle.variables['params']['head']['bias'].dtype == np.float32


@pytest.mark.slow
def test_kd_srrl_has_mobilenets_layers_in_two_sequences():
  net, _ = imported('mobilenet_v1')
  state = {}
  for key, tensor in net.state_dict().items():
    words = key.split('.')
    if words[0] == 'model':
      index = int(words[1])
      half = 1 if index < 12 else 2
      words[:2] = f'model{half}', str(index - 12 * (half == 2))
    state['.'.join(words)] = tensor.numpy()
  bundle, _ = importer.from_state(
    state_dicts.StateDict(state, {}, {}, (), ''),
    request(64),
    origin={},
  )
  _, expected = imported('mobilenet_v1')
  assert_same(bundle, expected)


@pytest.mark.parametrize('depthwise', [False, True])
def test_simkd_student(depthwise, tmp_path, capsys):
  """Its net, its projector, and the head of the teacher that is given."""
  _, judge = imported('resnet8x4')
  judge.save(tmp_path / 'teacher')
  connector = 'bottleneck_depthwise' if depthwise else 'bottleneck'
  bundle = random_bundle(
    *('ijckd', 'resnet8x4', 'mobilenet_v2_cifar_x0_5'), connector=connector
  )
  state = published_names.state_dict(bundle)
  net = published('mobilenet_v2_cifar_x0_5').state_dict()
  projector = {}
  for key, array in state.items():
    part, _, rest = key.partition('.')
    if part == 'backbone':
      net[rest] = torch.from_numpy(array)
    elif part == 'connector':
      projector[f'transfer.{rest}'] = torch.from_numpy(array)
  file = tmp_path / 'mobilenet_best.pth'
  torch.save({'epoch': 1, 'model': net, 'proj': projector}, file)
  options = {'checkpoint': file, 'output': tmp_path / 'student'}
  assert "teacher's head, which is not in its file" in failure(
    'import', **options
  )
  run('import', teacher=tmp_path / 'teacher', **options)
  printed = capsys.readouterr().out
  assert 'the head is that of resnet8x4; not used' in printed
  again = bundles.load(tmp_path / 'student')
  assert again.network.connector == bundle.network.connector
  assert again.network.connect_size == bundle.network.connect_size
  jax.tree.map(np.testing.assert_array_equal, again.variables, bundle.variables)
  torch.save({'model': net, 'proj': {'layer.weight': torch.ones(3)}}, file)
  assert "not SimKD's" in failure(
    'import', '--overwrite', teacher=tmp_path / 'teacher', **options
  )


@pytest.mark.parametrize(
  'name, sha256, said',
  [
    (
      'resnet50-11ad3fa6.pth',
      '00',
      'resnet50, weights IMAGENET1K_V2 (by its n',
    ),
    ('renamed.pth', '11ad3fa6ff', 'weights IMAGENET1K_V2 (by its SHA-256)'),
    ('resnet50-0676ba61.pth', '00', 'weights IMAGENET1K_V1 (by its name)'),
    ('resnet50-19c8e357.pth', '00', 'weights IMAGENET1K_V1 (by its name)'),
  ],
)
def test_files_of_torchvision(name, sha256, said):
  version, notes = published_weights.recognise(name, sha256)
  assert f'IMAGENET1K_{version} ' in notes[0]
  assert said in notes[0]
  warned = [note for note in notes if note.startswith('warning: ')]
  assert bool(warned) == ('V2' in said)
  assert published_weights.recognise('mine.pth', '00') == ('', [])


def test_hashes_are_torchvisions():
  torchvision = torch_networks.torchvision
  for weights, hashes in published_weights.TORCHVISION.items():
    name, version = weights.split()
    known = torchvision.models.get_model_weights(name)[f'IMAGENET1K_{version}']
    assert re.search(r'-([0-9a-f]{8})', known.url)[1] in hashes
    key = 'imagenet' if version == 'V1' else 'imagenet_v2'
    here = published_weights.PREPROCESSING[key]
    assert_same_published(published_weights.of_torchvision(known), here)


@pytest.mark.parametrize('name', published_weights.TIMM)
def test_timms_networks_are_prepared_as_timm_says(name):
  config = torch_networks.timm.get_pretrained_cfg(name).to_dict()
  found = published_weights.of_timm(name, {'pretrained_cfg': config})
  assert_same_published(found, published_weights.TIMM[name])


def assert_same_published(found, wanted):
  """Asserts that pictures are prepared alike, and of as many classes."""
  assert (found.preprocessing, found.crop) == (
    wanted.preprocessing,
    wanted.crop,
  )
  assert len(found.class_names()) == len(wanted.class_names()) == 1000


@pytest.mark.parametrize(
  'options, said',
  [
    (
      {'backbone': 'resnet20'},
      'is no resnet20: 60 of its arrays are missing (layer1.1.bn1.',
    ),
    ({'backbone': 'resnet20'}, 'it is a resnet8: say --backbone resnet8'),
    ({'backbone': 'resnet8x5'}, "unknown backbone 'resnet8x5'; did you mean"),
    ({'backbone': 'vgg8'}, 'is no vgg8: 32 of its arrays are missing'),
    ({'num_classes': 10}, 'tells 100 classes apart, not 10'),
    ({'preprocessing': 'imagnet'}, "did you mean 'imagenet'"),
    ({'mean': '0.5'}, '--mean, --std and --image_size go together'),
    (
      {'mean': '1,1,1', 'std': 'nan,1,1', 'image_size': '32'},
      '--std nan,1,1: give a number',
    ),
    (
      {'mean': '1,1,1', 'std': '1,1,1', 'image_size': '5000'},
      'sides from 1 to 4096',
    ),
    (
      {'mean': '1,1,1', 'std': '1,1,1', 'image_size': '0'},
      '--image_size 0: give a side',
    ),
    (
      {'mean': '0.5', 'std': '0.5', 'image_size': '32'},
      'images of 3 channels, but its preprocessing has a mean of 1',
    ),
    (
      {'mean': '1,1,x', 'std': '1,1,1', 'image_size': '32'},
      'a number for each channel',
    ),
    (
      {'mean': '1,1,1', 'std': '1,0,1', 'image_size': '32'},
      '--mean and --std: std=(1.0, 0.0, 1.0): it must be positive',
    ),
    (
      {'mean': '1,1,1', 'std': '1,1,1', 'image_size': '-1'},
      '--image_size -1: give a side',
    ),
    (
      {
        **{'mean': '1,1,1', 'std': '1,1,1', 'image_size': '32'},
        'interpolation': 'cubic',
      },
      "unknown interpolation 'cubic'",
    ),
    (
      {
        **{'mean': '1,1,1', 'std': '1,1,1', 'image_size': '32'},
        'resize': '31',
      },
      '--resize 31: give at least the 32 pixels of --image_size',
    ),
    ({'resize': '36'}, '--mean, --std and --image_size go together'),
    (
      {
        **{'mean': '1,1,1', 'std': '1,1,1', 'image_size': '32'},
        'preprocessing': 'cifar10',
      },
      'not both',
    ),
    ({'class_names': 'nowhere.txt'}, '--class_names nowhere.txt cannot be'),
    ({'teacher': 'nowhere'}, 'there is no bundle in nowhere'),
    ({'part': 'teacher'}, "has no part 'teacher'"),
    ({'checkpoint': 'nowhere.pth'}, 'there is no file nowhere.pth'),
    ({'checkpoint': 'hf:nobody'}, 'give hf:OWNER/NAME@COMMIT'),
  ],
  ids=str,
)
def test_mistakes_of_an_import(options, said, tmp_path):
  file = tmp_path / 'net.pth'
  torch.save(small().state_dict(), file)
  output = tmp_path / 'bundle'
  options = {'checkpoint': file, 'output': output, **options}
  assert said in failure('import', **options)
  assert not output.exists()
  assert [path.name for path in tmp_path.iterdir()] == ['net.pth']


def test_class_names_of_a_file(tmp_path):
  torch.save(small().state_dict(), tmp_path / 'net.pth')
  names = tmp_path / 'names.txt'
  options = {
    'checkpoint': tmp_path / 'net.pth',
    'output': tmp_path / 'bundle',
    'class_names': names,
  }
  names.write_text('\n')
  assert 'is empty' in failure('import', **options)
  names.write_text('one\ntwo\n')
  assert '2 class names for a head of 100' in failure('import', **options)
  names.write_text('\n'.join(f'class {i}' for i in range(100)))
  run('import', **options)
  assert bundles.load(tmp_path / 'bundle').class_names[7] == 'class 7'
  # As Windows writes them; the first name has no mark in it.
  for encoding in ('utf-8-sig', 'utf-16'):
    text = '\r\n'.join(f'Größe {i}' for i in range(100))
    names.write_bytes(text.encode(encoding))
    run('import', '--overwrite', **options)
    found = bundles.load(tmp_path / 'bundle').class_names
    assert (found[0], found[99]) == ('Größe 0', 'Größe 99')


def test_how_images_were_prepared_must_be_known(tmp_path):
  net = published('resnet8', channels=1)
  torch.save(net.state_dict(), tmp_path / 'net.pth')
  options = {'checkpoint': tmp_path / 'net.pth', 'output': tmp_path / 'bundle'}
  said = failure('import', **options)
  assert 'images of this resnet8 (1 channels, 7 classes)' in said
  run('import', mean='0.28', std='0.35', image_size='28', **options)
  assert bundles.load(tmp_path / 'bundle').image_shape == (28, 28, 1)


@pytest.mark.slow
def test_a_network_that_is_none_of_ours():
  state = state_dicts.StateDict({'fc.weight': np.ones((3, 4))}, {}, {}, (), '')
  with pytest.raises(
    config_utils.UserError,
    match='like no backbone that .*its arrays are fc.weight',
  ):
    importer.from_state(state, importer.Request(), origin={})
  state = state_dicts.StateDict({'a': np.ones(3)}, {}, {}, (), '')
  with pytest.raises(config_utils.UserError, match='its arrays are a$'):
    importer.from_state(state, importer.Request(), origin={})


def test_what_is_there_stays_there(tmp_path):
  torch.save(small().state_dict(), tmp_path / 'net.pth')
  other = tmp_path / 'other'
  other.mkdir()
  (other / 'precious').write_text('x')
  source = {'checkpoint': tmp_path / 'net.pth'}
  for flags in [(), ('--overwrite',)]:
    assert str(other) in failure('import', *flags, output=other, **source)
  assert (other / 'precious').read_text() == 'x'
  output = tmp_path / 'bundle'
  run('import', output=output, **source)
  assert 'already there: give --overwrite' in failure(
    'import', output=output, **source
  )
  run('import', '--overwrite', output=output, **source)
  file = tmp_path / 'file.safetensors'
  file.write_text('x')
  assert 'already there: give --overwrite' in failure(
    'export', bundle=output, output=file
  )
  assert file.read_text() == 'x'
  run('export', '--overwrite', bundle=output, output=file)
  assert file.stat().st_size > 300_000
  assert 'a .safetensors file, or to a .pth' in failure(
    'export', bundle=output, output=tmp_path / 'file.bin'
  )
  assert 'there is no bundle in' in failure(
    'export', bundle=tmp_path / 'nowhere', output=tmp_path / 'a.pth'
  )


def test_overwrite_removes_a_bundle_and_nothing_else(tmp_path):
  """Not what a user put beside it, and not the bundle that is exported."""
  torch.save(small().state_dict(), tmp_path / 'net.pth')
  folder = tmp_path / 'bundle'
  run('import', checkpoint=tmp_path / 'net.pth', output=folder)
  before = {path.name: path.read_bytes() for path in folder.iterdir()}
  assert 'is inside of the bundle' in failure(
    'export',
    '--overwrite',
    bundle=folder,
    output=folder / 'variables.safetensors',
  )
  assert before == {path.name: path.read_bytes() for path in folder.iterdir()}
  mine = folder / 'mine.pth'
  (tmp_path / 'net.pth').rename(mine)
  assert 'no bundle alone (it has mine.pth)' in failure(
    'import', '--overwrite', checkpoint=mine, output=folder
  )
  assert mine.exists()


def test_exports_go_where_they_are_sent(tmp_path):
  _, bundle = imported('resnet8')
  bundle.save(tmp_path / 'bundle')
  file = tmp_path / 'new' / 'folder' / 'weights.safetensors'
  run('export', bundle=tmp_path / 'bundle', output=file)
  assert file.exists()
  student = random_bundle('ijckd', 'resnet8x4', 'resnet8')
  student.save(tmp_path / 'student')
  assert 'in place of torch' in failure(
    'export', bundle=tmp_path / 'student', output=tmp_path / 'torch.pth'
  )


def test_a_bundle_of_code_outside_is_trusted_by_a_flag(tmp_path):
  _, bundle = imported('resnet8')
  name = 'experiments.extension_example.backbone:PlainNet'
  backbone = models.build(name)
  image = jnp.zeros((1, *bundle.image_shape))
  made = jax.eval_shape(
    lambda: backbone.init_with_output(jax.random.key(0), image, train=False)
  )
  features, variables = jax.tree.map(lambda x: np.ones(x.shape, 'f'), made)
  width = features.pooled.shape[1]
  head = {'kernel': np.ones((width, 7), 'f'), 'bias': np.ones(7, 'f')}
  bundle = dataclasses.replace(
    bundle,
    network=dataclasses.replace(bundle.network, backbone=backbone),
    variables={
      'params': {'backbone': variables['params'], 'head': head},
      'batch_stats': {'backbone': variables['batch_stats']},
      'pool': {},
    },
    backbone_name=name,
    pool_name=name,
  )
  bundle.save(tmp_path / 'bundle')
  file, output = tmp_path / 'weights.safetensors', tmp_path / 'again'
  run('export', '--trust_code', bundle=tmp_path / 'bundle', output=file)
  assert '--trust_code' in failure('import', checkpoint=file, output=output)
  run('import', '--trust_code', checkpoint=file, output=output)
  assert_same(bundles.load(output, trust_code=True), bundle)
  given = {
    'checkpoint': tmp_path / 'absent.pth',
    'output': tmp_path / 'student',
    'teacher': tmp_path / 'bundle',
  }
  assert '--trust_code' in failure('import', **given)
  assert 'absent.pth' in failure('import', '--trust_code', **given)


@pytest.mark.slow
@pytest.mark.parametrize(
  'change, said',
  [
    (
      {'fc.weight': np.ones(()), 'conv1.weight': np.ones((16, 0, 3, 3))},
      'have other shapes (conv1.weight [16, 0, 3, 3] for',
    ),
    (
      {'conv1.weight': np.ones((16, 0, 3, 3))},
      'conv1.weight [16, 0, 3, 3] for',
    ),
    ({'conv1.weight': np.ones((16, 3, 3, 3), np.int32)}, 'int32[3, 3, 3, 16]'),
    ({'fc.bias': np.ones(7, bool)}, 'fc.bias is bool'),
    ({'bn1.running_var': -np.ones(16)}, 'variances bn1.running_var are negat'),
  ],
)
def test_arrays_that_cannot_be(change, said, tmp_path):
  net, _ = imported('resnet8')
  path = tmp_path / 'net.safetensors'
  state_dicts.write(path, {**state_of(net).arrays, **change})
  with pytest.raises(config_utils.UserError) as error:
    importer.read(path, request(32))
  assert str(path) in str(error.value)
  assert said.replace('fc.bias is bool', 'bool[7]') in str(error.value)


def test_positions_of_a_deit_are_of_one_size(tmp_path):
  net = published('deit_small_patch16_224', size=224)
  path = tmp_path / 'net.safetensors'
  safetensors_torch.save_file(net.state_dict(), path)
  with pytest.raises(
    config_utils.UserError, match=r'pos_embed \[1, 197, 384\] for \[1, 5, 384'
  ):
    importer.read(path, importer.Request(preprocessing='cifar100'))
  bundle, _ = importer.read(path, importer.Request())
  assert bundle.network.preprocessing.interpolation == 'bicubic'


def hub_of(tmp_path, monkeypatch, bundle, config=None, metadata=None):
  """Makes hub.download give a bundle's weights, whatever is asked for."""
  path = tmp_path / 'model.safetensors'
  state_dicts.write(path, published_names.state_dict(bundle), metadata)
  found = hub.Download('us/net', 40 * '0', {path.name: path}, config or {}, '')
  monkeypatch.setattr(hub, 'download', lambda reference: found)
  return f'hf:us/net@{40 * "0"}'


@pytest.mark.parametrize(
  'architecture, fields, said',
  [
    ('resnetblur50', {}, 'is a resnetblur50, which is no backbone here'),
    (['x'], {}, None),
    ('resnet8', {'backbone': 'resnet20'}, 'is no resnet20, but a resnet8'),
    ('resnet8', {'num_classes': 3}, 'tells 7 classes apart, not 3'),
    ('resnet20', {}, 'is no resnet20: '),
  ],
)
def test_what_the_hub_says_is_believed(
  architecture, fields, said, tmp_path, monkeypatch
):
  """Names and shapes do not tell resnetblur50 from resnet50."""
  _, bundle = imported('resnet8')
  config = {'architecture': architecture}
  path = hub_of(tmp_path, monkeypatch, bundle, config)
  if said is None:
    assert importer.read(path, request(32))[0].backbone_name == 'resnet8'
    return
  with pytest.raises(config_utils.UserError, match=said):
    importer.read(path, request(32, **{'num_classes': 0, **fields}))


def test_an_export_on_the_hub_keeps_its_origin(tmp_path, monkeypatch):
  _, bundle = imported('resnet8')
  metadata = published_names.metadata(bundle)
  path = hub_of(tmp_path, monkeypatch, bundle, metadata=metadata)
  asked = importer.Request(dtype=jnp.bfloat16)
  again, _ = importer.read(path, asked)
  assert again.info['origin']['revision'] == 40 * '0'
  assert again.network.backbone.dtype == jnp.bfloat16
  assert again.teacher().origin == again.info['origin']
  with pytest.raises(config_utils.UserError, match='says itself how images'):
    importer.read(path, request(32))
  with pytest.raises(config_utils.UserError, match='has no parts'):
    importer.read(path, asked, part='teacher')


@pytest.mark.parametrize('size', [[3, -5, 1e400], [3, -32, 32], [3, 0, 0]])
def test_sizes_that_a_hub_cannot_mean(size, tmp_path, monkeypatch):
  _, bundle = imported('resnet8')
  config = {
    'pretrained_cfg': {
      'mean': [0.5, 0.5, 0.5],
      'std': [0.5, 0.5, 0.5],
      'input_size': size,
      'interpolation': 'bilinear',
    }
  }
  path = hub_of(tmp_path, monkeypatch, bundle, config)
  with pytest.raises(config_utils.UserError) as error:
    importer.read(path, importer.Request())
  assert '\n' not in str(error.value)


def test_an_export_that_was_tampered_with(tmp_path):
  _, bundle = imported('resnet8')
  state, text = published_names.state_dict(bundle), json.dumps(bundle.spec())

  def said(state=state, text=text, **fields):
    file = tmp_path / 'weights.safetensors'
    state_dicts.write(file, state, {'ijckd_jax': text})
    with pytest.raises(config_utils.UserError) as error:
      importer.read(file, importer.Request(**fields))
    return str(error.value)

  without = {k: v for k, v in state.items() if k != 'fc.bias'}
  assert '1 of its arrays are missing (fc.bias)' in said(without)
  assert 'description of the bundle is damaged' in said(text='{')
  assert 'description of the bundle is damaged' in said(text='[' * 100_000)
  assert 'is not a bundle' in said(text='[]')
  assert 'names code outside the package' in said(
    text=text.replace('"resnet8"', '"os:getcwd"')
  )
  assert 'it is no resnet20, but a resnet8' in said(backbone='resnet20')
  assert 'says itself how images are prepared' in said(preprocessing='cifar10')
  assert 'tells 7 classes apart, not 3' in said(num_classes=3)


@pytest.mark.parametrize(
  'old, new',
  [
    ((224, 224), (96, 96)),
    ((224, 224), (320, 320)),
    # As many positions in another shape, and fewer in one that is no square.
    ((224, 224), (112, 448)),
    ((224, 224), (32, 128)),
    ((32, 128), (64, 64)),
  ],
)
def test_positions_are_resized_as_timm_does(old, new):
  """When weights start a student on images of another size."""
  grids = [[side // 16 for side in size] for size in (old, new)]
  rng = np.random.default_rng(0)
  given = rng.normal(size=(1, 1 + np.prod(grids[0]), 8)).astype(np.float32)
  wanted = torch_networks.timm.layers.resample_abs_pos_embed(
    torch.from_numpy(given), new_size=grids[1], old_size=grids[0]
  )
  made = models.DeiT(width=8).fit_to_size({'pos_embed': given}, old, new)
  assert relative_error(made['pos_embed'], wanted) < 1e-5
