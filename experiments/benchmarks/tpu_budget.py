"""Compiles training steps for TPUs that are not there, into tables.

  python -m experiments.benchmarks.tpu_budget [NAME ...]

A case is compiled (minutes each) unless results/tpu_budget.json has its numbers
already; one that is named is compiled again. docs/tpu.md has the tables.
"""

import dataclasses
import functools
import json
import math
import pathlib
import sys
import time

from ijckd_jax import compile as compile_lib
from ijckd_jax import config_utils
from ijckd_jax import wording

FOLDER = pathlib.Path(__file__).parent
RESULTS = FOLDER / 'results' / 'tpu_budget.json'
CONFIGS = FOLDER.parents[1] / 'configs'
IMAGENET, CIFAR = str(CONFIGS / 'imagenet.py'), str(CONFIGS / 'cifar100.py')


@dataclasses.dataclass(frozen=True)
class Case:
  """A step to compile.

  Attributes:
    title: what the tables call the pair.
    config: a config file and its argument.
    images: of a chip.
    dtype: of the computation.
    topology: for which it is compiled.
    stored: the teacher's outputs come with the batch, in float16.
  """

  title: str
  config: str
  images: int
  dtype: str = 'bfloat16'
  topology: str = 'v5e:2x2'
  stored: bool = False


RESNET = Case('resnet34 -> resnet18', IMAGENET, 256)
MOBILE = Case(
  'resnet50 -> mobilenet_v1',
  f'{IMAGENET}:teacher=resnet50,student=mobilenet_v1',
  256,
)
SMALL = Case('resnet32x4 -> resnet8x4', CIFAR, 1024)
CASES = {
  'small': SMALL,
  'small_stored': dataclasses.replace(SMALL, stored=True),
  'mobile': MOBILE,
  'mobile_stored': dataclasses.replace(MOBILE, stored=True),
  'resnet': RESNET,
  'resnet_stored': dataclasses.replace(RESNET, stored=True),
  'resnet_4x4': dataclasses.replace(RESNET, topology='v5e:4x4'),
  'resnet_16x16': dataclasses.replace(RESNET, topology='v5e:16x16'),
  'resnet_float32': dataclasses.replace(RESNET, dtype='float32'),
}


def measure(case: Case) -> dict[str, object]:
  """Compiles a case and returns its numbers."""
  devices = compile_lib.topology_devices(case.topology)
  config = config_utils.load(case.config)
  config.dtype = case.dtype
  config.batch_size = case.images * len(devices)
  config.teacher.store.views = int(case.stored)
  exp = compile_lib.build(config, devices)
  start = time.perf_counter()
  compiled = compile_lib.compile_step(exp)
  seconds = time.perf_counter() - start
  found = compile_lib.budget(exp, compiled, case.topology)
  return {
    **dataclasses.asdict(case),
    'config': str(pathlib.Path(case.config).relative_to(FOLDER.parents[1])),
    **found.to_json(),
    'by_hand_bytes': case.images * by_hand(exp, case.stored),
    'compile_seconds': seconds,
  }


def by_hand(exp, stored: bool) -> int:
  """Returns the bytes per image of the maps that convolutions read and write.

  Each convolution is an operation of its own: once in the teacher, and three
  times in the student, whose gradients by kernel and by input read or write
  maps of the same sizes (the first layer has none by input). All else, such as
  batch norm, activations, sums and pools, is free. XLA can go below, where it
  fuses two convolutions or keeps a map on-chip.
  """
  import jax
  import jax.numpy as jnp

  distiller = exp.distiller
  shape = tuple(exp.dataset.image_shape)
  frozen = distiller.teacher.frozen
  images = jax.ShapeDtypeStruct((1, *shape), jnp.uint8)
  variables = jax.eval_shape(
    functools.partial(distiller.init, image_shape=shape), jax.random.key(0)
  )
  student = convolved(
    jax.make_jaxpr(distiller.student)(variables, frozen, images).jaxpr
  )
  teacher = convolved(jax.make_jaxpr(distiller.teacher)(frozen, images).jaxpr)
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


def steps_table(results) -> str:
  """Returns the table of what a step costs on a chip, by case."""
  titles = ['pair', 'teacher', 'dtype', 'images', 'GFLOP', 'HBM MB']
  titles += ['by hand MB', 'XLA MB', 'peak GB', 'arithmetic ms', 'memory ms']
  titles += ['at least ms', 'bound by', 'at most images/s', 'by XLA MB, ms']
  rows = [titles]
  for result in results:
    images = result['images']
    rows.append(
      [
        result['title'],
        'stored' if result['stored'] else 'runs',
        result['dtype'],
        f'{images}',
        f'{result["flops"] / images / 1e9:.2f}',
        *(
          f'{result[name] / images / 1e6:.1f}'
          for name in ('hbm_bytes', 'by_hand_bytes', 'xla_bytes')
        ),
        f'{result["peak_bytes"] / 1e9:.2f}',
        f'{1e3 * result["compute_seconds"]:.1f}',
        f'{1e3 * result["memory_seconds"]:.1f}',
        f'{1e3 * result["bound_seconds"]:.1f}',
        result['bound_by'],
        f'{result["images_per_second_per_chip_at_most"]:,.0f}',
        f'{1e3 * result["xla_bytes_seconds"]:.1f}',
      ]
    )
  return wording.grid(rows)


def scale_table(results) -> str:
  """Returns the table of one step on slices of growing size."""
  titles = ['slice', 'chips', 'batch', 'GFLOP/image', 'HBM MB/image']
  titles += ['gradients MB', 'interconnect MB/chip', 'times the gradients']
  titles += ['all-reduces']
  rows = [titles]
  for result in results:
    images = result['images']
    ratio = result['interconnect_bytes'] / result['gradient_bytes']
    rows.append(
      [
        result['topology'],
        str(result['num_chips']),
        f'{images * result["num_chips"]:,}',
        f'{result["flops"] / images / 1e9:.2f}',
        f'{result["hbm_bytes"] / images / 1e6:.1f}',
        f'{result["gradient_bytes"] / 1e6:.1f}',
        f'{result["interconnect_bytes"] / 1e6:.1f}',
        f'{ratio:.2f}',
        str(result['collectives']),
      ]
    )
  return wording.grid(rows)


def main(argv: list[str]) -> None:
  """Runs the command."""
  for name in argv:
    if name not in CASES:
      raise config_utils.unknown('case', name, list(CASES))
  compile_lib.prepare_environment()
  results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
  for name in argv or [name for name in CASES if name not in results]:
    print(f'compiling {name}', file=sys.stderr, flush=True)
    results[name] = measure(CASES[name])
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(results, indent=2) + '\n')
  ordered = {name: results[name] for name in CASES if name in results}
  slices = ('resnet', 'resnet_4x4', 'resnet_16x16')
  print(
    steps_table([r for r in ordered.values() if r['topology'] == 'v5e:2x2'])
  )
  print()
  print(scale_table([ordered[name] for name in slices if name in ordered]))


if __name__ == '__main__':
  config_utils.run_command(main)
