"""Folders of tfds that were tampered with: nothing runs, and a line says it."""

import json
import shutil
import sys

import numpy as np
import pytest
import tensorflow_datasets as tfds

from ijckd_jax.data.datasets import digits
from ijckd_jax.data.datasets import photos
from ijckd_jax.data.datasets import prepared
from ijckd_jax.data.datasets import tfds_folder
from ijckd_jax.runtime import config_utils

SEQUENCE = 'tensorflow_datasets.core.features.sequence_feature.Sequence'
EVIL = {'pythonClassName': 'their_module.Feature', 'text': {}}


@pytest.fixture(scope='module')
def written(tmp_path_factory):
  """A data directory with digits, as tfds writes them."""
  root = tmp_path_factory.mktemp('data')
  digits.Dataset(data_dir=str(root)).load('test')
  return root


@pytest.fixture
def folder(written, tmp_path, monkeypatch):
  """A copy, beside a module that leaves a mark where it is imported."""
  shutil.copytree(written, tmp_path / 'data')
  (tmp_path / 'their_module.py').write_text("open('ran', 'w').close()")
  monkeypatch.chdir(tmp_path)
  monkeypatch.syspath_prepend('')
  monkeypatch.delitem(sys.modules, 'their_module', raising=False)
  (found,) = (tmp_path / 'data').glob('digits/*')
  yield found
  assert not (tmp_path / 'ran').exists()
  assert 'their_module' not in sys.modules


def load(folder):
  return digits.Dataset(data_dir=str(folder.parents[1])).load('test')


def refused(folder):
  with pytest.raises(config_utils.UserError) as error:
    load(folder)
  said = str(error.value)
  assert said.isprintable() and len(said) < 500, said
  return said


def change(path, edit):
  """Edits a JSON file: `edit` changes what it is given, or returns another."""
  content = json.loads(path.read_text())
  path.write_text(json.dumps(edit(content) or content))


def in_top(content):
  content['pythonClassName'] = EVIL['pythonClassName']


def in_snake_case(content):
  del content['pythonClassName']
  content['python_class_name'] = EVIL['pythonClassName']


def in_feature(content):
  content['featuresDict']['features']['other'] = EVIL


def in_sequence(content):
  content['featuresDict']['features']['other'] = {
    'pythonClassName': SEQUENCE,
    'sequence': {'feature': EVIL, 'length': -1},
  }


def in_dict_of_sequence(content):
  inner = {
    'pythonClassName': content['pythonClassName'],
    'featuresDict': {'features': {'deep': EVIL}},
  }
  content['featuresDict']['features']['other'] = {
    'pythonClassName': SEQUENCE,
    'sequence': {'feature': inner, 'length': 3},
  }


def in_json_of_a_feature(content):
  inner = {'type': EVIL['pythonClassName'], 'content': {}}
  content['featuresDict']['features']['other'] = {
    'pythonClassName': SEQUENCE,
    'jsonFeature': {'json': json.dumps({'feature': inner, 'length': 1})},
  }


def of_old_tfds(content):
  del content
  return {'type': EVIL['pythonClassName'], 'content': {}}


@pytest.mark.parametrize(
  'edit',
  [
    *(in_top, in_snake_case, in_feature, in_sequence, in_dict_of_sequence),
    *(in_json_of_a_feature, of_old_tfds),
  ],
)
def test_features_of_another_module(folder, edit):
  change(folder / 'features.json', edit)
  said = refused(folder)
  assert str(folder / 'features.json') in said
  assert (
    'their_module.Feature' in said
    or (edit is in_json_of_a_feature and 'json_feature' in said)
    or (edit is of_old_tfds and 'prepare it again' in said)
  )


def test_features_that_stand_in_the_info(folder):
  change(folder / 'dataset_info.json', lambda x: {**x, 'features': EVIL})
  said = refused(folder)
  assert 'dataset_info.json names the class their_module.Feature' in said


def test_a_class_of_tfds_that_is_not_needed(folder):
  """Audio, for example, decodes by whatever programs are there."""
  kind = 'tensorflow_datasets.core.features.audio_feature.Audio'

  def edit(content):
    feature = {'pythonClassName': kind, 'audio': {}}
    content['featuresDict']['features']['other'] = feature

  change(folder / 'features.json', edit)
  assert kind in refused(folder)


def test_what_is_allowed_is_there():
  known = tfds.features.FeatureConnector._registered_features
  assert set(known) >= tfds_folder.ALLOWED


