"""The page in a browser: what it says of pictures is what JAX says.

Run where Chromium and npm are installed; the gate installs them.
"""

import contextlib
import dataclasses
import functools
import http.server
import json
import pathlib
import shutil
import sys
import threading

import numpy as np
import PIL.Image
import pytest

from experiments.benchmarks import classifiers
from ijckd_jax.commands import export
from ijckd_jax.data import images
from ijckd_jax.data.datasets import digits
from ijckd_jax.data.datasets import imagenet
from ijckd_jax.deploy import pictures
from ijckd_jax.deploy import sessions
from ijckd_jax.deploy import web
from ijckd_jax.runtime import config_utils
from tests import photographs

CHROMIUM = shutil.which('chromium')
pytestmark = pytest.mark.skipif(
  not (CHROMIUM and shutil.which('npm')), reason='needs Chromium and npm'
)
# Against a network that is closed to it, Chromium's own errands take minutes.
FLAGS = (
  *('--no-sandbox', '--disable-gpu', '--disable-quic', '--no-first-run'),
  *('--disable-background-networking', '--disable-component-update'),
  '--disable-sync',
)
COUNT = 100


class Quiet(http.server.SimpleHTTPRequestHandler):
  def log_message(self, *args):
    del args


@contextlib.contextmanager
def served(folder):
  """Serves a folder on this machine, at the address that it gives."""
  handler = functools.partial(Quiet, directory=str(folder))
  with http.server.ThreadingHTTPServer(('127.0.0.1', 0), handler) as server:
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
      yield f'http://127.0.0.1:{server.server_address[1]}/'
    finally:
      server.shutdown()
      thread.join()


@contextlib.contextmanager
def opened(folder):
  """Opens a page that asks nobody but its own server for anything."""
  from playwright import sync_api

  with served(folder) as address, sync_api.sync_playwright() as playwright:
    browser = playwright.chromium.launch(
      executable_path=CHROMIUM, args=list(FLAGS)
    )
    page = browser.new_page()
    asked, errors = [], []
    page.on('request', lambda request: asked.append(request.url))
    page.on('pageerror', lambda error: errors.append(str(error)))
    page.goto(address)
    page.wait_for_function(
      """document.body.dataset.ready
        || document.getElementById('problem').textContent""",
      timeout=60_000,
    )
    assert page.inner_text('#problem') == ''
    yield page
    assert not errors
    own = (address, 'blob:', 'data:')
    assert all(url.startswith(own) for url in asked), asked
    browser.close()


def run(monkeypatch, capsys, *argv):
  """Runs the command: its exit code and its words."""
  monkeypatch.setattr(sys, 'argv', ['export', *map(str, argv)])
  with pytest.raises(SystemExit) as stopped:
    config_utils.run_command(export.main)
  return stopped.value.code, capsys.readouterr()


@pytest.fixture(scope='module')
def pages(finished_run, data_dir, tmp_path_factory):
  """Returns a function that exports the run's pair once for each input."""
  made = {}

  def make(form):
    if form not in made:
      made[form] = tmp_path_factory.mktemp('pages') / 'page'
      argv = ['--bundle', finished_run[0], '--data_dir', data_dir]
      argv += ['--teacher', finished_run[0] / 'teacher', '--input', form]
      argv += ['--format', 'web', '--output', made[form]]
      export.main([str(x) for x in argv])
    return made[form]

  return make


@pytest.fixture
def exported(pages, tmp_path):
  """Returns a function that gives such a page, to do with as one likes."""

  def make(form='uint8'):
    return pathlib.Path(shutil.copytree(pages(form), tmp_path / 'page'))

  return make


def drop(page, paths):
  """Gives files to a page, and waits until it has shown them all."""
  before = int(page.evaluate('document.body.dataset.done || 0'))
  page.set_input_files('input[type=file]', [str(path) for path in paths])
  page.wait_for_function(
    f'Number(document.body.dataset.done) === {before + len(paths)}',
    timeout=120_000,
  )


