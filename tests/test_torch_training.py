"""The same training steps in PyTorch and here, from the same weights.

The recipe is that of the CIFAR-100 tables.
"""

import functools

from flax import traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ijckd_jax import models
from ijckd_jax.data import augment
from ijckd_jax.distillation import binding
from ijckd_jax.distillation import methods
from ijckd_jax.distillation import steps
from ijckd_jax.distillation import train_state
from ijckd_jax.pytorch import importer
from ijckd_jax.pytorch import published_names
from ijckd_jax.pytorch import published_weights
from ijckd_jax.pytorch import state_dicts
from ijckd_jax.runtime import parallel
from ijckd_jax.training import optim
from tests import marks

torch_networks = pytest.importorskip('tests.torch_networks')
torch = torch_networks.torch
nn, F = torch.nn, torch.nn.functional

NUM_STEPS = 20
BATCH_SIZE = 16
NUM_CLASSES = 10
SHAPE = (16, 16, 3)
PREPROCESSING = augment.Preprocessing(3 * (0.5,), 3 * (0.25,), SHAPE[:2])
SETTINGS = {'learning_rate': 0.05, 'momentum': 0.9, 'weight_decay': 5e-4}
PAIRS = [
  ('resnet14', 'resnet8'),
  # Of other widths and map sizes, and tapped before its last layers.
  pytest.param('vgg8', 'wrn_16_1', marks=pytest.mark.slow),
]


def batches():
  """Returns images that depend on their labels, lest the gradients vanish.

  Their pixels are black or white, of which no preparation rounds: rounding
  errors grow a hundredfold in a few steps.
  """
  rng = np.random.RandomState(0)
  patterns = rng.rand(NUM_CLASSES, *SHAPE)
  for _ in range(NUM_STEPS):
    labels = rng.randint(0, NUM_CLASSES, BATCH_SIZE).astype(np.int32)
    white = rng.rand(BATCH_SIZE, *SHAPE) < patterns[labels]
    yield 255 * white.astype(np.uint8), labels


