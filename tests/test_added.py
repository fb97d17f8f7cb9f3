"""Methods whose terms are added to another's."""

import jax
import numpy as np
import pytest

from ijckd_jax.distillation import methods
from ijckd_jax.runtime import config_utils
from ijckd_jax.training import experiment
from ijckd_jax.training import train
from tests import marks
from tests import test_methods as shared


def build(name, add, **fields):
  section = methods.section(name)
  section.add = add
  section.update(fields)
  return methods.build(section)


def evaluate(method):
  """Returns total and terms on a small pair."""
  distiller, variables = shared.bind(method)
  total, terms, *_ = shared.value_and_gradients(
    distiller, variables, shared.make_batch()
  )
  return total, terms


def test_terms_are_added_without_the_labels_again():
  plain, terms = evaluate(methods.get('ijckd')())
  total, found = evaluate(build('ijckd', 'kd:weight=2.0,temperature=2'))
  added = found.pop('kd_distillation')
  assert found.keys() == terms.keys()
  np.testing.assert_allclose(total, plain + 2 * added, rtol=1e-6)
  kd = methods.get('kd')(cross_entropy_weight=0.0, weight=1.0, temperature=2.0)
  student, teacher = shared.arrays(kd)
  alone, _ = kd.loss(student, teacher, {})
  both = build('kd', 'kd:weight=1.0,temperature=2', weight=0.0)
  total, _ = both.loss(student, teacher, {'label': np.full(6, -1)})
  np.testing.assert_allclose(total, alone, rtol=1e-6)


def test_labels_alone_become_a_distillation():
  method = build('ce', 'kd:weight=1.0')
  assert method.needs_teacher and method.predicts_with == 'own'
  _, terms = evaluate(method)
  assert terms.keys() == {'cross_entropy', 'kd_distillation'}
  assert not methods.build(methods.section('ce')).needs_teacher


# Without a teacher, and with a memory.
BASES = ('ce', 'crd')


@pytest.mark.parametrize(
  'base',
  marks.slow_but(BASES, sorted(methods.METHODS)),
)
def test_any_can_be_added_to_any_other_and_gets_what_it_needs(base):
  """Each with a module of its own, a memory, a connector, or none of these."""
  others = 'crd:num_negatives=4+vid+srrl+experiments.extension_example.method:'
  method = build(base, others + 'Method:cosine_weight=0.5')
  distiller, variables = shared.bind(method)
  batch = shared.complete(method, shared.make_batch())
  _, terms, trained, _ = shared.value_and_gradients(distiller, variables, batch)
  assert {'crd_contrast', 'vid_information', 'Method_cosine'} <= terms.keys()
  assert {'srrl_feature', 'srrl_logit'} <= terms.keys()
  assert 'connector' in trained and 'auxiliary' in trained
  assert all(np.isfinite(value) for value in terms.values())


# A whole run; the sums of losses and what they need are tested above.
@pytest.mark.slow
def test_a_run_with_an_added_method(finished_run, small_config, tmp_path):
  config = small_config(
    'at',
    **{
      'method.add': 'kd:weight=1.0+crd:num_negatives=9',
      'teacher.checkpoint': str(finished_run[0] / 'teacher'),
      'teacher.store.views': 0,
    },
  )
  result = train.train_and_evaluate(config, tmp_path)
  assert result.history[-1]['step'] == config.total_steps
  row = next(row for row in result.history if 'train/loss' in row)
  assert {'train/kd_distillation', 'train/crd_contrast'} <= row.keys()
  # Neither modules nor memory are deployed.
  assert result.bundle.variables['params'].keys() == {'backbone', 'head'}


@pytest.mark.parametrize(
  'add, said',
  [
    ('kdd', "unknown method 'kdd'; did you mean 'kd'"),
    ('kd:wieght=1', "did you mean 'weight'"),
    ('kd:weight', "no module 'kd'"),
    ('kd:weight=much', 'could not convert'),
    ('kd:standardize=maybe', 'neither true nor false'),
    ('kd:name=at', 'unknown field'),
    ('ce', 'no terms but that of the labels'),
    ('kd+', "unknown method ''"),
    ('kd:temperature=0', 'must be positive'),
  ],
)
def test_mistakes(add, said):
  with pytest.raises(config_utils.UserError, match=said):
    build('ijckd', add)


def test_what_cannot_be_connected_together_is_said(small_config):
  config = small_config(
    'vkd', **{'method.add': 'simkd', 'teacher.backbone': 'resnet8'}
  )
  with pytest.raises(config_utils.UserError, match='no map to compare'):
    experiment.build(config)


def test_two_second_views_are_refused_unless_they_are_one():
  same = methods.build({'name': 'mlkd', 'add': 'mlkd:temperature=2.0'})
  assert same.second_view == methods.get('mlkd')().second_view
  other = methods.build(
    {'name': 'kd', 'add': 'mlkd+mlkd:randaugment_magnitude=3'}
  )
  with pytest.raises(config_utils.UserError, match='different second views'):
    other.second_view  # noqa: B018
  plain = methods.build({'name': 'kd', 'add': 'srd'})
  assert plain.second_view is None and not plain.adapts_teacher


def test_two_equal_methods_have_memories_of_their_own():
  method = methods.build(
    {'name': 'ce', 'add': 'crd:num_negatives=3+crd:num_negatives=3'}
  )
  memories = method.memory(jax.random.key(0), 20)
  assert len(memories) == 2
  batch = {'memory': ('first', 'second'), 'label': None}
  # Of the three methods the first one has none.
  seen = [method._rows(number, batch)['memory'] for number in (1, 2)]
  assert seen == ['first', 'second']