def shown(page, role):
  """Returns what a page says of each picture: (class, probability) each."""
  return page.evaluate(
    """(role) => Object.fromEntries(
      [...document.querySelectorAll('.picture')].map((picture) => [
        picture.dataset.name,
        [...picture.querySelectorAll(`.${role} .bar`)].map((bar) => [
          Number(bar.dataset.class), Number(bar.dataset.probability)])]))""",
    role,
  )


@pytest.mark.parametrize('form', ('uint8', 'float32'))
def test_predictions_are_those_of_jax(exported, finished_run, data_dir, form):
  """Of a hundred test images, by student and teacher."""
  folder = exported(form)
  images = digits.Dataset(data_dir=data_dir).load('test').images[:COUNT]
  paths = [folder.parent / f'{i}.png' for i in range(COUNT)]
  for path, image in zip(paths, images, strict=True):
    PIL.Image.fromarray(image[:, :, 0]).save(path)
  bundles = {'student': finished_run[0], 'teacher': finished_run[0] / 'teacher'}
  with opened(folder) as page:
    drop(page, paths)
    for role, bundle in bundles.items():
      _, wanted = sessions.load(str(bundle))(images)
      found = shown(page, role)
      assert len(found) == COUNT
      classes = np.array([found[path.name][0][0] for path in paths])
      np.testing.assert_array_equal(classes, wanted.argmax(1))
      assert np.unique(classes).size > 1
      for path, row in zip(paths, wanted, strict=True):
        for index, probability in found[path.name]:
          assert abs(probability - row[index]) < 1e-4
    said = page.inner_text('.picture .said')
    assert said.endswith(' ms')


CROPS = (
  ((8, 8, 1), images.CentreCrop(8)),
  ((12, 12, 3), images.CentreCrop(14)),
  ((12, 12, 3), images.CentreCrop(14, keeps_size=True)),
  ((12, 12, 3), images.CentreCrop(14, 'bicubic')),
  ((10, 12, 3), images.CentreCrop(11, 'bicubic')),
)


def test_pictures_of_any_size(exported, finished_run):
  """Resized and cut as predict does it, to within a grey level."""
  folder = exported()
  random, paths = np.random.RandomState(0), []
  for i, shape in enumerate(
    ((37, 52, 3), (90, 40, 3), (5, 6, 3), (33, 33, 4), (12, 12, 3))
  ):
    pixels = random.randint(0, 256, shape).astype(np.uint8)
    paths.append(folder.parent / f'{i}.png')
    PIL.Image.fromarray(pixels).save(paths[-1])
  levels = """async ([name, shape, crop]) => {
    const {prepare} = await import('./pixels.js');
    const file = await (await fetch(name)).blob();
    const bitmap = await createImageBitmap(file);
    const canvas = new OffscreenCanvas(bitmap.width, bitmap.height);
    const context = canvas.getContext('2d');
    context.fillStyle = 'white';
    context.fillRect(0, 0, bitmap.width, bitmap.height);
    context.drawImage(bitmap, 0, 0);
    const {data} = context.getImageData(0, 0, bitmap.width, bitmap.height);
    return [...prepare(data, bitmap.width, bitmap.height, shape, crop)];
  }"""
  session = sessions.load(str(finished_run[0]))
  with opened(folder) as page:
    for path in paths:
      shutil.copy(path, folder / path.name)
      for shape, crop in CROPS:
        wanted, _ = pictures.read(path, shape, crop)
        arguments = [path.name, shape, dataclasses.asdict(crop)]
        found = page.evaluate(levels, arguments)
        found = np.array(found).reshape(shape)
        assert np.abs(found - wanted.astype(int)).max() <= 1
    drop(page, paths)
    found = shown(page, 'student')
    for path in paths:
      image, _ = pictures.read(
        path, session.image_shape, sessions.crop_of(session)
      )
      _, wanted = session(image[None])
      assert found[path.name][0][0] == wanted.argmax()


