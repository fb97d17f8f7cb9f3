"""Evaluation against numpy, and what the command says to mistakes."""

import dataclasses
import functools
import json
import os
import pathlib
import subprocess
import sys
import types

import jax
import numpy as np
import pytest

from experiments.benchmarks import classifiers
from ijckd_jax.bundles import bundles
from ijckd_jax.commands import bundle_flags
from ijckd_jax.commands import evaluate
from ijckd_jax.data import datasets
from ijckd_jax.data.datasets import digits
from ijckd_jax.evaluation import evaluator as evaluator_lib
from ijckd_jax.runtime import config_utils
from ijckd_jax.runtime import parallel


@pytest.fixture
def command(run_command):
  return functools.partial(run_command, evaluate.main)


@pytest.fixture
def refused(command):
  """Returns a function that runs the command in vain: its one line."""

  def run(*argv):
    code, out, err = command(*argv)
    assert (code, out) == (2, '')
    assert err.startswith('error: ') and err.count('\n') == 1, err
    return err

  return run


def logits_of(bundle, images):
  @jax.jit
  def apply(variables, images):
    network = bundle.network
    return network(variables, network.preprocessing(images)).logits

  return np.asarray(apply(bundle.variables, images))


def test_confusion_and_top5_against_numpy(finished_run, data_dir):
  """Over four batches of 100, the last one of 60 examples."""
  workdir, _ = finished_run
  student = bundles.load(workdir)
  teacher = bundles.load(workdir / 'teacher')
  test = digits.Dataset(data_dir=data_dir).load('test')
  labels = test.labels.copy()
  labels[3::7] = -1  # Not the first, whose copies fill up the last batch.
  mapper = parallel.Mapper()
  evaluator = evaluator_lib.make(
    student.network, mapper=mapper, batch_size=100, teacher=teacher.teacher()
  )
  result = evaluator(
    student.variables,
    mapper.replicate(teacher.teacher().arrays),
    datasets.Arrays(test.images, labels),
  )
  for bundle, found in ((student, result), (teacher, result.teacher)):
    logits = logits_of(bundle, test.images)
    expected = np.zeros((10, 10), int)
    in_top5 = []
    for row, label in zip(logits, labels, strict=True):
      if label >= 0:
        order = np.argsort(-row)
        expected[label, order[0]] += 1
        in_top5.append(label in order[:5])
    assert found.confusion.dtype == np.int64
    np.testing.assert_array_equal(found.confusion, expected)
    # Not symmetric, or the true classes could be taken for the predicted.
    assert (expected != expected.T).any()
    np.testing.assert_allclose(found.metrics['top5'], np.mean(in_top5))
    np.testing.assert_allclose(
      found.metrics['top1'], np.trace(expected) / np.sum(labels >= 0)
    )
    assert found.metrics['top1'] < found.metrics['top5'] < 1
    np.testing.assert_array_equal(found.predictions, logits.argmax(axis=1))


def test_the_command_agrees_with_the_run(command, finished_run, data_dir):
  workdir, result = finished_run
  code, out, err = command(
    *('--bundle', workdir, '--teacher', workdir / 'teacher', '--json'),
    *('--batch_size', 90),
  )
  assert (code, err) == (0, '')
  printed = json.loads(out)
  assert printed.pop('examples') == 360
  assert set(printed) == {'student', 'teacher'}
  for name, expected in (
    ('student', result.summary['student']['last']),
    ('teacher', result.summary['teacher']),
  ):
    assert printed[name] == pytest.approx(expected, rel=1e-4), name


def test_dataset_fields(command, finished_run):
  workdir, _ = finished_run
  code, out, _ = command(
    *('--bundle', workdir, '--split', 'validation'),
    *('--dataset_fields', 'validation_fraction=0.1,flip=true,crop_padding=2'),
  )
  assert code == 0
  assert out.startswith('142 examples of validation\nnetwork: top1 0.')


@pytest.mark.parametrize(
  'text, value',
  [('true', True), ('True', True), ('1', True), ('false', False), ('0', False)],
)
def test_booleans(text, value):
  fields = config_utils.section(digits.Dataset, 'digits')
  fields.flip = not value
  bundle_flags._set_fields(fields, f'flip={text}')
  assert fields.flip is value


