"""Methods, connectors, heads and losses on the same students and batches.

  python -m experiments.compare_methods teacher WORKDIR
  python -m experiments.compare_methods rates WORKDIR
  python -m experiments.compare_methods plan
  python -m experiments.compare_methods run WORKDIR
  python -m experiments.compare_methods collect WORKDIR
  python -m experiments.compare_methods analyse

What is run, and how it will be read, stands in comparison/plan.md. A run that
was stopped goes on, and one whose line is in comparison/results.jsonl is not
repeated, but with --repeat, on another kind of machine. Workers that share a
folder take what no other holds; those that do not are told apart by --worker
and --workers. Fashion-MNIST must be prepared (see configs/fashion_mnist.py).
"""

import argparse
import fnmatch
import gc
import json
import logging
import math
import pathlib
import shutil
import statistics
import subprocess
import time

import jax

from experiments.comparison import analyse
from experiments.comparison import grid
from ijckd_jax.runtime import compilation_cache
from ijckd_jax.runtime import config_utils
from ijckd_jax.runtime import disk
from ijckd_jax.runtime import workdirs
from ijckd_jax.training import train

RESULTS = grid.FOLDER / 'results.jsonl'
RATES = grid.FOLDER / 'learning_rates.json'
ROW = 'row.json'
logger = logging.getLogger('ijckd_jax')


def teacher_dir(work: pathlib.Path) -> pathlib.Path:
  """Returns the folder of the teacher's run."""
  return work / 'teacher'


def train_teacher(flags) -> None:
  """Trains the teacher of all students."""
  result = train.train_and_evaluate(
    grid.teacher_config(), teacher_dir(flags.work)
  )
  print(json.dumps(result.summary['student']['last'], indent=2))


def choose_rates(flags) -> None:
  """Chooses each student's learning rate, by CE on validation pairs."""
  found = json.loads(RATES.read_text()) if RATES.exists() else {}
  for pair in fnmatch.filter(grid.PAIRS, flags.only):
    top1 = {}
    for rate in grid.RATES:
      result = train.train_and_evaluate(
        grid.rate_config(pair, rate), flags.work / 'rates' / f'{pair}_{rate}'
      )
      top1[str(rate)] = result.history[-1]['validation/top1']
      _forget()
    found[pair] = {
      'student': grid.PAIRS[pair],
      'validation_top1': top1,
      'images_per_second': result.summary['images_per_second'],
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


def run(flags) -> None:
  """Makes the runs that nobody has made yet.

  Raises:
    config_utils.UserError: there is no teacher, or it is not that of the runs
      that were made.
  """
  started, failed = time.monotonic(), []
  rows = analyse.read(RESULTS)
  here = [device.device_kind for device in jax.devices()]
  done = {
    _key(row) for row in rows if not flags.repeat or row['devices'] == here
  }
  teachers = {row['teacher']['fingerprint'] for row in rows}
  chosen = [
    (cell, seed)
    for cell, seed in grid.runs()
    if fnmatch.fnmatch(grid.run_name(cell, seed), flags.only)
    and (cell.pair, cell.name, seed) not in done
  ]
  if not chosen:
    logger.info('nothing is left to run of %s', flags.only)
  elif not (teacher_dir(flags.work) / workdirs.SUMMARY).exists():
    raise config_utils.UserError(
      f'there is no trained teacher in {teacher_dir(flags.work)}: python -m '
      f'experiments.compare_methods teacher {flags.work}'
    )
  for cell, seed in chosen[flags.worker :: flags.workers]:
    if time.monotonic() - started > 3600 * flags.hours:
      logger.info('stopped after %g hours', flags.hours)
      break
    folder = flags.work / grid.run_name(cell, seed)
    if (folder / ROW).exists():
      continue
    begun = time.monotonic()
    try:
      result = train.train_and_evaluate(
        cell.config(str(teacher_dir(flags.work)), seed), folder
      )
    except config_utils.UserError as error:  # Such as: another worker has it.
      logger.warning('%s: %s', folder, error)
      failed.append(grid.run_name(cell, seed))
      continue
    row = describe(cell, seed, result, time.monotonic() - begun)
    teachers.add(row['teacher']['fingerprint'])
    if len(teachers) > 1:
      raise config_utils.UserError(
        f'{teacher_dir(flags.work)} is not the teacher of the runs before: '
        'their students cannot be compared; start with results of your own'
      )
    disk.write_text(folder / ROW, json.dumps(row) + '\n')
    for name in (workdirs.CHECKPOINTS, workdirs.TEACHER_OUTPUTS):
      shutil.rmtree(folder / name, ignore_errors=True)
    _forget()
  if failed:
    logger.warning('not made here: %s', ', '.join(failed))


def describe(cell: grid.Cell, seed: int, result, seconds: float) -> dict:
  """Returns the line that is kept of a run."""
  summary = result.summary
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


def _forget() -> None:
  """Frees what the programs of a run take."""
  jax.clear_caches()
  gc.collect()


COMMANDS = {
  'teacher': train_teacher,
  'rates': choose_rates,
  'plan': plan,
  'run': run,
  'collect': collect,
  'analyse': lambda flags: analyse.write(analyse.read(RESULTS)),
}


def main(argv: list[str]) -> None:
  """Runs the command."""
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
  parser.add_argument('--worker', type=int, default=0)
  parser.add_argument('--workers', type=int, default=1)
  parser.add_argument(
    '--hours', type=float, default=2.0, help='after which no run is begun'
  )
  flags = parser.parse_args(argv)
  if flags.command not in ('plan', 'analyse') and flags.work is None:
    parser.error(f'{flags.command} takes a WORKDIR')
  logging.basicConfig(format='%(message)s')
  logger.setLevel(logging.INFO)
  if flags.command in ('teacher', 'rates', 'run'):
    compilation_cache.enable(compilation_cache.DEFAULT)
  COMMANDS[flags.command](flags)


if __name__ == '__main__':
  config_utils.run_command(main)
