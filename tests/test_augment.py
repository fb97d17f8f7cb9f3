"""Views are pure functions of key, epoch and example, and true crops."""

import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ijckd_jax.data import augment
from ijckd_jax.data import randaugment
from ijckd_jax.runtime import config_utils
from ijckd_jax.training import experiment


def images_of(num, side=6, channels=3, seed=0):
  """Returns noise without a zero, which only padding has."""
  rng = np.random.RandomState(seed)
  return rng.randint(1, 256, (num, side, side, channels)).astype(np.uint8)


@functools.cache
def compiled(crop_padding, flip):
  augmentation = augment.Augmentation(crop_padding, flip)
  return jax.jit(augmentation)


def views(images, indices, *, epochs=0, seed=0, crop_padding=2, flip=True):
  indices = np.asarray(indices, np.int32)
  epochs = np.broadcast_to(np.int32(epochs), indices.shape)
  key = jax.random.key(seed)
  return np.asarray(compiled(crop_padding, flip)(key, images, epochs, indices))


def windows(image, padding):
  """Returns every window of a zero-padded image, as it is and mirrored."""
  side = image.shape[0]
  padded = np.pad(image, ((padding, padding), (padding, padding), (0, 0)))
  found = {}
  for row in range(2 * padding + 1):
    for column in range(2 * padding + 1):
      window = padded[row : row + side, column : column + side]
      found[window.tobytes()] = (row, column, False)
      found[window[:, ::-1].tobytes()] = (row, column, True)
  assert len(found) == 2 * (2 * padding + 1) ** 2
  return found


def test_every_view_is_a_window_of_the_padded_image_and_all_occur_alike():
  image = images_of(1)[0]
  num, padding = 10_000, 2
  known = windows(image, padding)
  result = views(np.repeat(image[None], num, axis=0), np.arange(num))
  assert result.dtype == np.uint8
  offsets = [known[view.tobytes()] for view in result]
  counts = np.zeros((5, 5, 2))
  np.add.at(counts, tuple(np.array(offsets).T), 1)
  # 200 of each are expected; five standard deviations are 70.
  assert np.abs(counts - num / 50).max() < 70
  # Rows, columns and sides are drawn apart.
  for axis, expected in (((1, 2), num / 5), ((0, 2), num / 5), ((0, 1), 5000)):
    deviation = np.abs(counts.sum(axis) - expected).max()
    assert deviation < 5 * np.sqrt(expected)


def test_crop_and_flip_can_be_had_apart():
  images, indices = images_of(200), np.arange(200)
  same = views(images, indices, crop_padding=0, flip=False)
  np.testing.assert_array_equal(same, images)
  mirrored = views(images, indices, crop_padding=0, flip=True)
  is_same = (mirrored == images).all((1, 2, 3))
  is_mirrored = (mirrored == images[:, :, ::-1]).all((1, 2, 3))
  assert (is_same ^ is_mirrored).all()
  assert 60 < is_mirrored.sum() < 140
  cropped = views(images, indices, crop_padding=1, flip=False)
  for image, view in zip(images, cropped, strict=True):
    assert not windows(image, 1)[view.tobytes()][2]


def test_views_do_not_depend_on_order_or_on_the_split_of_the_batch():
  images, indices = images_of(12), np.arange(100, 112)
  epochs = np.arange(12) // 5
  whole = views(images, indices, epochs=epochs)
  order = np.random.RandomState(1).permutation(12)
  shuffled = views(images[order], indices[order], epochs=epochs[order])
  np.testing.assert_array_equal(shuffled, whole[order])
  parts = [
    views(images[rows], indices[rows], epochs=epochs[rows])
    for rows in np.split(np.arange(12), 4)
  ]
  np.testing.assert_array_equal(np.concatenate(parts), whole)


def test_views_depend_on_key_epoch_and_index():
  image = np.repeat(images_of(1), 64, axis=0)
  indices = np.arange(64)
  first = views(image, indices)
  np.testing.assert_array_equal(first, views(image, indices))
  for other in (
    views(image, indices, seed=1),
    views(image, indices, epochs=1),
    views(image, indices + 64),
    # Were epoch and index added up, these would be the same.
    views(image, np.full(64, 0), epochs=indices),
    views(image, indices[::-1], epochs=indices),
  ):
    equal = (other == first).all((1, 2, 3)).mean()
    assert equal < 0.2  # 1/50 by chance.


def test_by_default_views_are_crops_and_flips_and_nothing_else():
  """Written anew, example by example, with the keys that they have."""
  config = experiment.default_config(
    dataset='digits', teacher='resnet8', student='resnet8'
  )
  config.total_epochs = 1.0
  config.dataset.crop_padding, config.dataset.flip = 2, True
  exp = experiment.build(config)
  assert exp.augmentation == augment.Augmentation(2, True, 0)
  assert exp.mixing is None
  images, indices = images_of(8), np.arange(50, 58)
  made = views(images, indices, epochs=3, seed=4)
  for image, index, view in zip(images, indices, made, strict=True):
    key = jax.random.fold_in(jax.random.key(4), 3)
    crop_key, flip_key = jax.random.split(jax.random.fold_in(key, index))
    row, column = jax.random.randint(crop_key, (2,), 0, 5)
    padded = np.pad(image, ((2, 2), (2, 2), (0, 0)))
    expected = padded[row : row + 6, column : column + 6]
    if jax.random.bernoulli(flip_key):
      expected = expected[:, ::-1]
    np.testing.assert_array_equal(view, expected)


