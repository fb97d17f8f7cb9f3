"""Cost of a function: multiply-adds, bytes of its arrays, time of a call.

XLA's cost_analysis counts otherwise than papers do: elementwise operations, and
no multiplications with padding.
"""

from collections.abc import Callable
import math
import statistics
import time
from typing import Any

import jax
from jax.interpreters import partial_eval
import jax.numpy as jnp

# Calls whose inside cannot be seen.
OPAQUE = ('call_exported', 'pure_callback', 'io_callback', 'custom_call')
# Seconds for which calls are timed, and how many calls there are at least.
SECONDS, MIN_CALLS = 0.2, 3


def of_network(
  fn: Callable[..., Any],
  arrays: Any,
  image_shape: tuple[int, int, int],
  batch_size: int,
) -> dict[str, Any]:
  """Returns what a network costs when it predicts, as JSON.

  Args:
    fn: `(arrays, images) -> outputs`.
    arrays: of the network.
    image_shape: (H, W, C) of its uint8 images.
    batch_size: of the batch that is timed beside a single image.

  Returns:
    'multiply_adds' of one image, as `multiply_adds` counts them; 'weight_bytes'
    of the arrays that are read; 'milliseconds' of a compiled call on this
    machine's first device, a median, by batch size.
  """
  device = jax.local_devices()[0]
  call, arrays = jax.jit(fn), jax.device_put(arrays, device)
  batches = {
    size: jax.device_put(jnp.zeros((size, *image_shape), jnp.uint8), device)
    for size in sorted({1, batch_size})
  }
  jaxpr, used = _read(call.trace(arrays, batches[1]).jaxpr.jaxpr)
  leaves = jax.tree.leaves(arrays)
  return {
    'multiply_adds': _count(jaxpr),
    'weight_bytes': sum(
      leaf.nbytes
      for leaf, is_used in zip(leaves, used[: len(leaves)], strict=True)
      if is_used
    ),
    'milliseconds': {
      str(size): 1e3 * _seconds(lambda x=batch: call(arrays, x))
      for size, batch in batches.items()
    },
  }


def _seconds(call: Callable[[], Any]) -> float:
  """Returns the median of a call's seconds, after one that may compile."""
  jax.block_until_ready(call())
  taken = []
  while len(taken) < MIN_CALLS or sum(taken) < SECONDS:
    start = time.perf_counter()
    jax.block_until_ready(call())
    taken.append(time.perf_counter() - start)
  return statistics.median(taken)


def multiply_adds(fn: Callable[..., Any], *shapes: Any) -> int | None:
  """Returns the multiply-adds of convolutions and products in a function.

  They are counted as papers count them: of a convolution, one for each element
  of its output, of its window and of its input channels, padding included.
  Elementwise operations, pools and norms are not counted.

  Args:
    fn: a function of arrays.
    *shapes: of its arguments.

  Returns:
    The number; None where a part of the function is a program or a callback,
    or a loop whose length is not known.
  """
  jaxpr, _ = _read(jax.make_jaxpr(fn)(*shapes).jaxpr)
  return _count(jaxpr)


def _read(jaxpr):
  """Returns what its results depend on, and which arguments are read."""
  # A network that is given another head computes its own in vain.
  return partial_eval.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))


def _count(jaxpr) -> int | None:
  total = 0
  for equation in jaxpr.eqns:
    found = _of(equation)
    if found is None:
      return None
    total += found
  return total


def _of(equation) -> int | None:
  """Returns the multiply-adds of an equation; None where they are not known."""
  name, params = equation.primitive.name, equation.params
  if name == 'conv_general_dilated':
    kernel = equation.invars[1].aval.shape
    outputs = kernel[params['dimension_numbers'].rhs_spec[0]]
    size = math.prod(equation.outvars[0].aval.shape)
    return size * math.prod(kernel) // outputs
  if name == 'dot_general':
    (contracted, _), _ = params['dimension_numbers']
    shape = equation.invars[0].aval.shape
    size = math.prod(equation.outvars[0].aval.shape)
    return size * math.prod(shape[i] for i in contracted)
  inner = [_count(x) for x in _jaxprs(params)]
  if name in OPAQUE or None in inner:
    return None
  if name == 'cond':  # All branches are of one function, by platform.
    return max(inner)
  if name == 'while':
    return None if any(inner) else 0
  return sum(inner) * params.get('length', 1)  # Of a scan.


def _jaxprs(params):
  """Yields the jaxprs among an equation's parameters."""
  for value in params.values():
    for x in value if isinstance(value, tuple | list) else (value,):
      x = getattr(x, 'jaxpr', x)
      if hasattr(x, 'eqns'):
        yield x
