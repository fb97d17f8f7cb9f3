"""Runs whose joint classifier is fitted, before and between."""

import dataclasses
import shutil

import jax
import numpy as np
import pytest

import ijckd_jax
from ijckd_jax.bundles import bundles
from ijckd_jax.runtime import config_utils
from ijckd_jax.runtime import workdirs
from ijckd_jax.training import experiment
from ijckd_jax.training import head_fitting
from ijckd_jax.training import loop
from ijckd_jax.training import train
from tests import test_train as runs


@pytest.fixture
def config_of(finished_run, small_config):
  """Returns a function that gives a config with a teacher that is there."""
  folder = finished_run[0] / 'teacher'

  def make(method='ijckd', **fields):
    return small_config(
      method,
      **{
        'teacher.checkpoint': str(folder),
        'optimizer.learning_rate': 0.01,
        **fields,
      },
    )

  return make


def test_a_head_is_fitted_on_the_teachers_features(config_of, tmp_path):
  """Of all training images and of views of them, and then it is the joint one.

  What is held out, and the numbers of the fit, are in the summary.
  """
  fields = {'teacher.head': 'fit', 'teacher.head_views': 1}
  result = train.train_and_evaluate(config_of(**fields), tmp_path)
  (report,) = result.summary['heads']
  assert report['examples'] == 2 * 1437
  assert report['held_out'] == 2 * 143
  fitted = head_fitting.load(
    tmp_path / workdirs.HEADS / 'teacher_0.safetensors'
  )
  assert fitted.report == report
  given = result.bundle.variables['params']['head']
  np.testing.assert_array_equal(given['kernel'], fitted.kernel)
  np.testing.assert_array_equal(given['bias'], fitted.bias)
  # The teacher is judged by it.
  teacher = bundles.load(config_of().teacher.checkpoint).teacher()
  exp = experiment.build(config_of())
  test = exp.dataset.load('test')
  pooled = np.asarray(teacher(teacher.arrays, test.images).pooled)
  right = (pooled @ fitted.kernel + fitted.bias).argmax(-1) == test.labels
  assert result.summary['teacher']['top1'] == pytest.approx(right.mean())
  # It is no worse than what the teacher was trained with, on what both saw.
  assert report['train_top1'] > 0.9


def test_the_views_of_a_fit_are_those_of_the_run(config_of):
  """Image by image those of its first epochs, whatever the batches."""
  config = config_of(**{'dataset.crop_padding': 1, 'batch_size': 40})
  exp = experiment.build(config)
  arrays = exp.dataset.load('train')
  (rows,) = head_fitting.features(
    [lambda own, images: images.reshape(len(images), -1).astype('float32')],
    [()],
    arrays,
    exp,
    views=2,
  )
  number = len(arrays)
  assert len(rows) == 3 * number
  np.testing.assert_array_equal(rows.images, np.tile(np.arange(number), 3))
  np.testing.assert_array_equal(rows.labels, np.tile(arrays.labels, 3))
  for view, part in enumerate(np.split(rows.pooled, 3), -1):
    images = arrays.images
    if view >= 0:
      key = jax.random.fold_in(jax.random.key(config.seed), 0)
      indices = np.arange(number)
      images = exp.augmentation(
        key, images, np.full(number, view, np.int32), indices
      )
    np.testing.assert_array_equal(part, np.asarray(images).reshape(number, -1))


@pytest.mark.slow
def test_a_teacher_of_other_classes_and_few_labels(config_of, data_dir):
  """A subset is labelled, of half of the classes; the rest is learned from."""
  digits = experiment.build(config_of()).dataset
  splits = {name: digits.load(name) for name in ('train', 'test')}
  chosen = {name: split.labels < 5 for name, split in splits.items()}
  made = {
    name: ijckd_jax.Arrays(
      split.images[chosen[name]], split.labels[chosen[name]]
    )
    for name, split in splits.items()
  }
  labels = np.where(
    np.arange(len(made['train'].labels)) < 100, made['train'].labels, -1
  )
  made['train'] = ijckd_jax.Arrays(made['train'].images, labels)
  data = ijckd_jax.ArrayDataset(
    **made,
    class_names=tuple('abcde'),
    mean=digits.mean,
    std=digits.std,
  )
  settings = {'total_steps': 30, 'total_epochs': 0.0, 'batch_size': 48}
  fields = {
    'teacher': config_of().teacher.checkpoint,
    'student': 'resnet8',
    'data': data,
  }
  with pytest.raises(config_utils.UserError, match='teacher.head=fit fit it a'):
    ijckd_jax.distill(**fields, settings=settings)
  result = ijckd_jax.distill(
    **fields, settings={**settings, 'teacher.head': 'fit'}
  )
  assert result.summary['heads'][0]['examples'] == 100
  assert result.summary['teacher']['top1'] > 0.8
  assert len(result.bundle.class_names) == 5


REFIT = {
  'teacher.refit': 'joint',
  # After steps 5 and 8 of 12.
  'teacher.refit_epochs': (5 * 48 / 1437, 8 * 48 / 1437),
}


@pytest.fixture(scope='module')
def refitted(tmp_path_factory, finished_run, small_config):
  """The folder of a run whose head is fitted again, and its Result."""
  workdir = tmp_path_factory.mktemp('refit') / 'run'
  config = small_config(
    **{
      'teacher.checkpoint': str(finished_run[0] / 'teacher'),
      'optimizer.learning_rate': 0.01,
      'bundle': 'best',
      **REFIT,
    }
  )
  return workdir, config, train.train_and_evaluate(config, workdir)


def head_file(workdir, step):
  return workdir / workdirs.HEADS / f'step_{step:08}.safetensors'


