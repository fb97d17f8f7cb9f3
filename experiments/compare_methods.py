"""Methods, connectors, heads and losses on the same students and batches.

  python -m experiments.compare_methods teacher WORKDIR
  python -m experiments.compare_methods rates WORKDIR
  python -m experiments.compare_methods plan
  python -m experiments.compare_methods run WORKDIR
  python -m experiments.compare_methods collect WORKDIR
  python -m experiments.compare_methods analyse

What is run, and how it will be read, stands in comparison/plan.md. The runs are
a sweep (ijckd_jax/training/sweep.py): those that were stopped go on, and
machines that share WORKDIR share them. A run whose line is in
comparison/results.jsonl is not repeated, but with --repeat, on another kind of
machine. `timeout 2h` before the command stops it after two hours. Fashion-MNIST
must be prepared (see configs/fashion_mnist.py).
"""

import argparse
import fnmatch
import json
import logging
import math
import pathlib
import shutil
import statistics
import subprocess
import sys

from experiments.comparison import analyse
from experiments.comparison import grid
from ijckd_jax.runtime import compilation_cache
from ijckd_jax.runtime import config_utils
from ijckd_jax.runtime import disk
from ijckd_jax.runtime import workdirs
from ijckd_jax.training import metric_writer
from ijckd_jax.training import sweep
from ijckd_jax.training import train

RESULTS = grid.FOLDER / 'results.jsonl'
RATES = grid.FOLDER / 'learning_rates.json'
ROW = 'row.json'
TEACHER = 'teacher'  # Of all students: its folder.
logger = logging.getLogger('ijckd_jax')


def train_teacher(flags) -> None:
  """Trains the teacher of all students."""
  compilation_cache.enable(compilation_cache.DEFAULT)
  result = train.train_and_evaluate(grid.teacher_config(), flags.work / TEACHER)
  print(json.dumps(result.summary['student']['last'], indent=2))


def choose_rates(flags) -> None:
  """Chooses each student's learning rate, by CE on validation pairs."""
  found = json.loads(RATES.read_text()) if RATES.exists() else {}
  work = flags.work / 'rates'
  for pair in fnmatch.filter(grid.PAIRS, flags.only):
    configs = {
      f'{pair}_{rate}': grid.rate_config(pair, rate) for rate in grid.RATES
    }
    outcome = sweep.run(configs, work, jobs=flags.jobs)
    if not all(outcome.summaries.values()):
      continue
    top1 = {}
    for name, rate in zip(configs, grid.RATES, strict=True):
      rows = metric_writer.read_rows(work / name / workdirs.METRICS)
      top1[str(rate)] = rows[-1]['validation/top1']
    found[pair] = {
      'student': grid.PAIRS[pair],
      'validation_top1': top1,
      'images_per_second': outcome.summaries[name]['images_per_second'],
      'chosen': float(max(top1, key=top1.get)),
    }
    disk.write_text(RATES, json.dumps(found, indent=2) + '\n')
  print(json.dumps(found, indent=2))


def plan(flags) -> None:
  """Prints the runs that are to be made, and the hours that they take.

  By the speed of runs that were made: of the cell, else of its pair.
  """
  del flags
  speeds, chosen = {}, json.loads(RATES.read_text())
  for pair, rate in chosen.items():
    speeds[pair] = [rate['images_per_second']]
  rows = analyse.read(RESULTS)
  for row in rows:
    if row['images_per_second']:
      for key in (row['pair'], (row['pair'], row['name'])):
        speeds.setdefault(key, []).append(row['images_per_second'])
  done = {(row['pair'], row['name'], row['seed']) for row in rows}
  total = 0.0
  print('part          runs  made  hours of one worker for the others')
  seen = set()
  for part in grid.PARTS:
    hours, count, made = 0.0, 0, 0
    for cell, seed in grid.runs():
      key = (cell.pair, cell.name, seed)
      if part not in cell.parts or key in seen:
        continue
      seen.add(key)
      count, made = count + 1, made + (key in done)
      if key not in done:
        found = speeds.get((cell.pair, cell.name)) or speeds.get(cell.pair)
        images = grid.NUM_TRAIN * grid.EPOCHS
        hours += images / statistics.median(found or [math.inf]) / 3600
    total += hours
    print(f'{part:12} {count:5} {made:5}  {hours:.1f}')
  print(f'in all {total:.1f}, without starting, evaluating and reporting')
  if unknown := [pair for pair in grid.PAIRS if pair not in speeds]:
    print(f'and without {", ".join(unknown)}, whose speed is not known')


