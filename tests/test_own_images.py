"""Your own images: from a folder to a report, unlabelled ones mixed in."""

import argparse
import json
import types

import jax.numpy as jnp
import numpy as np
import PIL.Image
import pytest

from ijckd_jax.bundles import bundles
from ijckd_jax.commands import bundle_flags
from ijckd_jax.commands import evaluate
from ijckd_jax.commands import prepare
from ijckd_jax.data import augment
from ijckd_jax.data import datasets
from ijckd_jax.data import images
from ijckd_jax.data.datasets import own_images
from ijckd_jax.distillation import teachers
from ijckd_jax.models import outputs
from ijckd_jax.runtime import config_utils
from ijckd_jax.training import experiment
from ijckd_jax.training import train
from tests import test_configs

CLASSES = ('ant', 'bee')


def paint(path, seed):
  """Writes a picture of noise, JPEG or PNG."""
  path.parent.mkdir(parents=True, exist_ok=True)
  random = np.random.RandomState(seed)
  pixels = random.randint(0, 256, (40 + seed % 7, 44, 3), np.uint8)
  PIL.Image.fromarray(pixels).save(path)


@pytest.fixture(scope='module')
def data_dir(tmp_path_factory):
  """Two prepared folders: 'insects' with classes, 'heap' without."""
  source, data_dir = (tmp_path_factory.mktemp(x) for x in ('source', 'data'))
  for number in range(24):
    split = 'val' if number < 8 else 'train'
    kind = ('jpg', 'png')[number // 2 % 2]
    paint(source / f'in/{split}/{CLASSES[number % 2]}/{number}.{kind}', number)
  for number in range(6):
    paint(source / f'heap/{number}.jpg', 100 + number)
  for folder, name in (('in', 'insects'), ('heap', 'heap')):
    prepare.main(
      ['image_folder', '--source', str(source / folder), '--name', name]
      + ['--data_dir', str(data_dir), '--num_workers', '1']
    )
  return str(data_dir)


@pytest.fixture(scope='module')
def with_validation(tmp_path_factory):
  """A prepared folder, 'sorted', of which three splits were given."""
  source, data_dir = (tmp_path_factory.mktemp(x) for x in ('three', 'data'))
  sizes = {'train': 6, 'val': 4, 'test': 2}
  for place, (split, size) in enumerate(sizes.items()):
    for number in range(size):
      path = source / split / CLASSES[number % 2] / f'{number}.png'
      paint(path, 50 * place + number)
  prepare.main(
    ['image_folder', '--source', str(source), '--name', 'sorted']
    + ['--data_dir', str(data_dir), '--num_workers', '1']
  )
  return str(data_dir)


def test_validation_images_of_its_own_are_taken(with_validation):
  data = dataset(with_validation, folder='sorted')
  assert [len(data.load(split)) for split in datasets.SPLITS] == [6, 4, 2]
  assert data.load('validation').name_of(0).startswith('val')
  with pytest.raises(config_utils.UserError, match='of its own'):
    dataset(with_validation, folder='sorted', validation_fraction=0.5).load(
      'train'
    )


def dataset(data_dir, **fields):
  fields = {'folder': 'insects', 'size': 32, 'resize': 36, **fields}
  return own_images.Dataset(data_dir=data_dir, **fields)


def test_a_folder_is_a_data_set(data_dir):
  data = dataset(data_dir)
  assert data.class_names == CLASSES
  assert [len(data.load(split)) for split in datasets.SPLITS] == [16, 0, 8]
  for split in ('train', 'test'):
    arrays = data.load(split)
    labels = arrays.take(np.arange(len(arrays))).labels
    for index, label in enumerate(labels):
      assert CLASSES[label] in arrays.name_of(index)


def test_unlabelled_images_come_last_and_are_not_held_out(data_dir):
  data = dataset(data_dir, unlabelled='heap', validation_fraction=0.25)
  arrays, held = data.load('train'), data.load('validation')
  assert (len(arrays), len(held)) == (12 + 6, 4)
  batch = arrays.train_views(np.arange(18), np.zeros(18, int), seed=0)
  assert (batch['label'][:12] >= 0).all()
  assert (batch['label'][12:] == -1).all()
  assert (held.take(np.arange(4)).labels >= 0).all()
  assert len(data.load('test')) == 8


def test_a_folder_without_classes_is_for_training_alone(data_dir):
  data = dataset(data_dir, folder='heap')
  assert data.class_names == ()
  sizes = [len(data.load(split)) for split in datasets.SPLITS]
  assert sizes == [6, 0, 0]


def fields_of(crop=None, made_on=None, **given):
  """Returns the fields of a data set for a bundle that takes 64 pixels."""
  info = {'dataset': made_on} if made_on else {}
  bundle = types.SimpleNamespace(image_shape=(64, 64, 3), crop=crop, info=info)
  flags = {'dataset': None, 'dataset_fields': None, 'data_dir': None, **given}
  return bundle_flags.dataset_fields(bundle, argparse.Namespace(**flags))


def test_pictures_become_as_large_as_a_bundle_takes_them():
  given = {'dataset': 'image_folder', 'dataset_fields': 'folder=insects'}
  crop = images.CentreCrop(80, 'bicubic', keeps_size=False)
  found = fields_of(crop, **given)
  assert (found.size, found.resize) == (64, 80)
  given['dataset_fields'] = 'folder=insects,size=32,resize=36'
  found = fields_of(crop, **given)
  assert (found.size, found.resize) == (32, 36)


def test_a_bundle_is_judged_on_labelled_images_alone():
  """What it learned from without classes is no second copy of a split."""
  made_on = {'name': 'image_folder', 'folder': 'insects', 'unlabelled': 'heap'}
  found = fields_of(made_on={**made_on, 'size': 32, 'resize': 36})
  assert (found.folder, found.unlabelled, found.size) == ('insects', '', 32)
  found = fields_of(made_on=made_on, dataset_fields='folder=heap')
  assert (found.folder, found.unlabelled) == ('heap', '')


class ClassToken:
  """Signed features of all patches, which no map is pooled to."""

  def __call__(self, variables, images):
    patches = images.reshape(len(images), 4, 8, 4, 8, 3).mean((2, 4))
    pooled = jnp.tanh(patches.reshape(len(images), -1) @ variables)
    return outputs.Outputs((patches,), patches, pooled, None)


def test_features_of_a_class_token_are_learned_from_a_folder(
  data_dir, tmp_path
):
  config = config_utils.load(
    f'{test_configs.IMAGE_FOLDER}:folder=heap,size=32,student=resnet8'
  )
  config_utils.override(
    config,
    {
      'dataset.data_dir': data_dir,
      'batch_size': 6,
      'total_epochs': 30.0,
      'log_epochs': 10.0,
      'method.connector': 'mlp',
      'method.feature_site': 'pooled',
      'method.cross_entropy_weight': 0.0,
      'method.logit_weight': 0.0,
      'optimizer.learning_rate': 0.01,
    },
  )
  random = np.random.RandomState(0)
  teacher = teachers.Teacher(
    apply=ClassToken(),
    variables=random.normal(size=(48, 5)).astype(np.float32),
    head={'kernel': np.zeros((5, 0)), 'bias': np.zeros(0)},
    preprocessing=augment.Preprocessing((0.5,) * 3, (0.25,) * 3, (32, 32)),
    pools_map=False,
  )
  result = train.train_and_evaluate(config, tmp_path, teacher=teacher)
  first, *_, last = (row['train/feature'] for row in result.history)
  assert last < 0.8 * first
  assert bundles.load(tmp_path).network.pooled_signed


@pytest.mark.parametrize(
  'fields, message',
  [
    ({'folder': ''}, r'--config\.dataset\.folder=NAME'),
    (
      {'folder': 'heap', 'validation_fraction': 0.5},
      'heap has no classes to validate on',
    ),
    ({'folder': 'wasps'}, 'image_folder --source DIR --name wasps'),
    ({'folder': 'heap', 'unlabelled': 'insects'}, 'has labels'),
    ({'unlabelled': 'insects'}, 'are both insects: leave the second out'),
    ({'unlabelled': 'wasps'}, '--name wasps'),
    ({'folder': '/data/insects'}, 'dataset.folder=/data/insects.*is no path'),
    ({'unlabelled': 'my-heap'}, 'dataset.unlabelled=my-heap: give the NAME'),
  ],
)
def test_what_is_wrong_is_said(data_dir, fields, message):
  with pytest.raises(config_utils.UserError, match=message):
    data = dataset(data_dir, **fields)
    _ = data.class_names
    data.load('train')


def test_the_config_builds(data_dir):
  path = f'{test_configs.IMAGE_FOLDER}:folder=insects,unlabelled=heap,size=32'
  config = config_utils.load(path)
  config.dataset.data_dir = data_dir
  assert config.dataset.resize == 37
  state, sums = test_configs.trace(config)
  assert 'head' not in state.params and 'feature' in sums
  experiment.build(experiment.teacher_config(config))


RECIPES = {
  'mobile': {'total_epochs': 200.0, 'method.factor': 0},
  'finetune': {
    'total_epochs': 30.0,
    'optimizer.layer_decay': 0.7,
    'student.drop_path': 0.1,
    'student.freeze_statistics': True,
  },
}


@pytest.mark.parametrize('recipe', RECIPES)
def test_a_recipe_builds(data_dir, recipe):
  student = 'tf_efficientnet_lite0'
  arg = f'folder=insects,size=32,recipe={recipe},student={student}'
  config = config_utils.load(f'image_folder:{arg},teacher=resnet50')
  config.dataset.data_dir = str(data_dir)
  found = config_utils.flatten(config.to_dict())
  assert RECIPES[recipe].items() <= found.items()
  assert found['augment.trivialaugment'] and found['ema_decay'] == 0.999
  exp = experiment.build(config)
  assert exp.mixing.label_smoothing == 0.1
  exp.optimizer(100)
  if recipe == 'mobile':  # Beside 2,048 channels of the teacher.
    assert exp.distiller.connected_network.connector.factor > 2
  # There is no start whose statistics could be kept.
  assert not exp.distiller.network.backbone.freeze_statistics
  own = exp.teacher_run.config
  assert own.student.freeze_statistics
  assert own.optimizer.name == 'adamw' and own.optimizer.layer_decay == 1
  assert own.total_epochs == 30 and exp.teacher_run.mixing is None


def test_a_recipe_for_a_backbone_without_stochastic_depth():
  config = config_utils.load('image_folder:recipe=finetune,student=resnet18')
  assert config.student.drop_path == 0
  config = config_utils.load('image_folder:recipe=finetune,student=timm:swin_t')
  assert config.student.drop_path == 0


def test_an_unknown_recipe_is_refused():
  with pytest.raises(config_utils.UserError, match="unknown recipe 'mobil'"):
    config_utils.load('image_folder:recipe=mobil')


@pytest.mark.slow
def test_from_a_folder_to_a_report(data_dir, tmp_path, capsys):
  """Teacher, student, report, and the bundle again by itself."""
  config = config_utils.load(
    f'{test_configs.IMAGE_FOLDER}:folder=insects,unlabelled=heap,size=32,'
    'teacher=resnet8,student=resnet8'
  )
  config_utils.override(
    config,
    {
      'dataset.data_dir': data_dir,
      'batch_size': 8,
      'eval_batch_size': 8,
      'total_epochs': 2.0,
    },
  )
  train.train_and_evaluate(config, tmp_path / 'run')
  summary = json.loads((tmp_path / 'run/summary.json').read_text())
  assert summary['test_examples'] == 8 and summary['damaged_images'] == []
  assert (tmp_path / 'run/report.md').exists()
  capsys.readouterr()
  evaluate.main(
    ['--bundle', str(tmp_path / 'run'), '--json', '--data_dir', data_dir]
  )
  again = json.loads(capsys.readouterr().out)
  last = summary['student']['last']
  assert again['network'] == {
    name: last[name] for name in ('top1', 'nll', 'ece')
  }
