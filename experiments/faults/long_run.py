"""Watches the memory, files and threads of a long run on digits.

python -m experiments.faults.long_run --output experiments/faults

Runs 5,000 steps with an evaluation and a checkpoint every 50, and writes
`long_run.json` and `long_run.png`.
"""

import argparse
import json
import os
import pathlib
import platform
import re
import subprocess
import sys
import tempfile
import threading
import time

import matplotlib
import numpy as np

matplotlib.use('Agg')
from matplotlib import pyplot as plt  # noqa: E402

ROOT = pathlib.Path(__file__).parents[2]
STEPS = 5000
FIELDS = {
  'total_epochs': 0,
  'total_steps': STEPS,
  'teacher.total_steps': 50,
  'optimizer.warmup_epochs': 0,
  'log_epochs': 0,
  'log_steps': 10,
  'eval_epochs': 0,
  'eval_steps': 50,
}
SECONDS = 0.5  # Between samples.
STEP = re.compile(r'student step (\d+)/')


def sample(pid: int) -> dict[str, float]:
  """Returns MiB of resident memory, open files and threads of a process."""
  proc = pathlib.Path('/proc') / str(pid)
  status = dict(
    line.split(':', 1) for line in (proc / 'status').read_text().splitlines()
  )
  return {
    'MiB': int(status['VmRSS'].split()[0]) / 1024,
    'files': len(os.listdir(proc / 'fd')),
    'threads': int(status['Threads']),
  }


def watch(workdir: pathlib.Path) -> list[dict[str, float]]:
  """Returns samples of a run, each with the student's step that it was at."""
  process = subprocess.Popen(
    [sys.executable, '-m', 'ijckd_jax.main', '--workdir', str(workdir)]
    + ['--config', 'configs/digits.py:teacher=resnet8']
    + [f'--config.{name}={value}' for name, value in FIELDS.items()],
    cwd=ROOT,
    stdout=subprocess.DEVNULL,
    stderr=subprocess.PIPE,
    text=True,
  )
  step, samples = 0, []

  def read():
    nonlocal step
    for line in process.stderr:
      if found := STEP.search(line):
        step = int(found[1])

  threading.Thread(target=read, daemon=True).start()
  while process.poll() is None:
    if 0 < step < STEPS:  # After it, the report is drawn.
      samples.append({'step': step, **sample(process.pid)})
    time.sleep(SECONDS)
  if process.returncode:
    raise SystemExit(f'the run ended with {process.returncode}')
  return samples


def draw(samples: list[dict[str, float]], path: pathlib.Path) -> None:
  """Draws the three over the steps."""
  figure, axes = plt.subplots(3, sharex=True, figsize=(6.4, 5.4))
  steps = [s['step'] for s in samples]
  for axis, (name, label) in zip(
    axes,
    {
      'MiB': 'resident memory (MiB)',
      'files': 'open files',
      'threads': 'threads',
    }.items(),
    strict=True,
  ):
    values = [s[name] for s in samples]
    axis.plot(steps, values, color='tab:blue')
    axis.set_ylim(0, 1.2 * max(values))
    axis.set_ylabel(label)
    axis.grid(alpha=0.3)
  axes[0].set_title(f'resnet8 on digits, {STEPS:,} steps, {STEPS // 50} saves')
  axes[-1].set_xlabel('step')
  figure.tight_layout()
  figure.savefig(path, dpi=120)


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--output', required=True, type=pathlib.Path)
  output = parser.parse_args().output
  with tempfile.TemporaryDirectory() as scratch:
    samples = watch(pathlib.Path(scratch) / 'run')
  late = [s for s in samples if s['step'] >= 2 * STEPS // 5]
  steps = np.array([s['step'] for s in late])
  growth = {
    name: float(np.polyfit(steps, [s[name] for s in late], 1)[0] * 1000)
    for name in ('MiB', 'files', 'threads')
  }
  result = {
    'machine': f'{os.cpu_count()} cores, Python {platform.python_version()}',
    'growth_per_1000_steps_after_two_fifths': growth,
    'samples': samples,
  }
  (output / 'long_run.json').write_text(json.dumps(result) + '\n')
  draw(samples, output / 'long_run.png')
  print(json.dumps(growth), {k: late[-1][k] for k in growth})


if __name__ == '__main__':
  main()
