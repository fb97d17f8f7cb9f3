"""XLA's flags for CPUs: added where they help, and never over the user's."""

import importlib.metadata
import importlib.util
import os
import platform
import subprocess
import sys

import pytest

from ijckd_jax.runtime import cpu_flags

ADDED = '--xla_cpu_experimental_onednn_custom_call=true'


@pytest.fixture
def machine(monkeypatch):
  """Returns a function that sets what the machine has, and gives the flags."""

  def flags_on(
    *, jaxlib='0.12.0.1', system='linux', processor='x86_64', modules=(), **env
  ):
    found = set(modules)
    monkeypatch.setattr(importlib.metadata, 'version', lambda name: jaxlib)
    monkeypatch.setattr(importlib.metadata, 'entry_points', lambda group: ())
    monkeypatch.setattr(
      importlib.util, 'find_spec', lambda name: name if name in found else None
    )
    monkeypatch.setattr(sys, 'platform', system)
    monkeypatch.setattr(platform, 'machine', lambda: processor)
    cpu_flags.prefer_onednn(env)
    return env.get('XLA_FLAGS')

  return flags_on


def test_the_flag_is_added_where_it_helps(machine):
  assert machine() == ADDED
  assert machine(XLA_FLAGS='') == ADDED
  assert machine(JAX_PLATFORMS='cpu', modules=['jax_plugins']) == ADDED


def test_the_users_flags_stay(machine):
  assert machine(XLA_FLAGS='--a=1 --b') == f'--a=1 --b {ADDED}'
  off = '--xla_cpu_experimental_onednn_custom_call=false'
  assert machine(XLA_FLAGS=off) == off
  assert machine(XLA_FLAGS='/a/file/of/flags') == '/a/file/of/flags'


@pytest.mark.parametrize(
  'what',
  [
    {'jaxlib': '0.10.2'},  # Knows it, and gains nothing.
    {'jaxlib': '0.13.0'},  # May not know it, which would end the process.
    {'system': 'darwin'},
    {'processor': 'aarch64'},
    {'modules': ['jax_plugins']},
    {'modules': ['libtpu'], 'JAX_PLATFORMS': 'cpu'},
  ],
)
def test_the_flag_is_not_added_elsewhere(machine, what):
  assert machine(**what) is None


def test_this_xla_knows_it():
  """Whether it is added here or not; an unknown flag ends the process."""
  code = """if 1:
    import os
    os.environ.pop('XLA_FLAGS', None)
    from ijckd_jax.runtime import cpu_flags
    cpu_flags.prefer_onednn(os.environ)
    import jax
    print(jax.jit(lambda x: x + 1)(1.0))
  """
  env = {**os.environ, 'JAX_PLATFORMS': 'cpu'}
  command = [sys.executable, '-c', code]
  assert subprocess.check_output(command, env=env, text=True) == '2.0\n'
