"""This package's training beside PyTorch's, on one GPU.

  python -m experiments.benchmarks.gpu --json FILE [ITEM ...]
  python -m experiments.benchmarks.gpu --json FILE --table
  python -m experiments.benchmarks.gpu --json FILE --rehearse

Works through the items in the order of ITEMS, the most wanted first, and writes
FILE after each measurement. A second call with the same FILE goes on with the
items that are not finished, or measures again those that are named. `--table`
prints what FILE holds. `--rehearse` runs everything on the CPU with four small
images in a batch: it shows that the script works, and its numbers mean nothing.

Every candidate is a process, and windows of them take turns, see worker.
Nothing here needs a network. See README.md.
"""

import argparse
from collections.abc import Callable
import contextlib
import dataclasses
import importlib.metadata
import itertools
import json
import os
import pathlib
import platform
import statistics
import subprocess
import sys
import tempfile
import time

from experiments.benchmarks import pairs
from experiments.benchmarks import worker
from ijckd_jax.runtime import markdown

JAX = 'experiments.benchmarks.jax_step'
TORCH = 'experiments.benchmarks.torch_step'
OURS = 'ours'
STEPS_A_CALL = 50
# The operations that go into CUDA graphs; XLA's default has no convolutions and
# no loops.
COMMAND_BUFFER = '--xla_gpu_enable_command_buffer'
# Dense peaks of the SXM cards by NVIDIA's data sheets of the H100 and the H200,
# in operations a second; float32 is multiplied as TF32 by both libraries.
PEAKS = {
  'NVIDIA H100 80GB HBM3': {'bfloat16': 989.4e12, 'float32': 494.7e12},
  'NVIDIA H200': {'bfloat16': 989.4e12, 'float32': 494.7e12},
}
PACKAGES = ('jax', 'jaxlib', 'flax', 'optax', 'torch', 'triton', 'numpy')


@dataclasses.dataclass(frozen=True)
class Candidate:
  """A process that makes steps.

  Attributes:
    title: its column in the tables.
    arguments: the module, and its command line.
    env: variables beside those of all candidates.
    steps_a_call: how many steps it makes when it is asked for one.
  """

  title: str
  arguments: tuple[str, ...]
  env: tuple[tuple[str, str], ...] = ()
  steps_a_call: int = 1


@dataclasses.dataclass(frozen=True)
class Run:
  """How the items are measured.

  Attributes:
    rehearse: on the CPU, with small batches.
    folder: a scratch folder; compiled programs are kept in it.
    rounds: windows of each candidate.
    seconds: of a window.
    save: writes what has been found.
  """

  rehearse: bool
  folder: pathlib.Path
  rounds: int
  seconds: float
  save: Callable[[], None]

  @property
  def platform(self) -> str:
    """What JAX calls the device."""
    return 'cpu' if self.rehearse else 'cuda'

  @property
  def limit(self) -> float:
    """Seconds that a candidate may take to be ready, or to answer."""
    return 1200.0 if self.rehearse else 240.0

  @property
  def env(self) -> dict[str, str]:
    """The environment of a candidate, with caches that are empty at first."""
    return {
      **os.environ,
      'JAX_PLATFORMS': self.platform,
      # Several candidates share the memory of the card.
      'XLA_PYTHON_CLIENT_PREALLOCATE': 'false',
      'JAX_COMPILATION_CACHE_DIR': str(self.folder / 'xla'),
      'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0',
      'TORCHINDUCTOR_CACHE_DIR': str(self.folder / 'inductor'),
      'TORCHINDUCTOR_FX_GRAPH_CACHE': '1',
      'TORCHINDUCTOR_AUTOGRAD_CACHE': '1',
      'XDG_CACHE_HOME': str(self.folder / 'cache'),
    }

  def start(self, candidate: Candidate) -> worker.Worker:
    """Returns the process of a candidate, which may not be ready yet."""
    small = ('--small',) if self.rehearse else ()
    return worker.Worker(
      *candidate.arguments,
      *small,
      env={**self.env, **dict(candidate.env)},
      limit=self.limit,
    )

  def script(self, name: str, *arguments: str) -> dict:
    """Returns what another benchmark writes, run as a process of its own."""
    path = self.folder / f'{name}.json'
    module = f'experiments.benchmarks.{name}'
    subprocess.run(
      [sys.executable, '-m', module, *arguments, '--json', str(path)],
      check=True,
      env=self.env,
      timeout=2 * self.limit,  # It compiles several programs.
    )
    return json.loads(path.read_text())

  # What there is to measure with.

  def ours(
    self, pair, dtype, title=OURS, *, env=(), steps_a_call=0, mapper='pmap'
  ) -> Candidate:
    """Returns this package's step as a candidate."""
    settings = json.dumps({'dtype': dtype, 'mapper': mapper})
    arguments = (JAX, pair, '1', 'fast', '--settings', settings)
    if steps_a_call:
      arguments += ('--steps_a_call', str(steps_a_call))
    return Candidate(title, arguments, env, max(1, steps_a_call))

  def pytorch(self, pair, dtype, mode) -> Candidate:
    """Returns PyTorch's step as a candidate; CPUs have no CUDA graphs."""
    titles = {
      'graph': 'PyTorch, graph',
      'compile_graph': 'PyTorch, compiled, graph',
      'reduce_overhead': 'PyTorch, reduce-overhead',
      'channels_first': 'PyTorch, compiled, graph, channels first',
    }
    title, arguments = titles[mode], ('1', '--dtype', dtype)
    if mode == 'channels_first':
      mode, arguments = 'compile_graph', (*arguments, '--channels_first')
    if self.rehearse:
      mode = 'eager' if mode == 'graph' else 'compile'
    else:
      arguments += ('--device', 'cuda')
    return Candidate(title, (TORCH, pair, mode, *arguments))