# A whole run whose head is fitted again.
@pytest.mark.slow
def test_the_joint_head_is_fitted_on_both(refitted, finished_run):
  workdir, config, result = refitted
  made = {step: head_fitting.load(head_file(workdir, step)) for step in (5, 8)}
  for fitted in made.values():
    assert fitted.report['examples'] == 2 * 1437  # Teacher and student.
  own = bundles.load(finished_run[0] / 'teacher').variables['params']['head']
  exp = experiment.build(config)
  refits = head_fitting.Refits(exp, workdir, {'train': range(1437)})
  frozen = exp.mapper.replicate(exp.frozen)
  # A student of step 5 was trained through the head of the start.
  for step, wanted in (
    (4, own),
    (5, own),
    (6, made[5].head),
    (8, made[5].head),
    (9, made[8].head),
  ):
    given = refits.before(step, frozen).joint['head']
    np.testing.assert_array_equal(given['kernel'], wanted['kernel'])
  # The bundle has the head that its student was trained with.
  best = result.summary['best_step']
  wanted = refits.before(best, frozen).joint['head']['kernel']
  given = result.bundle.variables['params']['head']['kernel']
  np.testing.assert_array_equal(given, wanted)


# Runs whose head is fitted again; that a stopped run continues to the same bits
# is in test_train.py, and the fit itself below.
@pytest.mark.slow
@pytest.mark.parametrize('row', [4, 10])
def test_a_run_goes_on_with_the_head_that_it_had(refitted, tmp_path, row):
  """Also where it was stopped before the head was fitted that was due."""
  workdir, config, reference = refitted
  stop = runs.StopAt(row)  # It stops after the step that follows.
  with pytest.raises(loop.Interrupted):
    train.train_and_evaluate(config, tmp_path / 'run', writers=[stop])
  assert head_file(tmp_path / 'run', 5).exists() == (row > 4)
  result = train.train_and_evaluate(config, tmp_path / 'run')
  runs.assert_same_bits(result.state, reference.state)
  for step in (5, 8):
    one, other = (
      head_fitting.load(head_file(folder, step))
      for folder in (workdir, tmp_path / 'run')
    )
    np.testing.assert_array_equal(one.kernel, other.kernel)
  assert result.summary['student'] == reference.summary['student']


# As the runs above.
@pytest.mark.slow
def test_a_damaged_head_is_named(refitted, tmp_path):
  workdir, config, _ = refitted
  copy = shutil.copytree(workdir, tmp_path / 'run')
  path = head_file(copy, 8)
  path.write_bytes(path.read_bytes()[:-10])
  with pytest.raises(config_utils.UserError, match='step_00000008.*is damaged'):
    head_fitting.load(path)
  (copy / workdirs.SUMMARY).unlink()
  with pytest.raises(config_utils.UserError, match='remove it, and it is fit'):
    train.train_and_evaluate(config, copy)


@pytest.mark.slow
def test_overwrite_removes_heads(config_of, tmp_path):
  """Of another config they would be wrong ones."""
  fields = {'teacher.head': 'fit', 'total_steps': 4}
  train.train_and_evaluate(config_of(**fields), tmp_path)
  old = head_fitting.load(tmp_path / workdirs.HEADS / 'teacher_0.safetensors')
  fields['teacher.head_views'] = 1
  train.train_and_evaluate(config_of(**fields), tmp_path, overwrite=True)
  new = head_fitting.load(tmp_path / workdirs.HEADS / 'teacher_0.safetensors')
  assert new.report['examples'] == 2 * old.report['examples']


@pytest.mark.parametrize(
  'fields, said',
  [
    ({'teacher.head': 'fitt'}, "unknown teacher.head 'fitt'"),
    ({'teacher.refit': 'join'}, "unknown teacher.refit 'join'"),
    ({'teacher.head': 'fit', 'teacher.checkpoint': ''}, 'give teacher.checkpo'),
    ({'teacher.head_views': 1}, 'set teacher.head=fit'),
    ({'teacher.head': 'fit', 'teacher.head_views': -1}, 'cannot be negative'),
    ({'teacher.refit': 'joint'}, 'teacher.refit_epochs go together'),
    ({'teacher.refit_epochs': (1.0,)}, 'go together'),
    (
      {'teacher.refit': 'joint', 'teacher.refit_epochs': (2.0, 1.0)},
      'give them in their order',
    ),
    ({**REFIT, 'teacher.store.views': 1}, 'set teacher.store.views=0'),
  ],
)
def test_what_cannot_be_is_said(config_of, tmp_path, fields, said):
  config = config_of(**fields)
  with pytest.raises(config_utils.UserError, match=said):
    train.train_and_evaluate(config, tmp_path / 'run')
  assert not (tmp_path / 'run').exists()


def test_refit_is_for_students_that_use_the_head(config_of, tmp_path):
  with pytest.raises(config_utils.UserError, match='as that of kd does not'):
    train.train_and_evaluate(config_of('kd', **REFIT), tmp_path / 'run')


def test_a_head_of_another_width_is_refused(config_of, finished_run, tmp_path):
  teacher = bundles.load(finished_run[0] / 'teacher').teacher()
  kernel = np.zeros((teacher.num_features + 1, 10), np.float32)
  wrong = dataclasses.replace(
    teacher, head={'kernel': kernel, 'bias': np.zeros(10, np.float32)}
  )
  with pytest.raises(
    config_utils.UserError, match=r'its head is \(33, 10\), but its pooled feat'
  ):
    train.train_and_evaluate(config_of(), tmp_path / 'run', teacher=wrong)
