"""What jax2onnx writes of maps with channels last, said as runtimes want it.

Pools become ones over (H, W) of (B, C, H, W), and so does the shuffle of
channels, each between two transpositions. onnxruntime's optimizer then moves
all transpositions to where they meet, those around convolutions too, and they
are gone; it would not get past what stood here before.
"""

import collections

import numpy as np

CHANNELS_FIRST, CHANNELS_LAST = (0, 3, 1, 2), (0, 2, 3, 1)


def rewrite(model):
  """Rewrites a model of jax2onnx in place; what it computes stays the same."""
  _simplify(model)
  made = []
  graph = _Graph(model)
  for node in model.graph.node:
    rewritten = None
    for rule in (_max_pool, _sum_pool, _channel_shuffle):
      rewritten = rewritten or rule(graph, node)
    made += rewritten or [node]
  _keep_what_is_read(model, made)
  # Shapes of what is in between, of the wrong layout.
  del model.graph.value_info[:]


def fold_preprocessing(model):
  """Leaves one subtraction of an optimized model's preprocessing, in place.

  (x / a - mean) / std is convolved with w as x - a mean is with w / (a std):
  zeros at the borders are zeros in both. Bytes are transposed as bytes. A model
  that does something else between its images and its first convolution, such
  as resizing them, stays as it is.
  """
  from onnx import numpy_helper

  graph = _Graph(model)
  chain = next(filter(None, map(graph.scaled, model.graph.node)), None)
  if chain is None:
    return
  conv, transpose, *scaling = chain
  std, mean, divisor = (graph.constants[x.input[1]] for x in scaling)
  scale = np.float64(divisor) * std.reshape(-1, 1, 1)
  y, x = conv.input[0], scaling[-1].input[0]
  nodes = [_node('Transpose', [x], f'{y}_images', perm=CHANNELS_FIRST)]
  cast = graph.makers.get(x)
  if cast is not None and cast.op_type == 'Cast':
    nodes = [
      _node('Transpose', cast.input, f'{y}_bytes', perm=CHANNELS_FIRST),
      _node('Cast', [f'{y}_bytes'], f'{y}_images', **_attributes(cast)),
    ]
  nodes.append(_node('Sub', [f'{y}_images', f'{y}_mean'], y))
  arrays = graph.constants | {
    conv.input[1]: np.float32(graph.constants[conv.input[1]] / scale),
    f'{y}_mean': np.float32(divisor * mean).reshape(1, -1, 1, 1),
  }
  made = list(model.graph.node)
  place = made.index(transpose)
  _keep_what_is_read(model, [*made[:place], *nodes, *made[place + 1 :]])
  read = {name for node in model.graph.node for name in node.input}
  del model.graph.initializer[:]
  model.graph.initializer.extend(
    numpy_helper.from_array(array, name)
    for name, array in arrays.items()
    if name in read
  )


class _Graph:
  """Who makes what, and for how many.

  Attributes:
    makers: nodes by the name of what they make.
    readers: how many inputs read it, by name.
    constants: arrays by name.
  """

  def __init__(self, model):
    from onnx import numpy_helper

    self.makers = {name: x for x in model.graph.node for name in x.output}
    self.readers = collections.Counter(
      name for node in model.graph.node for name in node.input
    )
    self.constants = {
      x.name: numpy_helper.to_array(x) for x in model.graph.initializer
    }

  def chain(self, node, *kinds):
    """Returns nodes that lead to one, itself first; None if of other kinds."""
    found = []
    for kind in kinds:
      if node is None or node.op_type != kind:
        return None
      found.append(node)
      node = self.makers.get(node.input[0])
    return found

  def sizes(self, reshape):
    """Returns what a Reshape makes of one of a batch; [] if not known."""
    made = self.makers.get(reshape.input[1])
    names = made.input[1:] if made else ()
    if not self.constants.keys() >= set(names):
      return []
    return [self.constants[name].item() for name in names]

  def scaled(self, node):
    """Returns the chain of a convolution of (x / a - mean) / std, or None."""
    chain = self.chain(node, 'Conv', 'Transpose', 'Div', 'Sub', 'Div')
    if chain is None or _attributes(node).get('group', 1) != 1:
      return None
    weight, *constants = (x.input[1] for x in (node, *chain[2:]))
    alone = [weight, *(x.output[0] for x in chain[1:])]
    known = self.constants.keys() >= {weight, *constants}
    if known and all(self.readers[name] == 1 for name in alone):
      return chain
    return None


