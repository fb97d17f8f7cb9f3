"""How large a student will be, said before it is trained."""

import dataclasses
import re

import jax
import pytest

from ijckd_jax.runtime import config_utils
from ijckd_jax.training import experiment
from ijckd_jax.training import sizes


def built(method='ijckd', teacher='resnet20', student='resnet8', **fields):
  """Returns an experiment on digits, and its sizes."""
  config = experiment.default_config(
    dataset='digits', teacher=teacher, student=student, method=method
  )
  config_utils.override(config, {'total_epochs': 1.0, **fields})
  exp = experiment.build(config)
  shapes = jax.eval_shape(lambda: exp.init(jax.random.key(0)))
  return exp, sizes.of(exp, shapes)


def test_a_small_student_by_hand():
  exp, found = built()
  # 1x1 of 64 to 32, 3x3 of 32, 1x1 of 32 to 64, each with a batch norm.
  connector = 64 * 32 + 9 * 32 * 32 + 32 * 64 + 2 * (32 + 32 + 64)
  assert found.student['connector'] == connector
  assert found.student['head'] == 64 * 10 + 10
  assert found.total == found.student['backbone'] + connector + 650
  line = sizes.line(exp, found)
  assert f'{found.total:,} parameters (backbone 77,104, connector' in line
  assert line.endswith('33.6% of the 272,186 of its teacher resnet20')
  assert sizes.warning(exp, found) == ''


def test_a_student_with_its_own_head_has_no_connector():
  for method in ('kd', 'srrl'):
    exp, found = built(method)
    assert found.student['connector'] == 0
    assert 'connector' not in sizes.line(exp, found)


@pytest.mark.parametrize('method', ['ijckd', 'simkd'])
def test_the_setting_that_is_named_repairs_it(method):
  """A teacher of 256 channels: the connector is larger than the backbone."""
  exp, found = built(method, 'resnet8x4')
  said = sizes.warning(exp, found)
  assert said.startswith('its connector is larger than its backbone: ')
  field, value, total = re.search(
    r'--config\.(method\.\w+)=(\w+) makes it ([\d,]+) parameters', said
  ).groups()
  assert (field, value) == ('method.factor', '4')
  exp, found = built(method, 'resnet8x4', **{field: int(value)})
  assert f'{found.total:,}' == total
  assert sizes.warning(exp, found) == ''


def test_a_student_that_is_no_smaller_than_its_teacher():
  exp, found = built('kd', 'resnet8', 'resnet14')
  assert sizes.warning(exp, found) == (
    "the student has over 50% of its teacher's size: take a smaller student"
  )


def test_no_connector_is_small_enough():
  exp, found = built('ijckd', 'resnet8x4')
  settings = dict(sizes._smaller_connectors(exp))
  assert list(settings) == [
    *('factor=4', 'factor=8', 'factor=16', 'factor=32'),
    *('connector=bottleneck_depthwise', 'connector=conv1x1'),
  ]
  least = min(settings.values())
  tiny = {**found.student, 'backbone': least - 1}
  said = sizes.warning(exp, dataclasses.replace(found, student=tiny))
  assert 'such as srrl or kd, deploys no connector' in said


def test_settings_that_do_not_fit_are_left_out(monkeypatch):
  """A teacher of 32 channels has no bottleneck of factor 64."""
  monkeypatch.setattr(sizes, 'FACTORS', (32, 64))
  plain = 'experiments.extension_example.backbone:PlainNet'
  exp, _ = built('simkd', plain, plain)
  assert exp.teacher.num_features == 32
  assert [setting for setting, _ in sizes._smaller_connectors(exp)] == [
    'factor=32'
  ]
