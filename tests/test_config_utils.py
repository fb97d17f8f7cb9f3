"""Names, durations and fields, and errors that say what is allowed."""

import dataclasses
import json
import logging
import sys
import types

import ml_collections
import pytest

from ijckd_jax.runtime import config_utils
from ijckd_jax.training import durations
from ijckd_jax.training import experiment


def duration(what='total', *, epochs=0.0, steps=0, examples=0):
  return {
    f'{what}_epochs': epochs,
    f'{what}_steps': steps,
    f'{what}_examples': examples,
  }


def to_steps(config, **fields):
  return durations.to_steps(
    config, 'total', **{'num_examples': 1000, 'batch_size': 64, **fields}
  )


@pytest.mark.parametrize(
  'given, unit, value',
  [
    ({'epochs': 2.5}, 'epochs', 2.5),
    ({'steps': 7}, 'steps', 7),
    ({'examples': 640}, 'examples', 640),
    ({}, 'steps', 0),
  ],
)
def test_duration(given, unit, value):
  assert durations.duration(duration(**given), 'total') == (unit, value)


@pytest.mark.parametrize(
  'given, message',
  [
    (
      {'epochs': 1.0, 'steps': 2},
      'total_epochs=1.0 and total_steps=2: give one',
    ),
    ({'steps': 2, 'examples': 3}, 'total_steps=2 and total_examples=3'),
    (
      {'epochs': -0.5},
      'total_epochs=-0.5: .* cannot be negative',
    ),
    (
      {'steps': -1},
      'total_steps=-1: .* cannot be negative',
    ),
  ],
)
def test_durations_that_cannot_be(given, message):
  with pytest.raises(config_utils.UserError, match=message):
    durations.duration(duration(**given), 'total')
  with pytest.raises(config_utils.UserError, match=message):
    to_steps(duration(**given))


@pytest.mark.parametrize(
  'given, steps',
  [
    ({'epochs': 1.0}, 16),  # 15.625
    ({'epochs': 3.0}, 47),  # 46.875: not three times 16.
    ({'epochs': 0.5}, 8),  # 7.8125
    ({'epochs': 0.001}, 1),
    ({'steps': 7}, 7),
    ({'examples': 640}, 10),
    ({'examples': 1}, 1),
    ({}, 0),
  ],
)
def test_to_steps(given, steps):
  assert to_steps(duration(**given)) == steps


def test_to_steps_counts_periods_without_drift():
  epoch = duration(epochs=1.0)
  assert [to_steps(epoch, times=n) for n in (1, 2, 3, 240)] == [
    16,
    31,
    47,
    3750,
  ]
  assert to_steps(duration(epochs=0.001), times=5) == 5


def ends(total_steps, **given):
  """Returns the period ends up to a step, asked for from every step."""
  found = [
    durations.next_period_end(
      duration(**given), 'total', step, num_examples=1000, batch_size=64
    )
    for step in range(total_steps)
  ]
  assert all(end > step for step, end in enumerate(found))
  assert found == sorted(found)
  return sorted({end for end in found if end <= total_steps})


def test_period_ends():
  """Each is where so many whole periods end, for uneven ones too."""
  assert ends(500, epochs=0.37) == [round(t * 5.78125) for t in range(1, 87)]
  assert ends(48, epochs=1.0) == [16, 31, 47]
  assert ends(47, epochs=1.0) == [16, 31, 47]
  assert ends(46, epochs=1.0) == [16, 31]
  assert ends(10, steps=4) == [4, 8]
  assert ends(10, steps=11) == []
  assert ends(10) == []
  # A period shorter than a step ends at each.
  assert ends(3, examples=1) == [1, 2, 3]


def test_epoch_end():
  assert durations.epoch_end(150, 50_000, 64) == 117_188
  assert durations.epoch_end(1, 1000, 64) == 16


TABLE = {'resnet8': dict, 'resnet14': 'json:loads', 'broken': 'no_such:Thing'}


def test_resolve():
  assert config_utils.resolve('thing', 'resnet8', TABLE) is dict
  assert config_utils.resolve('thing', 'resnet14', TABLE) is json.loads
  assert config_utils.resolve('thing', 'json:dumps', TABLE) is json.dumps
  assert config_utils.resolve('thing', 'os.path:join', {}).__name__ == 'join'


