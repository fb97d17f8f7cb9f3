"""State dicts of PyTorch, read and written as NumPy arrays.

What is read may come from strangers: nothing in a file is ever executed.
"""

import argparse
import collections
from collections.abc import Mapping
import dataclasses
import hashlib
import io
import re
import warnings
import zipfile

from etils import epath
import numpy as np
import safetensors
import safetensors.numpy

from ijckd_jax.pytorch import wrappers
from ijckd_jax.runtime import config_utils
from ijckd_jax.runtime import disk

SUFFIXES = ('.safetensors', '.pth', '.pt')

_OF_TORCH = 'only weights of PyTorch are read'
# What else is downloaded in place of a checkpoint, by where it says so.
_MAGIC = (
  (0, b'\x89PNG', 'a PNG image'),
  (0, b'\xff\xd8\xff', 'a JPEG image'),
  (0, b'\x1f\x8b', 'compressed by gzip; unpack it first'),
  (0, b'BZh', 'compressed by bzip2; unpack it first'),
  (0, b'\xfd7zXZ', 'compressed by xz; unpack it first'),
  (0, b'\x28\xb5\x2f\xfd', 'compressed by zstd; unpack it first'),
  (0, b'7z\xbc\xaf', 'a 7z archive; unpack it first'),
  (0, b'Rar!', 'a RAR archive; unpack it first'),
  (0, b'\x89HDF', f'an HDF5 file, such as Keras writes; {_OF_TORCH}'),
  (0, b'\x93NUMPY', 'an array of NumPy, without names'),
  (0, b'GGUF', f'a GGUF file; {_OF_TORCH}'),
  (0, b'%PDF', 'a PDF'),
  (4, b'TFL3', f'a model of TensorFlow Lite; {_OF_TORCH}'),
)
# In files of NumPy 1 and 2.
_NUMPY_NAMES = (
  'numpy.dtype',
  'numpy.ndarray',
  *(
    f'numpy.{core}.multiarray.{name}'
    for core in ('core', '_core')
    for name in ('scalar', '_reconstruct')
  ),
)
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
# Older unpicklers can be made to run code in spite of weights_only:
# CVE-2025-32434 up to 2.5, CVE-2026-24747 up to 2.9.
_SAFE_TORCH = (2, 10)


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
    torch = _import_torch(f'to write {path}')
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
  torch = _import_torch('loads a model')
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
  if path.suffix not in SUFFIXES:
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
    torch = _import_torch(f'to read {path}')
    content = _load_torch(path, size, torch)
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
      f'{path} is not a checkpoint: {_describe(head)}'
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


def _is_text(head):
  """Returns whether the first bytes are of a text."""
  try:
    text = head.decode()
  except UnicodeDecodeError as error:
    if error.start < len(head) - 3:  # Otherwise a character that is cut.
      return False
    text = head[: error.start].decode()
  return all(char.isprintable() or char in '\t\r\n' for char in text)


def _is_page(head):
  """Returns whether the first bytes are those of a web page, or of an error."""
  text = head.decode('utf-8-sig', 'ignore').lstrip().lower()
  return text.startswith(('<!doctype html', '<html', '<head', '<body')) or (
    text.startswith('<') and ('<html' in text or text.startswith('<?xml'))
  )


def _describe(head):
  """Returns what a file is whose first bytes are no checkpoint's."""
  if len(head) < 9:
    return f'it has only {len(head)} bytes'
  if head.startswith(b'version https://git-lfs'):
    return (
      'it is a Git LFS pointer, which only names one; git lfs pull fetches the '
      'file itself'
    )
  if _is_page(head):
    return 'it is a web page; the address led to a page, not to the file'
  for start, magic, name in _MAGIC:
    if head[start:].startswith(magic):
      return f'it is {name}'
  if head[0] == 8 and 3 <= head[1] < 32 and head[2] in b'\x12\x1a\x22\x2a\x3a':
    return 'it is an ONNX model; give the PyTorch file that it was made of'
  if head.startswith(b'\x08\x01\x12'):
    return f'it is a SavedModel of TensorFlow; {_OF_TORCH}'
  if head[257:262] == b'ustar':
    return 'it is a tar archive; unpack it first'
  if _is_text(head):
    return 'it is a text'
  return 'its first bytes are those of no known format'


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


def _import_torch(purpose):
  try:
    import torch
  except ImportError as error:
    raise config_utils.UserError(
      f"PyTorch is needed {purpose}: pip install 'ijckd_jax[torch]', or give a "
      '.safetensors file, which needs no PyTorch'
    ) from error
  return torch


