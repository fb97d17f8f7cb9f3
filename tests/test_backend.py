"""JAX that does not start is told as that, and no file is blamed for it."""

import errno
import os
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest

from experiments.benchmarks import classifiers
from ijckd_jax.bundles import bundles
from ijckd_jax.data import images
from ijckd_jax.deploy import safetensors_files
from ijckd_jax.runtime import backend
from ijckd_jax.runtime import config_utils

ROOT = pathlib.Path(__file__).parents[1]


@pytest.mark.parametrize(
  'platforms, said',
  [
    ('nonsense', "'nonsense' is not in the list of known backends"),
    ('cpu,nonsense', 'JAX_PLATFORMS=cpu,nonsense: this install'),
  ],
)
def test_a_platform_that_is_not_there(platforms, said, tmp_path):
  """Of a sound bundle nothing is said."""
  classifiers.alone('resnet8', (8, 8, 1), num_classes=2).save(tmp_path)
  script = (
    'from ijckd_jax.runtime import config_utils;'
    'from ijckd_jax.commands import evaluate\n'
    'config_utils.run_command(evaluate.main)'
  )
  done = subprocess.run(
    [sys.executable, '-c', script, '--bundle', str(tmp_path)],
    cwd=ROOT,
    env={**os.environ, 'JAX_PLATFORMS': platforms},
    capture_output=True,
    text=True,
  )
  assert (done.returncode, done.stdout) == (2, '')
  assert done.stderr.startswith(f'error: JAX_PLATFORMS={platforms}: ')
  assert said in done.stderr and done.stderr.count('\n') == 1
  assert 'unset JAX_PLATFORMS' in done.stderr
  assert 'bundle' not in done.stderr


@pytest.mark.parametrize(
  'error, asked, said',
  [
    # What JAX raises where no GPU is seen, and where nothing was asked for.
    (AssertionError(), 'cuda', r'device here; unset .*ijckd_jax\[cuda12\]'),
    (RuntimeError('no libtpu (set X)'), 'tpu', r'\(no libtpu\).*jax\[tpu\]'),
    (RuntimeError('no driver'), None, r'start \(no driver\).*PLATFORMS=cpu'),
  ],
)
def test_what_is_said_of_each_platform(error, asked, said, monkeypatch):
  def devices():
    raise error

  monkeypatch.setattr(jax, 'devices', devices)
  before = jax.config.jax_platforms
  jax.config.update('jax_platforms', asked)
  try:
    with pytest.raises(config_utils.UserError, match=said):
      backend.start()
  finally:
    jax.config.update('jax_platforms', before)


def outside():
  """Yields errors of the machine or the install, with a word of the cause."""
  try:
    np.empty(2**60, np.uint8)
  except MemoryError as error:
    yield error, 'memory'
  try:
    jax.jit(jax.numpy.zeros, static_argnums=0)(2**50).block_until_ready()
  except jax.errors.JaxRuntimeError as error:
    yield error, 'memory'
  try:
    import no_such_module_of_ours  # noqa: F401
  except ImportError as error:
    yield error, 'no_such_module_of_ours'
  yield OSError(errno.EMFILE, 'Too many open files'), 'ulimit -n'
  yield jax.errors.JaxRuntimeError('INTERNAL: a GPU fell off'), 'fell off'


OUTSIDE = list(outside())


def test_every_kind_is_raised_here():
  assert len(OUTSIDE) == 5


@pytest.fixture(params=OUTSIDE, ids=lambda found: type(found[0]).__name__)
def cause(request):
  return request.param


def test_no_bundle_is_blamed(cause, finished_run, monkeypatch, capsys):
  """Whatever part of reading it fails; the command's line says the cause."""
  error, said = cause

  def fail(*args, **kwargs):
    raise error

  for module, name in (
    (bundles, '_read'),
    (bundles.specification, 'check'),
    (bundles.specification, 'build'),
    (bundles.specification, 'shapes'),
    (bundles.specification, 'check_arrays'),
  ):
    with monkeypatch.context() as patch:
      patch.setattr(module, name, fail)
      with pytest.raises(type(error)) as raised:
        bundles.load(finished_run[0])
      assert raised.value is error
  with monkeypatch.context() as patch:
    patch.setattr(bundles, '_read', fail)
    with pytest.raises(SystemExit) as stopped:
      config_utils.run_command(lambda argv: bundles.load(finished_run[0]))
  assert stopped.value.code == 1
  err = capsys.readouterr().err
  assert err.startswith('error: ') and err.count('\n') == 1 and said in err


def test_no_picture_is_blamed(cause, monkeypatch):
  error, _ = cause

  def fail(*args, **kwargs):
    raise error

  monkeypatch.setattr('PIL.Image.open', fail)
  with pytest.raises(type(error)) as raised:
    images.decode(b'GIF89a')
  assert raised.value is error


def test_what_is_damaged_is_still_blamed():
  with pytest.raises(config_utils.UserError, match='no file that ijckd export'):
    safetensors_files.decode(b'\x08' + bytes(7) + b'{"a":12}', 'x.safetensors')
  with pytest.raises(images.BadImage):
    images.decode(b'GIF89a')
