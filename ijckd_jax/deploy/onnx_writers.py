"""How ONNX says what JAX's primitives do: one writer for each.

Source: the specification of the operators, https://onnx.ai/onnx/operators.
"""

from collections.abc import Callable
import dataclasses
import math
from typing import Any

import jax
from jax.interpreters import partial_eval
import numpy as np

from ijckd_jax.deploy import onnx_graph
from ijckd_jax.runtime import config_utils

CHANNELS_FIRST = (0, 3, 1, 2)
WRITERS = {}  # Functions (graph, equation, *operands) by primitive.
# Primitives that are one operator, on tensors whose shapes broadcast.
ELEMENTWISE = {
  name.lower(): name
  for name in (
    *('Abs', 'Add', 'And', 'Ceil', 'Cos', 'Div', 'Erf', 'Exp', 'Floor', 'Log'),
    *('Max', 'Min', 'Mul', 'Neg', 'Not', 'Or', 'Pow', 'Sign', 'Sin', 'Sqrt'),
    *('Sub', 'Tanh'),
  )
} | {
  'eq': 'Equal',
  'ge': 'GreaterOrEqual',
  'gt': 'Greater',
  'le': 'LessOrEqual',
  'logistic': 'Sigmoid',
  'lt': 'Less',
}


def write(
  fn: Callable[..., jax.Array], arrays: Any, images: jax.ShapeDtypeStruct
) -> tuple[onnx_graph.Graph, str]:
  """Returns the graph of a function of images, and the result's name in it.

  Args:
    fn: `(arrays, images (B, H, W, C)) -> (B, K)`.
    arrays: a tree of constants.
    images: their shape, in which B is symbolic.

  Raises:
    onnx_graph.Unsupported: a primitive has no writer, or none for its
      parameters.
  """
  closed = jax.make_jaxpr(fn)(arrays, images)
  read, _ = partial_eval.dce_jaxpr(closed.jaxpr, [True], instantiate=True)
  graph = onnx_graph.Graph(WRITERS, images.shape[0])
  # Bytes are transposed faster than the floats that they become.
  name = graph.node('Transpose', [onnx_graph.IMAGES], perm=CHANNELS_FIRST)
  x = onnx_graph.Value(CHANNELS_FIRST, images.shape, name=name)
  (result,) = graph.run(read, closed.consts, [*jax.tree.leaves(arrays), x])
  return graph, graph.arranged(result, (0, 1), closed.out_avals[0].shape)


def _is_float(equation):
  return np.issubdtype(equation.outvars[0].aval.dtype, np.floating)


def _require(is_supported, equation):
  if not is_supported:
    raise onnx_graph.Unsupported(
      f'no writer for the primitive {equation.primitive.name} with '
      f'{config_utils.short(equation.params)}'
    )


# Primitives that are several operators.
COMPOSED = {
  'clamp': lambda op, low, x, high: op('Min', op('Max', x, low), high),
  # 1 + erf(-x): what x is multiplied by takes in the sign.
  'erfc': lambda op, x: onnx_graph.affine(
    op('Erf', onnx_graph.affine(x, 'mul', -1)), 'add', 1
  ),
  'expm1': lambda op, x: onnx_graph.affine(op('Exp', x), 'sub', 1),
  'ne': lambda op, a, b: op('Not', op('Equal', a, b)),
  'rsqrt': lambda op, x: op('Reciprocal', op('Sqrt', x)),
  'select_n': lambda op, is_second, a, b: op('Where', is_second, b, a),
}


def _writes(*names):
  return lambda writer: WRITERS.update(dict.fromkeys(names, writer)) or writer


@_writes(*ELEMENTWISE)
def _elementwise(graph, equation, *operands):
  return graph.elementwise(ELEMENTWISE[equation.primitive.name], *operands)


@_writes('copy', 'name', 'optimization_barrier', 'stop_gradient')
def _identity(graph, equation, *operands):
  del graph
  return operands if equation.primitive.multiple_results else operands[0]


