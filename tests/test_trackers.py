"""Trackers by name: as they are, offline, with a kill and a restart."""

import importlib.util
import json
import os
import pathlib
import signal
import struct
import subprocess
import sys
import time

import pytest

from ijckd_jax.runtime import config_utils
from ijckd_jax.runtime import workdirs
from ijckd_jax.training import trackers
from ijckd_jax.training import train

ROOT = pathlib.Path(__file__).parents[1]


class Ledger(trackers.Tracker):
  """A tracker whose runs are lists of what it was given."""

  name = 'json'  # A package that is there.
  remedy = 'mend the ledger'
  runs = {}
  fails = False

  def _open(self, run, config, title):
    run = run or f'{title}-{len(self.runs)}'
    self.given = self.runs.setdefault(run, [('config', config['seed'])])
    return run

  def _take_row(self, step, scalars):
    if self.fails:
      raise ConnectionError('no answer')
    self.given.append((step, scalars))

  def _take_pictures(self, paths):
    self.given.append(('pictures', {path.name for path in paths}))

  def _take_bundle(self, folder):
    self.given.append(('bundle', (folder / 'bundle.json').exists()))

  def _close(self):
    self.given.append('closed')


@pytest.fixture
def ledger(monkeypatch):
  monkeypatch.setattr(Ledger, 'runs', {})
  return Ledger


def test_no_row_is_given_twice(ledger, tmp_path):
  def opened():
    return ledger({'seed': 0}, str(tmp_path / 'run'))

  (tmp_path / 'run').mkdir()
  first = opened()
  first.write(10, {'train/loss': 3.0})
  first.write(20, {'train/loss': 2.0})
  # Killed: the run goes on from step 10, and makes the row of 20 again.
  again = opened()
  again.write(20, {'train/loss': 2.0})
  again.write(20, {'test/top1': 0.5})
  again.write(20, {'test/top1': 0.5, 'test/nll': 1.0})
  again.write(30, {'train/loss': 1.0})
  (rows,) = ledger.runs.values()
  assert rows[1:] == [
    (10, {'train/loss': 3.0}),
    (20, {'train/loss': 2.0}),
    (20, {'test/top1': 0.5}),
    (20, {'test/nll': 1.0}),
    (30, {'train/loss': 1.0}),
  ]


def test_a_run_gives_its_config_its_rows_its_pictures_and_its_bundle(
  ledger, small_config, tmp_path, caplog
):
  config = small_config('ce')
  config.writers = (f'{__name__}:Ledger',)
  result = train.train_and_evaluate(config, tmp_path)
  (given,) = ledger.runs.values()
  assert given[0] == ('config', config.seed)
  rows, history = {}, {}
  for step, scalars in (row for row in given if isinstance(row[0], int)):
    assert not rows.setdefault(step, {}).keys() & scalars.keys()
    rows[step] |= scalars
  for row in result.history:
    history.setdefault(row['step'], {}).update(row)
    del history[row['step']]['step']
  assert rows == history
  *_, (_, pictures), bundle, closed = given
  assert 'accuracy.png' in pictures and bundle == ('bundle', True)
  assert closed == 'closed'
  # A new start is a new run there.
  train.train_and_evaluate(config, tmp_path, overwrite=True)
  assert len(ledger.runs) == 2


def test_a_tracker_that_fails_ends_no_run(ledger, tmp_path, caplog):
  tracker = ledger({'seed': 0}, str(tmp_path))
  tracker.fails = True
  tracker.write(1, {'train/loss': 1.0})
  assert 'json did not take a row of step 1 (no answer)' in caplog.text
  tracker.fails = False
  tracker.write(2, {'train/loss': 1.0})
  assert tracker.given[-1] == (2, {'train/loss': 1.0})
  # One that is away for good is not asked at every step.
  tracker.fails = True
  for step in range(3, 6):
    tracker.write(step, {'train/loss': 1.0})
  assert 'the tracker gets no more of it' in caplog.text
  tracker.fails = False
  tracker.write(6, {'train/loss': 1.0})
  tracker.close()
  assert tracker.given[-1] == (2, {'train/loss': 1.0})


@pytest.mark.parametrize(
  'text', ['{"json": {"run', '[]', '{"json": []}', '{"json": {"step": "x"}}']
)
def test_damaged_notes_are_named(text, ledger, tmp_path):
  (tmp_path / workdirs.TRACKED).write_text(text)
  with pytest.raises(config_utils.UserError, match='tracked.json is damaged'):
    ledger({'seed': 0}, str(tmp_path))


def test_names_are_told_apart_and_what_is_missing_is_said(monkeypatch):
  with pytest.raises(config_utils.UserError, match="did you mean 'wandb'"):
    trackers.factories(['wanbd'])
  for name in trackers.TRACKERS:
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(config_utils.UserError, match=f'ijckd_jax\\[{name}\\]'):
      trackers.factories([name])
  several = trackers.factories([f'{__name__}:Ledger, {__name__}:Ledger'])
  assert several == [Ledger] and trackers.factories(()) == []


