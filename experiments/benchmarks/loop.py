"""Images per second of the training loop beside those of the step alone.

  python -m experiments.benchmarks.loop [--json FILE]

Windows of both alternate in one process: the loop trains on, and whenever it
has written a row, the compiled step is timed alone, on batches that lie on the
device. Where the loop makes many steps in a call, the step alone is timed in
such calls too. See README.md.
"""

import argparse
import functools
import json
import pathlib
import statistics
import tempfile
import time

import jax
import numpy as np

from ijckd_jax.bundles import bundles
from ijckd_jax.data import datasets
from ijckd_jax.distillation import train_state
from ijckd_jax.runtime import compilation_cache
from ijckd_jax.runtime import config_utils
from ijckd_jax.runtime import markdown
from ijckd_jax.training import experiment
from ijckd_jax.training import feeding
from ijckd_jax.training import train

# Shape, classes and training examples as of digits and of CIFAR-100.
DATA = {'digits': ((8, 8, 1), 10, 1437), 'cifar100': ((32, 32, 3), 100, 50000)}


def make_data(name):
  """Returns random images in the shape of a data set's."""
  shape, num_classes, num_examples = DATA[name]
  rng = np.random.default_rng(0)

  def split(count):
    return datasets.Arrays(
      rng.integers(0, 256, (count, *shape), np.uint8),
      rng.integers(0, num_classes, count).astype(np.int32),
    )

  return datasets.ArrayDataset(
    train=split(num_examples),
    test=split(512),
    class_names=tuple(map(str, range(num_classes))),
    mean=(0.5,) * shape[-1],
    std=(0.25,) * shape[-1],
    crop_padding=4 if shape[-1] == 3 else 0,
    flip=shape[-1] == 3,
  )


