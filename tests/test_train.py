"""Runs from end to end, on real data."""

import json
import os
import shutil
import signal
import time
import types

import jax
import numpy as np
import pytest

from ijckd_jax.bundles import bundles
from ijckd_jax.commands import evaluate
from ijckd_jax.data import input_pipeline
from ijckd_jax.runtime import config_utils
from ijckd_jax.runtime import workdirs
from ijckd_jax.training import checkpoints
from ijckd_jax.training import experiment
from ijckd_jax.training import loop
from ijckd_jax.training import metric_writer
from ijckd_jax.training import one_run
from ijckd_jax.training import results
from ijckd_jax.training import train

TIMES = 'train/images_per_second'


def leaves(state):
  return {
    jax.tree_util.keystr(path): np.asarray(leaf)
    for path, leaf in jax.tree_util.tree_leaves_with_path(state)
  }


def assert_same_bits(one, other):
  one, other = leaves(one), leaves(other)
  assert one.keys() == other.keys()
  for name, value in one.items():
    np.testing.assert_array_equal(value, other[name], err_msg=name)


def rows_without_times(workdir):
  rows = metric_writer.read_rows(workdir / workdirs.METRICS)
  return [{k: v for k, v in row.items() if k != TIMES} for row in rows]


class StopAt:
  """A writer that has the run stopped when a step's row comes."""

  def __init__(self, step, number=signal.SIGINT):
    self.step = step
    self.number = number

  def write(self, step, scalars):
    if step == self.step:
      os.kill(os.getpid(), self.number)

  def close(self):
    pass


def test_run_leaves_what_it_promises(finished_run):
  workdir, result = finished_run
  for folder in (workdir, workdir / 'teacher'):
    for name in workdirs.CONTENTS:
      # Outputs only where they are stored, a divergence where there was one,
      # heads where they are fitted, a student with its own head apart, and what
      # trackers were given where there are some.
      there = name not in (
        workdirs.TEACHER_OUTPUTS,
        workdirs.CONNECTED,
        workdirs.DIVERGED,
        workdirs.HEADS,
        workdirs.TRACKED,
      )
      assert (folder / name).exists() == there, name
  summary = json.loads((workdir / workdirs.SUMMARY).read_text())
  assert summary == json.loads(json.dumps(result.summary))
  steps = [row['step'] for row in result.history if 'train/loss' in row]
  assert steps == [5, 10, 12]
  steps = [row['step'] for row in result.history if 'test/top1' in row]
  assert steps == [4, 8, 12]
  best = max(row.get('test/top1', 0) for row in result.history)
  assert summary['student']['best']['top1'] == best
  last = result.history[-1]['test/top1']
  assert summary['student']['last']['top1'] == last
  teacher = json.loads((workdir / 'teacher' / workdirs.SUMMARY).read_text())
  assert summary['teacher']['top1'] == teacher['student']['last']['top1']
  seconds = summary['training_seconds']
  assert 0 < seconds['student'] < 1e4
  assert seconds['teacher'] == teacher['training_seconds']['student']
  assert teacher['training_seconds']['teacher'] is None
  for who, times in summary['milliseconds'].items():
    assert [*times] == ['1', '64'] and min(times.values()) > 0, who
  size = sum(x.nbytes for x in jax.tree.leaves(result.bundle.variables))
  assert summary['weight_bytes']['student'] == size
  assert (
    summary['weight_bytes']['teacher'] == (teacher['weight_bytes']['student'])
  )
  assert set(os.listdir(workdir / 'checkpoints')) >= {'8', '12'}


def test_logged_terms_add_up_to_the_loss(finished_run):
  _, result = finished_run
  rows = [row for row in result.history if 'train/loss' in row]
  for row in rows:
    total = sum(
      row[f'train/{t}'] for t in ('cross_entropy', 'logit', 'feature')
    )
    np.testing.assert_allclose(row['train/loss'], total, rtol=1e-5)


def test_second_start_finds_the_finished_run(finished_run, small_config):
  workdir, first = finished_run
  before = (workdir / workdirs.SUMMARY).stat().st_mtime_ns
  second = train.train_and_evaluate(small_config(), workdir)
  assert (workdir / workdirs.SUMMARY).stat().st_mtime_ns == before
  assert second.state is None
  assert second.summary['student'] == first.summary['student']
  assert_same_bits(second.bundle.variables, first.bundle.variables)


