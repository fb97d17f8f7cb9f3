"""From an encoded image to pixels, on the host: decode, crop, resize.

The views are torchvision's: random resized crops in training, the centre of the
resized image in evaluation.
"""

import dataclasses
import functools
import io
import math

import numpy as np

CROP_ATTEMPTS = 10  # As torchvision's RandomResizedCrop.
JPEG_END = b'\xff\xd9'


class BadImage(ValueError):
  """The bytes are no image, or not all of one."""


@functools.cache
def _opencv():
  import cv2

  # Those who decode in parallel do it by processes.
  cv2.setNumThreads(1)
  return cv2


@dataclasses.dataclass(frozen=True)
class Views:
  """What training and evaluation see of an image.

  Attributes:
    size: height and width of a view, in pixels.
    resize: pixels of the shorter side before evaluation's centre crop.
    area: range of a training crop's part of the image's area.
    aspect: range of a training crop's width by its height.
  """

  size: int
  resize: int
  area: tuple[float, float] = (0.08, 1.0)
  aspect: tuple[float, float] = (3 / 4, 4 / 3)

  def train(self, encoded: bytes, random: np.random.RandomState) -> np.ndarray:
    """Returns a random resized crop: uint8 (size, size, 3).

    Raises:
      BadImage: see `decode`.
    """
    image = decode(encoded)
    top, left, height, width = self.crop_box(*image.shape[:2], random)
    return resize(image[top : top + height, left : left + width], self.size)

  def evaluation(self, encoded: bytes) -> np.ndarray:
    """Returns the centre of the resized image: uint8 (size, size, 3).

    Its pixels are those of PIL and torchvision.

    Raises:
      BadImage: see `decode`.
    """
    import PIL.Image

    image = decode(encoded)
    height, width = image.shape[:2]
    short = min(height, width)
    height, width = (
      self.resize if side == short else int(self.resize * side / short)
      for side in (height, width)
    )
    image = PIL.Image.fromarray(image).resize(
      (width, height), PIL.Image.Resampling.BILINEAR
    )
    top, left = (round((side - self.size) / 2) for side in (height, width))
    image = image.crop((left, top, left + self.size, top + self.size))
    return np.asarray(image)

  def crop_box(
    self, height: int, width: int, random: np.random.RandomState
  ) -> tuple[int, int, int, int]:
    """Returns a random (top, left, height, width) inside an image.

    Area and logarithm of the aspect are uniform; where no attempt fits, it is
    the largest centre crop with an allowed aspect.
    """
    low, high = np.log(self.aspect)
    for part, shape, row, column in random.random_sample((CROP_ATTEMPTS, 4)):
      area = (
        height * width * (self.area[0] + part * (self.area[1] - self.area[0]))
      )
      aspect = math.exp(low + shape * (high - low))
      crop_width = round(math.sqrt(area * aspect))
      crop_height = round(math.sqrt(area / aspect))
      if 0 < crop_width <= width and 0 < crop_height <= height:
        top = int(row * (height - crop_height + 1))
        left = int(column * (width - crop_width + 1))
        return top, left, crop_height, crop_width
    crop_width = min(width, round(height * self.aspect[1]))
    crop_height = min(height, round(width / self.aspect[0]))
    top, left = (height - crop_height) // 2, (width - crop_width) // 2
    return top, left, crop_height, crop_width


def resize(image: np.ndarray, size: int) -> np.ndarray:
  """Returns uint8 (size, size, 3): what shrinks by areas, what grows linearly.

  On average it is within one grey level of PIL's antialiased bilinear filter,
  in half its time.

  Args:
    image: uint8 (H, W, 3).
    size: height and width of the result.
  """
  cv2 = _opencv()
  height, width = image.shape[:2]
  shrunk = min(width, size), min(height, size)
  if shrunk != (width, height):
    image = cv2.resize(image, shrunk, interpolation=cv2.INTER_AREA)
  if shrunk != (size, size):
    image = cv2.resize(image, (size, size), interpolation=cv2.INTER_LINEAR)
  return image


def decode(encoded: bytes) -> np.ndarray:
  """Returns the pixels of an encoded image: uint8 (H, W, 3), RGB.

  An orientation in its EXIF data is not followed, as by torchvision's loader;
  `datasets.prepare` turns pictures before they are stored.

  Raises:
    BadImage: it cannot be decoded, or is truncated.
  """
  import PIL.Image

  cv2 = _opencv()
  try:
    header = PIL.Image.open(io.BytesIO(encoded))
    pixels = None
    if header.format == 'JPEG' and header.mode in ('RGB', 'L'):
      # OpenCV decodes them faster, and to the same pixels, but makes up what a
      # truncated file lacks; without the end's mark, PIL is asked.
      if encoded.rstrip(b'\0').endswith(JPEG_END):
        pixels = cv2.imdecode(
          np.frombuffer(encoded, np.uint8),
          cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION,
        )
    if pixels is None:
      pixels = np.asarray(header.convert('RGB'))
  except Exception as error:  # PIL's decoders raise whatever they like.
    raise BadImage(f'{type(error).__name__}: {error}') from error
  return pixels
