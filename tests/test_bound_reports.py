"""From networks to reports of bounds: in runs, by command, without labels."""

import dataclasses
import functools
import json

import numpy as np
from PIL import Image
import pytest

import ijckd_jax
from ijckd_jax.bounds import calibration
from ijckd_jax.bounds import certify
from ijckd_jax.bounds import limits
from ijckd_jax.bounds import measure
from ijckd_jax.bounds import pairs
from ijckd_jax.bounds import selective
from ijckd_jax.bounds import shift
from ijckd_jax.bundles import bundles
from ijckd_jax.commands import bounds as command_lib
from ijckd_jax.data.datasets import digits
from ijckd_jax.evaluation import pointwise
from ijckd_jax.reports import bound_wording
from ijckd_jax.reports import plots
from ijckd_jax.runtime import config_utils
from ijckd_jax.runtime import disk
from ijckd_jax.runtime import parallel
from ijckd_jax.runtime import workdirs
from ijckd_jax.training import train
from tests import test_bundles

REUSED = {
  'paired',
  'joint',
  'label_margin',
  'logit_margin',
  'soft',
  'flip_margin',
}
LOGITS = {'paired', 'logit_margin', 'soft'}
OWN = {f'own_{key}' for key in LOGITS}
BY_METHOD = {
  'ijckd': REUSED,
  'srrl': REUSED | OWN | {'own_head'},
  'kd': LOGITS,
}

# It has all of the plots.
DRAWN = 'ijckd'
FIT_EXAMPLES = 300


@pytest.fixture(scope='module')
def teacher(finished_run):
  """The folder of the teacher of all runs here."""
  return finished_run[0] / 'teacher'


@pytest.fixture(scope='module')
def runs(teacher, small_config, tmp_path_factory, blank_plots):
  """Folders of finished runs by method, of one teacher; plots of one."""
  found = {}
  for method in BY_METHOD:
    config = small_config(method, **{'bounds.fit_examples': FIT_EXAMPLES})
    config.teacher.checkpoint = str(teacher)
    found[method] = tmp_path_factory.mktemp(method)
    with pytest.MonkeyPatch.context() as patch:
      if method == DRAWN:
        patch.setattr(plots, 'render', blank_plots)
      train.train_and_evaluate(config, found[method])
  return found


@pytest.fixture
def command(run_command):
  return functools.partial(run_command, command_lib.main)


@pytest.mark.parametrize('method', BY_METHOD)
def test_every_run_ends_with_the_bound(runs, method):
  """Its terms balance, its bounds hold, and what is missing is said."""
  folder = runs[method]
  summary = disk.read_json(folder / workdirs.SUMMARY)
  report, last = summary['bounds'], summary['student']['last']
  assert set(report['bounds']) == BY_METHOD[method]
  terms = {name: term['value'] for name, term in report['terms'].items()}
  assert terms['student_error'] == pytest.approx(1 - last['top1'])
  assert terms['teacher_error'] == pytest.approx(1 - summary['teacher']['top1'])
  assert terms['disagreement'] == pytest.approx(1 - last['agreement'])
  assert terms['gap'] == pytest.approx(terms['harm'] - terms['help'])
  # The same as the evaluation counted in the compiled step.
  for name in ('harm', 'help'):
    assert last[name] == pytest.approx(terms[name], abs=1e-6)
  for name, bound in (
    ('certified', 'label_margin'),
    ('certified_agreement', 'flip_margin'),
  ):
    assert (name in last) == (bound in report['bounds'])
    if name in last:
      value = 1 - report['bounds'][bound]['value']
      assert last[name] == pytest.approx(value, abs=1e-6)
  assert last['logit_mse'] > 0
  assert ('feature_mse' in last) == (method in ('ijckd', 'srrl'))
  for bound in report['bounds'].values():
    assert bound['measured'] <= bound['value'] + 1e-6
    # An upper limit of a probability is never above 1.
    assert min(bound['value'], 1) <= bound['upper'] + 1e-6
    total = sum(part['value'] for part in bound['parts'])
    assert total == pytest.approx(bound['value'])
  for term in report['terms'].values():
    for limit, sign in (('lower', 1), ('upper', -1)):
      if term[limit] is not None:
        assert sign * term[limit] <= sign * term['value'] + 1e-9
  page = (folder / workdirs.REPORT).read_text()
  told, folded = page.split('<details>')[:2]
  assert bound_wording.brief(report) in told
  assert bound_wording.full(report) in folded
  short = told[told.index('## The bound') :]
  assert short.count('\n| ') <= 2 + 6
  assert ('joint' in report['bounds']) == ('ijc_gap' in report['terms'])
  if method == 'kd':
    reason = report['left_out']['features and joint head']
    assert 'has no connector to the teacher' in reason
  else:
    assert report['joint_head']['examples'] == 2 * FIT_EXAMPLES
  assert '(plots/bounds.png)' in told
  with Image.open(folder / 'plots/bounds.png') as image:
    assert (image.size[0] > 500) == (method == DRAWN)
  if method == DRAWN:
    assert '<svg' in (folder / 'plots/bounds.svg').read_text()[:1000]
  connected = (folder / workdirs.CONNECTED).exists()
  assert connected == (method == 'srrl')