def _load_torch(path, size, torch):
  """Returns what torch.save put into a file, of weights and plain values."""
  if torch.__version__ < _SAFE_TORCH:
    raise config_utils.UserError(
      f'{path}: PyTorch {torch.__version__} cannot read the files of others '
      "safely: pip install --upgrade 'torch >= 2.10', or give a .safetensors "
      'file'
    )
  # Others put NumPy's scalars and arrays beside the weights, such as the best
  # accuracy. None of them is read, so a stand-in takes their place, and none of
  # NumPy's code is reached.
  # RepDistiller and torchdistill save their flags along, an argparse.Namespace.
  # Allowing it gives a file no power. The unpickler makes one without arguments
  # and fills its __dict__. Of all attributes it would call only __setstate__,
  # which a file could indeed put there, but only as something that it was
  # allowed to call in the first place: globals are looked up in torch's list
  # alone, and attributes never. Here no attribute of it is read.
  allowed = torch.serialization.safe_globals(
    [argparse.Namespace, *((_OfNumpy, name) for name in _NUMPY_NAMES)]
  )
  with path.open('rb') as stream, warnings.catch_warnings(), allowed:
    warnings.simplefilter('ignore')
    if stream.read(2) == b'PK':
      _check_zip(path, size, stream)
    stream.seek(0)
    try:
      return torch.load(
        stream, map_location='cpu', weights_only=True, mmap=False
      )
    except Exception as error:
      config_utils.raise_outside(error)
      raise _refusal(path, size, stream, error, torch) from error


def _describe_members(members):
  """Returns what a zip archive is that holds no checkpoint as its content."""
  inside = [name for name in members if name.endswith(SUFFIXES)]
  if inside:
    return f'unpack it first, it holds {wrappers.word(inside[0])}'
  if 'model.weights.h5' in members:
    return f'it is a model of Keras; {_OF_TORCH}'
  if members and all(name.endswith('.npy') for name in members):
    return 'it is an .npz file of NumPy'
  some = ', '.join(wrappers.word(name) for name in members[:3])
  return f'it holds {some or "nothing"}' + (', ...' if members[3:] else '')


class _OfNumpy:
  """Stands for a scalar, an array or a dtype of NumPy, and holds nothing."""

  __slots__ = ()

  def __new__(cls, *_):
    return super().__new__(cls)

  def __setstate__(self, _):
    pass


def _check_zip(path, size, stream):
  """Raises unless a zip archive is whole and a checkpoint."""
  try:
    archive = zipfile.ZipFile(stream)
    members = archive.namelist()
  except zipfile.BadZipFile as error:
    raise config_utils.UserError(
      f'{path} is cut off or damaged: its end is missing; fetch it again'
    ) from error
  names = {name.rpartition('/')[2] for name in members}
  if 'constants.pkl' in names:
    raise config_utils.UserError(
      f'{path} is a program (TorchScript), not weights; if you trust it: '
      "torch.save(torch.jit.load(FILE).state_dict(), 'weights.pth')"
    )
  if 'data.pkl' not in names:
    raise config_utils.UserError(
      f'{path} is a zip archive, but not one that torch.save wrote: '
      f'{_describe_members(members)}'
    )
  # torch.save compresses nothing, nor does it store anything twice.
  unpacked = sum(member.file_size for member in archive.infolist())
  if unpacked > size:
    raise config_utils.UserError(
      f'{path} would become {unpacked:,} bytes from {size:,}: it is '
      'compressed, which torch.save never does, so it is not unpacked; if you '
      'trust it, load it once with PyTorch and save it again'
    )
  # torch.load does not look at the checksums.
  if damaged := archive.testzip():
    raise config_utils.UserError(
      f'{path} is damaged: {wrappers.word(damaged)} in it has another '
      'checksum; fetch it again, or save it once more if PyTorch saved it '
      'without checksums'
    )


def _refusal(path, size, stream, error, torch):
  """Returns the UserError for what torch.load raised."""
  message = str(error)
  ended = stream.tell() >= size
  wanted = re.findall(
    r'GLOBAL (\S+) (?:was not an allowed|whose module)', message
  ) or re.findall(r'``(\S+)`` must be imported to load', message)
  zipped = False
  try:
    stream.seek(0)
    zipped = stream.read(2) == b'PK'
    stream.seek(0)
    wanted = sorted(
      torch.serialization.get_unsafe_globals_in_checkpoint(stream) or wanted
    )
  except Exception:  # It reads zip archives of few opcodes; `wanted` is enough.
    wanted = sorted(wanted)
  # A name that the end of the file cuts is no name.
  if wanted and (zipped or not ended):
    names = ', '.join(wrappers.word(name) for name in wanted[:5])
    more = f' and {len(wanted) - 5} more' if len(wanted) > 5 else ''
    return config_utils.UserError(
      f'{path} needs more than weights: {names}{more}; such a file can run '
      'code, so if you trust it, load it once with PyTorch and save its state '
      'dict alone: x = torch.load(FILE, weights_only=False); torch.save('
      "x.state_dict() if hasattr(x, 'state_dict') else x['state_dict'], "
      "'weights.pth'), or convert it to .safetensors"
    )
  if 'magic number' in message:
    return config_utils.UserError(
      f'{path} is a pickle, but not one that torch.save wrote'
    )
  if not zipped and (ended or 'unexpected EOF' in message):
    return config_utils.UserError(
      f'{path} is cut off: it ends too early; fetch it again'
    )
  # The rest of torch's message tells how to load it without protection.
  message = message.rpartition('WeightsUnpickler error:')[2]
  message = message.partition('Check the documentation')[0]
  return config_utils.UserError(
    f'{path} is damaged, or not a checkpoint that torch.save wrote: '
    f'{config_utils.short(message.strip() or error)}'
  )


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
