"""What the tests share: small runs on real data, compiled once."""

import dataclasses
import fcntl
import gc
import io
import logging
import os
import pickle
import sys

import jax
import jaxlib.version
import PIL.Image
import pytest

from experiments.extension_example.backbone import PlainNet
from ijckd_jax import models
from ijckd_jax.reports import plots
from ijckd_jax.runtime import config_utils
from ijckd_jax.training import experiment
from ijckd_jax.training import train

# Small programs: compiling takes a quarter of the time, and running no longer.
XLA_FLAGS = ['--xla_backend_optimization_level=0']
# For jax.jit's compiler_options: fused as in users' programs, and rounded so.
FUSED = {}
if jaxlib.version.__version_info__ < (0, 11):  # Unknown later, and then fatal.
  XLA_FLAGS.append('--xla_cpu_use_fusion_emitters=false')
  FUSED['xla_cpu_use_fusion_emitters'] = True
os.environ.setdefault('XLA_FLAGS', ' '.join(XLA_FLAGS))
# Threads of the linear algebra wait for each other where there are two workers;
# workers and the children of tests load the libraries after this is set.
os.environ.setdefault('OMP_NUM_THREADS', '1')
# Tracing makes many objects that live: looking through all of them for garbage
# again and again takes a tenth of the time.
gc.set_threshold(100_000, 20, 50)


# Long files: last, they would keep one worker busy when all else is done.
LONG = (
  *('test_torch_model', 'test_notebooks', 'test_kill', 'test_bound_mutations'),
  *('test_hosts', 'test_export'),
  *('test_stored_outputs', 'test_models', 'test_configs', 'test_train'),
)


def pytest_collection_modifyitems(items):
  """Puts the longest files first."""
  order = {name: place for place, name in enumerate(LONG)}
  items.sort(key=lambda item: order.get(item.path.stem, len(LONG)))


def pytest_collection_finish():
  """Leaves what was imported out of all collections of garbage."""
  gc.freeze()


@pytest.fixture(scope='session')
def shared_folder(tmp_path_factory):
  """A folder of all workers."""
  folder = tmp_path_factory.getbasetemp()
  if 'PYTEST_XDIST_WORKER' in os.environ:
    folder = folder.parent
  return folder


@pytest.fixture(scope='session', autouse=True)
def compilation_cache(shared_folder):
  """Compiles a program that several tests run, or their children, once."""
  folder = shared_folder / 'compilation_cache'
  os.environ['JAX_COMPILATION_CACHE_DIR'] = str(folder)
  os.environ['JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS'] = '0.1'
  jax.config.update('jax_compilation_cache_dir', str(folder))
  jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.1)


@pytest.fixture(scope='session', autouse=True)
def plain_backbone():
  """Gives a backbone of three layers the name plain, but not in children.

  With it, a run takes half the seconds that it takes with the smallest of the
  published ones.
  """
  with pytest.MonkeyPatch.context() as patch:
    patch.setitem(models.BACKBONES, 'plain', PlainNet)
    yield


@pytest.fixture(scope='session', autouse=True)
def blank_plots():
  """Draws no plots, which take a quarter of a small run: see `drawn_plots`."""
  blank = io.BytesIO()
  PIL.Image.new('L', (1, 1)).save(blank, 'PNG')
  draw = plots.render

  def render(figure, *formats):
    return dict.fromkeys(formats if figure else (), blank.getvalue())

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(plots, 'render', render)
    yield draw


@pytest.fixture(scope='module')
def drawn_plots(blank_plots):
  """Draws the plots of this file's runs."""
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(plots, 'render', blank_plots)
    yield


@pytest.fixture(scope='module', autouse=True)
def compiled_programs():
  """Drops a file's compiled programs after its tests.

  They hold memory maps, and where a process has as many as Linux lets it have
  (vm.max_map_count), the next program that it compiles is a segmentation fault.
  """
  yield
  jax.clear_caches()


@pytest.fixture(autouse=True)
def root_logger():
  """Undoes what commands do, lest later tests read nothing."""
  level = logging.root.level
  yield
  logging.root.setLevel(level)


@pytest.fixture
def run_command(monkeypatch, capsys):
  """Returns a function that runs a command: its exit code and its words."""

  def run(main, *argv):
    monkeypatch.setattr(sys, 'argv', ['command', *map(str, argv)])
    with pytest.raises(SystemExit) as stopped:
      config_utils.run_command(main)
    printed = capsys.readouterr()
    return stopped.value.code, printed.out, printed.err

  return run


@pytest.fixture(scope='session')
def data_dir(shared_folder):
  """Where digits are built, so that nobody's home is written to."""
  return str(shared_folder / 'data')


@pytest.fixture(scope='session')
def small_config(data_dir):
  """Returns a function that gives the config of a run of seconds."""

  def make(method='ijckd', backbone='plain', **fields):
    config = experiment.default_config(
      dataset='digits', teacher=backbone, student=backbone, method=method
    )
    config.dataset.data_dir = data_dir
    config.total_steps = 12
    config.log_epochs, config.log_steps = 0.0, 5
    config.eval_epochs, config.eval_steps = 0.0, 4
    config.batch_size = 48
    config.bounds.fit_examples = 0
    config.eval_batch_size = 120
    with config.unlocked():
      config.update_from_flattened_dict(fields)
    return config

  return make


def once(folder, config):
  """Returns the folder and the Result of a run that all workers share."""
  kept = folder.with_suffix('.pickle')
  with folder.with_suffix('.lock').open('w') as lock:
    fcntl.flock(lock, fcntl.LOCK_EX)
    result = train.train_and_evaluate(config, folder)
    if result.state is not None:
      kept.write_bytes(pickle.dumps(jax.device_get(result.state)))
  state = pickle.loads(kept.read_bytes())
  return folder, dataclasses.replace(result, state=state)


@pytest.fixture(scope='session')
def finished_run(shared_folder, small_config):
  """The folder of a finished run, teacher included, and its Result."""
  return once(shared_folder / 'finished', small_config())


@pytest.fixture(scope='session')
def published_run(shared_folder, small_config):
  """A finished run with published backbones, which children know as well."""
  return once(shared_folder / 'published', small_config(backbone='resnet8'))
