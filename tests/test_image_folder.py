"""A folder of pictures becomes a data set: all of it, as it looks, or none."""

import io
import json
import os
import pathlib
import re
import struct
import subprocess
import sys
import unicodedata
import zlib

import cv2
import numpy as np
from PIL import Image
from PIL import PngImagePlugin
import pytest

from ijckd_jax.commands import prepare
from ijckd_jax.data import datasets
from ijckd_jax.data.datasets import image_files
from ijckd_jax.data.datasets import image_folder
from ijckd_jax.data.datasets import image_layout
from ijckd_jax.data.datasets import image_shards
from ijckd_jax.data.datasets import prepared
from ijckd_jax.runtime import config_utils


def noise(seed, mode='RGB', size=(7, 5)):
  """Returns a picture known by its pixels, wider than high."""
  shape = (size[1], size[0], len(mode))
  pixels = np.random.RandomState(seed).randint(0, 256, shape, np.uint8)
  return Image.fromarray(pixels[..., 0] if mode == 'L' else pixels)


def encode(image, kind='PNG', **options):
  buffer = io.BytesIO()
  image.save(buffer, kind, **options)
  return buffer.getvalue()


def fill(folder, files):
  """Writes files, given as bytes or as how many pictures a folder gets."""
  for number, (path, content) in enumerate(files.items()):
    path = pathlib.Path(folder, path)
    if isinstance(content, bytes):
      path.parent.mkdir(parents=True, exist_ok=True)
      path.write_bytes(content)
      continue
    path.mkdir(parents=True, exist_ok=True)
    for i in range(content):
      # A seed of its own: no two pictures of a folder are alike.
      image = noise(1000 * (number + 1) + i)
      (path / f'{i:02d}.png').write_bytes(encode(image))
  return folder


TRAIN_AND_VAL = {
  'train/cat': 12,
  'train/dog': 11,
  'val/cat': 2,
  'val/dog': 3,
}


def run(source, data_dir, *flags, name='pets', workers=1):
  code = prepare.main(
    [
      *('image_folder', '--source', str(source), '--name', name),
      *('--data_dir', str(data_dir), '--num_workers', str(workers), *flags),
    ]
  )
  assert code == 0


def contents(data_dir, name='pets'):
  """Returns {split: {file name: (pixels, class or None)}}, read by tfds."""
  builder = prepared.find(name, str(data_dir))
  found = {}
  for split in builder.info.splits:
    source = builder.as_data_source(split)
    examples = list(source.__getitems__(range(len(source))))
    names = [example['file_name'] for example in examples]
    assert len(set(names)) == len(names)
    features = builder.info.features
    label = features['label'] if 'label' in features else None
    found[split] = {
      os.fsdecode(example['file_name']): (
        example['image'],
        label and label.int2str(example['label']),
      )
      for example in examples
    }
  return found


def pixels_of(path):
  with Image.open(path) as image:
    return np.asarray(image.convert('RGB'))


def report_of(data_dir, name='pets'):
  return json.loads(
    (pathlib.Path(data_dir) / name / '1.0.0/report.json').read_text()
  )


@pytest.mark.parametrize(
  ('held', 'splits'),
  [
    ({'val': 'test'}, ['test', 'train']),
    ({'validation': 'test'}, ['test', 'train']),
    ({'Test': 'test'}, ['test', 'train']),
    ({'valid': 'validation', 'test': 'test'}, ['test', 'train', 'validation']),
  ],
)
def test_folders_of_splits(held, splits, tmp_path, capsys):
  files = {'train/cat': 10, 'train/dog': 11}
  for folder in held:
    files |= {f'{folder}/cat': 2, f'{folder}/dog': 3}
  source = fill(tmp_path / 'source', files)
  run(source, tmp_path / 'data')
  found = contents(tmp_path / 'data')
  assert sorted(found) == splits
  split_of = {'train': 'train', **held}
  paths = sorted(source.glob('*/*/*'))
  assert sum(map(len, found.values())) == len(paths)
  for path in paths:
    name = path.relative_to(source).as_posix()
    folder, class_name, _ = name.split('/')
    image, label = found[split_of[folder]][name]
    assert label == class_name
    np.testing.assert_array_equal(image, pixels_of(path))
  builder = prepared.find('pets', str(tmp_path / 'data'))
  assert set(builder.info.features) == {'image', 'label', 'file_name'}
  assert builder.info.features['label'].names == ['cat', 'dog']
  assert builder.info.supervised_keys == ('image', 'label')
  ordered = [split for split in datasets.SPLITS if split in found]
  counts = ', '.join(f'{len(found[split])} {split}' for split in ordered)
  out = capsys.readouterr().out
  final = tmp_path / 'data/pets/1.0.0'
  assert out.startswith(f'pets: written in {final} ({counts})\n')
  assert os.listdir(tmp_path / 'data') == ['pets']
  assert not list(final.glob('*.partial'))
  assert not {'notes', 'lock'} & set(os.listdir(final))


@pytest.mark.parametrize('prefix', ['', 'train/'])
def test_a_part_of_every_class_is_held_out(prefix, tmp_path):
  files = {f'{prefix}cat': 20, f'{prefix}dog': 10, f'{prefix}rare': 2}
  source = fill(tmp_path / 'source', files)

  def test_files(data, *flags):
    run(source, tmp_path / data, *flags)
    found = contents(tmp_path / data)
    assert not found['train'].keys() & found['test'].keys()
    assert len(found['train']) + len(found['test']) == 32
    return sorted(found['test'])

  held = test_files('a')
  counts = [sum(f'{name}/' in path for path in held) for name in files]
  assert counts == [2, 1, 1]
  assert held[:2] != [f'{prefix}cat/00.png', f'{prefix}cat/01.png']
  assert test_files('b') == held
  half = test_files('c', '--validation_fraction', '0.5')
  counts = [sum(f'{name}/' in path for path in half) for name in files]
  assert counts == [10, 5, 1]


