"""A traced function as an ONNX graph, in few nodes.

Three things keep the graph small:

* A transposition writes nothing. It changes which axis of the array each axis
  of the tensor holds; a node that needs another order transposes its input. So
  maps keep their channels first from one convolution to the next.
* A product with a constant and a sum with one wait beside the tensor, until a
  convolution or matrix product before or after it takes them into its weights.
* A node is written when another one reads it.

onnx_writers.py has the primitives.
"""

import collections
from collections.abc import Callable
from collections.abc import Mapping
from collections.abc import Sequence
import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np

IMAGES = 'images'  # The input's name.
# Primitives that call a function.
CALLS = frozenset(
  'checkpoint closed_call core_call custom_jvp_call custom_vjp_call jit pjit '
  'remat remat2'.split()
)


class Unsupported(ValueError):
  """A function does something that no writer can say in ONNX."""


@dataclasses.dataclass(frozen=True, eq=False)
class Value:
  """An array of the function: `scale` times a tensor of the graph + `shift`.

  Attributes:
    axes: for each axis of the tensor, the axis of the array that it holds. The
      tensor has all axes of the array, but for some along which it is constant.
    shape: of the array; 1 along axes where the tensor is yet to be repeated.
    node: kind, inputs (names or constants) and attributes of what makes it.
    scale: constant that broadcasts to the array's shape.
    shift: likewise.
    name: of the tensor; '' until its node is written.
  """

  axes: tuple[int, ...]
  shape: tuple[Any, ...]
  node: tuple[str, Sequence[Any], dict[str, Any]] | None = None
  scale: Any = 1.0
  shift: Any = 0.0
  name: str = ''


