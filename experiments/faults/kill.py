"""Kills runs at random moments, lets them end, and compares them bit by bit.

python -m experiments.faults.kill --kills 120 --output experiments/faults

A run on digits (a teacher, its stored outputs, a student; 5 s and the start) is
killed by SIGKILL, started by the same command, killed again, and in the end
left alone; then it is compared with one that was never killed. The moments are
drawn in turn from the operations on files that the reference made, and from the
time that it took.
"""

import argparse
import collections
from concurrent import futures
import dataclasses
import json
import logging
import os
import pathlib
import platform
import random
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time

import jax
import numpy as np
import orbax.checkpoint as ocp

ROOT = pathlib.Path(__file__).parents[2]
MAX_KILLS = 4  # Of one run.
PERIOD = 4  # Steps between checkpoints.
TEACHER_STEPS, STUDENT_STEPS = 12, 32
FIELDS = {
  'total_epochs': 0,
  'total_steps': STUDENT_STEPS,
  'teacher.total_steps': TEACHER_STEPS,
  'batch_size': 120,
  'ema_decay': 0.9,
  'optimizer.warmup_epochs': 0,
  'log_epochs': 0,
  'log_steps': 2,
  'eval_epochs': 0,
  'eval_steps': 2 * PERIOD,
  'checkpoint_steps': PERIOD,
}
TIMES = (
  *('images_per_second', 'train/images_per_second'),
  *('training_seconds', 'milliseconds'),
)
# What is being written, by the first part of its path.
KINDS = {
  'checkpoints': 'saving',
  'metrics.jsonl': 'metrics',
  '.metrics.jsonl': 'metrics',
  'tensorboard': 'metrics',
  'teacher_outputs': 'stored outputs',
  'bundle': 'bundle',
  '.bundle': 'bundle',
  'plots': 'report',
  'report.md': 'report',
  '.report.md': 'report',
  'summary.json': 'summary',
  '.summary.json': 'summary',
}
LINE = re.compile(r'(\w+) step (\d+)/(\d+)')
CONTINUES = re.compile(r'(/teacher)?: continues after step (\d+)')


@dataclasses.dataclass
class Kill:
  """One of them.

  Attributes:
    trial: number of the run.
    how: 'file operation' or 'time'.
    moment: number of the operation, or seconds since the folder was there.
    phase: what the run was at.
    steps: made in that phase's training so far, as far as logged.
    recomputed: of these, steps that the next start made again; None where the
      next one was killed before it said so.
  """

  trial: int
  how: str
  moment: float
  phase: str
  steps: int
  recomputed: int | None = None