@_writes('add', 'sub', 'mul', 'div')
def _arithmetic(graph, equation, a, b):
  name = equation.primitive.name
  if not _is_float(equation):
    return _elementwise(graph, equation, a, b)
  if isinstance(a, np.ndarray) and name in ('add', 'mul'):
    a, b = b, a
  if isinstance(b, np.ndarray):
    return onnx_graph.affine(a, name, b)
  if isinstance(a, np.ndarray) and name == 'sub':
    return onnx_graph.affine(onnx_graph.affine(b, 'mul', -1), 'add', a)
  scale = 1.0
  if name == 'mul' and not np.any(a.shift) and not np.any(b.shift):
    # (s a) (t b) = (s t) (a b): what follows may take in s t.
    scale = a.scale * b.scale
    a, b = (dataclasses.replace(x, scale=1.0) for x in (a, b))
  x = _elementwise(graph, equation, a, b)
  return dataclasses.replace(x, scale=scale)


@_writes('neg')
def _neg(graph, equation, x):
  if _is_float(equation):
    return onnx_graph.affine(x, 'mul', -1)
  return _elementwise(graph, equation, x)


@_writes('square', 'integer_pow')
def _integer_pow(graph, equation, x):
  exponent = equation.params.get('y', 2)
  x = graph.settled(x)
  if exponent == 2:
    return graph.elementwise('Mul', x, x)
  return graph.elementwise('Pow', x, np.float32(exponent))


@_writes(*COMPOSED)
def _composed(graph, equation, *operands):
  return COMPOSED[equation.primitive.name](graph.elementwise, *operands)


@_writes('max', 'min')
def _bound(graph, equation, a, b):
  bound, x = (a, b) if isinstance(a, np.ndarray) else (b, a)
  if (
    not _is_float(equation)
    or isinstance(bound, onnx_graph.Value)
    or bound.size > 1
  ):
    return _elementwise(graph, equation, a, b)
  bound = bound.reshape(())
  if equation.primitive.name == 'max':
    if bound == -np.inf:
      return x
    if bound == 0:
      return graph.elementwise('Relu', x)
    return graph.elementwise('Clip', x, bound)
  kind, inputs, _ = x.node or ('', [], {})
  pending = x.name or np.any(x.scale != 1) or np.any(x.shift)
  if kind in ('Relu', 'Clip') and not pending:
    lower = inputs[1] if kind == 'Clip' else np.float32(0)
    node = 'Clip', [inputs[0], lower, bound], {}
    return dataclasses.replace(x, node=node)
  return _elementwise(graph, equation, x, bound)


@_writes('convert_element_type')
def _convert(graph, equation, x):
  import onnx

  old, new = (v.aval.dtype for v in (*equation.invars, *equation.outvars))
  if old == new:
    return x
  dtype = onnx.helper.np_dtype_to_tensor_dtype(new)
  return graph.elementwise('Cast', x, to=dtype)


@_writes('broadcast_in_dim')
def _broadcast(graph, equation, x, *sizes):
  del graph
  _require(not sizes, equation)
  rank = len(equation.outvars[0].aval.shape)
  labels = equation.params['broadcast_dimensions']
  if not x.shape:
    return x.reshape([1] * rank)
  return onnx_graph.relabelled(x, labels, rank)


@_writes('transpose')
def _transpose(graph, equation, x):
  del graph
  labels = np.argsort(equation.params['permutation'])
  return onnx_graph.relabelled(x, labels.tolist(), len(labels))


@_writes('reshape', 'squeeze', 'expand_dims')
def _reshape(graph, equation, x):
  return _reshaped(
    graph, x, equation.invars[0].aval.shape, equation.outvars[0].aval.shape
  )


def _reshaped(graph, x, old, new):
  """Returns a Value of shape `old` in the shape `new`."""
  groups = _groups(old, new)
  is_same = all(len(a) == len(b) == 1 for a, b in groups)
  order, made = [], []
  # Axes that are joined or divided move to where the first of them is.
  for axis in x.axes if is_same else (*x.axes, *range(len(old))):
    for olds, news in groups:
      if axis in olds and axis not in order:
        order += olds
        made += news
  if is_same:
    size = {b: x.shape[a] for (a,), (b,) in groups}
    shape = tuple(size.get(axis, 1) for axis in range(len(new)))
    return onnx_graph.Value(tuple(made), shape, name=graph.arranged(x, order))
  if len(made) < 4:  # It is no map any more, but tokens or features.
    order, made = sorted(order), sorted(made)
  sizes = [new[i] if onnx_graph.is_known([new[i]]) else -1 for i in made]
  if sizes[0] == -1 and new[made[0]] == old[order[0]]:
    sizes[0] = 0  # As it is; runtimes fuse nodes that have the same batch.
  if sizes.count(-1) > 1:
    raise onnx_graph.Unsupported(f'no writer for a reshape to {new}')
  inputs = [graph.arranged(x, order, old), np.int64(sizes)]
  return onnx_graph.Value(tuple(made), new, ('Reshape', inputs, {}))


