"""Time from a command's start to its first training step, cold and warm.

  python -m experiments.benchmarks.startup [--json FILE]

Each start is a process of its own, with a compilation cache of this benchmark.
See README.md.
"""

import argparse
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time

PAIRS = (('resnet20', 'resnet8'), ('resnet32x4', 'resnet8x4'))
STARTS = ('no cache', 'cold', 'warm')


def start(folder, teacher, student, *more, until):
  """Returns the seconds until a run of digits logs a line with `until`."""
  env = {
    'XDG_CACHE_HOME': str(folder),
    'HOME': os.environ['HOME'],
    'PATH': os.environ['PATH'],
  }
  kept = ('JAX_PLATFORMS', 'LD_LIBRARY_PATH', 'CUDA_VISIBLE_DEVICES')
  env |= {name: os.environ[name] for name in kept if name in os.environ}
  arguments = [
    f'--config=configs/digits.py:teacher={teacher},student={student}',
    f'--config.dataset.data_dir={folder}/data',
    '--config.total_epochs=0',
    '--config.total_steps=1',
    '--config.optimizer.warmup_epochs=0',
    *more,
  ]
  begin = time.perf_counter()
  process = subprocess.Popen(
    [sys.executable, '-m', 'ijckd_jax.main', *arguments],
    env=env,
    stderr=subprocess.PIPE,
    stdout=subprocess.DEVNULL,
    text=True,
  )
  seconds, said = None, []
  for line in process.stderr:
    said.append(line)
    if seconds is None and until in line:
      seconds = time.perf_counter() - begin
  if process.wait() or seconds is None:
    raise RuntimeError(''.join(said))
  return seconds


def measure(teacher, student):
  """Returns the seconds of a pair by kind of start."""
  with tempfile.TemporaryDirectory() as name:
    folder = pathlib.Path(name)
    none = '--config.compilation_cache='
    # Leaves a teacher, and the data.
    start(
      folder, teacher, student, f'--workdir={folder}/0', none, until='student'
    )
    seconds = {}
    for kind in STARTS:
      seconds[kind] = start(
        folder,
        teacher,
        student,
        f'--workdir={folder}/{kind}',
        f'--config.teacher.checkpoint={folder}/0/teacher',
        *([none] if kind == 'no cache' else []),
        until='student step 1/1',
      )
  return seconds


def main(argv=None):
  parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
  parser.add_argument('--json', help='where to write the numbers')
  parser.add_argument('--repeats', type=int, default=1)
  flags = parser.parse_args(argv)
  rows = []
  print(f'| seconds to the first step | {" | ".join(STARTS)} |')
  print(f'| :- {"| -: " * len(STARTS)}|')
  for teacher, student in PAIRS:
    for _ in range(flags.repeats):
      seconds = measure(teacher, student)
      rows.append({'teacher': teacher, 'student': student, 'seconds': seconds})
      shown = ' | '.join(f'{seconds[kind]:.1f}' for kind in STARTS)
      print(f'| {teacher} -> {student} | {shown} |', flush=True)
  if flags.json:
    pathlib.Path(flags.json).write_text(json.dumps(rows, indent=2) + '\n')


if __name__ == '__main__':
  main()
