"""Picture files, made such that every decoder sees the same pixels in them.

What readers of a data set agree on is stored as it is: JPEG, PNG and WebP of
8-bit RGB or grey, upright and opaque. They differ on all else: one gives a
palette's indices, another ignores EXIF's orientation, a third returns four
channels. Such a picture is turned upright, laid over white, converted to RGB
and stored as PNG, which loses nothing more.
"""

import dataclasses
import io
import warnings

import numpy as np

from ijckd_jax import config_utils

EXTENSIONS = frozenset(
  '.jpg .jpeg .jpe .jfif .png .webp .bmp .gif .tif .tiff .ppm .pgm'.split()
)
# Named, because PIL knows others (EPS) that run programs of their own.
FORMATS = ('JPEG', 'PNG', 'WEBP', 'BMP', 'GIF', 'TIFF', 'PPM')
# MPO is a JPEG with further pictures behind it, as many telephones write it.
KEPT_FORMATS = ('JPEG', 'MPO', 'PNG', 'WEBP')
ORIENTATION = 0x0112  # EXIF's number for it.


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
  """

  data: bytes
  format: str
  size: tuple[int, int]
  change: str


def read(data: bytes) -> Picture:
  """Returns what is to be stored of a file's bytes, decoded in full.

  Raises:
    Unreadable: they are damaged, truncated, too large, or no picture.
  """
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
        change = _change(image, data)
        if not change:
          return Picture(data, image.format, image.size, '')
        png = _to_rgb(image)
        buffer = io.BytesIO()
        # A third of the default's time, for an eighth more bytes.
        png.save(buffer, 'PNG', compress_level=3)
        return Picture(buffer.getvalue(), image.format, png.size, change)
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


def _to_rgb(image):
  """Returns the first frame of a picture as opaque, upright 8-bit RGB."""
  from PIL import Image
  from PIL import ImageOps

  if image.mode in ('I', 'F'):
    raise Unreadable('pixels of 32 bits, of which black and white are unknown')
  if _is_turned(image):
    image = ImageOps.exif_transpose(image)
  if image.mode.startswith('I;16'):
    # PIL's own conversion clips at 255, which leaves a white picture.
    return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert(
      'RGB'
    )
  if image.has_transparency_data:
    image = image.convert('RGBA')
    white = Image.new('RGBA', image.size, 'white')
    image = Image.alpha_composite(white, image)
  return image.convert('RGB')