@dataclasses.dataclass(frozen=True)
class Steps:
  """The bare step of a pair, ours beside PyTorch's.

  Attributes:
    pair: a key of pairs.ALL_PAIRS.
    dtype: of the computation.
    modes: of PyTorch.
    more: further ways of ours: 'shard_map', 'loop' (many steps in a call),
      flags of XLA, or 'loop' and flags.
  """

  pair: str
  dtype: str = 'bfloat16'
  modes: tuple[str, ...] = ('compile_graph',)
  more: tuple[str, ...] = ()

  def theirs(self, run: Run) -> list[Candidate]:
    """Returns PyTorch's candidates."""
    return [run.pytorch(self.pair, self.dtype, mode) for mode in self.modes]

  def __call__(self, run: Run, found: dict) -> None:
    """Fills in what each candidate did, and how many images a step has."""
    candidates = self.theirs(run)
    candidates.append(run.ours(self.pair, self.dtype))
    for kind in self.more:
      options = {'title': f'ours, {kind}'}
      if kind == 'shard_map':
        options['mapper'] = kind
      if kind.startswith('loop'):
        options['title'] = f'ours, many steps a call{kind.removeprefix("loop")}'
        options['steps_a_call'] = 2 if run.rehearse else STEPS_A_CALL
      if flags := kind.partition('--')[2]:
        options['env'] = (('XLA_FLAGS', f'--{flags}'),)
      candidates.append(run.ours(self.pair, self.dtype, **options))
    pair = pairs.ALL_PAIRS[self.pair]
    batch_size = pair.small().batch_size if run.rehearse else pair.batch_size
    found |= {
      'pair': str(pair),
      'dtype': self.dtype,
      'batch_size': batch_size,
      'candidates': {},
    }
    time_in_turn(run, candidates, batch_size, found['candidates'])


