"""State dicts of PyTorch, read and written as NumPy arrays.

What is read may come from strangers: nothing in a file is ever executed.
"""

import collections
from collections.abc import Mapping
import dataclasses
import hashlib
import io

from etils import epath
import numpy as np
import safetensors
import safetensors.numpy

from ijckd_jax.pytorch import file_kinds
from ijckd_jax.pytorch import safe_loading
from ijckd_jax.pytorch import wrappers
from ijckd_jax.runtime import config_utils
from ijckd_jax.runtime import disk

_PRECISIONS = {
  'float16': 'half precision',
  'bfloat16': 'half precision',
  'float64': 'double precision',
}
_SAFETENSORS_TYPES = {
  **{'F64': 'f8', 'F32': 'f4', 'F16': 'f2', 'BOOL': '?'},
  **{f'I{8 * size}': f'i{size}' for size in (1, 2, 4, 8)},
  **{f'U{8 * size}': f'u{size}' for size in (1, 2, 4, 8)},
}
# Eight bits become float32, with room for a few views.
_MAX_GROWTH = 8
_MAX_SAFETENSORS_HEADER = 100_000_000


@dataclasses.dataclass(frozen=True)
class StateDict:
  """What was read.

  Attributes:
    arrays: by name; floats as float32, integers and booleans as they are.
    other: further state dicts of the file by their key, such as SimKD's 'proj';
      without moving averages.
    metadata: of a safetensors file, or the strings beside the state dict.
    notes: what was taken and changed on the way, a short sentence each.
    sha256: of the file, in hexadecimal.
  """

  arrays: dict[str, np.ndarray]
  other: dict[str, dict[str, np.ndarray]]
  metadata: dict[str, str]
  notes: tuple[str, ...]
  sha256: str


def read(path: epath.PathLike, *, part: str = '') -> StateDict:
  """Returns the state dict in a file of PyTorch or of safetensors.

  Args:
    path: a `.safetensors` file, or one that torch.save wrote, in its format of
      today or of PyTorch 0.4. Only the latter two need PyTorch.
    part: key of the state dict to take, where a file has several, or what
      stands before the names of the tensors to take, such as 'student' and
      'teacher' in a distiller's file; '' takes what is usual: the weights
      rather than their moving average, and the student.

  Raises:
    config_utils.UserError: there is no such file or part, it is damaged or no
      checkpoint, needs more than weights, or has a tensor that is no array of
      finite numbers.
  """
  path = epath.Path(path)
  # Data from strangers can be wrong in more ways than a list could name.
  try:
    return _read(path, part)
  except config_utils.UserError:
    raise
  except Exception as error:
    # A forged file of some bytes can ask for any amount of memory.
    if config_utils.is_no_memory(error):
      raise config_utils.UserError(
        f'{path} cannot be read, since it needs more memory than there is '
        f'({config_utils.short(error)}): end other programs if the file is '
        'sound'
      ) from error
    config_utils.raise_outside(error)
    raise config_utils.UserError(
      f'{path} cannot be read: {config_utils.short(error)}'
    ) from error


def sha256(path: epath.PathLike) -> str:
  """Returns the SHA-256 of a file, in hexadecimal."""
  with epath.Path(path).open('rb') as stream:
    return hashlib.file_digest(stream, 'sha256').hexdigest()


def write(
  path: epath.PathLike,
  arrays: Mapping[str, np.ndarray],
  metadata: Mapping[str, str] | None = None,
  *,
  wrap: bool = False,
) -> None:
  """Writes a state dict; the file appears whole or not at all.

  Args:
    path: ends in `.safetensors`, or in `.pth` or `.pt` for torch.load.
    arrays: by name; they keep their dtypes.
    metadata: strings to go with them. A `.pth` holds them only with `wrap`.
    wrap: whether a `.pth` holds {'state_dict': ..., **metadata} rather than
      the bare state dict.

  Raises:
    config_utils.UserError: the path ends otherwise, or PyTorch is missing.
  """
  path = epath.Path(path)
  check_suffix(path)
  # np.ascontiguousarray would give scalars an axis.
  arrays = {key: np.asarray(value, order='C') for key, value in arrays.items()}
  metadata = dict(metadata or {})
  if path.suffix == '.safetensors':
    data = safetensors.numpy.save(arrays, metadata or None)
  else:
    torch = safe_loading.import_torch(f'to write {path}')
    tensors = collections.OrderedDict(
      (key, _to_torch(value, torch)) for key, value in arrays.items()
    )
    stream = io.BytesIO()
    torch.save({'state_dict': tensors, **metadata} if wrap else tensors, stream)
    data = stream.getvalue()
  disk.write_bytes(path, data)