@pytest.mark.parametrize(
  'name, message',
  [
    (
      'resnet9',
      "unknown thing 'resnet9'; did you mean 'resnet8'\\? known: broken, "
      'resnet14, resnet8; or package.module:Name',
    ),
    ('zzz', "unknown thing 'zzz'; known: broken"),
    ('', "unknown thing ''; known: broken"),
    (':Thing', "unknown thing ':Thing'"),
    ('.models:Thing', "unknown thing '.models:Thing'"),
    ('broken', "thing 'broken': there is no module 'no_such'"),
    ('no_such.module:Thing', "there is no module 'no_such.module'"),
    ('json.no_such:Thing', "there is no module 'json.no_such'"),
    ('json:load_s', "unknown thing in json 'load_s'; did you mean 'load"),
    ('json:', "unknown thing in json ''; known: "),
  ],
)
def test_resolve_says_what_there_is(name, message):
  with pytest.raises(config_utils.UserError, match=message):
    config_utils.resolve('thing', name, TABLE)


@pytest.mark.parametrize('missing', ['absent', 'absent_thing.part'])
def test_resolve_does_not_hide_what_a_module_lacks(
  tmp_path, monkeypatch, missing
):
  """`absent_thing` is there; that its import of `absent` fails is its error."""
  monkeypatch.syspath_prepend(tmp_path)
  (tmp_path / 'absent_thing_user.py').write_text(f'import {missing}\n')
  with pytest.raises(ModuleNotFoundError, match='absent') as caught:
    config_utils.resolve('thing', 'absent_thing_user:Thing', {})
  assert not isinstance(caught.value, config_utils.UserError)


@dataclasses.dataclass(frozen=True)
class Thing:
  """Something with fields."""

  size: int = 3
  rate: float = 0.5


def test_reference_is_what_resolve_takes():
  assert config_utils.reference(Thing(), {'thing': Thing}) == 'thing'
  name = config_utils.reference(Thing(), {'dict': dict})
  assert name == f'{__name__}:Thing'
  assert config_utils.resolve('thing', name, {}) is Thing


def test_section_and_instantiate():
  section = config_utils.section(Thing, 'thing')
  assert section.to_dict() == {'name': 'thing', 'size': 3, 'rate': 0.5}
  section.size = 4
  assert config_utils.instantiate('thing', Thing, section) == Thing(4, 0.5)
  with pytest.raises(
    config_utils.UserError,
    match="thing 'x' has no field 'sise'; it has: size, rate",
  ):
    config_utils.instantiate('thing', Thing, {'name': 'x', 'sise': 1})


@pytest.mark.parametrize('arg', [None, '', ','])
def test_parse_arg_without_one_gives_defaults(arg):
  parsed = config_utils.parse_arg(arg, teacher='a', method='b')
  assert parsed.to_dict() == {'teacher': 'a', 'method': 'b'}


def test_parse_arg():
  parsed = config_utils.parse_arg(
    'method=x:Y,teacher=c=d', teacher='a', method='b', student='s'
  )
  assert parsed.to_dict() == {'teacher': 'c=d', 'method': 'x:Y', 'student': 's'}


@pytest.mark.parametrize(
  'arg, message',
  [
    ('ijckd', "'ijckd': give key=value, with a key of teacher, method"),
    (
      'teachers=x',
      "unknown config argument 'teachers'; did you mean 'teacher'",
    ),
    ('recipe=shor', "unknown recipe 'shor'; did you mean 'short'"),
  ],
)
def test_parse_arg_says_what_is_wrong(arg, message):
  with pytest.raises(config_utils.UserError, match=message):
    config_utils.parse_arg(
      arg, teacher='a', method='b', recipe=('long', 'short')
    )


def test_parse_arg_of_one_of_several_values():
  for arg, recipe in ((None, 'long'), ('recipe=short', 'short')):
    parsed = config_utils.parse_arg(arg, recipe=('long', 'short'))
    assert parsed.to_dict() == {'recipe': recipe}


