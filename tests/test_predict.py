"""Predictions of picture files: the right pixels, and the right words."""

import dataclasses
import functools
import io
import json
import os
import sys
import threading
import zlib

import numpy as np
import onnx
import PIL.Image
import pytest

from ijckd_jax.bundles import bundles
from ijckd_jax.commands import predict
from ijckd_jax.data import images
from ijckd_jax.data.datasets import digits
from ijckd_jax.data.datasets import image_files
from ijckd_jax.deploy import deployed as deployed_lib
from ijckd_jax.deploy import onnx_files
from ijckd_jax.deploy import pictures
from ijckd_jax.deploy import sessions


@pytest.fixture
def command(run_command):
  return functools.partial(run_command, predict.main)


@pytest.fixture
def refused(command):
  """Returns a function that runs the command in vain: its one line."""

  def run(*argv):
    code, out, err = command(*argv)
    assert (code, out) == (2, '')
    assert err.startswith('error: ') and err.count('\n') == 1, err
    return err

  return run


@pytest.fixture(scope='module')
def folder(tmp_path_factory, data_dir):
  """Thirty digits as pictures, beside a file that is none."""
  folder = tmp_path_factory.mktemp('pictures')
  test = digits.Dataset(data_dir=data_dir).load('test')
  (folder / 'below').mkdir()
  (folder / 'notes.txt').write_text('no picture')
  for i in range(30):
    where = folder / ('below' if i % 2 else '') / f'{i:02}.png'
    PIL.Image.fromarray(test.images[i, :, :, 0]).save(where)
  return folder


@pytest.fixture(scope='module')
def model(finished_run, tmp_path_factory):
  """The student of a run as an ONNX file."""
  path = tmp_path_factory.mktemp('model') / 'student.onnx'
  bundle = bundles.load(finished_run[0])
  path.write_bytes(onnx_files.encode(deployed_lib.deploy(bundle)))
  return path


def test_of_a_folder(command, finished_run, folder, model, data_dir):
  """By a run and by its ONNX file: the classes that evaluation finds."""
  bundle = bundles.load(finished_run[0])
  test = digits.Dataset(data_dir=data_dir).load('test')
  session = sessions.load(str(finished_run[0]))
  _, wanted = session(test.images[:30])
  assert np.unique(wanted.argmax(1)).size > 1
  for path in (finished_run[0], model):
    code, out, err = command('--bundle', path, folder, '--json', '--top', 10)
    assert code == 0, err
    found = json.loads(out)
    assert [x['picture'] for x in found] == sorted(
      str(x) for x in folder.rglob('*.png')
    )
    for x in found:
      row = wanted[int(x['picture'][-6:-4])]
      order = [c['class'] for c in x['classes']]
      assert sorted(order) == list(range(10))
      shown = [c['probability'] for c in x['classes']]
      assert shown == sorted(shown, reverse=True)
      np.testing.assert_allclose(shown, row[order], atol=1e-5)
      assert [c['name'] for c in x['classes']] == [
        bundle.class_names[c] for c in order
      ]


def test_table(command, folder, model):
  """A line for each picture, likeliest first; a picture that is named twice."""
  code, out, _ = command(
    '--bundle', model, '--top', 2, folder / '00.png', folder / '*0.png'
  )
  assert code == 0
  lines = out.splitlines()
  assert [line.split()[0][-6:] for line in lines] == [
    '00.png',
    '10.png',
    '20.png',
  ]
  assert all(line.count('%') == 2 for line in lines)
  assert len({line.index('%') for line in lines}) == 1


def test_batches_do_not_matter(command, folder, model):
  _, wanted, _ = command('--bundle', model, folder)
  _, found, _ = command('--bundle', model, folder, '--batch_size', 7)
  assert found == wanted


def test_view_is_that_of_evaluation(tmp_path):
  """Of larger photos: the pixels that the data set's test view has."""
  random = np.random.RandomState(0)
  pixels = random.randint(0, 256, (90, 120, 3)).astype(np.uint8)
  path = tmp_path / 'photo.png'
  PIL.Image.fromarray(pixels).save(path)
  view = images.Views(size=48, resize=56)
  np.testing.assert_array_equal(
    pictures.read(path, (48, 48, 3), images.CentreCrop(56))[0],
    view.evaluation(path.read_bytes()),
  )
  whole, _ = pictures.read(path, (45, 60, 3), images.CentreCrop(45))
  np.testing.assert_array_equal(
    whole,
    np.asarray(
      PIL.Image.fromarray(pixels).resize(
        (60, 45), PIL.Image.Resampling.BILINEAR
      )
    ),
  )
  grey, _ = pictures.read(path, (45, 60, 1), images.CentreCrop(45))
  assert grey.shape == (45, 60, 1)


