"""Bundles: whole, self-contained, and never half there."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ijckd_jax import bundles
from ijckd_jax import config_utils
from ijckd_jax import experiment


def make_bundle(
  method='ijckd', teacher='resnet14x2', student='wrn_16_1', **fields
):
  """Returns the bundle of an untrained student, and its Distiller."""
  config = experiment.default_config(
    dataset='digits', teacher=teacher, student=student, method=method
  )
  config.total_steps = 1
  with config.unlocked():
    config.update_from_flattened_dict(fields)
  exp = experiment.build(config)
  rng = np.random.default_rng(0)

  def random(tree):
    return jax.tree.map(
      lambda x: rng.uniform(0.0, 0.2, x.shape).astype(np.float32), tree
    )

  fresh = jax.eval_shape(
    lambda key: exp.distiller.init(key, (8, 8, 1)), jax.random.key(0)
  )
  frozen = random(exp.judge.frozen) if exp.judge else None
  return bundles.Bundle(
    network=exp.distiller.deployed_network,
    variables=exp.distiller.deployed(random(fresh), frozen),
    backbone_name=student,
    pool_name=teacher if method == 'ijckd' else student,
    image_shape=(8, 8, 1),
    class_names=tuple('0123456789'),
    info={'anything': [1, 2]},
  )


def logits(bundle):
  images = np.random.default_rng(1).integers(0, 256, (3, 8, 8, 1), np.uint8)
  net = bundle.network
  return np.asarray(net(bundle.variables, net.preprocessing(images)).logits)


@pytest.mark.parametrize(
  'fields',
  [
    {},
    {'method.connector': 'bottleneck_depthwise', 'method.factor': 4},
    {'method.connector': 'linear'},
    {'method.connector': 'mlp', 'method.feature_site': 'pooled'},
    {'method': 'ce', 'student': 'resnet8'},
    {'method': 'kd', 'student': 'wrn_16_2'},
    {'method': 'srrl', 'student': 'resnet8'},
  ],
  ids=str,
)
def test_what_is_loaded_computes_the_same(tmp_path, fields):
  bundle = make_bundle(**fields)
  bundle.save(tmp_path / 'bundle')
  loaded = bundles.load(tmp_path / 'bundle')
  np.testing.assert_array_equal(logits(loaded), logits(bundle))
  assert loaded.info == bundle.info
  assert loaded.class_names == bundle.class_names
  expected = dataclasses.replace(bundle.network, pool=None)
  assert dataclasses.replace(loaded.network, pool=None) == expected
  assert [path.name for path in tmp_path.iterdir()] == ['bundle']


def test_as_teacher_its_head_reads_its_pooled_features():
  bundle = make_bundle()
  teacher = bundle.teacher()
  images = np.random.default_rng(1).integers(0, 256, (3, 8, 8, 1), np.uint8)
  out = teacher(teacher.frozen, jnp.asarray(images))
  np.testing.assert_allclose(out.logits, logits(bundle), rtol=1e-5)
  by_hand = out.pooled @ teacher.head['kernel'] + teacher.head['bias']
  np.testing.assert_allclose(out.logits, by_hand, rtol=1e-5)
  pooled = teacher.pool(teacher.pool_variables, out.final)
  np.testing.assert_array_equal(out.pooled, pooled)
  assert not teacher.signed and (np.asarray(out.final) >= 0).all()


def test_a_new_one_replaces_the_old(tmp_path):
  make_bundle().save(tmp_path / 'bundle')
  other = make_bundle('ce', student='resnet8')
  other.save(tmp_path / 'bundle')
  assert bundles.load(tmp_path).backbone_name == 'resnet8'


def damaged(tmp_path, change):
  make_bundle('ce', student='resnet8').save(tmp_path / 'bundle')
  change(tmp_path / 'bundle')
  with pytest.raises(config_utils.UserError) as error:
    bundles.load(tmp_path / 'bundle')
  return str(error.value)


def edit_spec(**fields):
  def change(folder):
    spec = json.loads((folder / bundles.SPEC_FILE).read_text())
    (folder / bundles.SPEC_FILE).write_text(json.dumps({**spec, **fields}))

  return change


def test_damage_is_named(tmp_path):
  def truncate(folder):
    arrays = folder / bundles.ARRAYS_FILE
    arrays.write_bytes(arrays.read_bytes()[:-9])

  assert 'cannot be read' in damaged(tmp_path, truncate)
  assert 'format 2' in damaged(tmp_path, edit_spec(format_version=2))
  assert 'not a bundle' in damaged(
    tmp_path, lambda folder: (folder / bundles.SPEC_FILE).write_text('[]')
  )
  assert 'cannot be read' in damaged(
    tmp_path, lambda folder: (folder / bundles.SPEC_FILE).write_text('{')
  )
  assert 'cannot be read' in damaged(
    tmp_path, lambda folder: (folder / bundles.ARRAYS_FILE).unlink()
  )
  assert 'do not fit' in damaged(tmp_path, edit_spec(backbone='resnet14'))
  assert 'do not fit' in damaged(tmp_path, edit_spec(backbone='resnet8x4'))
  assert 'do not fit' in damaged(tmp_path, edit_spec(class_names=['a', 'b']))


def test_there_is_none(tmp_path):
  with pytest.raises(config_utils.UserError, match='no bundle in'):
    bundles.load(tmp_path)