def load_into(model, state: StateDict, source: str) -> None:
  """Loads a state dict into a torch.nn.Module, every entry of both.

  Raises:
    config_utils.UserError: an entry is missing, is not there, or of another
      shape.
  """
  torch = safe_loading.import_torch('loads a model')
  wanted = model.state_dict()
  tensors = {
    name: _to_torch(array, torch) for name, array in state.arrays.items()
  }
  counters = {
    name: tensor
    for name, tensor in wanted.items()
    if name.endswith('num_batches_tracked')
  }
  described = [
    {name: tuple(tensor.shape) for name, tensor in tree.items()}
    for tree in (counters | tensors, wanted)
  ]
  differ = [
    f'{name} is {described[0].get(name, "not there")} in the file and '
    f'{described[1].get(name, "not there")} in the model'
    for name in sorted(described[0].keys() | described[1].keys())
    if described[0].get(name) != described[1].get(name)
  ]
  if differ:
    more = f', and {len(differ) - 3} more' if differ[3:] else ''
    raise config_utils.UserError(
      f'{source} does not fit the model: {"; ".join(differ[:3])}{more}'
    )
  model.load_state_dict(counters | tensors)


def check_suffix(path: epath.Path) -> None:
  """Raises UserError unless a state dict can be written to a path."""
  if path.suffix not in file_kinds.SUFFIXES:
    raise config_utils.UserError(
      f'{path}: a state dict is written to a .safetensors file, or to a .pth '
      'or .pt for PyTorch'
    )


def _read(path, part):
  """Does what `read` does; whatever may be raised."""
  size, head = _look(path)
  notes = []
  if _is_safetensors(head):
    tensors, metadata = _load_safetensors(path, size, head)
    others, convert = {}, _from_safetensors
  elif head.startswith((b'PK', b'\x80')):
    torch = safe_loading.import_torch(f'to read {path}')
    content = safe_loading.load(path, size, torch)
    tensors, others, metadata, part = wrappers.unwrap(
      path, content, part, torch.is_tensor, notes
    )

    copied = 0

    def convert(tensor):
      nonlocal copied
      array, dtype = _from_torch(tensor, size, torch)
      if array.ctypes.data != tensor.data_ptr():
        copied += array.nbytes
      # Many views of few numbers can fill the memory as well.
      if copied > _MAX_GROWTH * max(size, 2**20):
        raise config_utils.UserError(
          f'and those before it fill {copied:,} bytes, and the file has '
          f'{size:,}: they are views of the same numbers, which is not read'
        )
      return array, dtype
  else:
    raise config_utils.UserError(
      f'{path} is not a checkpoint: {file_kinds.describe(head)}'
    )
  tensors = wrappers.strip(tensors, notes)
  tensors = wrappers.choose(path, tensors, part, notes)
  dtypes = set()
  arrays = _convert(path, '', tensors, convert, dtypes)
  other = {}
  for key, value in others.items():
    where = f'{wrappers.word(key)}: '
    value = wrappers.strip(value, [])
    other[key] = _convert(path, where, value, convert, dtypes)
  for dtype in sorted(dtypes):
    precision = _PRECISIONS.get(dtype, 'low precision')
    notes.append(f'{precision} ({dtype}): imported as float32')
  return StateDict(arrays, other, metadata, tuple(notes), sha256(path))


