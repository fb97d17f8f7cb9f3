"""Compiles the training step for a TPU that is not there, and says its cost.

  ijckd estimate --config cifar100 --topology v5e:4x4

What a program multiplies and moves gives the shortest time that a chip could
take for it: a bound, never a measurement. docs/tpu.md explains the numbers.
"""

import dataclasses
import json
import math
import os
import re

from ijckd_jax import config_utils
from ijckd_jax import roofline

USAGE = """\
usage: {prog} --config NAME[:key=value,...]
         --topology CHIP:SIDES [--images_per_chip N] [--json FILE]
         [--config.FIELD=VALUE ...]

Compiles a config's training step ahead of time for a TPU slice, which need not
be there (nor the data, nor the teacher), and prints what a step costs on each
chip and the time that it takes at least. Compiling takes minutes. Exits with 2
where the step does not fit into the chip's memory.

  --config NAME         as ijckd train takes it
  --config.FIELD=VALUE  sets a field: --config.dtype=bfloat16
  --topology CHIP:SIDES v5e:4x4, v6e:2x2, v4:2x2x1, v5p:2x2x1: a chip's name and
                        the sides of the slice
  --images_per_chip N   sets batch_size to N times the number of chips
  --json FILE           writes the numbers as well
  --help                this text"""
PROG = 'python -m ijckd_jax.compile'
INSTALL = "pip install 'ijckd_jax[tpu]'"


@dataclasses.dataclass(frozen=True)
class Budget:
  """What a step costs on each chip.

  Attributes:
    topology: such as 'v5e:4x4'.
    num_chips: of the slice.
    devices_per_chip: that JAX lists; 2 on v4.
    images: of a chip in a step.
    dtype: of the computation.
    flops: that XLA counts; padding is none.
    hbm_bytes: roofline.Traffic.hbm.
    on_chip_bytes: roofline.Traffic.on_chip.
    xla_bytes: 'bytes accessed' of XLA's cost analysis: of all memories, and of
      a copy on-chip both sides.
    peak_bytes: HBM in use at the most, the program itself included.
    gradient_bytes: of the gradients, in float32.
    collectives: operations between devices.
    reduced_bytes: what is summed over the devices.
    interconnect_bytes: sent by a chip.
    run_images: that the run trains on; None where the data set does not say how
      many it has.
  """

  topology: str
  num_chips: int
  devices_per_chip: int
  images: int
  dtype: str
  flops: float
  hbm_bytes: float
  on_chip_bytes: float
  xla_bytes: float
  peak_bytes: float
  gradient_bytes: float
  collectives: int
  reduced_bytes: float
  interconnect_bytes: float
  run_images: float | None

  @property
  def chip(self) -> roofline.Chip:
    """What the chip can do."""
    return roofline.chip(self.topology)[1]

  @property
  def bound(self) -> roofline.Bound:
    """The shortest time of a step, by arithmetic and by traffic to HBM."""
    return roofline.bound(self.flops, self.hbm_bytes, self.chip)

  @property
  def images_per_second(self) -> float:
    """Of a chip, at most."""
    return self.images / self.bound.seconds

  @property
  def chip_hours(self) -> float | None:
    """Of the whole run's training steps, at least."""
    if self.run_images is None:
      return None
    return self.run_images / self.images_per_second / 3600

  def to_json(self) -> dict[str, object]:
    """Returns its fields, and what follows from them."""
    return {
      **dataclasses.asdict(self),
      'compute_seconds': self.bound.compute_seconds,
      'memory_seconds': self.bound.memory_seconds,
      'bound_seconds': self.bound.seconds,
      'bound_by': self.bound.side,
      'images_per_second_per_chip_at_most': self.images_per_second,
      'xla_bytes_seconds': self.xla_bytes / self.chip.hbm_bandwidth,
      'chip_hours_at_least': self.chip_hours,
    }


def topology_devices(topology: str) -> tuple:
  """Returns the devices of a TPU slice that need not be there.

  Raises:
    config_utils.UserError: there is no such slice, or no libtpu.
  """
  name, _ = roofline.chip(topology)
  try:
    import libtpu  # noqa: F401
  except ModuleNotFoundError as error:
    raise config_utils.UserError(
      "compiling for a TPU takes Google's libtpu, which is not installed: "
      f'{INSTALL}'
    ) from error
  import jax
  from jax.experimental import topologies

  try:
    described = topologies.get_topology_desc(topology, 'tpu')
  except jax.errors.JaxRuntimeError as error:
    raise config_utils.UserError(
      f'topology {topology!r}: {config_utils.short(error)} ({name} slices are '
      "listed in Google's documentation, see docs/tpu.md)"
    ) from error
  return tuple(described.devices)


