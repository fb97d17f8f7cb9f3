"""Closed, full and broken output, Ctrl-C at the start, and other locales."""

import os
import pathlib
import signal
import subprocess
import sys

import pytest

from ijckd_jax.runtime import streams

ROOT = pathlib.Path(__file__).parents[1]
PROGRAM = f'{sys.executable} -m ijckd_jax'


def shell(command, **environment):
  """Returns the exit code of a shell's command, and what it printed."""
  done = subprocess.run(
    ['sh', '-c', command],
    cwd=ROOT,
    env={**os.environ, **environment},
    capture_output=True,
    text=True,
    timeout=60,
  )
  return done.returncode, done.stdout, done.stderr


# Where there is a buffer, it is at the end that nothing can be written.
@pytest.mark.parametrize('unbuffered', ['', '1'])
@pytest.mark.parametrize(
  'command, code, said',
  [
    ('train --help >/dev/full', 1, 'No space left on device'),
    ('--version >/dev/full', 1, 'No space left on device'),
    ('train --help >&-', 0, ''),
    ('--version >&-', 0, ''),
    ('train --help <&-', 0, ''),
    ('nosuch 2>&-', 2, ''),
    ('train 2>/dev/full', 2, ''),
  ],
)
def test_output_that_cannot_be_written(command, code, said, unbuffered):
  found, _, err = shell(f'{PROGRAM} {command}', PYTHONUNBUFFERED=unbuffered)
  assert found == code
  assert said in err and err.count('\n') == bool(said)


def test_what_is_opened_next_is_no_closed_stream():
  """Else whatever libraries print would be written to a run's files."""
  script = (
    'import os, sys\n'
    'from ijckd_jax.runtime import streams\n'
    'streams.prepare()\n'
    'os._exit(open("setup.cfg").fileno())'
  )
  code, _, _ = shell(f"{sys.executable} -c '{script}' <&- >&- 2>&-")
  assert code > 2


LOCALE = {'LC_ALL': 'C', 'PYTHONUTF8': '0', 'PYTHONCOERCECLOCALE': '0'}


def test_a_locale_without_umlauts():
  code, _, err = shell(f'{PROGRAM} Bär', **LOCALE)
  assert code == 2
  assert err.startswith("error: unknown command 'Bär'; known: ")


class Raised(Exception):
  """In place of the end of this process."""


@pytest.fixture
def interrupted(monkeypatch):
  """Lets Ctrl-C come, as the program handles it; returns how it ended."""

  def end(code):
    raise Raised(code)

  monkeypatch.setattr(os, '_exit', end)
  before = signal.signal(signal.SIGINT, signal.default_int_handler)
  streams.prepare()
  yield lambda: os.kill(os.getpid(), signal.SIGINT)
  signal.signal(signal.SIGINT, before)


def test_ctrl_c_while_a_module_is_imported(
  interrupted, tmp_path, monkeypatch, capfd
):
  """Although the module, as libraries do, catches whatever it may."""
  (tmp_path / 'slow_module.py').write_text(
    'import os, signal\n'
    'try:\n'
    '  os.kill(os.getpid(), signal.SIGINT)\n'
    '  for _ in range(1000): pass\n'
    'except KeyboardInterrupt:\n'
    '  pass\n'
  )
  monkeypatch.syspath_prepend(tmp_path)
  with pytest.raises(Raised) as raised:
    import slow_module  # noqa: F401
  assert raised.value.args == (130,)
  assert capfd.readouterr().err == 'interrupted\n'


def test_ctrl_c_at_work(interrupted, capsys):
  assert streams.guard(interrupted) == 130
  assert capsys.readouterr().err == 'interrupted\n'


def test_ctrl_c_that_a_shell_has_taken_away_stays_so():
  before = signal.signal(signal.SIGINT, signal.SIG_IGN)
  try:
    streams.prepare()
    assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
  finally:
    signal.signal(signal.SIGINT, before)
