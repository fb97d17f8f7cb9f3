"""Images without classes: features are learned, judged and built upon."""

import dataclasses
import json

import jax
import numpy as np
import pytest

import ijckd_jax
from ijckd_jax.bundles import bundles
from ijckd_jax.commands import bounds
from ijckd_jax.commands import evaluate
from ijckd_jax.commands import export
from ijckd_jax.commands import predict
from ijckd_jax.commands import probe
from ijckd_jax.commands import weights
from ijckd_jax.data import datasets
from ijckd_jax.data.datasets import digits
from ijckd_jax.distillation import methods
from ijckd_jax.distillation.methods import base
from ijckd_jax.models import losses
from ijckd_jax.runtime import config_utils
from ijckd_jax.training import experiment
from ijckd_jax.training import train

FEATURES_ALONE = {
  'method.cross_entropy_weight': 0.0,
  'method.logit_weight': 0.0,
}


@pytest.fixture(scope='module')
def images(data_dir):
  """96 training images of digits."""
  return digits.Dataset(data_dir=data_dir).load('train').images[:96]


def heap_of(images, **fields):
  """Returns images without classes as a data set."""
  return ijckd_jax.ArrayDataset(
    train=datasets.Arrays(images, np.full(len(images), -1)),
    class_names=(),
    mean=(0.3,),
    std=(0.4,),
    **fields,
  )


@dataclasses.dataclass(frozen=True)
class Heap(digits.Dataset):
  """The training images of digits, without their classes."""

  class_names = ()

  def load(self, split):
    arrays = super().load('train')
    count = len(arrays) if split == 'train' else 0
    return datasets.Arrays(arrays.images[:count], np.full(count, -1, np.int32))


class Others(Heap):
  """Images that nothing was trained on: upside down, without classes."""

  def load(self, split):
    arrays = super().load(split)
    return datasets.Arrays(arrays.images[:, ::-1].copy(), arrays.labels)


class NumpyNames(digits.Dataset):
  """Its classes' names are an array."""

  class_names = np.array([*'0123456789'])


class Forgotten(digits.Dataset):
  """Its classes have no names, but its images have labels."""

  class_names = ()


class Empty(Heap):
  """It has no images."""

  def load(self, split):
    return super().load('validation')


@dataclasses.dataclass(frozen=True)
class Hidden(base.Method):
  """Learns from the labels, and does not say so in its terms."""

  def loss(self, student, teacher, batch):
    hint = losses.mean_squared_error(student.pooled, 0 * student.pooled)
    labels = losses.cross_entropy(student.logits, batch['label'])
    return hint + labels, {'hint': hint}


def config_of(method, **fields):
  config = experiment.default_config(
    dataset=None, teacher='', student='plain', method=method
  )
  config.total_steps, config.batch_size = 4, 48
  config.log_epochs, config.log_steps = 0.0, 2
  config_utils.override(config, fields)
  return config


def learn(images, teacher, workdir, method='simkd', **fields):
  config = config_of(method, **fields)
  config.teacher.checkpoint = str(teacher)
  return train.train_and_evaluate(config, workdir, dataset=heap_of(images))


@pytest.fixture(scope='module')
def learned(images, published_run, tmp_path_factory):
  """The folder of a run on images without classes, and its Result."""
  folder = tmp_path_factory.mktemp('features')
  fields = {'student.backbone': 'resnet8', 'method.factor': 4}
  return folder, learn(images, published_run[0], folder, **fields)


def test_labels_make_no_difference_to_features(images, finished_run, tmp_path):
  """With classes or without, simkd makes the same student, but for its head."""
  alone = learn(images, finished_run[0], tmp_path / 'alone')
  teacher = bundles.load(finished_run[0]).teacher()
  labels = np.arange(len(images)) % 10
  arrays = datasets.Arrays(images, labels)
  labelled = train.train_and_evaluate(
    config_of('simkd'),
    tmp_path / 'labelled',
    dataset=dataclasses.replace(
      heap_of(images), train=arrays, test=arrays, class_names=range(10)
    ),
    teacher=dataclasses.replace(teacher, class_names=()),
  )
  for one, other in zip(
    jax.tree.leaves((alone.state.params, alone.state.batch_stats)),
    jax.tree.leaves((labelled.state.params, labelled.state.batch_stats)),
    strict=True,
  ):
    np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-7)
  assert 'head' not in alone.state.params
  first, second = alone.history
  assert 'train/feature' in first and 'train/accuracy' not in first
  assert not any('top1' in key for key in second)


