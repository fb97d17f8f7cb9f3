"""Files of torch.save, loaded without running anything that is in them."""

import argparse
import re
from typing import Any
import warnings
import zipfile

from etils import epath

from ijckd_jax.pytorch import file_kinds
from ijckd_jax.pytorch import wrappers
from ijckd_jax.runtime import config_utils

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
# Older unpicklers can be made to run code in spite of weights_only:
# CVE-2025-32434 up to 2.5, CVE-2026-24747 up to 2.9.
_SAFE_TORCH = (2, 10)


def import_torch(purpose: str) -> Any:
  """Returns PyTorch's module, or raises UserError where it is not installed."""
  try:
    import torch
  except ImportError as error:
    raise config_utils.UserError(
      f"PyTorch is needed {purpose}: pip install 'ijckd_jax[torch]', or give a "
      '.safetensors file, which needs no PyTorch'
    ) from error
  return torch


def load(path: epath.Path, size: int, torch: Any) -> Any:
  """Returns what torch.save put into a file, of weights and plain values.

  Args:
    path: of the file.
    size: its bytes.
    torch: as `import_torch` returns it.

  Raises:
    config_utils.UserError: it is damaged or no checkpoint, needs more than
      weights, or this PyTorch cannot read it safely.
  """
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
      f'{file_kinds.describe_members(members)}'
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
  except Exception:
    # PyTorch cannot list the names in every file; its message named one.
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
