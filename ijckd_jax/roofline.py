"""What a compiled TPU program moves and multiplies, and what that takes.

The text that is read is XLA's optimized HLO for one device, whose shapes say
where an array lies: `bf16[256,56,56,64]{0,3,2,1:T(8,128)(2,1)S(1)}` is in the
on-chip memory (VMEM), without `S(1)` it is in HBM.
"""

from collections.abc import Sequence
import dataclasses
import math
import re

from ijckd_jax import config_utils

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
  """What a chip can do at most, by its maker's account.

  Attributes:
    flops: floating-point operations a second, in bfloat16.
    hbm_bandwidth: bytes a second.
    hbm_size: bytes.
    source: where the numbers stand.
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


def chip(topology: str) -> tuple[str, Chip]:
  """Returns the chip of a topology such as 'v5e:4x4': its name, and what it is.

  Raises:
    config_utils.UserError: it is not of that form, or the chip is unknown.
  """
  match = re.fullmatch(r'(\w+):\d+(x\d+)+', topology)
  if not match:
    raise config_utils.UserError(
      f'topology {topology!r}: give CHIP:SIDES such as v5e:4x4, with a chip of '
      f'{", ".join(CHIPS)}'
    )
  if match[1] not in CHIPS:
    raise config_utils.unknown('chip', match[1], list(CHIPS))
  return match[1], CHIPS[match[1]]


@dataclasses.dataclass(frozen=True)
class Traffic:
  """What one device moves while a program runs once, in bytes.

  Attributes:
    hbm: read from and written to HBM.
    on_chip: read from and written to on-chip memories.
    collectives: operations between devices.
    reduced: result of the all-reduces.
    interconnect: sent by the device, and as many received.
  """

  hbm: float = 0.0
  on_chip: float = 0.0
  collectives: int = 0
  reduced: float = 0.0
  interconnect: float = 0.0

  def __add__(self, other: 'Traffic') -> 'Traffic':
    pairs = zip(
      dataclasses.astuple(self), dataclasses.astuple(other), strict=True
    )
    return Traffic(*(one + another for one, another in pairs))

  def __mul__(self, times: int) -> 'Traffic':
    return Traffic(*(times * value for value in dataclasses.astuple(self)))


# `%name = shapes operation(operands), attributes`; the shapes of a tuple have
# parentheses around them and, in their tilings, within.
_INSTRUCTION = re.compile(
  r'\s+(?:ROOT )?%(?P<name>\S+) = (?P<shapes>\(.*?\)|\S+) '
  r'(?P<op>[a-z][a-z\-]*)\((?P<operands>.*?)\)(?P<attributes>, .*|$)'
)
_SHAPE = re.compile(r'\b([a-z]+\d*)\[([\d,]*)\](?:\{([^}]*)\})?')
_BITS = re.compile(r'\d+')
# What is a name for bytes that lie there already.
_FREE = (
  *('parameter', 'constant', 'tuple', 'get-tuple-element', 'bitcast'),
  *('after-all', 'partition-id', 'replica-id', 'opt-barrier'),
)
_COLLECTIVES = (
  *('all-reduce', 'all-gather', 'reduce-scatter', 'all-to-all'),
  'collective-permute',
)


@dataclasses.dataclass(frozen=True)
class _Array:
  """An operand or a result: what it holds, what it fills, and where it lies."""

  size: int  # Bytes.
  tiled: int  # In whole tiles.
  in_hbm: bool


def _arrays(shapes: str) -> list[_Array]:
  """Returns the arrays of an instruction's shapes.

  An array fills whole tiles: in `{1,0:T(8,128)}` the last dimension is padded
  to 128 and the one before it to 8.
  """
  arrays = []
  for kind, dims, layout in _SHAPE.findall(shapes):
    dims = [int(dim) for dim in dims.split(',') if dim]
    padded = list(dims)
    order, _, tiling = layout.partition(':')
    minor_to_major = [int(axis) for axis in order.split(',') if axis]
    tile = re.match(r'T\(([\d,]+)\)', tiling)
    if tile:
      sides = [int(side) for side in tile[1].split(',')]
      for axis, side in zip(minor_to_major, reversed(sides), strict=False):
        padded[axis] = -(-padded[axis] // side) * side
    bits = _BITS.search(kind)
    width = max(1, int(bits[0]) // 8 if bits else 1)
    arrays.append(
      _Array(
        width * math.prod(dims), width * math.prod(padded), 'S(' not in layout
      )
    )
  return arrays


def _parse(hlo: str):
  """Returns the instructions of each computation, and the entry's name."""
  computations, entry, current = {}, None, None
  for line in hlo.splitlines():
    if line.startswith(('%', 'ENTRY ')):
      name = re.search(r'%(\S+)', line)[1]
      current = computations[name] = []
      entry = name if line.startswith('ENTRY') else entry
    elif current is not None and (match := _INSTRUCTION.match(line)):
      current.append(match)
  return computations, entry


def traffic(hlo: str) -> Traffic:
  """Returns what one device moves, by the text of its optimized program.

  Every operation reads its operands and writes its results once, each from or
  to the memory where it lies, in whole unless it takes slices; a copy or a
  slice that is brought on-chip ahead of its use is one read of HBM, and its use
  is none. What XLA fuses into an operation moves nothing. Loops count as often
  as they turn. Of all-reduces, a ring's share is counted: 2 (n - 1) / n times
  the result.
  """
  computations, entry = _parse(hlo)
  return _of_computation(entry, computations, _group_size(hlo))


