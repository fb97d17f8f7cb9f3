"""A PyTorch classifier taken apart: its map, its pool and its linear head.

Nothing of it is guessed: every part is run on images, and what is put together
of the parts must give what the whole gives.
"""

from collections.abc import Callable
import contextlib
import dataclasses
import math
from typing import Any

import numpy as np

from ijckd_jax import config_utils

NUM_PROBES = 4
# Of the largest number: that far two orders of float32 sums may be apart.
TOLERANCE = 2e-5
PROTOCOL = ('forward_features', 'forward_head', 'get_classifier')


@dataclasses.dataclass(frozen=True)
class Parts:
  """What a classifier is made of; images are (B, C, H, W), maps (B, h, w, c).

  Attributes:
    final: torch function, images to the map that is pooled.
    pooled: torch function, images to z (B, D); None where it is `pool` of the
      map.
    pool: torch function to z, of the map or of its average (B, c) where that
      is all that matters; None where it is the average itself, or where z does
      not follow from the map.
    pool_takes: shape of an example of `pool`.
    pools_map: whether z follows from the map.
    kernel: (D, K) of the head; None where the network has none.
    bias: (K,); None likewise.
    signed: whether a number of the map was below zero.
    pooled_signed: whether one of z was.
    how: in words, how they were found.
  """

  final: Callable[[Any], Any]
  pooled: Callable[[Any], Any] | None
  pool: Callable[[Any], Any] | None
  pool_takes: tuple[int, ...] | None
  pools_map: bool
  kernel: np.ndarray | None
  bias: np.ndarray | None
  signed: bool
  pooled_signed: bool
  how: str


def split(model, image_shape: tuple[int, int, int]) -> Parts:
  """Returns the parts of a classifier.

  Args:
    model: torch.nn.Module in inference mode. One that has timm's
      `forward_features`, `forward_head` and `get_classifier` is taken at its
      word, another is watched while it runs.
    image_shape: (H, W, C) of its images.

  Raises:
    config_utils.UserError: its last layer is not linear, or it does not run on
      such images.
  """
  import torch

  height, width, channels = image_shape
  shape = (NUM_PROBES, channels, height, width)
  probes = torch.randn(shape, generator=_generator())
  with torch.no_grad(), unchanged(model):
    try:
      logits = model(probes)
    except Exception as error:  # The model may be anyone's.
      raise config_utils.UserError(
        f'it does not run on images of {height}x{width} with {channels} '
        f'channels: {config_utils.short(error)}'
      ) from error
    refusal = None
    if all(hasattr(model, name) for name in PROTOCOL):
      features = model.forward_features(probes)
      if isinstance(features, torch.Tensor) and features.ndim in (2, 3, 4):
        try:
          return _by_protocol(model, features, logits)
        except config_utils.UserError as error:
          refusal = error
    try:
      return _by_watching(model, probes, logits)
    except config_utils.UserError as error:
      raise (refusal or error) from error


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


def _by_protocol(model, features, logits) -> Parts:
  """Splits a network that says itself where it can be cut, as timm's do."""
  import torch

  layout = _layout(model, features)
  heads, two_tokens = _heads(model)

  def pool(features):
    if two_tokens:
      return torch.cat([features[:, 0], features[:, 1]], dim=1)
    pooled = model.forward_head(features, pre_logits=True)
    return pooled.flatten(1)

  def final(images):
    return layout.to_map(model.forward_features(images))

  z = pool(features)
  kernel, bias = _linear(heads, z, logits, two_tokens)
  pool_of_map = None
  if layout.from_map is not None and not two_tokens:

    def pool_of_map(map_):
      return pool(layout.from_map(map_))

  return _parts(
    layout.to_map(features),
    z,
    final=final,
    pooled=lambda images: pool(model.forward_features(images)),
    pool=pool_of_map,
    head=(kernel, bias),
    how=', '.join(PROTOCOL),
  )


@dataclasses.dataclass(frozen=True)
class _Layout:
  """How features lie in memory.

  Attributes:
    to_map: from features to (B, h, w, c).
    from_map: back; None where there is no way.
  """

  to_map: Callable[[Any], Any]
  from_map: Callable[[Any], Any] | None