def test_pictures_without_classes(tmp_path, capsys):
  source = fill(tmp_path / 'source', {'.': 5, 'empty/notes.txt': b'hello'})
  run(source, tmp_path / 'data')
  assert 'without labels' in capsys.readouterr().out
  (split, found), *others = contents(tmp_path / 'data').items()
  assert (split, others) == ('train', [])
  for name, (image, label) in found.items():
    assert label is None
    np.testing.assert_array_equal(image, pixels_of(source / name))
  builder = prepared.find('pets', str(tmp_path / 'data'))
  assert set(builder.info.features) == {'image', 'file_name'}
  # Any folders, where they are said to be none of classes.
  source = fill(tmp_path / 'nested', {'.': 1, 'train/x': 2, '2024/may/y': 2})
  run(source, tmp_path / 'data', '--unlabelled', name='nested')
  found = contents(tmp_path / 'data', 'nested')
  assert {split: len(files) for split, files in found.items()} == {'train': 5}


def turned(array, orientation):
  """Returns what a picture stored as `array` looks like, by EXIF's table."""
  rows_then_columns = {
    1: array,
    2: array[:, ::-1],
    3: array[::-1, ::-1],
    4: array[::-1],
    5: array.transpose(1, 0, 2),
    6: array.transpose(1, 0, 2)[:, ::-1],
    7: array.transpose(1, 0, 2)[::-1, ::-1],
    8: array.transpose(1, 0, 2)[::-1],
  }
  return rows_then_columns[orientation]


def exif(orientation):
  found = Image.Exif()
  found[0x0112] = orientation
  return found


RGB, GREY = noise(0), noise(1, 'L')
GREYS = np.repeat(np.asarray(GREY)[..., None], 3, axis=-1)
RGBA = noise(2, 'RGBA')
DEEP = np.random.RandomState(3).randint(0, 2**16, (5, 7), np.uint16)
PALETTE = RGB.quantize(16)


def over_white(image):
  pixels = np.asarray(image).astype(float)
  alpha = pixels[..., 3:] / 255
  return pixels[..., :3] * alpha + 255 * (1 - alpha)


def transparent_colour(image, kind='PNG'):
  """Encodes a picture, one colour of which is declared to be transparent."""
  return encode(image, kind, transparency=image.getpixel((0, 0)))


def text_chunk(key, text):
  found = PngImagePlugin.PngInfo()
  found.add_text(key, text)
  return found


def png_of_16_bits(array):
  """Returns a PNG of 16-bit RGB, which PIL does not write."""
  height, width, _ = array.shape
  rows = b''.join(b'\0' + row.astype('>u2').tobytes() for row in array)
  chunks = [
    (b'IHDR', struct.pack('>IIBBBBB', width, height, 16, 2, 0, 0, 0)),
    (b'IDAT', zlib.compress(rows)),
    (b'IEND', b''),
  ]
  return b'\x89PNG\r\n\x1a\n' + b''.join(
    struct.pack('>I', len(data))
    + kind
    + data
    + struct.pack('>I', zlib.crc32(kind + data))
    for kind, data in chunks
  )


def decoded(data):
  return np.asarray(Image.open(io.BytesIO(data)).convert('RGB'))


JPEG = encode(RGB, 'JPEG')
WEBP = encode(RGB, 'WEBP')
CMYK = encode(RGB.convert('CMYK'), 'JPEG')
DEEP_RGB = np.stack([DEEP, DEEP[::-1], DEEP[:, ::-1]], axis=-1)