CROP = images.CentreCrop(11, 'bicubic')


@pytest.fixture(scope='module')
def cropped(finished_run, tmp_path_factory):
  """A bundle that says how pictures are cropped, and its ONNX file."""
  folder = tmp_path_factory.mktemp('cropped')
  bundle = dataclasses.replace(bundles.load(finished_run[0]), crop=CROP)
  bundle.save(folder / 'bundle')
  data = onnx_files.encode(deployed_lib.deploy(bundle))
  (folder / 'model.onnx').write_bytes(data)
  return folder / 'bundle', folder / 'model.onnx'


def test_pictures_are_cropped_as_the_bundle_says(command, cropped, tmp_path):
  """Also by its exported file, and also those of the network's own size."""
  random = np.random.RandomState(0)
  shapes = ((8, 8), (37, 52), (50, 9), (11, 11))
  pixels = [random.randint(0, 256, x).astype(np.uint8) for x in shapes]
  for number, picture in enumerate(pixels):
    PIL.Image.fromarray(picture).save(tmp_path / f'{number}.png')
  views = [CROP(PIL.Image.fromarray(x), (8, 8)) for x in pixels]
  views = np.stack([np.asarray(view) for view in views])[..., None]
  _, wanted = sessions.load(str(cropped[0]))(views)
  _, others = sessions.load(str(cropped[0]))(views[:, ::-1])
  assert np.abs(wanted - others).max() > 1e-3  # Pixels matter.
  for path in cropped:
    code, out, err = command('--bundle', path, tmp_path, '--json', '--top', 10)
    assert code == 0, err
    for x, row in zip(json.loads(out), wanted, strict=True):
      shown = {c['class']: c['probability'] for c in x['classes']}
      np.testing.assert_allclose([shown[c] for c in range(10)], row, atol=1e-5)


def changed_metadata(path, folder, **changes):
  """Returns an ONNX file with other metadata; None takes one away."""
  model = onnx.load(path)
  for x in list(model.metadata_props):
    if x.key in changes:
      model.metadata_props.remove(x)
  kept = {key: x for key, x in changes.items() if x is not None}
  for key, text in kept.items():
    model.metadata_props.add(key=key, value=text)
  onnx.save(model, folder / 'changed.onnx')
  return folder / 'changed.onnx'


@pytest.mark.parametrize(
  'info, resize',
  [
    ({'dataset': {'name': 'mine', 'resize': 12}}, 12),
    ({'dataset': {'name': 'mine'}}, 8),
    ({'dataset': {'resize': 'much'}}, 8),
    ({}, 8),
  ],
)
def test_files_that_say_nothing_of_crops(model, tmp_path, info, resize):
  """Their data set says it; what has the images' size may be one of its."""
  path = changed_metadata(model, tmp_path, crop=None, info=json.dumps(info))
  wanted = images.CentreCrop(resize, 'bilinear', keeps_size=True)
  assert sessions.crop_of(sessions.load(str(path))) == wanted


@pytest.mark.parametrize(
  'crop',
  [
    '{}',
    'no JSON',
    '{"resize": 4, "interpolation": "bicubic", "keeps_size": false}',
    '{"resize": 9, "interpolation": "random", "keeps_size": false}',
  ],
)
def test_a_crop_that_is_damaged(refused, folder, model, tmp_path, crop):
  path = changed_metadata(model, tmp_path, crop=crop)
  assert "how the classifier's pictures are cropped" in refused(
    '--bundle', path, folder
  )


def test_turned_pictures_are_upright(tmp_path):
  """As image_folder stores them: EXIF's orientation is followed."""
  pixels = np.zeros((8, 8, 3), np.uint8)
  pixels[:4] = 255
  turned = PIL.Image.fromarray(pixels).rotate(90)
  exif = PIL.Image.Exif()
  exif[0x0112] = 6  # To be turned by 90 degrees to the right.
  turned.save(tmp_path / 'a.jpg', exif=exif, quality=100)
  found, _ = pictures.read(tmp_path / 'a.jpg', (8, 8, 3), images.CentreCrop(8))
  assert found[:4].min() > 250 and found[4:].max() < 5


