"""Estimates what a training step costs on a TPU, which need not be there.

  ijckd estimate --config cifar100 --topology v5e:4x4

XLA compiles the step and counts its arithmetic and its bytes; nothing runs.
docs/tpu.md explains the numbers.
"""

import json
import os
import pathlib

from ijckd_jax.commands import output_flags
from ijckd_jax.runtime import config_utils

USAGE = """\
usage: {prog} --config NAME[:key=value,...]
         --topology CHIP:SIDES [--images_per_chip N] [--json FILE]
         [--config.FIELD=VALUE ...]

Compiles a config's training step ahead of time for a TPU slice, and prints what
a step costs on each chip, with an estimate of its time. Neither the slice, the
data nor the teacher need be there. Compiling takes minutes. Exits with 2 if the
step does not fit into the chip's memory.

  --config NAME         as ijckd train takes it
  --config.FIELD=VALUE  sets a field: --config.dtype=bfloat16
  --topology CHIP:SIDES v5e:4x4, v6e:2x2, v4:2x2x1, v5p:2x2x1: a chip's name and
                        the sides of the slice
  --images_per_chip N   sets batch_size to N times the number of chips
  --json FILE           writes the numbers as well
  --help                this text"""
PROG = 'python -m ijckd_jax estimate'


def main(argv: list[str], prog: str = PROG) -> int:
  """Runs the command; returns its exit code."""
  if '--help' in argv or '-h' in argv:
    print(USAGE.format(prog=prog))
    return 0
  parser = config_utils.ArgumentParser(
    prog=prog, add_help=False, allow_abbrev=False
  )
  parser.add_argument('--config', required=True)
  parser.add_argument('--topology', required=True)
  parser.add_argument('--images_per_chip', type=int)
  parser.add_argument('--json', type=config_utils.expand)
  flags, overrides = parser.parse_known_args(argv)
  if flags.json and not os.path.isdir(os.path.dirname(flags.json) or '.'):
    raise config_utils.UserError(
      f'--json {flags.json}: there is no such folder'
    )
  prepare_environment()
  config = config_utils.load(flags.config)
  config_utils.apply_flags(config, overrides)

  from ijckd_jax.training import cost_estimate

  devices = cost_estimate.topology_devices(flags.topology)
  if flags.images_per_chip is not None:
    config_utils.check_positive('--images_per_chip', flags.images_per_chip)
    num_chips = cost_estimate.num_chips(devices)
    config.batch_size = flags.images_per_chip * num_chips
  exp = cost_estimate.build(config, devices)
  compiled = cost_estimate.compile_step(exp)
  found = cost_estimate.budget(exp, compiled, flags.topology)
  print(cost_estimate.describe(found))
  if flags.json:
    file = pathlib.Path(flags.json)
    text = json.dumps(found.to_json(), indent=2)
    output_flags.write(lambda: file.write_text(text), f'--json {flags.json}')
  return 0


def prepare_environment() -> None:
  """Keeps JAX off any accelerator, and libtpu from looking and logging.

  JAX reads these variables when it is imported, so this call comes first.
  """
  os.environ['JAX_PLATFORMS'] = 'cpu'
  # libtpu does not ask Cloud TPU's metadata server what this machine is. The
  # next two are what the server would answer; without them libtpu complains.
  os.environ['TPU_SKIP_MDS_QUERY'] = '1'
  os.environ.setdefault('TPU_ACCELERATOR_TYPE', 'v5litepod-4')
  os.environ.setdefault('TPU_WORKER_HOSTNAMES', 'localhost')
  # libtpu only compiles here, so another process may hold the TPU.
  os.environ['ALLOW_MULTIPLE_LIBTPU_LOAD'] = '1'
  os.environ.setdefault('TPU_MIN_LOG_LEVEL', '3')
  os.environ.setdefault('TPU_STDERR_LOG_LEVEL', '3')
  os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '3')
