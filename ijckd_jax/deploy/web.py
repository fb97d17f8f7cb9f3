"""A static page that runs exported classifiers in the browser, offline.

The folder holds the page, the models, and onnxruntime-web, which npm brings and
which is kept in the user's cache directory. Any web server can serve it.
"""

import base64
from collections.abc import Mapping
from collections.abc import Sequence
import dataclasses
import hashlib
import io
import json
import pathlib
import shutil
import subprocess
import tarfile
import tempfile
from typing import Any

from etils import epath

from ijckd_jax.deploy import sessions
from ijckd_jax.runtime import compilation_cache
from ijckd_jax.runtime import config_utils
from ijckd_jax.runtime import disk

PAGE = pathlib.Path(__file__).parent / 'page'
RUNTIME = 'onnxruntime-web'
VERSION = '1.30.0'
# As the registry states it: base64 of SHA-512.
INTEGRITY = (
  'q0y+JrrtukXSzsBWEMccVfqX25LRmosXHF+CaRJmg8pZClzcV7svNc4rKY3jL02Vb7QmRMDs1Sig'
  'qR4CXAfKYQ=='
)
ARCHIVE = f'{RUNTIME}-{VERSION}.tgz'
TAKEN = (
  'dist/ort.wasm.bundle.min.mjs',
  'dist/ort-wasm-simd-threaded.wasm',
  'package.json',
)


@dataclasses.dataclass(frozen=True)
class Model:
  """What the page runs.

  Attributes:
    role: 'student' or 'teacher'.
    data: an ONNX model of onnx_files.
    metadata: its metadata.
  """

  role: str
  data: bytes
  metadata: Mapping[str, str]


def runtime() -> dict[str, bytes]:
  """Returns onnxruntime-web's files by name.

  Raises:
    config_utils.UserError: they are not in the cache and npm cannot bring them,
      or they are not those that they should be.
  """
  archive = compilation_cache.user_folder() / ARCHIVE
  if not archive.exists():
    _fetch(archive)
  data = archive.read_bytes()
  found = base64.b64encode(hashlib.sha512(data).digest()).decode()
  if found != INTEGRITY:
    raise config_utils.UserError(
      f'{archive} is not {RUNTIME} {VERSION}: remove it, and run this again'
    )
  with tarfile.open(fileobj=io.BytesIO(data)) as tar:
    return {
      pathlib.PurePath(name).name: tar.extractfile(f'package/{name}').read()
      for name in TAKEN
    }


def _fetch(archive: pathlib.Path) -> None:
  """Lets npm bring the archive."""
  by_hand = f'or bring it by hand: npm pack {RUNTIME}@{VERSION}, to {archive}'
  if shutil.which('npm') is None:
    raise config_utils.UserError(
      f'--format web needs npm, which brings {RUNTIME}: install it, {by_hand}'
    )
  with tempfile.TemporaryDirectory() as folder:
    done = subprocess.run(
      ['npm', 'pack', '--silent', f'{RUNTIME}@{VERSION}'],
      cwd=folder,
      capture_output=True,
      text=True,
      check=False,
    )
    packed = pathlib.Path(folder) / ARCHIVE
    if done.returncode or not packed.exists():
      raise config_utils.UserError(
        f'npm cannot bring {RUNTIME} '
        f'({config_utils.short(done.stderr or done.stdout)}): try again, '
        f'{by_hand}'
      )
    archive.parent.mkdir(parents=True, exist_ok=True)
    disk.write_bytes(archive, packed.read_bytes())


def write(
  folder: pathlib.Path,
  models: Sequence[Model],
  files: Mapping[str, bytes],
  export: Mapping[str, Any],
) -> None:
  """Writes the page; the folder appears whole or not at all.

  Args:
    folder: where; what is there is replaced.
    models: to run side by side, the student first.
    files: of onnxruntime-web by name, see `runtime`.
    export: what is known of the files, JSON.
  """
  contents = {path.name: path.read_bytes() for path in PAGE.iterdir()}
  contents |= {f'onnxruntime/{name}': data for name, data in files.items()}
  contents |= {f'{model.role}.onnx': model.data for model in models}
  about = [_describe(model) for model in models]
  for name, content in (
    ('models.json', {'models': about}),
    ('export.json', export),
  ):
    contents[name] = f'{json.dumps(content, indent=2)}\n'.encode()
  disk.write_folder(epath.Path(folder), contents)


def _describe(model: Model) -> dict[str, Any]:
  """Returns what the page must know of a model."""
  metadata = model.metadata
  shape = json.loads(metadata['image_shape'])
  crop = sessions.described_crop(metadata, shape[0])
  return {
    'role': model.role,
    'file': f'{model.role}.onnx',
    'description': metadata['description'],
    'class_names': json.loads(metadata['class_names']),
    'image_shape': shape,
    'takes': metadata['takes'],
    'crop': dataclasses.asdict(crop),
  }