@pytest.mark.parametrize(
  'argv, said',
  [
    (['--batch_size', '0'], '--batch_size 0: it must be a positive multiple'),
    (['--batch_size', '-8'], '--batch_size -8: it must be a positive'),
    (['--batch_size', 'many'], "invalid int value: 'many'"),
    (['--bach_size', '8'], 'unrecognized arguments'),
    (['--split', 'tset'], "invalid choice: 'tset'"),
    (['--split', 'validation'], "the split 'validation' is empty"),
    (['--dataset', 'digit'], "did you mean 'digits'"),
    (['--dataset', 'cifar10'], 'images of 1 channels'),
    (['--dataset', 'cifar100'], 'has 100'),
    (['--dataset', 'arrays'], "unknown dataset 'arrays'"),
    (['--dataset_fields', 'flp=true'], "'flp'; did you mean 'flip'"),
    (['--dataset_fields', 'name=cifar10'], "'name'"),
    (['--dataset_fields', 'flip'], 'give key=value'),
    (['--dataset_fields', 'flip=maybe'], "flip='maybe' is not of type bool"),
    (['--dataset_fields', 'flip=t'], "flip='t' is not of type bool"),
    (['--dataset_fields', 'flip='], "flip='' is not of type bool"),
    (['--dataset_fields', 'crop_padding=2.5'], "'2.5' is not of type int"),
    (['--dataset_fields', 'validation_fraction=x'], "'x' is not of type float"),
    (['--dataset_fields', 'validation_fraction=2'], 'validation_fraction=2.0'),
    (['--dataset_fields', 'crop_padding=-2'], 'crop_padding=-2'),
    (['--teacher', '/nowhere'], 'no bundle in /nowhere'),
  ],
)
def test_mistakes_get_one_line(refused, finished_run, argv, said):
  err = refused('--bundle', finished_run[0], *argv)
  assert said in err
  if argv[0] == '--dataset_fields' and '=2' not in err and '=-2' not in err:
    assert err.startswith('error: --dataset_fields: ')


def test_no_bundle(refused, tmp_path):
  assert '--bundle' in refused()
  assert 'there is no bundle' in refused('--bundle', tmp_path)


def test_batch_size_is_a_multiple_of_the_devices(tmp_path):
  classifiers.alone('resnet8', (8, 8, 1), num_classes=10).save(tmp_path)
  result = subprocess.run(
    [sys.executable, '-m', 'ijckd_jax', 'evaluate', '--batch_size', '45']
    + ['--bundle', str(tmp_path), '--dataset', 'digits'],
    env={
      **os.environ,
      'XLA_FLAGS': '--xla_force_host_platform_device_count=2',
      'JAX_PLATFORMS': 'cpu',
    },
    cwd=pathlib.Path(__file__).parents[1],
    capture_output=True,
    text=True,
    check=False,
  )
  assert (result.returncode, result.stdout) == (2, '')
  assert '--batch_size 45: it must be a positive multiple' in result.stderr
  assert 'the 2 devices' in result.stderr


def changed(bundle, folder, **info):
  """Returns a folder with the bundle, and other things known of it."""
  dataclasses.replace(bundle, info=bundle.info | info).save(folder)
  return folder


def test_trained_on_arrays(command, refused, finished_run, data_dir, tmp_path):
  folder = changed(
    finished_run[1].bundle,
    tmp_path / 'bundle',
    dataset={'name': 'arrays', 'fingerprint': 3},
  )
  assert 'arrays from Python' in refused('--bundle', folder)
  assert 'give --dataset' in refused('--bundle', folder)
  code, _, err = command(
    *('--bundle', folder, '--dataset', 'digits', '--data_dir', data_dir)
  )
  assert (code, err) == (0, '')


@pytest.mark.parametrize(
  'info, said',
  [
    ({'dataset': {}}, 'names no data set: give --dataset'),
    ({'dataset': {'name': ['digits']}}, 'names no data set: give --dataset'),
    ({'dataset': {'name': 'digits', 'flip': 'maybe'}}, "flip='maybe'"),
    ({'dataset': 'digits'}, 'dataset must be an object'),
    ({'eval_batch_size': 'many'}, 'eval_batch_size must be'),
  ],
)
def test_damaged_info(refused, finished_run, tmp_path, info, said):
  folder = changed(finished_run[1].bundle, tmp_path / 'bundle', **info)
  assert said in refused('--bundle', folder)