def loop_turns(hlo: str) -> list[int]:
  """Returns how often each loop of a program turns."""
  computations, _ = _parse(hlo)
  return [
    _turns(found, computations)
    for instructions in computations.values()
    for found in instructions
    if found['op'] == 'while'
  ]


def _turns(loop, computations) -> int:
  """Returns how often a loop turns: by XLA's word, or what it counts up to."""
  known = re.search(r'"known_trip_count":\{"n":"(\d+)"\}', loop['attributes'])
  if known:
    return int(known[1])
  condition = re.search(r'condition=%([\w.\-]+)', loop['attributes'])[1]
  limits = [
    int(found['operands'])
    for found in computations[condition]
    if found['op'] == 'constant' and found['operands'].isdigit()
  ]
  return limits[0] if len(limits) == 1 else 1


def _group_size(hlo: str) -> int:
  """Returns between how many devices a program runs."""
  header = hlo.partition('\n')[0]
  counts = re.findall(r'(?:num_partitions|replica_count)=(\d+)', header)
  return math.prod(map(int, counts))


def _operand_names(instruction) -> list[str]:
  return re.findall(r'%([\w.\-]+)', instruction['operands'])


def _of_computation(name, computations, num_devices) -> Traffic:
  instructions = computations[name]
  arrays = {found['name']: _arrays(found['shapes']) for found in instructions}
  total = Traffic()
  for found in instructions:
    op, attributes = found['op'], found['attributes']
    if op in _FREE or op.endswith('-done') or 'ConcatBitcast' in attributes:
      continue
    if op in ('while', 'call', 'conditional'):
      times = _turns(found, computations) if op == 'while' else 1
      called = re.findall(r'(?:body|to_apply)=%([\w.\-]+)', attributes)
      for inner in called:
        part = _of_computation(inner, computations, num_devices)
        total += part * times
      continue
    results = arrays[found['name']]
    operands = [
      array
      for operand in _operand_names(found)
      for array in arrays.get(operand, ())
    ]
    if op in ('copy-start', 'slice-start'):
      # Results are aliases too: copies are (target, source, context), slices
      # ((sources), target, context).
      target = results[0] if op == 'copy-start' else results[len(operands)]
      source = dataclasses.replace(target, in_hbm=operands[0].in_hbm)
      results, operands = [target], [source]
    elif op == 'fusion':
      fused = re.search(r'calls=%([\w.\-]+)', attributes)
      if fused and len(operands) == len(_operand_names(found)):
        operands = _sliced(operands, computations[fused[1]])
    total += _of_operation(op, results, operands, num_devices)
  return total


def _sliced(operands, fused) -> list[_Array]:
  """Returns a fusion's operands, those as slices of which it takes slices."""
  taken = []
  for i, operand in enumerate(operands):
    parameter = [
      found['name']
      for found in fused
      if found['op'] == 'parameter' and found['operands'] == str(i)
    ]
    users = [
      found for found in fused if set(parameter) & set(_operand_names(found))
    ]
    if users and all(found['op'] == 'dynamic-slice' for found in users):
      tiled = sum(_arrays(found['shapes'])[0].tiled for found in users)
      operand = dataclasses.replace(operand, tiled=min(tiled, operand.tiled))
    taken.append(operand)
  return taken


def _of_operation(op, results, operands, num_devices) -> Traffic:
  moved = [*results, *operands]
  hbm = sum(array.tiled for array in moved if array.in_hbm)
  on_chip = sum(array.tiled for array in moved if not array.in_hbm)
  kind = op.removesuffix('-start')
  if kind not in _COLLECTIVES:
    return Traffic(hbm, on_chip)
  share = (num_devices - 1) / num_devices
  whole = sum(array.size for array in operands)
  if kind == 'all-reduce':
    return Traffic(hbm, on_chip, 1, whole, 2 * share * whole)
  if kind == 'all-gather':
    whole *= num_devices
  return Traffic(hbm, on_chip, 1, 0.0, share * whole)


@dataclasses.dataclass(frozen=True)
class Bound:
  """The shortest time in which a chip can do a step.

  Attributes:
    compute_seconds: of the arithmetic alone, at the chip's peak.
    memory_seconds: of the traffic to HBM alone, at its peak.
  """

  compute_seconds: float
  memory_seconds: float

  @property
  def seconds(self) -> float:
    """Of both, perfectly overlapped."""
    return max(self.compute_seconds, self.memory_seconds)

  @property
  def side(self) -> str:
    """Which of both it is: 'arithmetic' or 'memory'."""
    slower = self.compute_seconds >= self.memory_seconds
    return 'arithmetic' if slower else 'memory'


def bound(flops: float, hbm_bytes: float, peak: Chip) -> Bound:
  """Returns the roofline bound of a step.

  Args:
    flops: floating-point operations of a chip in a step.
    hbm_bytes: bytes that it reads and writes.
    peak: of the chip.

  Source: Williams et al. 2009, "Roofline", Communications of the ACM 52(4).
  """
  return Bound(flops / peak.flops, hbm_bytes / peak.hbm_bandwidth)


def report(rows: Sequence[tuple[str, str]]) -> str:
  """Returns lines of a label and what it says, aligned."""
  width = max(len(label) for label, _ in rows)
  return '\n'.join(f'{label.ljust(width)}  {text}' for label, text in rows)


def number(value: float) -> str:
  """Returns a positive number with three digits that count, or its integer."""
  digits = 2 - math.floor(math.log10(value)) if value else 0
  return f'{value:,.{max(0, digits)}f}'
