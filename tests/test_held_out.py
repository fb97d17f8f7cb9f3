"""Images that certify are held out: no copies, nothing trained or chosen."""

import dataclasses
import math

import numpy as np
import pytest

import ijckd_jax
from ijckd_jax.bounds import certify
from ijckd_jax.bounds import held_out
from ijckd_jax.bounds import limits
from ijckd_jax.bundles import bundles
from ijckd_jax.data import duplicates
from ijckd_jax.data.datasets import digits
from ijckd_jax.evaluation import pointwise
from ijckd_jax.runtime import config_utils
from ijckd_jax.runtime import disk
from ijckd_jax.runtime import workdirs
from ijckd_jax.training import train


def arrays(*values):
  """Returns images of a pixel each."""
  images = np.array(values, np.uint8).reshape(-1, 1, 1, 1)
  return ijckd_jax.Arrays(images, np.zeros(len(values), np.int32))


class Files:
  """Encoded images, as Photos reads them."""

  in_memory = False

  def __init__(self, *images, sources=(), rows=()):
    self._images = images
    self.sources = sources or (object(),)
    self.rows = np.array(rows)

  def __len__(self):
    return len(self._images)

  def read(self, index):
    return {'image': self._images[index]}


def test_copies_by_hand():
  trained = [arrays(1, 7), arrays(7, 5), None]
  images = arrays(3, 5, 3, 7, 5, 3)
  found = duplicates.find(images, trained)
  assert images.images[found.kept].ravel().tolist() == [3]
  assert found.report() == {
    'images': 6,
    'repeated': 3,
    'trained': 2,
    'kept': 1,
    'unknown': 1,
  }
  alone = duplicates.find(arrays(3, 5, 3), [])
  assert (alone.num_repeated, alone.num_trained, alone.num_unknown) == (1, 0, 0)
  beside = duplicates.find(arrays(3, 5, 6), [arrays(6)], [arrays(5, 8)])
  assert beside.kept.tolist() == [True, False, False]
  assert (beside.num_repeated, beside.num_trained) == (1, 1)


def test_pixels_of_another_type_are_compared_all_the_same():
  images = arrays(3, 5)
  floats = ijckd_jax.Arrays(images.images.astype(np.float32), images.labels)
  assert duplicates.find(floats, [images]).num_trained == 2


def test_nothing_is_left():
  found = duplicates.find(arrays(3), [], [arrays(3)])
  with pytest.raises(config_utils.UserError, match='these: none is left'):
    held_out.check(found, 'these')


def test_the_copy_that_is_kept_is_drawn():
  """Not the first of a file, which may be sorted by class."""
  kept = duplicates.find(arrays(*np.repeat(range(100), 2)), []).kept
  assert kept.reshape(-1, 2).sum(axis=1).tolist() == [1] * 100
  assert 20 < kept[::2].sum() < 80


def test_files_are_compared_with_files():
  """By their bytes; pixels are not decoded to be compared with them."""
  files = Files(b'a', b'bc', b'a')
  found = duplicates.find(files, [arrays(3), Files(b'bc', b'd')])
  assert not found.kept[1] and found.kept.sum() == 1
  assert (found.num_repeated, found.num_trained, found.num_unknown) == (1, 1, 1)


def test_too_many_files_are_not_read(monkeypatch):
  monkeypatch.setattr(duplicates, 'MAX_ENCODED', 1)
  files = Files(b'a', b'b')
  found = duplicates.find(Files(b'a'), [files])
  assert (found.num_trained, found.num_unknown) == (0, 1)


def test_parts_of_one_source_are_compared_by_their_rows(monkeypatch):
  """However many there are; more sources may stand behind."""
  monkeypatch.setattr(duplicates, 'MAX_ENCODED', 1)
  held = Files(b'a', b'b', b'c', sources=('train',), rows=(4, 6, 9))
  trained = Files(
    *b'123456', sources=('train', 'heap'), rows=(1, 2, 6, 9, 10, 11)
  )
  found = duplicates.find(held, [trained])
  assert found.kept.tolist() == [True, False, False]
  assert (found.num_trained, found.num_unknown) == (2, 0)


def test_images_of_other_shapes_are_not_compared():
  wide = ijckd_jax.Arrays(np.zeros((1, 1, 2, 1), np.uint8), np.zeros(1, int))
  assert duplicates.find(arrays(0), [wide]).num_unknown == 1


def test_a_split_that_was_trained_on_is_refused():
  few = duplicates.find(arrays(*range(20)), [arrays(3, 4)])
  held_out.check(few, 'these')
  many = duplicates.find(arrays(*range(20)), [arrays(3, 4, 5)])
  with pytest.raises(
    config_utils.UserError, match='was trained on 3 of the 20 images'
  ):
    held_out.check(many, 'these')
  # Copies of a few training images are no dilution.
  copies = duplicates.find(arrays(*[3] * 20, 7), [arrays(3)])
  with pytest.raises(config_utils.UserError, match='1 of the 2 images'):
    held_out.check(copies, 'these')


def test_choices_that_a_bundle_records():
  run = {'best_by': 'test', 'steps': 500}
  info = {'run': {**run, 'choices': 7}}
  assert held_out.choices(info, 'test') == 7
  assert held_out.choices(info, 'validation') == 1
  # Older bundles do not say among how many.
  assert held_out.choices({'run': run}, 'test') == 1
  assert held_out.choices({'run': run, 'which': 'best'}, 'test') == 500
  assert held_out.choices({'run': run, 'which': 'last'}, 'test') == 1
  for nothing in ({}, {'run': None}, {'run': [1]}):
    assert held_out.choices(nothing, 'test') == 1
  for damaged in (0, -1, 1.5, '3', True, None, 10**400):
    info = {'run': {'best_by': 'test', 'choices': damaged}, 'which': 'best'}
    with pytest.raises(config_utils.UserError, match='it is damaged'):
      held_out.choices(info, 'test')