def test_run_of_a_version_with_fewer_fields_is_found(
  finished_run, small_config, tmp_path
):
  """It did what the field's default does, and nothing else."""
  workdir = shutil.copytree(finished_run[0], tmp_path / 'run')
  for file in workdir.rglob(workdirs.CONFIG):
    config = json.loads(file.read_text())
    assert config.pop('unbiased_variance') is False
    assert config['teacher'].pop('store')['views'] == 0
    assert config.pop('augment')['randaugment_layers'] == 0
    file.write_text(json.dumps(config))
  found = train.train_and_evaluate(small_config(), workdir)
  assert found.state is None
  with pytest.raises(config_utils.UserError, match='unbiased_variance: False'):
    train.train_and_evaluate(small_config(unbiased_variance=True), workdir)
  stored = small_config(**{'teacher.store.views': 1})
  with pytest.raises(config_utils.UserError, match='teacher.store.views: 0'):
    train.train_and_evaluate(stored, workdir)


@pytest.mark.parametrize(
  'stop_at',
  [
    pytest.param(StopAt(5), id='log'),
    # By SIGTERM; test_main.py interrupts the command.
    pytest.param(StopAt(8, signal.SIGTERM), id='eval', marks=pytest.mark.slow),
  ],
)
def test_stopped_run_continues_to_the_same_bits(
  finished_run, small_config, tmp_path, stop_at, monkeypatch
):
  reference_dir, reference = finished_run
  teacher = bundles.load(reference_dir / 'teacher').teacher()
  clock = time.perf_counter
  with (
    monkeypatch.context() as patch,
    pytest.raises(loop.Interrupted, match='the same command continues'),
  ):
    patch.setattr(time, 'perf_counter', lambda: 1e6 * clock())
    train.train_and_evaluate(
      small_config(), tmp_path, teacher=teacher, writers=[stop_at]
    )
  assert not (tmp_path / workdirs.SUMMARY).exists()
  result = train.train_and_evaluate(small_config(), tmp_path, teacher=teacher)
  assert_same_bits(result.state, reference.state)
  assert rows_without_times(tmp_path) == rows_without_times(reference_dir)
  same, other = result.summary, reference.summary
  assert same.keys() == other.keys()
  names = ('student', 'teacher', 'parameters', 'multiply_adds', 'weight_bytes')
  assert [same[x] for x in names] == [other[x] for x in names]
  # By the fast clock of the first part, which counts.
  assert same['training_seconds']['student'] > 1e4


def test_another_seed_is_another_run(finished_run, small_config, tmp_path):
  """That the same seed gives the same bits is shown by stopped runs."""
  workdir, reference = finished_run
  teacher = bundles.load(workdir / 'teacher').teacher()
  result = train.train_and_evaluate(
    small_config(seed=1), tmp_path, teacher=teacher
  )
  equal = jax.tree.map(
    lambda a, b: bool(np.array_equal(a, b)),
    result.state.params['connector'],
    reference.state.params['connector'],
  )
  assert not all(jax.tree.leaves(equal))


def test_teacher_is_trained_as_a_run_of_its_own(finished_run, small_config):
  workdir, _ = finished_run
  config = json.loads((workdir / 'teacher' / workdirs.CONFIG).read_text())
  assert config['method'] == {'name': 'ce', 'add': ''}
  assert config['student']['backbone'] == 'plain'
  assert config['total_steps'] == small_config().total_steps


def test_bundle_alone_gives_the_same_accuracy(finished_run, data_dir, capsys):
  workdir, result = finished_run
  evaluate.main(
    ['--bundle', str(workdir), '--dataset', 'digits', '--data_dir', data_dir]
    + ['--json']
  )
  printed = json.loads(capsys.readouterr().out)
  expected = result.summary['student']['last']
  assert printed['network']['top1'] == expected['top1']
  # The program without a teacher is another one, and rounds otherwise.
  assert printed['network'] == pytest.approx(
    {k: expected[k] for k in printed['network']}
  )
  evaluate.main(
    ['--bundle', str(workdir / 'bundle'), '--data_dir', data_dir, '--json']
    + ['--teacher', str(workdir / 'teacher')]
  )
  printed = json.loads(capsys.readouterr().out)
  assert printed['student']['agreement'] == expected['agreement']
  assert printed['teacher'] == result.summary['teacher']


