"""Converted PyTorch classifiers against PyTorch, and as teachers."""

import copy
import dataclasses
import datetime
import functools
import hashlib
import json
import os
import subprocess
import sys

import jax
from jax import export
import jax.numpy as jnp
import numpy as np
import pytest

from ijckd_jax.bundles import bundles
from ijckd_jax.data import augment
from ijckd_jax.data import images
from ijckd_jax.data.datasets import imagenet
from ijckd_jax.models import programs
from ijckd_jax.runtime import config_utils
from ijckd_jax.training import train
from tests import torch_networks

pytest.importorskip('torchax', reason="needs pip install -e '.[convert]'")
torch, timm = torch_networks.torch, torch_networks.timm
nn, functional = torch.nn, torch.nn.functional
from experiments.converted import families  # noqa: E402
from ijckd_jax.commands import convert as convert_command  # noqa: E402
from ijckd_jax.pytorch import converter  # noqa: E402
from ijckd_jax.pytorch import named_models  # noqa: E402
from ijckd_jax.pytorch import state_dicts  # noqa: E402

GREY = augment.Preprocessing((0.3,), (0.3,), (32, 32))
# Small ones, one for each way in which a network can be cut.
VIT = {'img_size': 32, 'patch_size': 8, 'embed_dim': 24, 'num_heads': 3}
NETWORKS = {
  'resnet': ('test_resnet', {}, 'average'),
  'convnext': ('test_convnext', {}, 'program'),
  'efficientnet': ('test_efficientnet', {}, 'average'),
  'vit': ('vit_tiny_patch16_224', {**VIT, 'depth': 2}, None),
  'vit_average': (
    'vit_tiny_patch16_224',
    {**VIT, 'depth': 2, 'global_pool': 'avg'},
    'program',
  ),
  # Attention over its own map alone: the map's size is fixed.
  'siglip': (
    'vit_base_patch16_siglip_224',
    {**VIT, 'depth': 2, 'global_pool': 'map'},
    'program',
  ),
  'deit': ('deit_tiny_distilled_patch16_224', {**VIT, 'depth': 2}, None),
}


def make(kind, **kwargs):
  """Returns a network of NETWORKS, with numbers everywhere."""
  name, fields, _ = NETWORKS[kind]
  torch.manual_seed(0)
  fields = {'in_chans': 1, 'num_classes': 10, **fields, **kwargs}
  model = timm.create_model(name, **fields).eval()
  families.randomise(model)
  return model


def convert(model, **kwargs):
  return converter.convert(
    model, **{'name': 'net', 'preprocessing': GREY, 'origin': {}, **kwargs}
  )


@pytest.fixture(scope='module')
def saved(tmp_path_factory):
  """Returns a function that gives a converted network's folder."""
  folder = tmp_path_factory.mktemp('converted')

  def find(kind):
    if not (folder / kind).exists():
      convert(make(kind), name=f'timm:{NETWORKS[kind][0]}').bundle.save(
        folder / kind
      )
    return folder / kind

  return find


def images_of(bundle, number=3):
  shape = (number, *bundle.image_shape)
  return np.random.default_rng(0).integers(0, 256, shape).astype(np.uint8)


def of_torch(model, bundle, images):
  """Returns the logits that PyTorch gives."""
  x = np.array(bundle.network.preprocessing(jnp.asarray(images)))
  with torch.no_grad():
    return model(torch.from_numpy(x).permute(0, 3, 1, 2)).numpy()


def outputs_of(teacher, images):
  """Returns a teacher's Outputs, compiled."""
  return jax.jit(lambda arrays, x: teacher(arrays, x))(teacher.arrays, images)


def assert_near(given, wanted, tolerance=1e-5):
  given, wanted = np.asarray(given), np.asarray(wanted)
  assert given.shape == wanted.shape
  assert np.abs(given - wanted).max() <= tolerance * np.abs(wanted).max()


