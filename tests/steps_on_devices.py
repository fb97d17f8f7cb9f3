"""Makes a few training steps on virtual devices and writes what came of them.

A process has its number of devices for life, so the tests run this as a child:

  python steps_on_devices.py OUT.npz NUM_DEVICES MAPPER SYNC_BATCH_NORM
"""

import sys

import jax
import numpy as np

NUM_STEPS = 3
BATCH_SIZE = 48
# A small one, which compiles in less time than any of the published ones.
BACKBONE = 'experiments.extension_example.backbone:PlainNet'


def make_experiment(mapper, sync_batch_norm, method='ijckd', **fields):
  """Returns a distillation on random images by SGD without momentum."""
  from ijckd_jax.bundles import bundles
  from ijckd_jax.training import experiment

  config = experiment.default_config(
    dataset='digits', teacher=BACKBONE, student=BACKBONE, method=method
  )
  config.total_steps = NUM_STEPS
  config.batch_size = config.eval_batch_size = BATCH_SIZE
  config.optimizer.momentum = 0.0
  config.optimizer.learning_rate = 0.01
  config.dataset.crop_padding = 2
  config.dataset.flip = True
  config.sync_batch_norm = sync_batch_norm
  config.mapper = mapper
  config.ema_decay = 0.5
  with config.unlocked():
    config.update_from_flattened_dict(fields)
  exp = experiment.build(experiment.teacher_config(config))
  fresh = jax.jit(exp.distiller.init, static_argnums=1)(
    jax.random.key(1), (8, 8, 1)
  )
  teacher = bundles.Bundle(
    network=exp.distiller.deployed_network,
    variables=exp.distiller.deployed(fresh, None),
    backbone_name=BACKBONE,
    pool_name=BACKBONE,
    image_shape=(8, 8, 1),
    class_names=exp.dataset.class_names,
    info={},
  ).teacher()
  return experiment.build(config, teacher=teacher)


def make_batches():
  """Returns the global batches of the steps, some rows without a label."""
  rng = np.random.default_rng(1)
  return [
    {
      'image': rng.integers(0, 256, (BATCH_SIZE, 8, 8, 1)).astype(np.uint8),
      'label': rng.integers(-1, 10, BATCH_SIZE).astype(np.int32),
      'index': np.arange(BATCH_SIZE, dtype=np.int32) + step,
      'epoch': np.full(BATCH_SIZE, step, np.int32),
    }
    for step in range(NUM_STEPS)
  ]


def initial_state(exp):
  """Returns the state before the first step."""
  from ijckd_jax.distillation import train_state

  variables = jax.jit(exp.distiller.init, static_argnums=1)(
    jax.random.key(0), (8, 8, 1)
  )
  tx, _ = exp.optimizer(BATCH_SIZE)
  memory = exp.memory(jax.random.key(3), BATCH_SIZE + NUM_STEPS)
  return train_state.create(variables, tx, with_ema=True, memory=memory)


def mapped_steps(exp, batches):
  """Returns the state and the last sums, by the experiment's mapper."""
  mapper = exp.mapper
  p_train_step = exp.map_train_step(
    exp.train_step(exp.optimizer(BATCH_SIZE)[0])
  )
  state = mapper.replicate(initial_state(exp))
  frozen = mapper.replicate(exp.frozen)
  key = mapper.replicate(jax.random.key(2))
  for batch in batches:
    state, sums = p_train_step(state, frozen, mapper.shard(batch), key)
  return state, sums


def vmapped_steps(exp, batches, num_devices):
  """Returns the same by vmap over the shards, on one device."""
  from ijckd_jax.runtime import parallel

  step = jax.jit(
    jax.vmap(
      exp.train_step(exp.optimizer(BATCH_SIZE)[0]),
      in_axes=(None, None, 0, None),
      out_axes=None,
      axis_name=parallel.AXIS,
    )
  )
  state, key = initial_state(exp), jax.random.key(2)
  for batch in batches:
    shards = jax.tree.map(
      lambda x: x.reshape(num_devices, -1, *x.shape[1:]), batch
    )
    state, sums = step(state, exp.frozen, shards, key)
  return state, sums


def flatten(state, sums):
  """Returns both as arrays by name."""
  return {
    jax.tree_util.keystr(path): np.asarray(leaf)
    for path, leaf in jax.tree_util.tree_leaves_with_path(
      {'state': state, 'sums': sums}
    )
  }


def main(out, num_devices, mapper, sync_batch_norm):
  jax.config.update('jax_num_cpu_devices', int(num_devices))
  assert jax.device_count() == int(num_devices)
  exp = make_experiment(mapper, sync_batch_norm == 'True')
  np.savez(out, **flatten(*mapped_steps(exp, make_batches())))


if __name__ == '__main__':
  main(*sys.argv[1:])
