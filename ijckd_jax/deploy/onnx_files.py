"""ONNX files: written by onnx_writers, run by onnxruntime."""

from collections.abc import Iterable
import contextlib
import io
import logging
import pathlib
import tempfile

from jax import export
import numpy as np

from ijckd_jax.deploy import deployed as deployed_lib
from ijckd_jax.deploy import onnx_graph
from ijckd_jax.deploy import onnx_writers
from ijckd_jax.runtime import config_utils

IMAGES, LOGITS, PROBABILITIES = onnx_graph.IMAGES, 'logits', 'probabilities'
# Runtimes of 2024 and later read it: onnxruntime since 1.18.
OPSET, IR_VERSION = 21, 10
# Operators whose weights are stored in half precision, or in eight bits.
WEIGHED = ('Conv', 'Gemm', 'MatMul')


def require():
  """Raises UserError where a package is missing."""
  for name in ('onnx', 'onnxruntime'):
    try:
      __import__(name)
    except ImportError as error:
      raise config_utils.UserError(
        f"ONNX needs {name}: pip install 'ijckd_jax[onnx]' ({error})"
      ) from error


def encode(deployed: deployed_lib.Deployed) -> bytes:
  """Returns a function as an ONNX model.

  It takes 'images' and gives 'logits' and 'probabilities', for any number of
  images. The metadata are the model's properties.

  Raises:
    config_utils.UserError: it has an operation that cannot be said in ONNX.
  """
  import onnx

  (batch,) = export.symbolic_shape('B')
  try:
    graph, logits = onnx_writers.write(
      deployed.logits, dict(deployed.arrays), deployed.shape(batch)
    )
  except onnx_graph.Unsupported as error:
    raise config_utils.UserError(
      f'the network cannot be said in ONNX: {error}; --format stablehlo takes '
      'whatever JAX runs'
    ) from error
  graph.nodes.append(('Softmax', [logits], [PROBABILITIES], {}))
  renamed = {logits: LOGITS}
  images = _described(IMAGES, deployed.takes, deployed.image_shape)
  made = [
    _described(name, 'float32', [len(deployed.class_names)])
    for name in (LOGITS, PROBABILITIES)
  ]
  model = onnx.helper.make_model(
    onnx.helper.make_graph(
      [
        onnx.helper.make_node(
          kind,
          *([renamed.get(x, x) for x in names] for names in (inputs, outputs)),
          name=outputs[0],
          **attributes,
        )
        for kind, inputs, outputs, attributes in graph.nodes
      ],
      deployed.metadata['backbone'],
      [images],
      made,
      [
        onnx.numpy_helper.from_array(array, name)
        for name, array in graph.constants.items()
      ],
    ),
    opset_imports=[onnx.helper.make_opsetid('', OPSET)],
    ir_version=IR_VERSION,
  )
  onnx.helper.set_model_props(model, deployed.metadata)
  onnx.checker.check_model(model, full_check=True)
  return model.SerializeToString()


def _described(name, dtype, shape):
  """Returns what a graph says of an input or output: a batch of a shape."""
  import onnx

  dtype = onnx.helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
  return onnx.helper.make_tensor_value_info(name, dtype, ['B', *shape])


def halve(data: bytes) -> bytes:
  """Returns a model whose weights are stored in half precision.

  They are made float32 again as the model is loaded, and nothing else changes.

  Raises:
    config_utils.UserError: a weight is too large for half precision.
  """
  import onnx

  model = onnx.load_from_string(data)
  weights = {
    name
    for node in model.graph.node
    if node.op_type in WEIGHED
    for name in node.input
  }
  casts = []
  for stored in model.graph.initializer:
    if stored.name not in weights:
      continue
    array = onnx.numpy_helper.to_array(stored)
    half = deployed_lib.halved(stored.name, array)
    if half is array:
      continue
    name = f'{stored.name}_float16'
    casts.append(
      onnx.helper.make_node(
        'Cast', [name], [stored.name], to=onnx.TensorProto.FLOAT
      )
    )
    stored.CopyFrom(onnx.numpy_helper.from_array(half, name))
  nodes = [*casts, *model.graph.node]
  del model.graph.node[:]
  model.graph.node.extend(nodes)
  onnx.checker.check_model(model, full_check=True)
  return model.SerializeToString()


