"""RandAugment: each operation against torchvision, and how they are drawn."""

import functools

import jax
import numpy as np
import pytest

from ijckd_jax import randaugment

# Compiling takes most of a small test's time.
FAST_COMPILE = {'xla_backend_optimization_level': 0}
SIGNED = randaugment.OPERATIONS[1:10]


def images_of(shape):
  """Returns noise, a dull ramp, one colour, and a picture in one corner."""
  rng = np.random.default_rng(0)
  height, width, channels = shape
  noise = rng.integers(0, 256, shape)
  ramp = 60 + np.add.outer(3 * np.arange(height), np.arange(width))[..., None]
  ramp = ramp + 5 * np.arange(channels)
  corner = np.zeros(shape)
  corner[: height // 2, : width // 2] = noise[: height // 2, : width // 2]
  images = noise, ramp, np.full(shape, 77), corner
  return np.stack(images).astype(np.uint8)


@functools.cache
def results(shape, magnitude):
  """Returns what every operation makes of every image, by name and sign."""
  images = images_of(shape)
  cases = [
    (number, sign)
    for number in range(len(randaugment.OPERATIONS))
    for sign in (1, -1)
  ]

  @functools.partial(jax.jit, compiler_options=FAST_COMPILE)
  @jax.vmap
  def run(operation, sign):
    return jax.vmap(
      lambda image: randaugment.apply(image, operation, sign, magnitude)
    )(images)

  made = np.asarray(run(*map(np.array, zip(*cases, strict=True))))
  return {
    (randaugment.OPERATIONS[number], sign): view
    for (number, sign), view in zip(cases, made, strict=True)
  }


def by_torchvision(image, name, sign, magnitude):
  """Returns what torchvision makes of a PIL image."""
  from PIL import Image
  from torchvision.transforms import InterpolationMode
  from torchvision.transforms import autoaugment

  space = autoaugment.RandAugment()._augmentation_space(31, image.shape[:2])
  magnitudes, signed = space[name]
  assert signed == (name in SIGNED)
  value = magnitudes[magnitude].item() if magnitudes.ndim else 0.0
  made = autoaugment._apply_op(
    Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image),
    name,
    sign * value if signed else value,
    interpolation=InterpolationMode.NEAREST,
    fill=None,
  )
  return np.asarray(made).reshape(image.shape)


@pytest.mark.parametrize(
  'shape, magnitude', [((32, 32, 3), 9), ((32, 32, 3), 30), ((14, 28, 1), 15)]
)
def test_every_operation_is_torchvisions(shape, magnitude):
  """Colours to one grey level; a turned grid may round at a pixel's edge."""
  pytest.importorskip('torchvision')
  for (name, sign), made in results(shape, magnitude).items():
    for image, view in zip(images_of(shape), made, strict=True):
      expected = by_torchvision(image, name, sign, magnitude)
      if name in ('ShearX', 'ShearY', 'Rotate'):
        assert (view == expected).mean() > 0.99, (name, sign)
        continue
      distance = np.abs(view.astype(int) - expected).max()
      assert distance <= (name in SIGNED[5:] or name == 'AutoContrast'), name


def test_operations_by_hand():
  image = np.arange(0, 250, 10, dtype=np.uint8).reshape(5, 5, 1)

  def apply(name, sign=1, magnitude=30):
    number = randaugment.OPERATIONS.index(name)
    view = randaugment.apply(image, number, sign, magnitude)
    return np.asarray(view)[..., 0]

  rows = image[..., 0]
  np.testing.assert_array_equal(apply('Identity'), rows)
  # 150/331 of five pixels are two, and zeros follow.
  moved = np.pad(rows[:, :3], ((0, 0), (2, 0)))
  np.testing.assert_array_equal(apply('TranslateX'), moved)
  moved = np.pad(rows[2:], ((0, 2), (0, 0)))
  np.testing.assert_array_equal(apply('TranslateY', -1), moved)
  np.testing.assert_array_equal(apply('Posterize'), rows & 0xF0)
  np.testing.assert_array_equal(apply('Solarize'), 255 - rows)
  np.testing.assert_array_equal(apply('Color'), rows)
  np.testing.assert_array_equal(apply('AutoContrast'), 255 * rows / 240 // 1)
  # By a factor of 0.1.
  np.testing.assert_array_equal(apply('Brightness', -1), rows // 10)


def test_magnitude_zero_leaves_what_has_a_direction():
  images = images_of((8, 8, 3))
  for (name, _), made in results((8, 8, 3), 0).items():
    if name in SIGNED or name in ('Identity', 'Posterize'):
      np.testing.assert_array_equal(made, images, err_msg=name)


def test_operations_are_drawn_alike_and_in_layers():
  shape, num, magnitude = (32, 32, 3), 2000, 9
  image = images_of(shape)[1]
  keys = jax.random.split(jax.random.key(0), num)

  def views(layers):
    run = jax.vmap(
      randaugment.RandAugment(layers, magnitude), in_axes=(0, None)
    )
    return np.asarray(jax.jit(run, compiler_options=FAST_COMPILE)(keys, image))

  once = [view.tobytes() for view in views(1)]
  known = {made[1].tobytes() for made in results(shape, magnitude).values()}
  assert set(once) <= known
  # Nine operations have two directions.
  assert len(known) == 5 + 2 * 9
  for name in randaugment.OPERATIONS:
    made = {
      results(shape, magnitude)[name, sign][1].tobytes() for sign in (1, -1)
    }
    counts = np.array([once.count(view) for view in made])
    # Five standard deviations.
    assert abs(counts.sum() - num / 14) < 5 * np.sqrt(num / 14), name
    assert np.abs(counts - num / 14 / len(made)).max() < 5 * np.sqrt(num / 14)
  twice = {view.tobytes() for view in views(2)}
  assert len(twice) > 2 * len(known)