@pytest.mark.parametrize(
  'kind',
  [
    kind
    if kind in ('resnet', 'convnext', 'vit')
    else pytest.param(kind, marks=pytest.mark.slow)
    for kind in NETWORKS
  ],
)
def test_what_is_loaded_computes_what_pytorch_computes(saved, kind):
  bundle, model = bundles.load(saved(kind), trust_code=True), make(kind)
  teacher, images = bundle.teacher(), images_of(bundle)
  for number in (1, 3):  # Any number of images.
    given = outputs_of(teacher, images[:number])
    assert_near(given.logits, of_torch(model, bundle, images[:number]))
  pool = NETWORKS[kind][2]
  assert bundle.network.pools_map == (pool is not None)
  assert bundle.pool_name == (pool or 'average')
  pooled = given.pooled
  if pool:
    again = bundle.network.pool(teacher.pool_variables, given.final)
    np.testing.assert_allclose(again, pooled, rtol=1e-5, atol=1e-6)
  logits = pooled @ teacher.head['kernel'] + teacher.head['bias']
  np.testing.assert_allclose(given.logits, logits, rtol=1e-4, atol=1e-5)
  # Its own features lie where a connector to it can reach.
  assert bundle.network.signed == bool((given.final < 0).any())
  assert bundle.network.pooled_signed == bool((pooled < 0).any())


def test_a_network_with_a_pool_has_both_dtypes():
  """Where its map is asked for, the convolution in its pool runs in vain."""
  model = timm.create_model('mobilenetv3_small_050', in_chans=1)
  backbone = convert(model).bundle.network.backbone
  for programs_by_dtype in (backbone.features, backbone.training):
    assert set(programs_by_dtype) == {'float32', 'bfloat16'}


def test_bfloat16_is_another_program(saved):
  images = None
  results = {}
  for dtype in (jnp.float32, jnp.bfloat16):
    bundle = bundles.load(saved('resnet'), dtype=dtype, trust_code=True)
    images = images_of(bundle) if images is None else images
    teacher = bundle.teacher()
    results[dtype] = outputs_of(teacher, images)
  assert results[jnp.bfloat16].final.dtype == jnp.bfloat16
  assert results[jnp.bfloat16].pooled.dtype == jnp.float32
  assert_near(results[jnp.bfloat16].logits, results[jnp.float32].logits, 0.1)


def test_two_heads_are_one():
  """A distilled DeiT averages two heads, each on a token of its own."""
  model = make('deit')
  head = convert(model).bundle.variables['params']['head']
  kernels = [h.weight.detach().numpy().T / 2 for h in model.get_classifier()]
  np.testing.assert_array_equal(head['kernel'], np.concatenate(kernels))


@pytest.mark.slow
def test_what_a_run_leaves_in_a_network_does_not_enter():
  """LeViT keeps biases of attention from one run for the next."""
  model = timm.create_model('levit_128s', num_classes=10)
  families.randomise(model)
  model.eval()
  with torch.no_grad():
    model(torch.zeros(1, 3, 224, 224))
  preprocessing = augment.Preprocessing((0.5,) * 3, (0.5,) * 3, (224, 224))
  result = convert(model, preprocessing=preprocessing)
  assert result.errors['logits'] < 1e-5
  names = result.bundle.variables['params']['backbone']
  assert any('attention_biases' in name for name in names)


@torch.library.custom_op('ijckd_jax_tests::triple', mutates_args=())
def triple(x: torch.Tensor) -> torch.Tensor:
  """An operator that torchax has never heard of."""
  return 3 * x


class Watched(nn.Module):
  """A network that says nothing of its parts."""

  def __init__(self, kind):
    super().__init__()
    self.kind = kind
    self.conv = nn.Conv2d(1, 6, 3, 2)
    self.norm = nn.LayerNorm(6)
    self.hidden = nn.Linear(6 * 4 if kind == 'hidden' else 6, 8)
    self.head = nn.Linear(8 if 'hidden' in kind else 6, 4)
    self.pool, self.one = nn.AdaptiveAvgPool2d(2), nn.AdaptiveAvgPool2d(1)
    self.act = nn.ReLU(inplace=True)

  def forward(self, x):
    x = self.conv(x)
    if self.kind == 'relu':  # Not a module's.
      return self.head(functional.relu(x).mean((2, 3)))
    if self.kind == 'module':  # Whose result is a map of one pixel.
      return self.head(self.one(x).flatten(1))
    if self.kind == 'hidden':
      x = self.act(self.hidden(self.pool(self.act(x)).flatten(1)))
      return self.head(x)
    if self.kind == 'tokens':
      x = self.norm(x.flatten(2).transpose(1, 2))
      return self.head(x[:, 0])
    if self.kind == 'softmax':
      return self.head(x.mean((2, 3))).softmax(-1)
    if self.kind == 'flow':
      return self.head(x.mean((2, 3)) if x.sum() > 0 else x.amax((2, 3)))
    if self.kind == 'operator':
      return self.head(triple(x).mean((2, 3)))
    if self.kind == 'wrong':  # Which torchax computes over more than it is.
      return self.head((x * torch.histc(x).sum()).mean((2, 3)))
    if self.kind == 'float32':
      x = torch.linalg.matrix_exp(x[:, :, :6, :6].contiguous())
      return self.head(x.mean((2, 3)))
    return self.head(x.mean((2, 3)))