def records(data):
  """Returns the records of a file of Weights & Biases.

  Seven bytes, and blocks of 32 KiB in the log format of LevelDB: of each part
  of a record a checksum, a length and a kind, 1 if whole and 4 if the last.
  """
  found, parts, position = [], b'', 7
  while position + 7 <= len(data):
    left = 32768 - position % 32768
    length, kind = struct.unpack('<HB', data[position + 4 : position + 7])
    if left < 7 or not kind:  # The rest of a block is empty.
      position += left
      continue
    position += 7
    parts += data[position : position + length]
    position += length
    if kind in (1, 4):
      found.append(parts)
      parts = b''
  return found


def wandb_rows(folder):
  from wandb.proto import wandb_internal_pb2

  found = []
  for path in sorted(folder.glob('wandb/offline-run-*/run-*.wandb')):
    for data in records(path.read_bytes()):
      record = wandb_internal_pb2.Record()
      record.ParseFromString(data)
      row = {
        '/'.join(item.nested_key) or item.key: json.loads(item.value_json)
        for item in record.history.item
      }
      if 'train/loss' in row:
        found.append((row['_step'], row['train/loss']))
  return found


def mlflow_rows(folder):
  import mlflow

  client = mlflow.MlflowClient(f'sqlite:///{folder}/mlflow.db')
  place = client.get_experiment_by_name(trackers.PROJECT).experiment_id
  (run,) = client.search_runs([place])
  names = {item.path for item in client.list_artifacts(run.info.run_id)}
  assert names == {'plots', 'student'} and run.data.params['seed'] == '0'
  history = client.get_metric_history(run.info.run_id, 'train/loss')
  return [(row.step, row.value) for row in history]


def trackio_rows(folder):
  script = (
    'import json, trackio; s = trackio.SQLiteStorage; (run,) = s.get_runs('
    f'{trackers.PROJECT!r}); print(json.dumps(s.get_logs({trackers.PROJECT!r}, '
    'run)))'
  )
  found = subprocess.run(
    [sys.executable, '-c', script],
    env={**os.environ, 'TRACKIO_DIR': str(folder / 'trackio')},
    capture_output=True,
    check=True,
    text=True,
  )
  rows = json.loads(found.stdout.splitlines()[-1])
  return [(r['step'], r['train/loss']) for r in rows if 'train/loss' in r]


ROWS = {'mlflow': mlflow_rows, 'trackio': trackio_rows, 'wandb': wandb_rows}


@pytest.mark.parametrize('name', trackers.TRACKERS)
def test_a_killed_run_goes_on_in_the_tracker(name, tmp_path):
  if not importlib.util.find_spec(name):
    pytest.skip(f'{name} is not installed')
  run, every = tmp_path / 'run', 10
  command = [
    *(sys.executable, '-m', 'ijckd_jax.main', '--workdir', str(run)),
    *('--config', str(ROOT / 'configs/digits.py:method=ce,student=resnet8')),
    *('--config.total_steps=900', '--config.total_epochs=0'),
    *('--config.eval_steps=300', '--config.eval_epochs=0'),
    *(f'--config.log_steps={every}', '--config.log_epochs=0'),
    f'--config.writers={name}',
  ]
  settings = {
    'MLFLOW_TRACKING_URI': f'sqlite:///{tmp_path}/mlflow.db',
    'TRACKIO_DIR': str(tmp_path / 'trackio'),
    'WANDB_MODE': 'offline',
    'WANDB_DIR': str(tmp_path),
  }
  environment = {**os.environ, **settings, 'PYTHONPATH': str(ROOT)}

  def given():
    place = run / workdirs.TRACKED
    return json.loads(place.read_text())[name]['step'] if place.exists() else 0

  said = tmp_path / 'said'
  with said.open('w') as file:
    options = {'env': environment, 'cwd': tmp_path, 'stderr': file}
    with subprocess.Popen(command, **options) as process:
      # Beyond the checkpoint of step 300: these rows will be made again.
      while given() < 400 and process.poll() is None:
        time.sleep(0.01)
      assert process.poll() is None, said.read_text()
      process.send_signal(signal.SIGKILL)
    killed = given()
    assert killed < 900
    subprocess.run(command, check=True, **options)
  assert given() == 900
  rows = dict(ROWS[name](tmp_path))
  found = [step for step, _ in ROWS[name](tmp_path)]
  assert len(found) == len(set(found)), 'a row is there twice'
  # What the package had not written when it was killed is lost, and no more.
  missing = set(range(every, 901, every)) - set(found)
  assert all(step <= killed for step in missing) and len(missing) < 30
  history = [json.loads(line) for line in (run / workdirs.METRICS).open()]
  for row in history:
    if row['step'] in rows and 'train/loss' in row:
      assert rows[row['step']] == pytest.approx(row['train/loss'])
