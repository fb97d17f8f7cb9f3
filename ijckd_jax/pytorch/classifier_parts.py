"""What a PyTorch classifier is made of, as it was found by running it."""

from collections.abc import Callable
import contextlib
import dataclasses
from typing import Any

import numpy as np

from ijckd_jax.runtime import config_utils

NUM_PROBES = 4
# Of the largest number: that far two orders of float32 sums may be apart.
TOLERANCE = 2e-5
PROTOCOL = ('forward_features', 'forward_head', 'get_classifier')


@dataclasses.dataclass(frozen=True)
class Parts:
  """What a classifier is made of; images are (B, C, H, W), maps (B, h, w, c).

  Attributes:
    features: torch function, images to the map that is pooled and to z (B, D),
      by one run of the network.
    pool: torch function to z, of the map or of its average (B, c) where that
      is all that matters; None where it is the average itself, or where z does
      not follow from the map.
    pool_takes: shape of an example of `pool`.
    pool_of_map: the same as `pool`, of the map; None where that is.
    num_features: D.
    pools_map: whether z follows from the map.
    kernel: (D, K) of the head; None where the network has none.
    bias: (K,); None likewise.
    head_name: of the torch.nn.Linear that is the head; None where it is made of
      others.
    signed: whether a number of the map was below zero.
    pooled_signed: whether one of z was.
    how: in words, how they were found.
  """

  features: Callable[[Any], tuple[Any, Any]]
  pool: Callable[[Any], Any] | None
  pool_takes: tuple[int, ...] | None
  pool_of_map: Callable[[Any], Any] | None
  num_features: int
  pools_map: bool
  kernel: np.ndarray | None
  bias: np.ndarray | None
  head_name: str | None
  signed: bool
  pooled_signed: bool
  how: str


@contextlib.contextmanager
def unchanged(model):
  """Undoes what a run leaves in a model's modules.

  Some keep tensors for the next run: of a trace, those are no numbers.
  """
  before = [
    (
      vars(module),
      dict(vars(module)),
      {k: dict(v) for k, v in vars(module).items() if type(v) is dict},
    )
    for module in model.modules()
  ]
  try:
    yield
  finally:
    for now, attributes, contents in before:
      now.clear()
      now.update(attributes)
      for name, content in contents.items():
        now[name].clear()
        now[name].update(content)


def affine(head, z):
  """Returns the kernel (D, K) and bias (K,) of a module that is linear.

  Args:
    head: torch.nn.Module.
    z: (B, D), what it is given.

  Raises:
    config_utils.UserError: it is not linear.
  """
  import torch

  if isinstance(head, torch.nn.Linear):
    bias = head.bias
    if bias is None:
      bias = torch.zeros(head.out_features)
    return head.weight.detach().T.clone(), bias.detach().clone()

  def apply(x):
    if isinstance(head, torch.nn.Conv2d):  # Of 1x1, on maps of one pixel.
      return head(x[:, :, None, None]).flatten(1)
    return head(x)

  layer = f'its last layer, a {type(head).__name__}'
  with config_utils.blame(f'{layer}, does not take its pooled features'):
    bias = apply(torch.zeros_like(z[:1]))[0]
    kernel = apply(torch.eye(z.shape[1])) - bias
    is_linear = close(z @ kernel + bias, apply(z))
  if not is_linear:
    raise config_utils.UserError(
      f'{layer}, is not linear: a student cannot be given it as its head'
    )
  return kernel, bias


def assemble(map_, z, *, features, pool, head, head_name, how) -> Parts:
  """Returns the parts, once it is known what z follows from.

  Args:
    map_: (B, h, w, c).
    z: (B, D).
    features: see Parts.
    pool: torch function of the map that may give z; None where none is known.
    head: kernel and bias.
    head_name: see Parts.
    how: see Parts.
  """
  import torch

  # Where a pool bends its input, the network's own maps may not show it.
  wide = 3 * map_.std() * torch.randn(map_.shape, generator=generator())
  is_average = pools_map = close(average(map_), z)
  of_map, takes = pool, None
  if pool is not None:
    pools_map = False
    with contextlib.suppress(Exception):
      pools_map = close(pool(map_), z)
      is_average = pools_map and close(pool(wide), average(wide))
  if pools_map and not is_average:
    takes = tuple(map_.shape[1:])
    height, width, _ = takes

    def of_average(x):
      return of_map(x[:, None, None, :].expand(-1, height, width, -1))

    with contextlib.suppress(Exception):
      if close(of_average(average(wide)), of_map(wide)):
        pool, takes = of_average, takes[2:]
  return Parts(
    features=features,
    pool=None if takes is None else pool,
    pool_takes=takes,
    pool_of_map=None if takes is None else of_map,
    num_features=z.shape[1],
    pools_map=pools_map,
    kernel=head[0],
    bias=head[1],
    head_name=head_name,
    signed=bool((map_ < 0).any()),
    pooled_signed=bool((z < 0).any()),
    how=how,
  )


def generator():
  """Returns a torch.Generator that gives the same numbers each time."""
  import torch

  return torch.Generator().manual_seed(0)


def average(map_):
  """Returns (B, c) of a map (B, h, w, c)."""
  return map_.mean(dim=(1, 2))


def close(x, y) -> bool:
  """Returns whether two tensors are the same but for rounding."""
  if x.shape != y.shape:
    return False
  return bool((x - y).abs().max() <= TOLERANCE * y.abs().max())
