"""Students of Flax NNX and of plain functions, and their examples."""

import dataclasses
import os
import signal
import sys

import equinox as eqx
from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.jax_students import function_student
from experiments.jax_students import nnx_student
import ijckd_jax
from ijckd_jax import models
from ijckd_jax.commands import export
from ijckd_jax.data.datasets import digits
from ijckd_jax.deploy import sessions
from ijckd_jax.distillation import network as network_lib
from ijckd_jax.runtime import config_utils
from ijckd_jax.training import loop

IMAGES = np.random.default_rng(0).normal(size=(6, 8, 8, 1)).astype(np.float32)


class Counting(function_student.Student):
  """The example, with a counter of steps, a scalar, in its state."""

  def init_fn(self, key, images):
    params, state = super().init_fn(key, images)
    return params, {**state, 'steps': jnp.zeros((), jnp.int32)}

  def apply_fn(self, params, state, images, *, train, key):
    steps = state['steps']
    assert steps.dtype == jnp.int32
    state = {'mean': state['mean']}
    maps, state = super().apply_fn(params, state, images, train=train, key=key)
    return maps, {**state, 'steps': steps + train}


STUDENTS = {'nnx': nnx_student.Student, 'functions': Counting}


class Stop:
  """A writer that stops its run at the first row."""

  def write(self, step, scalars):
    os.kill(os.getpid(), signal.SIGTERM)

  def close(self):
    pass


@dataclasses.dataclass(frozen=True)
class Run:
  form: str
  folder: str
  result: object
  distill: object


@pytest.fixture(scope='module', params=['nnx', 'functions'])
def run(request, finished_run, data_dir, tmp_path_factory):
  """A finished run of each kind of student, and how to make it again."""

  def distill(folder, **more):
    return ijckd_jax.distill(
      teacher=finished_run[0] / 'teacher',
      student=STUDENTS[request.param],
      data='digits',
      workdir=folder,
      settings={
        'total_steps': 40,
        'log_epochs': 0.0,
        'log_steps': 10,
        'eval_epochs': 0.0,
        'eval_steps': 20,
        'batch_size': 48,
        'eval_batch_size': 120,
        'optimizer.learning_rate': 0.02,
        'bounds.fit_examples': 0,
        'dataset.data_dir': data_dir,
      },
      **more,
    )

  folder = tmp_path_factory.mktemp(request.param) / 'run'
  return Run(request.param, str(folder), distill(folder), distill)


@pytest.fixture(scope='module')
def test_images(data_dir):
  return digits.Dataset(data_dir=data_dir).load('test')


def logits_of(bundle, images):
  network = bundle.network
  return jax.jit(lambda x: network(bundle.variables, network.preprocessing(x)))(
    images
  ).logits


def assert_same(one, other):
  jax.tree.map(np.testing.assert_array_equal, one, other)


def run_once(backbone, images=IMAGES, *, train=False, key=None, variables=None):
  """Returns a backbone's variables, features, and state after a call."""
  if variables is None:
    key_of_start = jax.random.key(0)
    _, variables = network_lib.init(backbone, key_of_start, images[:1])
  features, state = network_lib.run(
    backbone, variables, images, train=train, key=key
  )
  return variables, features, state


def test_the_bundle_predicts_as_the_run_did(run, test_images):
  """Loaded by its name, with the running statistics of the training."""
  last = run.result.summary['student']['last']
  assert last['top1'] > 0.5
  with pytest.raises(config_utils.UserError, match='names code outside'):
    ijckd_jax.load_bundle(run.folder)
  bundle = ijckd_jax.load_bundle(run.folder, trust_code=True)
  assert bundle.backbone_name == models.name_of(STUDENTS[run.form])
  logits = logits_of(bundle, test_images.images)
  assert_same(logits, logits_of(run.result.bundle, test_images.images))
  top1 = np.mean(np.argmax(logits, axis=1) == test_images.labels)
  np.testing.assert_allclose(top1, last['top1'], atol=1e-6)
  statistics = bundle.variables['batch_stats']['backbone']
  assert all(np.any(x) for x in jax.tree.leaves(statistics))
  assert statistics['net'].get('steps', 40) == 40
  shifted = jax.tree.map(lambda x: x + 1, statistics)
  bundle.variables['batch_stats']['backbone'] = shifted
  changed = logits_of(bundle, test_images.images)
  assert np.abs(changed - logits).max() > 0.1