def test_the_bundle_has_no_head(learned):
  folder, result = learned
  bundle = bundles.load(folder)
  assert bundle.class_names == () == result.bundle.class_names
  assert bundles.num_params(bundle.variables)['head'] == 0
  assert bundles.num_params(bundle.variables)['connector'] > 0
  assert result.summary['student'] == {} and result.summary['teacher'] is None
  assert result.summary['best_step'] is None is result.summary['best_by']
  card = (folder / 'bundle' / 'README.md').read_text()
  assert 'pipeline_tag: image-feature-extraction' in card
  assert '| classes | none: it has no head, and gives features |' in card
  assert 'names one of' not in card
  page = (folder / 'report.md').read_text()
  assert 'whose images have no classes' in page and 'plots/losses.png' in page
  assert 'top-1' not in page.partition('<details>')[0]


def test_a_finished_run_is_found(learned, images, published_run, caplog):
  caplog.set_level('INFO')
  fields = {'student.backbone': 'resnet8', 'method.factor': 4}
  again = learn(images, published_run[0], learned[0], **fields)
  assert again.state is None and 'already finished' in caplog.text


@pytest.mark.parametrize(
  'fields',
  [{'teacher.store.views': 1}, {'accumulation': 2}, {'feed': 'device'}],
  ids=str,
)
def test_other_ways_to_train(fields, images, finished_run, tmp_path):
  one = learn(images, finished_run[0], tmp_path / 'one', **fields)
  assert np.isfinite(one.history[-1]['train/feature'])


def test_a_student_with_a_head_of_its_own(images, finished_run, tmp_path):
  """Its bundle is the backbone; the connector stays in the connected one."""
  result = learn(images, finished_run[0], tmp_path, 'srrl', **FEATURES_ALONE)
  assert result.bundle.network.connector is None
  assert result.bundle.class_names == ()
  width = result.bundle.variables['params']['head']['kernel'].shape[0]
  backbone = result.bundle.network.backbone
  assert (
    width
    == backbone.apply(
      {
        k: v['backbone']
        for k, v in result.bundle.variables.items()
        if 'backbone' in v
      },
      np.zeros((1, 8, 8, 1), np.float32),
      train=False,
    ).pooled.shape[-1]
  )
  assert bundles.load(tmp_path / 'connected').network.connector is not None


# Of each method, what must be zero for it to learn from features alone; None:
# it cannot.
LEARNS = {
  'at': ('cross_entropy',),
  'atsc': None,
  'ce': None,
  'crd': None,
  'dist': None,
  'dkd': None,
  'fitnet': ('cross_entropy',),
  'ijckd': ('cross_entropy', 'logit'),
  'kd': None,
  'mlkd': None,
  'pefd': ('cross_entropy',),
  'reviewkd': ('cross_entropy',),
  'rkd': ('cross_entropy',),
  'simkd': (),
  'sp': ('cross_entropy',),
  'srd': ('cross_entropy', 'distillation'),
  'srrl': ('cross_entropy', 'logit'),
  'vid': ('cross_entropy',),
  'vkd': ('cross_entropy',),
  'wttm': None,
}


@pytest.mark.parametrize('method', sorted(methods.METHODS))
def test_which_methods_need_no_classes(method, images, published_run):
  zero = LEARNS[method]
  config = config_of(method, **{'student.backbone': 'resnet8'})
  config.teacher.checkpoint = str(published_run[0])
  if zero != ():
    with pytest.raises(config_utils.UserError) as caught:
      experiment.build(config, dataset=heap_of(images))
    message = str(caught.value)
    assert 'the images have no classes' in message
    for term in zero or ():
      assert f'method.{term}_weight=0' in message
      config.method[f'{term}_weight'] = 0.0
  if zero is None:
    if 'cross_entropy_weight' in config.method:
      config.method.cross_entropy_weight = 0.0
    with pytest.raises(config_utils.UserError, match='have no classes'):
      experiment.build(config, dataset=heap_of(images))
    return
  built = experiment.build(config, dataset=heap_of(images))
  assert built.distiller.num_classes == 0 and not built.distiller.trains_head