def test_what_tfds_writes_of_allowed_features_is_read(folder):
  features = tfds.features
  features.FeaturesDict(
    {
      'image': features.Image(shape=(8, 8, 1)),
      'label': features.ClassLabel(num_classes=10),
      'both': features.LabeledImage(labels=3, shape=(None, None, 1)),
      'text': features.Text(),
      'number': features.Scalar(np.int64),
      'array': features.Tensor(shape=(2,), dtype=np.float32),
      'boxes': features.Sequence({'box': features.BBoxFeature()}),
      'deep': features.FeaturesDict({'numbers': features.Sequence(np.int32)}),
    }
  ).save_config(folder)
  builder = prepared.find('digits', str(folder.parents[1]))
  assert set(builder.info.features['deep']) == {'numbers'}


@pytest.mark.parametrize('name', ['features.json', 'dataset_info.json'])
@pytest.mark.parametrize(
  'content, expected',
  [
    (b'{', 'cannot be read: Expecting property name'),
    (b'', 'cannot be read: Expecting value'),
    (b'[]', 'cannot be read: it is no JSON object'),
    (b'3', 'cannot be read: it is no JSON object'),
    (b'\xff\xfe\0', 'cannot be read: '),
    (b'[' * 100_000, 'cannot be read: maximum recursion depth'),
    (b' ' * (2**24 + 1), 'tfds writes no more than'),
    (b'{"pythonClassName": 3, "splits": 3}', 'cannot be read: '),
    (b'{"splits": [{"shardLengths": ["x"]}], "text": 3}', 'cannot be read: '),
  ],
)
def test_what_is_no_description(folder, name, content, expected):
  (folder / name).write_bytes(content)
  said = refused(folder)
  assert str(folder / name) in said
  assert expected in said


def test_files_that_are_missing(folder):
  shard = next(folder.glob('*test*'))
  shard.rename(folder / 'elsewhere')
  assert f'{shard} is missing' in refused(folder)
  (folder / 'elsewhere').rename(shard)
  (folder / 'dataset_info.json').unlink()
  assert 'dataset_info.json' in refused(folder)


@pytest.mark.parametrize('field', ['version', 'fileFormat'])
def test_fields_that_tfds_refuses(folder, field):
  change(folder / 'dataset_info.json', lambda x: {**x, field: '../x'})
  assert 'digits' in refused(folder)


@pytest.mark.parametrize(
  'field, value',
  [
    ('filepathTemplate', '../../../x/{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}'),
    ('filepathTemplate', '/x/{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}'),
    ('filepathTemplate', 'a/../../{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}'),
    ('filepathTemplate', '{SPLIT:>9999999999}.{FILEFORMAT}-{SHARD_X_OF_Y}'),
    ('filepathTemplate', '{SPLIT.__class__}.{FILEFORMAT}-{SHARD_X_OF_Y}'),
    ('filepathTemplate', '{OTHER}.{FILEFORMAT}-{SHARD_X_OF_Y}'),
    ('filepathTemplate', '{SPLIT'),
    ('name', '../test'),
    ('name', '/test'),
  ],
)
def test_shards_outside_of_the_folder(folder, field, value):
  def edit(content):
    content['splits'][1][field] = value

  change(folder / 'dataset_info.json', edit)
  said = refused(folder)
  assert 'dataset_info.json' in said
  assert 'outside of the folder' in said or 'is no name of files' in said


def test_a_name_outside_of_the_folder(folder):
  change(folder / 'dataset_info.json', lambda x: {**x, 'name': '../../x'})
  assert 'outside of the folder' in refused(folder)


def test_shards_in_folders_of_their_own(folder, written):
  """That is allowed by tfds, and harmless."""

  def edit(content):
    for split in content['splits']:
      split['filepathTemplate'] = '{SPLIT}/x.{FILEFORMAT}-{SHARD_X_OF_Y}'

  change(folder / 'dataset_info.json', edit)
  for split in ('train', 'test'):
    (folder / split).mkdir()
    (shard,) = folder.glob(f'digits-{split}*')
    shard.rename(folder / split / shard.name.replace(f'digits-{split}', 'x'))
  expected = digits.Dataset(data_dir=str(written)).load('test')
  assert load(folder).digest() == expected.digest()


@pytest.mark.parametrize('length', [-1, 10**11])
def test_lengths_that_cannot_be(folder, length):
  def edit(content):
    content['splits'][1]['shardLengths'] = [str(length)]

  change(folder / 'dataset_info.json', edit)
  (shard,) = folder.glob('*test*')
  said = refused(folder)
  assert str(shard) in said
  assert f'{length:,} examples' in said


def test_a_split_that_is_not_there(folder):
  change(
    folder / 'dataset_info.json',
    lambda content: {**content, 'splits': content['splits'][:1]},
  )
  assert "no split 'test', but train" in refused(folder)


def test_photos_are_checked_too(folder):
  found = photos.Source('digits', str(folder.parents[1]), 'test')
  assert len(found) == 360
  change(folder / 'features.json', in_top)
  found = photos.Source('digits', str(folder.parents[1]), 'test')
  with pytest.raises(config_utils.UserError, match='their_module'):
    len(found)