def quantize(data: bytes, batches: Iterable[np.ndarray]) -> bytes:
  """Returns a model whose convolutions and products are of eight bits.

  Post-training, static, by onnxruntime: weights by channel, activations by the
  range that they have on the images given.

  Args:
    data: a float32 model.
    batches: images as the model takes them.
  """
  import onnx
  from onnxruntime import quantization
  from onnxruntime.quantization import shape_inference

  class Reader(quantization.CalibrationDataReader):
    def __init__(self):
      self._batches = iter(batches)

    def get_next(self):
      batch = next(self._batches, None)
      return None if batch is None else {IMAGES: batch}

  with tempfile.TemporaryDirectory() as folder, _quiet():
    paths = [str(pathlib.Path(folder) / f'{name}.onnx') for name in 'abc']
    pathlib.Path(paths[0]).write_bytes(data)
    shape_inference.quant_pre_process(*paths[:2], skip_symbolic_shape=True)
    quantization.quantize_static(
      *paths[1:],
      Reader(),
      quant_format=quantization.QuantFormat.QDQ,
      op_types_to_quantize=[*WEIGHED, 'Add', 'Relu', 'MaxPool'],
      per_channel=True,
    )
    model = onnx.load(paths[2])
  del model.metadata_props[:]
  model.metadata_props.extend(onnx.load_from_string(data).metadata_props)
  return model.SerializeToString()


class Session:
  """A model in onnxruntime, on CPUs.

  Attributes:
    metadata: texts by name.
    takes: the images' dtype.
    image_shape: (H, W, C).
  """

  def __init__(self, data: bytes, what: str, num_threads: int = 0):
    """Loads a model.

    Args:
      data: the file's content.
      what: the file, for messages.
      num_threads: 0: as onnxruntime chooses.

    Raises:
      config_utils.UserError: it is no model, or not one of `encode`.
    """
    require()
    import onnxruntime

    _check_self_contained(data, what)
    options = _options()
    # Its own format, which onnxruntime would tell by the first bytes, may name
    # files as well.
    options.add_session_config_entry('session.load_model_format', 'ONNX')
    options.intra_op_num_threads = num_threads
    with config_utils.blame(f'{what} cannot be read by onnxruntime'):
      self._session = onnxruntime.InferenceSession(
        data, options, providers=['CPUExecutionProvider']
      )
    self.metadata = dict(self._session.get_modelmeta().custom_metadata_map)
    inputs, outputs = self._session.get_inputs(), self._session.get_outputs()
    names = [x.name for x in (*inputs, *outputs)]
    if names != [IMAGES, LOGITS, PROBABILITIES]:
      raise config_utils.UserError(
        f'{what} is no model that ijckd export wrote: it has '
        f'{config_utils.short(names)}'
      )
    self.takes = 'uint8' if 'uint8' in inputs[0].type else 'float32'
    self.image_shape = tuple(inputs[0].shape[1:])

  def __call__(self, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns logits and probabilities, (B, K) float32 each."""
    return tuple(self._session.run(None, {IMAGES: images}))


def _check_self_contained(data: bytes, what: str) -> None:
  """Raises UserError unless all of a model's weights are in its file.

  Where a tensor lies elsewhere, onnxruntime reads whatever path the model
  names, from the current directory on.
  """
  import onnx

  with config_utils.blame(f'{what} cannot be read as ONNX'):
    model = onnx.load_from_string(data)
  for message in _messages(model):
    if isinstance(message, onnx.TensorProto) and (
      message.data_location == onnx.TensorProto.EXTERNAL
      or message.external_data
    ):
      where = [x.value for x in message.external_data if x.key == 'location']
      raise config_utils.UserError(
        f'{what} is not all of the model: {config_utils.short(message.name)} '
        f'lies in {config_utils.short(", ".join(where) or "another file")}, '
        'and no file but this one is read; ijckd export puts all into one'
      )


def _messages(message):
  """Yields a message of protobuf and all messages in it."""
  yield message
  for field, value in message.ListFields():
    if field.message_type is not None:
      for item in [value] if hasattr(value, 'DESCRIPTOR') else value:
        yield from _messages(item)


def _options():
  import onnxruntime

  options = onnxruntime.SessionOptions()
  options.log_severity_level = 3  # Errors.
  return options


@contextlib.contextmanager
def _quiet():
  """Keeps what onnxruntime's quantisation prints off the screen."""
  noise = io.StringIO()
  level = logging.root.manager.disable
  logging.disable(logging.ERROR)
  try:
    with contextlib.redirect_stdout(noise), contextlib.redirect_stderr(noise):
      yield
  finally:
    logging.disable(level)
