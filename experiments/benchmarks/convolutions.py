"""Times this package's convolutions on CPUs beside XLA's, one by one.

  taskset -c 0 python -m experiments.benchmarks.convolutions [--json FILE]

Forward, by the images (the input gradient) and by the kernel (the kernel
gradient), each compiled alone; windows of both take turns. An algorithm of
models/cpu_conv.py that wins nowhere may be deleted. See README.md.
"""

import argparse
import functools
import json
import math
import pathlib
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np

from experiments.benchmarks import machine
from ijckd_jax.models import cpu_conv
from ijckd_jax.runtime import cpu_memory
from ijckd_jax.runtime import markdown

# Images, their side, channels of the input and of the result, side of the
# kernel, stride; as in the pairs of `pairs.py`. 0 channels of the result: the
# convolution is depthwise.
SHAPES = (
  *((128, 32, 16, 16, 3, 1), (128, 16, 32, 32, 3, 1), (128, 8, 64, 64, 3, 1)),
  *((64, 32, 64, 64, 3, 1), (64, 16, 128, 128, 3, 1), (64, 8, 256, 256, 3, 1)),
  *((128, 32, 16, 32, 3, 2), (64, 32, 64, 128, 3, 2)),
  *((64, 16, 32, 192, 1, 1), (64, 16, 192, 0, 3, 1)),
)
TITLES = ('forward', 'input gradient', 'kernel gradient')


def functions(batch, side, inputs, outputs, window, stride):
  """Returns the GFLOP of a convolution, and ours and XLA's of each kind.

  Returns:
    The number; and for each of TITLES, a pair of functions without arguments.
  """
  groups = 1 if outputs else inputs
  outputs = outputs or inputs
  rng = np.random.default_rng(0)

  def random(*shape):
    return jnp.asarray(rng.standard_normal(shape, np.float32))

  x = random(batch, side, side, inputs)
  kernel = random(window, window, inputs // groups, outputs)
  xla = functools.partial(cpu_conv.xla_convolve, stride=stride)
  g = random(*jax.eval_shape(xla, x, kernel).shape)
  ours = cpu_conv.algorithm_of(x, kernel, stride)
  pads = cpu_conv.half(window)

  def xla_by_x(kernel, g):
    return jax.linear_transpose(lambda x: xla(x, kernel), x)(g)[0]

  def xla_by_kernel(x, g):
    return jax.linear_transpose(lambda kernel: xla(x, kernel), kernel)(g)[0]

  cases = (
    (
      lambda x, kernel: ours.convolve(x, kernel, stride, pads),
      xla,
      (x, kernel),
    ),
    (
      lambda kernel, g: ours.by_x(kernel, g, stride, pads, x.shape),
      xla_by_x,
      (kernel, g),
    ),
    (
      lambda x, g: ours.by_kernel(x, g, stride, pads, window),
      xla_by_kernel,
      (x, g),
    ),
  )
  compiled = []
  for one, other, arguments in cases:
    calls = [functools.partial(jax.jit(f), *arguments) for f in (one, other)]
    found, wanted = (np.asarray(call()) for call in calls)
    scale = np.abs(wanted).max()
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-4 * scale)
    compiled.append(calls)
  gflop = 2e-9 * math.prod(g.shape) * math.prod(kernel.shape[:3])
  return gflop, compiled


def measure(calls, rounds: int, seconds: float) -> list[float]:
  """Returns the median seconds of each call, in windows that take turns."""
  counts = []
  for call in calls:
    _window(call, 1)  # Warms up.
    counts.append(max(1, round(seconds / _window(call, 1))))
  times = [[] for _ in calls]
  for _ in range(rounds):
    for call, count, found in zip(calls, counts, times, strict=True):
      found.append(_window(call, count) / count)
  return [statistics.median(found) for found in times]


def _window(call, count: int) -> float:
  """Returns the seconds that `count` calls take, one after the other."""
  begin = time.perf_counter()
  for _ in range(count):
    jax.block_until_ready(call())
  return time.perf_counter() - begin


def title(batch, side, inputs, outputs, window, stride) -> str:
  """Returns how a convolution is called in the table."""
  kind = '' if outputs else 'depthwise '
  size = f'{window}x{window}' + (f', stride {stride}' if stride > 1 else '')
  return f'{kind}{size}, {batch}x{side}, {inputs} -> {outputs or inputs}'


def main():
  """Prints a table and writes the numbers."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--rounds', type=int, default=5)
  parser.add_argument('--seconds', type=float, default=0.3, help='of a window')
  parser.add_argument('--json', type=pathlib.Path)
  flags = parser.parse_args()
  cpu_memory.keep_freed()
  rows, cells = [], [['convolution, batch x side, channels']]
  for name in TITLES:
    cells[0] += [f'{name}: GFLOP/s', 'ratio']
  for shape in SHAPES:
    gflop, kinds = functions(*shape)
    line = [title(*shape)]
    for name, calls in zip(TITLES, kinds, strict=True):
      ours, xla = measure(calls, flags.rounds, flags.seconds)
      rows.append(
        {'convolution': title(*shape), 'kind': name, 'gflop': gflop}
        | {'seconds': ours, 'xla_seconds': xla}
      )
      line += [f'{gflop / ours:.0f}', f'{xla / ours:.2f}']
    cells.append(line)
  print(f'{machine.processor()}, jax {jax.__version__}\n')
  print(markdown.grid(cells))
  if flags.json:
    content = {
      'processor': machine.processor(),
      'jax': jax.__version__,
      'rows': rows,
    }
    flags.json.write_text(json.dumps(content, indent=2) + '\n')


if __name__ == '__main__':
  main()