def test_terms_are_logged_at_each_evaluation(runs):
  for method, folder in runs.items():
    lines = (folder / workdirs.METRICS).read_text().splitlines()
    rows = [row for row in map(json.loads, lines) if 'test/top1' in row]
    assert len(rows) == 3, method
    for row in rows:
      gap = row['test/student_error'] - row['test/teacher_error']
      assert gap == pytest.approx(row['test/harm'] - row['test/help'])
      assert row['test/student_error'] == pytest.approx(1 - row['test/top1'])
      assert row['test/harm'] <= 1 - row['test/agreement'] + 1e-9


@pytest.mark.parametrize('method', BY_METHOD)
def test_the_command_says_what_the_run_said(
  runs, teacher, method, command, data_dir, tmp_path
):
  code, out, err = command(
    *('--bundle', runs[method], '--teacher', teacher, '--data_dir', data_dir),
    *('--output', tmp_path / 'out', '--fit_examples', FIT_EXAMPLES, '--json'),
  )
  assert (code, err) == (0, '')
  found = json.loads(out)
  expected = disk.read_json(runs[method] / workdirs.SUMMARY)['bounds']
  assert set(found) - {'bundle', 'teacher'} == set(expected)
  for kind in ('terms', 'bounds'):
    for name, row in expected[kind].items():
      for key in {'value', 'lower', 'upper'} & set(row):
        number = found[kind][name][key]
        if row[key] is None:
          assert number is None
        else:
          assert number == pytest.approx(row[key], rel=0.02, abs=0.01)
  assert json.loads((tmp_path / 'out' / 'bounds.json').read_text()) == found
  page = (tmp_path / 'out' / 'report.md').read_text()
  assert page.startswith('## The bound') and 'plots/bounds.png' in page


@dataclasses.dataclass(frozen=True)
class Shifted(digits.Dataset):
  """Digits that no network was trained on: pixels further to the right."""

  pixels: int = 1

  def load(self, split):
    arrays = super().load(split)
    images = np.roll(arrays.images, self.pixels, axis=2)
    return ijckd_jax.Arrays(images, arrays.labels)


@dataclasses.dataclass(frozen=True)
class Misnumbered(Shifted):
  """A label that no class has."""

  def load(self, split):
    arrays = super().load(split)
    labels = arrays.labels.copy()
    labels[0] = 12
    return ijckd_jax.Arrays(arrays.images, labels)


def test_a_runs_report_is_not_overwritten(runs, teacher, command, data_dir):
  code, out, err = command(
    *('--bundle', runs['kd'], '--teacher', teacher, '--data_dir', data_dir),
    *('--output', runs['kd']),
  )
  assert (code, out) == (2, '')
  assert 'holds a run, whose report would be lost' in err