def _groups(old, new):
  """Returns which axes of one shape become which of another, as small groups.

  Axes of size 1 are in none.
  """
  axes, ends = [], []
  for shape in (old, new):
    own = [axis for axis, size in enumerate(shape) if size != 1]
    axes.append(own)
    ends.append([math.prod(shape[: axis + 1]) for axis in own])
  groups, start = [], (0, 0)
  for i, size in enumerate(ends[0]):
    j = next((j for j, other in enumerate(ends[1]) if other == size), None)
    if j is not None:
      groups.append((axes[0][start[0] : i + 1], axes[1][start[1] : j + 1]))
      start = i + 1, j + 1
  return groups


@_writes('concatenate')
def _concatenate(graph, equation, *operands):
  new = equation.outvars[0].aval.shape
  axes = onnx_graph.common_axes(operands)
  axes = (*axes, *sorted({*range(len(new))}.difference(axes)))
  inputs = [
    graph.arranged(x, axes, v.aval.shape)
    for x, v in zip(operands, equation.invars, strict=True)
  ]
  place = axes.index(equation.params['dimension'])
  return onnx_graph.Value(axes, new, ('Concat', inputs, {'axis': place}))


@_writes('slice')
def _slice(graph, equation, x):
  params = equation.params
  starts, ends = params['start_indices'], params['limit_indices']
  strides = params['strides'] or [1] * len(starts)
  return _sliced(graph, x, equation.invars[0].aval.shape, starts, ends, strides)


@_writes('rev')
def _rev(graph, equation, x):
  shape, turned = equation.invars[0].aval.shape, equation.params['dimensions']
  starts, ends, strides = zip(
    *(
      (-1, np.iinfo(np.int64).min, -1) if axis in turned else (0, size, 1)
      for axis, size in enumerate(shape)
    ),
    strict=True,
  )
  return _sliced(graph, x, shape, starts, ends, strides)


def _sliced(graph, x, old, starts, ends, strides):
  """Returns slices of a Value, given as those of Python."""
  x = graph.settled(x)
  shape, given = list(x.shape), []
  for axis, (start, end, step) in enumerate(
    zip(starts, ends, strides, strict=True)
  ):
    # An axis that is yet to be repeated stays so.
    is_whole = (start, step) == (0, 1) and end == old[axis]
    if not is_whole and x.shape[axis] != 1:
      given.append((start, end, x.axes.index(axis), step))
      shape[axis] = len(range(old[axis])[start:end:step])
  if not given:
    return x
  inputs = [x.name, *np.int64(given).T]
  return onnx_graph.Value(x.axes, tuple(shape), ('Slice', inputs, {}))


@_writes('split')
def _split(graph, equation, x):
  axis, sizes = equation.params['axis'], equation.params['sizes']
  x = graph.settled(x)
  if x.shape[axis] == 1:
    return [x] * len(sizes)
  names = graph.node(
    'Split',
    [x.name, np.int64(sizes)],
    num_outputs=len(sizes),
    axis=x.axes.index(axis),
  )
  before, after = x.shape[:axis], x.shape[axis + 1 :]
  return [
    onnx_graph.Value(x.axes, (*before, size, *after), name=name)
    for size, name in zip(sizes, names, strict=True)
  ]


@_writes('pad')
def _pad(graph, equation, x, value):
  low, high, between = zip(*equation.params['padding_config'], strict=True)
  _require(not any(between) and isinstance(value, np.ndarray), equation)
  axes = (*x.axes, *sorted({*range(len(low))}.difference(x.axes)))
  name = graph.arranged(x, axes, equation.invars[0].aval.shape)
  pads = np.int64([side[axis] for side in (low, high) for axis in axes])
  node = 'Pad', [name, pads, value], {}
  return onnx_graph.Value(axes, equation.outvars[0].aval.shape, node)


