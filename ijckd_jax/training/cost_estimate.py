"""What a training step costs on a TPU, by what XLA counts in the program.

The chips need not be there, and nothing runs. docs/tpu.md explains the numbers.
"""

import dataclasses
import math
import re

import jax
from jax.experimental import topologies

from ijckd_jax.distillation import train_state
from ijckd_jax.runtime import config_utils
from ijckd_jax.training import durations
from ijckd_jax.training import experiment

NOTE = """\
From XLA's analysis of the compiled program; nothing was measured. The time of
the arithmetic is a lower limit. The accessed bytes are the operands and results
of every operation, on-chip memory included, so that the time of the memory is
too long where arrays stay on chip. The estimate is the longer of the two, with
a free interconnect. Peak rates: {source}"""
INSTALL = "pip install 'ijckd_jax[tpu]'"
GIB = 2**30
STEPS_OF_EPOCH = 100_000  # Far more than a warm-up has.


@dataclasses.dataclass(frozen=True)
class Chip:
  """Peak rates and memory of a chip, as its maker states them.

  Attributes:
    flops: bfloat16 operations per second.
    hbm_bandwidth: bytes per second.
    hbm_size: bytes.
    source: page with the numbers.
  """

  flops: float
  hbm_bandwidth: float
  hbm_size: float
  source: str


CHIPS = {
  'v4': Chip(275e12, 1228e9, 32 * GIB, 'https://cloud.google.com/tpu/docs/v4'),
  'v5e': Chip(197e12, 819e9, 16e9, 'https://cloud.google.com/tpu/docs/v5e'),
  'v5p': Chip(459e12, 2765e9, 95e9, 'https://cloud.google.com/tpu/docs/v5p'),
  'v6e': Chip(918e12, 1638e9, 32e9, 'https://cloud.google.com/tpu/docs/v6e'),
}


def chip_name(topology: str) -> str:
  """Returns the chip of a topology: 'v5e' of 'v5e:4x4'.

  Raises:
    config_utils.UserError: the form is wrong, or the chip is unknown.
  """
  match = re.fullmatch(r'(\w+):\d+(x\d+)+', topology)
  if not match:
    raise config_utils.UserError(
      f'topology {topology!r}: give CHIP:SIDES such as v5e:4x4, with a chip of '
      f'{", ".join(CHIPS)}'
    )
  if match[1] not in CHIPS:
    raise config_utils.unknown('chip', match[1], list(CHIPS))
  return match[1]


@dataclasses.dataclass(frozen=True)
class Budget:
  """What a step costs on each chip.

  Attributes:
    topology: the slice, such as 'v5e:4x4'.
    num_chips: chips of the slice.
    devices_per_chip: JAX devices per chip; 2 on v4.
    images: images per chip and step.
    flops: floating-point operations, see `program_cost`.
    bytes_accessed: bytes read and written, see `program_cost`.
    peak_bytes: largest use of HBM, the program itself included.
    gradient_bytes: size of the gradients, in float32.
    run_images: images that the whole run trains on; None if the data set does
      not know its size.
  """

  topology: str
  num_chips: int
  devices_per_chip: int
  images: int
  flops: float
  bytes_accessed: float
  peak_bytes: float
  gradient_bytes: float
  run_images: float | None

  @property
  def chip(self) -> Chip:
    """The chip's peak rates and memory."""
    return CHIPS[chip_name(self.topology)]

  @property
  def compute_seconds(self) -> float:
    """Time of the arithmetic at the chip's peak: a lower limit for a step."""
    return self.flops / self.chip.flops

  @property
  def memory_seconds(self) -> float:
    """Time of all accessed bytes at the peak of HBM, see `program_cost`."""
    return self.bytes_accessed / self.chip.hbm_bandwidth

  @property
  def seconds(self) -> float:
    """Roofline estimate of a step: the longer of both, perfectly overlapped.

    Source: Williams et al. 2009, "Roofline", Communications of the ACM 52(4).
    """
    return max(self.compute_seconds, self.memory_seconds)

  @property
  def limited_by(self) -> str:
    """The longer of both: 'arithmetic' or 'memory'."""
    by_arithmetic = self.compute_seconds >= self.memory_seconds
    return 'arithmetic' if by_arithmetic else 'memory'

  @property
  def images_per_second(self) -> float:
    """Images per second and chip, by the estimate."""
    return self.images / self.seconds

  @property
  def chip_hours(self) -> float | None:
    """Chip-hours of the run's training steps, by the estimate."""
    if self.run_images is None:
      return None
    return self.run_images / self.images_per_second / 3600

  @property
  def interconnect_bytes(self) -> float:
    """Bytes that a device sends to reduce the gradients, see `ring_bytes`."""
    num_devices = self.num_chips * self.devices_per_chip
    return ring_bytes(self.gradient_bytes, num_devices)

  def to_json(self) -> dict[str, object]:
    """Returns the fields, and the numbers that follow from them."""
    derived = ('interconnect_bytes', 'compute_seconds', 'memory_seconds')
    derived += ('seconds', 'limited_by', 'images_per_second', 'chip_hours')
    return {
      **dataclasses.asdict(self),
      **{name: getattr(self, name) for name in derived},
    }


