"""A PyTorch classifier taken apart: its map, its pool and its linear head.

Nothing of it is guessed: every part is run on images, and what is put together
of the parts must give what the whole gives.
"""

from collections.abc import Callable
import dataclasses
import math
from typing import Any

from ijckd_jax.pytorch import classifier_parts
from ijckd_jax.pytorch import watching
from ijckd_jax.runtime import config_utils


def split(model, image_shape: tuple[int, int, int]) -> classifier_parts.Parts:
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
  shape = (classifier_parts.NUM_PROBES, channels, height, width)
  probes = torch.randn(shape, generator=classifier_parts.generator())
  with torch.no_grad(), classifier_parts.unchanged(model):
    with config_utils.blame(
      f'it does not run on images of {height}x{width} with {channels} channels'
    ):
      logits = model(probes)
    refusal = None
    if all(hasattr(model, name) for name in classifier_parts.PROTOCOL):
      features = model.forward_features(probes)
      if isinstance(features, torch.Tensor) and features.ndim in (2, 3, 4):
        try:
          return _by_protocol(model, features, logits)
        except config_utils.UserError as error:
          refusal = error
    try:
      return watching.split(model, probes, logits)
    except config_utils.UserError as error:
      raise (refusal or error) from error


def _by_protocol(model, features, logits) -> classifier_parts.Parts:
  """Splits a network that says itself where it can be cut, as timm's do."""
  import torch

  layout = _layout(model, features)
  heads, two_tokens = _heads(model)

  def pool(features):
    if two_tokens:
      return torch.cat([features[:, 0], features[:, 1]], dim=1)
    pooled = model.forward_head(features, pre_logits=True)
    return pooled.flatten(1)

  def run(images):
    features = model.forward_features(images)
    return layout.to_map(features), pool(features)

  z = pool(features)
  kernel, bias = _linear(heads, z, logits, two_tokens)
  pool_of_map = None
  if layout.from_map is not None and not two_tokens:

    def pool_of_map(map_):
      return pool(layout.from_map(map_))

  return classifier_parts.assemble(
    layout.to_map(features),
    z,
    features=run,
    pool=pool_of_map,
    head=(kernel, bias),
    head_name=_name(model, heads),
    how=', '.join(classifier_parts.PROTOCOL),
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


def _name(model, heads) -> str | None:
  """Returns the name of a head that is one linear layer; None of others."""
  import torch

  if len(heads) != 1 or not isinstance(heads[0], torch.nn.Linear):
    return None
  return next(name for name, x in model.named_modules() if x is heads[0])


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
    *(
      classifier_parts.affine(head, part)
      for head, part in zip(heads, parts, strict=True)
    ),
    strict=True,
  )
  if two_tokens:
    kernel = torch.cat(kernels) / len(heads)
  else:
    kernel = sum(kernels) / len(heads)
  bias = sum(biases) / len(heads)
  if logits.shape != (len(z), len(bias)) or not classifier_parts.close(
    z @ kernel + bias, logits
  ):
    raise config_utils.UserError(
      'its last layer is not linear: its classifier on its pooled features '
      'does not give its logits'
    )
  return kernel.numpy(), bias.numpy()
