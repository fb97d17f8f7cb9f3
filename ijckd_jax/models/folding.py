"""Batch norm folded into the convolutions before it, for inference.

There a batch norm is y = (x - mean) s + b in each channel, with s = scale /
sqrt(var + epsilon). Behind a convolution x = k * u + c that is the convolution
(k s) * u + (c - mean) s + b. It is folded where nothing else reads x: the batch
norm's arrays are gone then, and the convolution has a bias.
"""

import collections
from typing import Any

from flax import traverse_util
import flax.linen as nn
import jax
from jax.ad_checkpoint import checkpoint_name
import numpy as np


def fold(module: nn.Module, variables, x: jax.ShapeDtypeStruct) -> Any:
  """Returns a module's variables with the batch norms folded that can be.

  They are for a module that runs inside of `runs_folded`.

  Args:
    module: called as `module(x, train=False)`.
    variables: its 'params' and 'batch_stats', on the host.
    x: shape of its input.
  """
  params, stats = (
    traverse_util.flatten_dict(variables[kind])
    for kind in ('params', 'batch_stats')
  )
  for conv, norm, epsilon in _pairs(module, variables, x):
    mean, var = (np.float64(stats.pop((*norm, k))) for k in ('mean', 'var'))
    scale = params.pop((*norm, 'scale'), 1.0) / np.sqrt(var + epsilon)
    shift = params.pop((*norm, 'bias'), 0.0) - mean * scale
    kernel, bias = (*conv, 'kernel'), (*conv, 'bias')
    params[bias] = np.float32(params.get(bias, 0.0) * scale + shift)
    params[kernel] = np.float32(params[kernel] * scale)
  return {
    'params': traverse_util.unflatten_dict(params),
    'batch_stats': traverse_util.unflatten_dict(stats),
  }


def runs_folded():
  """Returns a context in which Linen's modules take folded variables."""
  return nn.intercept_methods(_run)


def _run(next_fun, args, kwargs, context):
  module = context.module
  if context.method_name != '__call__':
    return next_fun(*args, **kwargs)
  if isinstance(module, nn.BatchNorm):
    if module.has_variable('batch_stats', 'mean'):
      return next_fun(*args, **kwargs)
    x, pool, *_ = (*args, *kwargs.values(), None)
    return pool(x) if callable(pool) else x
  y = next_fun(*args, **kwargs)
  if isinstance(module, nn.Conv) and not module.use_bias:
    if module.has_variable('params', 'bias'):
      y += module.get_variable('params', 'bias').astype(y.dtype)
  return y


def _pairs(module, variables, x):
  """Yields (path, path, epsilon) of a convolution and its batch norm.

  What convolutions make and what batch norms read is marked while the module
  is traced; a pair is one whose marks follow one another and nothing else.
  """
  paths, epsilons, active = {}, {}, set()

  def mark(next_fun, args, kwargs, context):
    module = context.module
    name = '/'.join((type(module).__name__, *module.path))
    # A subclass's method calls that of its base, for the same module.
    if context.method_name != '__call__' or name in active:
      return next_fun(*args, **kwargs)
    active.add(name)
    if isinstance(module, nn.BatchNorm) and module.axis == -1:
      paths[name], epsilons[name] = module.path, module.epsilon
      args = (checkpoint_name(args[0], name), *args[1:])
    y = next_fun(*args, **kwargs)
    if isinstance(module, nn.Conv):
      paths[name] = module.path
      y = checkpoint_name(y, name)
    active.remove(name)
    return y

  def apply(variables, x):
    with nn.intercept_methods(mark):
      return module.apply(variables, x, train=False)

  jaxpr = jax.make_jaxpr(apply)(variables, x).jaxpr
  readers = collections.defaultdict(list)
  for equation in jaxpr.eqns:
    for var in equation.invars:
      readers[id(var)].append(_name(equation))
  for var in jaxpr.outvars:
    readers[id(var)].append('')
  marks = collections.Counter(map(_name, jaxpr.eqns))
  for equation in jaxpr.eqns:
    conv = _name(equation)
    if conv not in paths or conv in epsilons:
      continue
    norm, *others = readers[id(equation.outvars[0])]
    if norm in epsilons and not others and marks[conv] == marks[norm] == 1:
      yield paths[conv], paths[norm], epsilons[norm]


def _name(equation) -> str:
  """Returns what an equation is marked with; '' for one that is no mark."""
  is_mark = equation.primitive.name == 'name'
  return equation.params['name'] if is_mark else ''