@_writes('gather')
def _gather(graph, equation, x, indices):
  """Writes x[:, 1:], x[:, 0] and x[:, [2, 0]], for constants in brackets."""
  numbers, sizes = (
    equation.params[key] for key in ('dimension_numbers', 'slice_sizes')
  )
  axes, dropped = numbers.start_index_map, numbers.collapsed_slice_dims
  old, new = equation.invars[0].aval.shape, equation.outvars[0].aval.shape
  is_known = isinstance(indices, np.ndarray)
  _require(is_known and not numbers.operand_batching_dims, equation)
  if indices.ndim == 1:
    starts = [0] * len(sizes)
    for axis, start in zip(axes, indices, strict=True):
      starts[axis] = int(start)
    ends = [start + n for start, n in zip(starts, sizes, strict=True)]
    x = _sliced(graph, x, old, starts, ends, [1] * len(sizes))
    return _reshaped(graph, x, sizes, new)
  _require(indices.ndim == 2 and axes == dropped and len(axes) == 1, equation)
  (axis,) = axes
  labels = list(numbers.offset_dims)
  labels[axis:axis] = {*range(len(new))}.difference(labels)
  x = graph.settled(x)
  shape = (*x.shape[:axis], len(indices), *x.shape[axis + 1 :])
  if x.shape[axis] == 1:
    return onnx_graph.relabelled(x, labels, len(new))
  attributes = {'axis': x.axes.index(axis)}
  node = 'Gather', [x.name, indices[:, 0]], attributes
  return onnx_graph.relabelled(
    onnx_graph.Value(x.axes, shape, node), labels, len(new)
  )


@_writes('reduce_max', 'reduce_min', 'reduce_sum')
def _reduce(graph, equation, x):
  axes, old = equation.params['axes'], equation.invars[0].aval.shape
  kinds = {'reduce_max': 'ReduceMax', 'reduce_min': 'ReduceMin'}
  kind, scale = kinds.get(equation.primitive.name, 'ReduceMean'), 1.0
  if kind == 'ReduceMean':
    # A sum is a mean times a number, by which a mean is divided again.
    number = math.prod(old[axis] for axis in axes)
    _require(_is_float(equation) and onnx_graph.is_known([number]), equation)
    scale = float(number)
  x = graph.settled(x)
  places = np.int64([i for i, axis in enumerate(x.axes) if axis in axes])
  kept = [axis for axis in range(len(old)) if axis not in axes]
  labels = tuple(kept.index(axis) for axis in x.axes if axis in kept)
  shape = tuple(x.shape[axis] for axis in kept)
  if not places.size:  # To ONNX, no axes are all.
    return onnx_graph.Value(labels, shape, scale=scale, name=x.name)
  node = kind, [x.name, places], {'keepdims': 0}
  return onnx_graph.Value(labels, shape, node, scale=scale)


@_writes('reduce_window_max', 'reduce_window_sum')
def _pool(graph, equation, x):
  params = equation.params
  windows, strides = params['window_dimensions'], params['window_strides']
  rank, padding = len(windows), params['padding']
  alone = [
    axis
    for axis in range(rank)
    if (windows[axis], strides[axis], *padding[axis]) == (1, 1, 0, 0)
  ]
  _require(len(alone) > 1 and {*params['base_dilation']} == {1}, equation)
  # Any two of them can stand for the batch and the channels.
  outer = alone[0], alone[-1]
  inner = [axis for axis in range(rank) if axis not in outer]
  attributes = {
    'kernel_shape': [windows[axis] for axis in inner],
    'strides': [strides[axis] for axis in inner],
    'dilations': [params['window_dilation'][axis] for axis in inner],
    'pads': [padding[axis][end] for end in (0, 1) for axis in inner],
  }
  kind, scale = 'MaxPool', 1.0
  if equation.primitive.name == 'reduce_window_sum':
    kind, scale = 'AveragePool', float(math.prod(windows))
    attributes['count_include_pad'] = 1
  axes = (*outer, *inner)
  name = graph.arranged(x, axes, equation.invars[0].aval.shape)
  new = equation.outvars[0].aval.shape
  return onnx_graph.Value(axes, new, (kind, [name], attributes), scale=scale)


