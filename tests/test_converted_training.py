"""Converted PyTorch networks in training, against PyTorch and on digits."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from ijckd_jax.bundles import bundles
from ijckd_jax.distillation import binding
from ijckd_jax.distillation import methods
from ijckd_jax.distillation import network as network_lib
from ijckd_jax.distillation import train_state
from ijckd_jax.models import programs
from ijckd_jax.runtime import config_utils
from ijckd_jax.training import optim
from ijckd_jax.training import train
from tests import marks
from tests import test_programs

torch_networks = pytest.importorskip('tests.torch_networks')
pytest.importorskip('torchax', reason='needs torchax')
torch, timm = torch_networks.torch, torch_networks.timm
nn = torch.nn
from ijckd_jax.commands import weights  # noqa: E402
from ijckd_jax.pytorch import converter  # noqa: E402
from ijckd_jax.pytorch import published_names  # noqa: E402
from tests import test_torch_model  # noqa: E402
from tests import test_torch_training as parity  # noqa: E402

saved = test_torch_model.saved


class Normalised(nn.Module):
  """A network with batch norm of each kind that PyTorch has for images."""

  def __init__(self, momentum=0.3, runs=1, **fields):
    super().__init__()
    self.conv = nn.Conv2d(3, 8, 3, padding=1, bias=False)
    self.norm = nn.BatchNorm2d(8, momentum=momentum, **fields)
    self.plain = nn.BatchNorm2d(8, affine=False, eps=1e-3)
    self.hidden = nn.Linear(8, 8)
    self.flat = nn.BatchNorm1d(8)
    self.fc = nn.Linear(8, parity.NUM_CLASSES)
    self.runs = runs
    # Of no run, and so it is not kept.
    self.register_buffer('counter', torch.zeros(1, dtype=torch.long))

  def forward(self, images):
    x = self.conv(images)
    for _ in range(self.runs):
      x = self.norm(x)
    x = torch.relu(self.plain(x)).mean((2, 3))
    return self.fc(torch.relu(self.flat(self.hidden(x))))


class Pooled(nn.Module):
  """A network with a batch norm in its body, and one behind its map."""

  def __init__(self, pool=None, keeps=False, drop=0.0, bias=True):
    super().__init__()
    self.conv = nn.Conv2d(3, 8, 3, padding=1)
    self.norm = nn.BatchNorm2d(8)
    self.relu = nn.ReLU()
    self.pool = pool or nn.AdaptiveAvgPool2d(1)
    self.flat = nn.Flatten()
    self.flat_norm = nn.BatchNorm1d(8)
    nn.init.uniform_(self.flat_norm.running_var, 1, 2)
    self.drop = nn.Dropout(drop)
    self.fc = nn.Linear(8, parity.NUM_CLASSES, bias=bias)
    self.keeps = keeps

  def train(self, mode=True):
    super().train(mode)
    if self.keeps:
      self.norm.eval()
    return self

  def forward(self, images):
    x = self.relu(self.norm(self.conv(images)))
    return self.fc(self.drop(self.flat_norm(self.flat(self.pool(x)))))


class GeneralisedMean(nn.Module):
  """A pool whose gradient is infinite where its exponent is zero."""

  def __init__(self):
    super().__init__()
    self.exponent = nn.Parameter(torch.tensor(3.0))

  def forward(self, x):
    x = x.clamp(min=1e-6).pow(self.exponent).mean((2, 3), keepdim=True)
    return x.pow(1 / self.exponent)


class OwnNorm(nn.BatchNorm2d):
  """A batch norm that computes by itself."""

  def forward(self, x):
    if not self.training:
      return super().forward(x)
    return torch.batch_norm(
      *(x, self.weight, self.bias, self.running_mean, self.running_var),
      *(True, self.momentum, self.eps, False),
    )


def with_own_norm():
  net = Pooled()
  net.norm = OwnNorm(8)
  return net


def tied():
  net = Pooled()
  net.pool = nn.Sequential(nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1), net.pool)
  net.pool[1].weight = net.pool[0].weight
  return net


def of_timm(name, **fields):
  return timm.create_model(name, num_classes=parity.NUM_CLASSES, **fields)


VIT = {**test_torch_model.VIT, 'img_size': parity.SHAPE[0], 'depth': 2}
NETWORKS = {
  'normalised': Normalised,
  'pooled': Pooled,
  'general_pool': lambda: Pooled(GeneralisedMean()),
  'kept_in_inference': lambda: Pooled(keeps=True),
  'test_resnet': lambda: of_timm('test_resnet'),
  'test_efficientnet': lambda: of_timm('test_efficientnet'),
  # Without batch norm, so that training is inference; with a pool of its own.
  'vit': lambda: of_timm('vit_tiny_patch16_224', **VIT, global_pool='avg'),
  'resnet18': lambda: of_timm('resnet18'),
  'efficientnet_b0': lambda: of_timm('efficientnet_b0'),
  # There is a batch norm behind the map.
  'mobilenetv4_conv_small': lambda: of_timm('mobilenetv4_conv_small'),
}


@pytest.mark.parametrize(
  'name',
  marks.slow_but(
    ['normalised', 'pooled', 'general_pool', 'kept_in_inference']
    + ['test_resnet', 'test_efficientnet', 'vit'],
    NETWORKS,
  ),
)
def test_twenty_steps_are_pytorchs(name):
  """Each from PyTorch's state, by the labels, in float32."""
  torch.manual_seed(0)
  net = NETWORKS[name]()
  bundle = converter.convert(
    net, name=name, preprocessing=parity.PREPROCESSING, origin={}
  ).bundle
  net.train().requires_grad_(True)
  backbone = bundle.network.backbone.clone(unbiased_variance=True)
  backbone.check_trains(name)
  (head,) = (x for x in ('fc', 'head', 'classifier') if hasattr(net, x))
  rate, momentum, decay = parity.SETTINGS.values()
  optimizer = torch.optim.SGD(
    net.parameters(), rate, momentum, weight_decay=decay
  )
  dist = binding.bind(
    backbone=backbone,
    preprocessing=parity.PREPROCESSING,
    method=methods.get('ce')(),
    given=(),
    image_shape=parity.SHAPE,
    num_classes=parity.NUM_CLASSES,
    axis_name=None,
    dtype=jnp.float32,
  )
  tx, step = parity.step_of(dist)
  names = {
    kind: sorted(bundle.variables[kind]['backbone'])
    for kind in network_lib.COLLECTIONS
  }

  def variables_of(arrays):
    found = {
      kind: {'backbone': {key: np.asarray(arrays[key]) for key in keys}}
      for kind, keys in names.items()
      if all(key in arrays for key in keys)
    }
    found['params']['head'] = {
      'kernel': np.asarray(arrays[f'{head}.weight']).T,
      'bias': np.asarray(arrays[f'{head}.bias']),
    }
    return jax.tree.map(lambda x: np.array(x, copy=True), found)

  for images, labels in parity.batches():
    before = variables_of(net.state_dict())
    state = train_state.create(before, tx, with_ema=False)
    if optimizer.state:
      velocity = {
        key: optimizer.state[parameter]['momentum_buffer']
        for key, parameter in net.named_parameters()
      }
      opt_state = parity.optax.tree.set(
        state.opt_state, trace=variables_of(velocity)['params']
      )
      state = state.replace(opt_state=opt_state)
    batch = parity.batch_of(images, labels)
    state, sums = step(state, dist.frozen, batch, jax.random.key(0))
    x = np.asarray(parity.PREPROCESSING(images)).transpose(0, 3, 1, 2).copy()
    loss = nn.functional.cross_entropy(
      net(torch.from_numpy(x)), torch.from_numpy(labels).long()
    )
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    mine, count = sums['loss']
    np.testing.assert_allclose(mine / count, loss.item(), rtol=1e-5)
    after = variables_of(net.state_dict())
    # On maps of one pixel, batch norm multiplies rounding.
    assert np.max([*errors_of(state, before, after).values()]) < 1e-4