def test_mistakes(refused, folder, model, tmp_path):
  assert 'there is no such file' in refused(
    '--bundle', model, folder, tmp_path / 'no.png'
  )
  (tmp_path / 'empty').mkdir()
  assert 'names no pictures' in refused('--bundle', model, tmp_path / 'empty')
  assert 'names no pictures' in refused('--bundle', model, tmp_path / '*.gif')
  assert '--top' in refused('--bundle', model, folder, '--top', 0)
  assert 'there is no bundle' in refused('--bundle', tmp_path, folder)


def test_what_is_searched(folder, tmp_path):
  """Folders and globs hold what `prepare` takes; a name is a wish."""
  data = (folder / '00.png').read_bytes()
  (tmp_path / 'linked').mkdir()
  (tmp_path / 'linked/a.png').write_bytes(data)
  source = tmp_path / 'source'
  for name in ('b.PNG', '._b.png', '.hid/a.png', '__MACOSX/b.png', 'c.dat'):
    (source / name).parent.mkdir(parents=True, exist_ok=True)
    (source / name).write_bytes(data)
  (source / 'link').symlink_to(tmp_path / 'linked')
  (source / 'link/round').symlink_to('.')
  (source / 'gone.png').symlink_to('nowhere')
  os.mkfifo(source / 'fifo.png')
  taken = [source / 'b.PNG', source / 'link/a.png']
  assert pictures.find([str(source)]) == taken
  assert pictures.find([f'{source}/*']) == taken
  assert pictures.find([f'{source}/**/b.*']) == taken[:1]
  named = [
    str(source / name)
    for name in ('._b.png', '.hid/a.png', 'c.dat', 'gone.png', 'fifo.png')
  ]
  assert pictures.find(named) == [*map(type(source), named)]
  (tmp_path / 'a[1].png').write_bytes(data)
  assert pictures.find([f'{tmp_path}/a[1].png']) == [tmp_path / 'a[1].png']
  hidden = source / '.hid'
  assert pictures.find([str(hidden)]) == [hidden / 'a.png']


@pytest.fixture
def mixed(folder, tmp_path):
  """Pictures between files that cannot be read, and the reasons."""
  data = (folder / '00.png').read_bytes()
  good = [tmp_path / name for name in ('0.png', '3.png', '9.png')]
  for path in good:
    path.write_bytes(data)
  (tmp_path / '1.png').write_bytes(data[:60])
  (tmp_path / '2.png').write_bytes(b'')
  (tmp_path / '4.png').symlink_to('nowhere')
  os.mkfifo(tmp_path / '5.png')
  with (tmp_path / '6.png').open('wb') as file:
    file.truncate(2**31)  # Takes no room.
  huge = bytearray(data)
  huge[16:24] = (30000).to_bytes(4) * 2  # Width and height.
  huge[29:33] = zlib.crc32(huge[12:29]).to_bytes(4)
  (tmp_path / '7.png').write_bytes(huge)
  (tmp_path / '8.png').mkdir()
  reasons = {
    '1.png': 'Truncated',
    '2.png': 'an empty file',
    '4.png': 'No such file or directory',
    '5.png': 'not a regular file',
    '6.png': 'a file of 2,147,483,648 bytes',
    '7.png': 'Image size (900000000 pixels) exceeds limit',
  }
  # Without a writer, whoever opens a FIFO waits.
  write = threading.Thread(target=(tmp_path / '5.png').write_bytes, args=(b'',))
  write.daemon = True
  write.start()
  paths = [tmp_path / f'{i}.png' for i in range(10) if i != 8]
  return paths, good, {str(tmp_path / name): x for name, x in reasons.items()}


@pytest.mark.parametrize('batch_size', [1, 4, 64])
def test_what_cannot_be_read_hides_no_other(command, model, mixed, batch_size):
  paths, good, reasons = mixed
  flags = '--bundle', model, '--batch_size', batch_size
  code, wanted, err = command(*flags, *good)
  assert (code, err) == (0, '') and len(wanted.splitlines()) == 3
  code, out, err = command(*flags, *paths)
  assert (code, out) == (1, wanted)
  *lines, last = err.splitlines()
  assert last == '6 of 9 pictures cannot be read'
  for line, (path, reason) in zip(lines, reasons.items(), strict=True):
    assert line.startswith(f'error: {path}: {reason}')
  code, out, err = command(*flags, *paths, '--json')
  assert (code, err) == (1, f'{last}\n')
  found = json.loads(out)
  assert [x['picture'] for x in found] == [*map(str, paths)]
  for x in found:
    assert x.get('error', '').startswith(reasons.get(x['picture'], ''))
    assert ('error' in x, 'classes' in x) in ((True, False), (False, True))
    assert ('error' in x) == (x['picture'] in reasons)


