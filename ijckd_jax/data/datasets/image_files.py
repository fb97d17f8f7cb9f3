"""Picture files, made such that every decoder sees the same pixels in them.

What readers of a data set agree on is stored as it is: JPEG, PNG and WebP of
8-bit RGB or grey, upright and opaque. They differ on all else: one gives a
palette's indices, another ignores EXIF's orientation, a third returns four
channels. Such a picture is turned upright, laid over white, converted to RGB
and stored as PNG, which loses nothing more.
"""

from collections.abc import Iterator
import contextlib
import dataclasses
import io
import os
import pathlib
import stat
import warnings

import numpy as np

from ijckd_jax.runtime import config_utils

EXTENSIONS = frozenset(
  '.jpg .jpeg .jpe .jfif .png .webp .bmp .gif .tif .tiff .ppm .pgm'.split()
)
# Named, because PIL knows others (EPS) that run programs of their own.
FORMATS = ('JPEG', 'PNG', 'WEBP', 'BMP', 'GIF', 'TIFF', 'PPM')
# MPO is a JPEG with further pictures behind it, as many telephones write it.
KEPT_FORMATS = ('JPEG', 'MPO', 'PNG', 'WEBP')
ORIENTATION = 0x0112  # EXIF's number for it.
BITS_PER_SAMPLE = 258  # TIFF's number for it.
MAX_BYTES = 2**30  # Of a file; more is no picture of MAX_IMAGE_PIXELS of PIL.
DARK = 2**14  # Below it are all values of cameras of 10, 12 and 14 bits.


class Unreadable(ValueError):
  """A file that is no whole picture; the message says why."""


@dataclasses.dataclass(frozen=True)
class Picture:
  """What a data set stores of a file.

  Attributes:
    data: the encoded picture.
    format: the file's, as PIL calls it.
    size: (width, height) in pixels of what is stored.
    change: why `data` is not what the file holds; '' where it is.
    warning: what may be wrong with its pixels; '' if nothing is.
  """

  data: bytes
  format: str
  size: tuple[int, int]
  change: str
  warning: str


def load(path: pathlib.Path) -> bytes:
  """Returns the bytes of a file.

  Raises:
    Unreadable: it is too large, or a folder, FIFO or device.
    OSError: it cannot be read.
  """
  status = os.stat(path)  # First: to open a FIFO is to wait for its writer.
  if not stat.S_ISREG(status.st_mode):
    raise Unreadable('not a regular file')
  if status.st_size > MAX_BYTES:
    raise Unreadable(f'a file of {status.st_size:,} bytes, over {MAX_BYTES:,}')
  return path.read_bytes()


def read(data: bytes) -> Picture:
  """Returns what is to be stored of a file's bytes, decoded in full.

  Raises:
    Unreadable: they are damaged, truncated, too large, or no picture.
  """
  with _opened(data) as image:
    change = _change(image, data)
    if not change:
      return Picture(data, image.format, image.size, '', '')
    shown, warning = _to_rgb(image, data)
    buffer = io.BytesIO()
    # A third of the default's time, for an eighth more bytes.
    shown.save(buffer, 'PNG', compress_level=3)
    return Picture(buffer.getvalue(), image.format, shown.size, change, warning)


def decode(data: bytes):
  """Returns the picture that `read` stores, as PIL's image, and its warning.

  Raises:
    Unreadable: as `read` does.
  """
  with _opened(data) as image:
    return _to_rgb(image, data) if _change(image, data) else (image, '')


@contextlib.contextmanager
def _opened(data: bytes) -> Iterator:
  """Gives PIL's image of a file's bytes; whatever goes wrong is Unreadable."""
  from PIL import Image

  if not data:
    raise Unreadable('an empty file')
  try:
    with warnings.catch_warnings():
      warnings.simplefilter('ignore')  # Of metadata, of merely large pictures.
      with Image.open(io.BytesIO(data), formats=FORMATS) as image:
        if image.format == 'PNG':
          # Its checksums, which decoding leaves out, but other decoders do not.
          Image.open(io.BytesIO(data), formats=FORMATS).verify()
        image.load()
        yield image
  except Image.UnidentifiedImageError as error:
    raise Unreadable('not a picture in a known format') from error
  except Unreadable:
    raise
  except Exception as error:  # Damaged files raise whatever they like.
    config_utils.raise_outside(error)
    raise Unreadable(config_utils.short(error)) from error


def _change(image, data) -> str:
  """Returns why a picture cannot be stored as it is, or ''."""
  if image.format not in KEPT_FORMATS:
    return f'{image.format} format'
  if image.format != 'MPO' and getattr(image, 'is_animated', False):
    return 'animated'
  if image.has_transparency_data:
    return 'transparent'
  if image.mode == 'P':
    return 'palette'
  # PIL calls pictures of 16 bits RGB as well; the header has the depth here.
  if image.format == 'PNG' and data[24] != 8:
    return f'{data[24]} bit'
  if image.mode not in ('RGB', 'L'):
    return image.mode
  return 'EXIF orientation' if _is_turned(image) else ''


def _is_turned(image) -> bool:
  try:
    return image.getexif().get(ORIENTATION, 1) in range(2, 9)
  except Exception as error:  # Damaged EXIF, which viewers ignore as well.
    config_utils.raise_outside(error)
    return False


def _to_rgb(image, data):
  """Returns the first frame as opaque, upright 8-bit RGB, and a warning."""
  from PIL import Image
  from PIL import ImageOps

  # Of PGM, PIL spreads what the header calls white to 65535.
  is_pgm = image.format == 'PPM' and image.mode == 'I'
  if image.mode in ('I', 'F') and not is_pgm:
    raise Unreadable('pixels of 32 bits, of which black and white are unknown')
  if _is_turned(image):
    image = ImageOps.exif_transpose(image)
  if image.mode.startswith('I;16') or is_pgm:
    # PIL's own conversion clips at 255, which leaves a white picture.
    deep = np.asarray(image)
    grey = Image.fromarray((deep >> 8).astype(np.uint8))
    return grey.convert('RGB'), _darkness(int(deep.max()))
  warning = ''
  if _is_deep(image, data):
    # PIL has dropped the lower eight bits, and this its transparency.
    top = max(high for _, high in image.convert('RGB').getextrema())
    warning = _darkness(256 * top + 255)
  if image.has_transparency_data:
    image = image.convert('RGBA')
    white = Image.new('RGBA', image.size, 'white')
    image = Image.alpha_composite(white, image)
  return image.convert('RGB'), warning


def _is_deep(image, data) -> bool:
  """Returns whether a file has 16 bits a channel where PIL keeps 8 of them."""
  if image.format == 'TIFF':
    return 16 in image.tag_v2.get(BITS_PER_SAMPLE, ())
  return image.format == 'PNG' and data[24] == 16


def _darkness(top: int) -> str:
  """Returns a warning where 16 bits hold the values of fewer."""
  if top >= DARK:
    return ''
  return (
    f'no value above {top} of 65535, which makes it dark: {top >> 8} of 255'
  )
