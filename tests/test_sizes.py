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


def test_a_student_that_is_its_own_teacher_may_be_as_large(finished_run):
  fields = {'student.init_from': str(finished_run[0])}
  exp, found = built(
    teacher='',
    student='plain',
    **fields,
    **{'teacher.checkpoint': str(finished_run[0])},
  )
  assert found.is_large and 'size' not in sizes.warning(exp, found)


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


@pytest.mark.parametrize('method', ['ijckd', 'simkd'])
@pytest.mark.parametrize('max_growth', [1.25, 2.0])
def test_auto_takes_the_largest_connector_that_fits(method, max_growth):
  exp, found = built(
    method,
    'resnet8x4',
    **{'method.factor': 'auto', 'student.max_growth': max_growth},
  )
  factor = exp.distiller.connected_network.connector.factor
  # The plain student: the backbone, and ten classes on its 64 features.
  limit = max_growth * (found.student['backbone'] + 65 * 10)
  assert found.total <= limit
  assert f'method.factor=auto took {factor})' in sizes.line(exp, found)
  _, larger = built(method, 'resnet8x4', **{'method.factor': factor - 1})
  assert larger.total > limit
  _, same = built(method, 'resnet8x4', **{'method.factor': factor})
  assert same == found


def test_auto_on_the_command_line_and_where_there_is_no_factor():
  config = experiment.default_config(
    dataset='digits', teacher='resnet8x4', student='resnet8'
  )
  config.total_epochs = 1.0
  config_utils.apply_flags(
    config, ['--config.method.factor=auto', '--config.method.connector=conv1x1']
  )
  assert config.method.factor == 0
  exp = experiment.build(config)
  shapes = jax.eval_shape(lambda: exp.init(jax.random.key(0)))
  assert 'auto' not in sizes.line(exp, sizes.of(exp, shapes))


def test_auto_without_a_connector_that_fits_is_refused():
  fields = {'method.factor': 'auto', 'student.max_growth': 1.001}
  with pytest.raises(config_utils.UserError) as refused:
    built('ijckd', 'resnet8x4', **fields)
  # One channel inside: 64 to 1, 3x3 of 1, 1 to 256, and three batch norms.
  total = 77_104 + (64 + 9 + 256 + 2 * (1 + 1 + 256)) + 257 * 10
  assert f'would have {total:,} parameters, over 1.001 times' in str(
    refused.value
  )
  assert 'raise student.max_growth' in str(refused.value)
  with pytest.raises(config_utils.UserError, match='it must be above 1'):
    built(**{'student.max_growth': 1.0})
