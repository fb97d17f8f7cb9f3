"""Optimizers and schedules against PyTorch's rules, written in numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ijckd_jax.runtime import config_utils
from ijckd_jax.training import optim


def config_of(**fields):
  config = optim.default_config()
  config_utils.override(config, fields)
  return config


def schedule_of(num_examples=50_000, batch_size=64, total_steps=None, **fields):
  if total_steps is None:
    total_steps = round(240 * num_examples / batch_size)
  return optim.make_schedule(
    config_of(**fields),
    num_examples=num_examples,
    batch_size=batch_size,
    total_steps=total_steps,
  )


def start():
  """Returns parameters of a convolution, a batch norm and a head."""
  rng = np.random.RandomState(0)
  return {
    'backbone': {
      'conv': {'kernel': rng.randn(3, 2)},
      'bn': {'scale': rng.randn(2), 'bias': rng.randn(2)},
    },
    'head': {'kernel': rng.randn(2, 4), 'bias': rng.randn(4)},
  }


def gradients_at(step):
  rng = np.random.RandomState(100 + step)
  return jax.tree.map(lambda x: rng.randn(*x.shape), start())


def descend(schedule, num_steps=5, stages=None, **fields):
  """Returns the parameters after the optimizer's steps."""
  tx = optim.make_optimizer(config_of(**fields), schedule, stages)
  params = jax.tree.map(jnp.float32, start())
  state = tx.init(params)
  for step in range(num_steps):
    gradients = jax.tree.map(jnp.float32, gradients_at(step))
    updates, state = tx.update(gradients, state, params)
    params = optax.apply_updates(params, updates)
  return params


def assert_close(result, expected):
  jax.tree.map(
    lambda x, y: np.testing.assert_allclose(x, y, rtol=2e-5, atol=1e-6),
    result,
    expected,
  )


def torch_sgd(schedule, *, momentum, decay, nesterov, decays=lambda path: True):
  """Returns what torch.optim.SGD gives: v = m v + (g + wd w); w -= lr v."""
  params = start()
  velocity = jax.tree.map(np.zeros_like, params)
  for step in range(5):

    def gradient(path, g, w):
      return g + decay * w * decays(path)

    g = jax.tree_util.tree_map_with_path(gradient, gradients_at(step), params)
    velocity = jax.tree.map(lambda v, g: momentum * v + g, velocity, g)
    change = velocity
    if nesterov:
      change = jax.tree.map(lambda v, g: g + momentum * v, velocity, g)
    rate = schedule(step)
    params = jax.tree.map(lambda w, c, rate=rate: w - rate * c, params, change)
  return params


def falling(step):
  return 0.1 / (1 + step)


@pytest.mark.parametrize('nesterov', [False, True])
@pytest.mark.parametrize('momentum', [0.9, 0.5])
def test_sgd_is_pytorchs(momentum, nesterov):
  result = descend(
    falling, momentum=momentum, nesterov=nesterov, weight_decay=0.1
  )
  expected = torch_sgd(falling, momentum=momentum, decay=0.1, nesterov=nesterov)
  assert_close(result, expected)


def test_sgd_without_momentum():
  result = descend(falling, momentum=0.0, weight_decay=0.1)
  expected = torch_sgd(falling, momentum=0.0, decay=0.1, nesterov=False)
  assert_close(result, expected)


def test_decay_may_spare_norms_and_biases():
  result = descend(falling, weight_decay=0.1, decay_norm_and_bias=False)
  expected = torch_sgd(
    falling,
    momentum=0.9,
    decay=0.1,
    nesterov=False,
    decays=lambda path: path[-1].key == 'kernel',
  )
  assert_close(result, expected)


@pytest.mark.parametrize('decay_norm_and_bias', [True, False])
def test_adamw_is_pytorchs(decay_norm_and_bias):
  """The w -= lr wd w stands apart; then m / (sqrt(v) + eps), unbiased."""
  result = descend(
    falling,
    name='adamw',
    momentum=0.8,
    beta2=0.95,
    weight_decay=0.1,
    decay_norm_and_bias=decay_norm_and_bias,
  )
  leaves, tree = jax.tree_util.tree_flatten_with_path(start())
  expected = []
  for position, (path, w) in enumerate(leaves):
    decays = decay_norm_and_bias or path[-1].key == 'kernel'
    m = v = np.zeros_like(w)
    for step in range(5):
      g = jax.tree.leaves(gradients_at(step))[position]
      m, v = 0.8 * m + 0.2 * g, 0.95 * v + 0.05 * g**2
      unbiased_m = m / (1 - 0.8 ** (step + 1))
      unbiased_v = v / (1 - 0.95 ** (step + 1))
      rate = falling(step)
      w = w - rate * 0.1 * decays * w
      w = w - rate * unbiased_m / (np.sqrt(unbiased_v) + 1e-8)
    expected.append(w)
  assert_close(result, jax.tree.unflatten(tree, expected))


@pytest.mark.parametrize('name', ['sgd', 'adamw'])
def test_layer_decay_slows_early_stages(name):
  stages = {'conv': 0, 'bn': 2}
  fields = {'name': name, 'weight_decay': 0.1}
  slowed = descend(falling, 1, stages, layer_decay=0.5, **fields)
  plain = descend(falling, 1, **fields)
  shares = jax.tree.map(
    lambda w, one, all: (one - w) / (all - w), start(), slowed, plain
  )
  for part, layer, share in (
    ('backbone', 'conv', 1 / 8),
    ('backbone', 'bn', 1 / 2),
    ('head', None, 1),
  ):
    tree = shares[part][layer] if layer else shares[part]
    for leaf in jax.tree.leaves(tree):
      np.testing.assert_allclose(leaf, share, rtol=1e-3)