def test_without_labels_by_command(runs, teacher, command, data_dir):
  """Other images, whose labels only judge; never those trained on."""
  common = ('--teacher', teacher, '--data_dir', data_dir, '--fit_examples', 0)
  code, out, _ = command(
    *('--bundle', runs['srrl'], *common),
    *('--unlabelled', 'tests.test_bound_reports:Shifted'),
  )
  assert code == 0
  assert 'joint head: fewer than 2 labelled training images' in out
  assert 'All 43 limits hold together with 95% confidence' in out
  assert 'On these 360 images without labels, the limits below and all' in out
  assert 'hold together with 95% confidence, if the student was not' in out
  assert "student's error, by Dis² " in out
  for more, said in (
    ((), '--unlabelled: these are the labelled images; give others\n'),
    (
      ('--unlabelled_split', 'train'),
      'was trained on 1,437 of the 1,437 images, where',
    ),
  ):
    code, out, err = command(
      *('--bundle', runs['ijckd'], *common, '--unlabelled', 'digits', *more)
    )
    assert (code, out) == (2, '')
    assert said in err and err.count('\n') == 1


def test_known_shifts_calibrate(runs, teacher, command, data_dir, tmp_path):
  common = (
    *('--bundle', runs['kd'], '--teacher', teacher, '--data_dir', data_dir),
    *('--unlabelled', 'tests.test_bound_reports:Shifted'),
  )
  known = []
  for pixels in (2, 3, 4):
    folder = tmp_path / str(pixels)
    code, _, err = command(
      *(*common, '--unlabelled_fields', f'pixels={pixels}'),
      *('--output', folder),
    )
    assert code == 0, err
    known += ['--known', f'kind {pixels}={folder}']
  code, out, err = command(*common, *known, '--output', tmp_path / 'new')
  assert code == 0, err
  assert 'could have been one more of the 3 known shifts, of 3 kinds' in out
  found = disk.read_json(tmp_path / 'new/bounds.json')['unlabelled']
  expected = calibration.estimate(
    found['shifted']['value'],
    [
      (str(pixels), shift['shifted']['value'], shift['true_error'])
      for pixels in (2, 3, 4)
      for shift in [
        disk.read_json(tmp_path / str(pixels) / 'bounds.json')['unlabelled']
      ]
    ],
    0.05,
  )
  assert found['calibrated'] == expected
  page = (tmp_path / 'new/report.md').read_text()
  assert bound_wording.unlabelled(found) in page


def test_images_that_were_trained_on_certify_nothing(
  runs, teacher, command, data_dir
):
  code, out, err = command(
    *('--bundle', runs['ijckd'], '--teacher', teacher, '--data_dir', data_dir),
    *('--dataset', 'digits', '--split', 'validation'),
    *('--dataset_fields', 'validation_fraction=0.5'),
  )
  assert (code, out) == (2, '')
  assert 'with another validation_fraction than in training' in err


def test_unknown_training_images_are_named(
  runs, teacher, command, data_dir, tmp_path
):
  bundle = bundles.load(teacher)
  info = {key: x for key, x in bundle.info.items() if key != 'dataset'}
  dataclasses.replace(bundle, info=info).save(tmp_path / 'teacher')
  code, out, err = command(
    *('--bundle', runs['kd'], '--teacher', tmp_path / 'teacher'),
    *('--data_dir', data_dir, '--json'),
  )
  assert code == 0
  assert 'training images of the teacher are not known (it names no data' in err
  copies = json.loads(out)['copies']
  assert (copies['trained'], copies['unknown']) == (0, 1)


@pytest.mark.parametrize(
  'flags, said',
  [
    (('--delta', 2), '--delta 2.0: give a probability between 0 and 1'),
    (('--fit_examples', -1), 'cannot be negative'),
    (('--unlabelled', 'digit'), "unknown dataset 'digit'; did you mean"),
    (('--split', 'train'), 'invalid choice'),
    (('--delta', 1e-12), 'give a probability between 0 and 1, such as 0.05'),
    (
      ('--unlabelled', 'tests.test_bound_reports:Misnumbered'),
      '--unlabelled: labels go up to 12, but there are 10 classes',
    ),
    (
      ('--dataset', 'tests.test_bound_reports:Misnumbered'),
      'labels go up to 12, but the head has 10 classes',
    ),
    (('--output', '/proc/none'), '--output /proc/none cannot be written'),
    (('--split', 'validation'), "the split 'validation' is empty"),
  ],
)
def test_mistakes_are_told_in_a_line(
  runs, teacher, command, data_dir, flags, said
):
  code, out, err = command(
    *('--bundle', runs['ijckd'], '--teacher', teacher),
    *('--data_dir', data_dir, *flags),
  )
  assert (code, out) == (2, '')
  assert said in err and err.count('\n') == 1, err


