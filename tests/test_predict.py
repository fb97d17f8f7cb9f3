"""Predictions of picture files: the right pixels, and the right words."""

import json
import sys

import numpy as np
import onnx
import PIL.Image
import pytest

from ijckd_jax import bundles
from ijckd_jax import config_utils
from ijckd_jax import images
from ijckd_jax import predict
from ijckd_jax.datasets import digits
from ijckd_jax.deploy import deployed as deployed_lib
from ijckd_jax.deploy import onnx_files
from ijckd_jax.deploy import pictures
from ijckd_jax.deploy import sessions


@pytest.fixture
def command(monkeypatch, capsys):
  """Returns a function that runs the command: its exit code and its words."""

  def run(*argv):
    monkeypatch.setattr(sys, 'argv', ['predict', *map(str, argv)])
    with pytest.raises(SystemExit) as stopped:
      config_utils.run_command(predict.main)
    printed = capsys.readouterr()
    return stopped.value.code, printed.out, printed.err

  return run


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
    pictures.read(path, (48, 48, 3), 56), view.evaluation(path.read_bytes())
  )
  whole = pictures.read(path, (45, 60, 3), None)
  np.testing.assert_array_equal(
    whole,
    np.asarray(
      PIL.Image.fromarray(pixels).resize(
        (60, 45), PIL.Image.Resampling.BILINEAR
      )
    ),
  )
  grey = pictures.read(path, (45, 60, 1), None)
  assert grey.shape == (45, 60, 1)


def test_turned_pictures_are_upright(tmp_path):
  """As image_folder stores them: EXIF's orientation is followed."""
  pixels = np.zeros((8, 8, 3), np.uint8)
  pixels[:4] = 255
  turned = PIL.Image.fromarray(pixels).rotate(90)
  exif = PIL.Image.Exif()
  exif[0x0112] = 6  # To be turned by 90 degrees to the right.
  turned.save(tmp_path / 'a.jpg', exif=exif, quality=100)
  found = pictures.read(tmp_path / 'a.jpg', (8, 8, 3), None)
  assert found[:4].min() > 250 and found[4:].max() < 5


def test_mistakes(refused, folder, model, tmp_path):
  assert 'cannot be read' in refused('--bundle', model, tmp_path / 'no.png')
  assert 'not a picture in a known format' in refused(
    '--bundle', model, folder / 'notes.txt'
  )
  (tmp_path / 'empty').mkdir()
  assert 'names no pictures' in refused('--bundle', model, tmp_path / 'empty')
  assert 'names no pictures' in refused('--bundle', model, tmp_path / '*.gif')
  half = tmp_path / 'half.png'
  half.write_bytes((folder / '00.png').read_bytes()[:60])
  assert 'half.png cannot be read' in refused('--bundle', model, half)
  assert '--top' in refused('--bundle', model, folder, '--top', 0)
  assert 'there is no bundle' in refused('--bundle', tmp_path, folder)


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