def test_differences():
  old = {'a': 1, 'b': {'c': (1, 2), 'd': 'x'}, 'gone': 0.5}
  new = {'a': 1, 'b': {'c': [1, 3], 'd': 'x'}, 'new': True}
  assert config_utils.differences(old, new) == [
    'b.c: [1, 2] -> [1, 3]',
    "gone: 0.5 -> '(none)'",
    "new: '(none)' -> True",
  ]


def test_differences_of_what_json_gave_back():
  config = make_config()
  again = json.loads(config_utils.to_json(config))
  assert config_utils.differences(again, config.to_dict()) == []
  config.optimizer.learning_rate = 0.1
  assert config_utils.differences(again, config.to_dict()) == [
    'optimizer.learning_rate: 0.05 -> 0.1'
  ]


def test_to_json_does_not_depend_on_the_order():
  one = ml_collections.ConfigDict({'a': 1, 'b': {'c': 2, 'd': 3}})
  other = ml_collections.ConfigDict({'b': {'d': 3, 'c': 2}, 'a': 1})
  assert config_utils.to_json(one) == config_utils.to_json(other)


def test_flatten():
  nested = {'a': {'b': {'c': 1}, 'd': (2, 3)}, 'e': 4}
  expected = {'a.b.c': 1, 'a.d': (2, 3), 'e': 4}
  assert config_utils.flatten(nested) == expected
  assert config_utils.flatten(ml_collections.ConfigDict(nested)) == expected


def make_config():
  return experiment.default_config(
    dataset='digits', teacher='resnet14', student='resnet8'
  )


def test_override():
  config = make_config()
  config_utils.override(
    config,
    {
      'total_epochs': 3,
      'method.factor': 4,
      'optimizer.decay_epochs': (10.0, 20.0),
      'sync_batch_norm': True,
    },
  )
  assert config.total_epochs == 3.0 and isinstance(config.total_epochs, float)
  assert config.method.factor == 4
  assert config.optimizer.decay_epochs == (10.0, 20.0)
  assert config.sync_batch_norm is True


WRONG = [
  (
    'total_epoch',
    '1',
    "unknown config field 'total_epoch'; did you mean 'total_epochs'",
  ),
  (
    'method.factr',
    '1',
    "unknown config field 'method.factr'; did you mean 'method.factor'",
  ),
  ('methods.factor', '1', "unknown config field 'methods.factor'"),
  ('optimizer', '1', "unknown config field 'optimizer'"),
  ('total_steps', '1.5', 'total_steps'),
  ('total_epochs', 'many', 'total_epochs'),
  ('sync_batch_norm', 'maybe', 'sync_batch_norm'),
]


@pytest.mark.parametrize('name, value, message', WRONG)
def test_override_says_what_is_wrong(name, value, message):
  value = float(value) if value == '1.5' else value
  with pytest.raises(config_utils.UserError, match=message):
    config_utils.override(make_config(), {name: value})


def test_apply_flags():
  config = make_config()
  config_utils.apply_flags(
    config,
    [
      '--config.total_epochs=3',
      '--config.method.factor',
      '4',
      '--config.optimizer.decay_epochs=(10.0,20.0)',
      '--config.sync_batch_norm=true',
      '--config.teacher.checkpoint=runs/a b',
    ],
  )
  assert config.total_epochs == 3.0
  assert config.method.factor == 4
  assert config.optimizer.decay_epochs == (10.0, 20.0)
  assert config.sync_batch_norm is True
  assert config.teacher.checkpoint == 'runs/a b'


@pytest.mark.parametrize('name, value, message', WRONG)
def test_apply_flags_says_what_is_wrong_in_one_line(name, value, message):
  with pytest.raises(config_utils.UserError, match=message) as caught:
    config_utils.apply_flags(make_config(), [f'--config.{name}={value}'])
  assert '\n' not in str(caught.value)


@pytest.mark.parametrize('flag', ['--batch_size=3', '-x', 'batch_size=3'])
def test_apply_flags_takes_nothing_else(flag):
  with pytest.raises(config_utils.UserError, match='unknown flag|unexpected'):
    config_utils.apply_flags(make_config(), [flag])