def errors_of(state, before, after):
  """Returns, by kind, the largest error of a change, of the largest change.

  Of all arrays: that of a bias before a batch norm is rounding alone.
  """
  found = {}
  for kind, given in (
    ('params', state.params),
    ('batch_stats', state.batch_stats),
  ):
    changes = [
      (np.abs(mine - new).max(), np.abs(new - old).max())
      for mine, new, old in zip(
        jax.tree.leaves(given),
        jax.tree.leaves(after[kind]),
        jax.tree.leaves(before[kind]),
        strict=True,
      )
    ]
    if changes:
      errors, sizes = zip(*changes, strict=True)
      found[kind] = float(np.max(errors) / np.max(sizes))
  return found


def converted(net, **fields):
  return converter.convert(
    net,
    **{
      'name': 'net',
      'preprocessing': parity.PREPROCESSING,
      'origin': {},
      **fields,
    },
  )


@pytest.mark.parametrize(
  'make, said',
  [
    (lambda: Normalised(momentum=None), 'norm averages its statistics over'),
    (lambda: Normalised(runs=2), 'batch norm norm is run twice in a step'),
    (with_own_norm, 'batch norm norm (a OwnNorm) does not run by torch.nn.'),
    (tied, 'pool.0.weight and pool.1.weight are one parameter'),
  ],
)
def test_what_can_teach_but_not_be_trained(make, said):
  result = converted(make())
  (note,) = (x for x in result.notes if 'can teach' in x)
  assert note.startswith('it can teach, but not be trained: ')
  assert said in note
  backbone = result.bundle.network.backbone
  assert not backbone.training and not backbone.pool_training
  with pytest.raises(config_utils.UserError, match='DIR can teach, but not be'):
    backbone.check_trains('DIR')


