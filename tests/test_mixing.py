"""Mixup and cutmix: by hand, on any number of devices, in whole runs."""

import dataclasses
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ijckd_jax.bundles import bundles
from ijckd_jax.data import augment
from ijckd_jax.data import datasets
from ijckd_jax.data import mixing
from ijckd_jax.distillation import steps
from ijckd_jax.distillation import train_state
from ijckd_jax.models import losses
from ijckd_jax.runtime import config_utils
from ijckd_jax.runtime import parallel
from ijckd_jax.training import experiment
from ijckd_jax.training import train
from tests import views_on_devices

ROOT = views_on_devices.ROOT


def mix(made, images, labels, indices=None):
  num = len(images)
  indices = np.arange(num) if indices is None else np.asarray(indices)
  run = jax.jit(made)
  return run(
    jax.random.key(0), images, labels, np.zeros(num, np.int32), indices
  )


def blacks_and_whites(num, side=8):
  """Returns black images labelled 0, and their white partners labelled 1."""
  labels = np.arange(num, dtype=np.int32) % 2
  images = np.zeros((num, side, side, 1), np.uint8)
  images[1::2] = 200
  return images, labels


def test_mixing_by_hand():
  @dataclasses.dataclass(frozen=True)
  class Given(mixing.Mixing):
    """The left column is the row's own, the right one to index / 4."""

    def _share(self, key, epoch, index, size):
      right = jnp.full((1, 1), index / 4)
      return jnp.concatenate([jnp.ones((1, 1)), right], axis=1)

  images = np.array([[10, 20], [30, 40], [50, 60], [70, 80]], np.uint8)
  mixed, labels = mix(
    Given(1.0, 1.0),
    images.reshape(4, 1, 2, 1),
    np.array([5, -1, 7, 8]),
    [1, 0, 2, 4],
  )
  assert mixed.dtype == np.float32
  expected = [[10, 35], [30, 20], [50, 70], [70, 80]]
  np.testing.assert_array_equal(np.reshape(mixed, (4, 2)), expected)
  np.testing.assert_array_equal(labels.own, [5, -1, 7, 8])
  np.testing.assert_array_equal(labels.other, [-1, 5, 8, 7])
  np.testing.assert_array_equal(labels.weight, [5 / 8, 1 / 2, 3 / 4, 1])


@pytest.mark.parametrize('alpha', [1.0, 0.2])
def test_mixup_is_a_share_of_every_pixel(alpha):
  images, labels = blacks_and_whites(2000, side=2)
  mixed, labels = mix(mixing.Mixing(alpha, 0.0), images, labels)
  assert (np.ptp(mixed, axis=(1, 2, 3)) == 0).all()
  white = np.asarray(mixed)[:, 0, 0, 0] / 200
  expected = np.where(labels.own == 1, labels.weight, 1 - labels.weight)
  np.testing.assert_allclose(white, expected, atol=1e-6)
  # Beta(alpha, alpha), each row by itself.
  weights = np.asarray(labels.weight)
  assert abs(weights.mean() - 0.5) < 0.05
  assert abs(weights.var() * 4 * (2 * alpha + 1) - 1) < 0.1
  assert abs(np.corrcoef(weights[::2], weights[1::2])[0, 1]) < 0.15


def test_cutmix_is_a_box_out_of_the_partner():
  images, labels = blacks_and_whites(400)
  mixed, labels = mix(mixing.Mixing(0.0, 1.0), images, labels)
  mixed = np.asarray(mixed)[..., 0]
  assert set(np.unique(mixed)) == {0, 200}
  partner = (mixed == 200) != (np.asarray(labels.own) == 1)[:, None, None]
  np.testing.assert_allclose(1 - partner.mean((1, 2)), labels.weight)
  for view in partner:
    rows, columns = np.flatnonzero(view.any(1)), np.flatnonzero(view.any(0))
    assert view.sum() == len(rows) * len(columns)
    assert not len(rows) or np.ptp(rows) + 1 == len(rows)
    assert not len(columns) or np.ptp(columns) + 1 == len(columns)
  # Anywhere, of any size; edges cut what is left of a box in a corner.
  assert (partner.mean(0) > 0.05).all()
  assert {0, 1 / 16} < set(partner.mean((1, 2)))


def test_with_both_a_row_is_mixed_in_one_way_or_the_other():
  images, labels = blacks_and_whites(400)
  mixed, labels = mix(mixing.Mixing(1.0, 1.0), images, labels)
  is_cut = np.isin(mixed, (0, 200)).all((1, 2, 3))
  assert 150 < is_cut.sum() < 250