@pytest.mark.parametrize(
  'fields, message',
  [
    ({'teacher.checkpoint': ''}, 'give one that is there'),
    ({'teacher.head': 'fit'}, 'no head can be fitted'),
    ({'bundle': 'best'}, 'set bundle=last'),
    (
      {'method.name': 'at', 'student.dropout': 0.1},
      'set student.dropout=0',
    ),
    ({'method.name': 'ce'}, 'from which alone ce learns'),
    (
      {'method.name': 'ijckd', 'method.head': 'copy', **FEATURES_ALONE},
      'set method.head=teacher',
    ),
    (
      {'method.name': 'simkd', 'method.feature_weight': 0.0},
      'nothing to learn',
    ),
  ],
)
def test_settings_that_need_classes(fields, message, images, finished_run):
  config = config_of(fields.get('method.name', 'simkd'))
  config.teacher.checkpoint = str(finished_run[0])
  config_utils.override(config, fields)
  with pytest.raises(config_utils.UserError, match=message):
    experiment.build(config, dataset=heap_of(images))


def test_a_term_that_is_only_in_the_total_is_found(images, finished_run):
  config = config_of('tests.test_unlabelled:Hidden')
  config.teacher.checkpoint = str(finished_run[0])
  with pytest.raises(config_utils.UserError, match='logits in the total'):
    experiment.build(config, dataset=heap_of(images))


def test_the_advice_fits_a_teacher_that_pools_no_map(images, published_run):
  teacher = bundles.load(published_run[0]).teacher()
  teacher = dataclasses.replace(teacher, pools_map=False)
  config = config_of('kd', **{'student.backbone': 'resnet8'})
  with pytest.raises(config_utils.UserError, match="connector='mlp'") as caught:
    experiment.build(config, dataset=heap_of(images), teacher=teacher)
  assert 'simkd' not in str(caught.value)


def test_added_terms_are_named(images, finished_run):
  config = config_of('simkd', **{'method.add': 'kd'})
  config.teacher.checkpoint = str(finished_run[0])
  message = 'in kd_distillation: leave out of method.add what reads them'
  with pytest.raises(config_utils.UserError, match=message):
    experiment.build(config, dataset=heap_of(images))


@pytest.mark.parametrize(
  'name, message',
  [
    ('Forgotten', 'labels, but no class_names'),
    ('Empty', 'no training images'),
  ],
)
def test_data_sets_of_ones_own_are_checked(
  name, message, data_dir, finished_run, tmp_path
):
  config = config_of('simkd')
  config.teacher.checkpoint = str(finished_run[0])
  dataset = globals()[name](data_dir=data_dir)
  with pytest.raises(config_utils.UserError, match=message):
    train.train_and_evaluate(config, tmp_path / 'run', dataset=dataset)
  assert not (tmp_path / 'run').exists()


def test_names_of_classes_may_be_an_array(data_dir):
  built = experiment.build(config_of('ce'), dataset=NumpyNames(data_dir))
  assert built.distiller.num_classes == 10


@pytest.mark.parametrize(
  'fields, message',
  [
    ({'test': 'train'}, 'give `train` alone'),
    ({'train': 'labelled'}, '-1 as each of its labels'),
    ({'class_names': ('a', 'b')}, 'test is of type NoneType'),
    ({'train': None}, 'train is of type NoneType'),
  ],
)
def test_arrays_without_classes_are_checked(fields, message, images):
  heap = heap_of(images)
  arrays = {
    'train': heap.train,
    'labelled': datasets.Arrays(images, np.zeros(len(images), np.int32)),
  }
  fields = {key: arrays.get(value, value) for key, value in fields.items()}
  with pytest.raises(config_utils.UserError, match=message):
    dataclasses.replace(heap, **fields)