def test_a_run_that_was_stopped_ends_alike(run, tmp_path):
  with pytest.raises(loop.Interrupted):
    run.distill(tmp_path / 'run', writers=[Stop()])
  again = run.distill(tmp_path / 'run').state
  whole = run.result.state
  assert int(again.step) == int(whole.step) == 40
  assert_same(again.params, whole.params)
  assert_same(again.batch_stats, whole.batch_stats)


def test_an_exported_file_predicts_as_the_bundle(
  run, run_command, data_dir, test_images, tmp_path
):
  form = {'nnx': 'onnx', 'functions': 'stablehlo'}[run.form]
  output = tmp_path / f'student.{form}'
  flags = ('--bundle', run.folder, '--trust_code', '--data_dir', data_dir)
  flags += ('--format', form, '--check_images', 100, '--output', output)
  code, _, err = run_command(export.main, *flags)
  assert not code, err
  images = test_images.images[:50]
  wanted = logits_of(run.result.bundle, images)
  logits, _ = sessions.load(str(output), trust_code=True)(images)
  np.testing.assert_allclose(logits, wanted, atol=1e-5 * np.abs(wanted).max())


def test_nnx_computes_what_its_module_does():
  backbone = nnx_student.Student()
  variables, features, _ = run_once(backbone)
  net = nnx_student.Net(16, rngs=nnx.Rngs(0))
  # A list's numbers are texts where a bundle is to name them.
  params = variables['params']['net']
  for name in ('convs', 'norms'):
    for number, layer in enumerate(getattr(net, name)):
      nnx.update(layer, params[name][str(number)])
  net.eval()
  assert_same(features.stages, jax.jit(net)(IMAGES))
  pooled = np.mean(features.final, axis=(1, 2))
  np.testing.assert_allclose(features.pooled, pooled, rtol=1e-5)


def test_batch_norm_follows_the_config():
  """In NNX: synchronised over devices, or frozen."""
  backbone = nnx_student.Student()
  variables, expected, whole = run_once(backbone, train=True)

  def on_two(backbone):
    halves, states = jax.vmap(
      lambda x: run_once(backbone, x, train=True, variables=variables)[1:],
      axis_name='devices',
    )(IMAGES.reshape(2, 3, 8, 8, 1))
    return halves.final.reshape(expected.final.shape), states

  final, states = on_two(nnx_student.Student(axis_name='devices'))
  np.testing.assert_allclose(final, expected.final, atol=1e-4)
  jax.tree.map(
    lambda x, y: np.testing.assert_allclose(x[0], y, atol=1e-5), states, whole
  )
  assert np.abs(on_two(backbone)[0] - expected.final).max() > 1e-2
  frozen = nnx_student.Student(freeze_statistics=True)
  _, features, state = run_once(frozen, train=True, variables=variables)
  assert_same(state, variables['batch_stats'])
  _, inference, _ = run_once(backbone, variables=variables)
  assert_same(features.final, inference.final)
  # By it a run is warned that is too short for the statistics.
  assert (backbone.momentum, DroppingStudent().momentum) == (0.9, 0.0)


class Dropping(nnx.Module):
  def __init__(self, rngs):
    self.layers = nnx.List(nnx.Dropout(0.5, rngs=rngs) for _ in range(2))

  def __call__(self, images):
    return tuple(layer(jnp.ones_like(images)) for layer in self.layers)


class DroppingStudent(ijckd_jax.NnxBackbone):
  def network(self, rngs):
    return Dropping(rngs)


def test_nnx_drops_by_the_key_of_the_step_in_training_alone():
  def stages(seed, train=True):
    key = None if seed is None else jax.random.key(seed)
    return run_once(DroppingStudent(), train=train, key=key)[1].stages

  first, second = stages(0)
  assert set(np.unique(first)) == {0, 2}
  assert np.any(first != second)  # Each layer by itself.
  assert_same((first, second), stages(0))
  assert np.any(first != stages(1)[0])
  assert_same(stages(0, train=False), (np.ones_like(IMAGES),) * 2)
  # The teacher that a method adapts has no key.
  assert_same(stages(None), (np.ones_like(IMAGES),) * 2)


