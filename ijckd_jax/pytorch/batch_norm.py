"""PyTorch's batch norm in training, as a trace of one image can have it.

A network is traced on a batch of one image, and jax.vmap makes of it a function
of any batch. What batch norm needs of the whole batch are means over images:
they are the identity on one image, with a rule for vmap that averages over all.
"""

from collections.abc import Collection
from collections.abc import Iterator
from collections.abc import Mapping
import contextlib
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp

from ijckd_jax.runtime import config_utils

BUFFERS = ('running_mean', 'running_var')


@jax.custom_batching.custom_vmap
def _mean_of_images(x):
  """Returns the mean of `x` over images; it is called with that of one."""
  return x


@_mean_of_images.def_vmap
def _(size, is_batched, x):
  del size, is_batched
  return jnp.mean(x, axis=0), False


@jax.custom_batching.custom_vmap
def _num_images(x):
  """Returns how many images there are; `x` is a number of each."""
  del x
  return jnp.ones(())


@_num_images.def_vmap
def _(size, is_batched, x):
  del size, is_batched
  # An exported program has a symbolic batch size, which is no array.
  return jnp.sum(jnp.ones_like(x)), False


def modules(model) -> dict[str, Any]:
  """Returns a model's batch norms that follow the batch in training, by name.

  Args:
    model: torch.nn.Module, which is in inference mode before and after. A
      model's own `train` may keep some of its batch norms in inference.

  Raises:
    config_utils.UserError: a batch norm averages over all steps, by
      momentum=None, which is not done here.
  """
  import torch

  model.train()
  found = {
    name: module
    for name, module in model.named_modules()
    if isinstance(module, torch.nn.modules.batchnorm._BatchNorm)
    and module.training
  }
  model.eval()
  for name, module in found.items():
    if module.momentum is None:
      raise config_utils.UserError(
        f'{name} averages its statistics over all steps: give it a momentum'
      )
  return found


def among(norms: Mapping[str, Any], arrays: Collection[str]) -> dict[str, Any]:
  """Returns the batch norms whose running statistics are among the arrays.

  Args:
    norms: see `modules`.
    arrays: names.
  """
  return {
    name: norm
    for name, norm in norms.items()
    if f'{name}.{BUFFERS[0]}' in arrays
  }


class Statistics:
  """What the batch norms of one run in training found in their batch."""

  def __init__(self):
    self._found = {}

  def updated(self, arrays, momentum) -> dict[str, dict[str, jax.Array]]:
    """Returns the running statistics after the step.

    Args:
      arrays: the network's, by name, before the step.
      momentum: of the batch norms that are asked for, by their names.

    Returns:
      'mean', and by the 'biased' and by the 'unbiased' variance of the batch
      the new variance; of each, arrays by their names in the network.
    """
    made = {'mean': {}, 'biased': {}, 'unbiased': {}}
    for name in momentum.keys() & self._found.keys():
      mean, var, count = self._found[name]
      values = {
        'mean': ('running_mean', mean),
        'biased': ('running_var', var),
        'unbiased': ('running_var', var * (count / (count - 1))),
      }
      for kind, (buffer, value) in values.items():
        old = arrays[f'{name}.{buffer}']
        new = (1 - momentum[name]) * old + momentum[name] * value
        made[kind][f'{name}.{buffer}'] = new.astype(old.dtype)
    return made

  @contextlib.contextmanager
  def followed(self, norms) -> Iterator[None]:
    """Lets batch norms use the statistics of all images, and notes them.

    Args:
      norms: see `modules`.
    """
    import torch

    active, hooks = [], []
    original = torch.nn.functional.batch_norm

    def batch_norm(
      input,
      running_mean,
      running_var,
      weight=None,
      bias=None,
      training=False,
      momentum=0.1,
      eps=1e-5,
    ):
      # Others call it too: weights are standardised by it, for example.
      if not (training and active):
        return original(
          input,
          running_mean,
          running_var,
          weight,
          bias,
          training,
          momentum,
          eps,
        )
      return self._normalise(active[-1], input, weight, bias, eps)

    def enter(name):
      return lambda module, given: active.append(name)

    def leave(module, given, result):
      name = active.pop()
      # It is None where the module has raised an error.
      if result is not None and name not in self._found:
        raise config_utils.UserError(
          f'batch norm {name} (a {type(module).__name__}) does not run by '
          'torch.nn.functional.batch_norm'
        )

    with contextlib.ExitStack() as stack:
      for name, module in norms.items():
        hooks.append(module.register_forward_pre_hook(enter(name)))
        hooks.append(module.register_forward_hook(leave, always_call=True))
        stack.callback(setattr, module, 'training', module.training)
        module.training = True
      stack.enter_context(
        mock.patch.object(torch.nn.functional, 'batch_norm', batch_norm)
      )
      try:
        yield
      finally:
        for hook in hooks:
          hook.remove()

  def _normalise(self, name: str, x, weight, bias, epsilon: float):
    """Returns x (1, C, ...) of torchax, normalised by all images."""
    import torch
    from torchax import interop

    if name in self._found:
      raise config_utils.UserError(
        f'batch norm {name} is run twice in a step, and has two statistics'
      )
    axes = (0, *range(2, x.ndim))
    shape = (-1, *(1,) * (x.ndim - 2))
    exact = x.float() if x.dtype in (torch.bfloat16, torch.float16) else x
    mean = interop.call_jax(_mean_of_images, exact.mean(axes))
    centred = exact - mean.reshape(shape)
    var = interop.call_jax(_mean_of_images, (centred**2).mean(axes))
    num_images = _num_images(jnp.ravel(exact.jax())[0])
    count = num_images * (x.numel() // x.shape[1])
    self._found[name] = mean.jax(), var.jax(), count
    y = centred * torch.rsqrt(var + epsilon).reshape(shape)
    if weight is not None:
      y = y * weight.reshape(shape)
    if bias is not None:
      y = y + bias.reshape(shape)
    return y.to(x.dtype)