def test_fields_that_the_data_set_no_longer_has(
  refused, finished_run, tmp_path
):
  bundle = finished_run[1].bundle
  folder = changed(
    bundle, tmp_path / 'bundle', dataset={**bundle.info['dataset'], 'zoom': 2}
  )
  assert "unknown config field 'zoom'" in refused('--bundle', folder)


def test_a_data_set_outside_the_package_is_imported_only_if_trusted(
  command, refused, finished_run, data_dir, tmp_path, monkeypatch
):
  monkeypatch.syspath_prepend(tmp_path)
  (tmp_path / 'outside_data.py').write_text(
    'from ijckd_jax.data.datasets.digits import Dataset\n'
  )
  bundle, name = finished_run[1].bundle, 'outside_data:Dataset'
  folder = changed(
    bundle,
    tmp_path / 'bundle',
    dataset={**bundle.info['dataset'], 'name': name},
  )
  assert 'give --trust_code' in refused('--bundle', folder)
  assert 'outside_data' not in sys.modules
  code, out, _ = command('--bundle', folder, '--trust_code')
  assert (code, 'outside_data' in sys.modules) == (0, True)
  assert out.startswith('360 examples')


def test_trust_code_reaches_bundle_and_teacher(
  command, refused, finished_run, tmp_path, monkeypatch
):
  monkeypatch.syspath_prepend(tmp_path)
  (tmp_path / 'outside_net.py').write_text(
    "from ijckd_jax import models\nnet = models.BACKBONES['plain']\n"
  )
  workdir, _ = finished_run
  folder = tmp_path / 'bundle'
  bundles.load(workdir / 'teacher').save(folder)
  spec = json.loads((folder / bundles.SPEC_FILE).read_text())
  spec['backbone'] = spec['pool'] = 'outside_net:net'
  (folder / bundles.SPEC_FILE).write_text(json.dumps(spec))
  for argv in (
    ['--bundle', folder],
    ['--bundle', workdir, '--teacher', folder],
  ):
    assert 'outside_net' in refused(*argv)
    assert 'outside_net' not in sys.modules
    code, out, err = command(*argv, '--trust_code')
    assert code == 0, err
    assert 'top1' in out
    del sys.modules['outside_net']


def test_teacher_must_fit(refused, finished_run, tmp_path):
  workdir, result = finished_run
  bundle, params = result.bundle, result.bundle.variables['params']
  head = {
    name: np.asarray(array)[..., :9] for name, array in params['head'].items()
  }
  dataclasses.replace(
    bundle,
    class_names=bundle.class_names[:9],
    variables={**bundle.variables, 'params': {**params, 'head': head}},
  ).save(tmp_path / 'nine')
  for name, argv in (
    ('bundle', ['--bundle', tmp_path / 'nine']),
    ('teacher', ['--bundle', workdir, '--teacher', tmp_path / 'nine']),
  ):
    err = refused(*argv)
    assert f'the {name} tells 9 classes apart, but the data set has 10' in err
  colours = types.SimpleNamespace(
    class_names=bundle.class_names, image_shape=(8, 8, 3)
  )
  with pytest.raises(config_utils.UserError, match='images of 1 channels, but'):
    bundle_flags.check_fits('teacher', bundle, colours)


def in_channels(bundle, number):
  """Returns a network of grey images that reads them in several channels."""
  params = bundle.variables['params']
  first = params['backbone']['Conv_0']
  kernel = np.repeat(first['kernel'] / number, number, axis=2)
  backbone = {**params['backbone'], 'Conv_0': {**first, 'kernel': kernel}}
  own = bundle.network.preprocessing
  preprocessing = dataclasses.replace(
    own, mean=own.mean * number, std=own.std * number
  )
  return dataclasses.replace(
    bundle,
    image_shape=(8, 8, number),
    network=dataclasses.replace(bundle.network, preprocessing=preprocessing),
    variables={**bundle.variables, 'params': {**params, 'backbone': backbone}},
  )


def test_a_network_of_colours_sees_grey_images_in_all_channels(
  command, finished_run, tmp_path
):
  workdir, _ = finished_run
  in_channels(bundles.load(workdir), 3).save(tmp_path / 'colour')
  grey, colour = (
    json.loads(command('--bundle', folder, '--dataset', 'digits', '--json')[1])
    for folder in (workdir, tmp_path / 'colour')
  )
  assert colour['network']['top1'] == grey['network']['top1']
  assert colour['network']['nll'] == pytest.approx(grey['network']['nll'])
