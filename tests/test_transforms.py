"""Inception crop against Pillow, erasing by looking at it."""

import math

import jax
import numpy as np
import pytest

from ijckd_jax.data import transforms

SHAPE = (16, 20, 3)
KEYS = jax.random.split(jax.random.key(0), 400)


def noise():
  return np.random.default_rng(0).integers(0, 256, SHAPE).astype(np.uint8)


def views(transform, image):
  run = jax.jit(jax.vmap(transform, in_axes=(0, None)))
  return np.asarray(run(KEYS, image))


def boxes(largest, area, aspect):
  """Returns which boxes fit, and (4, num) of top, left, height and width."""

  @jax.jit
  @jax.vmap
  def draw(key):
    return transforms._draw_box(key, SHAPE[:2], largest, area, aspect)

  fits, box = draw(KEYS)
  return np.asarray(fits), np.stack(box)


def test_boxes_lie_in_the_image_and_are_as_large_as_is_asked_for():
  fits, (top, left, height, width) = boxes(SHAPE[:2], (0.1, 0.5), (0.5, 2.0))
  assert fits.all()
  assert (top >= 0).all() and (top + height <= SHAPE[0]).all()
  assert (left >= 0).all() and (left + width <= SHAPE[1]).all()
  # They touch every side.
  assert {0, SHAPE[0]} <= {*top, *(top + height)}
  assert {0, SHAPE[1]} <= {*left, *(left + width)}
  areas, size = height * width, SHAPE[0] * SHAPE[1]
  rounding = (height + width) / 2 + 0.25
  assert (areas >= 0.1 * size - rounding).all()
  assert (areas <= 0.5 * size + rounding).all()
  # Uniform: a mean of 0.3, of standard deviation 0.4 / sqrt(12 * 400).
  assert abs(areas.mean() / size - 0.3) < 5 * 0.4 / math.sqrt(12 * 400)
  aspects = np.log(width / height)
  assert abs(aspects.mean()) < 5 * math.log(4) / math.sqrt(12 * 400) + 0.02
  assert aspects.min() < -0.5 and aspects.max() > 0.5


def test_inception_crop_is_pillows_crop_resized():
  from PIL import Image

  crop = transforms.InceptionCrop((0.05, 1.0), (3 / 4, 4 / 3))
  image = noise()
  fits, found = boxes(SHAPE[:2], crop.area, crop.aspect)
  made = views(crop, image)
  assert made.dtype == np.uint8 and fits.all()
  for view, (top, left, height, width) in zip(made, found.T, strict=True):
    expected = (
      Image.fromarray(image)
      .crop((left, top, left + width, top + height))
      .resize(SHAPE[1::-1], Image.Resampling.BILINEAR)
    )
    assert np.abs(view.astype(int) - np.asarray(expected)).max() <= 1


@pytest.mark.parametrize('aspect', [1.25, 5.0])
def test_inception_crop_of_all_or_of_what_never_fits_is_the_image(aspect):
  crop = transforms.InceptionCrop((1.0, 1.0), (aspect, aspect))
  image = noise()
  np.testing.assert_array_equal(views(crop, image)[:5], [image] * 5)


def test_erasing_fills_one_box():
  fill = (7, 8, 9)
  image = np.full(SHAPE, 200, np.uint8)
  made = views(transforms.RandomErasing(0.5, fill), image)
  assert made.dtype == np.uint8
  erased = (made != image).any(-1)
  np.testing.assert_array_equal(made[erased], [fill] * erased.sum())
  np.testing.assert_array_equal(made[~erased], image.max())
  areas = []
  for view in erased:
    rows, columns = np.flatnonzero(view.any(1)), np.flatnonzero(view.any(0))
    areas.append(len(rows) * len(columns) / view.size)
    assert view.sum() == len(rows) * len(columns)
    if len(rows):
      assert np.ptp(rows) + 1 == len(rows) < SHAPE[0]
      assert np.ptp(columns) + 1 == len(columns) < SHAPE[1]
  areas = np.array(areas)
  # Of 400, five standard deviations from a half.
  assert 150 < (areas > 0).sum() < 250
  assert 0.01 < areas[areas > 0].min() < 0.05 and 0.25 < areas.max() < 0.36


def test_erasing_of_probability_one_always_erases():
  image = noise()
  made = views(transforms.RandomErasing(1.0, (0, 0, 0)), image)
  assert (made != image).any((1, 2, 3)).all()
