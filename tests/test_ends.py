"""The end of a run: what it leaves outlives failures, power cuts and damage."""

import json
import logging
import os
import pathlib
import shutil

from etils import epath
import numpy as np
import pytest

from ijckd_jax import main
from ijckd_jax.bounds import measure
from ijckd_jax.bundles import bundles
from ijckd_jax.reports import plots
from ijckd_jax.reports import report
from ijckd_jax.reports import web_page
from ijckd_jax.runtime import config_utils
from ijckd_jax.runtime import disk
from ijckd_jax.runtime import workdirs
from ijckd_jax.training import checkpoints
from ijckd_jax.training import experiment
from ijckd_jax.training import metric_writer
from ijckd_jax.training import results
from ijckd_jax.training import train
from tests import test_checkpoints

BUNDLE = ('bundle/bundle.json', 'bundle/variables.safetensors')
ENDS = (*BUNDLE, 'bundle/README.md', 'summary.json', 'report.md', 'report.html')
DAMAGE = {
  'empty': lambda data: b'',
  'half': lambda data: data[: len(data) // 2],
  'object': lambda data: b'{}',
  'list': lambda data: b'[]',
  'gone': None,
}


@pytest.fixture
def run(finished_run, tmp_path):
  """A copy of a finished run; only its student's end is looked at."""
  return shutil.copytree(finished_run[0], tmp_path / 'run')


def damage(path, how):
  change = DAMAGE[how]
  if change is None:
    path.unlink()
  else:
    path.write_bytes(change(path.read_bytes()))


def assert_whole(folder, reference):
  """Asserts that a run's end is that of another, but for times."""
  for name in BUNDLE:
    found, expected = ((x / name).read_bytes() for x in (folder, reference))
    assert found == expected, name
  found, expected = (
    json.loads((x / workdirs.SUMMARY).read_text()) for x in (folder, reference)
  )
  assert found.pop('milliseconds').keys() == expected.pop('milliseconds').keys()
  assert found == expected
  assert report.is_complete(epath.Path(folder))


@pytest.mark.parametrize(
  'name, how, said',
  [
    ('bundle/variables.safetensors', 'half', 'cannot be read'),
    pytest.param(
      *(
        'summary.json',
        'object',
        "cannot be read (KeyError: 'parameters')",
      ),
      marks=pytest.mark.slow,
    ),
    pytest.param(
      *('report.html', 'gone', 'report.md and what it shows are not all there'),
      marks=pytest.mark.slow,
    ),
  ],
)
def test_damage_is_said_and_made_again(
  run, finished_run, small_config, caplog, name, how, said
):
  caplog.set_level(logging.INFO)
  damage(run / name, how)
  train.train_and_evaluate(small_config(), run)
  assert said in caplog.text
  assert 'it is made again from the checkpoints' in caplog.text
  assert 'continues after step 12' in caplog.text
  assert_whole(run, finished_run[0])


# Each makes the end of a run.
@pytest.mark.slow
@pytest.mark.parametrize('how', DAMAGE)
def test_every_file_of_a_finished_run_may_be_damaged(
  run, finished_run, small_config, how
):
  names = sorted(
    str(path.relative_to(run))
    for folder in ('.', 'bundle', 'plots', 'tensorboard')
    for path in (run / folder).iterdir()
    if path.is_file()
  )
  assert set(names) > {*ENDS, 'metrics.jsonl', 'plots/losses.png'}
  for name in names:
    kept = (run / name).read_bytes()
    damage(run / name, how)
    try:
      train.train_and_evaluate(small_config(), run)
    except config_utils.UserError as error:
      # Nothing can be made from them, and nothing is.
      assert name in ('metrics.jsonl', 'config.json', 'run.json'), (name, error)
      (run / name).write_bytes(kept)
    if name in ('metrics.jsonl', 'config.json', 'run.json', 'report.html'):
      (run / name).write_bytes(kept)
    if how in ('empty', 'gone') and name in ENDS:
      assert (run / name).read_bytes(), name
    assert_whole(run, finished_run[0])


def test_what_is_made_again_by_other_code_says_so(run, small_config, caplog):
  path = run / workdirs.RECORD
  record = json.loads(path.read_text())
  record['versions']['jax'] = '0.0.1'
  path.write_text(json.dumps(record))
  damage(run / 'bundle/bundle.json', 'half')
  train.train_and_evaluate(small_config(), run)
  assert "versions.jax: '0.0.1' -> " in caplog.text
  assert json.loads(path.read_text())['versions']['jax'] != '0.0.1'


def test_whatever_a_summary_lacks_it_is_made_again(run, small_config):
  """But for what nobody prints."""
  exp = experiment.build(small_config())
  path = epath.Path(run) / workdirs.SUMMARY
  summary = json.loads(path.read_text())
  for key in summary:
    path.write_text(json.dumps({k: summary[k] for k in summary if k != key}))
    if not results._damage(exp, epath.Path(run)):
      report.table(disk.read_json(path))
  for text in ('', '{', '7', 'null', '"x"', '[]', '{}', '\udcff'):
    path.write_bytes(text.encode(errors='surrogateescape'))
    assert 'summary.json cannot be read' in results._damage(
      exp, epath.Path(run)
    )


def test_without_checkpoints_damage_is_an_error_and_no_new_start(
  run, small_config, caplog
):
  shutil.rmtree(run / 'checkpoints')
  (run / 'report.md').unlink()
  result = train.train_and_evaluate(small_config(), run)
  assert result.state is None
  assert 'no checkpoint to make them from' in caplog.text
  damage(run / 'bundle/variables.safetensors', 'half')
  before = (run / 'bundle/variables.safetensors').read_bytes()
  with pytest.raises(config_utils.UserError, match='no checkpoint to make it'):
    train.train_and_evaluate(small_config(), run)
  assert (run / 'bundle/variables.safetensors').read_bytes() == before
  assert not (run / 'checkpoints').exists()


def test_lost_rows_of_a_finished_run_are_said(run, small_config, caplog):
  rows = (run / 'metrics.jsonl').read_text().splitlines(keepends=True)
  (run / 'metrics.jsonl').write_text(''.join(rows[:-2]))
  result = train.train_and_evaluate(small_config(), run)
  assert len(result.history) == len(rows) - 2
  assert 'the last rows of metrics.jsonl are missing' in caplog.text


@pytest.mark.parametrize(
  'module, function, error',
  [
    (plots, 'draw', KeyError('x')),
    pytest.param(*(web_page, 'page', RecursionError()), marks=pytest.mark.slow),
    pytest.param(
      *(measure, 'measure', MemoryError('no room')), marks=pytest.mark.slow
    ),
  ],
)
def test_a_failed_report_costs_nothing_else(
  run, finished_run, small_config, caplog, monkeypatch, module, function, error
):
  def fail(*_, **__):
    raise error

  (run / 'summary.json').unlink()
  with monkeypatch.context() as patch:
    patch.setattr(module, function, fail)
    result = train.train_and_evaluate(small_config(), run)
  (line,) = (x.getMessage() for x in caplog.records if 'could not' in x.message)
  assert f'({type(error).__name__}: ' in line and '\n' not in line
  assert 'the same command tries again' in line
  assert result.summary['student'] == finished_run[1].summary['student']
  assert json.loads((run / 'summary.json').read_text())
  assert not (run / 'report.html').exists()
  train.train_and_evaluate(small_config(), run)
  assert_whole(run, finished_run[0])


def test_the_command_ends_well_without_a_report(
  monkeypatch, tmp_path, capsys, finished_run
):
  monkeypatch.setattr(
    train, 'train_and_evaluate', lambda *_, **__: finished_run[1]
  )
  argv = ['--config', 'digits', '--workdir', str(tmp_path)]
  assert main.main(argv) == 0
  out = capsys.readouterr().out
  assert 'report.md' not in out and f'student is in {tmp_path}/bundle' in out


class Disk:
  """Notes what is on the disk, by the inodes that were synchronised."""

  def __init__(self, monkeypatch):
    self.synced, self.renamed, self.early = set(), [], []
    sync, rename, replace = os.fsync, os.rename, os.replace

    def note_sync(file):
      sync(file)
      self.synced.add(os.fstat(file).st_ino)

    def noting(move):
      def note(source, target, **options):
        self.note(source, target)
        # Its names have changed: they are to be synchronised again.
        self.synced.discard(os.stat(os.path.dirname(target)).st_ino)
        move(source, target, **options)

      return note

    monkeypatch.setattr(os, 'fsync', note_sync)
    monkeypatch.setattr(os, 'rename', noting(rename))
    monkeypatch.setattr(os, 'replace', noting(replace))

  def note(self, source, target):
    self.renamed.append(pathlib.Path(target))
    self.early += self.lost(source)

  def lost(self, path):
    """Returns what of a file or folder is not on the disk."""
    path = pathlib.Path(path)
    return [x for x in (path, *path.rglob('*')) if not self.has(x)]

  def has(self, path):
    return path.stat().st_ino in self.synced


def test_what_is_written_outlives_a_power_cut(
  finished_run, tmp_path, monkeypatch
):
  bundle = bundles.load(finished_run[0])
  watched = Disk(monkeypatch)
  disk.write_text(epath.Path(tmp_path) / 'summary.json', '{}')
  bundle.save(tmp_path / 'bundle')
  report._write_pages(
    epath.Path(tmp_path),
    ['# T', '![t](plots/a.png)'],
    [plots.Section('t', 'a', {'png': b'png'}, '')],
    {},
  )
  names = {'summary.json', 'bundle', 'a.png', 'report.md', 'report.html'}
  assert {path.name for path in watched.renamed} == names
  assert watched.early == []
  for name in names - {'a.png'} | {'plots/a.png', '.', 'plots'}:
    assert watched.lost(tmp_path / name) == [], name
  # The old one goes only when the new one is there to stay.
  remove, seen = shutil.rmtree, []

  def rmtree(path, *args, **kwargs):
    seen.append(watched.lost(tmp_path / 'bundle') + watched.lost(tmp_path))
    remove(path, *args, **kwargs)

  monkeypatch.setattr(shutil, 'rmtree', rmtree)
  watched.early.clear()
  bundle.save(tmp_path / 'bundle')
  assert seen == [[]]


def test_a_checkpoint_is_on_the_disk_before_an_old_one_goes(
  tmp_path, monkeypatch
):
  folder = tmp_path / 'checkpoints'
  watched = Disk(monkeypatch)
  removed = []

  def note(source, target):
    if str(target).endswith('.removed'):
      removed.append(watched.lost(folder / '2'))

  watched.note = note
  test_checkpoints.fill(folder, {1: None, 2: None}, keep=1)
  assert removed == [[]]


def test_file_systems_that_cannot_sync_folders(tmp_path, monkeypatch):
  def refuse(file):
    raise OSError(22, 'Invalid argument')

  monkeypatch.setattr(os, 'fsync', refuse)
  disk.write_text(epath.Path(tmp_path) / 'a', 'x')
  assert (tmp_path / 'a').read_text() == 'x'

  def fail(file):
    raise OSError(5, 'Input/output error')

  monkeypatch.setattr(os, 'fsync', fail)
  with pytest.raises(OSError, match='Input/output'):
    disk.write_text(epath.Path(tmp_path) / 'a', 'y')
  assert [path.name for path in tmp_path.iterdir()] == ['a']
  assert (tmp_path / 'a').read_text() == 'x'


def test_old_checkpoints_of_a_killed_process_go(tmp_path):
  """Killed after it had saved step 4, before it removed steps 1 and 3."""
  folder = tmp_path / 'checkpoints'
  scores = {1: 0.5, 2: 0.9, 3: 0.1, 4: 0.2}
  test_checkpoints.fill(folder, scores, keep=9)
  store = checkpoints.Checkpoints(folder, keep=1)
  state, _ = store.restore_newest(test_checkpoints.make_state())
  assert int(state.step) == 4
  assert sorted(path.name for path in folder.iterdir()) == ['2', '4']
  assert store.best_step == 2
  np.testing.assert_array_equal(
    store.restore_best(state)[0].step, np.asarray(2)
  )
  store.close()


def test_old_checkpoints_stay_until_a_newer_one_is_read(tmp_path):
  folder = tmp_path / 'checkpoints'
  test_checkpoints.fill(folder, {1: None, 2: None, 3: None}, keep=9)
  test_checkpoints.damage(folder / '3' / 'manifest.ocdbt', 'empty')
  store = checkpoints.Checkpoints(folder, keep=1)
  state, _ = store.restore_newest(test_checkpoints.make_state())
  assert int(state.step) == 2
  assert sorted(p.name for p in folder.iterdir()) == ['2', 'damaged']
  store.close()


def test_a_run_that_goes_on_says_what_rows_it_lost_and_removes_what_is_old(
  run, small_config, caplog
):
  kept = sorted(path.name for path in (run / 'checkpoints').iterdir())
  oldest = min(kept, key=int)
  shutil.copytree(run / 'checkpoints' / oldest, run / 'checkpoints' / '1')
  (run / 'summary.json').unlink()
  metrics = run / 'metrics.jsonl'
  rows = metrics.read_text().splitlines(keepends=True)
  metrics.write_text(''.join(rows)[:-9])  # In the midst of the last one.
  result = train.train_and_evaluate(small_config(), run)
  assert sorted(path.name for path in (run / 'checkpoints').iterdir()) == kept
  said = f'1 of the {len(rows)} rows up to step 12 are missing'
  assert said in caplog.text
  assert metrics.read_text() == ''.join(rows[:-1])
  assert len(result.history) == len(rows) - 1


@pytest.mark.parametrize('num_lost', [0, 1, 3])
def test_rows_that_were_lost_are_counted(tmp_path, caplog, num_lost):
  path = tmp_path / 'metrics.jsonl'
  steps = (1, 2, 3, 9)[num_lost:]
  path.write_text(''.join(f'{{"step": {step}}}\n' for step in steps))
  metric_writer.JsonLinesWriter(path, resume_step=3, num_rows=3)
  said = f'{num_lost} of the 3 rows up to step 3 are missing'
  assert (said in caplog.text) == bool(num_lost)
  assert len(metric_writer.read_rows(path)) == 3 - num_lost
