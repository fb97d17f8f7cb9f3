"""What a function costs: its multiply-adds, counted in what is traced.

XLA's cost_analysis counts otherwise than papers do: elementwise operations, and
no multiplications with padding.
"""

from collections.abc import Callable
import math
from typing import Any

import jax
from jax.interpreters import partial_eval

# Calls whose inside cannot be seen.
OPAQUE = ('call_exported', 'pure_callback', 'io_callback', 'custom_call')


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
  traced = jax.make_jaxpr(fn)(*shapes).jaxpr
  # A network that is given another head computes its own in vain.
  read, _ = partial_eval.dce_jaxpr(traced, [True] * len(traced.outvars))
  return _count(read)


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