def test_a_teacher_of_another_width_is_refused(
  runs, command, data_dir, tmp_path
):
  test_bundles.make_bundle('ce', student='resnet8x4').save(tmp_path)
  code, _, err = command(
    *('--bundle', runs['ijckd'], '--teacher', tmp_path),
    *('--data_dir', data_dir),
  )
  assert code == 2
  assert err == (
    "error: the student's connector is not to this teacher, whose features are "
    '256 wide: give the teacher that it learned from\n'
  )


def test_a_head_that_was_fitted_for_the_student(
  runs, teacher, command, data_dir, tmp_path
):
  """The teacher's bundle has another one: the student's is what both are read
  by, and that is said.
  """
  workdir = runs['ijckd']
  bundle = bundles.load(teacher)
  head = {
    name: x[..., ::-1].copy()
    for name, x in bundle.variables['params']['head'].items()
  }
  params = {**bundle.variables['params'], 'head': head}
  dataclasses.replace(
    bundle, variables={**bundle.variables, 'params': params}
  ).save(tmp_path / 'other')
  common = ('--data_dir', data_dir, '--fit_examples', 0, '--json')
  found = {}
  for folder in (teacher, tmp_path / 'other'):
    code, out, _ = command('--bundle', workdir, '--teacher', folder, *common)
    assert code == 0
    found[folder.name] = json.loads(out)
  note = found['other']['left_out'].pop("the teacher's own head")
  assert 'it was fitted again, or this is not its teacher' in note
  assert found['other']['terms'] == found['teacher']['terms']
  assert "the teacher's own head" not in found['teacher']['left_out']


def test_settings_are_checked_and_may_change(small_config, tmp_path):
  for field, value, said in (
    ('bounds.delta', 1.0, 'bounds.delta=1.0'),
    ('bounds.fit_examples', -1, 'bounds.fit_examples=-1'),
  ):
    with pytest.raises(config_utils.UserError, match=said):
      train.train_and_evaluate(small_config(**{field: value}), tmp_path)
  assert 'bounds.delta' in workdirs.RUNTIME_FIELDS


def test_nothing_is_fitted_where_nothing_is_to_be(finished_run, data_dir):
  """Nor where no training image has a label."""
  workdir, _ = finished_run
  student, teacher = (
    bundles.load(folder) for folder in (workdir, workdir / 'teacher')
  )
  judge = teacher.teacher()
  data = digits.Dataset(data_dir=data_dir)
  splits = {name: data.load(name) for name in ('train', 'test')}
  blank = np.full(len(splits['train'].labels), -1, np.int32)
  unlabelled = ijckd_jax.Arrays(splits['train'].images, blank)
  how = dict(
    mapper=parallel.Mapper(), batch_size=120, delta=0.1, seed=0, trained=()
  )
  pair = pairs.Pair(judge, student.network, student.network)
  variables = {'teacher': judge.arrays, 'connected': student.variables}
  variables['student'] = student.variables
  for train_split, number in ((splits['train'], 0), (unlabelled, 100)):
    measured = measure.measure(
      pair,
      variables,
      {'test': splits['test'], 'train': train_split},
      fit_examples=number,
      **how,
    )
    assert measured.report['left_out']['joint head'] == measure.NO_FIT
    assert measured.rows.joint_teacher is None
  # Rows are those of the networks, one by one.
  test = splits['test']
  taught = judge(judge.arrays, test.images)
  net = student.network
  seen = net(student.variables, net.preprocessing(test.images))
  np.testing.assert_allclose(
    measured.rows.feature_distance,
    np.linalg.norm(seen.pooled - taught.pooled, axis=-1),
    rtol=1e-4,
  )
  assert (measured.rows.teacher == taught.logits.argmax(-1)).mean() > 0.99
  blank = np.full(len(test.labels), -1, np.int32)
  with pytest.raises(config_utils.UserError, match='no image has a label'):
    measure.measure(
      pair,
      variables,
      {'test': ijckd_jax.Arrays(test.images, blank), 'train': unlabelled},
      fit_examples=0,
      **how,
    )