def test_smoothed_labels_by_hand():
  logits = np.log([[0.5, 0.25, 0.25], [0.1, 0.1, 0.8], [0.6, 0.2, 0.2]])
  images = np.zeros((3, 4, 4, 1), np.uint8)
  made, labels = mix(mixing.Mixing(0.0, 0.0, 0.3), images, np.array([0, 2, -1]))
  assert made.dtype == np.uint8  # Three rows, which could not be mixed.
  # Targets of 0.8, 0.1, 0.1 and of 0.1, 0.1, 0.8; the third has no label.
  expected = -0.8 * np.log(0.5) - 0.2 * np.log(0.25)
  expected += -0.2 * np.log(0.1) - 0.8 * np.log(0.8)
  np.testing.assert_allclose(
    losses.cross_entropy(logits, labels), expected / 3, rtol=1e-6
  )


def test_smoothed_labels_of_mixed_images():
  """Each of both labels is smoothed: the target is linear in them."""
  logits = np.random.default_rng(0).normal(size=(2, 4))
  labels = mixing.MixedLabels(
    np.array([0, 2]), np.array([3, 2]), np.array([0.25, 1.0]), smoothing=0.2
  )
  targets = np.full((2, 4), 0.05)
  targets[0, 0] += 0.8 * 0.25
  targets[0, 3] += 0.8 * 0.75
  targets[1, 2] += 0.8
  log_probs = jax.nn.log_softmax(logits)
  np.testing.assert_allclose(
    losses.cross_entropy(logits, labels),
    -np.mean(np.sum(targets * log_probs, axis=1)),
    rtol=1e-6,
  )


def test_an_odd_number_of_rows_is_refused():
  config = experiment.default_config(
    dataset='digits', teacher='resnet8', student='resnet8'
  )
  config.total_epochs, config.batch_size = 1.0, 15
  experiment.build(config)
  config.augment.cutmix_alpha = 1.0
  with pytest.raises(config_utils.UserError, match='15 rows.*even'):
    experiment.build(config)


@dataclasses.dataclass(frozen=True)
class Probe:
  """Cross-entropy, and a number that tells the views and indices apart."""

  predicts_with = 'own'
  tap = 'final'
  needs_teacher = False

  def build_connector(self, student, teacher):
    del student, teacher

  def loss(self, student, teacher, batch):
    del teacher
    images = batch['image']
    ramp = jnp.linspace(0.5, 1.5, images[0].size).reshape(images.shape[1:])
    rows = jnp.mean(images * ramp, axis=(1, 2, 3)) * (1 + batch['index'] % 7)
    return losses.combine(
      cross_entropy=(
        1.0,
        lambda: losses.cross_entropy(student.logits, batch['label']),
      ),
      probe=(1.0, lambda: jnp.mean(rows)),
    )


class LabelReader(Probe):
  """Takes labels for integers."""

  def loss(self, student, teacher, batch):
    del teacher
    rows = jax.nn.one_hot(batch['label'], 10) * student.logits
    return -jnp.mean(rows), {'own': jnp.mean(rows)}


def probe_config(method='Probe', **fields):
  config = experiment.default_config(
    dataset='digits',
    teacher='',
    student='experiments.extension_example.backbone:PlainNet',
    method=f'tests.test_mixing:{method}',
  )
  config.total_epochs, config.batch_size = 1.0, 48
  config_utils.override(config, {**views_on_devices.FIELDS, **fields})
  return config


def test_a_method_that_reads_labels_itself_is_refused_at_once():
  fields = {'augment.mixup_alpha': 0.0, 'augment.cutmix_alpha': 0.0}
  assert experiment.build(probe_config('LabelReader', **fields)).mixing is None
  for changed in ({}, {**fields, 'augment.label_smoothing': 0.1}):
    with pytest.raises(config_utils.UserError, match='does not take mixed or'):
      experiment.build(probe_config('LabelReader', **changed))


def one_step(num_devices, num_pieces):
  """Returns the means after a step of as many shards, on one device."""
  exp = experiment.build(probe_config(accumulation=num_pieces))
  tx, _ = exp.optimizer(48)
  step = jax.vmap(
    exp.train_step(tx),
    in_axes=(None, None, 0, None),
    out_axes=None,
    axis_name=parallel.AXIS,
  )
  init = jax.jit(exp.distiller.init, static_argnums=1)
  state = train_state.create(
    init(jax.random.key(0), (8, 8, 1)), tx, with_ema=False
  )
  shards = jax.tree.map(
    lambda x: x.reshape(num_devices, -1, *x.shape[1:]),
    views_on_devices.make_batch(),
  )
  run = jax.jit(step)
  key = jax.random.key(views_on_devices.SEED)
  _, sums = run(state, exp.frozen, shards, key)
  return {name: float(value / count) for name, (value, count) in sums.items()}


@pytest.fixture(scope='module')
def expected():
  """The views and labels of the whole batch, by one device."""
  return views_on_devices.views(views_on_devices.make_batch())