class Child:
  """A start of the command, perhaps killed."""

  def __init__(self, workdir, common, *, at=0, seconds=None):
    """Runs it to its end.

    Args:
      workdir: the run's folder.
      common: further arguments.
      at: kill at this operation on files; 0: at none.
      seconds: kill so long after the folder is there; None: never.
    """
    count = workdir.with_suffix('.count')
    arguments = [sys.executable, f'{ROOT}/experiments/faults/kill_at.py']
    arguments += [count, str(at), '--workdir', workdir, *common]
    process = subprocess.Popen(
      arguments, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    lines, start = [], None
    reader = threading.Thread(target=lambda: lines.extend(process.stderr))
    reader.start()
    while process.poll() is None:
      if start is None and (workdir / '.lock').exists():
        start = time.monotonic()
      if None not in (seconds, start) and time.monotonic() - start > seconds:
        process.kill()
        break
      time.sleep(0.005)
    self.code = process.wait()
    self.seconds = time.monotonic() - start if start else 0.0
    reader.join()
    self.text = b''.join(lines).decode()
    told = count.read_bytes().decode() if count.exists() else ''
    self.operations, _, self.path = json.loads(told or '[0, "", ""]')

  @property
  def last_step(self) -> tuple[str, int]:
    """Who has logged last, and its step."""
    found = LINE.findall(self.text)
    if not found:
      return 'nobody', 0
    name, step, _ = found[-1]
    return ('student' if name == 'student' else 'teacher'), int(step)

  def continued(self, who: str) -> int | None:
    """The step after which a network's training went on; None: not said."""
    for teacher, step in CONTINUES.findall(self.text):
      if who == ('teacher' if teacher else 'student'):
        return int(step)
    if who == 'teacher' and '/teacher: already finished' in self.text:
      return TEACHER_STEPS
    names = {who for who, *_ in LINE.findall(self.text)}
    return 0 if names and (who == 'teacher' or 'student' in names) else None


def phase_of(child: Child, workdir: pathlib.Path, how: str) -> str:
  """Returns what a killed run was at."""
  who, step = child.last_step
  if how == 'file operation':
    parts = pathlib.Path(child.path).parts[1:]
    whose = 'student'
    if parts and parts[0] == 'teacher':
      whose, parts = 'teacher', parts[1:]
    name = parts[0] if parts else ''
    name = re.sub(r'\.[0-9a-f]{32}(\.partial)?$', '', name)
    return f'{whose}: {KINDS.get(name, "start")}'
  if who == 'nobody':
    return 'start'
  folder = workdir / 'teacher' if who == 'teacher' else workdir
  if any((folder / 'checkpoints').glob('*tmp*')):
    return f'{who}: saving'
  if step == (TEACHER_STEPS if who == 'teacher' else STUDENT_STEPS):
    return f'{who}: report'
  return f'{who}: training and evaluation'


def arrays_of(workdir: pathlib.Path) -> dict[str, np.ndarray]:
  """Returns all arrays of the checkpoints that a finished run has kept."""
  found = {}
  reader = ocp.PyTreeCheckpointer()
  for folder in (workdir, workdir / 'teacher'):
    for path in (folder / 'checkpoints').iterdir():
      tree = reader.restore(path)
      for key, leaf in jax.tree_util.tree_leaves_with_path(tree):
        name = f'{path.relative_to(workdir)}{jax.tree_util.keystr(key)}'
        found[name] = np.asarray(leaf)
  return found


def differences(workdir: pathlib.Path, reference: pathlib.Path) -> list[str]:
  """Returns in what two finished runs differ, times left out."""
  one, other = arrays_of(workdir), arrays_of(reference)
  found = sorted(one.keys() ^ other.keys())
  found += [
    name
    for name in one.keys() & other.keys()
    if one[name].dtype != other[name].dtype
    or one[name].tobytes() != other[name].tobytes()
  ]
  for folder in ('.', 'teacher'):
    for name in ('metrics.jsonl', 'summary.json'):
      texts = [
        (path / folder / name).read_text() for path in (workdir, reference)
      ]
      rows = [
        [
          {key: value for key, value in row.items() if key not in TIMES}
          for row in map(json.loads, text.splitlines())
        ]
        if name == 'metrics.jsonl'
        else {k: v for k, v in json.loads(text).items() if k not in TIMES}
        for text in texts
      ]
      if rows[0] != rows[1]:
        found.append(f'{folder}/{name}')
    for name in ('bundle/bundle.json', 'bundle/variables.safetensors'):
      path = pathlib.Path(folder) / name
      if (workdir / path).read_bytes() != (reference / path).read_bytes():
        found.append(str(path))
    if not (workdir / folder / 'report.md').exists():
      found.append(f'{folder}/report.md')
    if (workdir / folder / 'checkpoints' / 'damaged').exists():
      found.append(f'{folder}: a checkpoint was taken for damaged')
  return found


class Harness:
  """Trials against one reference."""

  def __init__(self, scratch: pathlib.Path, *, feed='host', warm: bool = True):
    """Makes the reference run.

    Args:
      scratch: folder of everything.
      feed: how batches reach the devices, see the config. A run that has its
        training set on the devices stores no teacher outputs.
      warm: make it twice, since the first start compiles, and takes longer.
    """
    self.scratch = scratch
    config = 'configs/digits.py:teacher=resnet8'
    values = {
      **FIELDS,
      'feed': feed,
      'teacher.store.views': int(feed == 'host'),  # 12 steps fill it.
      'compilation_cache': scratch / 'cache',
      'dataset.data_dir': scratch / 'data',
    }
    self.common = ['--config', config]
    self.common += [f'--config.{key}={value}' for key, value in values.items()]
    for name in ('warm', 'reference') if warm else ('reference',):
      self.reference = scratch / name
      child = Child(self.reference, self.common)
      if child.code:
        raise SystemExit(f'the reference failed: {child.text}')
    self.operations, self.seconds = child.operations, child.seconds

  def trial(
    self, number: int, moments, *, keep: bool = False
  ) -> tuple[list[Kill], list[str]]:
    """Returns the kills of one run, and in what it differs from the reference.

    Args:
      number: of the trial.
      moments: of each kill: ('file operation', k) or ('time', seconds).
      keep: keep its folder, also where it does not differ.
    """
    workdir = self.scratch / f'trial_{number}'
    kills = []
    for how, moment in (*moments, (None, None)):
      by_file = how == 'file operation'
      child = Child(
        workdir,
        self.common,
        at=moment if by_file else 0,
        seconds=moment if how == 'time' else None,
      )
      if kills:
        who = kills[-1].phase.split(':')[0]
        step = child.continued(who)
        if step is not None:
          kills[-1].recomputed = max(0, kills[-1].steps - step)
      if child.code == 0:
        break
      if child.code != -9:
        return kills, [f'exit code {child.code}: {child.text[-2000:]}']
      phase = phase_of(child, workdir, how)
      who, step = child.last_step
      steps = step if phase.startswith(who) else 0
      kills.append(Kill(number, how, moment, phase, steps))
    found = differences(workdir, self.reference)
    if not (found or keep):
      shutil.rmtree(workdir)
    return kills, found


def run(kills: int, seed: int, jobs: int, scratch: pathlib.Path, feed: str):
  """Returns the kills made, and the differences found by trial."""
  harness = Harness(scratch, feed=feed)
  source = random.Random(seed)
  done, differing, number = [], {}, 0
  with futures.ThreadPoolExecutor(jobs) as pool:
    while len(done) < kills:
      trials = []
      for _ in range(jobs):
        moments = [
          ('file operation', source.randint(1, harness.operations))
          if source.random() < 0.5
          else ('time', source.uniform(0, 1.1 * harness.seconds))
          for _ in range(source.randint(1, MAX_KILLS))
        ]
        trials.append(pool.submit(harness.trial, number, moments))
        number += 1
      for trial in trials:
        made, found = trial.result()
        done += made
        if found:
          differing[made[-1].trial if made else number] = found
          print(f'DIFFERS: {made} {found}', flush=True)
      print(f'{number} runs, {len(done)} kills', flush=True)
  return done, differing, number, harness


def table(kills: list[Kill]) -> str:
  """Returns kills and recomputed steps by phase, as Markdown."""
  groups = collections.defaultdict(list)
  for kill in kills:
    groups[kill.phase].append(kill)
  lines = [
    '| killed at | kills | by file operation | steps recomputed, at most |',
    '|---|--:|--:|--:|',
  ]
  for phase, group in sorted(groups.items()):
    by_file = sum(kill.how == 'file operation' for kill in group)
    steps = [k.recomputed for k in group if k.recomputed is not None]
    lines.append(
      f'| {phase} | {len(group)} | {by_file} | {max(steps, default="-")} |'
    )
  return '\n'.join(lines)


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--kills', type=int, default=120)
  parser.add_argument('--seed', type=int, default=0)
  parser.add_argument('--jobs', type=int, default=2)
  parser.add_argument('--feed', choices=['host', 'device'], default='host')
  parser.add_argument('--output', type=pathlib.Path, required=True)
  flags = parser.parse_args()
  for name in ('absl', 'asyncio', 'root'):
    logging.getLogger(name).setLevel(logging.CRITICAL)
  scratch = pathlib.Path(tempfile.mkdtemp(prefix='kill_'))
  kills, differing, runs, harness = run(
    flags.kills, flags.seed, flags.jobs, scratch, flags.feed
  )
  result = {
    'kills': len(kills),
    'runs': runs,
    'runs_that_differ': differing,
    'seed': flags.seed,
    'feed': flags.feed,
    'file_operations_of_the_reference': harness.operations,
    'seconds_of_the_reference': round(harness.seconds, 2),
    'machine': f'{os.cpu_count()} cores, Python {platform.python_version()}, '
    f'jax {jax.__version__}',
    'each': [dataclasses.asdict(kill) for kill in kills],
  }
  text = json.dumps(result, indent=1)
  (flags.output / 'kill.json').write_text(text + '\n')
  print(table(kills))
  print(f'{len(kills)} kills, {runs} runs, {len(differing)} differ')
  if differing:
    raise SystemExit(f'look into {scratch}')
  shutil.rmtree(scratch)


if __name__ == '__main__':
  main()
