"""Pixels are PIL's in evaluation, and near to PIL's in training."""

import io
import itertools
import pathlib

import numpy as np
import PIL.Image
import pytest
import sklearn.datasets

from ijckd_jax.data import images

VIEWS = images.Views(size=96, resize=110)


@pytest.fixture(scope='module', params=['china.jpg', 'flower.jpg'])
def photograph(request):
  """A picture of 427x640."""
  return sklearn.datasets.load_sample_image(request.param)


def encode(pixels, kind='JPEG', **options):
  file = io.BytesIO()
  if not isinstance(pixels, PIL.Image.Image):
    pixels = PIL.Image.fromarray(pixels)
  pixels.save(file, kind, **options)
  return file.getvalue()


def opened(encoded):
  return PIL.Image.open(io.BytesIO(encoded)).convert('RGB')


def torchvision_evaluation(image, views, interpolation='BILINEAR'):
  """Resize and CenterCrop, as torchvision's documentation states them."""
  width, height = image.size
  if width <= height:
    size = views.resize, int(views.resize * height / width)
  else:
    size = int(views.resize * width / height), views.resize
  image = image.resize(size, PIL.Image.Resampling[interpolation])
  left, top = (int(round((side - views.size) / 2)) for side in image.size)
  return np.asarray(
    image.crop((left, top, left + views.size, top + views.size))
  )


def test_decoded_pixels_are_those_of_pil(photograph):
  grey = photograph.mean(axis=-1).astype(np.uint8)
  for pixels in (photograph, photograph[:123, :77], grey):
    for options in ({}, {'quality': 95, 'subsampling': 0}, {'progressive': 1}):
      encoded = encode(pixels, **options)
      np.testing.assert_array_equal(
        images.decode(encoded), np.asarray(opened(encoded))
      )


@pytest.mark.parametrize(
  'kind, mode',
  [
    *itertools.product(('PNG', 'BMP'), ('RGB', 'L', 'P', 'RGBA')),
    *itertools.product(('WEBP',), ('RGB', 'L', 'RGBA')),
    *itertools.product(('GIF',), ('RGB', 'L', 'P')),
  ],
)
def test_other_formats_are_read(photograph, kind, mode):
  encoded = encode(PIL.Image.fromarray(photograph).convert(mode), kind)
  decoded = images.decode(encoded)
  assert decoded.shape == photograph.shape and decoded.dtype == np.uint8
  np.testing.assert_array_equal(decoded, np.asarray(opened(encoded)))


def test_cmyk_and_orientation_are_read_as_torchvision_does(photograph):
  image = PIL.Image.fromarray(photograph)
  exif = PIL.Image.Exif()
  exif[0x0112] = 6  # To be turned by a right angle.
  for encoded in (encode(image.convert('CMYK')), encode(image, exif=exif)):
    np.testing.assert_array_equal(
      images.decode(encoded), np.asarray(opened(encoded))
    )


@pytest.mark.parametrize('kept', [0, 1, 100, 2000, -2])
def test_a_truncated_image_is_bad(photograph, kept):
  encoded = encode(photograph)
  assert len(encoded) > 10_000
  with pytest.raises(images.BadImage):
    images.decode(encoded[:kept])
  images.decode(encoded + b'\0\0')  # Padding at the end does no harm.


def test_noise_is_bad():
  with pytest.raises(images.BadImage, match='cannot identify'):
    images.decode(np.random.RandomState(0).bytes(1000))


@pytest.mark.parametrize('shape', [(427, 640), (427, 200), (80, 90), (96, 96)])
def test_evaluation_pixels_are_torchvisions(photograph, shape):
  encoded = encode(photograph[: shape[0], : shape[1]])
  np.testing.assert_array_equal(
    VIEWS.evaluation(encoded), torchvision_evaluation(opened(encoded), VIEWS)
  )


@pytest.mark.parametrize('shape', [(427, 639), (301, 101), (35, 37), (9, 80)])
@pytest.mark.parametrize('size, resize', [(33, 37), (96, 96), (31, 40)])
def test_bicubic_pixels_are_torchvisions(photograph, shape, size, resize):
  image = PIL.Image.fromarray(photograph[: shape[0], : shape[1]])
  found = images.CentreCrop(resize, 'bicubic')(image, (size, size))
  views = images.Views(size, resize)
  np.testing.assert_array_equal(
    np.asarray(found), torchvision_evaluation(image, views, 'BICUBIC')
  )


