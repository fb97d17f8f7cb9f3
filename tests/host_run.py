"""Runs the command as one of several processes, and notes what it does.

  python host_run.py NOTES STOP_AT [arguments of ijckd_jax.main]

NOTES.PROCESS gets a line for each batch: step, indices and epochs of this
process's rows; and one for each file that it opens to write below the workdir.
At the row of step STOP_AT (0: never) process 0 gets SIGINT.
"""

import json
import os
import pathlib
import signal
import sys


def main(notes: str, stop_at: str, *argv: str) -> None:
  workdir = argv[argv.index('--workdir') + 1]
  process = '0'
  if '--process_id' in argv:
    process = argv[argv.index('--process_id') + 1]
  log = open(f'{notes}.{process}', 'a', buffering=1)

  def see(event, arguments):
    if event == 'open' and isinstance(arguments[0], str | os.PathLike):
      path, flags = os.fspath(arguments[0]), arguments[2]
      if str(path).startswith(workdir) and flags & (os.O_WRONLY | os.O_RDWR):
        log.write(json.dumps({'written': path}) + '\n')

  sys.addaudithook(see)

  from ijckd_jax import main as command
  from ijckd_jax.data import input_pipeline
  from ijckd_jax.runtime import config_utils

  train_batches = input_pipeline.train_batches

  def noting(arrays, *, start_step, **fields):
    batches = train_batches(arrays, start_step=start_step, **fields)
    for step, batch in enumerate(batches, start_step + 1):
      rows = [batch['index'].tolist(), batch['epoch'].tolist()]
      log.write(json.dumps({'step': step, 'rows': rows}) + '\n')
      yield batch

  input_pipeline.train_batches = noting
  sys.argv[1:] = argv
  if int(stop_at):
    os.environ['STOP_AT'] = stop_at
    sys.argv.append("--config.writers=('tests.host_run:Stop',)")
  config_utils.run_command(command.main)


class Stop:
  """A tracker that interrupts the run."""

  def __init__(self, config, workdir):
    del config, workdir
    self.step = int(os.environ['STOP_AT'])

  def write(self, step, scalars):
    if step == self.step:
      self.step = 0  # A second signal would end it at once.
      os.kill(os.getpid(), signal.SIGINT)

  def close(self):
    pass


if __name__ == '__main__':
  sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))
  main(*sys.argv[1:])
