"""This package's train step, as a process that `train_step` times."""

import argparse
import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np

from experiments.benchmarks import pairs
from experiments.benchmarks import worker
import ijckd_jax
from ijckd_jax.data import datasets
from ijckd_jax.distillation import train_state
from ijckd_jax.evaluation import cost
from ijckd_jax.models import cpu_conv
from ijckd_jax.runtime import cpu_memory
from ijckd_jax.training import experiment
from ijckd_jax.training import feeding


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
  config.optimizer.learning_rate = pairs.LEARNING_RATE
  config.update(settings)
  arrays = datasets.Arrays(*pair.batch(0))
  channels = pair.image_shape[-1]
  dataset = ijckd_jax.ArrayDataset(
    train=arrays,
    test=arrays,
    class_names=[str(k) for k in range(pair.num_classes)],
    mean=channels * [pairs.MEAN],
    std=channels * [pairs.STD],
    crop_padding=pair.crop_padding,
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


def make_step(
  exp: experiment.Experiment, pair: pairs.Pair, steps_a_call: int = 0
):
  """Returns functions that make a step, that wait, and that describe it.

  Args:
    exp: of `make_experiment`.
    pair: what is trained.
    steps_a_call: 0: each call makes one step on a batch that it is given, as
      feeding.HostFeed calls it. Above 0: each call makes this number of steps
      on images that lie on the device, as feeding.DeviceFeed calls it.

  Returns:
    `step()`, which returns the metrics' sums without waiting; `wait()`; and
    `facts()`: 'device_memory', the bytes that XLA's plan of the program takes,
    and 'flops' for an image.
  """
  tx, _ = exp.optimizer(50_000)
  mapper, key = exp.mapper, jax.random.key(0)
  frozen = jax.tree.map_with_path(draw, exp.frozen)
  state = train_state.create(exp.init(key), tx, with_ema=False)
  body = exp.train_step(tx)
  batches = [make_batch(exp, pair, seed) for seed in range(pairs.NUM_BATCHES)]
  state, frozen, key = (mapper.replicate(x) for x in (state, frozen, key))
  if steps_a_call:
    mapped = exp.map_train_steps(body)
    calls = [in_one_call(mapper, batches, steps_a_call)]
  else:
    mapped = exp.map_train_step(body)
    calls = [(mapper.shard(batch),) for batch in batches]
  turns, sums = itertools.cycle(calls), None

  def step():
    nonlocal state, sums
    state, sums = mapped(state, frozen, *next(turns), key)
    return sums

  def wait():
    jax.block_until_ready(state)
    assert np.isfinite(sums['loss'][0]).all(), sums

  def facts():
    program = mapped.lower(state, frozen, *calls[0], key).compile()
    plan = program.memory_analysis()
    memory = plan.argument_size_in_bytes + plan.temp_size_in_bytes
    memory += plan.output_size_in_bytes - plan.alias_size_in_bytes
    return {'device_memory': memory, 'flops': flops(exp)}

  return step, wait, facts


def make_parts(exp: experiment.Experiment):
  """Returns functions that make a part of a step by name, and that wait.

  Args:
    exp: of `make_experiment`.

  Returns:
    By name: 'teacher', its forward pass; 'student', its forward pass with the
    batch's statistics and the connector; 'gradient', the objective's value and
    gradient, with the teacher's outputs given. And `wait()`; and `facts()`:
    the floating-point operations of each part for an image.
  """
  distiller, shape = exp.distiller, tuple(exp.dataset.image_shape)
  frozen, variables = jax.tree.map_with_path(
    draw,
    (
      exp.frozen,
      jax.eval_shape(lambda: distiller.init(jax.random.key(0), shape)),
    ),
  )
  rows = exp.dataset.load('train')
  batch = {'image': rows.images, 'label': rows.labels}
  frozen, variables, batch = jax.device_put((frozen, variables, batch))

  @jax.jit
  @cpu_conv.fast_convolutions()
  def teacher(frozen, images):
    given = distiller.run_teachers(frozen, images)
    return [(one.final, one.logits) for one in given]

  @jax.jit
  @cpu_conv.fast_convolutions()
  def student(variables, frozen, images):
    made, batch_stats = distiller.run_student(variables, frozen, images)
    return made[0].connected.map, made[0].logits, batch_stats

  @jax.jit
  @cpu_conv.fast_convolutions()
  def gradient(variables, frozen, given, batch):
    def loss_fn(params):
      own = {**variables, 'params': params}
      total, (_, _, batch_stats) = distiller.objective(
        own, frozen, given, batch
      )
      return total, batch_stats

    return jax.value_and_grad(loss_fn, has_aux=True)(variables['params'])

  given = jax.jit(distiller.run_teachers)(frozen, batch['image'])
  last = None

  def keep(function, *arguments):
    def call():
      nonlocal last
      last = function(*arguments)

    return call

  return (
    {
      'teacher': keep(teacher, frozen, batch['image']),
      'student': keep(student, variables, frozen, batch['image']),
      'gradient': keep(gradient, variables, frozen, given, batch),
    },
    lambda: jax.block_until_ready(last),
    lambda: part_flops(exp),
  )


def flops(exp: experiment.Experiment) -> int:
  """Returns the floating-point operations of training on one image."""
  parts = part_flops(exp)
  return parts['teacher'] + parts['gradient']


def part_flops(exp: experiment.Experiment) -> dict[str, int]:
  """Returns the floating-point operations of a step's parts on one image.

  As they are usually counted: two for each multiply-add of a convolution or a
  product, in a forward pass of the teacher, and in a forward pass of the
  student with its connector; times three for the student's gradient, because
  the backward pass costs two.
  """
  teacher, network = exp.teacher, exp.distiller.deployed_network
  shape = tuple(exp.dataset.image_shape)
  image = jax.ShapeDtypeStruct((1, *shape), jnp.uint8)
  student = jax.eval_shape(
    lambda key: exp.distiller.deployed(
      exp.distiller.init(key, shape), exp.frozen
    ),
    jax.random.key(0),
  )
  taught = cost.multiply_adds(
    lambda arrays, x: teacher(arrays, x).logits, teacher.arrays, image
  )
  trained = cost.multiply_adds(
    lambda variables, x: network(variables, network.preprocessing(x)).logits,
    student,
    image,
  )
  return {
    'teacher': 2 * taught,
    'student': 2 * trained,
    'gradient': 6 * trained,
  }


def make_batch(exp: experiment.Experiment, pair: pairs.Pair, seed: int):
  """Returns a batch on the host, with the teacher's outputs if stored."""
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
  return batch


def in_one_call(mapper, batches, num_steps: int):
  """Returns steps.train_steps' plan, data and count for batches in turn."""
  data = feeding.data_of(
    *(np.concatenate([x[name] for x in batches]) for name in ('image', 'label'))
  )
  num_rows = len(batches[0]['label'])
  rows = np.arange(num_rows)[:, None]
  turns = np.arange(num_steps) % len(batches)
  plan = {
    'index': (rows + num_rows * turns).astype(np.int32),
    'epoch': np.broadcast_to(turns, (num_rows, num_steps)).astype(np.int32),
  }
  return (
    mapper.shard(plan),
    mapper.replicate(data),
    mapper.replicate(np.int32(num_steps)),
  )


def print_losses(exp, pair, num_steps):
  """Prints the loss of each of the first steps, as a JSON list."""
  step, _, _ = make_step(exp, pair)
  losses = []
  for _ in range(num_steps):
    total, count = step()['loss']
    losses.append(float(total) / float(count))
  print(json.dumps(losses))


def main():
  """Serves steps."""
  parser = argparse.ArgumentParser()
  parser.add_argument('pair', choices=pairs.ALL_PAIRS)
  parser.add_argument('num_devices', type=int)
  parser.add_argument('kind', choices=['fast', 'xla', 'stored'])
  parser.add_argument(
    '--settings', type=json.loads, default={}, help='fields of the config, JSON'
  )
  parser.add_argument('--steps_a_call', type=int, default=0)
  parser.add_argument(
    '--small', action='store_true', help='few small images, to rehearse'
  )
  parser.add_argument(
    '--losses', type=int, help='print so many losses in place of serving'
  )
  parser.add_argument(
    '--parts', action='store_true', help='serve the parts of a step'
  )
  args = parser.parse_args()
  if jax.config.jax_platforms == 'cpu':
    jax.config.update('jax_num_cpu_devices', args.num_devices)
    cpu_memory.keep_freed()
  if args.kind == 'xla':
    cpu_conv._is_handled = lambda *_: False
  pair = pairs.ALL_PAIRS[args.pair]
  pair = pair.small() if args.small else pair
  # Batch norm over the whole batch, as PyTorch's.
  settings = {
    'num_cpu_devices': args.num_devices,
    'sync_batch_norm': args.num_devices > 1,
    **args.settings,
  }
  if args.kind == 'stored':
    settings['teacher'] = {'store': {'views': 1}}
  exp = make_experiment(pair, settings)
  if args.losses:
    print_losses(exp, pair, args.losses)
  elif args.parts:
    worker.serve_kinds(*make_parts(exp))
  else:
    worker.serve(*make_step(exp, pair, args.steps_a_call))


if __name__ == '__main__':
  main()