def build(config, devices):
  """Returns the experiment of a config, to be mapped over `devices`.

  Raises:
    config_utils.UserError: the config is wrong, or the devices cannot share
      its batches.
  """
  from ijckd_jax import experiment
  from ijckd_jax import parallel

  if config.batch_size % len(devices):
    raise config_utils.UserError(
      f'batch_size={config.batch_size}: it must be a multiple of the '
      f'{len(devices)} devices of the slice'
    )
  rows = config.batch_size // len(devices)
  if config.accumulation < 1 or rows % config.accumulation:
    raise config_utils.UserError(
      f'accumulation={config.accumulation}: it must divide the {rows} rows '
      'that a device gets of a batch'
    )
  config.num_cpu_devices = 1  # None computes.
  exp = experiment.build(config)
  mapper = parallel.Mapper('shard_map', devices)
  return dataclasses.replace(exp, mapper=mapper)


def optimizer(exp):
  """Returns the experiment's optimizer and schedule, without its data.

  How many examples there are only moves the schedule's epochs: here there are
  as many as fill one batch.
  """
  return exp.optimizer(exp.config.batch_size)


def step_arguments(exp):
  """Returns the arguments of the mapped training step, as shapes with places.

  Args:
    exp: experiment.Experiment whose mapper is a shard_map.
  """
  import jax

  from ijckd_jax import train_state

  image_shape, rows = tuple(exp.dataset.image_shape), exp.config.batch_size
  tx, _ = optimizer(exp)

  def init(key):
    return train_state.create(
      exp.distiller.init(key, image_shape),
      tx,
      with_ema=exp.config.ema_decay > 0,
      memory=exp.memory(key, rows),  # As many examples as there are known.
    )

  key = jax.eval_shape(lambda: jax.random.key(0))
  state = jax.eval_shape(init, key)
  frozen = exp.distiller.frozen
  # The step that most of a run is made of.
  batch = exp.abstract_batch(rows, with_teacher=exp.stored is not None)
  whole, cut = exp.mapper.replicated, exp.mapper.cut
  return (
    *_place((state, frozen), whole),
    _place(batch, cut),
    _place(key, whole),
  )


def _place(tree, sharding):
  """Returns arrays or their shapes as shapes on devices."""
  import jax

  return jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree
  )


def compile_step(exp):
  """Returns the compiled training step.

  Args:
    exp: experiment.Experiment, see `build`.

  Raises:
    config_utils.UserError: it does not fit into the chip's memory.
  """
  import jax

  step = exp.map_train_step(exp.train_step(optimizer(exp)[0]))
  lowered = step.lower(*step_arguments(exp))
  try:
    return lowered.compile()
  except jax.errors.JaxRuntimeError as error:
    raise does_not_fit(str(error), exp.config) from error


def does_not_fit(message: str, config) -> Exception:
  """Returns what the user is told of a compiler's error."""
  size = r'([\d.]+[KMGT])\b'
  found = re.search(rf'Ran out of memory.*?{size}.*?{size}', message, re.DOTALL)
  if not found:
    return config_utils.UserError(
      f'XLA cannot compile the step: {config_utils.short(message)}'
    )
  return config_utils.UserError(
    f'the step does not fit: it takes {found[1]} of the {found[2]} HBM that a '
    'device has; give fewer images per chip, work through them in parts '
    f'(--config.accumulation={2 * config.accumulation})'
    + ('' if config.dtype == 'bfloat16' else ', or --config.dtype=bfloat16')
  )


def budget(exp, compiled, topology: str) -> Budget:
  """Returns what a compiled step costs on each chip.

  Args:
    exp: experiment.Experiment, see `build`.
    compiled: see `compile_step`.
    topology: for which it was compiled.
  """
  import jax

  devices = exp.mapper.devices
  num_chips = len({tuple(device.coords) for device in devices})
  per_chip = len(devices) // num_chips
  text = compiled.as_text()
  moved = roofline.traffic(text) * per_chip
  cost, memory = compiled.cost_analysis(), compiled.memory_analysis()
  # XLA counts a loop as if it turned once. Nearly all is in the loop.
  pieces = exp.config.accumulation
  turns = pieces if pieces in roofline.loop_turns(text) else 1
  peak = memory.peak_memory_in_bytes + memory.generated_code_size_in_bytes
  state, *_ = step_arguments(exp)
  return Budget(
    topology=topology,
    num_chips=num_chips,
    devices_per_chip=per_chip,
    images=exp.config.batch_size // num_chips,
    dtype=exp.config.dtype,
    flops=cost['flops'] * turns * per_chip,
    hbm_bytes=moved.hbm,
    on_chip_bytes=moved.on_chip,
    xla_bytes=cost['bytes accessed'] * turns * per_chip,
    peak_bytes=peak * per_chip,
    gradient_bytes=sum(
      math.prod(leaf.shape) * leaf.dtype.itemsize
      for leaf in jax.tree.leaves(state.params)
    ),
    collectives=moved.collectives // per_chip,
    reduced_bytes=moved.reduced / per_chip,
    interconnect_bytes=moved.interconnect,
    run_images=run_images(exp),
  )


def run_images(exp) -> float | None:
  """Returns how many images a run trains on; None where it is not known."""
  unit, value = config_utils.duration(exp.config, 'total')
  if unit == 'steps':
    return value * exp.config.batch_size
  if unit == 'examples':
    return value
  size = getattr(exp.dataset, 'train_split_size', None)
  return size and value * size * (1 - exp.dataset.validation_fraction)


