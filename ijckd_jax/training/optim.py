"""Optimizers and learning-rate schedules, from config sections to optax."""

import collections
from collections.abc import Mapping
import math

import jax
import ml_collections
import optax

from ijckd_jax.runtime import config_utils
from ijckd_jax.training import durations

OPTIMIZERS = ('sgd', 'adamw')
SCHEDULES = ('step', 'cosine')


def default_config() -> ml_collections.ConfigDict:
  """Returns the `optimizer` section: the recipe of the CIFAR-100 tables."""
  return ml_collections.ConfigDict(
    {
      'name': 'sgd',
      'learning_rate': 0.05,
      'momentum': 0.9,
      'nesterov': False,
      'beta2': 0.999,
      'weight_decay': 5e-4,
      'decay_norm_and_bias': True,
      # Of the learning rate, once for each stage from a layer to the head.
      'layer_decay': 1.0,
      'clip_norm': 0.0,
      'schedule': 'step',
      'decay_epochs': (150.0, 180.0, 210.0),
      'decay_factor': 0.1,
      'warmup_epochs': 0.0,
      'warmup_steps': 0,
      'warmup_examples': 0,
    }
  )


def make_schedule(
  config: ml_collections.ConfigDict,
  *,
  num_examples: int,
  batch_size: int,
  total_steps: int,
  total: str = 'the run',
) -> optax.Schedule:
  """Returns the learning rate as a function of the updates made before.

  Args:
    config: the `optimizer` section. 'step' multiplies by `decay_factor` after
      each of `decay_epochs`; 'cosine' ends at zero. Both may warm up linearly
      from zero.
    num_examples: examples in an epoch.
    batch_size: examples in a step.
    total_steps: steps of the whole run.
    total: what says so, for the message.

  Raises:
    config_utils.UserError: the schedule is unknown, or a number cannot be.
  """
  config_utils.check_positive('optimizer.learning_rate', config.learning_rate)
  if config.schedule not in SCHEDULES:
    raise config_utils.unknown('schedule', config.schedule, SCHEDULES)
  warmup = durations.to_steps(
    config, 'warmup', num_examples=num_examples, batch_size=batch_size
  )
  if warmup >= total_steps:
    unit, value = durations.duration(config, 'warmup')
    raise config_utils.UserError(
      f'optimizer.warmup_{unit}={value}, a warm-up of {warmup} steps, does not '
      f'fit into {total}, {total_steps} steps: shorten it, or train longer'
    )
  if config.schedule == 'step':
    boundaries = collections.Counter(
      durations.epoch_end(epoch, num_examples, batch_size) - warmup
      for epoch in config.decay_epochs
    )
    main = optax.piecewise_constant_schedule(
      config.learning_rate,
      {step: config.decay_factor**times for step, times in boundaries.items()},
    )
  else:
    main = optax.cosine_decay_schedule(
      config.learning_rate, total_steps - warmup
    )
  if not warmup:
    return main
  ramp = optax.linear_schedule(0.0, config.learning_rate, warmup)
  return optax.join_schedules([ramp, main], [warmup])


def make_optimizer(
  config: ml_collections.ConfigDict,
  schedule: optax.Schedule,
  stages: Mapping[str, int] | None = None,
) -> optax.GradientTransformation:
  """Returns the transformation that a config's `optimizer` section describes.

  SGD adds the weight decay to the gradient before the momentum, as PyTorch
  does; AdamW decouples it. With `layer_decay` d, a layer of the backbone learns
  at d^n of the learning rate, where n is 1 for the last stage that is built.

  Args:
    config: the `optimizer` section.
    schedule: the learning rate by step.
    stages: of each layer of the backbone, see models.Backbone; only
      read where `layer_decay` is not 1.

  Source of `layer_decay`: Clark et al. 2020, "ELECTRA",
  https://arxiv.org/abs/2003.10555, here by stages.

  Raises:
    config_utils.UserError: the optimizer is unknown, or a number cannot be.
  """
  for name, limit in (
    ('momentum', 1),
    ('beta2', 1),
    ('weight_decay', math.inf),
    ('clip_norm', math.inf),
  ):
    if not 0 <= config[name] < limit:
      raise config_utils.UserError(
        f'optimizer.{name}={config[name]}: it must be in [0, {limit})'
      )
  if not 0 < config.layer_decay <= 1:
    raise config_utils.UserError(
      f'optimizer.layer_decay={config.layer_decay}: it must be in (0, 1]'
    )
  mask = None if config.decay_norm_and_bias else _only_kernels
  if config.name == 'sgd':
    steps = [
      optax.add_decayed_weights(config.weight_decay, mask),
      optax.sgd(schedule, config.momentum or None, config.nesterov),
    ]
  elif config.name == 'adamw':
    steps = [
      optax.adamw(
        schedule,
        b1=config.momentum,
        b2=config.beta2,
        weight_decay=config.weight_decay,
        mask=mask,
      )
    ]
  else:
    raise config_utils.unknown('optimizer', config.name, OPTIMIZERS)
  if config.clip_norm:
    steps.insert(0, optax.clip_by_global_norm(config.clip_norm))
  if config.layer_decay != 1:
    steps.append(_layer_decay(config.layer_decay, stages))
  return optax.chain(*steps)


def _layer_decay(decay, stages):
  """Returns the transformation that slows the backbone's early layers."""
  end = 1 + max(stages.values())

  def scaled(path, update):
    part, layer = path[0].key, path[1].key
    exponent = end - stages[layer] if part == 'backbone' else 0
    return decay**exponent * update

  return optax.stateless(
    lambda updates, _: jax.tree_util.tree_map_with_path(scaled, updates)
  )


def _only_kernels(params):
  """Returns a mask of the weights that decay: no bias, and nothing of a norm.

  In a converted network these are PyTorch's weights that are no vectors.
  """

  def is_kernel(path, leaf):
    name = path[-1].key
    return name == 'kernel' or (name.endswith('weight') and leaf.ndim > 1)

  return jax.tree_util.tree_map_with_path(is_kernel, params)