@pytest.mark.slow
def test_distilled_student_can_be_the_next_teacher(
  finished_run, small_config, tmp_path
):
  workdir, reference = finished_run
  config = small_config(total_steps=4)
  config.teacher.checkpoint = str(workdir)
  result = train.train_and_evaluate(config, tmp_path)
  assert not (tmp_path / 'teacher').exists()
  teacher = result.summary['teacher']
  expected = reference.summary['student']['last']
  # Other programs have summed them.
  assert teacher == pytest.approx({name: expected[name] for name in teacher})
  assert teacher['top1'] == expected['top1']
  np.testing.assert_array_equal(
    result.bundle.variables['params']['head']['kernel'],
    reference.bundle.variables['params']['head']['kernel'],
  )


def test_non_finite_loss_stops_and_keeps_the_last_good_checkpoint(
  finished_run, small_config, tmp_path
):
  workdir, _ = finished_run
  config = small_config()
  config.teacher.checkpoint = str(workdir / 'teacher')
  config.optimizer.schedule = 'step'
  config.optimizer.learning_rate = 0.05
  # A rate that is fine for a while, then is not.
  steps_per_epoch = 1437 / config.batch_size
  config.optimizer.decay_epochs = (9 / steps_per_epoch,)
  config.optimizer.decay_factor = 1e30
  with pytest.raises(loop.Diverged, match=r'step 1[12]: .*loss = (nan|inf)'):
    train.train_and_evaluate(config, tmp_path)
  kept = sorted(map(int, os.listdir(tmp_path / 'checkpoints')))
  assert kept[-1] == 8
  assert not (tmp_path / workdirs.SUMMARY).exists()
  steps = [
    row['step'] for row in metric_writer.read_rows(tmp_path / 'metrics.jsonl')
  ]
  assert max(steps) <= 10
  described = json.loads((tmp_path / workdirs.DIVERGED).read_text())
  assert described['step'] in (11, 12)
  assert any('loss = ' in what for what in described['what'])
  # The batch, by the stream's definition: an order of its own in each epoch.
  order = input_pipeline.permutation(config.seed, 0, 1437)
  first = (described['step'] - 1) * config.batch_size
  rows = order[first : first + config.batch_size]
  assert described['indices'] == rows.tolist()
  assert described['epochs'] == [0] * config.batch_size
  # What the file says: the state before the step, and then the step alone.
  config.checkpoint_steps = 1
  for _ in range(2):
    with pytest.raises(loop.Diverged, match=f'step {described["step"]}: '):
      train.train_and_evaluate(config, tmp_path)
    kept = sorted(map(int, os.listdir(tmp_path / 'checkpoints')))
    assert kept[-1] == described['step'] - 1


@pytest.mark.slow
def test_ema_is_what_is_evaluated_and_the_raw_student_stands_beside_it(
  finished_run, small_config, tmp_path
):
  workdir, _ = finished_run
  config = small_config(total_steps=4, ema_decay=0.9)
  config.teacher.checkpoint = str(workdir / 'teacher')
  result = train.train_and_evaluate(config, tmp_path)
  assert {'last', 'last_without_ema'} <= result.summary['student'].keys()
  kernel = result.bundle.variables['params']['connector']['Conv_0']['kernel']
  np.testing.assert_array_equal(
    kernel, result.state.ema['params']['connector']['Conv_0']['kernel']
  )
  assert not np.array_equal(
    kernel, result.state.params['connector']['Conv_0']['kernel']
  )


def assert_deployed(result, method):
  """Asserts that a student was compared with its teacher, and what is kept."""
  assert 0 <= result.summary['student']['last']['agreement'] <= 1
  deployed = result.bundle.variables['params']
  assert ('connector' in deployed) == (method == 'simkd')
  assert deployed['head']['kernel'].shape == (32, 10)


# A whole run; their losses and gradients are tested in test_methods.py, and
# runs of 'ijckd', 'srrl' and 'kd' in test_bound_reports.py.
@pytest.mark.slow
@pytest.mark.parametrize('method', ['kd', 'srrl', 'simkd'])
def test_every_method_runs(method, finished_run, small_config, tmp_path):
  workdir, _ = finished_run
  config = small_config(method, total_steps=4)
  config.teacher.checkpoint = str(workdir / 'teacher')
  assert_deployed(train.train_and_evaluate(config, tmp_path), method)


