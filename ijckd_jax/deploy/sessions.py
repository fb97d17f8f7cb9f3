"""Classifiers by path: bundles, and the files that were made of them."""

from collections.abc import Mapping
import hashlib
import json
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ijckd_jax.bundles import bundles
from ijckd_jax.bundles import specification
from ijckd_jax.data import images
from ijckd_jax.deploy import deployed as deployed_lib
from ijckd_jax.deploy import onnx_files
from ijckd_jax.deploy import safetensors_files
from ijckd_jax.deploy import stablehlo_files
from ijckd_jax.runtime import config_utils

SUFFIXES = ('.onnx', '.safetensors', '.stablehlo')


class _BundleSession:
  """A bundle, run by JAX as it was trained; see onnx_files.Session."""

  takes = 'uint8'

  def __init__(self, bundle: bundles.Bundle):
    network = bundle.network
    self.metadata = deployed_lib.metadata(bundle, self.takes)
    self.image_shape = tuple(bundle.image_shape)
    self._variables = bundle.variables

    @jax.jit
    def call(variables, images):
      logits = network(variables, network.preprocessing(images)).logits
      return logits, jax.nn.softmax(logits)

    self._call = call

  def __call__(self, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns logits and probabilities, (B, K) float32 each."""
    return jax.device_get(self._call(self._variables, images))


def load(path: str, *, trust_code: bool = False) -> Any:
  """Returns a classifier: a function of images with `metadata`.

  Args:
    path: a bundle's or run's folder, or a file that
      `ijckd export` wrote.
    trust_code: see bundles.load; a StableHLO file is only read if it is set.

  Raises:
    config_utils.UserError: there is none, or it is damaged, not trusted,
      without a head, or another file than the one that FILE.json beside it
      describes.
  """
  file = pathlib.Path(config_utils.expand(path))
  if file.suffix not in SUFFIXES or file.is_dir():
    bundle = bundles.load(path, dtype=jnp.float32, trust_code=trust_code)
    bundle.check_head(path)
    return _BundleSession(bundle)
  try:
    data = file.read_bytes()
  except OSError as error:
    raise config_utils.UserError(f'{path} cannot be read: {error}') from error
  if file.suffix == '.stablehlo' and not trust_code:
    raise config_utils.UserError(
      f'{path} is a program; XLA reads it, and was not made for files of '
      'strangers: give --trust_code if you trust it'
    )
  about = _beside(file, data)
  if file.suffix == '.onnx':
    return onnx_files.Session(data, path)
  if file.suffix == '.safetensors':
    return safetensors_files.Session(data, path, trust_code=trust_code)
  if about is None:
    raise config_utils.UserError(
      f'{file.name}.json is missing, which says what {path} is: copy it, too'
    )
  return stablehlo_files.Session(data, path, about)


def _beside(file: pathlib.Path, data: bytes) -> dict[str, str] | None:
  """Returns the metadata that stand beside a file; None if nothing does.

  Raises:
    config_utils.UserError: what stands there is damaged, or is of other data.
  """
  beside = file.with_name(f'{file.name}.json')
  try:
    about = json.loads(beside.read_bytes())
    metadata, sha256 = dict(about['metadata']), about['sha256']
  except FileNotFoundError:
    return None
  except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
    raise config_utils.UserError(
      f'{beside}, which says what {file} is, cannot be read: '
      f'{config_utils.short(error)}'
    ) from error
  if sha256 != hashlib.sha256(data).hexdigest():
    raise config_utils.UserError(
      f'{file} is damaged, or another file than the one that {beside} '
      'describes: its SHA-256 differs; copy both again'
    )
  return metadata


def class_names(session: Any, what: str) -> list[str]:
  """Returns the names of a classifier's classes.

  Args:
    session: as `load` returns it.
    what: its path, for the message.

  Raises:
    config_utils.UserError: its metadata have none.
  """
  try:
    names = json.loads(session.metadata['class_names'])
    return [str(name) for name in names]
  except (KeyError, ValueError, TypeError) as error:
    raise config_utils.UserError(
      f'{what} does not say what its classes are called'
    ) from error


def crop_of(session: Any) -> images.CentreCrop:
  """Returns how pictures of any size become a classifier's images.

  Args:
    session: as `load` returns it.

  Raises:
    config_utils.UserError: its metadata are damaged.
  """
  return described_crop(session.metadata, session.image_shape[0])


def described_crop(
  metadata: Mapping[str, str], height: int
) -> images.CentreCrop:
  """Does what `crop_of` does, by the metadata and the height of the images."""
  with config_utils.blame("how the classifier's pictures are cropped"):
    if 'crop' in metadata:
      return specification.read_crop(json.loads(metadata['crop']), height)
    # A file that an earlier version of ijckd_jax wrote.
    dataset = json.loads(metadata.get('info', '{}')).get('dataset')
    return deployed_lib.crop_of_dataset(dataset, height)