class Pair(nn.Module):
  """A student and its connector, beside a frozen teacher."""

  def __init__(self, teacher, student, method, dtype):
    super().__init__()
    torch.manual_seed(0)
    build = functools.partial(torch_networks.build, num_classes=NUM_CLASSES)
    frozen = torch_networks.randomize(build(teacher), seed=0)
    self.teacher = [frozen.requires_grad_(False)]  # None of its modules.
    self.names = teacher, student
    self.method, self.backbone = method, build(student)
    images = torch.zeros(2, SHAPE[2], *SHAPE[:2])
    inputs = self.taps(self.backbone.eval(), student, images)[0].shape[1]
    width = torch_networks.features(frozen, teacher, images)['final'].shape[1]
    kernels = (
      [(width, 1)]
      if method == 'srrl'
      else [
        (width // 2, 1),
        (width // 2, 3),
        (width, 1),
      ]
    )
    self.connector = nn.Sequential()
    for features, kernel in kernels:
      self.connector.extend(
        [
          nn.Conv2d(inputs, features, kernel, padding=kernel // 2, bias=False),
          nn.BatchNorm2d(features),
          nn.ReLU(),
        ]
      )
      inputs = features
    self.to(dtype)
    frozen.to(dtype)

  def taps(self, net, name, images):
    """Returns the map that is connected, and the pooled features."""
    stages, final = torch_networks._maps(net, name, images)
    tapped = final if self.method == 'srrl' else stages[-1]
    return tapped, final.mean((2, 3))

  def losses(self, images, labels):
    """Returns the method's terms, by their formulas."""
    (teacher,), (name, student) = self.teacher, self.names
    theirs = torch_networks.features(teacher, name, images)
    head = list(teacher.children())[-1]
    x, pooled = self.taps(self.backbone, student, images)
    target = theirs['final']
    smaller = [
      min(pair) for pair in zip(x.shape[2:], target.shape[2:], strict=True)
    ]
    x = self.connector(F.adaptive_avg_pool2d(x, smaller))
    target = F.adaptive_avg_pool2d(target, smaller)
    through = head(x.mean((2, 3)))
    if self.method == 'simkd':
      return {'feature': F.mse_loss(x, target)}
    logit = F.mse_loss(through, theirs['logits'])
    if self.method == 'ijckd':
      return {
        'cross_entropy': F.cross_entropy(through, labels),
        'logit': logit,
        'feature': F.mse_loss(x, target),
      }
    own = list(self.backbone.children())[-1](pooled)
    return {
      'cross_entropy': F.cross_entropy(own, labels),
      'feature': F.mse_loss(x.mean((2, 3)), theirs['pooled']),
      'logit': logit,
    }


def train_in_torch(pair, trained):
  """Returns the terms at every step; the pair is trained."""
  parameters = [p for name, p in pair.named_parameters() if name in trained]
  rate, momentum, decay = SETTINGS.values()
  optimizer = torch.optim.SGD(parameters, rate, momentum, weight_decay=decay)
  pair.train()
  history = []
  for images, labels in batches():
    # Prepared in float32 in both, so that the numbers are the same.
    x = np.asarray(PREPROCESSING(images)).transpose(0, 3, 1, 2)
    x = torch.from_numpy(x.copy()).to(next(pair.parameters()).dtype)
    terms = pair.losses(x, torch.from_numpy(labels).long())
    optimizer.zero_grad()
    sum(terms.values()).backward()
    optimizer.step()
    history.append({name: term.item() for name, term in terms.items()})
  return history


@functools.cache
def bound(teacher, student, method, unbiased, dtype):
  """Returns the Distiller of a pair, its teacher imported from PyTorch."""
  frozen = torch_networks.randomize(
    torch_networks.build(teacher, NUM_CLASSES), seed=0
  )
  arrays = {key: value.numpy() for key, value in frozen.state_dict().items()}
  bundle, _ = importer.from_state(
    state_dicts.StateDict(arrays, {}, {}, (), ''),
    importer.Request(
      backbone=teacher,
      preprocessing=published_weights.Published(PREPROCESSING),
      dtype=dtype,
    ),
    origin={},
  )
  method = methods.get(method)()
  return binding.bind(
    backbone=models.build(
      student,
      tap=method.tap,
      unbiased_variance=unbiased,
      dtype=dtype,
    ),
    preprocessing=PREPROCESSING,
    method=method,
    given=(bundle.teacher(),),
    image_shape=SHAPE,
    num_classes=NUM_CLASSES,
    axis_name=None,
    dtype=dtype,
  )


def names_of(dist):
  """Returns PyTorch's names of what is trained, and where it lies."""
  shapes = jax.eval_shape(lambda: dist.init(jax.random.key(0), SHAPE))
  if not dist.links:
    return published_names.names_of(dist.network, shapes)
  params = {'head': dist.teachers[0].head, **shapes['params']}
  names = published_names.names_of(
    dist.connected_network or dist.network,
    {**shapes, 'params': params, 'pool': {}},
  )
  head = dist.network.backbone.torch_head
  if dist.reuses_head:
    return {k: e for k, e in names.items() if not k.startswith('head.')}
  return {k.replace('head.', f'backbone.{head}.'): e for k, e in names.items()}


def variables_of(arrays, dist):
  """Returns variables of PyTorch's arrays, by name."""
  flat, dtype = {}, dist.network.backbone.dtype
  for name, entry in names_of(dist).items():
    if name in arrays:
      flat[entry.path] = entry.to_flax(arrays[name].numpy()).astype(dtype)
  return traverse_util.unflatten_dict(flat)


def step_of(dist):
  """Returns the optimizer, and a step of a single device."""
  config = optim.default_config()
  for name, value in SETTINGS.items():
    config[name] = value
  tx = optim.make_optimizer(config, config.learning_rate)
  return tx, jax.pmap(
    functools.partial(
      steps.train_step,
      distiller=dist,
      tx=tx,
      augmentation=lambda key, images, epochs, indices: images,
      ema_decay=0.0,
      num_pieces=1,
    ),
    in_axes=(None, None, 0, None),
    out_axes=None,
    axis_name=parallel.AXIS,
  )


def batch_of(images, labels):
  """Returns a batch of the rows of a single device."""
  rows = np.zeros(BATCH_SIZE, np.int32)
  batch = {'image': images, 'label': labels, 'index': rows, 'epoch': rows}
  return jax.tree.map(lambda x: x[None], batch)


def train_here(pair, dist):
  """Returns the terms at every step, and the state after the last."""
  dtype = dist.network.backbone.dtype
  frozen = jax.tree.map(lambda x: x.astype(dtype), dist.frozen)
  tx, step = step_of(dist)
  variables = variables_of(pair.state_dict(), dist)
  current = train_state.create(variables, tx, with_ema=False)
  history = []
  for images, labels in batches():
    batch = batch_of(images, labels)
    current, sums = step(current, frozen, batch, jax.random.key(0))
    history.append({k: float(v) / float(n) for k, (v, n) in sums.items()})
  return history, current


def compare(pair, start, state, dist):
  """Returns the largest difference, in parts of the largest change, by kind."""
  flat = traverse_util.flatten_dict(
    {'params': state.params, 'batch_stats': state.batch_stats}
  )
  theirs, errors, changes = pair.state_dict(), {}, {}
  for name, entry in names_of(dist).items():
    ours, expected = entry.to_torch(flat[entry.path]), theirs[name].numpy()
    kind = name.rpartition('.')[2]
    kind = kind if kind.startswith('running') else 'parameters'
    for found, difference in (
      (errors, ours - expected),
      (changes, expected - start[name]),
    ):
      largest = np.abs(difference).max()
      found[kind] = max(found.get(kind, 0.0), largest)
  return {kind: error / changes[kind] for kind, error in errors.items()}


def train_in_both(teacher, student, method, *, dtype, unbiased=True):
  """Returns the terms of both at every step, and how far they end apart."""
  pair = Pair(teacher, student, method, getattr(torch, dtype))
  start = {name: x.numpy().copy() for name, x in pair.state_dict().items()}
  dist = bound(teacher, student, method, unbiased, getattr(jnp, dtype))
  ours, state = train_here(pair, dist)
  theirs = train_in_torch(pair, names_of(dist))
  return ours, theirs, compare(pair, start, state, dist)


@pytest.mark.parametrize(
  'method',
  ['ijckd', 'simkd', pytest.param('srrl', marks=pytest.mark.slow)],
)
@pytest.mark.parametrize('teacher, student', PAIRS)
def test_twenty_steps_are_pytorchs(teacher, student, method):
  """In float64, so that rounding errors, which grow, can hide no mistake."""
  with jax.enable_x64(True):
    ours, theirs, errors = train_in_both(
      teacher, student, method, dtype='float64'
    )
  assert len(ours) == NUM_STEPS
  for mine, expected in zip(ours, theirs, strict=True):
    assert mine.keys() >= expected.keys()
    for name, value in expected.items():
      np.testing.assert_allclose(mine[name], value, rtol=1e-10, err_msg=name)
  assert errors.keys() == {'parameters', 'running_mean', 'running_var'}
  assert max(errors.values()) < 1e-10


@pytest.mark.slow
def test_twenty_steps_in_float32_are_near():
  """Each step multiplies rounding errors; the tables' effects are larger."""
  ours, theirs, _ = train_in_both(
    'resnet14', 'resnet8', 'ijckd', dtype='float32'
  )
  for step, (mine, expected) in enumerate(zip(ours, theirs, strict=True)):
    for name, value in expected.items():
      rtol = 1e-6 if step == 0 else 5e-2
      np.testing.assert_allclose(mine[name], value, rtol=rtol, err_msg=name)


@pytest.mark.slow
def test_biased_running_variance_is_all_that_differs_by_default():
  with jax.enable_x64(True):
    _, _, errors = train_in_both(
      'resnet14', 'resnet8', 'ijckd', dtype='float64', unbiased=False
    )
  assert max(errors['parameters'], errors['running_mean']) < 1e-10
  # The smallest maps have n = B H W values to a channel.
  num_values = BATCH_SIZE * (SHAPE[0] // 4) * (SHAPE[1] // 4)
  assert 0.1 / num_values < errors['running_var'] < 10 / num_values


# Of timm's networks, those that have batch norm. The pool of the first has one.
NORMALISED = marks.slow_but(
  ['mobilenetv4_conv_small'],
  [x for x in torch_networks.TIMM_STAGES if not x.startswith('convnext')],
)


@pytest.mark.parametrize('name', NORMALISED)
def test_twenty_steps_of_timms_networks_are_pytorchs(name):
  """Each step from PyTorch's state: in deep networks rounding errors explode.

  In float64, by the labels, from the weights that timm draws.
  """
  torch.manual_seed(0)
  net = torch_networks.build(name, NUM_CLASSES).double().train()
  rate, momentum, decay = SETTINGS.values()
  optimizer = torch.optim.SGD(
    net.parameters(), rate, momentum, weight_decay=decay
  )
  with jax.enable_x64(True):
    dist = binding.bind(
      backbone=models.build(name, unbiased_variance=True, dtype=jnp.float64),
      preprocessing=PREPROCESSING,
      method=methods.get('ce')(),
      given=(),
      image_shape=SHAPE,
      num_classes=NUM_CLASSES,
      axis_name=None,
      dtype=jnp.float64,
    )
    tx, step = step_of(dist)
    for images, labels in batches():
      variables = variables_of(net.state_dict(), dist)
      state = train_state.create(variables, tx, with_ema=False)
      if optimizer.state:
        velocity = {
          key: optimizer.state[parameter]['momentum_buffer']
          for key, parameter in net.named_parameters()
        }
        velocity = variables_of(velocity, dist)['params']
        opt_state = optax.tree.set(state.opt_state, trace=velocity)
        state = state.replace(opt_state=opt_state)
      start = {key: x.numpy().copy() for key, x in net.state_dict().items()}
      batch = batch_of(images, labels)
      state, sums = step(state, dist.frozen, batch, jax.random.key(0))
      x = np.asarray(PREPROCESSING(images)).transpose(0, 3, 1, 2).copy()
      logits = net(torch.from_numpy(x))
      loss = F.cross_entropy(logits, torch.from_numpy(labels).long())
      optimizer.zero_grad()
      loss.backward()
      optimizer.step()
      mine, count = sums['loss']
      np.testing.assert_allclose(mine / count, loss.item(), rtol=1e-10)
      errors = compare(net, start, state, dist)
      assert errors.keys() == {'parameters', 'running_mean', 'running_var'}
      # On maps of one pixel, batch norm multiplies the gradients' rounding.
      assert errors.pop('parameters') < 1e-6
      assert max(errors.values()) < 1e-12