class Tracker:
  """A tracker that the caller gives."""

  def __init__(self):
    self.rows = []
    self.closed = 0

  def write(self, step, scalars):
    self.rows.append({'step': step, **scalars})

  def close(self):
    self.closed += 1


class Recorder(Tracker):
  """A tracker that a config names: made from (config, workdir)."""

  made = []

  def __init__(self, config, workdir):
    super().__init__()
    self.about = config['student']['backbone'], workdir
    self.made.append(self)


class Watch(Tracker):
  """Notes at each flush what lies on the disk."""

  def __init__(self, workdir):
    super().__init__()
    self.workdir = workdir
    self.seen = []

  def flush(self):
    rows = metric_writer.read_rows(self.workdir / workdirs.METRICS)
    step = self.rows[-1]['step']
    there = (self.workdir / 'checkpoints' / str(step)).exists()
    self.seen.append((step, rows[-1]['step'], there))


@pytest.fixture(scope='module')
def watched(finished_run, small_config, tmp_path_factory):
  """Result and folder of a run of 'ce', and the writers that it was given."""
  config = small_config('ce', total_steps=4)
  config.teacher.checkpoint = str(finished_run[0] / 'teacher')
  config.writers = (f'{__name__}:Recorder',)
  workdir = tmp_path_factory.mktemp('watched')
  writers = [Tracker(), Watch(workdir)]
  result = train.train_and_evaluate(config, workdir, writers=writers)
  return result, workdir, writers


def test_one_that_learns_alone_is_compared_with_the_teacher_too(watched):
  assert_deployed(watched[0], 'ce')


def test_external_writers_are_fed_and_closed(watched):
  result, _, writers = watched
  for writer in writers:
    assert writer.rows == result.history
    assert writer.closed == 1


def test_config_names_a_writer(watched):
  result, workdir, _ = watched
  (tracker,) = Recorder.made
  assert tracker.about == ('plain', str(workdir))
  assert (tracker.rows, tracker.closed) == (result.history, 1)


def test_metrics_are_on_the_disk_before_a_checkpoint_of_their_step(watched):
  _, _, (_, watch) = watched
  assert watch.seen[0] == (4, 4, False)


@pytest.mark.slow
def test_best_is_chosen_on_the_validation_split(
  finished_run, small_config, tmp_path
):
  workdir, _ = finished_run
  config = small_config(bundle='best', total_steps=32, keep_checkpoints=1)
  config.dataset.validation_fraction = 0.2
  config.teacher.checkpoint = str(workdir / 'teacher')
  # Learns for 24 steps, and is then spoilt.
  config.optimizer.decay_epochs = (24 * config.batch_size / 1150,)
  config.optimizer.decay_factor = 20.0
  result = train.train_and_evaluate(config, tmp_path)
  scores = {
    row['step']: row['validation/top1']
    for row in result.history
    if 'validation/top1' in row
  }
  assert not any('test/top1' in row for row in result.history)
  best = max(scores, key=lambda step: (scores[step], step))
  assert result.summary['best_step'] == best < 32
  kept = {int(path.name) for path in (tmp_path / 'checkpoints').glob('[0-9]*')}
  assert kept == {best, 32}
  assert result.summary['best_by'] == 'validation'
  student = result.summary['student']
  assert student['best'] != student['last']
  assert result.bundle.info['which'] == 'best'
  assert result.bundle.info['test'] == student['best']


def test_average_of_the_parameters_by_hand(
  finished_run, small_config, tmp_path
):
  """Its memory grows as (1 + step) / (10 + step), up to the decay."""
  workdir, _ = finished_run
  config = small_config('ce', ema_decay=0.15, total_steps=3)
  config.checkpoint_steps = 1
  config.keep_checkpoints = 4
  config.teacher.checkpoint = str(workdir / 'teacher')
  result = train.train_and_evaluate(config, tmp_path)
  store = checkpoints.Checkpoints(tmp_path / 'checkpoints', keep=4)
  states = [store.restore(step, result.state)[0] for step in (1, 2, 3)]
  store.close()
  kernels = [np.asarray(s.params['head']['kernel']) for s in states]
  averages = [np.asarray(s.ema['params']['head']['kernel']) for s in states]
  for decay, old, new, average in zip(
    (0.15, 0.15), averages, kernels[1:], averages[1:], strict=False
  ):
    expected = decay * old + (1 - decay) * new
    np.testing.assert_allclose(average, expected, rtol=1e-5, atol=1e-7)
  # The first of them still knows more of the second than of the start.
  start = (averages[0] - 0.9 * kernels[0]) / 0.1
  assert np.abs(start).max() <= 1 / np.sqrt(kernels[0].shape[0]) + 1e-6


