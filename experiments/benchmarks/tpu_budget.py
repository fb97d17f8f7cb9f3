"""Estimates what training steps cost on a TPU, for the table of docs/tpu.md.

  python -m experiments.benchmarks.tpu_budget [NAME ...]

Compiles the named cases (minutes each) into results/tpu_budget.json; without
names, those that the file lacks. Prints the table of all cases in the file.
"""

import dataclasses
import functools
import json
import math
import pathlib
import sys
import time

from ijckd_jax.commands import estimate
from ijckd_jax.runtime import config_utils
from ijckd_jax.runtime import markdown

FOLDER = pathlib.Path(__file__).parent
RESULTS = FOLDER / 'results' / 'tpu_budget.json'
CONFIGS = FOLDER.parents[1] / 'configs'
TOPOLOGY = 'v5e:2x2'


@dataclasses.dataclass(frozen=True)
class Case:
  """A training step to compile, in bfloat16.

  Attributes:
    config: file and argument of a config.
    images: images per chip.
    stored: whether the teacher's outputs come with the batch, in float16.
  """

  config: str
  images: int
  stored: bool = False


RESNET = Case('imagenet.py:teacher=resnet34,student=resnet18', 256)
CASES = {
  'resnet': RESNET,
  'resnet_stored': dataclasses.replace(RESNET, stored=True),
  'mobile': Case('imagenet.py:teacher=resnet50,student=mobilenet_v1', 256),
}


def measure(case: Case) -> dict[str, object]:
  """Compiles a case and returns its numbers."""
  from ijckd_jax.training import cost_estimate

  devices = cost_estimate.topology_devices(TOPOLOGY)
  config = config_utils.load(str(CONFIGS / case.config))
  config.dtype = 'bfloat16'
  config.batch_size = case.images * len(devices)
  config.teacher.store.views = int(case.stored)
  exp = cost_estimate.build(config, devices)
  start = time.perf_counter()
  compiled = cost_estimate.compile_step(exp)
  seconds = time.perf_counter() - start
  found = cost_estimate.budget(exp, compiled, TOPOLOGY)
  return {
    'config': case.config,
    'stored': case.stored,
    **found.to_json(),
    'convolution_bytes': case.images * convolution_bytes(exp, case.stored),
    'compile_seconds': seconds,
  }


def convolution_bytes(exp, stored: bool) -> int:
  """Returns the bytes per image of the maps that convolutions read and write.

  Each convolution counts as an operation of its own: once in the teacher, and
  three times in the student, because its gradients by kernel and by input read
  or write maps of the same sizes. The first layer has no gradient by input.
  Batch norm, activations, sums and pools count as free.
  """
  import jax
  import jax.numpy as jnp

  distiller = exp.distiller
  shape = tuple(exp.dataset.image_shape)
  frozen = distiller.frozen
  images = jax.ShapeDtypeStruct((1, *shape), jnp.uint8)
  variables = jax.eval_shape(
    functools.partial(distiller.init, image_shape=shape), jax.random.key(0)
  )
  student = convolved(
    jax.make_jaxpr(distiller.run_student)(variables, frozen, images).jaxpr
  )
  teacher = convolved(
    jax.make_jaxpr(distiller.run_teachers)(frozen, images).jaxpr
  )
  total = 3 * sum(student) - student[0]
  return total if stored else total + sum(teacher)


def convolved(jaxpr) -> list[int]:
  """Returns the bytes of input and output of each convolution, in order."""
  found = []
  for equation in jaxpr.eqns:
    if equation.primitive.name == 'conv_general_dilated':
      maps = (equation.invars[0].aval, equation.outvars[0].aval)
      found.append(sum(math.prod(x.shape) * x.dtype.itemsize for x in maps))
    for value in equation.params.values():
      inner = getattr(value, 'jaxpr', value)
      if hasattr(inner, 'eqns'):
        found += convolved(inner)
  return found


def table(results) -> str:
  """Returns the table of what a step costs on a chip, by case."""
  rows = [
    ['pair', 'teacher', 'images', 'GFLOP', 'accessed MB', 'convolutions MB']
    + ['peak GB', 'gradients MB', 'arithmetic ms', 'memory ms', 'images/s']
  ]
  for result in results:
    _, _, pair = result['config'].partition(':teacher=')
    images = result['images']
    rows.append(
      [
        pair.replace(',student=', ' -> '),
        'stored' if result['stored'] else 'runs',
        str(images),
        f'{result["flops"] / images / 1e9:.2f}',
        f'{result["bytes_accessed"] / images / 1e6:.1f}',
        f'{result["convolution_bytes"] / images / 1e6:.1f}',
        f'{result["peak_bytes"] / 1e9:.2f}',
        f'{result["gradient_bytes"] / 1e6:.1f}',
        f'{1e3 * result["compute_seconds"]:.1f}',
        f'{1e3 * result["memory_seconds"]:.1f}',
        f'{result["images_per_second"]:,.0f}',
      ]
    )
  return markdown.grid(rows)


def main(argv: list[str]) -> None:
  """Runs the command."""
  for name in argv:
    if name not in CASES:
      raise config_utils.unknown('case', name, list(CASES))
  estimate.prepare_environment()
  results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
  for name in argv or [name for name in CASES if name not in results]:
    print(f'compiling {name}', file=sys.stderr, flush=True)
    results[name] = measure(CASES[name])
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(results, indent=2) + '\n')
  print(table([results[name] for name in CASES if name in results]))


if __name__ == '__main__':
  config_utils.run_command(main)