class Graph:
  """Nodes and constants.

  Attributes:
    nodes: kind, names of inputs, names of outputs, and attributes of each.
    constants: arrays by name.
  """

  def __init__(self, writers: Mapping[str, Callable[..., Any]], batch: Any):
    """Starts an empty graph.

    Args:
      writers: `(graph, equation, *operands) -> results` by primitive.
      batch: the symbolic size of a batch.
    """
    self.nodes, self.constants = [], {}
    self._writers, self._batch, self._names = writers, batch, {}

  def run(self, jaxpr, constants, operands):
    """Writes a jaxpr; returns what it gives, as Values and constants."""
    found = {}
    uses = collections.Counter(
      var
      for variables in (*(x.invars for x in jaxpr.eqns), jaxpr.outvars)
      for var in variables
      if not hasattr(var, 'val')
    )

    def keep(variables, values):
      for var, x in zip(variables, values, strict=True):
        # What is pending is to be taken in by one reader, not by each.
        found[var] = self.settled(x) if uses[var] > 1 else x

    def read(var):
      is_literal = hasattr(var, 'val')
      return np.asarray(var.val, var.aval.dtype) if is_literal else found[var]

    keep(jaxpr.constvars, map(np.asarray, constants))
    keep(
      jaxpr.invars,
      (x if isinstance(x, Value) else np.asarray(x) for x in operands),
    )
    for equation in jaxpr.eqns:
      operands = list(map(read, equation.invars))
      keep(equation.outvars, self._results(equation, operands))
    return list(map(read, jaxpr.outvars))

  def _results(self, equation, operands):
    """Returns what an equation gives, as Values and constants."""
    name, params = equation.primitive.name, equation.params
    if name in CALLS:
      inner = params['jaxpr'] if 'jaxpr' in params else params['call_jaxpr']
      constants = getattr(inner, 'consts', ())
      return self.run(getattr(inner, 'jaxpr', inner), constants, operands)
    if not any(isinstance(x, Value) for x in operands):
      if all(is_known(v.aval.shape) for v in equation.outvars):
        return _evaluated(equation, operands)
      if name != 'broadcast_in_dim':
        operands = [self.stored(x) for x in operands]
    if name == 'call_exported':
      raise Unsupported(
        'it holds a program. The weights of a converted network without a '
        "connector go to PyTorch by 'ijckd weights export', and from there by "
        'torch.onnx'
      )
    if name not in self._writers:
      raise Unsupported(f'no writer for the primitive {name}')
    given = self._writers[name](self, equation, *operands)
    return given if equation.primitive.multiple_results else [given]

  def node(self, kind, inputs, num_outputs=None, **attributes):
    """Writes a node, or finds the same one, and returns its tensor's name.

    Args:
      kind: an operator.
      inputs: names or constants.
      num_outputs: None for a single name.
      **attributes: of the operator.
    """
    inputs = [x if isinstance(x, str) else self.constant(x) for x in inputs]
    key = repr((kind, inputs, attributes))
    if key not in self._names:
      made = [f'{kind}_{len(self.nodes)}']
      if num_outputs:
        made = [f'{made[0]}_{i}' for i in range(num_outputs)]
      self.nodes.append((kind, inputs, made, attributes))
      self._names[key] = made if num_outputs else made[0]
    return self._names[key]

  def constant(self, array):
    """Returns the name of a constant; small ones are stored once."""
    array = np.asarray(array)
    if array.dtype == np.float64:
      array = array.astype(np.float32)
    name = f'constant_{len(self.constants)}'
    if array.size < 100:
      key = (array.dtype.name, array.shape, array.tobytes())
      name = self._names.setdefault(key, name)
    self.constants[name] = array
    return name

  def stored(self, array):
    """Returns the Value of a constant."""
    axes = tuple(range(array.ndim))
    return Value(axes, array.shape, name=self.constant(array))

  def settled(self, x):
    """Returns a Value whose node is written, and that has nothing pending."""
    if not isinstance(x, Value):
      return np.asarray(x)
    if not x.name:
      x = _absorbing(x)
      kind, inputs, attributes = x.node
      name = self.node(kind, inputs, **attributes)
      x = dataclasses.replace(x, name=name)
    scale, shift = x.scale, x.shift
    x = dataclasses.replace(x, scale=1.0, shift=0.0)
    if np.any(scale != 1):
      x = self.settled(self.elementwise('Mul', x, scale))
    if np.any(shift != 0):
      x = self.settled(self.elementwise('Add', x, shift))
    return x

  def arranged(self, x, axes, shape=None):
    """Returns a tensor's name, or a constant, with axes in a given order.

    Args:
      x: a Value or constant.
      axes: of the array; those that are left out have size 1.
      shape: of the array, up to which the tensor is repeated; None: it is not.
    """
    if isinstance(x, Value):
      x = self.settled(x)
      name = x.name
      kept = [axis for axis in x.axes if axis in axes]
      if len(kept) < len(x.axes):
        dropped = [i for i, axis in enumerate(x.axes) if axis not in axes]
        name = self.node('Squeeze', [name, np.int64(dropped)])
      wanted = [axis for axis in axes if axis in kept]
      if wanted != kept:
        perm = [kept.index(axis) for axis in wanted]
        name = self.node('Transpose', [name], perm=perm)
      if len(wanted) < len(axes):
        added = [i for i, axis in enumerate(axes) if axis not in wanted]
        name = self.node('Unsqueeze', [name, np.int64(added)])
    else:
      others = [axis for axis in range(x.ndim) if axis not in axes]
      name = x.transpose(*axes, *others).reshape([x.shape[i] for i in axes])
    if shape is None or all(x.shape[i] == shape[i] for i in axes):
      return name
    sizes = [1 if x.shape[i] == shape[i] else shape[i] for i in axes]
    if not is_known(sizes):
      batch = self.node('Shape', [IMAGES], start=0, end=1)
      parts = [batch if n == self._batch else np.int64([n]) for n in sizes]
      return self.node('Expand', [name, self.node('Concat', parts, axis=0)])
    return self.node('Expand', [name, np.int64(sizes)])

  def elementwise(self, kind, *operands, **attributes):
    """Returns the Value of an operator that broadcasts its operands."""
    operands = list(map(self.settled, operands))
    axes, inputs = common_axes(operands), []
    for x in operands:
      # Axes of size 1 that come first need not be there.
      held = _held(x)
      first = next((i for i, axis in enumerate(axes) if axis in held), None)
      inputs.append(self.arranged(x, () if first is None else axes[first:]))
    shapes = zip(*(x.shape for x in operands if x.shape), strict=True)
    shape = [next((n for n in sizes if n != 1), 1) for sizes in shapes]
    return Value(axes, tuple(shape), (kind, inputs, attributes))


