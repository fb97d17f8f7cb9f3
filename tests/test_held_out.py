"""Images that certify are held out: no copies, nothing trained or chosen."""

import math

import numpy as np
import pytest

import ijckd_jax
from ijckd_jax.bounds import certify
from ijckd_jax.bounds import held_out
from ijckd_jax.bounds import limits
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

  def __init__(self, *images):
    self._images = images

  def __len__(self):
    return len(self._images)

  def read(self, index):
    return {'image': self._images[index]}


def test_copies_by_hand():
  found = duplicates.find(
    arrays(3, 5, 3, 7, 5, 3), [arrays(1, 7), arrays(7, 5)]
  )
  assert found.distinct.tolist() == [True, False, False, False, False, False]
  assert found.report() == {
    'images': 6,
    'repeated': 3,
    'trained': 2,
    'distinct': 1,
  }
  alone = duplicates.find(arrays(3, 5, 3))
  assert (alone.repeated, alone.trained) == (1, None)


def test_files_are_compared_with_files():
  """By their bytes; pixels are not decoded to be compared with them."""
  files = Files(b'a', b'bc', b'a')
  found = duplicates.find(files, [arrays(3), Files(b'bc', b'd')])
  assert found.distinct.tolist() == [True, False, False]
  assert (found.repeated, found.trained) == (1, 1)
  assert duplicates.find(files, [arrays(3)]).trained is None


def test_too_many_files_are_not_read(monkeypatch):
  monkeypatch.setattr(duplicates, 'MAX_ENCODED', 1)
  files = Files(b'a', b'b')
  assert duplicates.find(Files(b'a'), [files]).trained is None


def test_images_of_other_shapes_are_no_copies():
  wide = ijckd_jax.Arrays(np.zeros((1, 1, 2, 1), np.uint8), np.zeros(1, int))
  assert duplicates.find(arrays(0), [wide]).trained is None


def test_a_split_that_was_trained_on_is_refused():
  few = duplicates.find(arrays(*range(20)), [arrays(3, 4)])
  held_out.check(few, 'these')
  many = duplicates.find(arrays(*range(20)), [arrays(3, 4, 5)])
  with pytest.raises(
    config_utils.UserError, match='these: 3 of the 20 images are images that'
  ):
    held_out.check(many, 'these')


def test_choices_that_a_bundle_records():
  made_on = {'dataset': {'name': 'digits'}}
  run = {'best_by': 'test', 'steps': 500}
  info = {**made_on, 'run': {**run, 'choices': 7}}
  assert held_out.choices(info, 'test', 'digits') == 7
  assert held_out.choices(info, 'validation', 'digits') == 1
  assert held_out.choices(info, 'test', 'cifar100') == 1
  # Older bundles do not say among how many.
  assert held_out.choices({**made_on, 'run': run}, 'test', 'digits') == 1
  best = {**made_on, 'run': run, 'which': 'best'}
  assert held_out.choices(best, 'test', 'digits') == 500
  assert held_out.choices({}, 'test', 'digits') == 1


def test_training_images_that_a_bundle_records(data_dir):
  info = {'dataset': {'name': 'digits', 'validation_fraction': 0.5}}
  found, reason = held_out.trained_on(info, data_dir, trust_code=False)
  data = digits.Dataset(data_dir=data_dir, validation_fraction=0.5)
  assert found.digest() == data.load('train').digest() and not reason
  for wrong, said in (
    ({}, 'names no data set'),
    ({'dataset': {'name': 'arrays'}}, "data set is 'arrays'"),
    ({'dataset': {'name': 'cifar100'}}, 'cifar100 is not prepared'),
    ({'dataset': {'name': 'digits', 'nothing': 1}}, "'nothing'"),
    ({'dataset': {'name': 'os:getcwd'}}, "data set is 'os:getcwd'"),
  ):
    found, reason = held_out.trained_on(wrong, data_dir, trust_code=False)
    assert found is None and said in reason, reason


def test_the_best_on_the_test_set_shares_delta(small_config, tmp_path):
  """Three evaluations each of teacher and student: nine pairs share delta."""
  config = small_config(bundle='best')
  result = train.train_and_evaluate(config, tmp_path)
  report = result.summary['bounds']
  assert (result.summary['choices'], report['choices']) == (3, 9)
  assert result.bundle.info['run']['choices'] == 3
  term = report['terms']['student_error']
  count = round(term['value'] * report['labelled'])
  share = report['delta'] / (report['claims'] * 9)
  assert term['upper'] == limits.clopper_pearson_upper(
    count, report['labelled'], share
  )
  page = (tmp_path / workdirs.REPORT).read_text()
  assert 'the best of 9 pairs of checkpoints on these images' in page
  teacher = disk.read_json(tmp_path / 'teacher' / workdirs.SUMMARY)
  assert teacher['choices'] == 3


def test_chosen_by_validation_is_no_choice_on_the_test_set(
  small_config, tmp_path
):
  fields = {'bundle': 'best', 'dataset.validation_fraction': 0.2}
  result = train.train_and_evaluate(small_config(**fields), tmp_path)
  assert result.summary['choices'] == 3
  assert result.summary['bounds']['choices'] == 1


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
