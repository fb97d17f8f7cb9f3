"""Operations on images against Pillow, and how they are drawn."""

import functools

import jax
import numpy as np
import pytest

from ijckd_jax.data import randaugment

SIGNED = randaugment.OPERATIONS[1:10]


def images_of(shape):
  """Returns noise, a dull ramp, one colour, and a picture in one corner."""
  rng = np.random.default_rng(0)
  height, width, channels = shape
  noise = rng.integers(40, 200, shape)
  ramp = 60 + np.add.outer(3 * np.arange(height), np.arange(width))[..., None]
  ramp = ramp + 5 * np.arange(channels)
  corner = np.zeros(shape)
  corner[: height // 2, : width // 2] = rng.integers(
    0, 256, (height // 2, width // 2, channels)
  )
  images = noise, ramp, np.full(shape, 77), corner
  return np.stack(images).astype(np.uint8)


@functools.cache
def results(shape, magnitude, space=randaugment.NARROW):
  """Returns what every operation makes of every image, by name and sign."""
  images = images_of(shape)
  cases = [
    (number, sign)
    for number in range(len(randaugment.OPERATIONS))
    for sign in (1, -1)
  ]

  @jax.jit
  @jax.vmap
  def run(operation, sign):
    return jax.vmap(
      lambda image: randaugment.apply(image, operation, sign, magnitude, space)
    )(images)

  made = np.asarray(run(*map(np.array, zip(*cases, strict=True))))
  return {
    (randaugment.OPERATIONS[number], sign): view
    for (number, sign), view in zip(cases, made, strict=True)
  }


# Of torchvision's RandAugment and TrivialAugmentWide: shear, pixels, degrees,
# what is added to a factor, and posterised bits, all at magnitude 30.
LARGEST = {
  randaugment.NARROW: (0.3, None, 30, 0.9, 4),
  randaugment.WIDE: (0.99, 32, 135, 0.99, 6),
}


def by_pillow(image, name, sign, magnitude, space):
  """Returns what Pillow makes of an image, called as torchvision calls it."""
  from PIL import Image
  from PIL import ImageEnhance
  from PIL import ImageOps

  pil = Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)
  share = sign * magnitude / 30
  shear, pixels, degrees, factor, bits = LARGEST[space]

  def affine(*matrix):
    return pil.transform(pil.size, Image.Transform.AFFINE, matrix)

  def shift(side):
    return -int(share * (pixels or 150 / 331 * side))

  make = {
    'Identity': lambda: pil,
    'ShearX': lambda: affine(1, shear * share, 0, 0, 1, 0),
    'ShearY': lambda: affine(1, 0, 0, shear * share, 1, 0),
    'TranslateX': lambda: affine(1, 0, shift(pil.width), 0, 1, 0),
    'TranslateY': lambda: affine(1, 0, 0, 0, 1, shift(pil.height)),
    'Rotate': lambda: pil.rotate(degrees * share),
    'Posterize': lambda: ImageOps.posterize(
      pil, 8 - round(magnitude / 30 * bits)
    ),
    'Solarize': lambda: ImageOps.solarize(pil, 255 - 8.5 * magnitude),
    'AutoContrast': lambda: ImageOps.autocontrast(pil),
    'Equalize': lambda: ImageOps.equalize(pil),
  }
  if name in make:
    made = make[name]()
  else:
    made = getattr(ImageEnhance, name)(pil).enhance(1 + factor * share)
  return np.asarray(made).reshape(image.shape)


@pytest.mark.parametrize(
  'shape, magnitude, space',
  [
    ((32, 32, 3), 9, randaugment.NARROW),
    ((32, 32, 3), 30, randaugment.NARROW),
    ((14, 28, 1), 15, randaugment.NARROW),
    ((32, 32, 3), 7, randaugment.WIDE),
    ((48, 40, 3), 26, randaugment.WIDE),
  ],
)
def test_every_operation_is_pillows(shape, magnitude, space):
  """Colours to one grey level; a turned grid may round at a pixel's edge."""
  for (name, sign), made in results(shape, magnitude, space).items():
    for image, view in zip(images_of(shape), made, strict=True):
      expected = by_pillow(image, name, sign, magnitude, space)
      if name in ('ShearX', 'ShearY', 'Rotate'):
        assert (view == expected).mean() > 0.99, (name, sign)
        continue
      distance = np.abs(view.astype(int) - expected).max()
      assert distance <= (name in SIGNED[5:] or name == 'AutoContrast'), name


