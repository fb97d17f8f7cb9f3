"""A run goes on with the data that it began with; other code is told."""

import dataclasses
import json
import logging
import os
import shutil
import zlib

from etils import epath
import jax
import numpy as np
from PIL import Image
import pytest

from ijckd_jax.bundles import bundles
from ijckd_jax.data import datasets
from ijckd_jax.data.datasets import digits
from ijckd_jax.data.datasets import image_folder
from ijckd_jax.data.datasets import own_images
from ijckd_jax.distillation import teachers
from ijckd_jax.runtime import config_utils
from ijckd_jax.runtime import disk
from ijckd_jax.runtime import locks
from ijckd_jax.runtime import workdirs
from ijckd_jax.training import run_record
from ijckd_jax.training import train


@dataclasses.dataclass(frozen=True)
class Data:
  """Digits, some of them, perhaps with a change to their arrays."""

  data_dir: str
  change: object = None
  class_names: tuple[str, ...] = tuple('0123456789')
  mean: tuple[float, ...] = (0.3,)
  flip: bool = False

  image_shape, std, crop_padding = (8, 8, 1), (0.4,), 0

  def load(self, split):
    arrays = digits.Dataset(data_dir=self.data_dir).load(split)
    arrays = arrays.take(np.arange(min(len(arrays), 120)))
    return self.change(split, arrays) if self.change else arrays


@pytest.fixture(scope='module')
def finished(tmp_path_factory, small_config, data_dir):
  """The folder of a finished run on Data, teacher included; and its config."""
  workdir = tmp_path_factory.mktemp('runs') / 'run'
  config = small_config('kd', total_steps=2)
  train.train_and_evaluate(config, workdir, dataset=Data(data_dir))
  return workdir, config


@pytest.fixture
def stopped(finished, tmp_path):
  """A copy of it, as if the student's run had been stopped at its end."""
  workdir, config = finished
  shutil.copytree(workdir, tmp_path / 'run')
  (tmp_path / 'run' / workdirs.SUMMARY).unlink()
  return tmp_path / 'run', config


def labels_of(split, arrays):
  """Exchanges two of the labels."""
  labels = arrays.labels.copy()
  if split == 'train':
    labels[[0, 1]] = labels[[1, 0]]
    assert labels[0] != labels[1]
  return datasets.Arrays(arrays.images, labels)


def pixel_of(split, arrays):
  images = arrays.images.copy()
  images[-1:, 0, 0, 0] ^= split == 'test'
  return datasets.Arrays(images, arrays.labels)


def all_but_one(split, arrays):
  return arrays.take(np.arange(len(arrays) - (split == 'train')))


CHANGES = {
  'labels': ({'change': labels_of}, 'train has other images or labels'),
  'pixel': ({'change': pixel_of}, 'test has other images or labels'),
  'fewer': ({'change': all_but_one}, 'train had 120 images and has 119'),
  'names': ({'class_names': tuple('1023456789')}, "class_names was .*'0', '1'"),
  'mean': ({'mean': (0.31,)}, r'mean was \[0.3\] and is \[0.31\]'),
  'flip': ({'flip': True}, 'flip was False and is True'),
}


@pytest.mark.parametrize('change', CHANGES)
def test_other_data_are_refused(change, finished, stopped, data_dir):
  fields, said = CHANGES[change]
  data = Data(data_dir, **fields)
  before = {x: x.stat().st_mtime_ns for x in stopped[0].rglob('*')}
  for workdir, config in (finished, stopped):
    with pytest.raises(config_utils.UserError, match=f'on other data .*{said}'):
      train.train_and_evaluate(config, workdir, dataset=data)
  assert before == {x: x.stat().st_mtime_ns for x in stopped[0].rglob('*')}


def test_a_new_start_on_other_data_trains_another_teacher(stopped, data_dir):
  workdir, config = stopped
  old = (workdir / 'teacher' / 'bundle' / 'bundle.json').read_bytes()
  data = Data(data_dir, labels_of)
  train.train_and_evaluate(config, workdir, dataset=data, overwrite=True)
  assert (workdir / 'teacher' / 'bundle' / 'bundle.json').read_bytes() != old
  record = disk.read_json(workdir / workdirs.RECORD)
  assert record['data']['splits']['train']['digest'] == (
    data.load('train').digest()
  )


def test_a_finished_run_whose_data_are_gone_is_shown(
  finished, data_dir, caplog
):
  workdir, config = finished

  def gone(split, arrays):
    raise config_utils.UserError('not prepared')

  result = train.train_and_evaluate(
    config, workdir, dataset=Data(data_dir, gone)
  )
  assert result.summary['steps'] == 2
  assert 'its data could not be compared: not prepared' in caplog.text


