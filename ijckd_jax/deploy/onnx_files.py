"""ONNX files: written by jax2onnx, cleaned by onnxruntime, run by it.

jax2onnx turns each primitive of the traced function into operators, with a pair
of transpositions around every convolution, since ONNX has channels first. The
shapes that it notes of what is in between are of the other layout and would be
refused. They are left out (onnx_layout.py): onnxruntime infers its own, and its
optimizer, run once as the file is written, takes transpositions and constants
away. It knows no hardware at the level that is used, so that the file runs
everywhere.
"""

from collections.abc import Iterable
import contextlib
import importlib.metadata
import io
import logging
import pathlib
import tempfile

import jax
from jax import export
import jax.extend
import numpy as np

from ijckd_jax import config_utils
from ijckd_jax.deploy import deployed as deployed_lib
from ijckd_jax.deploy import onnx_layout

IMAGES, LOGITS, PROBABILITIES = 'images', 'logits', 'probabilities'
# Of onnxruntime 1.24 and later, the oldest that jax2onnx takes.
OPSET = 21
# Operators whose weights are stored in half precision, or in eight bits.
WEIGHED = ('Conv', 'Gemm', 'MatMul')


def require():
  """Raises UserError where a package is missing."""
  for name in ('onnx', 'onnxruntime', 'jax2onnx'):
    try:
      with _quiet():
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

  model = _convert(deployed)
  onnx_layout.rewrite(model)
  model = _optimized(model)
  onnx_layout.fold_preprocessing(model)
  for key, value in deployed.metadata.items():
    model.metadata_props.add(key=key, value=value)
  onnx.checker.check_model(model, full_check=True)
  return model.SerializeToString()


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

    options = _options()
    options.intra_op_num_threads = num_threads
    try:
      self._session = onnxruntime.InferenceSession(
        data, options, providers=['CPUExecutionProvider']
      )
    except Exception as error:  # Of a class that onnxruntime keeps private.
      raise config_utils.UserError(
        f'{what} cannot be read by onnxruntime: {config_utils.short(error)}'
      ) from error
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


def _convert(deployed):
  """Returns the function as jax2onnx writes it."""
  import jax2onnx

  (batch,) = export.symbolic_shape('B')
  shape = deployed.shape(batch)
  # Traced here: jax2onnx has layers of Linen of its own, which know nothing of
  # the biases that batch norms leave.
  traced = jax.make_jaxpr(lambda x: deployed.logits(deployed.arrays, x))(shape)

  def whole(images):
    (logits,) = jax.extend.core.jaxpr_as_fun(traced)(images)
    return logits, jax.nn.softmax(logits)

  try:
    with _quiet():
      return jax2onnx.to_onnx(
        whole,
        [shape],
        model_name=deployed.metadata['backbone'],
        opset=OPSET,
        input_names=[IMAGES],
        output_names=[LOGITS, PROBABILITIES],
      )
  except Exception as error:  # It raises what its parts raise.
    versions = ' and '.join(
      f'{name} {importlib.metadata.version(name)}'
      for name in ('jax2onnx', 'jax')
    )
    raise config_utils.UserError(
      f'the network cannot be said in ONNX: {config_utils.short(error)} '
      f'({versions}; pip install "ijckd_jax[onnx]" takes two that fit '
      'together); --format stablehlo takes whatever JAX runs'
    ) from error


def _optimized(model):
  """Returns a model as onnxruntime rewrites it for any hardware."""
  import onnx
  import onnxruntime

  options = _options()
  options.graph_optimization_level = (
    onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
  )
  with tempfile.TemporaryDirectory() as folder:
    path = pathlib.Path(folder) / 'model.onnx'
    options.optimized_model_filepath = str(path)
    try:
      onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=['CPUExecutionProvider']
      )
      found = onnx.load(path)
    except Exception as error:  # A full disk, too, is of a class of its own.
      raise config_utils.UserError(
        f'onnxruntime cannot rewrite the network in {folder}: '
        f'{config_utils.short(error)}'
      ) from error
  used = {node.domain for node in found.graph.node}
  opsets = [x for x in found.opset_import if x.domain in used]
  del found.opset_import[:]
  found.opset_import.extend(opsets)
  return found


def _options():
  import onnxruntime

  options = onnxruntime.SessionOptions()
  options.log_severity_level = 3  # Errors.
  return options


@contextlib.contextmanager
def _quiet():
  """Keeps what jax2onnx prints about itself off the screen."""
  noise = io.StringIO()
  level = logging.root.manager.disable
  logging.disable(logging.ERROR)
  try:
    with contextlib.redirect_stdout(noise), contextlib.redirect_stderr(noise):
      yield
  finally:
    logging.disable(level)
