"""A PyTorch classifier taken apart by watching its modules while it runs."""

import contextlib
import dataclasses
from typing import Any

from ijckd_jax.pytorch import classifier_parts
from ijckd_jax.runtime import config_utils


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


def split(model, probes, logits) -> classifier_parts.Parts:
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
    known = ', '.join(classifier_parts.PROTOCOL)
    raise config_utils.UserError(
      'its last layer is not linear: its output is not that of one '
      f"torch.nn.Linear{last}. A module with timm's {known} can say where it "
      'is to be cut'
    )
  head = linear[-1]
  z = calls[head].given
  kernel, bias = classifier_parts.affine(calls[head].module, z)
  number, to_map, pool = _find_map(calls, head, z)

  def tap(images):
    seen = []
    with _watched(model, seen):
      model(images)
    return seen

  def at_both(seen):
    return to_map(seen[number].result), seen[head].given

  if number is None:
    return classifier_parts.assemble(
      *_alone(z),
      features=lambda images: _alone(tap(images)[head].given),
      pool=None,
      head=(kernel.numpy(), bias.numpy()),
      head_name=calls[head].name,
      how=f'the linear layer {calls[head].name}, and no map before it',
    )
  return classifier_parts.assemble(
    to_map(calls[number].result),
    z,
    features=lambda images: at_both(tap(images)),
    pool=pool,
    head=(kernel.numpy(), bias.numpy()),
    head_name=calls[head].name,
    how=f'the linear layer {calls[head].name}, the map of {calls[number].name}',
  )


def _alone(z):
  """Returns z as a map of 1x1, for where nothing is pooled, and z."""
  return z[:, None, None, :], z


def _find_map(calls, head: int, z):
  """Returns the call whose result is pooled to z, how it lies, and the pool.

  The last map of more than one pixel is tried: its average, that of its ReLU,
  and what the modules after it make of it.
  """
  import torch

  maps = [
    number
    for number, call in enumerate(calls[:head])
    if call.result.ndim == 4 and _has_pixels(call.result.shape)
  ]
  if not maps:
    return None, None, None
  number = maps[-1]
  layouts = (lambda x: x.permute(0, 2, 3, 1), lambda x: x)
  for layout in layouts:
    for activation in (lambda x: x, torch.relu):

      def to_map(x, layout=layout, activation=activation):
        return layout(activation(x))

      if classifier_parts.close(
        classifier_parts.average(to_map(calls[number].result)), z
      ):
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
    if classifier_parts.close(pool(to_map(calls[number].result)), z):
      return number, to_map, pool
  return None, None, None


def _has_pixels(shape) -> bool:
  """Returns whether a map has several pixels, in either order of its axes."""
  return max(shape[1:3]) > 1 and max(shape[2:]) > 1