def test_operations_by_hand():
  image = np.arange(0, 250, 10, dtype=np.uint8).reshape(5, 5, 1)

  @jax.jit
  def run(operation, sign):
    return randaugment.apply(image, operation, sign, 30)

  def apply(name, sign=1):
    made = run(randaugment.OPERATIONS.index(name), sign)
    return np.asarray(made)[..., 0]

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
  np.testing.assert_array_equal(apply('AutoContrast'), 255.0 * rows // 240)
  # By a factor of 0.1.
  np.testing.assert_array_equal(apply('Brightness', -1), rows // 10)


def test_magnitude_zero_leaves_what_has_a_direction():
  images = images_of((8, 8, 3))
  for (name, _), made in results((8, 8, 3), 0).items():
    if name in SIGNED or name in ('Identity', 'Posterize'):
      np.testing.assert_array_equal(made, images, err_msg=name)


def test_operations_are_drawn_alike_and_in_layers():
  shape, num, magnitude = (18, 20, 3), 1000, 9
  image = images_of(shape)[0]
  keys = jax.random.split(jax.random.key(0), num)

  def views(layers):
    run = jax.vmap(
      randaugment.RandAugment(layers, magnitude), in_axes=(0, None)
    )
    return np.asarray(jax.jit(run)(keys, image))

  once = [view.tobytes() for view in views(1)]
  known = {made[0].tobytes() for made in results(shape, magnitude).values()}
  assert set(once) <= known
  # Nine operations have two directions.
  assert len(known) == 5 + 2 * 9
  for name in randaugment.OPERATIONS:
    made = {
      results(shape, magnitude)[name, sign][0].tobytes() for sign in (1, -1)
    }
    counts = np.array([once.count(view) for view in made])
    # Five standard deviations.
    assert abs(counts.sum() - num / 14) < 5 * np.sqrt(num / 14), name
    assert np.abs(counts - num / 14 / len(made)).max() < 5 * np.sqrt(num / 14)
  twice = {view.tobytes() for view in views(2)}
  assert len(twice) > 2 * len(known)


def test_trivialaugment_draws_operations_and_magnitudes_alike():
  shape, num = (18, 20, 3), 2000
  image = images_of(shape)[0]

  @jax.jit
  @functools.partial(jax.vmap, in_axes=(0, None, None))
  @functools.partial(jax.vmap, in_axes=(None, 0, None))
  @functools.partial(jax.vmap, in_axes=(None, None, 0))
  def every(operation, magnitude, sign):
    wide = randaugment.WIDE
    return randaugment.apply(image, operation, sign, magnitude, wide)

  signs = np.array([1, -1])
  made = np.asarray(every(np.arange(14), np.arange(31), signs))
  known = [
    [view.tobytes() for view in views.reshape(62, *shape)] for views in made
  ]
  # With a magnitude that is traced, the same as with a number.
  for (name, sign), views in results(shape, 7, randaugment.WIDE).items():
    operation = randaugment.OPERATIONS.index(name)
    np.testing.assert_array_equal(made[operation, 7, (1 - sign) // 2], views[0])

  keys = jax.random.split(jax.random.key(0), num)
  run = jax.vmap(randaugment.TrivialAugment(), in_axes=(0, None))
  drawn = [view.tobytes() for view in np.asarray(jax.jit(run)(keys, image))]
  assert set(drawn) <= set().union(*known)
  for number, name in enumerate(randaugment.OPERATIONS):
    # Views that no other operation makes, and how often they are to be drawn.
    others = set().union(*known[:number], *known[number + 1 :])
    own = [view for view in known[number] if view not in others]
    expected = num * len(own) / (14 * 62)
    count = sum(view in own for view in drawn)
    assert abs(count - expected) <= 5 * np.sqrt(expected), name
    assert own or name == 'Identity'
