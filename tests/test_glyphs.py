"""Printed characters, of the fonts that matplotlib brings."""

import json
import pathlib

import matplotlib
import numpy as np
import pytest

from experiments.glyphs import dataset
from experiments.glyphs import prepare
from ijckd_jax.runtime import config_utils

FONTS = pathlib.Path(matplotlib.get_data_path()) / 'fonts/ttf'
TESTED = 'DejaVu Serif'


@pytest.fixture(scope='module')
def prepared(tmp_path_factory):
  folder = tmp_path_factory.mktemp('glyphs')
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(prepare, 'is_test', lambda family: family == TESTED)
    prepare.main(['--source', str(FONTS), str(folder)])
  return folder


def test_every_split_has_fonts_and_classes_of_its_own(prepared):
  fonts = json.loads((prepared / 'fonts.json').read_text())
  names = {font['family'] for font in fonts['used']}
  assert {'DejaVu Sans', TESTED} <= names
  assert all(font['licence'] or font['copyright'] for font in fonts['used'])
  # Those of mathematical symbols lack letters.
  reasons = {row['file']: row['reason'] for row in fonts['left_out']}
  assert 'blank' in reasons['cmsy10.ttf'] and all(reasons.values())
  data = dataset.Dataset(path=str(prepared))
  for split in ('train', 'test'):
    arrays = data.load(split)
    assert arrays.images.shape[1:] == data.image_shape
    assert set(arrays.labels) == set(range(len(data.class_names)))
    assert fonts['images'][split] == len(arrays)
  assert not len(data.load('validation'))


def test_no_picture_is_there_twice(prepared):
  data = dataset.Dataset(path=str(prepared))
  train, test = (
    {
      (label, image.tobytes())
      for label, image in zip(arrays.labels, arrays.images, strict=True)
    }
    for arrays in map(data.load, ('train', 'test'))
  )
  assert not train & test
  assert len(train) == len(data.load('train'))


def test_characters_keep_their_sizes():
  images = prepare.draw(FONTS / 'DejaVuSans.ttf')

  def rows(character):
    inked = np.flatnonzero(images[dataset.DRAWN.index(character)].max(axis=1))
    return inked[0], inked[-1]

  assert rows('x')[0] > rows('X')[0]  # Smaller,
  assert abs(rows('x')[1] - rows('X')[1]) <= 1  # on the same line.
  assert rows('p')[1] > rows('x')[1]


def test_characters_that_fonts_draw_alike_are_one_class():
  assert dataset.class_of('O') == dataset.class_of('0')
  assert dataset.class_of('l') == dataset.class_of('I')
  assert dataset.class_of('o') != dataset.class_of('0')
  numbers = {dataset.class_of(c) for c in dataset.DRAWN}
  assert numbers == set(range(len(dataset.CLASSES)))
  assert len(dataset.CLASSES) == 71


def test_a_font_that_cannot_tell_two_classes_apart_is_left_out():
  images = prepare.draw(FONTS / 'DejaVuSans.ttf')
  assert not prepare.problem(images)
  alike = images.copy()
  alike[dataset.DRAWN.index('a')] = alike[dataset.DRAWN.index('A')]
  assert 'alike' in prepare.problem(alike)
  alike = images.copy()
  alike[dataset.DRAWN.index('O')] = alike[dataset.DRAWN.index('0')]
  assert not prepare.problem(alike)
  images[3] = 0
  assert 'blank' in prepare.problem(images)


def test_few_labels_are_of_all_classes(prepared):
  whole = dataset.Dataset(path=str(prepared)).load('train')
  few = dataset.Dataset(path=str(prepared), num_labelled=150).load('train')
  np.testing.assert_array_equal(few.images, whole.images)
  labelled = few.labels >= 0
  np.testing.assert_array_equal(few.labels[labelled], whole.labels[labelled])
  counts = np.bincount(few.labels[labelled], minlength=71)
  assert counts.sum() == 150 and set(counts) == {2, 3}
  alone = dataset.Dataset(
    path=str(prepared), num_labelled=150, keep_unlabelled=False
  ).load('train')
  np.testing.assert_array_equal(alone.images, few.images[labelled])
  np.testing.assert_array_equal(alone.labels, few.labels[labelled])


def test_a_part_of_the_images_at_half_resolution(prepared):
  whole = dataset.Dataset(path=str(prepared)).load('train')
  data = dataset.Dataset(path=str(prepared), num_train=100, resolution='half')
  part = data.load('train')
  assert part.images.shape == (100, *data.image_shape) == (100, 16, 16, 1)
  small = whole.images.reshape(-1, 16, 2, 16, 2).mean(axis=(2, 4)).round()
  known = {image.astype(np.uint8).tobytes() for image in small}
  assert all(image.tobytes() in known for image in part.images)
  assert len(data.load('test')) > 100
  with pytest.raises(config_utils.UserError, match='full, half'):
    dataset.Dataset(resolution='third')


@pytest.mark.parametrize('field', ['num_train', 'num_labelled'])
def test_more_than_there_are_is_refused(field, prepared):
  data = dataset.Dataset(path=str(prepared), **{field: 10**6})
  with pytest.raises(config_utils.UserError, match='not 1,000,000'):
    data.load('train')


def test_what_is_missing_is_said(tmp_path):
  with pytest.raises(config_utils.UserError, match='glyphs.prepare --source'):
    dataset.Dataset(path=str(tmp_path)).load('train')
  with pytest.raises(config_utils.UserError, match='more font packages'):
    prepare.main(['--source', str(tmp_path), str(tmp_path / 'out')])
  assert not (tmp_path / 'out').exists()