def test_other_code_and_versions_are_told(stopped, data_dir, caplog):
  workdir, config = stopped
  path = workdir / workdirs.RECORD
  record = disk.read_json(path)
  now = record['versions']['jax']
  record['versions']['jax'] = '0.0.1'
  record['code'] = {'ijckd_jax': 'old', 'gone': 'x'}
  path.write_text(json.dumps(record))
  with caplog.at_level(logging.WARNING):
    train.train_and_evaluate(config, workdir, dataset=Data(data_dir))
  assert f"versions.jax: '0.0.1' -> '{now}'" in caplog.text
  assert "code.ijckd_jax: 'old' -> " in caplog.text
  assert "code.gone: 'x' -> '(none)'" in caplog.text
  # The record is that of the last start.
  assert disk.read_json(path)['versions']['jax'] == now


def test_modules_that_a_config_names_are_code(
  small_config, data_dir, tmp_path, monkeypatch
):
  monkeypatch.syspath_prepend(tmp_path)
  module = tmp_path / 'my_methods.py'
  config = small_config()
  config.writers = ('my_methods:Writer', 'nowhere:Writer')
  data, found = Data(data_dir), []
  splits = {name: data.load(name) for name in datasets.SPLITS}
  for text in ('one = 1\n', 'one = 2\n'):
    module.write_text(text)
    found.append(run_record.make(data, splits, config)['code'])
  assert [set(code) for code in found] == 2 * [{'ijckd_jax', 'my_methods'}]
  assert found[0]['my_methods'] != found[1]['my_methods']
  assert found[0]['ijckd_jax'] == found[1]['ijckd_jax']


def other_teacher(bundle, network):
  """With the same arrays, its pixels are seen in other units."""
  mean = (network.preprocessing.mean[0] + 0.5,)
  preprocessing = dataclasses.replace(network.preprocessing, mean=mean)
  network = dataclasses.replace(network, preprocessing=preprocessing)
  return dataclasses.replace(bundle, network=network)


def other_arrays(bundle, network):
  del network
  turned = jax.tree.map(lambda x: -np.asarray(x), bundle.variables)
  stats = bundle.variables['batch_stats']
  return dataclasses.replace(bundle, variables=turned | {'batch_stats': stats})


@pytest.mark.parametrize('change', [other_teacher, other_arrays])
def test_another_teacher_in_the_runs_folder_is_refused(
  change, stopped, data_dir
):
  workdir, config = stopped
  bundle = bundles.load(workdir / 'teacher')
  record = (workdir / workdirs.RECORD).read_bytes()
  change(bundle, bundle.network).save(workdir / 'teacher' / 'bundle')
  with pytest.raises(config_utils.UserError, match='began with another teach'):
    train.train_and_evaluate(config, workdir, dataset=Data(data_dir))
  assert (workdir / workdirs.RECORD).read_bytes() == record
  bundle.save(workdir / 'teacher' / 'bundle')
  train.train_and_evaluate(config, workdir, dataset=Data(data_dir))


@pytest.mark.parametrize(
  'text', ['{"half', '[]', '{"data": {"splits": []}}', '[' * 100_000]
)
def test_a_damaged_record_is_refused(text, stopped, data_dir):
  """Or else other data would not be noticed."""
  workdir, config = stopped
  (workdir / workdirs.RECORD).write_text(text)
  with pytest.raises(config_utils.UserError, match='run.json in .* is damaged'):
    train.train_and_evaluate(config, workdir, dataset=Data(data_dir))


def test_a_run_without_checkpoints_says_that_it_starts_anew(
  stopped, data_dir, caplog
):
  workdir, config = stopped
  shutil.rmtree(workdir / 'checkpoints')
  shutil.rmtree(workdir / 'bundle')
  train.train_and_evaluate(config, workdir, dataset=Data(data_dir))
  assert 'there is no checkpoint to continue from: the run st' in caplog.text


def test_code_that_only_a_runs_bundle_names_is_not_imported(
  finished, tmp_path, data_dir, monkeypatch
):
  monkeypatch.syspath_prepend(tmp_path)
  (tmp_path / 'evil.py').write_text('raise SystemExit("imported")')
  workdir, config = finished
  workdir = shutil.copytree(workdir, tmp_path / 'run')
  path = workdir / 'bundle' / 'bundle.json'
  path.write_text(
    json.dumps(json.loads(path.read_text()) | {'backbone': 'evil:X'})
  )
  train.train_and_evaluate(config, workdir, dataset=Data(data_dir))
  assert json.loads(path.read_text())['backbone'] == 'plain'


def test_settings_of_jax_are_versions():
  plain = run_record.versions()
  assert plain['jax'] == jax.__version__
  assert not set(plain) & set(run_record.SETTINGS)
  with jax.enable_x64(True):
    assert run_record.versions() == {**plain, 'jax_enable_x64': 'True'}


def test_runs_without_a_record_go_on(stopped, data_dir, caplog):
  """As those of older versions do."""
  workdir, config = stopped
  (workdir / workdirs.RECORD).unlink()
  (workdir / 'teacher' / workdirs.RECORD).unlink()
  train.train_and_evaluate(config, workdir, dataset=Data(data_dir))
  assert (workdir / workdirs.RECORD).exists()
  assert 'there is no run.json, so that it cannot be told' in caplog.text


