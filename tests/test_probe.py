"""What frozen features are worth: by hand, by the command, and refused."""

import json
import types

import jax.numpy as jnp
import numpy as np
import pytest

from ijckd_jax.bundles import bundles
from ijckd_jax.commands import evaluate
from ijckd_jax.commands import probe
from ijckd_jax.data import datasets
from ijckd_jax.data.datasets import digits
from ijckd_jax.evaluation import logistic
from ijckd_jax.evaluation import probes
from ijckd_jax.runtime import config_utils
from ijckd_jax.runtime import parallel


def features(pooled, labels):
  labels = np.asarray(labels, np.int32)
  return logistic.Features(
    np.asarray(pooled, np.float32), labels, np.arange(len(labels))
  )


def test_neighbours_vote_by_their_cosine():
  """Two far voices of class 0 are less than a near one of class 1."""
  train = features([[1, 0.1], [0, 5], [0, -3]], [1, 0, 0])
  found = probes.nearest(train, features([[9, 0]], [1]), 3)
  assert found == {'top1': 1.0}
  # Lengths do not count: by distance, the first would be far.
  train = features([[100, 0], [0, 1], [0, 1.1]], [1, 0, 0])
  assert probes.nearest(train, features([[0.1, 0]], [1]), 1)['top1'] == 1


def test_neighbours_are_those_of_brute_force():
  rng = np.random.default_rng(0)
  centres = rng.normal(size=(4, 6))
  labels = rng.integers(0, 4, 300)
  pooled = centres[labels] + 1.5 * rng.normal(size=(300, 6))
  train = features(pooled[:200], labels[:200])
  test = features(pooled[200:], labels[200:])
  unit = pooled / np.linalg.norm(pooled, axis=1, keepdims=True)
  cosines = unit[200:] @ unit[:200].T
  right = 0
  for row, label in zip(cosines, labels[200:], strict=True):
    nearest = np.argsort(-row)[:20]
    votes = np.zeros(4)
    np.add.at(votes, labels[nearest], np.exp(row[nearest] / 0.07))
    right += votes.argmax() == label
  assert 0.3 < right / 100 < 0.95
  assert probes.nearest(train, test, 20)['top1'] == right / 100


def test_a_linear_probe_is_scored_on_the_test_images():
  rng = np.random.default_rng(0)
  pooled = rng.normal(size=(300, 2))
  labels = (pooled[:, 0] > 0).astype(int)
  labels[250:260] = 1 - labels[250:260]  # A tenth of the last hundred.
  train = features(pooled[:200], labels[:200])
  test = features(pooled[200:], labels[200:])
  none = features(np.zeros((0, 2)), [])
  found = probes.linear(logistic.fit(train, none, 2, seed=0), test)
  assert abs(found['top1'] - 0.9) < 0.03


def test_the_command(finished_run, data_dir, run_command):
  workdir, result = finished_run
  flags = ('--bundle', workdir, '--dataset', 'digits', '--data_dir', data_dir)
  code, out, err = run_command(probe.main, *flags)
  assert (code, err) == (0, '')
  lines = out.splitlines()
  assert lines[0] == '1437 labelled training images, 360 of test, of 8x8 pixels'
  assert lines[1].startswith('linear probe: top1 0.')
  assert lines[2].startswith('20 nearest neighbours: top1 0.')
  _, out, _ = run_command(probe.main, *flags, '--json')
  found = json.loads(out)
  assert found['train'] == 1437 and found['test'] == 360
  # Of a student of twelve steps, whose features are better than its head.
  for name in ('linear', 'nearest'):
    assert found[name]['top1'] > result.summary['student']['last']['top1']
  assert f'{found["linear"]["top1"]:.6f}' in lines[1]


def test_the_probe_becomes_the_head_of_a_bundle(
  finished_run, data_dir, run_command, tmp_path
):
  flags = ('--dataset', 'digits', '--data_dir', data_dir)
  code, out, err = run_command(
    probe.main,
    *('--bundle', finished_run[0], *flags, '--output', tmp_path / 'probe'),
  )
  assert (code, err) == (0, '')
  said = f'written to {tmp_path / "probe"}, with the linear probe as its head'
  assert out.splitlines()[-1] == said
  top1 = out.splitlines()[1].removeprefix('linear probe: ')
  _, out, _ = run_command(evaluate.main, '--bundle', tmp_path / 'probe', *flags)
  assert top1 in out
  made = bundles.load(tmp_path / 'probe')
  assert made.info['run'] == {'best_by': 'test', 'choices': 1}
  assert made.teacher().num_classes == 10
  code, _, err = run_command(
    probe.main,
    *('--bundle', finished_run[0], *flags, '--output', tmp_path / 'probe'),
  )
  assert code == 2 and '--overwrite' in err


def test_images_without_labels_are_left_out(finished_run, data_dir):
  bundle = bundles.load(finished_run[0])
  arrays = digits.Dataset(data_dir=data_dir).load('train')
  some = datasets.Arrays(arrays.images[:60], arrays.labels[:60].copy())
  some.labels[10:] = -1
  splits = {'train': some, 'test': some}
  splits['validation'] = datasets.Arrays(some.images[:0], some.labels[:0])
  found, _ = probes.score(
    bundle.network,
    bundle.variables,
    splits,
    10,
    batch_size=20,
    neighbours=3,
  )
  assert (found['train'], found['test']) == (10, 10)


@pytest.mark.parametrize(
  'num_labels, neighbours, message',
  [
    (0, 1, 'has 0 labels, and a probe is fitted on two at least'),
    (1, 1, 'has 1 labels'),
    (5, 6, 'neighbours 6: it must be from 1 to 5, the labelled'),
  ],
)
def test_too_few_labels_are_refused(num_labels, neighbours, message):
  train = features(np.ones((num_labels, 2)), np.arange(num_labels))
  with pytest.raises(config_utils.UserError, match=message):
    probes.check(train, neighbours)


def test_what_is_wrong_is_said(finished_run, data_dir, run_command, tmp_path):
  flags = ('--dataset', 'digits', '--data_dir', data_dir)
  code, _, err = run_command(probe.main, '--bundle', tmp_path, *flags)
  assert code == 2 and err.startswith('error: ')
  flags = (*flags, '--bundle', finished_run[0])
  _, _, err = run_command(probe.main, *flags, '--neighbours', 0)
  assert '--neighbours=0: it must be positive' in err
  _, _, err = run_command(probe.main, *flags, '--neighbours', 2000)
  assert 'it must be from 1 to 1437' in err


class NotFinite:
  """Makes infinite features."""

  preprocessing = staticmethod(lambda images: images)

  def __call__(self, variables, images):
    del variables
    return types.SimpleNamespace(pooled=jnp.full((len(images), 2), jnp.inf))


def test_features_that_are_not_finite_are_refused(data_dir):
  arrays = digits.Dataset(data_dir=data_dir).load('test')
  with pytest.raises(config_utils.UserError, match='are not finite'):
    probes.features(
      NotFinite(), {}, arrays, mapper=parallel.Mapper(), batch_size=120
    )
