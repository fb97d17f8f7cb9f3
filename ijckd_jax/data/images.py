"""From an encoded image to pixels, on the host: decode, crop, resize.

The views are torchvision's: random resized crops in training, the centre of the
resized image in evaluation.
"""

import dataclasses
import functools
import io
import math

import numpy as np

from ijckd_jax.runtime import config_utils

MAX_RESIZED = 2**24  # Pixels that are resized at once, in `CentreCrop`.
MAX_SMOOTHED = 2  # In `resize`; what shrinks by more, by areas.
CROP_ATTEMPTS = 10  # As torchvision's RandomResizedCrop.
# Markers of ITU-T T.81, B.1.1.3: the end, and frames of every kind.
JPEG_END = b'\xff\xd9'
JPEG_FRAMES = frozenset(
  bytes([code]) for code in range(0xC0, 0xD0) if code not in (0xC4, 0xC8, 0xCC)
)


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

    image = PIL.Image.fromarray(decode(encoded))
    crop = CentreCrop(self.resize)
    return np.asarray(crop(image, (self.size, self.size)))

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


@dataclasses.dataclass(frozen=True)
class CentreCrop:
  """From a picture of any size to the image that a network reads.

  Pixels of square images are those of torchvision's Resize and CenterCrop.

  Attributes:
    resize: pixels of the shorter side before the centre is cut out; of images
      that are not square, of the height to which a picture that just covers
      their shape is resized.
    interpolation: how Pillow resizes, antialiased: 'bilinear' or 'bicubic'.
    keeps_size: whether a picture of the image's size is taken as it is.
  """

  resize: int
  interpolation: str = 'bilinear'
  keeps_size: bool = False

  def __call__(self, image, size: tuple[int, int]):
    """Returns the image of PIL, (width, height) `size`, of a picture of PIL."""
    if self.keeps_size and image.size == size:
      return image
    width, height = size
    scale = max(height / image.height, width / image.width)
    scale *= self.resize / height
    # A quotient of whole numbers that is whole is not to become less.
    resized = tuple(int(side * scale + 1e-6) for side in image.size)
    return centre(image, resized, size, self.interpolation)


def centre(
  image,
  resized: tuple[int, int],
  size: tuple[int, int],
  interpolation: str = 'bilinear',
):
  """Returns the centre of a resized image of PIL.

  Of an image that is hundreds of times longer than wide, nothing else is
  resized, which would fill the memory; its pixels are as good, but not the
  same, as PIL has the centre's place in single precision.

  Args:
    image: PIL's.
    resized: (width, height) to which it is resized.
    size: (width, height) of its centre.
    interpolation: see CentreCrop.
  """
  import PIL.Image

  method = PIL.Image.Resampling[interpolation.upper()]
  left, top = (
    round((whole - part) / 2) for whole, part in zip(resized, size, strict=True)
  )
  box = (left, top, left + size[0], top + size[1])
  if math.prod(resized) <= MAX_RESIZED:
    return image.resize(resized, method).crop(box)
  scales = [
    side / whole for side, whole in zip(image.size, resized, strict=True)
  ]
  source = [edge * scale for edge, scale in zip(box, 2 * scales, strict=True)]
  return image.resize(size, method, box=source)


def resize(image: np.ndarray, size: int) -> np.ndarray:
  """Returns uint8 (size, size, 3): smoothed where it shrinks, then linear.

  PIL's antialiased filter is a triangle of half-width s where a side shrinks by
  s, of variance s^2 / 6; linear interpolation is one of variance 1 / 6. Taps of
  (a, 1 - 2a, a) add 2a: with a = (s^2 - 1) / 12 the two are alike, within one
  grey level on average. By more than 2, where three taps no longer are enough,
  it shrinks by areas, in twice the time.

  Args:
    image: uint8 (H, W, 3).
    size: height and width of the result.
  """
  cv2 = _opencv()
  height, width = image.shape[:2]
  scale = max(height, width) / size
  if scale > MAX_SMOOTHED:
    shrunk = min(width, size), min(height, size)
    image = cv2.resize(image, shrunk, interpolation=cv2.INTER_AREA)
  elif scale > 1:
    image = cv2.sepFilter2D(
      image,
      ddepth=-1,
      kernelX=_taps(width / size),
      kernelY=_taps(height / size),
      borderType=cv2.BORDER_REPLICATE,
    )
  if image.shape[:2] != (size, size):
    image = cv2.resize(image, (size, size), interpolation=cv2.INTER_LINEAR)
  return image


def _taps(scale: float) -> np.ndarray:
  a = max(0.0, scale * scale - 1) / 12
  return np.array([a, 1 - 2 * a, a])


def decode(encoded: bytes) -> np.ndarray:
  """Returns the pixels of an encoded image: uint8 (H, W, 3), RGB.

  An orientation in its EXIF data is not followed, as by torchvision's loader;
  `datasets.image_folder` turns pictures before they are stored.

  Raises:
    BadImage: it cannot be decoded, or is truncated.
  """
  import PIL.Image

  cv2 = _opencv()
  try:
    pixels = None
    # OpenCV decodes these faster, and to the same pixels, but makes up what a
    # truncated file lacks; without the end's mark, PIL is asked.
    complete = encoded.rstrip(b'\0').endswith(JPEG_END)
    if complete and jpeg_channels(encoded) in (1, 3):
      pixels = cv2.imdecode(
        np.frombuffer(encoded, np.uint8),
        cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION,
      )
    if pixels is None:
      pixels = np.asarray(PIL.Image.open(io.BytesIO(encoded)).convert('RGB'))
    return pixels
  except Exception as error:  # PIL's decoders raise whatever they like.
    config_utils.raise_outside(error)
    raise BadImage(f'{type(error).__name__}: {error}') from error


def jpeg_channels(encoded: bytes) -> int:
  """Returns how many channels a JPEG's frame header names; 0 if there is none.

  In a twentieth of the time that PIL takes to open it. ITU-T T.81, B.1 and B.2:
  segments are a marker, the length of what follows, and that; a frame's are the
  precision, height, width and number of channels.
  """
  position = 2
  while encoded[position : position + 1] == b'\xff':
    marker = encoded[position + 1 : position + 2]
    if marker in JPEG_FRAMES:
      return int.from_bytes(encoded[position + 9 : position + 10])
    length = int.from_bytes(encoded[position + 2 : position + 4])
    position += 2 + length
  return 0
