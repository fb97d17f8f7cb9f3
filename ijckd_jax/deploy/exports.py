"""A bundle becomes the content of a file, checked in the file's own runtime."""

from collections.abc import Callable
from collections.abc import Iterator
import dataclasses
import hashlib
from typing import Any

import numpy as np

from ijckd_jax.bundles import bundles
from ijckd_jax.deploy import checks
from ijckd_jax.deploy import deployed as deployed_lib
from ijckd_jax.deploy import onnx_files
from ijckd_jax.deploy import safetensors_files
from ijckd_jax.deploy import stablehlo_files

Batches = Iterator[dict[str, np.ndarray]]


@dataclasses.dataclass(frozen=True)
class Settings:
  """How a bundle becomes a file, by the names of the flags of `ijckd export`.

  Attributes:
    format: a key of ENCODERS.
    input: the images' dtype, see deployed.PIXELS.
    weights: how they are stored: 'float32', 'float16' or, in ONNX, 'int8'.
    split: whose images the file is checked on; 'pictures' of none.
    max_drop: see checks.judge.
    trust_code: see bundles.load.
    output: where the file is to lie, for messages.
  """

  format: str
  input: str
  weights: str
  split: str
  max_drop: float
  trust_code: bool
  output: str


def export(
  bundle: bundles.Bundle,
  examples: Batches,
  calibration: Batches,
  settings: Settings,
) -> tuple[bytes, dict[str, Any]]:
  """Returns the content of a file that was checked, and its description (JSON).

  Args:
    bundle: computes in float32.
    examples: as checks.images gives them; they check the file.
    calibration: the same of training images, which tell the ranges of int8.
    settings: how the file is made.

  Raises:
    config_utils.UserError: the file does not do what the bundle does.
  """
  deployed = deployed_lib.deploy(bundle, takes=settings.input)
  encode = ENCODERS[settings.format]
  data, open_session = encode(bundle, deployed, calibration, settings)
  result = checks.compare(bundle, open_session(data), examples)
  checks.judge(result, settings.weights, settings.max_drop)
  return data, {
    'format': settings.format,
    'weights': settings.weights,
    'bytes': len(data),
    'sha256': hashlib.sha256(data).hexdigest(),
    'check': {'split': settings.split, **result},
    'metadata': dict(deployed.metadata),
  }


def _onnx(bundle, deployed, calibration, settings):
  del bundle
  data = onnx_files.encode(deployed)
  if settings.weights == 'float16':
    data = onnx_files.halve(data)
  if settings.weights == 'int8':
    images = (checks.as_taken(x['image'], settings.input) for x in calibration)
    data = onnx_files.quantize(data, images)
  return data, lambda data: onnx_files.Session(data, settings.output)


def _stablehlo(bundle, deployed, calibration, settings):
  del bundle, calibration
  half = settings.weights == 'float16'
  data = stablehlo_files.encode(deployed, half=half)
  return data, lambda data: stablehlo_files.Session(
    data, settings.output, dict(deployed.metadata)
  )


def _safetensors(bundle, deployed, calibration, settings):
  del calibration
  half = settings.weights == 'float16'
  data = safetensors_files.encode(bundle, deployed, half=half)
  return data, lambda data: safetensors_files.Session(
    data, settings.output, trust_code=settings.trust_code
  )


# Each takes the bundle, its function, training images and the settings, and
# returns the content of the file and a function that opens such a content in
# the runtime of its format.
ENCODERS: dict[str, Callable[..., tuple[bytes, Callable[[bytes], Any]]]] = {
  'onnx': _onnx,
  'stablehlo': _stablehlo,
  'safetensors': _safetensors,
  'web': _onnx,
}