def ring_bytes(num_bytes: float, num_devices: int) -> float:
  """Returns the bytes that each device of a ring sends in an all-reduce.

  An array of `num_bytes` is cut into as many parts as there are devices; n - 1
  parts are sent to sum them, and n - 1 to spread the sums.
  """
  return 2 * (num_devices - 1) / num_devices * num_bytes


def topology_devices(topology: str) -> tuple:
  """Returns the devices of a TPU slice, which need not be there.

  Raises:
    config_utils.UserError: there is no such slice, or no libtpu.
  """
  name = chip_name(topology)
  try:
    import libtpu  # noqa: F401
  except ModuleNotFoundError as error:
    raise config_utils.UserError(
      "compiling for a TPU takes Google's libtpu, which is not installed: "
      f'{INSTALL}'
    ) from error
  try:
    described = topologies.get_topology_desc(topology, 'tpu')
  except jax.errors.JaxRuntimeError as error:
    raise config_utils.UserError(
      f'topology {topology!r}: {config_utils.short(error)} ({name} slices: '
      f'{CHIPS[name].source})'
    ) from error
  return tuple(described.devices)


def num_chips(devices) -> int:
  """Returns how many chips the devices of a TPU slice are."""
  return len({tuple(device.coords) for device in devices})


def build(config, devices):
  """Returns the experiment of a config, to be mapped over `devices`.

  Raises:
    config_utils.UserError: the config is wrong, or the devices cannot share
      its batches.
  """
  config.mapper = 'shard_map'
  config.num_cpu_devices = 1  # The CPU computes nothing.
  config.eval_batch_size = len(devices)  # Nothing is evaluated.
  return experiment.build(config, devices=devices)


def optimizer(exp):
  """Returns the experiment's optimizer and schedule, without its data.

  The number of examples only moves the schedule's epochs. It is so large here
  that a warm-up fits into any run into which it may fit.
  """
  return exp.optimizer(STEPS_OF_EPOCH * exp.config.batch_size)


def step_arguments(exp):
  """Returns the arguments of the mapped training step, as shapes with places.

  Args:
    exp: experiment.Experiment whose mapper is a shard_map.
  """
  image_shape, rows = tuple(exp.dataset.image_shape), exp.config.batch_size
  tx, _ = optimizer(exp)

  def init(key):
    return train_state.create(
      exp.distiller.init(key, image_shape),
      tx,
      with_ema=exp.config.ema_decay > 0,
      memory=exp.memory(key, rows),  # One batch stands for the data.
    )

  key = jax.eval_shape(lambda: jax.random.key(0))
  state = jax.eval_shape(init, key)
  frozen = exp.frozen
  # With stored outputs, most steps of a run read them: that step is compiled.
  batch = exp.abstract_batch(rows, with_teacher=exp.stored is not None)
  whole, cut = exp.mapper.replicated, exp.mapper.cut
  return (
    *_place((state, frozen), whole),
    _place(batch, cut),
    _place(key, whole),
  )


def _place(tree, sharding):
  """Returns arrays or their shapes as shapes on devices."""
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
  step = exp.map_train_step(exp.train_step(optimizer(exp)[0]))
  lowered = step.lower(*step_arguments(exp))
  try:
    return lowered.compile()
  except jax.errors.JaxRuntimeError as error:
    raise does_not_fit(str(error), exp.config) from error