@pytest.mark.parametrize(
  'field, value, message',
  [
    ('randaugment_layers', -1, 'randaugment_layers=-1: it must be at least 0'),
    ('randaugment_magnitude', 31, 'from 0 to 30'),
    ('erasing_probability', 1.5, 'from 0 to 1'),
    ('mixup_alpha', -0.5, 'mixup_alpha=-0.5'),
    ('cutmix_alpha', float('inf'), 'cutmix_alpha=inf'),
    ('label_smoothing', 1.0, r'label_smoothing=1.0: it must be in \[0, 1\)'),
    ('label_smoothing', -0.1, 'label_smoothing=-0.1'),
    ('inception_area', (0.5, 0.1), 'smallest and the largest.*at most 1'),
    ('inception_area', (0.5, 1.1), 'inception_area'),
    ('inception_area', (0.0, 1.0), 'above 0'),
    ('inception_aspect', (1.0,), 'inception_aspect'),
  ],
)
def test_numbers_that_cannot_be_are_refused(field, value, message):
  config = augment.default_config()
  augment.check(config)
  config[field] = value
  with pytest.raises(config_utils.UserError, match=message):
    augment.check(config)


def test_trivialaugment_takes_the_place_of_randaugment():
  config = augment.default_config()
  config.trivialaugment = True
  dataset = types.SimpleNamespace(crop_padding=4, flip=False, mean=(0.5,) * 3)
  made = augment.build(config, dataset, views=0)
  assert made.transforms == (randaugment.TrivialAugment(),)
  config.randaugment_layers = 1
  with pytest.raises(config_utils.UserError, match='set it to False, or'):
    augment.check(config)


def test_transforms_follow_in_order_and_each_draws_by_itself():
  config = augment.default_config()
  config.inception_crop, config.randaugment_layers = True, 1
  config.erasing_probability = 1.0
  dataset = types.SimpleNamespace(crop_padding=4, flip=False, mean=(0.5,) * 3)
  made = augment.build(config, dataset, views=3)
  assert (made.crop_padding, made.views) == (0, 3)
  crop, layers, erasing = made.transforms
  assert erasing.fill == (128, 128, 128)

  def expected(image, index):
    key = augment.example_key(jax.random.key(0), 1, index)
    keys = [jax.random.fold_in(key, number) for number in (2, 3, 4)]
    return erasing(keys[2], layers(keys[1], crop(keys[0], image)))

  images, indices = images_of(4, side=8), np.arange(4)
  run = jax.jit(made)
  np.testing.assert_array_equal(
    run(jax.random.key(0), images, np.full(4, 4), indices),
    jax.jit(jax.vmap(expected))(images, indices),
  )


@pytest.mark.parametrize(
  'given, said',
  [
    (((8, 8), (0.5,), (0.5,)), r'the size \(0.5,\): give mean, std and then'),
    (((0.5,), (0.5,), (8, 0)), r'the size \(8, 0\)'),
    (((0.5,), (0.5, 0.5), (8, 8)), '1 numbers as the mean and 2 as the std'),
  ],
)
def test_preprocessing_is_refused(given, said):
  with pytest.raises(config_utils.UserError, match=said):
    augment.Preprocessing(*given)


def test_preprocessing_by_hand():
  preprocessing = augment.Preprocessing((0.2, 0.5), (0.1, 0.25), (1, 2))
  images = np.array([[[[0, 255], [51, 102]]]], np.uint8)
  x = preprocessing(images)
  assert x.dtype == jnp.float32
  expected = [[[[-0.2 / 0.1, 0.5 / 0.25], [0.0 / 0.1, -0.1 / 0.25]]]]
  np.testing.assert_allclose(x, expected, rtol=1e-5, atol=1e-6)


def test_preprocessing_of_the_same_size_changes_no_pixel():
  images = images_of(4, side=8, channels=1)
  x = augment.Preprocessing((0.0,), (1.0,), (8, 8))(images)
  np.testing.assert_array_equal(np.round(np.asarray(x) * 255), images)


def test_preprocessing_doubles_by_interpolation():
  """Bilinear, with half-pixel centres, as PyTorch's align_corners=False."""
  images = np.array([0, 100], np.uint8).reshape(1, 1, 2, 1)
  x = augment.Preprocessing((0.0,), (1 / 255,), (1, 4))(images)
  np.testing.assert_allclose(np.ravel(x), [0, 25, 75, 100], rtol=1e-5)


def test_preprocessing_shrinks_with_antialiasing():
  """Halving weighs four pixels by 1 3 3 1: no pixel is skipped."""
  images = np.array([0, 0, 0, 80, 0, 0, 0, 0], np.uint8).reshape(1, 1, 8, 1)
  x = augment.Preprocessing((0.0,), (1 / 255,), (1, 4))(images)
  np.testing.assert_allclose(np.ravel(x), [0, 30, 10, 0], atol=1e-4)


@pytest.mark.parametrize('size', [(4, 4), (12, 9), (8, 16)])
def test_preprocessing_gives_the_size_that_is_wanted(size):
  images = np.full((2, 8, 8, 3), 102, np.uint8)
  x = augment.Preprocessing((0.4,) * 3, (0.5,) * 3, size)(images)
  assert x.shape == (2, *size, 3)
  np.testing.assert_allclose(x, 0, atol=1e-6)  # Edges are not darkened.
