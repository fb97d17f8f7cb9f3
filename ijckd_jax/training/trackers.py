"""Trackers by name: Weights & Biases, MLflow and Trackio.

Each is a package that is not needed otherwise, and reads its own environment
variables: where its server is, or that there is none. A run gives it the config
and every row of metrics, and at the end the pictures and the bundle.

`tracked.json` in a run's folder holds the tracker's run id and the last row
that was sent. So a run that was stopped continues as the same run in the
tracker, and no row is sent twice. A kill loses the rows that a package has
buffered, about a second of them.
"""

from collections.abc import Mapping
from collections.abc import Sequence
import contextlib
import importlib
import json
import logging
import os
import secrets
import sys

from etils import epath

from ijckd_jax.runtime import config_utils
from ijckd_jax.runtime import disk
from ijckd_jax.runtime import workdirs

TRACKERS = {
  'mlflow': 'ijckd_jax.training.trackers:MLflow',
  'trackio': 'ijckd_jax.training.trackers:Trackio',
  'wandb': 'ijckd_jax.training.trackers:Wandb',
}
PROJECT = 'ijckd_jax'
TIMEOUT = 30  # Seconds that a server has to answer, in a few tries.
MAX_FAILURES = 3  # In a row; then a tracker gets no more.

logger = logging.getLogger('ijckd_jax')


def factories(writers: Sequence[str]) -> list:
  """Returns the writer classes or functions that a config names.

  Args:
    writers: of TRACKERS, or `package.module:Name`; a string may hold several,
      with commas between.

  Raises:
    config_utils.UserError: there is no such writer, or a tracker cannot start.
  """
  names = [name.strip() for one in writers for name in one.split(',')]
  names = list(dict.fromkeys(filter(None, names)))
  found = [config_utils.resolve('writer', name, TRACKERS) for name in names]
  for factory in found:
    if isinstance(factory, type) and issubclass(factory, Tracker):
      with factory.explained():
        factory.check()
  return found


class Tracker:
  """A run as a tracker sees it; see metric_writer.MetricWriter.

  A subclass says how its package opens a run, and takes rows, pictures and a
  bundle.

  Attributes:
    name: as `config.writers` has it; also of the package, and of the extra that
      installs it.
    remedy: what to do where it does not start.
  """

  name: str
  remedy: str

  def __init__(self, config: Mapping[str, object], workdir: str):
    """Opens the tracker's run of a folder: the one begun, or a new one.

    Raises:
      config_utils.UserError: the tracker does not start.
    """
    self._folder, self._failures = epath.Path(workdir), 0
    place = self._folder / workdirs.TRACKED
    try:
      state = self._noted().get(self.name, {})
      run, self._step = state.get('run'), int(state.get('step', -1))
      self._names = list(state.get('names', []))
    except (AttributeError, TypeError, ValueError) as error:
      raise config_utils.UserError(
        f'{place} is damaged ({config_utils.short(error)}): mend it, or remove '
        'it, and the run begins anew in its trackers'
      ) from error
    with self.explained():
      self._run = self._open(run, config, self._folder.name)

  @classmethod
  def check(cls) -> None:
    """Raises if the tracker cannot start, as far as that is known now."""
    importlib.import_module(cls.name)

  @classmethod
  @contextlib.contextmanager
  def explained(cls):
    """Turns whatever the package raises into a UserError."""
    asked = f'--config.writers={cls.name}'
    try:
      # The package's own messages do not belong in the command's output.
      with contextlib.redirect_stdout(sys.stderr):
        yield
    except ImportError as error:
      raise config_utils.UserError(
        f'{asked}: {config_utils.short(error)}; '
        f"pip install 'ijckd_jax[{cls.name}]'"
      ) from error
    except Exception as error:  # Each package has errors of its own.
      config_utils.raise_outside(error)
      raise config_utils.UserError(
        f'{asked}: {config_utils.short(error)}; {cls.remedy}'
      ) from error

  def write(self, step: int, scalars: Mapping[str, float]) -> None:
    """Sends a row to the tracker, without metrics that were sent before."""
    if step < self._step:
      return
    had = self._names if step == self._step else []
    new = {name: value for name, value in scalars.items() if name not in had}
    if not new:
      return
    self._step, self._names = step, [*had, *new]
    self._try(f'a row of step {step}', self._give, step, new)

  def _give(self, step, scalars):
    # Noted before it is sent: a kill in between loses a row, and repeats none.
    state = {'run': self._run, 'step': step, 'names': self._names}
    noted = json.dumps({**self._noted(), self.name: state})
    disk.write_text(self._folder / workdirs.TRACKED, noted + '\n')
    self._take_row(step, scalars)

  def finish(self) -> None:
    """Sends the pictures and the bundle of a finished run."""
    plots = sorted((self._folder / workdirs.PLOTS).glob('*.png'))
    if plots:
      self._try('the pictures', self._take_pictures, plots)
    self._try('the bundle', self._take_bundle, self._folder / workdirs.BUNDLE)

  def close(self) -> None:
    """Ends the tracker's run; it sends or stores what it has buffered."""
    self._try('the end of the run', self._close)

  def _noted(self):
    place = self._folder / workdirs.TRACKED
    return json.loads(place.read_text()) if place.exists() else {}

  def _try(self, what, give, *args):
    """Gives the tracker something; a run does not end because it fails."""
    if self._failures == MAX_FAILURES:
      return
    try:
      with contextlib.redirect_stdout(sys.stderr):
        give(*args)
      self._failures = 0
    except Exception as error:  # Each package has errors of its own.
      self._failures += 1
      last = self._failures == MAX_FAILURES
      logger.warning(
        '%s did not take %s (%s); the run goes on, and its folder has all%s',
        self.name,
        what,
        config_utils.short(error),
        ': the tracker gets no more of it' if last else '',
      )