def test_a_teacher_of_other_images_and_classes(
  finished_run, tmp_path, monkeypatch, capsys
):
  """Beside the student, checked on pictures: both say what predict says."""
  teacher = dataclasses.replace(
    classifiers.alone('resnet8', (32, 32, 3), num_classes=1000),
    crop=images.CentreCrop(37, 'bicubic'),
    class_names=imagenet.class_words(),
  )
  teacher.save(tmp_path / 'teacher')
  (tmp_path / 'pictures').mkdir()
  paths = photographs.write(tmp_path / 'pictures')
  paths = [path for path in paths if path.suffix == '.png']
  argv = ['--bundle', finished_run[0], '--teacher', tmp_path / 'teacher']
  argv += ['--format', 'web', '--output', tmp_path / 'page']
  code, printed = run(monkeypatch, capsys, *argv, '--pictures', *paths)
  assert (code, printed.err) == (0, '')
  with opened(tmp_path / 'page') as page:
    drop(page, paths)
    for role, bundle in (
      ('student', finished_run[0]),
      ('teacher', tmp_path / 'teacher'),
    ):
      session, found = sessions.load(str(bundle)), shown(page, role)
      for path in paths:
        crop = sessions.crop_of(session)
        image, _ = pictures.read(path, session.image_shape, crop)
        _, (wanted,) = session(image[None])
        for index, probability in found[path.name]:
          assert probability == pytest.approx(wanted[index], abs=0.005)
        assert found[path.name][0][0] == wanted.argmax()


def test_what_is_no_picture_is_said(exported):
  folder = exported()
  bad, good = folder.parent / 'bad.png', folder.parent / 'good.png'
  bad.write_bytes(b'no picture')
  PIL.Image.fromarray(np.zeros((8, 8), np.uint8)).save(good)
  with opened(folder) as page:
    drop(page, [bad])
    assert 'bad.png cannot be shown' in page.inner_text('#problem')
    drop(page, [good])
    assert page.inner_text('#problem') == ''
    assert list(shown(page, 'student')) == ['good.png']


def test_fits_a_phone(exported):
  """Nothing stands out of the screen's side."""
  folder = exported()
  picture = folder.parent / ('a_long_name_' * 9 + '.png')
  PIL.Image.fromarray(np.zeros((8, 8), np.uint8)).save(picture)
  with opened(folder) as page:
    for width in (360, 1280):
      page.set_viewport_size({'width': width, 'height': 800})
      drop(page, [picture])
      assert page.evaluate('document.documentElement.scrollWidth') <= width


def test_the_folder_is_a_page_or_left_alone(
  exported, finished_run, data_dir, tmp_path, monkeypatch, capsys
):
  folder = exported()
  content = json.loads((folder / 'export.json').read_text())
  assert set(content) == {'student', 'teacher'}
  assert content['teacher']['check']['agreement'] == 1
  argv = ('--bundle', finished_run[0], '--data_dir', data_dir)
  argv += ('--format', 'web', '--output', folder)
  code, printed = run(monkeypatch, capsys, *argv)
  assert code == 2 and 'give --overwrite' in printed.err
  assert run(monkeypatch, capsys, *argv, '--overwrite')[0] == 0
  assert not (folder / 'teacher.onnx').exists()
  (folder / 'thesis.txt').write_text('ten years of work')
  code, printed = run(monkeypatch, capsys, *argv, '--overwrite')
  assert code == 2 and 'is no page of this command alone' in printed.err
  assert (folder / 'thesis.txt').exists()
  assert {path.name for path in tmp_path.iterdir()} == {'page'}


def test_another_runtime_is_refused(tmp_path, monkeypatch):
  monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))
  archive = tmp_path / 'ijckd_jax' / web.ARCHIVE
  archive.parent.mkdir()
  archive.write_bytes(b'something else')
  with pytest.raises(config_utils.UserError, match='is not onnxruntime-web'):
    web.runtime()


def test_without_npm(tmp_path, monkeypatch):
  monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))
  monkeypatch.setenv('PATH', '')
  with pytest.raises(config_utils.UserError, match='needs npm') as caught:
    web.runtime()
  assert 'npm pack onnxruntime-web@1.30.0' in str(caught.value)
