"""Flags of XLA with which a CPU computes faster."""

from collections.abc import MutableMapping
import importlib.metadata
import importlib.util
import platform
import sys

# Convolutions and products by oneDNN, with the same result from run to run.
ONEDNN = 'xla_cpu_experimental_onednn_custom_call'
# Those of jaxlib whose XLA knows the flag and gains by it, from and below. XLA
# ends the process at a flag that it does not know.
VERSIONS = (0, 12), (0, 13)


def prefer_onednn(environ: MutableMapping[str, str]) -> None:
  """Adds oneDNN's flag to XLA_FLAGS where it helps; keeps what is set there.

  Call it before JAX's backend starts. It holds for the whole process, so that
  commands do it and libraries do not. See experiments/benchmarks/README.md for
  what it gains.

  Args:
    environ: os.environ.
  """
  flags = environ.get('XLA_FLAGS', '').strip()
  # A value without a dash is the path of a file with flags.
  if ONEDNN in flags or (flags and not flags.startswith('-')):
    return
  if _is_measured() and _only_cpu(environ.get('JAX_PLATFORMS', '')):
    environ['XLA_FLAGS'] = f'{flags} --{ONEDNN}=true'.strip()


def _is_measured() -> bool:
  """Returns whether the flag was measured to help this kind of machine."""
  version = importlib.metadata.version('jaxlib')
  first, second = (int(part) for part in version.split('.')[:2])
  known = VERSIONS[0] <= (first, second) < VERSIONS[1]
  return known and (sys.platform, platform.machine()) == ('linux', 'x86_64')


def _only_cpu(platforms: str) -> bool:
  """Returns whether no other backend's XLA, of another build, reads the flags.

  Args:
    platforms: JAX_PLATFORMS. libtpu also compiles for a TPU that is not there.
  """
  if importlib.util.find_spec('libtpu') is not None:
    return False
  plugins = importlib.util.find_spec('jax_plugins') is not None
  plugins = plugins or importlib.metadata.entry_points(group='jax_plugins')
  return platforms == 'cpu' or not plugins
