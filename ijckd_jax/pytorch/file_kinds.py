"""What a file is that holds no checkpoint, for messages."""

from collections.abc import Sequence

from ijckd_jax.pytorch import wrappers

# Of files that hold a state dict.
SUFFIXES = ('.safetensors', '.pth', '.pt')

_OF_TORCH = 'only weights of PyTorch are read'
# Files that are downloaded in place of a checkpoint: where their magic bytes
# stand, these bytes, and what the file is.
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


def describe_members(members: Sequence[str]) -> str:
  """Returns what a zip archive with these members is."""
  inside = [name for name in members if name.endswith(SUFFIXES)]
  if inside:
    return f'unpack it first, it holds {wrappers.word(inside[0])}'
  if 'model.weights.h5' in members:
    return f'it is a model of Keras; {_OF_TORCH}'
  if members and all(name.endswith('.npy') for name in members):
    return 'it is an .npz file of NumPy'
  some = ', '.join(wrappers.word(name) for name in members[:3])
  return f'it holds {some or "nothing"}' + (', ...' if members[3:] else '')


def describe(head: bytes) -> str:
  """Returns what a file is that starts with these bytes."""
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


def _is_text(head):
  """Returns whether the first bytes are of a text."""
  try:
    text = head.decode()
  except UnicodeDecodeError as error:
    if error.start < len(head) - 3:  # Nearer to the end, a character is cut.
      return False
    text = head[: error.start].decode()
  return all(char.isprintable() or char in '\t\r\n' for char in text)


def _is_page(head):
  """Returns whether the first bytes are those of a web page, or of an error."""
  text = head.decode('utf-8-sig', 'ignore').lstrip().lower()
  return text.startswith(('<!doctype html', '<html', '<head', '<body')) or (
    text.startswith('<') and ('<html' in text or text.startswith('<?xml'))
  )