@pytest.mark.parametrize('config_text', ['{"a": 1', '// ours\n{}', ''])
def test_what_no_run_wrote_is_not_removed(
  config_text, small_config, data_dir, tmp_path
):
  (tmp_path / 'heads').mkdir()
  (tmp_path / 'heads' / 'mine.txt').write_text('mine')
  (tmp_path / 'config.json').write_text(config_text)
  for overwrite in (False, True):
    with pytest.raises(config_utils.UserError, match='remove the folder by'):
      train.train_and_evaluate(
        small_config(),
        tmp_path,
        dataset=Data(data_dir),
        overwrite=overwrite,
      )
  assert (tmp_path / 'heads' / 'mine.txt').read_text() == 'mine'
  assert (tmp_path / 'config.json').read_text() == config_text


def test_only_what_the_record_lists_is_removed(stopped):
  workdir, config = stopped
  path = workdir / workdirs.RECORD
  record = disk.read_json(path)
  record['files'] = ['bundle', 'config.json', '../run', 'notes.txt']
  path.write_text(json.dumps(record))
  (workdir / 'notes.txt').write_text('mine')
  (workdir / '.film.mp4.partial').write_text('mine')
  (workdir / f'.summary.json.{"0" * 32}.partial').write_text('of a killed run')
  before = {x.name for x in workdir.iterdir()}
  workdirs.claim([(epath.Path(workdir), config)], overwrite=True)
  assert before - {x.name for x in workdir.iterdir()} == {
    'bundle',
    f'.summary.json.{"0" * 32}.partial',
  }


def test_a_teacher_that_another_run_trains_is_left_alone(stopped, data_dir):
  workdir, config = stopped
  config = config.copy_and_resolve_references()
  config.teacher.seed = 5
  before = {x for x in (workdir / 'teacher').rglob('*')}
  with (
    locks.Lock(workdir / 'teacher'),
    pytest.raises(config_utils.UserError, match='another run .*/teacher'),
  ):
    train.train_and_evaluate(
      config, workdir, dataset=Data(data_dir), overwrite=True
    )
  assert before <= {x for x in (workdir / 'teacher').rglob('*')}
  assert (workdir / 'bundle').exists()


def prepared(folder, colours, name):
  """Prepares a folder of one-coloured pictures by class; returns its data."""
  source, data_dir = folder / name, folder / f'data_{name}'
  for split in ('train', 'test'):
    for kind, colour in colours.items():
      (source / split / kind).mkdir(parents=True)
      for number in range(2):
        Image.new('RGB', (9, 9), (colour, number, 0)).save(
          source / split / kind / f'{number}.png'
        )
  image_folder.prepare(str(source), 'pictures', str(data_dir))
  return own_images.Dataset(folder='pictures', data_dir=str(data_dir))


def test_a_folder_that_was_prepared_again_is_compared_by_content(tmp_path):
  """Not by the times of its files, nor by their sizes."""
  one = prepared(tmp_path, {'cat': 10, 'dog': 200}, 'one')
  same = prepared(tmp_path, {'cat': 10, 'dog': 200}, 'same')
  turned = prepared(tmp_path, {'cat': 200, 'dog': 10}, 'turned')
  for split in ('train', 'test'):
    digests = [data.load(split).digest() for data in (one, same, turned)]
    assert digests[0] == digests[1] != digests[2]
  # Of a data set without the hashes of `prepare`, examples are compared.
  for data in (one, same, turned):
    (path,) = tmp_path.glob(
      f'{os.path.basename(data.data_dir)}/pictures/*/digests.json'
    )
    path.unlink()
  digests = [data.load('train').digest() for data in (one, same, turned)]
  assert digests[0] == digests[1] != digests[2]
  path.write_text('{"test": "x"}')
  with pytest.raises(
    config_utils.UserError, match='prepare the data set again'
  ):
    turned.load('train').digest()


def test_a_checksum_of_teachers_is_that_of_the_first_version():
  """By it their runs are known: the first one's pool comes last."""

  def teacher(number):
    arrays = np.float32([[number], [number + 1], [number + 2], [number + 3]])
    return teachers.Teacher(
      apply=None,
      variables={'w': arrays[0]},
      head={'kernel': arrays[1:2], 'bias': arrays[2]},
      preprocessing=None,
      pool=None,
      pool_name='my.nets:Pool',
      pool_variables={'p': arrays[3]},
    )

  found = run_record.checksum(run_record.arrays_of([teacher(0)]))
  assert found == zlib.crc32(np.float32([2, 1, 0, 3]))
  both = run_record.arrays_of([teacher(0), teacher(4)])
  wanted = zlib.crc32(np.float32([2, 1, 0, 6, 5, 4, 7, 3]))
  assert run_record.checksum(both) == wanted