class BareSteps:
  """A writer that times the step alone whenever a row comes.

  Attributes:
    loop, bare: seconds of the windows of each, but for the first.
  """

  def __init__(self, config, data, workdir, num_steps):
    self._make = functools.partial(self._compile, config, data, workdir)
    self._num_steps = num_steps
    self._step = None
    self._since = None
    self.loop, self.bare = [], []

  def _compile(self, config, data, workdir):
    teacher = bundles.load(workdir / 'teacher').teacher()
    exp = experiment.build(config, dataset=data, teacher=teacher)
    mapper, arrays = exp.mapper, data.load('train')
    tx, _ = exp.optimizer(len(arrays))
    key = jax.random.key(0)
    step = exp.train_step(tx)
    num_rows, num_steps = config.batch_size, 1
    if config.feed == 'device':
      num_steps = min(self._num_steps, feeding.MAX_STEPS_A_CALL)
    index = np.arange(num_rows * num_steps) % len(arrays)
    index = index.reshape(num_rows, num_steps).astype(np.int32)
    plan = {'index': index, 'epoch': np.zeros_like(index)}
    data = {'image': arrays.images, 'label': arrays.labels}
    self._state = mapper.replicate(
      train_state.create(exp.init(key), tx, with_ema=False)
    )
    frozen, key = mapper.replicate((exp.frozen, key))
    if config.feed == 'device':
      mapped = exp.map_train_steps(step)
      data = feeding.data_of(*data.values())
      batch = mapper.shard(plan), mapper.replicate(data)
      most = num_steps

      def call(state, count):
        return mapped(state, frozen, *batch, counts[count], key)

      lengths = [most] * (self._num_steps // most) + [self._num_steps % most]
      counts = {n: mapper.replicate(np.int32(n)) for n in set(lengths)}
    else:
      mapped = exp.map_train_step(step)
      rows = jax.tree.map(lambda x: x[:, 0], plan)
      rows |= {name: values[rows['index']] for name, values in data.items()}
      batch = mapper.shard(rows)

      def call(state, count):
        del count
        return mapped(state, frozen, batch, key)

      lengths = [1] * self._num_steps
    self._lengths, self._step = [n for n in lengths if n], call

  def _window(self):
    start = time.perf_counter()
    for length in self._lengths:
      self._state, sums = self._step(self._state, length)
    jax.block_until_ready((self._state, sums))
    return time.perf_counter() - start

  def write(self, step, scalars):
    del step
    if 'train/loss' not in scalars:
      return
    if self._step is None:
      self._make()
      self._window()
    elif self._since is not None:
      self.loop.append(time.perf_counter() - self._since)
      self.bare.append(self._window())
    self._since = time.perf_counter()

  def close(self):
    pass


def measure(
  name,
  pair,
  *,
  batch_size,
  num_steps,
  num_windows,
  every,
  feed='host',
  dtype='float32',
):
  """Returns what the loop and the step alone did, as a row of the table.

  Args:
    name: of DATA.
    pair: teacher and student.
    batch_size: examples in a step.
    num_steps: of a window; a row of metrics is written after each.
    num_windows: of each kind.
    every: windows from one checkpoint to the next; 0 for none in between.
    feed: how batches reach the devices, see feeding.
    dtype: of the computation.
  """
  data = make_data(name)
  config = experiment.default_config(
    dataset=None, teacher=pair[0], student=pair[1]
  )
  config.dataset.fingerprint = data.fingerprint()
  total = num_steps * (num_windows + 2)
  config_utils.override(
    config,
    {
      'batch_size': batch_size,
      'dtype': dtype,
      'feed': feed,
      'total_steps': total,
      'log_epochs': 0.0,
      'log_steps': num_steps,
      'eval_epochs': 0.0,
      'eval_steps': 10 * total,
      'checkpoint_steps': every * num_steps,
      'teacher.total_steps': 1,
      'optimizer.warmup_epochs': 0.0,
    },
  )
  with tempfile.TemporaryDirectory() as folder:
    workdir = pathlib.Path(folder)
    writer = BareSteps(config, data, workdir, num_steps)
    train.train_and_evaluate(config, workdir, dataset=data, writers=[writer])
  images = batch_size * num_steps
  loop, bare = (
    [images / s for s in times] for times in (writer.loop, writer.bare)
  )
  return {
    'data': name,
    'feed': feed,
    'teacher': pair[0],
    'student': pair[1],
    'batch_size': batch_size,
    'steps_a_window': num_steps,
    'checkpoint_every_windows': every,
    'step_milliseconds': 1e3 * batch_size / statistics.median(bare),
    'bare': statistics.median(bare),
    'loop': statistics.median(loop),
    'ratio': statistics.median(
      one / other for one, other in zip(loop, bare, strict=True)
    ),
    'loop_windows': loop,
    'bare_windows': bare,
  }


def main(argv=None):
  parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
  parser.add_argument('--json', help='where to write the numbers')
  parser.add_argument('--data', nargs='*', default=list(DATA), choices=DATA)
  parser.add_argument('--windows', type=int, default=12, help='of each kind')
  parser.add_argument('--seconds', type=float, default=5.0, help='of a window')
  parser.add_argument('--batch_size', type=int, default=64)
  parser.add_argument('--teacher', default='resnet20')
  parser.add_argument('--student', default='resnet8')
  parser.add_argument('--dtype', default='float32')
  parser.add_argument('--feed', default='host', choices=['host', 'device'])
  flags = parser.parse_args(argv)
  compilation_cache.enable(compilation_cache.DEFAULT)
  rows = []
  for name in flags.data:
    pair = flags.teacher, flags.student
    options = {
      'batch_size': flags.batch_size,
      'dtype': flags.dtype,
      'feed': flags.feed,
    }
    probe = measure(name, pair, num_steps=10, num_windows=3, every=0, **options)
    num_steps = round(1e3 * flags.seconds / probe['step_milliseconds'])
    options |= {'num_windows': flags.windows, 'num_steps': max(10, num_steps)}
    rows += [measure(name, pair, every=every, **options) for every in (0, 3)]
  print(f'{jax.devices()[0].device_kind}, jax {jax.__version__}\n')
  cells = [
    (
      'data',
      'images on the',
      'steps a window',
      'checkpoint every',
      'ms a step',
      'step alone',
      'loop',
      'ratio',
    )
  ]
  for row in rows:
    every = row['checkpoint_every_windows']
    cells.append(
      (
        row['data'],
        row['feed'],
        str(row['steps_a_window']),
        f'{every} windows' if every else 'none',
        f'{row["step_milliseconds"]:.1f}',
        f'{row["bare"]:,.0f}',
        f'{row["loop"]:,.0f}',
        f'{row["ratio"]:.3f}',
      )
    )
  print(markdown.grid(cells))
  if flags.json:
    content = {
      'device': jax.devices()[0].device_kind,
      'jax': jax.__version__,
      'rows': rows,
    }
    pathlib.Path(flags.json).write_text(json.dumps(content, indent=2) + '\n')


if __name__ == '__main__':
  main()
