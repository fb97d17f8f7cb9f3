"""A process that checks the runs of a sweep before any of them starts.

python -m ijckd_jax.training.sweep_check < REQUEST

The request is JSON: 'configs', a config by the name of its run, and 'memory',
whether the memory of a run is to be estimated. A config that cannot be run is
one line on standard error and exit code 2. Otherwise the estimates are JSON on
standard output. The check is a process of its own, so that the process that
starts the runs never holds a device.
"""

import json
import math
import pathlib
import resource
import sys

import jax

from ijckd_jax.data import datasets
from ijckd_jax.runtime import backend
from ijckd_jax.runtime import config_utils
from ijckd_jax.training import config_checks
from ijckd_jax.training import cost_estimate
from ijckd_jax.training import experiment
from ijckd_jax.training import feeding
from ijckd_jax.training import train

# Of the host's memory, what a run takes beside its start and its step: programs
# of the evaluation and the report, checkpoints, plots. Runs on digits took up
# to 0.43 GB more than this process.
ALLOWANCE = 0.5e9
CGROUP = pathlib.Path('/sys/fs/cgroup')


def _check(configs) -> str:
  """Builds every run, and returns the name of the one that looks largest.

  That is the one with the most parameters times rows of a step.

  Raises:
    config_utils.UserError: a run cannot be built, or its data are not there.
  """
  sizes, loaded = {}, {}
  for name, config in configs.items():
    try:
      config_checks.check_num_cpu_devices(config)
      config_checks.check_batches(
        config, max(jax.device_count(), config.num_cpu_devices)
      )
      # This process has one device, however many the run will have.
      config.num_cpu_devices = 1
      exp = experiment.build(config)
      if not datasets.has_classes(exp.dataset):
        raise config_utils.UserError(
          'a sweep compares accuracies, but the images have no classes'
        )
      data = config_utils.to_json(config.dataset)
      if data not in loaded:
        splits = {split: exp.dataset.load(split) for split in datasets.SPLITS}
        loaded[data] = splits['train']
      train.check_durations(exp, len(loaded[data]))
      feeding.check(exp, loaded[data])
    except config_utils.UserError as error:
      raise config_utils.UserError(f'{name}: {error}') from error
    shapes = jax.eval_shape(
      lambda exp=exp: exp.distiller.init(
        jax.random.key(0), tuple(exp.dataset.image_shape)
      )
    )
    leaves = jax.tree.leaves((shapes, exp.frozen))
    parameters = sum(math.prod(leaf.shape) for leaf in leaves)
    sizes[name] = parameters * config.batch_size // config.accumulation
  return max(sizes, key=sizes.get)


def _estimate(config) -> dict[str, float | None]:
  """Returns what a run takes of the memory, and how much there is, in bytes.

  Of the host's memory that is the peak of this process, which has loaded the
  data and compiled a training step, with ALLOWANCE, and on CPUs the step's own
  memory by XLA's analysis. Worker processes are not counted.
  """
  exp = cost_estimate.build(config, jax.local_devices())
  memory = cost_estimate.compile_step(exp).memory_analysis()
  step = memory.peak_memory_in_bytes + memory.generated_code_size_in_bytes
  # Of a process that has ended, Linux counts kilobytes and macOS bytes.
  unit = 1 if sys.platform == 'darwin' else 1024
  base = ALLOWANCE + resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
  device = jax.local_devices()[0]
  if device.platform == 'cpu':
    return {'host': base + step, 'host_free': _free()}
  found = {'host': base, 'host_free': _free(), 'device': step}
  if limit := backend.memory_limit(device):
    # What other processes hold is not known to JAX.
    found['device_free'] = limit - device.memory_stats()['bytes_in_use']
  return found


def _free() -> float | None:
  """Returns how many bytes of memory are free; None where it is not known."""
  found = []
  try:
    for line in pathlib.Path('/proc/meminfo').read_text().splitlines():
      if line.startswith('MemAvailable:'):
        found.append(1024 * int(line.split()[1]))
    limit = (CGROUP / 'memory.max').read_text().strip()
    if limit != 'max':
      used = int((CGROUP / 'memory.current').read_text())
      found.append(int(limit) - used)
  except (OSError, ValueError):
    pass
  return min(found, default=None)


def main(argv: list[str]) -> None:
  """Answers the request on standard input."""
  del argv
  request = json.load(sys.stdin)
  configs = {
    name: config_utils.from_json(text)
    for name, text in request['configs'].items()
  }
  largest = _check(configs)
  found = {'name': largest}
  if request['memory']:
    found |= _estimate(configs[largest])
  print(json.dumps(found))


if __name__ == '__main__':
  config_utils.run_command(main)
