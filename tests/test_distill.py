"""The library from Python: arrays, teachers of one's own, errors."""

import os
import signal

import jax.numpy as jnp
import numpy as np
import pytest

import ijckd_jax
from ijckd_jax.data import augment
from ijckd_jax.models import outputs
from ijckd_jax.runtime import config_utils
from ijckd_jax.training import loop

SETTINGS = {
  'total_steps': 8,
  'eval_epochs': 0.0,
  'eval_steps': 4,
  'batch_size': 32,
  'eval_batch_size': 64,
}


@pytest.fixture(scope='module')
def data():
  """Random images whose class is the brightest quarter; some unlabelled."""
  rng = np.random.default_rng(0)

  def make(num):
    labels = rng.integers(0, 4, num)
    images = rng.integers(0, 100, (num, 8, 8, 3))
    for image, label in zip(images, labels, strict=True):
      row, column = divmod(label, 2)
      image[row * 4 : row * 4 + 4, column * 4 : column * 4 + 4] += 100
    return ijckd_jax.Arrays(images.astype(np.uint8), labels)

  train = make(200)
  train.labels[::3] = -1
  return ijckd_jax.ArrayDataset(
    train=train,
    test=make(100),
    class_names=('upper left', 'upper right', 'lower left', 'lower right'),
    mean=(0.3, 0.3, 0.3),
    std=(0.2, 0.2, 0.2),
  )


def quarters(variables, images):
  """A teacher without a single parameter but its head: mean of each quarter."""
  del variables
  blocks = images.reshape(-1, 2, 4, 2, 4, 3).mean(axis=(2, 4, 5))
  pooled = blocks.reshape(-1, 4)
  final = jnp.broadcast_to(pooled[:, None, None, :], (*images.shape[:3], 4))
  return outputs.Outputs((final,), final, pooled, 10 * pooled)


def test_pure_function_as_teacher_and_arrays_as_data(data, tmp_path):
  teacher = ijckd_jax.Teacher(
    apply=quarters,
    variables={},
    head={'kernel': 10 * jnp.eye(4), 'bias': jnp.zeros(4)},
    preprocessing=augment.Preprocessing(data.mean, data.std, (8, 8)),
    name='quarters',
  )
  result = ijckd_jax.distill(
    teacher=teacher,
    student='plain',
    data=data,
    workdir=tmp_path / 'run',
    settings={
      **SETTINGS,
      'total_steps': 60,
      'method.factor': 1,
      'optimizer.learning_rate': 0.01,
    },
  )
  assert result.summary['teacher']['top1'] == 1.0
  assert result.summary['student']['last']['top1'] > 0.9
  assert result.history[-1]['step'] == int(result.state.step) == 60
  # The head that was reused is the teacher's own.
  head = result.bundle.variables['params']['head']
  np.testing.assert_array_equal(head['kernel'], 10 * np.eye(4))
  again = ijckd_jax.load_bundle(tmp_path / 'run')
  assert again.class_names == data.class_names
  # A signed teacher's connector does not end in a ReLU.
  assert again.network.connector.signed


@pytest.mark.slow
def test_nothing_is_kept_without_a_workdir(data, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  result = ijckd_jax.distill(
    teacher='plain', student='plain', data=data, settings=SETTINGS
  )
  assert list(tmp_path.iterdir()) == []
  assert result.bundle.variables['params']['connector']
  assert set(result.summary['student']['last']) >= {'top1', 'agreement'}
  assert 'top5' not in result.summary['student']['last']


@pytest.mark.parametrize(
  'workdir, said',
  [
    (None, 'nothing is kept, because no workdir was given'),
    ('run', 'it is saved, and the same command continues from there'),
  ],
)
def test_what_is_said_when_a_run_is_stopped(data, tmp_path, workdir, said):
  class Stop:
    def write(self, step, scalars):
      os.kill(os.getpid(), signal.SIGTERM)

    def close(self):
      pass

  with pytest.raises(loop.Interrupted) as stopped:
    ijckd_jax.distill(
      teacher='plain',
      student='plain',
      data=data,
      method='ce',
      settings={**SETTINGS, 'log_epochs': 0.0, 'log_steps': 2},
      writers=[Stop()],
      workdir=workdir and tmp_path / workdir,
    )
  assert stopped.value.number == signal.SIGTERM
  assert str(stopped.value).endswith(f' s after the signal; {said}')
  assert str(stopped.value).startswith('plain stopped after step ')


def test_what_is_said_when_a_run_without_a_workdir_diverges(data):
  settings = {**SETTINGS, 'optimizer.learning_rate': 1e30}
  with pytest.raises(loop.Diverged) as raised:
    ijckd_jax.distill(
      teacher='plain',
      student='plain',
      data=data,
      method='ce',
      settings=settings,
    )
  said = str(raised.value)
  assert said.endswith('; nothing is kept, because no workdir was given')
  assert 'diverged.json' not in said and 'checkpoints' not in said


def test_other_arrays_are_another_run(data, tmp_path):
  def distill(arrays):
    return ijckd_jax.distill(
      teacher='resnet8',
      student='experiments.extension_example.backbone:PlainNet',
      data=arrays,
      method='ce',
      workdir=tmp_path,
      settings=SETTINGS,
    )

  distill(data)
  changed = ijckd_jax.Arrays(data.test.images[::-1], data.test.labels)
  other = ijckd_jax.ArrayDataset(
    train=data.train,
    test=changed,
    class_names=data.class_names,
    mean=data.mean,
    std=data.std,
  )
  with pytest.raises(config_utils.UserError, match='dataset.fingerprint'):
    distill(other)


@pytest.mark.parametrize(
  'change, said',
  [
    ({'student': 'resnet7'}, 'resnet8'),
    ({'method': 'ijkd'}, 'ijckd'),
    ({'data': 'digit'}, 'digits'),
    ({'teacher': 'nowhere'}, 'no bundle in nowhere'),
    ({'data': (np.zeros(3), np.zeros(3))}, 'data is of type tuple: .*Arrays'),
    ({'data': [1, 2]}, 'data is of type list'),
    ({'data': ijckd_jax.ArrayDataset}, 'data is the class ArrayDataset'),
    ({'settings': ['batch_size=3']}, 'settings is of type list: give a dict'),
    (
      {'teacher': np.zeros(3)},
      'of type ndarray.*converter.convert',
    ),
    ({'teacher': ['resnet8', len]}, 'a teacher is of type builtin'),
    ({'teacher': []}, 'no teacher is given'),
    ({'settings': {'total_epoch': 3}}, 'total_epochs'),
    ({'settings': {**SETTINGS, 'batch_size': 'many'}}, 'batch_size'),
  ],
  ids=str,
)
def test_mistakes(data, tmp_path, change, said):
  request = {'teacher': 'plain', 'student': 'plain', 'data': data}
  request |= {'settings': SETTINGS, 'workdir': tmp_path / 'run'}
  with pytest.raises(config_utils.UserError, match=said):
    ijckd_jax.distill(**{**request, **change})
  assert not (tmp_path / 'run').exists()