def _look(path):
  """Returns the size of a file and its first bytes."""
  if not path.exists():
    raise config_utils.UserError(f'there is no file {path}')
  if path.is_dir():
    raise config_utils.UserError(
      f'{path} is a folder: give the checkpoint file in it'
    )
  with path.open('rb') as stream:
    head = stream.read(512)
    size = stream.seek(0, io.SEEK_END)
  if not size:
    raise config_utils.UserError(f'{path} is empty')
  return size, head


def _is_safetensors(head):
  """Returns whether a file that starts so is, or was to be, of safetensors."""
  return head[8:9] == b'{' and _header_size(head) <= _MAX_SAFETENSORS_HEADER


def _header_size(head):
  return int.from_bytes(head[:8], 'little')


def _load_safetensors(path, size, head):
  """Returns the tensors of a safetensors file and its metadata."""
  header_size = _header_size(head)
  if header_size > size - 8:
    raise config_utils.UserError(
      f'{path} is cut off: it ends within its header; fetch it again'
    )
  data = path.read_bytes()
  try:
    tensors = dict(safetensors.deserialize(data))
  except safetensors.SafetensorError as error:
    raise config_utils.UserError(
      f'{path} is cut off or damaged: {config_utils.short(error)}'
    ) from error
  if not tensors:
    raise config_utils.UserError(f'{path} holds no tensors')
  return tensors, disk.safetensors_metadata(data)


def _from_safetensors(tensor):
  """Returns a tensor of a safetensors file, and the name of its dtype."""
  kind, shape, data = tensor['dtype'], tensor['shape'], tensor['data']
  if kind == 'BF16':
    # A bfloat16 is the first half of a float32.
    high = np.frombuffer(data, '<u2').astype(np.uint32) << 16
    return high.view(np.float32).reshape(shape), 'bfloat16'
  if kind not in _SAFETENSORS_TYPES:
    raise config_utils.UserError(f'is of type {kind}, which is not read')
  array = np.frombuffer(data, f'<{_SAFETENSORS_TYPES[kind]}').reshape(shape)
  return array, array.dtype.name


def _convert(path, where, tensors, convert, dtypes):
  """Returns the arrays of tensors; adds to the dtypes that were changed."""
  arrays = {}
  for name, tensor in tensors.items():
    label = f'{path}: the tensor {where}{wrappers.word(name)}'
    try:
      array, dtype = convert(tensor)
    except config_utils.UserError as error:
      raise config_utils.UserError(f'{label} {error}') from error
    except Exception as error:
      config_utils.raise_outside(error)
      raise config_utils.UserError(
        f'{label} cannot be read: {config_utils.short(error)}'
      ) from error
    if np.issubdtype(array.dtype, np.floating):
      if dtype != 'float32':
        dtypes.add(dtype)
      with np.errstate(over='ignore'):
        array = array.astype(np.float32, copy=False)
      if not np.isfinite(array).all():
        raise config_utils.UserError(
          f'{label} holds numbers that are not finite in float32'
        )
    arrays[name] = array
  return arrays


def _from_torch(tensor, size, torch):
  """Returns a tensor of PyTorch as an array, and the name of its dtype."""
  for kind, wrong in (
    ('complex', tensor.is_complex()),
    ('quantized', tensor.is_quantized),
    ('sparse', tensor.layout != torch.strided),
    ('nested', tensor.is_nested),
    ('without data', tensor.is_meta),
  ):
    if wrong:
      raise config_utils.UserError(f'is {kind}, which is not read')
  # One number can be spread over any shape, and fill the memory.
  if tensor.numel() * tensor.element_size() > max(size, 2**20):
    raise config_utils.UserError('is larger than the file that holds it')
  dtype = str(tensor.dtype).removeprefix('torch.')
  tensor = tensor.detach()
  if tensor.is_floating_point():
    tensor = tensor.float()
  return tensor.resolve_neg().contiguous().numpy(), dtype


def _to_torch(array, torch):
  """Returns an array as a tensor of the same dtype, with memory of its own."""
  if array.dtype.name == 'bfloat16':  # Which torch.from_numpy does not know.
    bits = torch.from_numpy(array.view(np.int16).copy())
    return bits.view(torch.bfloat16)
  return torch.from_numpy(array.copy())