@pytest.mark.parametrize(
  'kind, pool, signed',
  [
    ('average', 'average', True),
    ('module', 'average', True),
    ('relu', 'average', False),
    ('hidden', 'program', False),
    # z itself is then the map, of 1x1.
    ('tokens', 'average', True),
  ],
)
def test_a_network_that_says_nothing_is_watched(kind, pool, signed):
  torch.manual_seed(1)
  model = Watched(kind)
  bundle = convert(model).bundle
  images = images_of(bundle)
  teacher = bundle.teacher()
  given = teacher(teacher.arrays, images)
  assert_near(given.logits, of_torch(model, bundle, images))
  assert bundle.network.signed == signed
  assert bundle.network.pools_map
  assert bundle.pool_name == pool
  side = {'tokens': 1, 'hidden': 2}.get(kind, 15)
  assert given.final.shape[1:3] == (side, side)
  if kind == 'tokens':
    np.testing.assert_array_equal(given.final[:, 0, 0], given.pooled)
  # The head is there once, also where the whole network ran behind a hook.
  stored = bundle.variables['params']['backbone']
  assert {'conv.weight', 'conv.bias'} <= set(stored)
  assert not [key for key in stored if key.startswith('head.')]


@pytest.mark.parametrize(
  'kind, said',
  [
    ('softmax', 'its last layer is not linear'),
    ('flow', 'depends on the numbers in a tensor'),
    ('operator', 'ijckd_jax_tests.triple'),
    ('wrong', 'does not compute what PyTorch does'),
  ],
)
def test_what_cannot_be_converted_is_said(kind, said):
  torch.manual_seed(1)
  with pytest.raises(config_utils.UserError) as refused:
    convert(Watched(kind))
  assert said in str(refused.value)
  if kind in ('flow', 'operator'):
    assert 'the model (Watched)' in str(refused.value)


def test_what_cannot_be_in_bfloat16_is_left_out():
  torch.manual_seed(1)
  result = convert(Watched('float32'))
  assert set(result.bundle.network.backbone.features) == {'float32'}
  assert 'no program in bfloat16' in result.notes[-1]


def test_a_network_of_other_images_is_refused():
  preprocessing = augment.Preprocessing((0.5,) * 3, (0.5,) * 3, (32, 32))
  with pytest.raises(config_utils.UserError, match='32x32 with 3 channels'):
    convert(make('resnet'), preprocessing=preprocessing)