def _layout(model, features) -> _Layout:
  """Returns how a network's features lie, by their shape and its attributes."""
  import torch

  if features.ndim == 4:
    last = getattr(model, 'num_features', None)
    sizes = (features.shape[1], features.shape[3])
    channels_last = getattr(model, 'output_fmt', 'NCHW') == 'NHWC'
    if last in sizes and sizes[0] != sizes[1]:
      channels_last = sizes[1] == last
    if channels_last:
      return _Layout(lambda x: x, lambda x: x)
    return _Layout(
      lambda x: x.permute(0, 2, 3, 1), lambda x: x.permute(0, 3, 1, 2)
    )
  if features.ndim == 3:
    num_tokens, width = features.shape[1:]
    num_prefix = getattr(model, 'num_prefix_tokens', 0)
    grid = _grid(model, num_tokens - num_prefix)

    def from_map(x):
      tokens = x.flatten(1, 2)
      # What stands before the patches must not matter; that is tried.
      prefix = tokens.new_zeros((tokens.shape[0], num_prefix, width))
      return torch.cat([prefix, tokens], dim=1) if num_prefix else tokens

    return _Layout(
      lambda x: x[:, num_prefix:].reshape(x.shape[0], *grid, width), from_map
    )
  return _Layout(lambda x: x[:, None, None, :], None)


def _grid(model, num_tokens) -> tuple[int, int]:
  """Returns (h, w) of the patches."""
  grid = getattr(getattr(model, 'patch_embed', None), 'grid_size', None)
  if grid is not None and math.prod(grid) == num_tokens:
    return tuple(grid)
  side = math.isqrt(num_tokens)
  return (side, side) if side**2 == num_tokens else (1, num_tokens)


def _heads(model):
  """Returns a network's heads, and whether each reads a token of its own."""
  heads = model.get_classifier()
  if not isinstance(heads, tuple | list):
    return [heads], False
  # A distilled LeViT averages two heads on one z, a DeiT on a token each.
  return list(heads), getattr(model, 'num_prefix_tokens', 0) == len(heads) == 2


def _linear(heads, z, logits, two_tokens):
  """Returns the kernel (D, K) and bias (K,) of heads that are averaged.

  Raises:
    config_utils.UserError: they are not linear, or not all of the network
      behind z.
  """
  import torch

  if all(isinstance(head, torch.nn.Identity) for head in heads):
    return None, None
  parts = z.chunk(len(heads), dim=1) if two_tokens else [z] * len(heads)
  kernels, biases = zip(
    *(_affine(head, part) for head, part in zip(heads, parts, strict=True)),
    strict=True,
  )
  if two_tokens:
    kernel = torch.cat(kernels) / len(heads)
  else:
    kernel = sum(kernels) / len(heads)
  bias = sum(biases) / len(heads)
  if logits.shape != (len(z), len(bias)) or not _close(
    z @ kernel + bias, logits
  ):
    raise config_utils.UserError(
      'its last layer is not linear: its classifier on its pooled features '
      'does not give its logits'
    )
  return kernel.numpy(), bias.numpy()


def _affine(head, z):
  """Returns the kernel and bias of a module that is linear."""
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

  try:
    bias = apply(torch.zeros_like(z[:1]))[0]
    kernel = apply(torch.eye(z.shape[1])) - bias
    is_linear = _close(z @ kernel + bias, apply(z))
  except Exception as error:
    raise config_utils.UserError(
      f'its last layer, a {type(head).__name__}, does not take its pooled '
      f'features: {config_utils.short(error)}'
    ) from error
  if not is_linear:
    raise config_utils.UserError(
      f'its last layer, a {type(head).__name__}, is not linear: a student '
      'cannot be given it as its head'
    )
  return kernel, bias


@dataclasses.dataclass
class _Call:
  """A module that ran: its name, itself, and copies of what came and went."""

  name: str
  module: Any
  given: Any
  result: Any


@contextlib.contextmanager
def _watched(model, calls: list[_Call]):
  """Notes the calls of the modules that hold no others, in their order."""
  import torch

  def note(name):
    def hook(module, given, result):
      tensors = [x for x in given if isinstance(x, torch.Tensor)]
      if tensors and isinstance(result, torch.Tensor):
        # What follows may work in place.
        calls.append(_Call(name, module, tensors[0].clone(), result.clone()))

    return hook

  hooks = [
    module.register_forward_hook(note(name))
    for name, module in model.named_modules()
    if not list(module.children())
  ]
  try:
    yield
  finally:
    for hook in hooks:
      hook.remove()