# Name: bytes, what they show, why they cannot stay as they are.
KINDS = {
  'rgb.jpg': (JPEG, decoded(JPEG), ''),
  'grey.jpeg': (encode(GREY, 'JPEG', quality=100), None, ''),
  'rgb.png': (encode(RGB), np.asarray(RGB), ''),
  'grey.PNG': (encode(GREY), GREYS, ''),
  'rgb.webp': (WEBP, decoded(WEBP), ''),
  'lossless.webp': (encode(RGB, 'WEBP', lossless=True), np.asarray(RGB), ''),
  'a_png_indeed.jpg': (encode(RGB), np.asarray(RGB), ''),
  'exif1.jpg': (encode(RGB, 'JPEG', exif=exif(1)), decoded(JPEG), ''),
  'damaged_exif.jpg': (
    encode(RGB, 'JPEG', exif=b'Exif\0\0nonsense'),
    decoded(JPEG),
    '',
  ),
  'damaged_exif.png': (
    encode(RGB, pnginfo=text_chunk('Raw profile type exif', '\n\n\nxyz')),
    np.asarray(RGB),
    '',
  ),
  'several.jpg': (
    encode(RGB, 'MPO', save_all=True, append_images=[noise(9)]),
    decoded(JPEG),
    '',
  ),
  'cmyk.jpg': (CMYK, decoded(CMYK), 'CMYK'),
  'palette.png': (
    encode(PALETTE),
    np.asarray(PALETTE.convert('RGB')),
    'palette',
  ),
  'transparent_palette.png': (
    transparent_colour(PALETTE),
    np.where(
      (np.asarray(PALETTE) == PALETTE.getpixel((0, 0)))[..., None],
      255,
      np.asarray(PALETTE.convert('RGB')),
    ),
    'transparent',
  ),
  'alpha.png': (encode(RGBA), over_white(RGBA), 'transparent'),
  'alpha.webp': (
    encode(RGBA, 'WEBP', lossless=True, exact=True),
    over_white(RGBA),
    'transparent',
  ),
  'grey_alpha.png': (
    encode(RGBA.convert('LA')),
    over_white(RGBA.convert('LA').convert('RGBA')),
    'transparent',
  ),
  'transparent_colour.png': (
    transparent_colour(RGB),
    np.where(
      (np.asarray(RGB) == np.asarray(RGB)[0, 0]).all(-1, keepdims=True),
      255,
      np.asarray(RGB),
    ),
    'transparent',
  ),
  'one_bit.png': (
    encode(GREY.convert('1')),
    np.repeat(255 * np.asarray(GREY.convert('1'))[..., None], 3, -1),
    '1 bit',
  ),
  '16_grey.png': (
    encode(Image.fromarray(DEEP)),
    np.repeat((DEEP >> 8)[..., None], 3, -1),
    '16 bit',
  ),
  '16_rgb.png': (png_of_16_bits(DEEP_RGB), DEEP_RGB >> 8, '16 bit'),
  '16.tif': (
    encode(Image.fromarray(DEEP), 'TIFF'),
    np.repeat((DEEP >> 8)[..., None], 3, -1),
    'TIFF format',
  ),
  # White is what the header says, which is 12 bits here.
  '12.pgm': (
    b'P5 7 5 4095 ' + (DEEP >> 4).astype('>u2').tobytes(),
    np.repeat((DEEP >> 4)[..., None].astype(int) * 65535 // 4095 >> 8, 3, -1),
    'PPM format',
  ),
  'animated.webp': (
    encode(RGB, 'WEBP', save_all=True, append_images=[noise(9)], lossless=True),
    np.asarray(RGB),
    'animated',
  ),
  'animated.png': (
    encode(RGB, save_all=True, append_images=[noise(9)]),
    np.asarray(RGB),
    'animated',
  ),
  'animated.gif': (
    encode(GREY, 'GIF', save_all=True, append_images=[noise(9, 'L')]),
    GREYS,
    'GIF format',
  ),
  'rgb.bmp': (encode(RGB, 'BMP'), np.asarray(RGB), 'BMP format'),
  'rgb.tiff': (encode(RGB, 'TIFF'), np.asarray(RGB), 'TIFF format'),
  'turned.tiff': (
    encode(RGB, 'TIFF', tiffinfo={0x0112: 6}),
    turned(np.asarray(RGB), 6),
    'TIFF format',
  ),
  'rgb.ppm': (encode(RGB, 'PPM'), np.asarray(RGB), 'PPM format'),
  **{
    f'exif{orientation}.jpg': (
      encode(RGB, 'JPEG', exif=exif(orientation)),
      turned(decoded(JPEG), orientation),
      'EXIF orientation',
    )
    for orientation in range(2, 9)
  },
  'turned.png': (
    encode(RGB, exif=exif(6)),
    turned(np.asarray(RGB), 6),
    'EXIF orientation',
  ),
  'turned.webp': (
    encode(RGB, 'WEBP', lossless=True, exif=exif(8)),
    turned(np.asarray(RGB), 8),
    'EXIF orientation',
  ),
  'turned_16.png': (
    encode(Image.fromarray(DEEP), exif=exif(6)),
    turned(np.repeat((DEEP >> 8)[..., None], 3, -1), 6),
    '16 bit',
  ),
}


def test_every_kind_of_picture_looks_as_it_should(tmp_path):
  files = {f'all/{name}': data for name, (data, _, _) in KINDS.items()}
  source = fill(tmp_path / 'source', {**files, 'other': 1})
  run(source, tmp_path / 'data', '--unlabelled')
  found = contents(tmp_path / 'data')['train']
  assert len(found) == len(KINDS) + 1
  for name, (data, expected, _) in KINDS.items():
    image, _ = found[f'all/{name}']
    assert image.dtype == np.uint8
    expected = decoded(data) if expected is None else expected
    # Alpha is mixed in whole numbers.
    np.testing.assert_allclose(image, expected, atol=1, err_msg=name)
    if 'alpha' not in name:
      np.testing.assert_array_equal(image, expected, err_msg=name)
  report = report_of(tmp_path / 'data')
  assert report['converted'] == {
    f'all/{name}': change for name, (_, _, change) in KINDS.items() if change
  }
  assert report['changes']['EXIF orientation'] == 9
  assert report['formats']['WEBP'] == 5
  assert report['width'] == {'min': 5, 'median': 7, 'max': 7}
  assert report['height'] == {'min': 5, 'median': 5, 'max': 7}


@pytest.mark.parametrize('name', KINDS)
def test_what_all_decoders_agree_on_stays_as_it_is(name):
  data, _, change = KINDS[name]
  picture = image_files.read(data)
  assert picture.change == change
  assert (picture.data == data) == (not change)
  if change:
    stored = Image.open(io.BytesIO(picture.data))
    assert (stored.format, stored.mode, stored.info) == ('PNG', 'RGB', {})
    assert stored.size == picture.size


def deep(bits, channels=1):
  """Returns pixels of 16 bits that hold the values of fewer, all of them."""
  pixels = np.random.RandomState(bits).randint(0, 2**bits, (6, 8, channels))
  pixels[0, 0], pixels[0, 1] = 0, 2**bits - 1
  return pixels.astype(np.uint16)


def darkness(top):
  return (
    f'no value above {top} of 65535, which makes it dark: {top >> 8} of 255'
  )


def opencv(pixels, kind):
  return cv2.imencode(kind, pixels)[1].tobytes()


@pytest.mark.parametrize(
  ('data', 'top'),
  [
    *[(opencv(deep(bits), '.png'), 2**bits - 1) for bits in (10, 12, 14)],
    *[(opencv(deep(bits, 3), '.png'), 2**bits - 1) for bits in (10, 12, 14)],
    (opencv(deep(12, 4) | np.uint16([0, 0, 0, 65535]), '.png'), 4095),
    (opencv(deep(12), '.tiff'), 4095),
    (opencv(deep(12, 3), '.tiff'), 4095),
    (b'P5 7 5 65535 ' + (DEEP >> 4).astype('>u2').tobytes(), DEEP.max() >> 4),
    (opencv(deep(16), '.png'), None),
    (opencv(deep(15, 3), '.png'), None),
    (opencv(deep(16, 3), '.tiff'), None),
    (KINDS['12.pgm'][0], None),
    (encode(Image.new('RGB', (8, 8), (3, 2, 1))), None),
    (encode(Image.new('L', (8, 8), 3), 'TIFF'), None),
  ],
  ids=lambda value: 'data' if isinstance(value, bytes) else None,
)
def test_fewer_bits_than_the_file_has(data, top):
  """The pixels stay those of the upper eight bits, and are said to be dark."""
  picture = image_files.read(data)
  assert picture.warning == ('' if top is None else darkness(top))
  image, warning = image_files.decode(data)
  assert warning == picture.warning
  if top is not None:
    assert np.asarray(image).max() == top >> 8


def test_dark_pictures_are_named(tmp_path, capsys):
  source = fill(
    tmp_path / 'source',
    {
      **TRAIN_AND_VAL,
      'train/cat/dark.png': opencv(deep(12), '.png'),
      'val/dog/dark.tif': opencv(deep(10, 3), '.tiff'),
      'val/dog/bright.png': opencv(deep(16), '.png'),
    },
  )
  run(source, tmp_path / 'data')
  dark = {
    'train/cat/dark.png': darkness(4095),
    'val/dog/dark.tif': darkness(1023),
  }
  assert report_of(tmp_path / 'data')['dark'] == dark
  page = (tmp_path / 'data/pets/1.0.0/report.md').read_text()
  assert '## 16 bits that hold fewer: 2' in page
  for text in (capsys.readouterr().out, page):
    assert 'WARNING: 16 bits that hold fewer' in text
    assert f': 2 (train/cat/dark.png: {dark["train/cat/dark.png"]};' in text
  found = contents(tmp_path / 'data')
  np.testing.assert_array_equal(
    found['train']['train/cat/dark.png'][0],
    np.repeat(deep(12) >> 8, 3, axis=-1),
  )


def flip(data, position):
  return data[:position] + bytes([data[position] ^ 1]) + data[position + 1 :]


BIG_JPEG = encode(noise(0, size=(64, 64)), 'JPEG')
BROKEN = {
  'nothing': (b'', 'empty file'),
  'text': (b'not a picture', 'not a picture'),
  'truncated JPEG': (BIG_JPEG[:-500], 'truncated'),
  'header alone': (BIG_JPEG[:300], '.'),
  'truncated PNG': (encode(RGB)[:-30], 'Truncated'),
  'truncated WebP': (WEBP[:-20], 'decoder'),
  # Which PIL decodes without a word, and others refuse.
  'PNG with a wrong checksum': (flip(encode(RGB), -13), 'broken PNG'),
  'PostScript, a program': (encode(RGB, 'EPS'), 'not a picture'),
  'floats': (
    encode(Image.fromarray(np.eye(4, dtype=np.float32)), 'TIFF'),
    'black and white are unknown',
  ),
}


@pytest.mark.parametrize('kind', BROKEN)
def test_broken_pictures(kind):
  data, reason = BROKEN[kind]
  with pytest.raises(image_files.Unreadable, match=reason) as error:
    image_files.read(data)
  assert '0x' not in str(error.value)  # Some object's address.


def test_files_too_large_to_be_meant(tmp_path):
  with (tmp_path / 'a.png').open('wb') as file:
    file.truncate(2**30 + 1)  # Takes no room.
  with pytest.raises(image_files.Unreadable, match='1,073,741,825 bytes'):
    image_files.load(tmp_path / 'a.png')
  with pytest.raises(image_files.Unreadable, match='not a regular file'):
    image_files.load(tmp_path)


def test_pictures_too_large_to_be_meant(monkeypatch):
  monkeypatch.setattr(Image, 'MAX_IMAGE_PIXELS', 17)
  with pytest.raises(image_files.Unreadable, match='35 pixels.*exceeds'):
    image_files.read(encode(RGB))
  monkeypatch.setattr(Image, 'MAX_IMAGE_PIXELS', 34)  # Merely large.
  assert image_files.read(encode(RGB)).size == (7, 5)


def test_what_is_left_out_is_said(tmp_path, capsys):
  same = encode(RGB)
  source = fill(
    tmp_path / 'source',
    {
      **{'train/cat': 30, 'train/dog': 4, 'val/cat': 2, 'val/dog': 2},
      'train/cat/broken.jpg': BIG_JPEG[:-500],
      'train/cat/cmyk.jpg': CMYK,
      'train/cat/same.png': same,
      'train/cat/list|of.txt': b'',
      'train/cat/.hidden.png': same,
      'train/.ipynb_checkpoints/a.png': same,
      'val/__MACOSX/a.png': same,
      'train/loose.png': same,
      'masks/a.png': same,
      'val/dog/copy.png': same,
      'README': b'',
    },
  )
  (source / 'train/cat/gone.png').symlink_to('nowhere')
  (source / 'train/cat/round').symlink_to('..')
  run(source, tmp_path / 'data')
  report = report_of(tmp_path / 'data')
  assert report['num_examples'] == {'train': 36, 'test': 5}
  assert report['classes'] == {
    'cat': {'train': 32, 'test': 2},
    'dog': {'train': 4, 'test': 3},
  }
  assert list(report['skipped']) == ['train/cat/broken.jpg']
  assert 'truncated' in report['skipped']['train/cat/broken.jpg']
  assert report['converted'] == {'train/cat/cmyk.jpg': 'CMYK'}
  assert report['in_several_splits'] == {
    'val/dog/copy.png': 'train/cat/same.png'
  }
  assert report['ignored'] == {
    'README': 'no extension',
    'masks/a.png': 'outside of the class folders',
    'train/.ipynb_checkpoints': 'hidden',
    'train/cat/.hidden.png': 'hidden',
    'train/cat/gone.png': 'no file',
    'train/cat/list|of.txt': '.txt',
    'train/cat/round': 'link to a folder above it',
    'train/loose.png': 'outside of the class folders',
    'val/__MACOSX': 'hidden',
  }
  page = (tmp_path / 'data/pets/1.0.0/report.md').read_text()
  out = capsys.readouterr().out
  for text in (out, page):
    assert '2 classes, 4 to 32 training pictures each' in text
    assert 'fewer than 10 training pictures: dog 4' in text
    assert 'converted to PNG: 1 (CMYK 1)' in text
    assert 'skipped: 1 (train/cat/broken.jpg: ' in text
    assert 'WARNING: copies in two splits' in text
    assert ': 1 (val/dog/copy.png is train/cat/same.png)' in text
    assert 'hidden 3' in text
  assert re.search(r'\| cat +\| +32 \| +2 \|', page)
  assert 'list\\|of.txt' in page


def test_names_of_any_language(tmp_path):
  composed = unicodedata.normalize('NFC', 'bär')
  apart = unicodedata.normalize('NFD', 'bär')
  undecodable = os.fsdecode(b'caf\xe9.png')
  source = fill(
    tmp_path / 'source',
    {
      f'train/{composed}': 1,
      f'train/{composed}/tief/unten/日 本.png': encode(RGB),
      f'train/{composed}/{undecodable}': encode(RGB),
      'train/a b|c': 1,
      f'val/{apart}': 1,
      'val/a b|c': 1,
    },
  )
  run(source, tmp_path / 'data')
  found = contents(tmp_path / 'data')
  assert found['train'][f'train/{composed}/tief/unten/日 本.png'][1] == composed
  assert found['train'][f'train/{composed}/{undecodable}'][1] == composed
  assert found['test'][f'val/{apart}/00.png'][1] == composed
  builder = prepared.find('pets', str(tmp_path / 'data'))
  assert builder.info.features['label'].names == ['a b|c', composed]


def refused(source, data_dir, *flags, name='pets'):
  """Returns the one line that says why; nothing may have been written."""
  with pytest.raises(config_utils.UserError) as error:
    run(source, data_dir, *flags, name=name)
  assert '\n' not in str(error.value)
  assert not pathlib.Path(data_dir).exists()
  return str(error.value)


@pytest.mark.parametrize(
  ('files', 'flags', 'reason'),
  [
    ({}, [], 'does not exist'),
    ({'a.txt': b'', 'b/c.heic': b''}, [], r'no pictures.*1 \.txt, 1 \.heic'),
    ({'cat': 2, 'dog/a.txt': b''}, [], 'no pictures in dog'),
    ({'train/cat': 2, 'train/dog': 0}, [], 'no pictures in train/dog'),
    (
      {**TRAIN_AND_VAL, 'train/owl': 1},
      [],
      'classes of val/ are not those of train/: it lacks owl$',
    ),
    ({**TRAIN_AND_VAL, 'val/owl': 1}, [], 'it adds owl$'),
    *[
      (
        {'train/cat': 2, 'train/dog': 2, **held},
        [],
        rf': val/ holds {holds}, and not the classes of train/ \(cat, dog\): '
        r'sort its pictures into val/CLASS/, or move it out of .*source \(',
      )
      for held, holds in (
        ({'val': 1}, 'no class folders'),
        ({'val': 0}, 'no class folders'),
        ({'val/unknown': 1}, 'only unknown'),
        ({'val/val/cat': 1, 'val/val/dog': 1}, 'only val'),
      )
    ],
    (
      {'train/cat': 2, 'val/cat': 1, 'valid/cat': 1},
      [],
      'val/ and valid/, which stand for the same',
    ),
    ({'cat': 2, 'Cat': 2}, [], "'Cat' and 'cat' are the same name"),
    (
      {
        f'train/{unicodedata.normalize(form, "bär")}': 2
        for form in ('NFC', 'NFD')
      },
      [],
      'are the same name but for case or Unicode form',
    ),
    ({'cat ': 2, 'dog': 2}, [], "'cat ' cannot be a class name"),
    ({'a\nb': 2, 'dog': 2}, [], 'cannot be a class name'),
    ({os.fsdecode(b'caf\xe9'): 2, 'dog': 2}, [], 'cannot be a class name'),
    (
      {'pets/cat': 2, 'pets/dog': 2},
      [],
      r'one class folder only \(pets\).*\(cat, dog\).* --source .*source/pets$',
    ),
    (
      {'archive/pets/train/cat': 2, 'archive/pets/val/cat': 2},
      [],
      r'\(archive\).*\(train, val\).* --source .*/source/archive/pets$',
    ),
    ({'all/pets/cat': 2}, [], r'one class folder only \(all\).*--unlabelled'),
    (
      {f'{split}/{split}/{x}': 1 for split in ('train', 'val') for x in 'ab'},
      [],
      r'one class.*\(train\): if train/train/ .*\(a, b\), move these to train/',
    ),
    ({'train': 2, 'test': 2}, [], 'test, train, but no train/'),
    ({'val/cat': 2, 'test/cat': 2}, [], 'test, val, but no train/'),
    ({'train': 2, 'test': 2, 'masks': 2}, [], 'test, train, but no train/'),
    ({'.': 1, 'cat': 2, 'dog': 2}, [], r'pictures \(00.png\) beside folders'),
    ({'cat': 2, 'dog': 1}, [], 'one picture only in dog'),
    (
      TRAIN_AND_VAL,
      ['--validation_fraction', '0.1'],
      'holds train/, val/: leave out --validation_fraction',
    ),
    ({'.': 2}, ['--validation_fraction', '0.1'], 'holds unlabelled pictures'),
    *[
      (
        {'cat': 2, 'dog': 2},
        ['--validation_fraction', value],
        f'validation_fraction={value}',
      )
      for value in ('0.0', '1.0', '-0.5', 'nan')
    ],
    (TRAIN_AND_VAL, ['--num_workers', '0'], 'num_workers=0'),
  ],
)
def test_folders_that_cannot_be(files, flags, reason, tmp_path):
  fill(tmp_path / 'source', files)
  assert re.search(
    reason, refused(tmp_path / 'source', tmp_path / 'data', *flags)
  )


def under(folders, classes=('cat', 'dog')):
  """Returns files for `fill`: two pictures of each class in each folder."""
  return {f'{folder}/{name}': 2 for folder in folders for name in classes}


@pytest.mark.parametrize(
  ('files', 'reason'),
  [
    # Splits by other names: the first is to be given, and the others named.
    *[
      (
        under([train, test]),
        f': {train}/ seems to be the split train, {test}/ seems to be the '
        'split test; rename or link them, so that one folder holds train/CLASS/'
        f' and test/CLASS/, .* or give --source .*source/{train}, a part',
      )
      for train, test in (
        ('training_set/training_set', 'test_set/test_set'),
        ('seg_train/seg_train', 'seg_test/seg_test'),
        ('TrainData', 'TestData'),
        ('train_images', 'Test'),
        ('x-train2017', 'x-test2019'),
      )
    ],
    (
      {**under(['seg_train', 'seg_test']), 'seg_pred/seg_pred': 2},
      'seg_train/ seems to be the split train, seg_test/ seems',
    ),
    (
      under(['train_x', 'valid_x']),
      'valid_x/ seems to be the split validation',
    ),
    (
      {
        **under(['alphabet_train/alphabet_train']),
        'alphabet_test/alphabet_test': 2,
      },
      'alphabet_train/alphabet_train/ .*alphabet_test/alphabet_test/ seems',
    ),
    (
      {'trainA': 2, 'trainB': 2, 'testA': 2, 'testB': 2},
      'trainA/ .*testB/ seems .* hold no class folders: .*--unlabelled$',
    ),
    ({'train': 2, 'test1': 2}, 'test1/ .*hold no class folders'),
    (
      {**under(['training_set']), 'single_prediction': 2},
      'training_set/ seems to be the split train; rename',
    ),
    # The same classes in each folder, the same folders in each class.
    (
      under(['photo', 'art/art', 'sketch']),
      r': art, photo, sketch hold the same folders \(cat, dog\): .* give one .*'
      r'\(.*source/art/art\), .*all are pictures of the outer ones, move',
    ),
    (
      under(['cat', 'dog'], ['images', 'masks']),
      r'cat, dog hold the same folders \(images, masks\)',
    ),
    (under(['cat', 'dog'], ['train', 'val']), 'hold train, val, .* outside'),
    # What lies beside train/ would be left out.
    (
      under(['train', 'test_set']),
      'beside train/, test_set/ seems to be the split test: rename it test/',
    ),
    (
      {'train/steam': 2, 'train/diesel': 2, 'car': 2},
      r'beside other folders with pictures \(car\): .*source/train; if',
    ),
  ],
)
def test_splits_are_no_classes(files, reason, tmp_path):
  source = fill(tmp_path / 'source', files)
  assert re.search(reason, refused(source, tmp_path / 'data'))


@pytest.mark.parametrize(
  ('files', 'names'),
  [
    ({'train': 2, 'car': 2, 'bus': 2}, ['bus', 'car', 'train']),
    ({'steam_train': 2, 'toy_train': 2}, ['steam_train', 'toy_train']),
    ({'test_tube': 2, 'train_station': 2, 'car': 2}, None),
    ({'valid': 2, 'invalid': 2}, ['invalid', 'valid']),
    (under(['cat', 'dog'], ['images']), ['cat', 'dog']),
    ({**under(['cat', 'dog'], 'ab'), 'cat': 1, 'dog': 1}, ['cat', 'dog']),
    ({'cat/a': 2, 'cat/b': 2, 'dog/b': 2, 'dog/c': 2}, ['cat', 'dog']),
  ],
)
def test_classes_that_sound_like_splits(files, names, tmp_path):
  source = fill(tmp_path / 'source', files)
  assert image_layout.read(source).class_names == (names or sorted(files))


def test_what_a_folder_called_train_holds_are_classes(tmp_path):
  """The way out of each refusal: a link says what the folders are."""
  files = {**under(['train_a', 'test_a']), 'train/steam': 2, 'train/diesel': 2}
  fill(tmp_path / 'all', files)
  (tmp_path / 'source').mkdir()
  (tmp_path / 'source/train').symlink_to(tmp_path / 'all')
  layout = image_layout.read(tmp_path / 'source')
  assert layout.class_names == ['test_a', 'train', 'train_a']
  assert len(layout.examples) == 12


@pytest.mark.parametrize(
  ('name', 'reason'),
  [
    ('Pets', 'small letter'),
    ('9pets', 'small letter'),
    ('my-pets', 'small letter'),
    ('../pets', 'small letter'),
    ('digits', 'there is a data set of that name'),
    ('imagenet2012', 'there is a data set of that name'),
  ],
)
def test_names_that_cannot_be(name, reason, tmp_path):
  source = fill(tmp_path / 'source', TRAIN_AND_VAL)
  assert reason in refused(source, tmp_path / 'data', name=name)


@pytest.mark.parametrize(
  ('args', 'reason'),
  [
    (['image_folder', '--name', 'pets'], 'needs --source'),
    (['image_folder', '--source', 'x'], 'needs --name'),
    (['cifar10', '--name', 'x'], '--name is for image_folder only'),
    (['cifar10', '--num_workers', '2'], '--num_workers is for image_folder'),
    (['digits', '--unlabelled'], '--unlabelled is for image_folder only'),
    (['image_folder', '--validation_fraction', 'x'], 'invalid float'),
  ],
)
def test_wrong_arguments(args, reason):
  with pytest.raises(config_utils.UserError, match=reason):
    prepare.main(args)


def test_a_file_or_the_data_directory_as_source(tmp_path):
  (tmp_path / 'file').touch()
  message = refused(tmp_path / 'file', tmp_path / 'data')
  assert 'is not a folder' in message
  source = fill(tmp_path / 'source', TRAIN_AND_VAL)
  assert 'lies in --source' in refused(source, source / 'data')


def test_a_data_set_is_never_overwritten(tmp_path, capsys):
  source = fill(tmp_path / 'source', TRAIN_AND_VAL)
  run(source, tmp_path / 'data')
  written = capsys.readouterr().out
  folder = tmp_path / 'data/pets/1.0.0'
  before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
  run(source, tmp_path / 'data')
  again = capsys.readouterr().out
  assert again == written.replace('written in', 'already prepared in')
  fill(source, {'train/cat/new.png': encode(RGB)})
  with pytest.raises(config_utils.UserError, match='holds another data set'):
    run(source, tmp_path / 'data')
  assert before == {path: path.stat().st_mtime_ns for path in folder.iterdir()}
  assert os.listdir(tmp_path / 'data') == ['pets']


BROKEN_FILES = {'train/cat/x.jpg': b'broken', 'train/cat/y.jpg': b'broken'}


@pytest.mark.parametrize(
  ('files', 'reason'),
  [
    (BROKEN_FILES, ''),  # 2 of 40, which is 5 %.
    (
      {**BROKEN_FILES, 'train/dog/z.jpg': b'broken'},
      '3 of 41 pictures of train cannot be read, more than 5%.*train/cat/x.jpg',
    ),
    ({'val/dog/x.jpg': b'broken'}, '1 of 12 pictures of test cannot be read'),
    (
      {'train/owl/x.jpg': b'broken', 'val/owl': 1},
      'no picture of class owl in train can be read',
    ),
  ],
)
def test_too_many_broken_pictures(files, reason, tmp_path, capsys):
  whole = {'train/cat': 37, 'train/dog': 1, 'val/cat': 10, 'val/dog': 1}
  source = fill(tmp_path / 'source', whole | files)
  if not reason:
    run(source, tmp_path / 'data')
    assert len(report_of(tmp_path / 'data')['skipped']) == 2
    return
  with pytest.raises(config_utils.UserError, match=reason):
    run(source, tmp_path / 'data')
  assert os.listdir(tmp_path / 'data') == ['incomplete.pets']
  assert prepared.find('pets', str(tmp_path / 'data')) is None
  incomplete = tmp_path / 'data/incomplete.pets'
  report = json.loads((incomplete / 'report.json').read_text())
  broken = {name for name, data in files.items() if data == b'broken'}
  assert report['skipped'].keys() == broken
  for name in broken:
    (source / name).write_bytes(encode(RGB))
  run(source, tmp_path / 'data')
  assert 'starting anew' in capsys.readouterr().out
  assert report_of(tmp_path / 'data')['skipped'] == {}


def shards_of(folder):
  """Returns the files of the data and when they were written."""
  return {
    path.name: path.stat().st_mtime_ns
    for path in pathlib.Path(folder).glob('*.array_record-*')
    if path.suffix != '.partial'
  }


def test_many_shards_hold_everything_once_and_mixed(tmp_path, monkeypatch):
  source = fill(tmp_path / 'source', TRAIN_AND_VAL)
  run(source, tmp_path / 'whole')
  size = sum(path.stat().st_size for path in source.glob('train/*/*'))
  monkeypatch.setattr(image_shards, 'SHARD_BYTES', size // 4 + 1)
  run(source, tmp_path / 'data')
  names = sorted(shards_of(tmp_path / 'data/pets/1.0.0'))
  assert names == ['pets-test.array_record-00000-of-00001'] + [
    f'pets-train.array_record-{i:05d}-of-00004' for i in range(4)
  ]
  few, many = contents(tmp_path / 'whole'), contents(tmp_path / 'data')
  for split, files in few.items():
    assert files.keys() == many[split].keys()
    for name, (image, label) in files.items():
      np.testing.assert_array_equal(image, many[split][name][0])
      assert label == many[split][name][1]
  builder = prepared.find('pets', str(tmp_path / 'data'))
  part = builder.as_data_source('train[:50%]')
  # Neither by class nor by any other order of the files.
  assert len({example['label'] for example in part}) == 2
  names = [example['file_name'] for example in part]
  assert names[:6] != sorted(names[:6])
  monkeypatch.setattr(image_shards, 'MAX_SHARDS', 2)
  run(source, tmp_path / 'two')
  assert len(shards_of(tmp_path / 'two/pets/1.0.0')) == 3


def test_what_was_cut_off_is_continued(tmp_path, monkeypatch, capsys):
  monkeypatch.setattr(image_shards, 'SHARD_BYTES', 1)
  source = fill(tmp_path / 'source', TRAIN_AND_VAL)
  folder = tmp_path / 'data/incomplete.pets'
  read, count = image_files.read, 0

  def read_some(data):
    nonlocal count
    count += 1
    if count > 10:
      raise KeyboardInterrupt
    return read(data)

  monkeypatch.setattr(image_files, 'read', read_some)
  args = ['image_folder', '--source', str(source), '--name', 'pets']
  args += ['--data_dir', str(tmp_path / 'data'), '--num_workers', '1']
  assert prepare.main(args) == 130
  printed = capsys.readouterr()
  assert printed.err == 'interrupted: the same command continues\n'
  assert os.listdir(tmp_path / 'data') == ['incomplete.pets']
  kept = shards_of(folder)
  assert len(kept) == 10
  # Two of these are not what they were; another one lost its notes.
  damaged = sorted(kept)[:3]
  (folder / damaged[0]).write_bytes(b'')
  (folder / damaged[1]).unlink()
  (folder / 'notes' / f'{damaged[2]}.json').write_text('{"file_b')
  count = -100
  assert prepare.main(args) == 0
  out = capsys.readouterr().out
  assert out.startswith('pets: continuing, 7 of 28 shards are complete\n')
  assert count == -100 + 28 - 7
  final = shards_of(tmp_path / 'data/pets/1.0.0')
  assert len(final) == 28
  for name in kept:
    assert (final[name] == kept[name]) == (name not in damaged)
  found = contents(tmp_path / 'data')
  assert {split: len(files) for split, files in found.items()} == {
    'train': 23,
    'test': 5,
  }


@pytest.mark.parametrize(
  'change',
  [
    lambda source, data: fill(source, {'val/cat/new.png': encode(RGB)}),
    lambda source, data: os.utime(source / 'val/cat/00.png', (1, 1)),
    lambda source, data: (source / 'val/cat/00.png').rename(
      source / 'val/dog/cat.png'
    ),
    lambda source, data: (data / 'incomplete.pets/plan.json').write_text('{'),
  ],
)
def test_what_was_cut_off_of_another_folder_is_not_kept(
  change, tmp_path, monkeypatch, capsys
):
  monkeypatch.setattr(image_shards, 'SHARD_BYTES', 1)
  source = fill(tmp_path / 'source', TRAIN_AND_VAL)
  data = tmp_path / 'data'
  with monkeypatch.context() as patch:
    patch.setattr(image_folder, '_write_metadata', lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
      run(source, data)
  change(source, data)
  run(source, data)
  out = capsys.readouterr().out
  assert 'is of other files or options: starting anew' in out
  assert 'continuing' not in out
  found = contents(data)
  assert sum(map(len, found.values())) == len(list(source.glob('*/*/*')))


def test_two_at_once(tmp_path):
  source = fill(tmp_path / 'source', TRAIN_AND_VAL)
  (tmp_path / 'data/incomplete.pets').mkdir(parents=True)
  with image_folder._alone(tmp_path / 'data/incomplete.pets'):
    with pytest.raises(config_utils.UserError, match='another process is'):
      run(source, tmp_path / 'data')
  run(source, tmp_path / 'data')


# The command, in which something happens at the picture $AT. Workers run this
# script too, as far as its last lines.
COMMAND = """
import os, resource, signal, sys, time
from ijckd_jax.data.datasets import image_files
from ijckd_jax.data.datasets import image_shards
from ijckd_jax.commands import prepare
image_shards.SHARD_BYTES = 1
read = image_files.read

def read_or_fail(data):
  if data == open(os.environ['AT'], 'rb').read():
    match os.environ['EVENT']:
      case 'the disk is full':
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
      case 'a worker is killed':
        os.kill(os.getpid(), signal.SIGKILL)
      case 'the command is killed':
        os.kill(os.getppid(), signal.SIGKILL)
        time.sleep(1)
      case 'Ctrl-C':
        os.killpg(0, signal.SIGINT)
        time.sleep(60)
  return read(data)

image_files.read = read_or_fail
if __name__ == '__main__':
  sys.exit(prepare.main(sys.argv[1:]))
"""
CONTINUES = 'the same command continues'


@pytest.mark.slow
def test_all_that_cuts_the_command_off(tmp_path):
  """In a row: each leaves what is complete to the next, and no process."""
  source = fill(tmp_path / 'source', TRAIN_AND_VAL)
  script = tmp_path / 'command.py'
  script.write_text(COMMAND)
  (tmp_path / 'tensorflow.py').write_text('raise AssertionError')
  data, kept = tmp_path / 'data', {}

  def run_command(event):
    # It waits for all that hold its output, workers as well.
    result = subprocess.run(
      [
        *(sys.executable, str(script), 'image_folder', '--name', 'pets'),
        *('--source', str(source), '--data_dir', str(data)),
        *('--num_workers', '2'),
      ],
      env={
        **os.environ,
        'EVENT': event,
        'AT': str(source / 'train/dog/05.png'),
      },
      capture_output=True,
      text=True,
      timeout=50,
      check=False,
      start_new_session=True,
    )
    assert ('continuing' in result.stdout) == bool(kept)
    kept.update(shards_of(data / 'incomplete.pets'))
    return result.returncode, result.stderr

  code, said = run_command('the disk is full')
  assert code == 1
  assert 'File too large' in said
  assert re.fullmatch(f'error: .*{CONTINUES}\n', said)
  code, said = run_command('a worker is killed')
  assert code == 1
  assert 'a worker process ended with exit code -9' in said
  assert re.fullmatch(f'error: .*{CONTINUES}\n', said)
  assert run_command('Ctrl-C') == (130, f'interrupted: {CONTINUES}\n')
  assert run_command('the command is killed') == (-9, '')
  assert os.listdir(data) == ['incomplete.pets']
  assert 0 < len(kept) < 28
  assert run_command('') == (0, '')
  final = shards_of(data / 'pets/1.0.0')
  assert len(final) == 28
  assert final.items() >= kept.items()
  found = contents(data)
  for path in source.glob('*/*/*'):
    split = {'train': 'train', 'val': 'test'}[path.parts[-3]]
    image, label = found[split][path.relative_to(source).as_posix()]
    assert label == path.parts[-2]
    np.testing.assert_array_equal(image, pixels_of(path))