def test_what_is_not_done_in_training_is_said():
  """And what is: the check is silent where there is batch norm alone."""
  assert len(converted(Pooled()).notes) == 1
  *_, note = converted(Pooled(drop=0.5)).notes
  assert 'such as dropout or stochastic depth, is not done here' in note
  net = Pooled()
  net.conv.requires_grad_(False)
  assert '2 of its 8 parameters are frozen' in converted(net).notes[1]


class Auxiliary(Pooled):
  """Its modules run in another order in training."""

  def forward(self, images):
    if self.training:
      for _ in range(3):
        self.pool(images)
    return super().forward(images)


def test_modules_that_run_in_training_alone_are_said():
  notes = converted(Auxiliary()).notes
  assert 'in training PyTorch runs other modules' in notes[-1]


def test_running_statistics_of_the_model_stay():
  """The comparison in training mode leaves no trace."""
  net = Pooled()
  before = {name: x.clone() for name, x in net.state_dict().items()}
  bundle = converted(net).bundle
  for name, x in net.state_dict().items():
    assert torch.equal(x, before[name])
  arrays = bundle.variables['batch_stats']['backbone']
  for name, x in arrays.items():
    np.testing.assert_array_equal(x, before[name])


def test_a_pool_that_is_left_out_does_not_spoil_gradients():
  """Behind a connector there are no arrays of it; it is not run at all."""
  torch.manual_seed(0)
  bundle = converted(Pooled(GeneralisedMean())).bundle
  backbone = bundle.network.backbone.clone(tap='stage')
  part = network_lib.part(bundle.variables, 'backbone')
  own = backbone.init(jax.random.key(0), np.zeros((2, 16, 16, 3)), train=False)
  part = {kind: {k: part[kind][k] for k in tree} for kind, tree in own.items()}
  assert 'pool.exponent' not in part['params']
  images = np.random.default_rng(0).normal(size=(4, *parity.SHAPE))

  def loss(params):
    variables = {**part, 'params': params}
    features, _ = network_lib.run(
      backbone, variables, images.astype(np.float32), train=True
    )
    return jnp.sum(jnp.sin(features.final))

  gradient = jax.jit(jax.grad(loss))(part['params'])
  assert all(np.isfinite(x).all() for x in jax.tree.leaves(gradient))
  assert gradient['conv.weight'].any()


def test_what_pytorch_calls_a_weight_decays():
  """Where norms and biases are spared, as in all that is trained here."""
  bundle = converted(Pooled()).bundle
  config = optim.default_config()
  config.weight_decay, config.decay_norm_and_bias = 0.5, False
  config.learning_rate, config.momentum = 1.0, 0.0
  params = bundle.variables['params']
  tx = optim.make_optimizer(config, 1.0)
  zeros = jax.tree.map(np.zeros_like, params)
  updates, _ = tx.update(zeros, tx.init(params), params)
  moved = {name for name, x in updates['backbone'].items() if x.any()}
  assert moved == {'conv.weight'}


def test_a_head_that_is_no_layers_own_is_not_written(tmp_path):
  """PyTorch's layer has no bias, which is trained here."""
  bundle = converted(Pooled(bias=False)).bundle
  assert 'head' not in bundle.info['origin']
  with pytest.raises(config_utils.UserError, match='one linear layer'):
    published_names.state_dict(bundle)


def student_of(small_config, folder, method='ce', **fields):
  """Returns the config of a student that starts as a converted bundle."""
  name = bundles.load(folder, trust_programs=True).backbone_name
  return small_config(
    method,
    **{
      'student.backbone': name,
      'student.init_from': str(folder),
      'optimizer.learning_rate': 0.01,
      'total_steps': 8,
      'log_steps': 1,
      'eval_steps': 8,
      **fields,
    },
  )