def test_a_picture_of_the_right_size(photograph):
  """It is cropped like any other, unless it may have been cropped before."""
  image = PIL.Image.fromarray(photograph[:96, :96])
  kept = images.CentreCrop(110, keeps_size=True)
  assert kept(image, (96, 96)) is image
  found = images.CentreCrop(110)(image, (96, 96))
  np.testing.assert_array_equal(
    np.asarray(found), torchvision_evaluation(image, images.Views(96, 110))
  )
  assert kept(image, (64, 64)).size == (64, 64)


def test_training_pixels_are_near_to_pils():
  """Within one grey level on average, at ImageNet's sizes."""
  views, errors, scales = images.Views(size=224, resize=256), [], []
  for number, pixels in enumerate(sklearn.datasets.load_sample_images().images):
    image = PIL.Image.fromarray(pixels).resize((500, 333 + 100 * number))
    encoded = encode(image, quality=95)
    image = opened(encoded)
    for seed in range(40):
      view = views.train(encoded, np.random.RandomState(seed))
      top, left, height, width = views.crop_box(
        image.height, image.width, np.random.RandomState(seed)
      )
      expected = image.crop((left, top, left + width, top + height)).resize(
        (224, 224), PIL.Image.Resampling.BILINEAR
      )
      errors.append(np.abs(view.astype(int) - np.asarray(expected)).mean())
      scales.append(max(height, width) / 224)
  errors, grown = np.array(errors), np.array(scales) < 1
  assert 0.3 < errors.mean() < 1
  assert grown.any() and errors[grown].max() < 0.5


def test_crop_boxes_follow_their_law():
  """Area uniform in its range, the aspect's logarithm in its own."""
  random = np.random.RandomState(0)
  boxes = np.array([VIEWS.crop_box(480, 640, random) for _ in range(4000)])
  top, left, height, width = boxes.T
  assert (boxes >= 0).all() and (height > 0).all() and (width > 0).all()
  assert (top + height <= 480).all() and (left + width <= 640).all()
  area, aspect = height * width / (480 * 640), width / height
  assert area.min() >= 0.079 and area.max() <= 1
  assert aspect.min() >= 0.74 and aspect.max() <= 1.35
  # Where every attempt fits, the law is exactly uniform.
  small = area < 0.4
  np.testing.assert_allclose(area[small].mean(), (0.08 + 0.4) / 2, atol=0.01)
  logs = np.log(aspect[small]) / np.log(4 / 3)
  np.testing.assert_allclose(logs.mean(), 0, atol=0.05)
  np.testing.assert_allclose(logs.var(), 1 / 3, atol=0.03)


def test_where_no_box_fits_the_centre_is_taken():
  views = images.Views(size=8, resize=8, area=(1.0, 1.0))
  random = np.random.RandomState(0)
  assert views.crop_box(1000, 10, random) == (493, 0, 13, 10)
  assert views.crop_box(10, 1000, random) == (0, 493, 10, 13)


def test_views_depend_on_the_random_state_alone(photograph):
  encoded = encode(photograph)
  one, same, other = (
    VIEWS.train(encoded, np.random.RandomState(seed)) for seed in (1, 1, 2)
  )
  np.testing.assert_array_equal(one, same)
  assert not np.array_equal(one, other)
  assert one.shape == (96, 96, 3) and one.dtype == np.uint8


def test_opencv_keeps_to_one_thread():
  import cv2

  path = pathlib.Path(sklearn.datasets.__file__).parent / 'images/china.jpg'
  images.decode(path.read_bytes())
  assert cv2.getNumThreads() == 1


@pytest.mark.parametrize('seed', range(20))
def test_the_centre_alone_is_that_of_the_whole(seed, monkeypatch):
  """Where nothing else is resized: PIL's own pixels, to two grey levels."""
  random = np.random.RandomState(seed)
  width, height = random.randint(1, 300, 2)
  pixels = random.randint(0, 256, (height, width, 3)).astype(np.uint8)
  image = PIL.Image.fromarray(pixels)
  size = (32, 24) if seed % 2 else (24, 24)
  scale = max(size[0] / width, size[1] / height) * 1.15
  resized = int(width * scale), int(height * scale)
  whole = images.centre(image, resized, size)
  assert whole.size == size
  monkeypatch.setattr(images, 'MAX_RESIZED', 0)
  found = images.centre(image, resized, size)
  np.testing.assert_allclose(
    np.asarray(found, int), np.asarray(whole, int), atol=2
  )


def test_long_images_take_no_memory():
  """Resized as a whole, this one would have more rows than PIL can count."""
  image = PIL.Image.new('RGB', (1, 10_000_000), (10, 20, 30))
  found = images.centre(image, (256, 2_560_000_000), (224, 224))
  np.testing.assert_array_equal(
    np.asarray(found), np.broadcast_to([10, 20, 30], (224, 224, 3))
  )