def test_load(tmp_path):
  path = tmp_path / 'config.py'
  path.write_text(
    'import ml_collections\n'
    'def get_config(arg="none"):\n'
    '  return ml_collections.ConfigDict({"arg": arg})\n'
  )
  assert config_utils.load(str(path)).arg == 'none'
  assert config_utils.load(f'{path}:a=b,c=d:e').arg == 'a=b,c=d:e'
  with pytest.raises(config_utils.UserError, match='there is no config file'):
    config_utils.load(str(tmp_path / 'absent.py'))


@pytest.mark.parametrize(
  'code, said',
  [
    ('', r'has no get_config\(\)'),
    ('\n\nx = (', 'line 3: SyntaxError'),
    ('import no_such_module', 'line 1: ModuleNotFoundError: .*no_such_module'),
    ('def get_config():\n  return 1 / 0', 'line 2: ZeroDivisionError'),
    ('def get_config():\n  return {}', 'not dict'),
    ('def get_config():\n  pass', 'not NoneType'),
  ],
)
def test_config_files_that_fail(tmp_path, code, said):
  path = tmp_path / 'config.py'
  path.write_text(code)
  with pytest.raises(config_utils.UserError, match=said) as caught:
    config_utils.load(str(path))
  assert '\n' not in str(caught.value)


def test_config_file_without_an_argument(tmp_path):
  path = tmp_path / 'config.py'
  path.write_text('def get_config():\n  pass')
  with pytest.raises(config_utils.UserError, match='takes 0 positional'):
    config_utils.load(f'{path}:a=b')


def test_run_command_takes_ctrl_c(capsys):
  def command(argv):
    raise KeyboardInterrupt

  with pytest.raises(SystemExit) as caught:
    config_utils.run_command(command)
  assert caught.value.code == 130
  assert capsys.readouterr().err == 'interrupted\n'


def test_run_command_turns_user_errors_into_one_line(capsys):
  def command(argv):
    raise config_utils.UserError('this is wrong')

  with pytest.raises(SystemExit) as caught:
    config_utils.run_command(command)
  assert caught.value.code == 2
  captured = capsys.readouterr()
  assert captured.err == 'error: this is wrong\n'
  assert not captured.out


@pytest.mark.parametrize('code, expected', [(None, 0), (0, 0), (1, 1)])
def test_run_command_exits_with_the_commands_code(code, expected):
  with pytest.raises(SystemExit) as caught:
    config_utils.run_command(lambda argv: code)
  assert caught.value.code == expected


def test_argument_parser_raises_one_line():
  parser = config_utils.ArgumentParser(prog='prog')
  parser.add_argument('--size', type=int)
  with pytest.raises(config_utils.UserError, match=r'\(see prog --help\)$'):
    parser.parse_args(['--size', 'x'])


HOSTILE = 'a\x1b[31mb\x00c\nd\u202ee\x9bf\udcffg\x07h\u2028i  j\U0001f600'


def test_what_a_terminal_takes_for_more_than_text_is_not_printed():
  shown = 'a?[31mb?c d?e?f?g?h i  j\U0001f600'
  assert config_utils.printable(HOSTILE) == shown
  # Shorter by the two spaces that become one.
  assert config_utils.short(HOSTILE) == shown.replace('  ', ' ')


def test_logged_lines_and_errors_are_text(capsys, monkeypatch):
  record = logging.makeLogRecord({'msg': '%s: read', 'args': (HOSTILE,)})
  line = config_utils.LineFormatter().format(record)
  assert line == f'{config_utils.printable(HOSTILE)}: read'

  def fail(argv):
    raise config_utils.UserError(f'class {HOSTILE} is empty')

  monkeypatch.setattr(sys, 'argv', ['command'])
  with pytest.raises(SystemExit):
    config_utils.run_command(fail)
  said = f'error: class {config_utils.printable(HOSTILE)} is empty\n'
  assert capsys.readouterr().err == said


def test_late_answers_of_tensorstore_are_not_shown():
  shown = []
  for said in ('Event loop is closed', 'another'):
    unraisable = types.SimpleNamespace(exc_value=RuntimeError(said))
    config_utils.drop_closed_loops(unraisable, shown.append)
  assert [str(x.exc_value) for x in shown] == ['another']