def losses_of(result):
  return [row['train/loss'] for row in result.history if 'train/loss' in row]


def logits_of(bundle):
  images = test_torch_model.images_of(bundle)
  x = bundle.network.preprocessing(jnp.asarray(images))
  return np.asarray(jax.jit(bundle.network)(bundle.variables, x).logits)


@pytest.mark.parametrize(
  'kind', marks.slow_but(['resnet'], ['resnet', 'vit', 'convnext'])
)
def test_a_converted_network_is_trained_further(
  saved, small_config, tmp_path, kind
):
  """And what comes of it is loaded, and trained further again."""
  config = student_of(small_config, saved(kind))
  result = train.train_and_evaluate(config, tmp_path / 'run')
  losses = losses_of(result)
  assert losses[-1] < losses[0]
  start = bundles.load(saved(kind), trust_programs=True)
  alone = bundles.load(tmp_path / 'run', trust_programs=True)
  assert alone.network.programs == start.network.programs
  assert alone.network.preprocessing == start.network.preprocessing
  np.testing.assert_array_equal(logits_of(alone), logits_of(result.bundle))
  for name in network_lib.COLLECTIONS:
    pairs = zip(
      jax.tree.leaves(start.variables[name]),
      jax.tree.leaves(alone.variables[name]),
      strict=True,
    )
    for old, new in pairs:
      assert not np.array_equal(old, new)
  again = student_of(
    small_config,
    tmp_path / 'run',
    **{'student.init_parts': ('backbone', 'head')},
  )
  again = train.train_and_evaluate(again, tmp_path / 'again')
  assert losses_of(again)[0] < losses[0]


def test_statistics_may_be_frozen(saved, small_config, tmp_path):
  """Batch norm is then what it is in inference; its parameters learn."""
  config = student_of(
    small_config, saved('resnet'), **{'student.freeze_statistics': True}
  )
  result = train.train_and_evaluate(config, tmp_path / 'run')
  assert losses_of(result)[-1] < losses_of(result)[0]
  start = bundles.load(saved('resnet'), trust_programs=True).variables
  for kind, is_same in (('batch_stats', True), ('params', False)):
    pairs = zip(
      jax.tree.leaves(start[kind]['backbone']),
      jax.tree.leaves(result.bundle.variables[kind]['backbone']),
      strict=True,
    )
    assert all(np.array_equal(old, new) == is_same for old, new in pairs)


def test_a_converted_student_is_connected(saved, small_config, tmp_path):
  """To the program that is its teacher's pool, which is not its own."""
  teacher = saved('convnext')
  config = student_of(
    small_config,
    saved('vit_average'),
    'ijckd',
    **{
      'teacher.checkpoint': str(teacher),
      'teacher.backbone': 'timm:test_convnext',
      'teacher.head': 'fit',
    },
  )
  result = train.train_and_evaluate(config, tmp_path / 'run')
  assert losses_of(result)[-1] < losses_of(result)[0]
  alone = bundles.load(tmp_path / 'run', trust_programs=True)
  np.testing.assert_array_equal(logits_of(alone), logits_of(result.bundle))
  pools = [
    bundles.load(folder, trust_programs=True).network.programs[programs.POOL]
    for folder in (teacher, saved('vit_average'))
  ]
  found = alone.network.programs
  assert [found[programs.POOL], found[programs.OWN_POOL]] == pools
  # Its backbone ends before its own pool, and so has no arrays of it.
  with pytest.raises(config_utils.UserError, match='must end there or earlier'):
    train.train_and_evaluate(
      student_of(small_config, tmp_path / 'run'), tmp_path / 'next'
    )


def test_a_teacher_is_made_of_a_converted_network(
  saved, small_config, tmp_path
):
  config = small_config(
    **{
      'teacher.backbone': 'timm:test_resnet',
      'teacher.init_from': str(saved('resnet')),
      'teacher.learning_rate': 0.01,
      'teacher.total_steps': 4,
      'total_steps': 4,
    }
  )
  result = train.train_and_evaluate(config, tmp_path / 'run')
  teacher = bundles.load(tmp_path / 'run/teacher', trust_programs=True)
  assert teacher.backbone_name == 'timm:test_resnet'
  assert result.bundle.pool_name == 'average'
  start = bundles.load(saved('resnet'), trust_programs=True)
  old, new = (x.variables['params']['backbone'] for x in (start, teacher))
  assert old.keys() == new.keys()
  assert not any(np.array_equal(old[name], new[name]) for name in old)