def test_other_fields_hold_out_other_images():
  made_on = {'name': 'digits', 'validation_fraction': 0.1, 'data_dir': 'a'}
  info = {'dataset': made_on}
  same = {**made_on, 'data_dir': 'b'}
  other = {**same, 'validation_fraction': 0.5}
  held_out.check_fields(info, same, 'validation')
  held_out.check_fields(info, other, 'test')
  held_out.check_fields(info, {**other, 'name': 'mine'}, 'validation')
  held_out.check_fields({}, other, 'validation')
  with pytest.raises(
    config_utils.UserError, match='another validation_fraction than in training'
  ):
    held_out.check_fields(info, other, 'validation')


def test_training_images_that_a_bundle_records(data_dir, tmp_path):
  fields = {'name': 'digits', 'validation_fraction': 0.5}
  info = {'dataset': fields, 'features_dataset': {'name': 'digits'}}
  (found, reason), (features, _) = held_out.trained_on(info, data_dir, False)
  data = digits.Dataset(data_dir=data_dir, validation_fraction=0.5)
  assert found.digest() == data.load('train').digest() and not reason
  assert len(features) == 1437
  for wrong, said in (
    ({}, 'names no data set'),
    ({'dataset': None}, 'names no data set'),
    ({'dataset': {'name': ['digits']}}, 'names no data set'),
    ({'dataset': {'name': 'arrays'}}, "data set is 'arrays'"),
    ({'dataset': {'name': 'cifar100'}}, 'cifar100 is not prepared'),
    ({'dataset': {'name': 'digits', 'nothing': 1}}, "'nothing'"),
    ({'dataset': {'name': 'os:getcwd'}}, "data set is 'os:getcwd'"),
  ):
    ((found, reason),) = held_out.trained_on(wrong, str(tmp_path), False)
    assert found is None and said in reason, reason


def test_the_best_on_the_test_set_shares_delta(small_config, tmp_path):
  """Three evaluations each of teacher and student: nine pairs share delta."""
  config = small_config(bundle='best')
  result = train.train_and_evaluate(config, tmp_path)
  report = result.summary['bounds']
  assert (result.summary['choices'], report['choices']) == (9, 9)
  assert result.bundle.info['run']['choices'] == 9
  term = report['terms']['student_error']
  count = round(term['value'] * report['labelled'])
  share = report['delta'] / (report['claims'] * 9)
  assert term['upper'] == limits.clopper_pearson_upper(
    count, report['labelled'], share
  )
  page = (tmp_path / workdirs.REPORT).read_text()
  assert 'chosen on these images, among up to 9 pairs of checkpoints' in page
  teacher = disk.read_json(tmp_path / 'teacher' / workdirs.SUMMARY)
  assert teacher['choices'] == 3


def test_chosen_by_validation_is_no_choice_on_the_test_set(
  small_config, tmp_path
):
  fields = {'bundle': 'best', 'dataset.validation_fraction': 0.2}
  result = train.train_and_evaluate(small_config(**fields), tmp_path)
  assert result.summary['choices'] == 9
  assert result.summary['bounds']['choices'] == 1


def test_a_teachers_damaged_number_does_not_cost_the_run(
  small_config, finished_run, tmp_path, caplog
):
  teacher = bundles.load(finished_run[0] / 'teacher')
  run = {'best_by': 'test', 'choices': 0}
  dataclasses.replace(teacher, info={**teacher.info, 'run': run}).save(
    tmp_path / 'teacher'
  )
  config = small_config()
  config.teacher.checkpoint = str(tmp_path / 'teacher')
  result = train.train_and_evaluate(config, tmp_path / 'run')
  assert 'the bound is not measured: a teacher' in caplog.text
  assert result.summary['bounds'] is None is result.summary['choices']
  assert bundles.load(tmp_path / 'run').info['run']['test']['last']
  assert (tmp_path / 'run' / workdirs.REPORT).exists()


def rows_of(wrong):
  """Returns rows of a teacher that is right and a student as given."""
  num = len(wrong)
  labels = np.zeros(num, np.int32)
  teacher = np.tile(np.array([4, 0], np.float32), (num, 1))
  student = np.where(wrong[:, None], teacher[:, ::-1], teacher)
  return pointwise.compute_from_logits(teacher, student, labels)


def failures(num, candidates, choices, copies=1):
  """Returns how often the limit of the best candidate is below its error."""
  rng = np.random.default_rng(num)
  true_error, delta, draws = 0.1, 0.2, 300
  failed = 0
  for _ in range(draws):
    wrong = rng.random((candidates, num)) < true_error
    best = np.repeat(wrong[wrong.sum(axis=1).argmin()], copies)
    report = certify.report(rows_of(best), delta, choices=choices)
    # One limit alone: of its share, by which the others are divided too.
    share = delta / choices
    upper = limits.clopper_pearson_upper(int(best.sum()), len(best), share)
    assert report['terms']['student_error']['upper'] >= upper - 1e-12
    failed += upper < true_error
  return failed / draws


def test_coverage_of_the_best_of_many():
  """Chosen among 20 on the same images, a limit fails too often.

  It does not where delta is shared. Copies of images fail alike.
  """
  error = 3 * math.sqrt(0.2 * 0.8 / 300)
  assert failures(200, 20, choices=1) > 0.2 + error
  assert failures(200, 20, choices=20) <= 0.2 + error
  assert failures(200, 1, choices=1) <= 0.2 + error
  assert failures(200, 1, choices=1, copies=3) > 0.2 + error
