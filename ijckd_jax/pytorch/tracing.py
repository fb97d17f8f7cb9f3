"""PyTorch functions as programs: traced by torchax, exported by JAX.

torchax traces one image, as a batch of one, because a network's Python may ask
how large its batch is. jax.vmap makes of the trace a function of any batch, and
jax.export writes that with a free batch size. The network's real arrays are
arguments of the program, so that they can be trained.
"""

from collections.abc import Callable
from collections.abc import Collection
from collections.abc import Mapping
from collections.abc import Sequence
import contextlib
import dataclasses
from typing import Any
from unittest import mock

import jax
from jax.interpreters import partial_eval
import jax.numpy as jnp
import numpy as np

from ijckd_jax.models import programs as programs_lib
from ijckd_jax.pytorch import batch_norm
from ijckd_jax.pytorch import classifier_parts
from ijckd_jax.runtime import config_utils

INSTALL = "pip install 'ijckd_jax[convert]'"
PREFIX = 'model.'  # Of the names of arrays, where the model is part of another.


@dataclasses.dataclass(frozen=True)
class Traced:
  """A function of one image, or of one map, and the arrays that it reads.

  Attributes:
    arrays: by the name that they have in the network, those of real numbers.
    trainable: which of them are parameters; the others are buffers.
    fn: `(arrays, x) -> a tree of arrays`, of an example without its batch.
    model: of which it runs parts.
    running: names of the running statistics that it updates. Then `fn` returns
      the tree, and what batch_norm.Statistics.updated does.
  """

  arrays: dict[str, np.ndarray]
  trainable: frozenset[str]
  fn: Callable[[Any, jax.Array], Any]
  model: Any
  running: frozenset[str] = frozenset()

  @property
  def shapes(self) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes of the arrays by name."""
    return {
      name: jax.ShapeDtypeStruct(array.shape, array.dtype)
      for name, array in self.arrays.items()
    }

  def export(
    self, shape: Sequence[int], *, dtype=jnp.float32, vjp_order: int = 0
  ) -> programs_lib.Program:
    """Returns the program of it, which computes in `dtype`.

    Args:
      shape: of the example, see programs_lib.trace.
      dtype: to which the arrays and the example are cast.
      vjp_order: how often it can be differentiated.

    Raises:
      config_utils.UserError: it cannot be traced in that dtype.
    """

    def fn(arrays, x):
      arrays = {
        name: array if name in self.running else array.astype(dtype)
        for name, array in arrays.items()
      }
      return self.fn(arrays, x.astype(dtype))

    with _refusing(self.model):
      return programs_lib.trace(
        fn,
        self.shapes,
        shape,
        vjp_order=vjp_order,
        out_axes=(0, None) if self.running else 0,
      )


def trace(
  model,
  fn: Callable[[Any], Any],
  shape: Sequence[int],
  *,
  norms: Mapping[str, Any] | None = None,
  known: Collection[str] = (),
) -> Traced:
  """Returns a torch function of a model as one of JAX.

  Args:
    model: torch.nn.Module in inference mode, which `fn` runs parts of.
    fn: of a batch, torch tensors in and a tree of them out.
    shape: of an example, to trace it by.
    norms: batch norms that are in training; see batch_norm.modules.
    known: names of the arrays that inference reads, among them those whose
      statistics are followed.

  Raises:
    config_utils.UserError: torchax cannot trace it; the operator or the module
      is named.
  """
  torch, torchax = _libraries()

  class Part(torch.nn.Module):
    """The model, with `fn` as its forward."""

    def __init__(self):
      super().__init__()
      self.model = model

    def forward(self, x):
      return fn(x)

  arrays, call = torchax.extract_jax(Part(), dedup_parameters=False)

  momentum = {
    name: norm.momentum
    for name, norm in batch_norm.among(norms or {}, known).items()
  }

  def of_one(arrays, x):
    found = batch_norm.Statistics()
    with contextlib.ExitStack() as stack:
      stack.enter_context(classifier_parts.unchanged(model))
      stack.enter_context(_linear_by_position(torch))
      if norms:
        stack.enter_context(found.followed(norms))
      # By batches of one: a network's Python may ask how large a batch is.
      result = jax.tree.map(lambda y: y[0], call(arrays, (x[None],)))
    if not norms:
      return result
    own = {name.removeprefix(PREFIX): array for name, array in arrays.items()}
    return result, found.updated(own, momentum)

  example = jax.ShapeDtypeStruct(tuple(shape), jnp.float32)
  with _refusing(model):
    read = _names_read(of_one, arrays, example)
  # Whole numbers, such as the positions in a table, are part of the program.
  whole = {
    name
    for name, array in arrays.items()
    if not jnp.issubdtype(array.dtype, jnp.floating)
  }
  own = read - whole
  if norms and (foreign := sorted(own - {f'{PREFIX}{name}' for name in known})):
    raise config_utils.UserError(
      f'in training it reads {config_utils.short(foreign[0])}, which it does '
      'not in inference'
    )

  def of_own(own_arrays, x):
    # What the result does not depend on is run with it, in the same dtype.
    made = {name: arrays[name] for name in whole}
    for name in arrays.keys() - own - whole:
      made[name] = jnp.zeros(arrays[name].shape, x.dtype)
    for name, array in own_arrays.items():
      made[f'{PREFIX}{name}'] = array
    return of_one(made, x)

  def short(names):
    return {name.removeprefix(PREFIX): name for name in sorted(names)}

  parameters = {f'{PREFIX}{name}' for name, _ in model.named_parameters()}
  return Traced(
    arrays={name: np.asarray(arrays[k]) for name, k in short(own).items()},
    trainable=frozenset(short(own & parameters)),
    fn=of_own,
    model=model,
    running=frozenset(
      f'{name}.{kind}' for name in momentum for kind in batch_norm.BUFFERS
    ),
  )


def _names_read(fn, arrays, example) -> set[str]:
  """Returns the names of the arrays that the result of a function depends on.

  What a network goes on to compute behind it, such as its logits, reads others
  in vain.
  """
  jaxpr = jax.make_jaxpr(fn)(arrays, example).jaxpr
  _, is_read = partial_eval.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))
  flat, _ = jax.tree.flatten_with_path(arrays)
  *of_arrays, _ = is_read  # The last one is the example.
  return {
    path[0].key for (path, _), read in zip(flat, of_arrays, strict=True) if read
  }


def _libraries():
  """Returns torch and torchax."""
  try:
    import flatbuffers  # noqa: F401 (jax.export writes by it)
    import torch
    import torchax
  except ImportError as error:
    raise config_utils.UserError(
      f'converting takes PyTorch, torchax and flatbuffers ({error}): {INSTALL}'
    ) from error
  return torch, torchax


def _linear_by_position(torch):
  """Returns a context in which torchax sees no names of linear's arguments.

  It has others for them than PyTorch.
  """
  linear = torch.nn.functional.linear

  def by_position(input, weight, bias=None):
    return linear(input, weight, bias)

  return mock.patch.object(torch.nn.functional, 'linear', by_position)


@contextlib.contextmanager
def _refusing(model):
  """Says of what goes wrong in tracing a model in which module it does."""
  running = []

  def enter(name):
    def hook(module, given):
      del given
      running.append(f'{name or "the model"} ({type(module).__name__})')

    return hook

  def leave(module, given, result):
    del module, given, result
    running.pop()

  hooks = []
  for name, module in model.named_modules():
    hooks.append(module.register_forward_pre_hook(enter(name)))
    hooks.append(module.register_forward_hook(leave))
  try:
    yield
  except Exception as error:  # Of torch, of torchax, of JAX, of the model.
    config_utils.raise_outside(error)
    if isinstance(error, config_utils.UserError):
      raise
    raise _untraceable(error, running) from error
  finally:
    for hook in hooks:
      hook.remove()


def _untraceable(error, running) -> config_utils.UserError:
  """Returns what the user is told of a network that cannot be traced."""
  where = f' in {running[-1]}' if running else ''
  kind = type(error).__name__
  if isinstance(error, jax.errors.ConcretizationTypeError):
    return config_utils.UserError(
      f'what is run{where} depends on the numbers in a tensor (an if, a loop '
      f'or an int() of it), which cannot be traced ({kind}): let the model do '
      'the same for all images'
    )
  operator = _operator(error)
  if operator:
    return config_utils.UserError(
      f'the operator {operator}{where} cannot be traced by torchax ({kind}: '
      f'{config_utils.short(error)}): replace it in the model'
    )
  return config_utils.UserError(
    f'the network cannot be traced{where}: {kind}: {config_utils.short(error)}'
  )


def _operator(error) -> str:
  """Returns the operator of PyTorch that raised an error; '' if none did."""
  import torch

  found, step = '', error.__traceback__
  while step is not None:
    for name in ('self', 'func'):
      value = step.tb_frame.f_locals.get(name)
      if isinstance(value, torch._ops.OpOverload | torch._ops.OpOverloadPacket):
        found = str(value)
    step = step.tb_next
  return found