@pytest.mark.parametrize(
  'fields, said',
  [
    ({'student.init_from': ''}, "'timm:test_resnet' is a network of PyTorch"),
    ({'student.backbone': 'resnet8'}, 'holds a timm:test_resnet, and cannot'),
    ({'student.drop_path': 0.1}, 'has no stochastic depth here: set it to 0'),
    ({'sync_batch_norm': True}, 'leave sync_batch_norm=False'),
    ({'batch_size': 1}, 'needs two images or more'),
    ({'student.init_parts': ('head',)}, 'cannot start at random: add backbone'),
  ],
)
def test_what_cannot_be_asked_of_it(
  saved, small_config, tmp_path, fields, said
):
  config = student_of(small_config, saved('resnet'), **fields)
  with pytest.raises(config_utils.UserError, match=said):
    train.train_and_evaluate(config, tmp_path / 'run')
  assert not (tmp_path / 'run').exists()


def test_a_dtype_that_it_was_not_converted_for(saved, small_config, tmp_path):
  bundle = bundles.load(saved('resnet'), trust_programs=True)
  training = bundle.network.backbone.training.pop('bfloat16')[0]
  backbone = bundle.network.backbone.clone(training=training)
  network = dataclasses.replace(bundle.network, backbone=backbone)
  dataclasses.replace(bundle, network=network).save(tmp_path / 'half')
  config = student_of(small_config, tmp_path / 'half', dtype='bfloat16')
  with pytest.raises(config_utils.UserError, match='trained in float32 alone'):
    train.train_and_evaluate(config, tmp_path / 'run')
  features = backbone.features.pop('bfloat16')[0]
  network = dataclasses.replace(
    network, backbone=backbone.clone(features=features)
  )
  dataclasses.replace(bundle, network=network).save(tmp_path / 'single')
  config = student_of(small_config, tmp_path / 'single', dtype='bfloat16')
  with pytest.raises(config_utils.UserError, match='none in bfloat16: set'):
    train.train_and_evaluate(config, tmp_path / 'run')
  config = student_of(small_config, saved('resnet'), dtype='bfloat16')
  result = train.train_and_evaluate(config, tmp_path / 'run')
  assert losses_of(result)[-1] < losses_of(result)[0]


@pytest.mark.parametrize('kind', marks.slow_but(['resnet'], ['resnet', 'vit']))
def test_trained_weights_go_back_to_pytorch(
  saved, small_config, tmp_path, run_command, kind
):
  config = student_of(small_config, saved(kind), total_steps=2)
  bundle = train.train_and_evaluate(config, tmp_path / 'run').bundle
  path = tmp_path / 'weights.safetensors'
  code, out, err = run_command(
    weights.main,
    *('export', '--trust_code', '--bundle', tmp_path / 'run'),
    *('--output', path),
  )
  assert code == 0, err
  assert 'strict=False' in out
  net = test_torch_model.make(kind)
  arrays = safetensors.numpy.load_file(path)
  missing, unexpected = net.load_state_dict(
    {name: torch.from_numpy(x) for name, x in arrays.items()}, strict=False
  )
  assert not unexpected
  assert all(name.endswith('num_batches_tracked') for name in missing)
  images = test_torch_model.images_of(bundle)
  test_torch_model.assert_near(
    logits_of(bundle), test_torch_model.of_torch(net, bundle, images)
  )


def test_a_bundle_of_the_format_before_is_read(tmp_path):
  """In it the pool's arrays were apart, and no gradient was known."""
  bundle = test_programs.make_converted()
  new = tmp_path / 'new'
  bundle.save(new)
  path = new / bundles.ARRAYS_FILE
  arrays = safetensors.numpy.load_file(path)
  arrays['pool/params/scale'] = arrays.pop('params/backbone/scale')
  safetensors.numpy.save_file(arrays, path)
  spec = json.loads((new / bundles.SPEC_FILE).read_text())
  del spec['truncated'], spec[bundles.CHECKSUM]
  spec['format_version'] = 2
  (new / bundles.SPEC_FILE).write_text(json.dumps(spec))
  old = bundles.load(new, trust_programs=True)
  assert jax.tree.all(
    jax.tree.map(np.array_equal, old.variables, bundle.variables)
  )
  np.testing.assert_array_equal(logits_of(old), logits_of(bundle))
  with pytest.raises(config_utils.UserError, match='ijckd convert --again'):
    old.network.backbone.check_trains('it')