def _held(x):
  """Returns the axes of a settled operand that its tensor has."""
  if isinstance(x, Value):
    return x.axes
  return [axis for axis, size in enumerate(x.shape) if size != 1]


def common_axes(operands):
  """Returns the axes of all, in the order of the first that has the most."""
  axes = max((x.axes for x in operands if isinstance(x, Value)), key=len)
  rest = {axis for x in operands for axis in _held(x)}.difference(axes)
  return (*axes, *sorted(rest))


def _absorbing(x):
  """Returns a Value whose node's weights do what is pending, if they can."""
  kind, inputs, attributes = x.node
  if kind not in ('Conv', 'Gemm', 'MatMul') or isinstance(inputs[1], str):
    return x
  channel = x.axes[1 if kind == 'Conv' else -1]
  weight, *bias = inputs[1:]
  size = weight.shape[0 if kind == 'Conv' else -1]
  scale, shift = (along(c, channel, size) for c in (x.scale, x.shift))
  if scale is None or shift is None:
    return x
  left = x.shift
  if kind != 'MatMul' and shift.any():  # A MatMul has no bias.
    bias, left = [shift], 0.0
  if kind == 'Conv':
    scale = scale.reshape(-1, *(1,) * (weight.ndim - 1))
  node = kind, [inputs[0], weight * scale, *bias], attributes
  return dataclasses.replace(x, node=node, scale=1.0, shift=left)


def along(constant, axis, size):
  """Returns a constant as a vector; None if it varies along another axis."""
  shape = np.shape(constant)
  if any(n != 1 for i, n in enumerate(shape) if i != axis):
    return None
  return np.broadcast_to(np.float64(constant).reshape(-1), size)


def placed(vector, axis, rank):
  """Returns a vector as a constant that varies along one axis."""
  return vector.reshape([-1 if i == axis else 1 for i in range(rank)])


def relabelled(x, labels, rank):
  """Returns a Value or constant with its axes called otherwise.

  Args:
    x: the Value or constant.
    labels: for each of its axes, the new one.
    rank: how many new axes there are; those without an old one have size 1.
  """
  if not np.ndim(x) and not isinstance(x, Value):
    return x
  shape = [1] * rank
  for label, size in zip(labels, x.shape, strict=True):
    shape[label] = size
  if not isinstance(x, Value):
    return x.transpose(np.argsort(labels)).reshape(shape)
  return dataclasses.replace(
    x,
    axes=tuple(labels[axis] for axis in x.axes),
    shape=tuple(shape),
    scale=relabelled(x.scale, labels, rank),
    shift=relabelled(x.shift, labels, rank),
  )


def affine(x, kind, constant):
  """Returns a Value plus or times a constant ('add', 'sub', 'mul', 'div')."""
  constant = np.float64(constant)
  if constant.size and np.all(constant == constant.flat[0]):
    constant = constant.flat[0]
  if kind in ('add', 'sub'):
    sign = 1 if kind == 'add' else -1
    return dataclasses.replace(x, shift=x.shift + sign * constant)
  # 255 / 255 is 1, where 255 * (1 / 255) need not be.
  by = np.multiply if kind == 'mul' else np.divide
  scale, shift = by(x.scale, constant), by(x.shift, constant)
  return dataclasses.replace(x, scale=scale, shift=shift)


def is_known(shape):
  return all(isinstance(size, (int, np.integer)) for size in shape)


def _evaluated(equation, operands):
  """Returns what an equation makes of constants."""
  operands = [
    np.broadcast_to(x, v.aval.shape)
    for x, v in zip(operands, equation.invars, strict=True)
  ]
  given = equation.primitive.bind(
    *map(jnp.asarray, operands), **equation.params
  )
  given = given if equation.primitive.multiple_results else [given]
  return list(map(np.asarray, given))
