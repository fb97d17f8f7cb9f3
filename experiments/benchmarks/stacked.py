"""Several students trained in one program, beside one after the other.

  python -m experiments.benchmarks.stacked PAIR [--students 4] [--json FILE]

Three ways to make one step of each of S students, of the same teacher and on
the same views, which share a process and take turns:

- *separate*: S calls of the step that runs train with, each with its teacher;
- *shared*: the same, but the first call returns the teacher's outputs, and the
  others are given them, as from a store;
- *stacked*: one call of the step mapped over the students by `jax.vmap`. The
  teacher does not depend on the student, and runs once; the students'
  convolutions become grouped ones.

See README.md.
"""

import argparse
from collections.abc import Callable
import json
import pathlib
import statistics
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.benchmarks import jax_step
from experiments.benchmarks import pairs
from ijckd_jax.distillation import train_state
from ijckd_jax.models import cpu_conv
from ijckd_jax.runtime import cpu_memory
from ijckd_jax.runtime import markdown

KINDS = ('separate', 'shared', 'stacked')


def make_steps(
  pair: pairs.Pair, num_students: int, dtype: str
) -> dict[str, Callable[[], Any]]:
  """Returns by kind a function that updates all students once.

  It returns the sum of each student's loss over the batch, without waiting.

  Args:
    pair: the teacher, the students' backbone and the batch.
    num_students: S.
    dtype: of the computation.
  """
  exp = jax_step.make_experiment(pair, {'dtype': dtype})
  # The teacher's outputs in the type in which they are computed.
  store = {'store': {'views': 1, 'dtype': dtype}}
  storing = jax_step.make_experiment(pair, {'dtype': dtype, 'teacher': store})
  tx, _ = exp.optimizer(50_000)
  mapper = exp.mapper
  batch = mapper.shard(jax_step.make_batch(exp, pair, 0))
  frozen, key = mapper.replicate(
    (jax.tree.map_with_path(jax_step.draw, exp.frozen), jax.random.key(0))
  )
  body = exp.train_step(tx)
  separate = exp.map_train_step(body)
  first = storing.map_train_step(
    storing.train_step(tx, returns_rows=True), rows_out=True
  )
  others = storing.map_train_step(storing.train_step(tx))
  stacked = exp.map_train_step(jax.vmap(body, in_axes=(0, None, None, None)))
  # Drawn, because the initialisers take longer to compile than the step.
  variables = jax.tree.map_with_path(
    jax_step.draw, jax.eval_shape(exp.init, jax.random.key(0))
  )
  fresh = [
    train_state.create(
      jax.tree.map(lambda x, k=k: x * np.float32(1 + k / 10), variables),
      tx,
      with_ema=False,
    )
    for k in range(num_students)
  ]
  states = {
    'separate': [mapper.replicate(state) for state in fresh],
    'shared': [mapper.replicate(state) for state in fresh],
    'stacked': mapper.replicate(jax.tree.map(lambda *x: jnp.stack(x), *fresh)),
  }

  def step_separately():
    found = [
      separate(state, frozen, batch, key) for state in states['separate']
    ]
    states['separate'] = [state for state, _ in found]
    return [sums['loss'][0] for _, sums in found]

  def step_with_shared_teacher():
    one, *rest = states['shared']
    (one, sums), rows = first(one, frozen, batch, key)
    taught = {**batch, 'teacher': rows['teacher']}
    found = [(one, sums)]
    found += [others(state, frozen, taught, key) for state in rest]
    states['shared'] = [state for state, _ in found]
    return [sums['loss'][0] for _, sums in found]

  def step_stacked():
    states['stacked'], sums = stacked(states['stacked'], frozen, batch, key)
    return sums['loss'][0]

  steps = (step_separately, step_with_shared_teacher, step_stacked)
  return dict(zip(KINDS, steps, strict=True))


def measure(
  pair: pairs.Pair, num_students: int, dtype: str, rounds: int, seconds: float
) -> dict:
  """Returns what was measured of a pair, as a row of the table.

  Args:
    pair: see `make_steps`.
    num_students: see `make_steps`.
    dtype: see `make_steps`.
    rounds: windows of each kind.
    seconds: of a window.
  """
  steps, counts = make_steps(pair, num_students, dtype), {}
  windows = {kind: [] for kind in steps}
  for kind, step in steps.items():
    for _ in range(2):  # The first compiles.
      jax.block_until_ready(step())
    counts[kind] = max(1, round(seconds / _seconds_a_step(step, 2)))
  for _ in range(rounds):
    for kind, step in steps.items():
      windows[kind].append(1e3 * _seconds_a_step(step, counts[kind]))
  medians = {kind: statistics.median(times) for kind, times in windows.items()}
  return {
    'pair': str(pair),
    'students': num_students,
    'dtype': dtype,
    'milliseconds': medians,
    'stacked_by_separate': medians['separate'] / medians['stacked'],
    'stacked_by_shared': medians['shared'] / medians['stacked'],
    'windows': windows,
  }


def _seconds_a_step(step, num_steps):
  """Returns the mean time of some steps, until the last is made."""
  start = time.perf_counter()
  for _ in range(num_steps):
    losses = step()
  # Each student's last loss depends on all of its updates but the last.
  assert np.isfinite(jax.device_get(losses)).all(), losses
  return (time.perf_counter() - start) / num_steps


def main(argv=None):
  """Prints a table and writes the numbers."""
  parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
  parser.add_argument('pairs', nargs='+', choices=pairs.ALL_PAIRS)
  parser.add_argument('--students', type=int, default=4)
  parser.add_argument(
    '--dtype', default='float32', choices=['float32', 'bfloat16']
  )
  parser.add_argument(
    '--convolutions', default='fast', choices=['fast', 'xla'], help='on a CPU'
  )
  parser.add_argument('--rounds', type=int, default=5)
  parser.add_argument('--seconds', type=float, default=2.0, help='of a window')
  parser.add_argument(
    '--small', action='store_true', help='few small images, to rehearse'
  )
  parser.add_argument('--json', type=pathlib.Path)
  args = parser.parse_args(argv)
  cpu_memory.keep_freed()
  if args.convolutions == 'xla':
    cpu_conv._is_handled = lambda *_: False
  device, rows = jax.devices()[0].device_kind, []
  for name in args.pairs:
    pair = pairs.ALL_PAIRS[name]
    pair = pair.small() if args.small else pair
    row = measure(pair, args.students, args.dtype, args.rounds, args.seconds)
    rows.append({**row, 'convolutions': args.convolutions})
    if args.json:
      content = {'device': device, 'jax': jax.__version__, 'rows': rows}
      args.json.write_text(json.dumps(content, indent=2) + '\n')
  print(f'{device}, jax {jax.__version__}\n\n{table(rows)}')


def table(rows) -> str:
  """Returns the milliseconds of each way and their ratios, as Markdown."""
  titles = [f'{kind}, ms' for kind in KINDS]
  cells = [
    ['pair, images, batch', 'students', 'convolutions', *titles]
    + ['separate / stacked', 'shared / stacked']
  ]
  cells += [
    [
      row['pair'],
      str(row['students']),
      row['convolutions'],
      *(f'{row["milliseconds"][kind]:,.1f}' for kind in KINDS),
      f'{row["stacked_by_separate"]:.2f}',
      f'{row["stacked_by_shared"]:.2f}',
    ]
    for row in rows
  ]
  return markdown.grid(cells)


if __name__ == '__main__':
  main()
