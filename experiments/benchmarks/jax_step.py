"""This package's train step, as a process that `train_step` times."""

import argparse
import itertools

import jax
import numpy as np

from experiments.benchmarks import pairs
from experiments.benchmarks import worker
import ijckd_jax
from ijckd_jax import cpu_memory
from ijckd_jax import datasets
from ijckd_jax import experiment
from ijckd_jax import train_state
from ijckd_jax.models import cpu_conv


def make_experiment(pair: pairs.Pair, settings) -> experiment.Experiment:
  """Returns the experiment of a pair by the recipe of the tables.

  Args:
    pair: what is trained.
    settings: fields of the config that are not the default.
  """
  config = experiment.default_config(
    dataset=None, teacher=pair.teacher, student=pair.student
  )
  config.batch_size = pair.batch_size
  config.total_epochs = 240.0
  config.update(settings)
  arrays = datasets.Arrays(*pair.batch(0))
  channels = pair.image_shape[-1]
  dataset = ijckd_jax.ArrayDataset(
    train=arrays,
    test=arrays,
    class_names=[str(k) for k in range(pair.num_classes)],
    mean=channels * [pairs.MEAN],
    std=channels * [pairs.STD],
    crop_padding=pairs.CROP_PADDING,
    flip=True,
  )
  config.eval_batch_size = pair.batch_size
  return experiment.build(config, dataset=dataset)


def draw(path, shape: jax.ShapeDtypeStruct) -> np.ndarray:
  """Returns a value for an array of a network: of He's scale, or identity."""
  name = jax.tree_util.keystr(path)
  if 'scale' in name or 'var' in name:
    return np.ones(shape.shape, shape.dtype)
  if 'kernel' not in name:
    return np.zeros(shape.shape, shape.dtype)
  values = np.random.RandomState(0).standard_normal(shape.shape)
  return (values * (2 / np.prod(shape.shape[:-1])) ** 0.5).astype(shape.dtype)


def make_step(exp: experiment.Experiment, pair: pairs.Pair):
  """Returns functions that make a step, and that wait for all."""
  tx, _ = exp.optimizer(50_000)
  mapper, key = exp.mapper, jax.random.key(0)
  frozen = jax.tree.map_with_path(draw, exp.judge.frozen)
  state = train_state.create(exp.init(key), tx, with_ema=False)
  p_train_step = exp.map_train_step(exp.train_step(tx))
  state, frozen, key = (mapper.replicate(x) for x in (state, frozen, key))
  batches = []
  for seed in range(pairs.NUM_BATCHES):
    images, labels = pair.batch(seed)
    index = np.arange(len(labels), dtype=np.int32)
    batch = {
      'image': images,
      'label': labels,
      'index': index,
      'epoch': np.full_like(index, seed),
    }
    if exp.stored is not None:
      shapes = exp.abstract_batch(len(labels), with_teacher=True)['teacher']
      batch['teacher'] = jax.tree.map(
        lambda x: np.full(x.shape, 0.1, x.dtype), shapes
      )
    batches.append(batch)
  batches = itertools.cycle(batches)

  sums = None

  def step():
    nonlocal state, sums
    batch = mapper.shard(next(batches))
    state, sums = p_train_step(state, frozen, batch, key)

  def wait():
    jax.block_until_ready(state)
    assert np.isfinite(sums['loss'][0]), sums

  return step, wait


def main():
  """Serves steps."""
  parser = argparse.ArgumentParser()
  parser.add_argument('pair')
  parser.add_argument('num_devices', type=int)
  parser.add_argument('kind', choices=['fast', 'xla', 'stored'])
  args = parser.parse_args()
  jax.config.update('jax_num_cpu_devices', args.num_devices)
  cpu_memory.keep_freed()
  if args.kind == 'xla':
    cpu_conv._is_handled = lambda *_: False
  pair = pairs.PAIRS[args.pair]
  # Batch norm over the whole batch, as PyTorch's.
  settings = {
    'num_cpu_devices': args.num_devices,
    'sync_batch_norm': args.num_devices > 1,
  }
  if args.kind == 'stored':
    settings['teacher'] = {'store': {'views': 1}}
  worker.serve(*make_step(make_experiment(pair, settings), pair))


if __name__ == '__main__':
  main()
