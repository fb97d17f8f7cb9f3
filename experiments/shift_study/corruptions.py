"""Twenty-one corruptions of small grey images, at five severities each.

Fifteen kinds are those of Hendrycks and Dietterich 2019, "Benchmarking Neural
Network Robustness to Common Corruptions and Perturbations",
https://arxiv.org/abs/1903.12261, written anew for 28x28 pixels. The severities
are ours: from what is hardly seen to what few would still recognise. Frost is
drawn, by thresholded noise, where the original pastes photographs. The six of
NEW were added when the calibrated estimate was fixed, to judge it.
"""

import cv2
import numpy as np


def _noise(random, shape, blur: float) -> np.ndarray:
  """Returns smooth noise of each image, (N, H, W), within [0, 1]."""
  noise = random.rand(*shape).astype(np.float32)
  noise = np.stack([cv2.GaussianBlur(x, (0, 0), blur) for x in noise])
  low = noise.min(axis=(1, 2), keepdims=True)
  high = noise.max(axis=(1, 2), keepdims=True)
  return (noise - low) / (high - low)


def gaussian_noise(x, severity, random):
  """Adds noise of a normal distribution."""
  std = (0.06, 0.12, 0.18, 0.26, 0.38)[severity]
  return x + random.normal(size=x.shape, scale=std)


def shot_noise(x, severity, random):
  """Counts photons."""
  photons = (60, 25, 12, 5, 3)[severity]
  return random.poisson(x * photons) / photons


def impulse_noise(x, severity, random):
  """Sets pixels to black or white."""
  share = (0.03, 0.06, 0.09, 0.17, 0.27)[severity]
  chance = random.rand(*x.shape)
  return np.where(chance < share, chance < share / 2, x)


def _filter(x, kernel):
  return np.stack([cv2.filter2D(image, -1, kernel) for image in x])


def defocus_blur(x, severity, random):
  """Averages over a disk."""
  del random
  radius = (0.8, 1.2, 1.6, 2.2, 3.0)[severity]
  size = int(np.ceil(radius))
  y, z = np.mgrid[-size : size + 1, -size : size + 1]
  # Of pixels that the disk's edge cuts, a part.
  disk = np.clip(radius + 0.5 - np.hypot(y, z), 0, 1).astype(np.float32)
  return _filter(x, disk / disk.sum())


def glass_blur(x, severity, random):
  """Swaps neighbouring pixels."""
  rounds = (1, 1, 2, 3, 5)[severity]
  reach = (1, 1, 1, 2, 2)[severity]
  share = (0.3, 0.6, 0.8, 0.9, 1.0)[severity]
  num, height, width = x.shape
  x, images = x.copy(), np.arange(num)
  for _ in range(rounds):
    for row in range(height):
      for column in range(width):
        moved = random.rand(num) < share
        to = random.randint(-reach, reach + 1, (2, num))
        other = (
          images,
          np.clip(row + moved * to[0], 0, height - 1),
          np.clip(column + moved * to[1], 0, width - 1),
        )
        kept = x[other].copy()
        x[other] = x[:, row, column]
        x[:, row, column] = kept
  return x


def motion_blur(x, severity, random):
  """Averages along a line, of a random direction for each image."""
  length = (3, 4, 6, 8, 11)[severity]
  blurred = np.empty_like(x)
  for i, angle in enumerate(random.uniform(-np.pi / 4, np.pi / 4, len(x))):
    kernel = np.zeros((2 * length + 1,) * 2, np.float32)
    step = np.linspace(-length / 2, length / 2, 4 * length)
    rows = np.round(length + step * np.sin(angle)).astype(int)
    columns = np.round(length + step * np.cos(angle)).astype(int)
    kernel[rows, columns] = 1
    blurred[i] = cv2.filter2D(x[i], -1, kernel / kernel.sum())
  return blurred


def zoom_blur(x, severity, random):
  """Averages over growing magnifications."""
  del random
  largest = (1.1, 1.2, 1.3, 1.45, 1.6)[severity]
  height, width = x.shape[1:]
  total = np.zeros_like(x)
  zooms = np.linspace(1, largest, 8)
  for zoom in zooms:
    matrix = cv2.getRotationMatrix2D(
      ((width - 1) / 2, (height - 1) / 2), 0, zoom
    )
    total += np.stack([cv2.warpAffine(i, matrix, (width, height)) for i in x])
  return total / len(zooms)


def snow(x, severity, random):
  """Adds flakes that fall, and what they whiten."""
  share = (0.02, 0.04, 0.07, 0.1, 0.15)[severity]
  flakes = (random.rand(*x.shape) < share).astype(np.float32)
  kernel = np.zeros((5, 5), np.float32)
  kernel[np.arange(5), np.arange(5)] = 0.5
  return 0.9 * x + np.minimum(_filter(flakes, kernel), 1)


def frost(x, severity, random):
  """Covers the image with ice from above."""
  share = (0.2, 0.3, 0.4, 0.5, 0.6)[severity]
  ice = _noise(random, x.shape, 1.5)
  height = np.linspace(0.3, -0.3, x.shape[1])[:, None]
  ice = ice + height
  covered = ice > np.quantile(ice, 1 - share, axis=(1, 2), keepdims=True)
  return np.where(covered, 0.3 * x + 0.6 * np.clip(ice, 0, 1), x)