def run(flags) -> int:
  """Makes the runs that nobody has made yet; returns the exit code.

  Raises:
    config_utils.UserError: there is no teacher, or it is not that of the runs
      that were made.
  """
  rows, here = analyse.read(RESULTS), _devices() if flags.repeat else None
  done = {
    _key(row) for row in rows if not flags.repeat or row['devices'] == here
  }
  chosen = {
    name: (cell, seed)
    for cell, seed in grid.runs()
    if fnmatch.fnmatch(name := grid.run_name(cell, seed), flags.only)
    and (cell.pair, cell.name, seed) not in done
    and not (flags.work / name / ROW).exists()
  }
  teacher = flags.work / TEACHER
  if not chosen:
    logger.info('nothing is left to run of %s', flags.only)
    return 0
  if not (teacher / workdirs.SUMMARY).exists():
    raise config_utils.UserError(
      f'there is no trained teacher in {teacher}: python -m '
      f'experiments.compare_methods teacher {flags.work}'
    )
  teachers = {row['teacher']['fingerprint'] for row in rows}

  def keep(name, summary, seconds):
    row = describe(*chosen[name], summary, seconds or 0.0)
    teachers.add(row['teacher']['fingerprint'])
    if len(teachers) > 1:
      raise config_utils.UserError(
        f'{teacher} is not the teacher of the runs before: their students '
        'cannot be compared; start with results of your own'
      )
    folder = flags.work / name
    disk.write_text(folder / ROW, json.dumps(row) + '\n')
    for content in (workdirs.CHECKPOINTS, workdirs.TEACHER_OUTPUTS):
      shutil.rmtree(folder / content, ignore_errors=True)

  configs = {k: cell.config(f'{teacher}', n) for k, (cell, n) in chosen.items()}
  outcome = sweep.run(configs, flags.work, jobs=flags.jobs, finished=keep)
  return 1 if outcome.failed else 0


def describe(cell: grid.Cell, seed: int, summary, seconds: float) -> dict:
  """Returns the line that is kept of a run."""
  student, config = summary['student'], summary['config']
  return {
    'pair': cell.pair,
    'name': cell.name,
    'seed': seed,
    'method': cell.method,
    'fields': cell.fields,
    'settings': cell.settings,
    'learning_rate': config['optimizer']['learning_rate'],
    'last': student['last'],
    'best': student['best'],
    'best_step': summary['best_step'],
    'steps': summary['steps'],
    'parameters': summary['parameters']['student'],
    'images_per_second': summary['images_per_second'],
    'seconds': seconds,
    'teacher': {
      'name': summary['teacher_name'],
      'fingerprint': config['teacher']['fingerprint'],
      'top1': summary['teacher']['top1'],
    },
    'command': (
      'python -m experiments.compare_methods run WORKDIR --only '
      f"'{grid.run_name(cell, seed)}'"
    ),
    'commit': _commit(),
    'versions': summary['versions'],
    'devices': summary['devices'],
  }


def collect(flags) -> None:
  """Adds the lines of a folder's runs to those that are kept.

  Of runs on the same kind of machine one is kept, the first.
  """
  rows = {(_key(row), *row['devices']): row for row in analyse.read(RESULTS)}
  for path in flags.work.glob(f'*/*/*/{ROW}'):
    row = json.loads(path.read_text())
    rows.setdefault((_key(row), *row['devices']), row)
  # A stable sort: of repeated runs the first stays so.
  lines = [json.dumps(row) + '\n' for row in sorted(rows.values(), key=_key)]
  disk.write_text(RESULTS, ''.join(lines))
  print(f'{len(lines)} runs')


def _key(row) -> tuple[str, str, int]:
  return row['pair'], row['name'], row['seed']


def _commit() -> str | None:
  """Returns the checkout's commit; None outside of one."""
  found = subprocess.run(
    ['git', 'rev-parse', '--short', 'HEAD'],
    cwd=grid.FOLDER,
    capture_output=True,
    text=True,
    check=False,
  )
  return found.stdout.strip() or None


def _devices() -> list[str]:
  """Returns the kinds of this machine's devices, without holding them."""
  code = 'import jax; [print(device.device_kind) for device in jax.devices()]'
  command = [sys.executable, '-c', code]
  return subprocess.check_output(command, text=True).splitlines()


COMMANDS = {
  'teacher': train_teacher,
  'rates': choose_rates,
  'plan': plan,
  'run': run,
  'collect': collect,
  'analyse': lambda flags: analyse.write(analyse.read(RESULTS)),
}


def main(argv: list[str]) -> int:
  """Runs the command; returns its exit code."""
  parser = config_utils.ArgumentParser(
    prog='python -m experiments.compare_methods',
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  parser.add_argument('command', choices=COMMANDS)
  parser.add_argument('work', type=pathlib.Path, nargs='?')
  parser.add_argument(
    '--only', default='*', help='of pairs, or of runs: same/ijckd/0, same/*'
  )
  parser.add_argument(
    '--repeat',
    action='store_true',
    help='what was run on other kinds of machine alone',
  )
  parser.add_argument(
    '--jobs', type=int, default=1, help='runs that are made side by side'
  )
  flags = parser.parse_args(argv)
  if flags.command not in ('plan', 'analyse') and flags.work is None:
    parser.error(f'{flags.command} takes a WORKDIR')
  logging.basicConfig(format='%(message)s')
  logger.setLevel(logging.INFO)
  return COMMANDS[flags.command](flags) or 0


if __name__ == '__main__':
  config_utils.run_command(main)