def world(num, shifted=0.0, seed=0):
  """Returns features, labels, and a head that is right where nothing shifts."""
  random = np.random.RandomState(seed)
  labels = random.randint(0, 3, num).astype(np.int32)
  centres = 3 * np.eye(3, 4, dtype=np.float32)
  z = centres[labels] + random.randn(num, 4).astype(np.float32)
  z[:, 3] += shifted
  z[:, 0] -= 0.6 * shifted
  head = {'kernel': centres.T.copy(), 'bias': np.zeros(3, np.float32)}
  return {'label': labels, 'rows': {'z_t': z, 'z_s': z + 0.1}}, head


def test_bounds_under_shift():
  """Dis² holds where a linear critic finds the shift; the others do not."""
  source, head = world(2000)
  for shifted in (0.0, 3.0):
    target, _ = world(2000, shifted, seed=1)
    found = shift.bound(source, target, head, delta=0.1, seed=0)
    truth = found['true_error']
    assert truth <= found['shifted']['upper']
    assert (truth <= found['same_distribution']['upper']) == (shifted == 0)
    blank = {**target, 'label': np.full(2000, -1, np.int32)}
    without = shift.bound(source, blank, head, delta=0.1, seed=0)
    assert without == {k: v for k, v in found.items() if k != 'true_error'}
  # Three limits share delta.
  differ = np.mean(
    pointwise.read(target['rows']['z_t'], head).argmax(-1)
    != pointwise.read(target['rows']['z_s'], head).argmax(-1)
  )
  assert found['disagreement'] == {
    'value': differ,
    'upper': limits.clopper_pearson_upper(round(2000 * differ), 2000, 0.1 / 3),
  }
  few = np.zeros(2000, np.int32) - 1
  few[:1] = source['label'][:1]
  one = shift.bound({**source, 'label': few}, target, head, delta=0.1, seed=4)
  assert (one['shifted'] is None) == (
    np.random.default_rng((4, shift.SPLIT_STREAM)).permutation(2000)[0] % 2 == 0
  )
  alone = {
    'label': target['label'][:1],
    'rows': {name: x[:1] for name, x in target['rows'].items()},
  }
  found = shift.bound(source, alone, head, delta=0.1, seed=0)
  assert found['shifted'] is None and found['same_distribution']['upper'] == 1
  assert 'Dis² ' not in bound_wording.unlabelled(found).split('\n\n')[1]


def test_a_student_with_its_own_head_is_judged_by_that():
  source, head = world(600)
  target, _ = world(600, seed=1)
  for part in (source, target):
    right = np.eye(3, dtype=np.float32)[part['label']]
    part['rows']['l_own'] = 9 * right
  found = shift.bound(source, target, head, delta=0.1, seed=0)
  assert found['true_error'] == 0 == found['shifted']['source_error']


def test_a_critic_differs_where_it_may():
  """Far from the source it does, and it agrees there."""
  source, head = world(1000)
  target, _ = world(1000, 6.0, seed=1)
  near, far = (
    pointwise.read(part['rows']['z_t'], head) for part in (source, target)
  )
  found = []
  for loss in (shift.disagreement_loss, shift.disparity_loss):
    critic = shift.fit_critic(near, far, loss)
    apart = [shift.differs(part, critic).mean() for part in (near, far)]
    found.append(apart[1] - apart[0])
    # On one distribution it cannot do both.
    same = shift.fit_critic(near, near, loss)
    assert shift.differs(near, same).mean() < 0.5
  assert min(found) > 0.1 and max(found) > 0.4, found