def _by_watching(model, probes, logits) -> Parts:
  """Splits a network by what its modules give while it runs."""
  import torch

  calls = []
  with _watched(model, calls):
    model(probes)
  linear = [
    number
    for number, call in enumerate(calls)
    if isinstance(call.module, torch.nn.Linear)
    and call.result.shape == logits.shape
    and torch.equal(call.result, logits)
  ]
  if not linear or not isinstance(logits, torch.Tensor) or logits.ndim != 2:
    last = f' ({calls[-1].name} is the last module that ran)' if calls else ''
    raise config_utils.UserError(
      'its last layer is not linear: its output is not that of a '
      f"torch.nn.Linear{last}. A module with timm's {', '.join(PROTOCOL)} "
      'can say where it is to be cut'
    )
  head = linear[-1]
  z = calls[head].given
  kernel, bias = _affine(calls[head].module, z)
  number, to_map, pool = _find_map(calls, head, z)

  def tap(images):
    seen = []
    with _watched(model, seen):
      model(images)
    return seen

  if number is None:
    # Nothing that is pooled was found; z stands for it, as a map of 1x1.
    final = z[:, None, None, :]
    return _parts(
      final,
      z,
      final=lambda images: tap(images)[head].given[:, None, None, :],
      pooled=lambda images: tap(images)[head].given,
      pool=None,
      head=(kernel.numpy(), bias.numpy()),
      how=f'the linear layer {calls[head].name}, and no map before it',
    )
  return _parts(
    to_map(calls[number].result),
    z,
    final=lambda images: to_map(tap(images)[number].result),
    pooled=lambda images: tap(images)[head].given,
    pool=pool,
    head=(kernel.numpy(), bias.numpy()),
    how=f'the linear layer {calls[head].name}, the map of {calls[number].name}',
  )


def _find_map(calls, head: int, z):
  """Returns the call whose result is pooled to z, how it lies, and the pool.

  The last map of more than one pixel is tried: its average, that of its ReLU,
  and what the modules after it make of it.
  """
  import torch

  maps = [
    number
    for number, call in enumerate(calls[:head])
    if call.result.ndim == 4 and max(call.result.shape[1:3]) > 1
  ]
  if not maps:
    return None, None, None
  number = maps[-1]
  layouts = (lambda x: x.permute(0, 2, 3, 1), lambda x: x)
  for layout in layouts:
    for activation in (lambda x: x, torch.relu):

      def to_map(x, layout=layout, activation=activation):
        return layout(activation(x))

      if _close(_average(to_map(calls[number].result)), z):
        return number, to_map, None

  def pool(map_):
    x = map_.permute(0, 3, 1, 2)
    for call in calls[number + 1 : head]:
      if isinstance(call.module, torch.nn.Linear):
        x = x.flatten(1)
      x = call.module(x)
    return x.flatten(1)

  to_map = layouts[0]
  with contextlib.suppress(Exception):
    if _close(pool(to_map(calls[number].result)), z):
      return number, to_map, pool
  return None, None, None


def _parts(map_, z, *, final, pooled, pool, head, how) -> Parts:
  """Returns the parts, once it is known what z follows from."""
  import torch

  average = _average(map_)
  # Where a pool bends its input, the network's own maps may not show it.
  wide = 3 * map_.std() * torch.randn(map_.shape, generator=_generator())
  is_average = pools_map = _close(average, z)
  takes = None
  if pool is not None:
    pools_map = False
    with contextlib.suppress(Exception):
      pools_map = _close(pool(map_), z)
      is_average = pools_map and _close(pool(wide), _average(wide))
  if pools_map and not is_average:
    of_map, takes = pool, tuple(map_.shape[1:])
    height, width, _ = takes

    def of_average(x):
      return of_map(x[:, None, None, :].expand(-1, height, width, -1))

    with contextlib.suppress(Exception):
      if _close(of_average(_average(wide)), of_map(wide)):
        pool, takes = of_average, takes[2:]
  return Parts(
    final=final,
    pooled=None if pools_map else pooled,
    pool=None if takes is None else pool,
    pool_takes=takes,
    pools_map=pools_map,
    kernel=head[0],
    bias=head[1],
    signed=bool((map_ < 0).any()),
    pooled_signed=bool((z < 0).any()),
    how=how,
  )


def _generator():
  import torch

  return torch.Generator().manual_seed(0)


def _average(map_):
  return map_.mean(dim=(1, 2))


def _close(x, y) -> bool:
  """Returns whether two tensors are the same but for rounding."""
  if x.shape != y.shape:
    return False
  return bool((x - y).abs().max() <= TOLERANCE * y.abs().max())