def test_lines_come_as_batches_are_done(command, folder, model, monkeypatch):
  """What is interrupted in its third batch has printed the first two."""
  read, count = image_files.decode, 0

  def read_some(data):
    nonlocal count
    count += 1
    if count > 2 * 7:
      raise KeyboardInterrupt
    return read(data)

  monkeypatch.setattr(image_files, 'decode', read_some)
  code, out, err = command('--bundle', model, '--batch_size', 7, folder)
  assert (code, err) == (130, 'interrupted\n')
  assert len(out.splitlines()) == 2 * 7


STRANGE = {
  b'caf\xe9.png': 'caf\\udce9.png',
  b'a\x1b[31mb\nc.png': 'a\\x1b[31mb\\nc.png',
  b'tab\tcr\rbell\x07.png': 'tab\\tcr\\rbell\\x07.png',
  b'\xe2\x80\xaegnp.exe.png': '\\u202egnp.exe.png',
  b'\xc3\xa9\xe6\x97\xa5 .png': 'é日 .png',
}


def test_strange_names(command, folder, model, tmp_path, monkeypatch):
  """A line each, without a byte that moves the cursor; in JSON, unchanged."""
  for name in STRANGE:
    path = os.path.join(os.fsencode(tmp_path), name)
    with open(path, 'wb') as file:
      file.write((folder / '00.png').read_bytes())
  code, out, err = command('--bundle', model, tmp_path, '--top', 1)
  assert (code, err) == (0, '')
  shown = [
    line[len(f'{tmp_path}/') :].partition('   ')[0] for line in out.splitlines()
  ]
  assert sorted(shown) == sorted(STRANGE.values())
  code, out, _ = command('--bundle', model, tmp_path, '--json')
  found = {os.fsencode(x['picture']) for x in json.loads(out)}
  assert found == {os.fsencode(tmp_path) + b'/' + name for name in STRANGE}
  assert code == 0 and out.isascii()
  # A terminal of few letters, as under LC_ALL=en_US.ISO-8859-1.
  latin = io.TextIOWrapper(io.BytesIO(), 'latin1')
  monkeypatch.setattr(sys, 'stdout', latin)
  assert predict.main(['--bundle', str(model), str(tmp_path)]) == 0
  latin.flush()
  assert b'/\xe9\\u65e5 .png' in latin.buffer.getvalue()


def test_values_of_twelve_bits(command, model, tmp_path):
  """Darker than they are meant to be, but not changed: that is said."""
  values = np.linspace(0, 4095, 64).astype(np.uint16).reshape(8, 8)
  PIL.Image.fromarray(values).save(tmp_path / 'deep.png')
  PIL.Image.fromarray((values >> 8).astype(np.uint8)).save(tmp_path / 'b.png')
  code, out, err = command('--bundle', model, tmp_path, '--json')
  assert code == 0
  assert err == (
    f'warning: {tmp_path}/deep.png: no value above 4095 of 65535, which makes '
    'it dark: 15 of 255\n'
  )
  one, other = (x['classes'] for x in json.loads(out))
  assert one == other


@pytest.mark.parametrize('size', [(1, 20000), (20000, 1), (3, 30000)])
def test_long_pictures(size, tmp_path):
  """Nothing but the middle is seen; each side of it has a colour."""
  pixels = np.zeros((size[1], size[0], 3), np.uint8)
  middle = pixels.reshape(-1, 3)
  middle[: len(middle) // 2] = 10
  middle[len(middle) // 2 :] = 200
  PIL.Image.fromarray(pixels).save(tmp_path / 'long.png')
  found, _ = pictures.read(
    tmp_path / 'long.png', (224, 224, 3), images.CentreCrop(256)
  )
  if size[1] == 1:
    found = found.transpose(1, 0, 2)
  # Linear between the centres of the two pixels in the middle.
  place = (np.arange(-112, 112) + 0.5) * min(size) / 256
  wanted = np.clip(105 + 190 * place, 10, 200)
  for column in (0, 111, 223):
    np.testing.assert_allclose(found[:, column, 0], wanted, atol=1)


def test_names_that_do_not_fit(refused, folder, model, tmp_path):
  """As many as there are classes, or none of it is believed."""
  changed = onnx.load(model)
  for names, words in (
    (['one', 'two'], 'tells 10 classes apart, but names 2'),
    (None, 'does not say what its classes are called'),
  ):
    for x in changed.metadata_props:
      if x.key == 'class_names':
        x.value = json.dumps(names)
    path = tmp_path / 'changed.onnx'
    onnx.save(changed, path)
    assert words in refused('--bundle', path, folder)