def describe(found: Budget) -> str:
  """Returns the lines that the command prints."""
  name, peak = roofline.chip(found.topology)
  bound, images, number = found.bound, found.images, roofline.number
  cores = '' if found.devices_per_chip == 1 else ' of two devices'
  rows = [
    ('chips', f'{found.num_chips} {name}{cores}, {images:,} images each'),
    ('arithmetic', f'{number(found.flops / images / 1e9)} GFLOP per image'),
    (
      'HBM traffic',
      f'{number(found.hbm_bytes / images / 1e6)} MB per image (XLA\'s "bytes '
      f'accessed", on-chip memory included: '
      f'{number(found.xla_bytes / images / 1e6)} MB, or '
      f'{number(1e3 * found.xla_bytes / peak.hbm_bandwidth)} ms)',
    ),
    (
      'intensity',
      f'{found.flops / found.hbm_bytes:.0f} FLOP per byte of HBM; the chip '
      f'balances {peak.flops / peak.hbm_bandwidth:.0f}',
    ),
    (
      'peak HBM',
      f'{number(found.peak_bytes / 1e9)} GB of {peak.hbm_size / 1e9:.0f} GB',
    ),
    (
      'interconnect',
      f'{number(found.interconnect_bytes / 1e6)} MB per step and chip, by '
      f'{found.collectives} all-reduce{"s" * (found.collectives != 1)} '
      f'(gradients are {number(found.gradient_bytes / 1e6)} MB)',
    ),
    (
      'a step takes',
      f'at least {number(1e3 * bound.seconds)} ms, bound by {bound.side} '
      f'(arithmetic {number(1e3 * bound.compute_seconds)} ms, memory '
      f'{number(1e3 * bound.memory_seconds)} ms)',
    ),
    (
      'that is',
      f'at most {found.images_per_second:,.0f} images/s per chip, '
      f'{found.images_per_second * found.num_chips:,.0f} in all',
    ),
  ]
  if found.chip_hours is not None:
    rows.append(
      (
        'the run takes',
        f'at least {number(found.chip_hours)} chip-hours for '
        f'{found.run_images:,.0f} images',
      )
    )
  return (
    f'{roofline.report(rows)}\n\n'
    'A bound from a compiled program, not a measurement: at peak FLOP/s '
    '(bfloat16) and peak\nHBM bandwidth, perfectly overlapped, with the '
    f'interconnect free ({peak.source}).'
  )


def main(argv: list[str], prog: str = PROG) -> int:
  """Runs the command; returns its exit code."""
  if '--help' in argv or '-h' in argv:
    print(USAGE.format(prog=prog))
    return 0
  parser = config_utils.ArgumentParser(
    prog=prog, add_help=False, allow_abbrev=False
  )
  parser.add_argument('--config', required=True)
  parser.add_argument('--topology', required=True)
  parser.add_argument('--images_per_chip', type=int)
  parser.add_argument('--json', type=config_utils.expand)
  flags, overrides = parser.parse_known_args(argv)
  if flags.json and not os.path.isdir(os.path.dirname(flags.json) or '.'):
    raise config_utils.UserError(
      f'--json {flags.json}: there is no such folder'
    )
  config = config_utils.load(flags.config)
  config_utils.apply_flags(config, overrides)
  prepare_environment()
  devices = topology_devices(flags.topology)
  if flags.images_per_chip is not None:
    config_utils.check_positive('--images_per_chip', flags.images_per_chip)
    num_chips = len({tuple(device.coords) for device in devices})
    config.batch_size = flags.images_per_chip * num_chips
  exp = build(config, devices)
  found = budget(exp, compile_step(exp), flags.topology)
  print(describe(found))
  if flags.json:
    try:
      with open(flags.json, 'w') as file:
        json.dump(found.to_json(), file, indent=2)
    except OSError as error:
      raise config_utils.UserError(
        f'cannot write --json {flags.json}: {config_utils.reason(error)}'
      ) from error
  return 0


def prepare_environment() -> None:
  """Keeps JAX off any accelerator, and libtpu from looking and logging."""
  os.environ['JAX_PLATFORMS'] = 'cpu'
  os.environ['TPU_SKIP_MDS_QUERY'] = '1'  # Where Cloud TPU tells what it is.
  # What it would ask; without, it complains.
  os.environ.setdefault('TPU_ACCELERATOR_TYPE', 'v5litepod-4')
  os.environ.setdefault('TPU_WORKER_HOSTNAMES', 'localhost')
  # Only compiling, it does not need the TPU that another process may hold.
  os.environ['ALLOW_MULTIPLE_LIBTPU_LOAD'] = '1'
  os.environ.setdefault('TPU_MIN_LOG_LEVEL', '3')
  os.environ.setdefault('TPU_STDERR_LOG_LEVEL', '3')
  os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '3')


if __name__ == '__main__':
  config_utils.run_command(main)