def _keep_what_is_read(model, nodes):
  """Gives a model those of the nodes that its outputs come of."""
  read, kept = {x.name for x in model.graph.output}, []
  for node in reversed(nodes):
    if read & set(node.output):
      kept.append(node)
      read |= set(node.input)
  del model.graph.node[:]
  model.graph.node.extend(reversed(kept))


def _simplify(model):
  """Makes max(x, 0) a Relu, and leaves out zeros that a Gemm adds.

  Runtimes fuse a Relu with what is before it; onnxruntime's quantisation wants
  biases with one dimension.
  """
  import onnx

  zeros = {
    x.name
    for x in model.graph.initializer
    if not x.dims and not onnx.numpy_helper.to_array(x)
  }
  for node in model.graph.node:
    rest = [name for name in node.input if name not in zeros]
    if node.op_type == 'Max' and len(rest) == 1 < len(node.input):
      node.op_type, node.input[:] = 'Relu', rest
    if node.op_type == 'Gemm' and node.input[2:] and len(rest) == 2:
      node.input[:] = rest


def _max_pool(graph, node):
  """Returns a pool's nodes: it was over (B, H, W, C) of (1, 1, B, H, W, C)."""
  chain = graph.chain(node, 'Squeeze', 'MaxPool', 'Unsqueeze', 'Unsqueeze')
  if chain is None:
    return None
  y = node.output[0]
  given = {
    key: [*values[1:3], *values[5:7]]
    for key, values in _attributes(chain[1]).items()
  }  # Of H and W; pads have their ends after their starts.
  return _channels_first(
    chain[-1].input[0], y, [_node('MaxPool', [f'{y}_in'], f'{y}_out', **given)]
  )


def _sum_pool(graph, node):
  """Returns the nodes of a sum over windows, that was a convolution of ones."""
  chain = graph.chain(node, 'Squeeze', 'Conv', 'Unsqueeze', 'Unsqueeze')
  if chain is None:
    return None
  kernel = graph.constants.get(chain[1].input[1], np.zeros(0))
  if kernel.ndim != 6 or kernel.shape[-1] != 1 or not np.all(kernel == 1):
    return None
  y, given = node.output[0], _attributes(chain[1])
  height, width = kernel.shape[3:5]
  pads = given['pads']
  return _channels_first(
    chain[-1].input[0],
    y,
    [
      _node(
        'AveragePool',
        [f'{y}_in'],
        f'{y}_mean',
        kernel_shape=(height, width),
        strides=given['strides'][1:3],
        pads=(*pads[1:3], *pads[5:7]),
        count_include_pad=1,
      ),
      _constant(f'{y}_area', np.float32(height * width)),
      _node('Mul', [f'{y}_mean', f'{y}_area'], f'{y}_out'),
    ],
  )


def _channel_shuffle(graph, node):
  """Returns the nodes of layers.channel_shuffle."""
  chain = graph.chain(node, 'Reshape', 'Transpose', 'Reshape')
  if chain is None or _attributes(chain[1])['perm'] != [0, 1, 2, 4, 3]:
    return None
  before, after = graph.sizes(chain[-1]), graph.sizes(node)
  height, width, groups, channels = before or (0, 0, 0, 0)
  if after != [height, width, groups * channels]:
    return None
  y = node.output[0]
  return _channels_first(
    chain[-1].input[0],
    y,
    [
      # A 0 stands for the size that there is.
      _constant(f'{y}_groups', np.int64([0, groups, channels, height, width])),
      _node('Reshape', [f'{y}_in', f'{y}_groups'], f'{y}_grouped'),
      _node('Transpose', [f'{y}_grouped'], f'{y}_dealt', perm=(0, 2, 1, 3, 4)),
      _constant(f'{y}_map', np.int64([0, groups * channels, height, width])),
      _node('Reshape', [f'{y}_dealt', f'{y}_map'], f'{y}_out'),
    ],
  )


def _channels_first(x, y, nodes):
  """Returns nodes from `x` to `y`; those given lead from y_in to y_out."""
  return [
    _node('Transpose', [x], f'{y}_in', perm=CHANNELS_FIRST),
    *nodes,
    _node('Transpose', [f'{y}_out'], y, perm=CHANNELS_LAST),
  ]


def _node(kind, inputs, output, **attributes):
  from onnx import helper

  return helper.make_node(kind, inputs, [output], **attributes)


def _constant(name, array):
  from onnx import numpy_helper

  return _node('Constant', [], name, value=numpy_helper.from_array(array))


def _attributes(node):
  from onnx import helper

  return {x.name: helper.get_attribute_value(x) for x in node.attribute}