def test_where_a_head_is_needed(learned, data_dir, run_command, tmp_path):
  """The bundle is refused with what to do, and nothing is written."""
  output = tmp_path / 'out'
  bundle = ('--bundle', learned[0])
  data = ('--dataset', 'digits', '--data_dir', data_dir)
  onnx = ('--format', 'onnx', '--output', output)
  for command, flags in (
    (evaluate.main, (*bundle, *data)),
    (export.main, (*bundle, *data, *onnx)),
    (predict.main, (*bundle, __file__)),
    (bounds.main, (*bundle, *data, '--teacher', learned[0])),
    (weights.main, ('export', *bundle, '--output', f'{output}.pth')),
  ):
    code, _, err = run_command(command, *flags)
    assert code == 2, (command, err)
    assert 'has no head' in err and 'ijckd probe' in err, (command, err)
  assert not list(tmp_path.iterdir())


def test_the_bound_takes_them_as_images_without_labels(
  published_run, data_dir, run_command
):
  flags = [
    *('--bundle', published_run[0], '--data_dir', data_dir),
    *('--teacher', published_run[0] / 'teacher', '--fit_examples', 0),
    *('--unlabelled', 'tests.test_unlabelled:Others'),
  ]
  code, _, err = run_command(bounds.main, *flags)
  assert code == 2 and 'give --unlabelled_split' in err
  flags += ['--unlabelled_split', 'train', '--json']
  code, out, err = run_command(bounds.main, *flags)
  assert code == 0, err
  found = json.loads(out)['unlabelled']
  # Some that are symmetric are training images all the same.
  assert found['copies']['images'] == 1437
  assert found['examples'] == found['copies']['kept'] > 1400


def test_nothing_is_judged_on_them(published_run, data_dir, run_command):
  flags = ('--bundle', published_run[0], '--data_dir', data_dir)
  flags = (*flags, '--dataset', 'tests.test_unlabelled:Heap')
  for command in (evaluate.main, probe.main):
    code, _, err = run_command(command, *flags)
    assert code == 2 and 'the images of the data set have no classes' in err


def test_as_a_teacher_it_needs_a_head(learned, small_config):
  config = small_config()
  config.teacher.checkpoint = str(learned[0])
  config.teacher.backbone = 'resnet8'
  with pytest.raises(config_utils.UserError, match='teacher.head=fit'):
    experiment.build(config)


def test_it_is_judged_and_gets_a_head(learned, data_dir, run_command, tmp_path):
  data = ('--dataset', 'digits', '--data_dir', data_dir)
  flags = ('--bundle', learned[0], *data, '--json', '--output', tmp_path / 'a')
  code, out, err = run_command(probe.main, *flags)
  assert (code, err) == (0, '')
  found = json.loads(out)
  assert found['linear']['top1'] > 0.3 and found['nearest']['top1'] > 0.3
  _, out, _ = run_command(
    evaluate.main, '--bundle', tmp_path / 'a', *data, '--json'
  )
  assert json.loads(out)['network']['top1'] == found['linear']['top1']
  card = (tmp_path / 'a' / 'README.md').read_text()
  assert '# resnet8, distilled from resnet8 by simkd on arrays' in card
  percent = f'{found["linear"]["top1"]:.2%}'
  assert (
    f'a linear probe, fitted on 1,437 labelled images; top-1 {percent}' in card
  )
  assert '| data | digits' in card and 'data of the features' in card
  # It knows its data set, but for where that lies.
  flags = ('--bundle', tmp_path / 'a', '--data_dir', data_dir, '--json')
  assert run_command(evaluate.main, *flags)[1] == out


@pytest.mark.parametrize('parts', [('backbone',), ('backbone', 'connector')])
def test_a_student_starts_from_it(parts, learned, published_run, small_config):
  """The features that were learned, and the teacher's own head behind them."""
  config = small_config(backbone='resnet8')
  config.teacher.checkpoint = str(published_run[0])
  config.student.init_from = str(learned[0])
  config.student.init_parts = parts
  config.method.factor = 0  # auto: that of the connector, if it is taken.
  built = experiment.build(config)
  assert (built.distiller.method.factor == 4) == ('connector' in parts)
  params = built.init(jax.random.key(0))['params']
  own = bundles.load(learned[0]).variables['params']
  for part in parts:
    same = jax.tree.all(
      jax.tree.map(lambda x, y: np.array_equal(x, y), params[part], own[part])
    )
    assert same
  config.student.init_parts = ('backbone', 'head')
  config.method.head = 'copy'
  with pytest.raises(config_utils.UserError, match='has no head'):
    experiment.build(config)