def time_in_turn(run: Run, candidates, batch_size: int, rows: dict) -> None:
  """Fills in by title: images per second, seconds to be ready, memory, flops.

  A candidate that fails has an 'error' in place of them, and the others go on.
  They start one after the other, since both libraries try several algorithms
  on the GPU as they start, and keep the fastest.
  """
  workers, counts = {}, {}
  with contextlib.ExitStack() as stack:
    for candidate in candidates:
      title, start = candidate.title, time.perf_counter()
      one = run.start(candidate)
      stack.callback(one.kill)
      with recorded(rows, title):
        one.wait_until_ready()
        seconds_to_ready = time.perf_counter() - start
        rows[title] = {'seconds_to_ready': seconds_to_ready, **one.facts()}
        probe = max(1, 10 // candidate.steps_a_call)
        counts[title] = max(1, round(run.seconds * probe / one.seconds(probe)))
        rows[title]['images_per_second'] = []
        workers[candidate] = one
    for _ in range(run.rounds):
      for candidate, one in workers.items():
        title = candidate.title
        if 'error' in rows[title]:
          continue
        with recorded(rows, title):
          seconds = one.seconds(counts[title])
          images = counts[title] * candidate.steps_a_call * batch_size
          rows[title]['images_per_second'].append(images / seconds)
      run.save()


@contextlib.contextmanager
def recorded(rows, title):
  """Puts an error of a process into the rows, in place of raising it."""
  try:
    yield
  except (RuntimeError, OSError, subprocess.SubprocessError) as error:
    rows[title] = {'error': str(error)}
    print(f'{title}: {error}', file=sys.stderr, flush=True)


def compile_pytorch(run: Run, items) -> dict[str, dict]:
  """Fills PyTorch's cache of compiled programs, side by side.

  One after the other, they would take most of the time that a GPU is lent for.

  Returns:
    By candidate, seconds until it was ready, beside the others.
  """
  start, rows, workers = time.perf_counter(), {}, {}
  with contextlib.ExitStack() as stack:
    for item in items:
      for candidate in item.theirs(run):
        title = f'{item.pair}, {item.dtype}, {candidate.title}'
        if 'compiled' in title or 'overhead' in title:
          workers[title] = run.start(candidate)
          stack.callback(workers[title].kill)
    for title, one in workers.items():
      with recorded(rows, title):
        one.wait_until_ready()
        rows[title] = {'seconds_to_ready': time.perf_counter() - start}
  return rows


def measure_card(run: Run, found: dict) -> None:
  """Fills in the rate of a large product in bfloat16, by PyTorch."""
  code = """if 1:
    import json, time, torch
    device = 'cuda' if torch.cuda.is_available() else 'cpu'
    size = 8192 if device == 'cuda' else 512
    a, b = torch.randn(2, size, size, device=device).bfloat16()
    def run(count):
      start = time.perf_counter()
      for _ in range(count): a @ b
      if device == 'cuda': torch.cuda.synchronize()
      return (time.perf_counter() - start) / count
    run(3)
    print(json.dumps({'bfloat16_product_flops_per_second':
                      2 * size ** 3 / min(run(20) for _ in range(3))}))
  """
  found |= json.loads(
    subprocess.run(
      [sys.executable, '-c', code],
      check=True,
      env=run.env,
      stdout=subprocess.PIPE,
      timeout=run.limit,
    ).stdout
  )


def measure_side_by_side(run: Run, found: dict) -> None:
  """Fills in images per second of several processes on the card together."""
  pair, rows = 'resnet20', {}
  found |= {'pair': str(pairs.ALL_PAIRS[pair]), 'processes': rows}
  batch_size = 4 if run.rehearse else pairs.ALL_PAIRS[pair].batch_size
  for count in (1, 2) if run.rehearse else (1, 2, 4, 8, 14):
    with contextlib.ExitStack() as stack, recorded(rows, str(count)):
      workers = [run.start(run.ours(pair, 'bfloat16')) for _ in range(count)]
      for one in workers:
        stack.callback(one.kill)
      for one in workers:
        one.wait_until_ready()
      num_steps = 2 if run.rehearse else 1500
      totals = []
      for _ in range(2):
        for one in workers:
          one.start_steps(num_steps)
        slowest = max(one.finish_steps() for one in workers)
        totals.append(count * num_steps * batch_size / slowest)
      rows[str(count)] = {'images_per_second': totals}
      run.save()


def measure_start(run: Run, found: dict) -> None:
  """Fills in seconds until two steps are made, with filled caches."""
  for pair in ('resnet32x4', 'resnet34'):
    for candidate in (
      run.ours(pair, 'bfloat16'),
      run.pytorch(pair, 'bfloat16', 'compile_graph'),
    ):
      with contextlib.ExitStack() as stack, recorded(found, pair):
        start, one = time.perf_counter(), run.start(candidate)
        stack.callback(one.kill)
        one.wait_until_ready()
        seconds = time.perf_counter() - start
        found[f'{pair}, {candidate.title}'] = {'seconds_to_ready': seconds}


def measure_loop(run: Run, found: dict) -> None:
  """Fills in the whole training loop's speed beside the bare step's.

  By either feed: images from the host step by step, or on the device. It is
  rehearsed on a small pair, in the dtype in which a CPU is fast.
  """
  found['rows'] = []
  windows = ('--windows', '2', '--seconds', '0.2') if run.rehearse else ()
  pairs_of_nets = [('resnet20', 'resnet8')]
  if not run.rehearse:
    pairs_of_nets.insert(0, ('resnet32x4', 'resnet8x4'))
  for feed, (teacher, student) in itertools.product(
    ('device', 'host'), pairs_of_nets
  ):
    written = run.script(
      'loop',
      *('--data', 'digits' if run.rehearse else 'cifar100', '--feed', feed),
      *('--teacher', teacher, '--student', student),
      *('--dtype', 'float32' if run.rehearse else 'bfloat16'),
      *(windows or ('--windows', '6', '--seconds', '1.5')),
    )
    found['rows'] += written['rows']
    run.save()


def measure_stacked(run: Run, found: dict) -> None:
  """Fills in the time of several students in one program, and one by one."""
  found['rows'] = []
  few = ('--small', '--rounds', '1', '--seconds', '0.1')
  cases = (('resnet20', 4), ('resnet20', 16), ('resnet32x4', 4), ('mobile', 4))
  for pair, students in (('resnet20', 2),) if run.rehearse else cases:
    written = run.script(
      'stacked',
      *(pair, '--students', str(students), '--dtype', 'bfloat16'),
      *(few if run.rehearse else ()),
    )
    found['rows'] += written['rows']
    run.save()


def measure_agreement(run: Run, found: dict) -> None:
  """Fills in the losses of 20 steps on the device and on the CPU.

  The same start and batches, of resnet20 -> resnet8. 'highest' multiplies
  float32 as float32, 'default' as TF32.
  """
  losses = found['losses'] = {}
  for title, platform_name, dtype, precision in (
    ('cpu, float32', 'cpu', 'float32', 'highest'),
    ('device, float32, highest', run.platform, 'float32', 'highest'),
    ('device, float32, default', run.platform, 'float32', 'default'),
    ('device, bfloat16', run.platform, 'bfloat16', 'default'),
  ):
    command = run.ours('resnet20', dtype).arguments + ('--losses', '20')
    command += ('--small',) if run.rehearse else ()
    with recorded(losses, title):
      done = subprocess.run(
        [sys.executable, '-m', *command],
        check=True,
        env={
          **run.env,
          'JAX_PLATFORMS': platform_name,
          'JAX_DEFAULT_MATMUL_PRECISION': precision,
        },
        stdout=subprocess.PIPE,
        timeout=run.limit,
      )
      losses[title] = json.loads(done.stdout)


def measure_input(run: Run, found: dict) -> None:
  """Fills in the images of 224 pixels that a core of the host reads."""
  few = ('--images', '64', '--rounds', '1', '--seconds', '0.5')
  many = ('--images', '400', '--rounds', '3', '--seconds', '2')
  only = ('ours, in the process', 'PyTorch, in the process')
  found |= run.script(
    'input_pipeline', *(few if run.rehearse else many), '--only', *only
  )


# By name, the most wanted first. PyTorch's programs are compiled before the
# first of those that start a wave.
ITEMS = {
  'card': measure_card,
  'resnet32x4': Steps(
    'resnet32x4',
    modes=('graph', 'compile_graph', 'reduce_overhead'),
    more=('shard_map', 'loop'),
  ),
  'resnet34': Steps('resnet34', modes=('graph', 'compile_graph')),
  'resnet32x4_512': Steps('resnet32x4_512', more=('loop',)),
  'resnet20': Steps('resnet20', more=('loop',)),
  'wrn': Steps('wrn', more=('loop',)),
  'mobile': Steps('mobile', modes=('compile_graph', 'channels_first')),
  'resnet50': Steps('resnet50', modes=('compile_graph', 'channels_first')),
  'resnet32x4_float32': Steps('resnet32x4', 'float32'),
  'resnet34_float32': Steps('resnet34', 'float32'),
  'loop': measure_loop,
  'side_by_side': measure_side_by_side,
  'stacked': measure_stacked,
  'start': measure_start,
  'agreement': measure_agreement,
  'input': measure_input,
  # What XLA has to offer, and what it should change: see README.md.
  'flags': Steps(
    'resnet32x4',
    modes=(),
    more=(
      f'{COMMAND_BUFFER}=',
      f'{COMMAND_BUFFER}=+CONVOLUTION',
      'loop',
      f'loop {COMMAND_BUFFER}=+CONVOLUTION',
      f'loop {COMMAND_BUFFER}=+CONVOLUTION,+CONDITIONAL,+WHILE',
      '--xla_gpu_experimental_enable_conv_fusion=true',
      '--xla_gpu_enable_pdl_launch=true',
      '--xla_gpu_exhaustive_tiling_search=true',
      '--xla_gpu_enable_latency_hiding_scheduler=true',
    ),
  ),
}
FIRST_WAVE = ('resnet32x4', 'resnet34')


def describe_machine(run: Run) -> dict[str, str]:
  """Returns the card, its driver, the host and the versions."""
  card, driver = f'{platform.machine()}, {os.cpu_count()} cores', ''
  if not run.rehearse:
    query = '--query-gpu=name,driver_version'
    found = subprocess.run(
      ['nvidia-smi', query, '--format=csv,noheader'],
      check=True,
      stdout=subprocess.PIPE,
      text=True,
    ).stdout.splitlines()[0]
    card, driver = (part.strip() for part in found.split(','))
  versions = {'python': platform.python_version()}
  for name in PACKAGES:
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
      versions[name] = importlib.metadata.version(name)
  return {
    'card': card,
    'driver': driver,
    'host_cores': str(os.cpu_count()),
    'rehearsal': run.rehearse,
    'versions': versions,
  }


def measure(run: Run, names, content: dict) -> None:
  """Measures the items that are named; one that is finished has 'seconds'."""
  waves = [[n for n in names if (n in FIRST_WAVE) == first] for first in (1, 0)]
  waves = [[ITEMS[n] for n in wave] for wave in waves]
  waves = [[x for x in wave if isinstance(x, Steps)] for wave in waves]
  compiled = []
  for name in names:
    item, start = ITEMS[name], time.perf_counter()
    for wave in waves:
      if item in wave and wave not in compiled:
        compiled.append(wave)
        content['compiling'] |= compile_pytorch(run, wave)
    print(f'{name} ...', file=sys.stderr, flush=True)
    with recorded(content['items'], name):
      found = content['items'][name] = {}
      item(run, found)
      found['seconds'] = time.perf_counter() - start
      print(f'{name}: {found["seconds"]:.0f} s', file=sys.stderr, flush=True)
    run.save()


def speed(row) -> float | None:
  """Returns the median of a candidate's windows; None where it has none."""
  windows = row.get('images_per_second')
  return statistics.median(windows) if windows else None


def steps_table(content: dict) -> str:
  """Returns the table of the bare steps."""
  items = [x for x in content['items'].values() if 'candidates' in x]
  peaks = PEAKS.get(content['card'], {})
  cells = [
    [
      'pair, images, batch',
      'dtype',
      "PyTorch's best",
      'ours',
      'ratio',
      'share of peak',
      'ours, GiB',
      "PyTorch's GiB",
      'further ways of ours, by ours',
    ]
  ]
  for item in items:
    rows = item['candidates']
    speeds = {title: speed(row) for title, row in rows.items()}
    known = {title: value for title, value in speeds.items() if value}
    theirs = {k: v for k, v in known.items() if 'PyTorch' in k}
    best, mine = max(theirs, key=theirs.get, default=None), known.get(OURS)
    cell = [item['pair'], item['dtype'], '', '', '', '', '', '', '']
    if best:
      cell[2] = f'{theirs[best]:,.0f} ({best.partition(", ")[2]})'
      cell[7] = f'{rows[best]["device_memory"] / 2**30:.2f}'
    if mine:
      cell[3] = f'{mine:,.0f}'
      cell[6] = f'{rows[OURS]["device_memory"] / 2**30:.2f}'
      if item['dtype'] in peaks:
        share = mine * rows[OURS]['flops'] / peaks[item['dtype']]
        cell[5] = f'{share:.1%}'
      cell[8] = '; '.join(
        f'{title.partition(", ")[2]} {value / mine:.2f}'
        for title, value in known.items()
        if title.startswith(f'{OURS}, ')
      )
    if best and mine:
      cell[4] = f'{mine / theirs[best]:.2f}'
    cells.append(cell)
  return markdown.grid(cells)


def other_lines(content: dict) -> list[str]:
  """Returns what the other items found, a line each."""
  items, lines = content['items'], []
  for name, item in items.items():
    if 'error' in item:
      lines.append(f'{name}: failed: {item["error"]}')
    for title, row in item.get('candidates', {}).items():
      if 'error' in row:
        lines.append(f'{name}, {title}: failed: {row["error"]}')
  for row in items.get('loop', {}).get('rows', []):
    lines.append(
      f'loop, {row["teacher"]} -> {row["student"]}, {row["batch_size"]}, '
      f'images on the {row["feed"]}, '
      f'checkpoint every {row["checkpoint_every_windows"]} windows: '
      f'{row["loop"]:,.0f} images/s, {row["ratio"]:.3f} of the bare step'
    )
  found = items.get('side_by_side', {})
  for count, row in found.get('processes', {}).items():
    if 'error' not in row:
      total = statistics.median(row['images_per_second'])
      lines.append(
        f'{found["pair"]}, {count} processes together: {total:,.0f} images/s'
      )
  for row in items.get('stacked', {}).get('rows', []):
    times = ', '.join(
      f'{kind} {value:,.1f} ms' for kind, value in row['milliseconds'].items()
    )
    lines.append(f'{row["pair"]}, {row["students"]} students: {times}')
  ready = {
    f'{name}, {title}': row['seconds_to_ready']
    for name, item in items.items()
    for title, row in item.get('candidates', {}).items()
    if 'error' not in row and title == OURS
  }
  for title, seconds in ready.items():
    lines.append(f'first two steps, {title}: {seconds:.1f} s')
  for title, row in items.get('start', {}).items():
    if isinstance(row, dict) and 'error' not in row:
      seconds = row['seconds_to_ready']
      lines.append(f'first two steps, caches filled, {title}: {seconds:.1f} s')
  losses = items.get('agreement', {}).get('losses', {})
  reference = losses.get('cpu, float32')
  for title, values in losses.items():
    if isinstance(reference, list) and isinstance(values, list):
      errors = [abs(a / b - 1) for a, b in zip(values, reference, strict=True)]
      lines.append(
        f'loss by {title}, relative to the CPU: {errors[0]:.1e} in step 1, at '
        f'most {max(errors):.1e} in {len(errors)}'
      )
  reading = items.get('input', {}).get('images_per_second', {})
  for title, windows in reading.items():
    lines.append(
      f'reading at 224, {title}: {statistics.median(windows):,.0f} images/s '
      'of one core'
    )
  if rate := items.get('card', {}).get('bfloat16_product_flops_per_second'):
    lines.append(f'a product in bfloat16: {rate / 1e12:.0f} TFLOP/s')
  return lines


def main(argv=None):
  """Measures, and prints a table."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('items', nargs='*', metavar='ITEM', help=', '.join(ITEMS))
  parser.add_argument('--json', type=pathlib.Path, required=True)
  parser.add_argument('--table', action='store_true')
  parser.add_argument('--rehearse', action='store_true')
  parser.add_argument('--rounds', type=int, default=5)
  parser.add_argument('--seconds', type=float, default=1.0, help='of a window')
  args = parser.parse_args(argv)
  if unknown := set(args.items) - set(ITEMS):
    parser.error(f'unknown items: {", ".join(sorted(unknown))}')
  if args.table and not args.json.exists():
    parser.error(f'there is no {args.json}')
  content = {'compiling': {}, 'items': {}}
  if args.json.exists():
    content = json.loads(args.json.read_text())
  if not args.table:
    args.json.parent.mkdir(parents=True, exist_ok=True)
    rounds, seconds = (1, 0.1) if args.rehearse else (args.rounds, args.seconds)

    def save():
      partial = args.json.with_suffix('.partial')
      partial.write_text(json.dumps(content, indent=2) + '\n')
      partial.replace(args.json)

    with tempfile.TemporaryDirectory() as folder:
      run = Run(args.rehearse, pathlib.Path(folder), rounds, seconds, save)
      machine = describe_machine(run)
      if content.get('card', machine['card']) != machine['card']:
        parser.error(f'{args.json} is of another card, {content["card"]}')
      content |= machine
      done = {name for name, x in content['items'].items() if 'seconds' in x}
      missing = [name for name in ITEMS if name not in done]
      measure(run, args.items or missing, content)
  said = ', '.join(f'{k} {v}' for k, v in content['versions'].items())
  print(f'{content["card"]}, driver {content["driver"]}; {said}\n')
  print(steps_table(content))
  print()
  print('\n'.join(other_lines(content)))


if __name__ == '__main__':
  main()