class _LikeWandb(Tracker):
  """A tracker with the calls of Weights & Biases.

  `_open` leaves its run in `_tracked`.
  """

  def _take_row(self, step, scalars):
    self._tracked.log(scalars, step=step)

  def _take_pictures(self, paths):
    package = importlib.import_module(self.name)
    pictures = {
      f'plots/{path.stem}': package.Image(str(path)) for path in paths
    }
    self._tracked.log(pictures, step=self._step)

  def _take_bundle(self, folder):
    package = importlib.import_module(self.name)
    artifact = package.Artifact(f'student-{self._run}', type='model')
    artifact.add_dir(str(folder))
    self._tracked.log_artifact(artifact)

  def _close(self):
    self._tracked.finish()


class Wandb(_LikeWandb):
  """Weights & Biases; WANDB_MODE=offline keeps runs on this machine."""

  name = 'wandb'
  remedy = 'run wandb login, or set WANDB_MODE=offline (or online)'

  @classmethod
  def check(cls):
    """Raises if wandb is not installed, or would ask for a login."""
    import wandb

    offline = wandb.setup().settings.mode in ('offline', 'disabled')
    if not offline and not wandb.api.api_key and not sys.stdin.isatty():
      raise PermissionError('you are not logged in')

  def _open(self, run, config, title):
    import wandb

    self._tracked = wandb.init(
      project=PROJECT,
      name=title,
      id=run,
      resume='allow',
      config=dict(config),
      settings=wandb.Settings(init_timeout=TIMEOUT),
    )
    return self._tracked.id


class MLflow(Tracker):
  """MLflow; MLFLOW_TRACKING_URI says where its runs are."""

  name = 'mlflow'
  remedy = (
    'does MLFLOW_TRACKING_URI name the server or the place where the run is '
    'that tracked.json in its folder names?'
  )

  def _open(self, run, config, title):
    import mlflow

    # By default a row waits for minutes where the server is away.
    os.environ.setdefault('MLFLOW_HTTP_REQUEST_TIMEOUT', str(TIMEOUT))
    os.environ.setdefault('MLFLOW_HTTP_REQUEST_MAX_RETRIES', '2')
    self._client = mlflow.MlflowClient()
    if run is not None:
      self._client.update_run(run, status='RUNNING')
      return run
    known = self._client.get_experiment_by_name(PROJECT)
    place = (
      known.experiment_id if known else self._client.create_experiment(PROJECT)
    )
    run = self._client.create_run(place, run_name=title).info.run_id
    for field, value in config_utils.flatten(config).items():
      self._client.log_param(run, field, value)
    return run

  def _take_row(self, step, scalars):
    for metric, value in scalars.items():
      self._client.log_metric(self._run, metric, value, step=step)

  def _take_pictures(self, paths):
    for path in paths:
      self._client.log_artifact(self._run, str(path), 'plots')

  def _take_bundle(self, folder):
    self._client.log_artifacts(self._run, str(folder), 'student')

  def _close(self):
    self._client.set_terminated(self._run)


class Trackio(_LikeWandb):
  """Trackio, whose runs are on this machine: `trackio show` draws them."""

  name = 'trackio'
  remedy = 'is TRACKIO_DIR a folder that can be written?'

  @classmethod
  def check(cls):
    """Raises if trackio is not installed, or TRACKIO_DIR not writable."""
    import tempfile

    import trackio

    folder = trackio.TRACKIO_DIR
    folder.mkdir(parents=True, exist_ok=True)
    tempfile.TemporaryFile(dir=folder).close()

  def _open(self, run, config, title):
    import trackio

    run = run or f'{title}-{secrets.token_hex(4)}'
    self._tracked = trackio.init(
      project=PROJECT,
      name=run,
      config=config_utils.flatten(config),
      resume='allow',
      embed=False,
      auto_log_gpu=False,
      auto_log_cpu=False,
    )
    return run