@pytest.mark.parametrize('num_devices, num_pieces', [(2, 8)])
@pytest.mark.slow
def test_steps_see_these_views_on_any_devices_and_in_any_pieces(
  expected, num_devices, num_pieces
):
  """Also in pieces of an odd number of rows."""
  means = one_step(num_devices, num_pieces)
  images, labels = expected
  ramp = np.linspace(0.5, 1.5, 64).reshape(8, 8, 1)
  rows = (images * ramp).mean((1, 2, 3)) * (1 + np.arange(48) % 7)
  np.testing.assert_allclose(means['probe'], rows.mean(), rtol=1e-5)
  assert 0 <= labels.weight.min() < 0.2 and labels.weight.max() > 0.9


@pytest.mark.slow
def test_views_are_the_same_on_one_device_two_and_eight(expected, tmp_path):
  out = tmp_path / 'views.npz'
  subprocess.run(
    [sys.executable, views_on_devices.__file__, out],
    check=True,
    cwd=ROOT,
    env={**os.environ, 'PYTHONPATH': str(ROOT)},
  )
  images, labels = expected
  found = np.load(out)
  assert set(found['devices']) == {2, 8}
  for number in found['devices']:
    np.testing.assert_array_equal(found[f'{number}/images'], images)
    for name in ('own', 'other', 'weight'):
      np.testing.assert_array_equal(
        found[f'{number}/{name}'], getattr(labels, name)
      )


def test_accuracy_of_training_is_by_the_larger_part():
  labels = mixing.MixedLabels(
    *map(np.array, ([1, 0, -1], [0, 1, 1], [0.6, 0.3, 0.9]))
  )
  logits = np.array([[0.0, 1.0], [0.0, 1.0], [0.0, 1.0]], np.float32)
  sums = steps._sums({}, jnp.asarray(logits), labels)
  assert tuple(map(float, sums['accuracy'])) == (2.0, 2.0)


@pytest.mark.slow
def test_function_matching_learns_from_mixed_images_without_labels(
  tmp_path, finished_run, small_config
):
  config = config_utils.load(
    f'{ROOT}/configs/function_matching.py:dataset=digits,teacher=resnet8,'
    'student=experiments.extension_example.backbone:PlainNet'
  )
  digits = experiment.build(small_config()).dataset
  config_utils.override(
    config,
    {
      'batch_size': 96,
      'total_epochs': 6.0,
      'eval_epochs': 6.0,
      'optimizer.warmup_epochs': 1.0,
      'optimizer.learning_rate': 0.01,
    },
  )
  images = digits.load('train').images
  data = datasets.ArrayDataset(
    train=datasets.Arrays(images, np.full(len(images), -1, np.int32)),
    test=digits.load('test'),
    class_names=digits.class_names,
    mean=digits.mean,
    std=digits.std,
  )
  teacher = bundles.load(finished_run[0] / 'teacher').teacher()
  result = train.train_and_evaluate(
    config, tmp_path, dataset=data, teacher=teacher
  )
  history = [row['train/distillation'] for row in result.history[:-1]]
  assert history[-1] < 0.5 * history[0]
  assert not any('train/accuracy' in row for row in result.history)
  # No label has told it that.
  assert result.summary['student']['last']['agreement'] > 0.4


def test_the_second_view_is_drawn_anew_and_mixed_like_the_first():
  rng = np.random.RandomState(0)
  images = rng.randint(0, 256, (16, 8, 8, 1)).astype(np.uint8)
  rows = np.arange(16, dtype=np.int32)
  batch = {'image': images, 'label': rows % 3, 'index': rows, 'epoch': 0 * rows}
  inverted = (lambda key, image: 255 - image,)

  def views(crop_padding, mixed, key=0, second_view=inverted):
    augmentation = augment.Augmentation(crop_padding, flip=False)
    key = jax.random.key(key)
    made = steps._augment(batch, key, augmentation, mixed, second_view)
    return made['image'], made.get('second'), made

  first, second, made = views(0, None)
  np.testing.assert_array_equal(first, images)
  np.testing.assert_array_equal(second, 255 - images)
  assert views(0, None, second_view=None)[1] is None
  # Another crop, of the same run; both are functions of the key.
  first, second, _ = views(2, None)
  np.testing.assert_array_equal(first, views(2, None, second_view=None)[0])
  assert np.any(255 - np.asarray(second) != first)
  np.testing.assert_array_equal(second, views(2, None)[1])
  assert np.any(np.asarray(second) != views(2, None, key=1)[1])
  # The same partner and share: an inverted mixture is one of the inverted.
  mixed = mixing.Mixing(1.0, 0.0)
  first, second, made = views(0, mixed)
  np.testing.assert_allclose(255 - second, first, atol=1e-3)
  assert np.any(first != images)
  assert isinstance(made['label'], mixing.MixedLabels)