class EquinoxNet(eqx.Module):
  conv: eqx.nn.Conv2d
  norm: eqx.nn.BatchNorm

  def __init__(self, key):
    self.conv = eqx.nn.Conv2d(1, 4, 3, padding=1, key=key)
    self.norm = eqx.nn.BatchNorm(4, axis_name='images', mode='batch')

  def __call__(self, image, state):
    return self.norm(self.conv(image), state)


class EquinoxStudent(ijckd_jax.FunctionBackbone):
  """Its state has a counter, and is a pytree without names."""

  def init_fn(self, key, images):
    net, state = eqx.nn.make_with_state(EquinoxNet)(key)
    return eqx.filter(net, eqx.is_inexact_array), jax.tree.leaves(state)

  def apply_fn(self, params, state, images, *, train, key):
    fresh, like = eqx.nn.make_with_state(EquinoxNet)(jax.random.key(0))
    net = eqx.nn.inference_mode(eqx.combine(params, fresh), not train)
    maps, state = jax.vmap(net, (0, None), (0, None), axis_name='images')(
      jnp.moveaxis(images, 3, 1),
      jax.tree.unflatten(jax.tree.structure(like), state),
    )
    return jnp.moveaxis(maps, 1, 3), jax.tree.leaves(state)


def test_equinox_with_a_counter_in_its_state():
  """After two steps it has what Equinox computes by itself."""
  backbone = EquinoxStudent()
  variables, *_ = run_once(backbone)
  net, state = eqx.nn.make_with_state(EquinoxNet)(jax.random.key(0))
  params = variables['params']['net']
  net = eqx.tree_at(
    lambda net: (net.conv.weight, net.conv.bias),
    net,
    (params['conv']['weight'], params['conv']['bias']),
  )
  for _ in range(2):
    _, features, stats = run_once(backbone, train=True, variables=variables)
    variables = {**variables, 'batch_stats': stats}
    maps, state = jax.vmap(net, (0, None), (0, None), axis_name='images')(
      np.moveaxis(IMAGES, 3, 1), state
    )
    np.testing.assert_allclose(
      features.final, np.moveaxis(maps, 1, 3), atol=1e-5
    )
  found = [stats['net'][name] for name in sorted(stats['net'])]
  for mine, wanted in zip(found, jax.tree.leaves(state), strict=True):
    assert mine.dtype == jnp.float32  # Devices average it.
    np.testing.assert_allclose(mine, wanted, rtol=1e-5, atol=1e-6)


def test_layers_that_name_no_dtype_have_the_runs():
  half = jnp.bfloat16
  _, features, _ = run_once(nnx_student.Student(dtype=half), train=True)
  assert {x.dtype for x in features.stages} == {np.dtype(half)}
  assert features.pooled.dtype == jnp.float32
  with pytest.raises(config_utils.UserError, match='map of float32.*bfloat16'):
    run_once(function_student.Student(dtype=half))


class Given(ijckd_jax.FunctionBackbone):
  """Functions that give what a test says."""

  start: object = ((), ())
  made: object = None

  def init_fn(self, key, images):
    return self.start

  def apply_fn(self, params, state, images, *, train, key):
    return self.made(images) if self.made else (images, state)


class Keeping(nnx.Module):
  """Keeps an array that is no variable, and one of another kind."""

  def __init__(self):
    self.table = jnp.ones(3)
    self.cache = nnx.Cache(jnp.ones(3))


class GivenNnx(ijckd_jax.NnxBackbone):
  net: object = None

  def network(self, rngs):
    return self.net()