def test_the_critic_that_differs_more_is_taken(monkeypatch):
  source, head = world(1000)
  target, _ = world(1000, 3.0, seed=1)
  near, far = (
    pointwise.read(part['rows']['z_t'], head) for part in (source, target)
  )

  def by(*losses):
    with monkeypatch.context() as patch:
      for name, loss in zip(
        ('disagreement_loss', 'disparity_loss'), losses, strict=True
      ):
        patch.setattr(shift, name, loss)
      return shift.by_critic(near, far, source['label'], delta=0.1, seed=0)

  alone = [
    by(loss, loss) for loss in (shift.disagreement_loss, shift.disparity_loss)
  ]
  both = by(shift.disagreement_loss, shift.disparity_loss)
  assert both in alone
  assert both['discrepancy'] == max(one['discrepancy'] for one in alone)
  assert alone[0] != alone[1]
  assert both == by(shift.disparity_loss, shift.disagreement_loss)


def test_losses_of_critics_by_hand():
  logits = np.array([[1.0, 2.0, 4.0]], np.float32)
  predicted = np.array([2])
  (found,) = shift.disagreement_loss(logits, predicted)
  assert found == pytest.approx(np.log1p(np.exp(4 - 1.5)), rel=1e-6)
  (found,) = shift.disparity_loss(logits, predicted)
  p = np.exp(logits[0]) / np.exp(logits[0]).sum()
  assert found == pytest.approx(-np.log(1 - p[2]), rel=1e-5)


def test_reports_of_few_rows_by_hand():
  """Four images; h reads coordinates, r is h with its classes swapped."""
  z_t = np.array([[2, 0], [0, 2], [3, 1], [1, 3]], np.float32)
  z_s = np.array([[2, 1], [2, 0], [3, 1], [0, 3]], np.float32)
  labels = np.array([0, 1, 1, -1])
  head = {
    'kernel': np.eye(2, dtype=np.float32),
    'bias': np.zeros(2, np.float32),
  }
  joint = {'kernel': head['kernel'][:, ::-1].copy(), 'bias': head['bias']}
  rows = pointwise.compute(z_t, z_s, labels, **head, joint=joint)
  # h: 0, 1, 0, 1 from z_t and 0, 0, 0, 1 from z_s; r the opposite.
  report = certify.report(rows, 0.1)
  values = {name: term['value'] for name, term in report['terms'].items()}
  assert values == pytest.approx(
    {
      'teacher_error': 1 / 3,
      'student_error': 2 / 3,
      'disagreement': 1 / 4,
      'harm': 1 / 3,
      'help': 0,
      'gap': 1 / 3,
      'joint_error': (1 + 1 + 0 + 1 + 0 + 0) / 3,
      'ijc_gap': (1 + 2 - 3) / 3,
      'discrepancy': 0,
    }
  )
  assert report['labelled'] == 3 and report['examples'] == 4
  bounds = report['bounds']
  assert bounds['paired']['value'] == pytest.approx(1 / 3 + 1 / 3)
  assert bounds['joint']['value'] == pytest.approx(1 / 3 + 1 + 0)
  assert bounds['label_margin']['value'] == pytest.approx(2 / 3)
  assert bounds['flip_margin']['value'] == pytest.approx(1 / 4)
  # Two limits of each term, one of each bound and of each share of answers.
  assert (len(values), len(bounds)) == (9, 6)
  assert report['claims'] == 2 * 9 + 6 + 20
  share = 0.1 / report['claims']
  term = report['terms']['student_error']
  assert (term['lower'], term['upper']) == (
    limits.clopper_pearson_lower(2, 3, share),
    limits.clopper_pearson_upper(2, 3, share),
  )
  known = rows.labelled
  # The limits of its two parts hold together with D1's own.
  own = limits.of_mean(np.array([0, 1, 1]), share, low=0, high=2)[1]
  assert bounds['paired']['upper'] == min(
    own,
    limits.clopper_pearson_upper(1, 3, share)
    + limits.clopper_pearson_upper(1, 4, share),
  )
  assert report['selective'] == selective.answer(
    np.array([0, 1, 1]), known.confidence, 20 * share
  )
  with pytest.raises(ValueError, match='no example has a label'):
    certify.report(rows.where([3]), 0.1)
