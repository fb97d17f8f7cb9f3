"""A run in a bucket: all but its checkpoints, which are Orbax's to write."""

import json
import os
import pathlib
from unittest import mock

from etils import epath
from etils.epath import backend
from etils.epath import gpath
import pytest

from ijckd_jax.bundles import bundles
from ijckd_jax.runtime import config_utils
from ijckd_jax.training import checkpoints
from ijckd_jax.training import metric_writer
from ijckd_jax.training import train


class Bucket(backend._OsPathBackend):
  """Paths of gs:// as a folder has them; objects do not grow in it."""

  def __init__(self, root):
    self._root = root

  def _local(self, path):
    path = os.fspath(path)
    return path.replace('gs://', f'{self._root}/') if '://' in path else path

  def open(self, path, mode):
    assert 'a' not in mode and '+' not in mode
    return super().open(self._local(path), mode)

  def glob(self, path):
    return [self._remote(found) for found in super().glob(self._local(path))]

  def listdir(self, path):
    return super().listdir(self._local(path))

  def _remote(self, path):
    return path.replace(f'{self._root}/', 'gs://')


for _name in (
  'exists',
  'isdir',
  'makedirs',
  'mkdir',
  'rmtree',
  'remove',
  'stat',
):

  def _one(self, path, *args, _name=_name, **kwargs):
    parent = getattr(backend._OsPathBackend, _name)
    return parent(self, self._local(path), *args, **kwargs)

  setattr(Bucket, _name, _one)
for _name in ('rename', 'replace', 'copy'):

  def _two(self, path, dst, *args, _name=_name, **kwargs):
    parent = getattr(backend._OsPathBackend, _name)
    return parent(self, self._local(path), self._local(dst), *args, **kwargs)

  setattr(Bucket, _name, _two)


@pytest.fixture
def bucket(tmp_path):
  """The folder in which gs:// lies."""
  root = tmp_path / 'buckets'
  (root / 'mine').mkdir(parents=True)
  with mock.patch.dict(gpath._PREFIX_TO_BACKEND, {'gs': Bucket(root)}):
    yield root


def test_a_run_in_a_bucket(bucket, small_config, tmp_path, monkeypatch):
  real = checkpoints.Checkpoints

  def local(directory, **options):
    path = os.fspath(directory)
    assert path.startswith('gs://mine/run')
    return real(tmp_path / 'local' / path.removeprefix('gs://'), **options)

  monkeypatch.setattr(checkpoints, 'Checkpoints', local)
  here = {path.name for path in pathlib.Path.cwd().iterdir()}
  result = train.train_and_evaluate(small_config('ce'), 'gs://mine/run')
  run = bucket / 'mine/run'
  assert json.loads((run / 'summary.json').read_text())['steps'] == 12
  rows = [
    json.loads(x) for x in (run / 'metrics.jsonl').read_text().splitlines()
  ]
  assert rows == result.history and rows[-1]['step'] == 12
  assert list((run / 'tensorboard').iterdir())
  assert (run / 'report.md').exists() and list((run / 'plots').iterdir())
  assert not list(run.glob('.*'))  # Nothing half written is left.
  again = train.train_and_evaluate(small_config('ce'), 'gs://mine/run')
  assert again.state is None and again.history == result.history
  assert bundles.load('gs://mine/run').class_names == result.bundle.class_names
  assert {path.name for path in pathlib.Path.cwd().iterdir()} == here


def test_rows_in_a_bucket_are_dropped_past_the_restored_step(bucket):
  path = 'gs://mine/metrics.jsonl'
  writer = metric_writer.JsonLinesWriter(path, resume_step=0)
  for step in (1, 2, 3):
    writer.write(step, {'loss': 1.0 / step})
  writer.close()
  writer = metric_writer.JsonLinesWriter(path, resume_step=2)
  writer.write(3, {'loss': 7.0})
  writer.flush()
  text = (bucket / 'mine/metrics.jsonl').read_text()
  assert [json.loads(line) for line in text.splitlines()] == [
    {'step': 1, 'loss': 1.0},
    {'step': 2, 'loss': 0.5},
    {'step': 3, 'loss': 7.0},
  ]


def test_stored_outputs_do_not_go_to_a_bucket(bucket, small_config):
  config = small_config(**{'teacher.store.views': 1})
  with pytest.raises(config_utils.UserError, match='a local teacher.store'):
    train.train_and_evaluate(config, 'gs://mine/run')
  assert not list((bucket / 'mine').iterdir())


def test_without_gcsfs_it_is_said(small_config):
  with mock.patch.object(
    type(epath.Path('gs://mine')), 'exists', side_effect=ImportError('no gcsfs')
  ):
    with pytest.raises(config_utils.UserError, match=r'\[gcs\]'):
      train.train_and_evaluate(small_config(), 'gs://mine/run')