def does_not_fit(message: str, config) -> Exception:
  """Returns the UserError that explains an error of the compiler."""
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


def program_cost(compiled, accumulation: int) -> tuple[float, float]:
  """Returns the arithmetic of a step on one device, and the bytes it accesses.

  Both are XLA's cost analysis. A multiply-add counts as two operations, and
  multiplications with padding do not count. The bytes are the operands and
  results of every operation, in whatever memory they lie: an array that stays
  in on-chip memory counts like one in HBM.

  XLA counts a loop once, so its counts are multiplied by `accumulation`. The
  optimizer's update, which a step does once, is then counted as often; other
  loops are still counted once.

  Args:
    compiled: see `compile_step`.
    accumulation: parts in which a device works through its rows.
  """
  cost = compiled.cost_analysis()
  return accumulation * cost['flops'], accumulation * cost['bytes accessed']


def budget(exp, compiled, topology: str) -> Budget:
  """Returns what a compiled step costs on each chip.

  Args:
    exp: experiment.Experiment, see `build`.
    compiled: see `compile_step`.
    topology: the slice that it was compiled for.
  """
  devices = exp.mapper.devices
  chips = num_chips(devices)
  per_chip = len(devices) // chips
  flops, bytes_accessed = program_cost(compiled, exp.config.accumulation)
  memory = compiled.memory_analysis()
  peak = memory.peak_memory_in_bytes + memory.generated_code_size_in_bytes
  state, *_ = step_arguments(exp)
  return Budget(
    topology=topology,
    num_chips=chips,
    devices_per_chip=per_chip,
    images=exp.config.batch_size // chips,
    flops=flops * per_chip,
    bytes_accessed=bytes_accessed * per_chip,
    peak_bytes=peak * per_chip,
    gradient_bytes=sum(
      math.prod(leaf.shape) * leaf.dtype.itemsize
      for leaf in jax.tree.leaves(state.params)
    ),
    run_images=run_images(exp),
  )


def run_images(exp) -> float | None:
  """Returns how many images a run trains on; None where it is not known."""
  unit, value = durations.duration(exp.config, 'total')
  if unit == 'steps':
    return value * exp.config.batch_size
  if unit == 'examples':
    return value
  size = getattr(exp.dataset, 'train_split_size', None)
  return size and value * size * (1 - exp.dataset.validation_fraction)


def describe(found: Budget) -> str:
  """Returns the lines that the command prints."""
  chip, images = found.chip, found.images
  cores = '' if found.devices_per_chip == 1 else ' of two devices'
  rows = {
    'chips': f'{found.num_chips} {chip_name(found.topology)}{cores}, '
    f'{images:,} images each',
    'arithmetic': f'{number(found.flops / images / 1e9)} GFLOP per image, '
    f'{number(1e3 * found.compute_seconds)} ms a step at the peak of '
    f'{chip.flops / 1e12:.0f} TFLOP/s',
    'memory': f'{number(found.bytes_accessed / images / 1e6)} MB accessed per '
    f'image, {number(1e3 * found.memory_seconds)} ms a step at the peak of '
    f'{chip.hbm_bandwidth / 1e9:.0f} GB/s',
    'peak HBM': f'{number(found.peak_bytes / 1e9)} GB of '
    f'{chip.hbm_size / 1e9:.0f} GB',
    'interconnect': f'{number(found.interconnect_bytes / 1e6)} MB sent per '
    f'step and device (gradients of {number(found.gradient_bytes / 1e6)} MB, '
    'reduced in a ring)',
    'estimate': f'{number(1e3 * found.seconds)} ms a step, limited by '
    f'{found.limited_by}: {found.images_per_second:,.0f} images/s per chip, '
    f'{found.images_per_second * found.num_chips:,.0f} in all',
  }
  if found.chip_hours is not None:
    rows['run'] = (
      f'{number(found.chip_hours)} chip-hours for {found.run_images:,.0f} '
      'training images'
    )
  width = max(map(len, rows))
  lines = [f'{label.ljust(width)}  {text}' for label, text in rows.items()]
  return '\n'.join([*lines, '', NOTE.format(source=chip.source)])


def number(value: float) -> str:
  """Returns a positive number with three significant digits, or its integer."""
  digits = 2 - math.floor(math.log10(value)) if value else 0
  return f'{value:,.{max(0, digits)}f}'