def fog(x, severity, random):
  """Adds a smooth brightness, and takes contrast away."""
  strength = (0.25, 0.4, 0.6, 0.85, 1.2)[severity]
  return (x + strength * _noise(random, x.shape, 5.0)) / (1 + 0.5 * strength)


def brightness(x, severity, random):
  """Adds the same to all pixels."""
  del random
  return x + (0.1, 0.2, 0.3, 0.42, 0.55)[severity]


def contrast(x, severity, random):
  """Draws pixels to the image's mean."""
  del random
  kept = (0.7, 0.5, 0.35, 0.22, 0.12)[severity]
  mean = x.mean(axis=(1, 2), keepdims=True)
  return mean + kept * (x - mean)


def elastic_transform(x, severity, random):
  """Moves pixels along smooth random fields."""
  most = (1.0, 1.6, 2.3, 3.0, 4.0)[severity]
  y, z = np.mgrid[: x.shape[1], : x.shape[2]].astype(np.float32)
  fields = [most * (2 * _noise(random, x.shape, 3.0) - 1) for _ in '12']
  return np.stack(
    [
      cv2.remap(
        image,
        (z + right).astype(np.float32),
        (y + down).astype(np.float32),
        cv2.INTER_LINEAR,
        borderMode=cv2.BORDER_REFLECT_101,
      )
      for image, right, down in zip(x, *fields, strict=True)
    ]
  )


def pixelate(x, severity, random):
  """Makes the image small, and large again."""
  del random
  size = (20, 16, 12, 9, 7)[severity]
  width, height = x.shape[2], x.shape[1]
  return np.stack(
    [
      cv2.resize(
        cv2.resize(image, (size, size), interpolation=cv2.INTER_AREA),
        (width, height),
        interpolation=cv2.INTER_NEAREST,
      )
      for image in x
    ]
  )


def jpeg_compression(x, severity, random):
  """Compresses the image."""
  del random
  quality = (40, 25, 15, 9, 5)[severity]
  images = np.round(255 * x).astype(np.uint8)
  done = []
  for image in images:
    _, data = cv2.imencode('.jpg', image, [cv2.IMWRITE_JPEG_QUALITY, quality])
    done.append(cv2.imdecode(data, cv2.IMREAD_GRAYSCALE))
  return np.stack(done) / 255


def speckle_noise(x, severity, random):
  """Adds noise in proportion to the brightness."""
  std = (0.15, 0.25, 0.4, 0.55, 0.75)[severity]
  return x + x * random.normal(size=x.shape, scale=std)


def gaussian_blur(x, severity, random):
  """Averages with the weights of a normal distribution."""
  del random
  std = (0.6, 0.9, 1.3, 1.8, 2.5)[severity]
  return np.stack([cv2.GaussianBlur(image, (0, 0), std) for image in x])


def gamma(x, severity, random):
  """Darkens all but the brightest pixels."""
  del random
  return x ** (1.4, 1.9, 2.6, 3.5, 5.0)[severity]


def rotate(x, severity, random):
  """Turns each image, to a random side."""
  angle = (8, 15, 25, 40, 60)[severity]
  height, width = x.shape[1:]
  turned = np.empty_like(x)
  for i, side in enumerate(random.choice((-1, 1), len(x))):
    matrix = cv2.getRotationMatrix2D(
      ((width - 1) / 2, (height - 1) / 2), int(side) * angle, 1
    )
    turned[i] = cv2.warpAffine(x[i], matrix, (width, height))
  return turned


def occlude(x, severity, random):
  """Covers a random square of each image with grey."""
  size = (5, 8, 11, 14, 18)[severity]
  x = x.copy()
  corners = random.randint(0, x.shape[1] - size + 1, (len(x), 2))
  for image, (row, column) in zip(x, corners, strict=True):
    image[row : row + size, column : column + size] = 0.5
  return x


def posterize(x, severity, random):
  """Keeps a few levels of brightness."""
  del random
  levels = (7, 5, 4, 3, 2)[severity]
  return np.round(x * (levels - 1)) / (levels - 1)


CORRUPTIONS = {
  function.__name__: function
  for function in (
    gaussian_noise,
    shot_noise,
    impulse_noise,
    defocus_blur,
    glass_blur,
    motion_blur,
    zoom_blur,
    snow,
    frost,
    fog,
    brightness,
    contrast,
    elastic_transform,
    pixelate,
    jpeg_compression,
    speckle_noise,
    gaussian_blur,
    gamma,
    rotate,
    occlude,
    posterize,
  )
}
NEW = tuple(CORRUPTIONS)[15:]


def corrupt(images: np.ndarray, name: str, severity: int) -> np.ndarray:
  """Returns corrupted images.

  Args:
    images: uint8 (N, H, W, 1).
    name: of CORRUPTIONS.
    severity: 1 to 5.
  """
  number = list(CORRUPTIONS).index(name)
  random = np.random.RandomState([number, severity])
  x = images[..., 0].astype(np.float32) / 255
  x = CORRUPTIONS[name](x, severity - 1, random)
  return np.round(255 * np.clip(x, 0, 1)).astype(np.uint8)[..., None]