@pytest.mark.parametrize(
  'backbone, said',
  [
    (Given(start=0), 'init_fn of Given gives a int: it must give a pair'),
    (Given(made=lambda x: x), 'apply_fn of Given gives a .*: it must give a p'),
    (
      Given(made=lambda x: (x[:, 0, 0], ())),
      r'gives shape \[1, 1\] for images',
    ),
    (Given(made=lambda x: ((x, x[:0]), ())), r'gives shape \[0, 8, 8, 1\] for'),
    (Given(made=lambda x: ({'a': x}, ())), 'Given gives dict for images'),
    (Given(start=({'n': np.arange(3)}, ())), 'parameter n, a int64 array'),
    (Given(start=({'a': {'b': 0.5}}, ())), 'the parameter a.b, a float: param'),
    (Given(start=((), [jax.random.key(0)])), 'the state 0, a key<fry> array'),
    (Given(tap='stage1'), "unknown tap 'stage1'"),
    (nnx_student.Student(tap='stage1'), 'does not end at stage1, but goes on'),
    (nnx_student.Student(unbiased_variance=True), 'unbiased_variance=False'),
    (GivenNnx(net=dict), 'of GivenNnx gives a dict, which is not an nnx.Mod'),
    (GivenNnx(net=Keeping), 'Keeping keeps cache, table outside of nnx.Param'),
  ],
)
def test_networks_that_do_not_fit(backbone, said):
  def init():
    features, variables = network_lib.init(
      backbone, jax.random.key(0), IMAGES[:1]
    )
    backbone.check_tap(features.stages)
    return variables

  with pytest.raises(config_utils.UserError, match=said) as raised:
    jax.eval_shape(init)
  assert '\n' not in str(raised.value)


@pytest.mark.parametrize('given', [(), {'mean': np.zeros(2, np.float32)}])
def test_a_state_that_training_would_lose(given):
  start = ((), {'mean': np.zeros(3, np.float32)})
  backbone = Given(start=start, made=lambda x: (x, given))
  variables, *_ = run_once(backbone)
  with pytest.raises(config_utils.UserError, match=r"of init_fn, {'mean': 'f"):
    run_once(backbone, train=True, variables=variables)


def local():
  class Local(nnx_student.Student):
    pass

  return Local


def renamed(module, name):
  return type(name, (nnx_student.Student,), {'__module__': module})


@pytest.mark.parametrize(
  'student, said',
  [
    (
      nnx_student.Student(),
      'the student is an object of type Student: give',
    ),
    (nnx_student.Net(2, rngs=nnx.Rngs(0)), 'of type Net: .*NnxBackbone'),
    (nnx_student.Net, 'the student, class Net, is no backbone: .*NnxBackbone'),
    (
      'experiments.jax_students.nnx_student:Net',
      'does not make a backbone: .*',
    ),
    (local(), 'Local of tests.test_jax_students cannot be imported by that'),
    (renamed('__main__', 'Main'), 'Main of __main__ cannot be .* file of its'),
    # There, another class has the name.
    (renamed(nnx_student.__name__, 'Student'), 'Student of .* cannot be impo'),
  ],
)
def test_students_that_cannot_be_found_again(
  student, said, data_dir, tmp_path, monkeypatch
):
  if getattr(student, '__module__', '') == '__main__':
    main = sys.modules['__main__']
    monkeypatch.setattr(main, student.__name__, student, raising=False)
  with pytest.raises(config_utils.UserError, match=said) as raised:
    ijckd_jax.distill(
      teacher='plain',
      student=student,
      data='digits',
      workdir=tmp_path / 'run',
      settings={'total_steps': 1, 'dataset.data_dir': data_dir},
    )
  assert '\n' not in str(raised.value)
  assert not (tmp_path / 'run').exists()


def test_a_class_and_its_name_are_one_student():
  name = 'experiments.jax_students.nnx_student:Student'
  assert models.name_of(nnx_student.Student) == models.name_of(name) == name


# Each trains a teacher, and a student.
@pytest.mark.slow
@pytest.mark.parametrize('example', [nnx_student, function_student])
def test_example(example, data_dir):
  accuracies = example.main(
    **{'total_epochs': 6.0, 'bounds.fit_examples': 0},
    **{'dataset.data_dir': data_dir},
  )
  assert accuracies['teacher'] > 0.9
  assert accuracies['student'] > 0.8
