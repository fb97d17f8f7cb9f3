"""Prints every backbone: its size, what it costs, and what it pools.

ijckd models
"""

import argparse

from ijckd_jax.runtime import config_utils

PROG = 'python -m ijckd_jax models'
# Of the heads that are counted: CIFAR-100's and ImageNet's.
CIFAR_SIZE, CIFAR_CLASSES, IMAGENET_CLASSES = 32, 100, 1000
TITLES = (
  *('backbone', 'images', 'classes', 'parameters', 'multiply-adds (M)'),
  *('last stage', 'map', 'features', 'pool', 'sign'),
)


def _pool(backbone, variables) -> str:
  """Returns what stands between the map and the head."""
  if not backbone.pools_map:
    return 'class token'
  pooled = [name for name in variables['params'] if name.startswith('pool_')]
  if not pooled:
    return 'average'
  is_hidden = 'kernel' in variables['params'][pooled[0]]
  return f'average, {"hidden layer" if is_hidden else "layer norm"}'


def row(name: str) -> list[str]:
  """Returns a backbone's line of the table, by TITLES."""
  import jax
  import jax.numpy as jnp

  from ijckd_jax import models
  from ijckd_jax.distillation import teachers
  from ijckd_jax.evaluation import cost

  backbone = models.build(name)
  size = backbone.usual_size
  num_classes = CIFAR_CLASSES if size == CIFAR_SIZE else IMAGENET_CLASSES
  images = jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32)

  def init(x):
    key = jax.random.key(0)
    features, variables = backbone.init_with_output(key, x, train=False)
    width = features.pooled.shape[-1]
    return features, variables, backbone.init_head(key, width, num_classes)

  features, variables, head = jax.eval_shape(init, images)
  total = cost.multiply_adds(init, images) + head['kernel'].size

  def side(x):
    return f'{x.shape[1]}x{x.shape[2]}x{x.shape[3]}'

  return [
    name,
    f'{size}x{size}',
    str(num_classes),
    f'{teachers.count(variables["params"]) + teachers.count(head):,}',
    f'{total / 1e6:,.1f}',
    side(features.stages[-1]),
    side(features.final),
    str(features.pooled.shape[-1]),
    _pool(backbone, variables),
    'any' if backbone.signed else 'not negative',
  ]


def main(argv: list[str], prog: str = PROG) -> None:
  """Runs the command."""
  parser = config_utils.ArgumentParser(
    prog=prog, description='Prints a table of the backbones, in Markdown.'
  )
  parser.add_argument(
    'names', nargs='*', metavar='NAME', help='default: all there are'
  )
  flags: argparse.Namespace = parser.parse_args(argv)

  from ijckd_jax import models
  from ijckd_jax.runtime import markdown

  names = flags.names or list(models.BACKBONES)
  for name in names:
    if name not in models.BACKBONES:
      raise config_utils.unknown('backbone', name, list(models.BACKBONES))
  print(markdown.grid([list(TITLES), *map(row, names)]))