@pytest.mark.parametrize('decay', [0.0, 1.5])
def test_a_layer_decay_that_cannot_be_is_refused(decay):
  with pytest.raises(config_utils.UserError, match=r'must be in \(0, 1\]'):
    optim.make_optimizer(config_of(layer_decay=decay), falling, {})


def test_clipping_is_by_the_global_norm_and_before_the_decay():
  g = gradients_at(0)
  norm = np.sqrt(sum(np.sum(leaf**2) for leaf in jax.tree.leaves(g)))
  assert norm > 2
  result = descend(
    lambda step: 0.1, num_steps=1, clip_norm=0.5, weight_decay=0.2
  )
  expected = jax.tree.map(
    lambda w, g: w - 0.1 * (0.5 / norm * g + 0.2 * w), start(), g
  )
  assert_close(result, expected)
  loose = descend(lambda step: 0.1, num_steps=1, clip_norm=2 * norm)
  assert_close(loose, descend(lambda step: 0.1, num_steps=1))


def test_default_is_the_recipe_of_the_tables():
  config = optim.default_config()
  assert config.name == 'sgd' and not config.nesterov
  assert (config.learning_rate, config.momentum) == (0.05, 0.9)
  assert config.weight_decay == 5e-4 and config.decay_norm_and_bias
  assert config.decay_epochs == (150, 180, 210) and config.decay_factor == 0.1


BOUNDARIES = [round(epoch * 50_000 / 64) for epoch in (150, 180, 210)]


@pytest.mark.parametrize('warmup', [{}, {'warmup_epochs': 5.0}])
def test_steps_fall_where_their_epochs_end(warmup):
  """Also after a warm-up, the boundaries are steps of the whole run."""
  assert BOUNDARIES == [117_188, 140_625, 164_062]
  schedule = schedule_of(**warmup)
  for exponent, boundary in enumerate(BOUNDARIES):
    # The rate of the update that comes after so many updates.
    np.testing.assert_allclose(
      schedule(boundary - 1), 0.05 * 0.1**exponent, rtol=1e-5
    )
    np.testing.assert_allclose(
      schedule(boundary), 0.05 * 0.1 ** (exponent + 1), rtol=1e-5
    )
  np.testing.assert_allclose(schedule(187_499), 5e-5, rtol=1e-5)
  first = schedule(0)
  assert first == (0 if warmup else np.float32(0.05))


def test_steps_may_be_few_or_none():
  schedule = schedule_of(decay_epochs=(2.5,), decay_factor=0.2, num_examples=64)
  rates = [float(schedule(step)) for step in range(4)]
  np.testing.assert_allclose(rates, [0.05, 0.05, 0.01, 0.01], rtol=1e-6)
  schedule = schedule_of(decay_epochs=())
  assert schedule(0) == schedule(187_499) == np.float32(0.05)


@pytest.mark.parametrize(
  'warmup',
  [{'warmup_steps': 10}, {'warmup_epochs': 0.5}, {'warmup_examples': 100}],
)
@pytest.mark.parametrize('kind', ['step', 'cosine'])
def test_warmup_rises_linearly_to_the_rate(kind, warmup):
  schedule = schedule_of(
    num_examples=200,
    batch_size=10,
    total_steps=100,
    schedule=kind,
    decay_epochs=(4.0,),
    **warmup,
  )
  for step in range(10):
    np.testing.assert_allclose(schedule(step), 0.05 * step / 10, rtol=1e-5)
  np.testing.assert_allclose(schedule(10), 0.05, rtol=1e-5)
  assert schedule(11) <= schedule(10)


@pytest.mark.parametrize('warmup', [0, 20])
def test_cosine_ends_at_zero(warmup):
  schedule = schedule_of(
    total_steps=120, schedule='cosine', warmup_steps=warmup
  )
  steps = np.arange(warmup, 121)
  rates = np.array([schedule(step) for step in steps])
  angle = np.pi * (steps - warmup) / (120 - warmup)
  np.testing.assert_allclose(rates, 0.025 * (1 + np.cos(angle)), atol=1e-7)
  assert schedule(119) > 0
  assert schedule(120) == 0


def test_schedule_drives_the_optimizer():
  schedule = schedule_of(num_examples=64, decay_epochs=(2.0,), total_steps=4)
  result = descend(schedule, momentum=0.9, weight_decay=0.0)
  expected = torch_sgd(
    lambda step: 0.05 if step < 2 else 0.005,
    momentum=0.9,
    decay=0.0,
    nesterov=False,
  )
  assert_close(result, expected)


@pytest.mark.parametrize(
  'fields, message',
  [
    ({'schedule': 'cosin'}, "unknown schedule 'cosin'.*mean 'cosine'"),
    (
      {'warmup_steps': 100},
      'optimizer.warmup_steps=100, .* does not fit into the run, 100 st',
    ),
    # Of 1000 examples in batches of 10.
    (
      {'warmup_epochs': 2.0, 'num_examples': 1000, 'batch_size': 10},
      'optimizer.warmup_epochs=2.0, a warm-up of 200 steps',
    ),
    ({'warmup_steps': 1, 'warmup_epochs': 1.0}, 'give one'),
    ({'warmup_steps': -1}, 'cannot be negative'),
  ],
)
def test_schedules_that_cannot_be(fields, message):
  with pytest.raises(config_utils.UserError, match=message):
    schedule_of(total_steps=100, **fields)


def test_unknown_optimizer_names_the_nearest():
  with pytest.raises(
    config_utils.UserError, match="unknown optimizer 'adam'.*mean 'adamw'"
  ):
    optim.make_optimizer(config_of(name='adam'), falling)