@pytest.fixture
def command(run_command, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  return functools.partial(run_command, convert_command.main)


IMAGES = ('--mean', '0.3', '--std', '0.3', '--image_size', '32')


def test_command(command, tmp_path):
  model = make('resnet')
  torch.save(model.state_dict(), tmp_path / 'net.pth')
  name = NETWORKS['resnet'][0]
  argv = (
    *('--model', f'timm:{name}', '--model_args', 'num_classes=10,in_chans=1'),
    *('--checkpoint', 'net.pth', '--output', 'out', *IMAGES),
    *('--licence', 'Apache-2.0'),
  )
  code, out, err = command(*argv)
  assert (code, err) == (0, '')
  assert 'a head of 10 classes' in out
  assert 'programs for cpu, cuda, tpu' in out
  assert f'--config.teacher.backbone=timm:{name}' in out
  bundle = bundles.load(tmp_path / 'out', trust_code=True)
  origin = bundle.info['origin']
  data = (tmp_path / 'net.pth').read_bytes()
  assert origin['sha256'] == hashlib.sha256(data).hexdigest()
  assert (origin['file'], origin['licence']) == ('net.pth', 'Apache-2.0')
  images = images_of(bundle)
  logits = bundle.network(
    bundle.variables, bundle.network.preprocessing(images)
  ).logits
  assert_near(logits, of_torch(model, bundle, images))
  code, out, err = command(*argv)
  assert (code, out) == (2, '') and 'give --overwrite' in err
  assert command(*argv, '--overwrite')[0] == 0


def test_command_keeps_what_timm_says(command, tmp_path):
  """Its crop, its interpolation, and words for ImageNet's classes."""
  model = timm.create_model('test_resnet')
  torch.save(model.state_dict(), tmp_path / 'net.pth')
  argv = ('--model', 'timm:test_resnet', '--checkpoint', 'net.pth')
  code, out, err = command(*argv, '--output', 'out')
  assert (code, err) == (0, '')
  assert 'a head of 1000 classes (tench, goldfish, ...)' in out
  assert 'the centre of pictures whose shorter side is 168' in out
  bundle = bundles.load(tmp_path / 'out', trust_code=True)
  config = model.pretrained_cfg
  assert (config['input_size'], config['crop_pct']) == ((3, 160, 160), 0.95)
  assert bundle.crop == images.CentreCrop(168, config['interpolation'])
  assert bundle.class_names == imagenet.class_words()
  # timm's words, but for two that it cannot tell: crane (bird) and (machine).
  theirs = timm.data.ImageNetInfo().label_descriptions()
  others = [
    word
    for word, name in zip(imagenet.class_words(), theirs, strict=True)
    if word not in (name, name.partition(',')[0])
  ]
  assert others == ['crane (bird)', 'crane (machine)']


@pytest.mark.parametrize(
  'arguments, origin, resize',
  [
    ({'weights': 'IMAGENET1K_V1'}, {}, 256),
    ({'weights': 'ResNet50_Weights.IMAGENET1K_V2'}, {}, 232),
    ({'weights': 'DEFAULT'}, {}, 232),
    ({}, {'sha256': '11ad3fa6' + 56 * '0'}, 232),
    ({'weights': 'DEFAULT'}, {'sha256': '0676ba61' + 56 * '0'}, 256),
    ({}, {}, None),
    ({'weights': 'DEFAULT'}, {'sha256': 64 * '0'}, None),
  ],
)
def test_images_as_torchvision_prepares_them(arguments, origin, resize):
  """By the weights that it is made with, or by those that are loaded after."""
  name = 'torchvision.models:resnet50'

  def find():
    origin['model'] = name
    return named_models.published(None, arguments, None, {}, origin)

  if resize is None:
    with pytest.raises(config_utils.UserError, match='is not known: give'):
      find()
    return
  found = find()
  assert found.crop == images.CentreCrop(resize, 'bilinear')
  assert found.preprocessing.size == (224, 224)
  assert len(found.class_names()) == 1000


def test_command_takes_a_module_with_its_weights(
  command, tmp_path, monkeypatch
):
  (tmp_path / 'mine.py').write_text(
    'import torch\n'
    'def net(width=4):\n'
    '  return torch.nn.Sequential(torch.nn.Conv2d(1, width, 3),'
    ' torch.nn.ReLU(), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(),'
    ' torch.nn.Linear(width, 3))\n'
    'made = net()\n'
  )
  monkeypatch.syspath_prepend(tmp_path)
  names = tmp_path / 'names.txt'
  names.write_text('cat\ndog\nfox\n')
  common = ('--output', 'out', *IMAGES, '--class_names', names)
  code, _, err = command('--model', 'mine:made', *common)
  assert (code, err) == (0, '')
  bundle = bundles.load(tmp_path / 'out', trust_code=True)
  assert bundle.class_names == ('cat', 'dog', 'fox')
  code, _, err = command(
    *('--model', 'mine:net', '--model_args', 'width=5', '--overwrite', *common)
  )
  assert (code, err) == (0, '')
  bundle = bundles.load(tmp_path / 'out', trust_code=True)
  assert bundle.variables['params']['head']['kernel'].shape == (5, 3)


@pytest.mark.parametrize(
  'argv, said',
  [
    (('--model', 'timm:resnet18'), 'starts at random: give its weights'),
    (('--model', 'timm:resnet18dd'), "has no model 'resnet18dd'; it has resne"),
    (('--model', 'nowhere:net'), "there is no module 'nowhere'"),
    (('--model', 'json:JSONDecoder'), 'not a torch.nn.Module'),
    (('--model', 'timm:resnet10t', '--model_args', 'a b'), 'give key=value'),
    (('--model', 'timm:resnet10t', '--model_args', 'wide=2'), 'cannot be made'),
    (
      ('--model', 'timm:resnet10t', '--checkpoint', 'there_is_none.pth'),
      'there is no file there_is_none.pth',
    ),
    (('--model', 'timm:resnet10t', '--mean', '0.5'), 'go together'),
    (
      ('--model', 'torch.nn:Identity', '--preprocessing', 'cifar10'),
      'its last layer is not linear',
    ),
    (('--model', 'torch.nn:Identity'), 'is prepared is not known'),
  ],
)
def test_command_says_what_is_wrong(command, tmp_path, argv, said):
  code, out, err = command(*argv, '--output', 'out')
  assert (code, out) == (2, '')
  assert err.startswith('error: ') and err.count('\n') == 1
  assert said.replace('is prepared', 'are prepared') in err
  assert not (tmp_path / 'out').exists()


def test_command_refuses_other_weights(command, tmp_path):
  torch.save(make('resnet').state_dict(), tmp_path / 'net.pth')
  code, _, err = command(
    *('--model', 'timm:test_resnet', '--checkpoint', 'net.pth'),
    *('--output', 'out'),
  )
  assert code == 2
  assert 'conv1.0.weight is (16, 1, 3, 3) in the file and (16, 3, 3, 3)' in err


@pytest.fixture
def damaged(saved, tmp_path):
  """Returns a function that copies a bundle, changes it, and loads it."""

  def load(change, name='features_float32.bin', checksum=True, **kwargs):
    bundle = bundles.load(saved('convnext'), trust_code=True)
    bundle.save(tmp_path / 'copy')
    path = tmp_path / 'copy' / name
    path.write_bytes(change(path.read_bytes()))
    if checksum:
      spec = json.loads((tmp_path / 'copy' / 'bundle.json').read_text())
      digest = hashlib.sha256(path.read_bytes()).hexdigest()
      spec['programs'][name.removesuffix('.bin')] = digest
      (tmp_path / 'copy' / 'bundle.json').write_text(json.dumps(spec))
    with pytest.raises(config_utils.UserError) as refused:
      bundles.load(tmp_path / 'copy', trust_code=True, **kwargs)
    return str(refused.value)

  return load


def exported(fn, platforms):
  shape = jax.ShapeDtypeStruct((4, 4), jnp.float32)
  return bytes(
    export.export(jax.jit(fn), platforms=platforms)({}, shape).serialize()
  )


def test_a_program_is_what_was_saved(damaged):
  said = damaged(lambda data: data[:-1] + b'!', checksum=False)
  assert 'is not the one that was saved' in said


def test_a_program_that_cannot_be_read_is_refused(damaged):
  for change in (lambda data: b'', lambda data: b'x' * 100):
    assert 'convert it again' in damaged(change)


def test_a_program_of_another_jax_is_refused(damaged):
  def change(data):
    found = export.deserialize(bytearray(data))
    newer = dataclasses.replace(found, calling_convention_version=99)
    return bytes(newer.serialize())

  said = damaged(change)
  assert f'cannot be read by jax {jax.__version__}' in said
  assert 'under the JAX that is to run it, or an older one' in said


def test_a_program_for_other_platforms_is_refused(damaged):
  said = damaged(lambda _: exported(lambda arrays, x: x + 1, ('tpu', 'cuda')))
  assert 'was converted for tpu, cuda, not for cpu: convert it again' in said


def test_a_program_that_calls_out_is_refused():
  """Such a call names memory of a process, which a stranger may not."""

  def fn(arrays, x):
    del arrays
    return jax.ffi.ffi_call(
      'of_a_stranger', jax.ShapeDtypeStruct(x.shape, x.dtype)
    )(x)

  data = export.export(
    jax.jit(fn),
    platforms=('cpu',),
    disabled_checks=[
      export.DisabledSafetyCheck.custom_call('of_a_stranger'),
    ],
  )({}, jax.ShapeDtypeStruct((4,), jnp.float32)).serialize()
  with pytest.raises(config_utils.UserError, match='it calls of_a_stranger'):
    programs.load(bytes(data), 'x.bin')


def test_a_dtype_without_a_program_is_refused(saved, tmp_path):
  bundle = bundles.load(saved('resnet'), trust_code=True)
  backbone = bundle.network.backbone
  backbone = backbone.clone(features=backbone.features.pop('bfloat16')[0])
  network = dataclasses.replace(bundle.network, backbone=backbone)
  dataclasses.replace(bundle, network=network).save(tmp_path / 'half')
  with pytest.raises(
    config_utils.UserError, match='for float32, not for bfloat16'
  ):
    bundles.load(tmp_path / 'half', dtype=jnp.bfloat16, trust_code=True)


def test_vmap_has_no_rule_for_programs(saved):
  """It is said where a program is described; the steps do without."""
  teacher = bundles.load(saved('resnet'), trust_code=True).teacher()
  with pytest.raises(NotImplementedError, match='Batching rule'):
    jax.vmap(teacher, in_axes=(None, 0))(
      teacher.arrays, np.zeros((2, 1, 32, 32, 1), np.uint8)
    )
  assert 'vmap' in programs.Program.__doc__


def of_digits(small_config, folder, **fields):
  bundle = bundles.load(folder, trust_code=True)
  return small_config(
    **{
      'teacher.checkpoint': str(folder),
      'teacher.backbone': bundle.backbone_name,
      'optimizer.learning_rate': 0.01,
      **fields,
    }
  )


def test_a_student_goes_through_a_converted_pool_and_stands_alone(
  saved, small_config, tmp_path
):
  """And teaches the next one, and is refused what needs the pool's module."""
  config = of_digits(small_config, saved('convnext'), **{'teacher.head': 'fit'})
  result = train.train_and_evaluate(config, tmp_path / 'run')
  losses = [r['train/loss'] for r in result.history if 'train/loss' in r]
  assert losses[-1] < losses[0]
  assert result.bundle.pool_name == programs.PROGRAM
  alone = bundles.load(tmp_path / 'run', trust_code=True)
  assert isinstance(alone.network.pool, programs.Pool)
  assert not alone.network.backbone.programs
  images = np.random.default_rng(0).integers(0, 256, (5, 8, 8, 1))
  given, wanted = (
    bundle.network(
      bundle.variables, bundle.network.preprocessing(jnp.asarray(images))
    ).logits
    for bundle in (alone, result.bundle)
  )
  np.testing.assert_array_equal(given, wanted)
  again = train.train_and_evaluate(
    small_config(
      **{
        'teacher.checkpoint': str(tmp_path / 'run'),
        'optimizer.learning_rate': 0.01,
        'total_steps': 2,
      }
    ),
    tmp_path / 'next',
  )
  assert again.bundle.pool_name == programs.PROGRAM
  from ijckd_jax.commands import weights

  with pytest.raises(config_utils.UserError, match='is no torch.nn.Module any'):
    weights.main(
      ['export', '--trust_code', '--bundle', str(tmp_path / 'run')]
      + ['--output', str(tmp_path / 'student.safetensors')]
    )


def test_a_pool_of_maps_of_one_size_says_so(saved, small_config, tmp_path):
  config = of_digits(small_config, saved('siglip'))
  with pytest.raises(
    config_utils.UserError, match='takes maps of 4x4x24, but gets one of 2x2x24'
  ):
    train.train_and_evaluate(config, tmp_path / 'run')
  assert not (tmp_path / 'run').exists()


@pytest.mark.parametrize(
  'mapper', ['pmap', pytest.param('shard_map', marks=pytest.mark.slow)]
)
def test_eight_devices_give_what_one_gives(
  saved, small_config, tmp_path, mapper
):
  """Under batch norm over all devices; the eight in a process of their own."""
  fields = {
    'method.connector': 'mlp',
    'method.feature_site': 'pooled',
    'student.backbone': 'resnet8',
    'total_steps': 4,
    'log_steps': 1,
    'sync_batch_norm': True,
  }
  config = of_digits(small_config, saved('vit'), **fields)
  one = train.train_and_evaluate(config, tmp_path / 'one').history
  config.mapper, config.num_cpu_devices = mapper, 8
  path = tmp_path / 'config.py'
  path.write_text(
    'import ml_collections\n'
    'def get_config():\n'
    f'  return ml_collections.ConfigDict({config.to_dict()!r})\n'
  )
  subprocess.run(
    [sys.executable, '-m', 'ijckd_jax.main', '--config', str(path)]
    + ['--workdir', str(tmp_path / 'eight')],
    check=True,
    capture_output=True,
    env={**os.environ, 'JAX_PLATFORMS': 'cpu'},
  )
  rows = (tmp_path / 'eight' / 'metrics.jsonl').read_text().splitlines()
  losses = [
    [row['train/loss'] for row in history if 'train/loss' in row]
    for history in (one, map(json.loads, rows))
  ]
  assert len(losses[0]) == 4
  np.testing.assert_allclose(*losses, rtol=1e-4)


@pytest.mark.parametrize(
  'kind', ['resnet', pytest.param('vit_average', marks=pytest.mark.slow)]
)
def test_its_accuracy_in_the_step_is_its_accuracy_alone(
  saved, small_config, tmp_path, kind
):
  """Digits are 8x8; it sees the same view at 32x32, resized on the device."""
  config = of_digits(
    small_config,
    saved(kind),
    **{'teacher.head': 'fit', 'teacher.store.views': 1, 'total_steps': 30},
  )
  config.optimizer.learning_rate = 1e-6
  config.teacher.store.dtype = 'float32'
  config.method.feature_weight = 0.0
  config.dataset.crop_padding = 0
  result = train.train_and_evaluate(config, tmp_path / 'run')
  # What the step stored of the teacher, image by image, against it alone.
  from ijckd_jax.training import experiment
  from ijckd_jax.training import head_fitting

  exp = experiment.build(config)
  train_split = exp.dataset.load('train')
  fitted = head_fitting.load(
    tmp_path / 'run' / 'heads' / 'teacher_0.safetensors'
  )
  exp = exp.with_teachers([exp.teacher.with_head(fitted.head)])
  stored = _stored(exp, tmp_path / 'run', train_split)
  teacher = exp.teacher
  alone = np.asarray(outputs_of(teacher, train_split.images).logits)
  assert (stored.argmax(-1) == alone.argmax(-1)).all()
  assert_near(stored, alone)
  right = float((alone.argmax(-1) == train_split.labels).mean())
  assert right == fitted.report['train_top1']
  assert result.summary['teacher']['top1'] > 0.5


def _stored(exp, workdir, arrays):
  """Returns the logits that a run stored, in the images' order."""
  from ijckd_jax.training import output_recorder

  store = output_recorder._store(exp, workdir, arrays)
  store.load()
  indices = np.arange(len(arrays), dtype=np.int32)
  return store.read(indices, np.zeros_like(indices))['logits']


def test_a_teacher_without_a_head_needs_one(saved, small_config, tmp_path):
  bundle = convert(make('vit_average', num_classes=0), name='features').bundle
  assert bundle.class_names == ()
  bundle.save(tmp_path / 'features')
  config = of_digits(small_config, tmp_path / 'features')
  with pytest.raises(config_utils.UserError, match='has no head: --config.tea'):
    train.train_and_evaluate(config, tmp_path / 'run')
  config.teacher.head = 'fit'
  config.total_steps = 2
  result = train.train_and_evaluate(config, tmp_path / 'run')
  assert result.summary['heads'][0]['train_top1'] > 0.5


@pytest.mark.slow
@pytest.mark.parametrize(
  'family',
  sorted(json.loads(families.LIST.read_text()).keys() - families.LEFT_OUT),
)
def test_families(family):
  """One architecture of each of timm's families, within 1e-5 of the logits."""
  name = json.loads(families.LIST.read_text())[family]
  row = families.measure(family, name, limit=1e-5)
  jax.clear_caches()
  known = families.REFUSED.get(family)
  if known:
    assert known in row['refused']
    return
  assert 'refused' not in row, row['refused']
  if row['loaded'] > 1e-5:
    # Where PyTorch itself is so far from float64, so may we be.
    assert row['loaded'] <= 3 * row['torch_from_float64']


def test_randomised_networks_have_no_zeros():
  """A residual branch that is nothing would hide what it computes."""
  model = timm.create_model('resnet10t', zero_init_last=True)
  before = copy.deepcopy(model.state_dict())
  families.randomise(model)
  zeros = [k for k, v in model.state_dict().items() if not v.any()]
  assert any(not v.any() for v in before.values())
  assert all(k.endswith('num_batches_tracked') for k in zeros)


def convert_command_run(run_command, *flags):
  code, out, err = run_command(convert_command.main, *flags)
  assert code == 0, err
  return out


def programs_of(folder):
  return bundles.load(folder, trust_programs=True).network.programs


def test_a_bundle_is_converted_again(run_command, tmp_path):
  """To the last digit, with a head, class names and whatever it knew before."""
  model = make('convnext')
  state = {key: x.numpy() for key, x in model.state_dict().items()}
  state_dicts.write(tmp_path / 'weights.safetensors', state)
  out = convert_command_run(
    run_command,
    *('--model', 'timm:test_convnext', '--output', tmp_path / 'old'),
    *('--model_args', 'num_classes=10,in_chans=1'),
    *('--checkpoint', tmp_path / 'weights.safetensors', '--mean', '0.3'),
    *('--std', '0.3', '--image_size', '32', '--licence', 'mine'),
  )
  made = next(iter(programs_of(tmp_path / 'old').values())).made
  assert made.day == datetime.date.today().isoformat()
  said = f'releases of JAX until {made.until} promise'
  assert said in out
  old = bundles.load(tmp_path / 'old', trust_programs=True)
  assert said in (tmp_path / 'old/README.md').read_text()
  rng = np.random.default_rng(0)
  width = len(old.variables['params']['head']['kernel'])
  head = {'kernel': rng.normal(size=(width, 3)), 'bias': rng.normal(size=3)}
  head = {name: x.astype(np.float32) for name, x in head.items()}
  fitted = dataclasses.replace(
    old,
    variables={
      **old.variables,
      'params': {**old.variables['params'], 'head': head},
    },
    class_names=('a', 'b', 'c'),
    info={**old.info, 'which': 'last'},
  )
  fitted.save(tmp_path / 'fitted')
  convert_command_run(
    run_command,
    *('--again', tmp_path / 'fitted', '--output', tmp_path / 'new'),
  )
  new = bundles.load(tmp_path / 'new', trust_programs=True)
  # The programs hold where in the code their operators come from.
  specs = [{**x.spec(), 'programs': None} for x in (new, fitted)]
  assert specs[0] == specs[1]
  jax.tree.map(np.testing.assert_array_equal, new.variables, fitted.variables)
  images = images_of(new)
  for mine, theirs in zip(
    jax.tree.leaves(outputs_of(new.teacher(), images)),
    jax.tree.leaves(outputs_of(fitted.teacher(), images)),
    strict=True,
  ):
    np.testing.assert_array_equal(mine, theirs)


def test_what_cannot_be_converted_again(
  run_command, saved, finished_run, tmp_path
):
  def refused(*flags):
    flags = (*flags, '--output', tmp_path / 'new')
    code, _, err = run_command(convert_command.main, *flags)
    assert code == 2 and not (tmp_path / 'new').exists()
    return err

  assert 'give --model, or --again BUNDLE' in refused()
  err = refused('--again', saved('resnet'), '--model', 'timm:test_resnet')
  assert 'give --model, or --again BUNDLE' in err
  err = refused('--again', finished_run[0])
  assert 'is no bundle that ijckd convert wrote: convert the teacher' in err
  # Without its --model_args, the network has three channels.
  bundle = bundles.load(saved('resnet'), trust_programs=True)
  info = {'origin': {'model': 'timm:test_resnet'}}
  dataclasses.replace(bundle, info=info).save(tmp_path / 'old')
  err = refused('--again', tmp_path / 'old')
  assert 'of its arrays are not those of the model (' in err
  assert 'give the --model_args that it was made with' in err