@_writes('conv_general_dilated')
def _conv(graph, equation, x, kernel):
  params = equation.params
  numbers, groups = params['dimension_numbers'], params['feature_group_count']
  low, high = zip(*params['padding'], strict=True)
  dilations = {*params['lhs_dilation'], params['batch_group_count']}
  _require(dilations == {1} and min(low + high) >= 0, equation)
  old, given = (v.aval.shape for v in equation.invars)
  rank, channel, shift = len(old), numbers.lhs_spec[1], 0.0
  kernel = graph.arranged(kernel, numbers.rhs_spec, given)
  scale = added = None
  if isinstance(kernel, np.ndarray):
    scale, added = (
      onnx_graph.along(c, channel, old[channel]) for c in (x.scale, x.shift)
    )
  if scale is not None and added is not None and scale.all():
    x = dataclasses.replace(x, scale=1.0, shift=0.0)
    outputs, inputs = kernel.shape[:2]
    # The channel that each output meets with each input.
    met = np.arange(outputs)[:, None] // (outputs // groups) * inputs
    met = met + np.arange(inputs)
    kernel = kernel * scale[met].reshape(outputs, inputs, *(1,) * (rank - 2))
    mean = -added / scale
    if any(low + high) and mean.any():
      # The zeros at the borders are those of after the subtraction.
      x = graph.elementwise('Sub', x, onnx_graph.placed(mean, channel, rank))
    elif mean.any():
      sums = kernel.sum(tuple(range(2, rank)))
      shift = onnx_graph.placed(
        -(sums * mean[met]).sum(1), numbers.out_spec[1], rank
      )
  attributes = {
    'dilations': params['rhs_dilation'],
    'group': groups,
    'pads': low + high,
    'strides': params['window_strides'],
  }
  inputs = [graph.arranged(x, numbers.lhs_spec, old), kernel]
  new = equation.outvars[0].aval.shape
  node = 'Conv', inputs, attributes
  return onnx_graph.Value(numbers.out_spec, new, node, shift=shift)


@_writes('dot_general')
def _dot(graph, equation, *operands):
  contracts, batches = equation.params['dimension_numbers']
  new = equation.outvars[0].aval.shape
  # Both operands get the axes of the result, and after them the summed ones.
  rank, start = len(new) + len(contracts[0]), len(batches[0])
  sides = []
  for x, var, contract, batch in zip(
    operands, equation.invars, contracts, batches, strict=True
  ):
    axes = range(var.aval.ndim)
    free = [axis for axis in axes if axis not in (*contract, *batch)]
    own = *range(len(batch)), *range(start, start + len(free))
    label = dict(zip((*batch, *free), own, strict=True))
    label |= dict(zip(contract, range(len(new), rank), strict=True))
    start += len(free)
    size = {label[axis]: var.aval.shape[axis] for axis in axes}
    x = onnx_graph.relabelled(x, [label[axis] for axis in axes], rank)
    sides.append((x, {axis: n for axis, n in size.items() if n != 1}))
  (a, _), (b, _) = sides
  ends = [
    isinstance(x, onnx_graph.Value) and x.axes[-1] >= len(new) for x in (a, b)
  ]
  if isinstance(a, np.ndarray) or (
    isinstance(b, onnx_graph.Value) and ends == [0, 1]
  ):
    sides.reverse()
  (left, sizes), (right, others) = sides
  batch = sorted(axis for axis in sizes if axis in others and axis < len(new))
  summed = sorted(axis for axis in sizes if axis >= len(new))
  rows = [axis for axis in left.axes if axis in sizes]
  rows += sizes.keys() - {*rows}
  rows = [axis for axis in rows if axis not in (*batch, *summed)]
  columns = [axis for axis in others if axis not in (*batch, *summed)]
  axes = (*batch, *rows, *columns)
  if len(summed) != 1 or len(columns) != 1 or (batch and len(rows) != 1):
    inputs, terms = [], []
    for x, shape in sides:
      inputs.append(graph.arranged(x, [*shape], shape))
      terms.append(''.join(chr(97 + axis) for axis in shape))
    result = ''.join(chr(97 + axis) for axis in axes)
    said = f'{",".join(terms)}->{result}'
    return onnx_graph.Value(axes, new, ('Einsum', inputs, {'equation': said}))
  weight = graph.arranged(right, (*batch, *summed, *columns), others)
  shift, kind = 0.0, 'MatMul'
  if isinstance(weight, np.ndarray) and not batch:
    kind = 'Gemm' if len(rows) == 1 else kind
    scale, added = (
      onnx_graph.along(c, summed[0], len(weight))
      for c in (left.scale, left.shift)
    )
    if scale is not None and added is not None:
      left = dataclasses.replace(left, scale=1.0, shift=0.0)
      shift = onnx_graph.placed(added @ weight, columns[0], len(new))
      weight = weight * scale[:, None]
  inputs = [graph.arranged(left, (*batch, *rows, *summed), sizes), weight]
  return onnx_graph.Value(axes, new, (kind, inputs, {}), shift=shift)