def test_rows_past_the_restored_step_are_dropped(tmp_path):
  path = tmp_path / 'metrics.jsonl'
  path.write_text('{"step": 1, "a": 1}\n{"step": 4, "a": 2}\n{"step": 5, "a')
  writer = metric_writer.JsonLinesWriter(path, resume_step=3)
  writer.write(4, {'a': 3})
  writer.close()
  assert metric_writer.read_rows(path) == [
    {'step': 1, 'a': 1},
    {'step': 4, 'a': 3},
  ]


@pytest.mark.parametrize('line', ['not JSON', '7', '{"a": 1}', '{"step": "x"}'])
def test_damaged_metrics_are_not_thrown_away(tmp_path, line):
  path = tmp_path / 'metrics.jsonl'
  path.write_text(f'{line}\n{{"step": 4}}\n')
  with pytest.raises(config_utils.UserError, match='line 1'):
    metric_writer.JsonLinesWriter(path, resume_step=9)
  assert path.read_text().startswith(line)


def test_parameters_that_are_not_finite_are_not_saved():
  class State:
    params = {'head': {'kernel': np.array([1.0, np.inf])}}

  with pytest.raises(loop.Diverged, match=r"step 7.*\['kernel'\]"):
    loop._check_finite(7, State)


@pytest.mark.slow
def test_changed_teacher_is_another_run(finished_run, small_config, tmp_path):
  workdir, _ = finished_run
  loaded = bundles.load(workdir / 'teacher')
  config = small_config('kd', total_steps=4)
  train.train_and_evaluate(config, tmp_path, teacher=loaded.teacher())
  loaded.variables['params']['head']['bias'] = -np.asarray(
    loaded.variables['params']['head']['bias']
  )
  with pytest.raises(config_utils.UserError, match='teacher.fingerprint'):
    train.train_and_evaluate(config, tmp_path, teacher=loaded.teacher())


@pytest.mark.slow
def test_summary_lost_is_made_again(finished_run, small_config, tmp_path):
  workdir, _ = finished_run
  config = small_config(total_steps=4)
  config.teacher.checkpoint = str(workdir / 'teacher')
  first = train.train_and_evaluate(config, tmp_path)
  (tmp_path / workdirs.SUMMARY).write_text('{"half')
  second = train.train_and_evaluate(config, tmp_path)
  assert second.summary['student'] == first.summary['student']
  assert json.loads((tmp_path / workdirs.SUMMARY).read_text())


def test_teacher_does_not_start_as_its_student(finished_run):
  """They have the same backbone here, and yet nothing in common."""
  workdir, result = finished_run
  config = json.loads((workdir / 'config.json').read_text())
  teacher = json.loads((workdir / 'teacher' / 'config.json').read_text())
  assert teacher['seed'] == config['teacher']['seed'] != config['seed']


@pytest.mark.parametrize(
  'student, few, enough, percent',
  [('resnet8', 43, 44, 1), ('mobilenet_v3_small', 188, 459, 15)],
)
def test_too_few_steps_for_batch_norm_are_told(
  small_config, tmp_path, caplog, student, few, enough, percent
):
  """MobileNetV3 keeps 0.99 of its running statistics at a step, others 0.9."""
  for num_steps in (enough, few):
    assert not caplog.text
    config = small_config(
      'ce', **{'student.backbone': student}, total_steps=num_steps
    )
    one_run._warn_of_unsettled_statistics(
      experiment.build(config), tmp_path, num_examples=1437
    )
  assert f'{percent}% of them will be what they started as' in caplog.text
  assert f'{enough} steps leave less than 1%' in caplog.text


@pytest.mark.parametrize('nll, is_said', [(2.30, False), (2.31, True)])
def test_a_student_worse_than_guessing_is_warned_of(nll, is_said, caplog):
  """Of ten classes; log(10) is 2.303."""
  dataset = types.SimpleNamespace(class_names=tuple('abcdefghij'))
  results._warn_of_ruin(nll, types.SimpleNamespace(dataset=dataset), 'W')
  assert ('that of guessing 2.303' in caplog.text) == is_said
