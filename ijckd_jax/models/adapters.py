"""Backbones from outside of Linen: pure functions, and modules of Flax NNX.

Not imported with the package, because NNX takes a moment to import.
"""

from typing import Any

from flax import nnx
from flax import traverse_util
import flax.linen as nn
import jax
import jax.numpy as jnp

from ijckd_jax.models import backbone
from ijckd_jax.models import outputs
from ijckd_jax.runtime import config_utils

NET = 'net'  # The one entry of 'params', and of 'batch_stats'.


class FunctionBackbone(backbone.Backbone):
  """A backbone that is a pair of pure functions, which a subclass gives.

  `pooled` is the average of the last map. What the config says of a backbone is
  in its fields, for `init_fn` and `apply_fn` to follow: `dtype` (the maps must
  have it), `axis_name`, `freeze_statistics`, `unbiased_variance` and, where the
  network can end at an earlier stage, `num_stages`.
  """

  signed = True  # False: the last map is never negative, as after a ReLU.

  @property
  def momentum(self) -> float:
    """Zero, because it is not known: no run is called too short for it."""
    return 0.0

  def init_fn(self, key: jax.Array, images: jax.Array) -> tuple[Any, Any]:
    """Returns the fresh parameters and the fresh state.

    Both are pytrees of arrays. The parameters are trained. The state, such as
    running statistics, is what `apply_fn` returned last; () where there is
    none. With several devices, the state is averaged over them.

    Args:
      key: random key.
      images: normalised, (1, H, W, C) float32; only their shape is known.
    """
    raise NotImplementedError

  def apply_fn(
    self,
    params: Any,
    state: Any,
    images: jax.Array,
    *,
    train: bool,
    key: jax.Array | None,
  ) -> tuple[Any, Any]:
    """Returns the map, or a tuple with the map of each stage, and the state.

    Args:
      params: as `init_fn` gives them, trained.
      state: as `init_fn` gives it, or as the last step of training left it.
      images: normalised, (B, H, W, C) float32.
      train: whether the step is one of training; in inference the state that
        is returned is not kept.
      key: for what is dropped at random in training; None: nothing is.

    Returns:
      Maps (B, H, W, C), the last of which is pooled, and the new state.
    """
    raise NotImplementedError

  @nn.compact
  def __call__(self, images: jax.Array, *, train: bool) -> outputs.Features:
    """Returns Features.

    Raises:
      config_utils.UserError: a function gives something else than it should.
    """
    if self.is_initializing():
      made = self.init_fn(self.make_rng('params'), images)
      params, state = self._pair('init_fn', made)
      self._check_arrays('parameter', params, (jnp.floating,))
      self._check_arrays('state', state, (jnp.number, jnp.bool_))
      self.param(NET, lambda key: _to_names(params))
      if jax.tree.leaves(state):
        self.put_variable('batch_stats', NET, _to_names(state))
    one = jax.ShapeDtypeStruct((1, *images.shape[1:]), images.dtype)
    like = jax.eval_shape(self.init_fn, jax.random.key(0), one)
    params, old = (
      _from_names(self.get_variable(kind, NET), tree)
      for kind, tree in zip(('params', 'batch_stats'), like, strict=True)
    )
    draws = train and self.has_rng('dropout')
    key = self.make_rng('dropout') if draws else None
    made = self.apply_fn(params, old, images, train=train, key=key)
    maps, state = self._pair('apply_fn', made)
    if train and _described(state) != _described(old):
      raise config_utils.UserError(
        f'apply_fn of {type(self).__name__} gives in training the state '
        f'{_described(state)}: it must be as that of init_fn, {_described(old)}'
      )
    if train and jax.tree.leaves(state):
      self.put_variable('batch_stats', NET, _to_names(state))
    stages = tuple(maps) if isinstance(maps, tuple | list) else (maps,)
    self._check_maps(stages, images)
    return outputs.Features(stages, stages[-1], self.pool(stages[-1]))

  def _pair(self, name, made):
    """Returns what a function gave, if it is a pair."""
    if not isinstance(made, tuple) or len(made) != 2:
      raise config_utils.UserError(
        f'{name} of {type(self).__name__} gives a {type(made).__name__}: it '
        'must give a pair, whose second part is the state, () where there is '
        'none'
      )
    return made

  def _check_arrays(self, kind, tree, allowed):
    """Raises UserError where a leaf is not an array of the allowed dtypes."""
    for path, x in _by_path(tree).items():
      dtype = getattr(x, 'dtype', None)
      if dtype is None or not any(jnp.issubdtype(dtype, d) for d in allowed):
        found = type(x).__name__ if dtype is None else f'{dtype} array'
        raise config_utils.UserError(
          f'init_fn of {type(self).__name__} gives the {kind} '
          f'{".".join(path[1:])}, a {found}: parameters must be floating-point '
          'arrays, and the state arrays of numbers'
        )

  def _check_maps(self, stages, images):
    """Raises UserError unless these are maps of the images, in `dtype`."""
    name, dtype = type(self).__name__, jnp.dtype(self.dtype)
    for x in stages:
      # An exported file has a symbol for the number of images.
      shape = getattr(x, 'shape', None)
      if shape is None or len(shape) != 4 or shape[0] != images.shape[0]:
        found = type(x).__name__ if shape is None else f'shape {list(shape)}'
        raise config_utils.UserError(
          f'{name} gives {found} for images {list(images.shape)}: it must give '
          'the last map, (B, H, W, C), or a tuple with the map of each stage; '
          'the average and the head that follow are not its own'
        )
      if x.dtype != dtype:
        raise config_utils.UserError(
          f'{name} gives a map of {x.dtype}, but the run computes in {dtype}: '
          'let the network compute in self.dtype, or set dtype'
        )


class NnxBackbone(FunctionBackbone):
  """A backbone that is a module of Flax NNX, which a subclass makes.

  The module's `__call__(images)` gives the map, or a tuple with the map of each
  stage. Its nnx.Param are trained, and its nnx.BatchStat are the state. Layers
  that name no `dtype` have the run's, and batch norms that name no `axis_name`
  as well. Dropout and batch norm are switched as by `train()` and `eval()`.
  """

  def network(self, rngs: nnx.Rngs) -> nnx.Module:
    """Returns a fresh module."""
    raise NotImplementedError

  @property
  def momentum(self) -> float:
    """The largest momentum of the batch norms; 0 where there are none."""
    layers = nnx.iter_modules(self._abstract())
    norms = (x for _, x in layers if isinstance(x, nnx.BatchNorm))
    return max((norm.momentum for norm in norms), default=0.0)

  def init_fn(self, key: jax.Array, images: jax.Array) -> tuple[Any, Any]:
    del images  # Layers of NNX are told their sizes.
    net = self._fresh(key)
    _check_kept(net)
    params, state = nnx.state(net, nnx.Param, nnx.BatchStat)
    return nnx.to_pure_dict(params), nnx.to_pure_dict(state)

  def apply_fn(
    self,
    params: Any,
    state: Any,
    images: jax.Array,
    *,
    train: bool,
    key: jax.Array | None,
  ) -> tuple[Any, Any]:
    # In training, the random streams of the module start from the key.
    net = self._abstract() if key is None else self._fresh(key)
    nnx.update(net, params)
    nnx.update(net, state)
    net.set_attributes(
      deterministic=key is None,
      use_running_average=not self.follows(train),
      raise_if_not_found=False,
    )
    maps = net(images)
    return maps, nnx.to_pure_dict(nnx.state(net, nnx.BatchStat))

  def _abstract(self):
    """Returns the module with shapes in place of arrays."""
    return nnx.eval_shape(lambda: self._fresh(jax.random.key(0)))

  def _fresh(self, key):
    """Returns a fresh module that follows the config."""
    net = self.network(nnx.Rngs(key))
    if not isinstance(net, nnx.Module):
      raise config_utils.UserError(
        f'network of {type(self).__name__} gives a {type(net).__name__}, which '
        'is not an nnx.Module'
      )
    for _, layer in nnx.iter_modules(net):
      if hasattr(layer, 'dtype') and layer.dtype is None:
        layer.dtype = self.dtype
      if isinstance(layer, nnx.BatchNorm):
        layer.axis_name = layer.axis_name or self.axis_name
        if self.unbiased_variance:
          raise config_utils.UserError(
            'the batch norm of NNX keeps the biased variance: set '
            'unbiased_variance=False'
          )
    return net


def _check_kept(net: nnx.Module) -> None:
  """Raises UserError where a module keeps arrays that a run would lose."""
  kinds = nnx.Any(nnx.Param, nnx.BatchStat, nnx.RngState)
  lost = {path for path, _ in nnx.to_flat_state(nnx.state(net, nnx.Not(kinds)))}
  # NNX takes a plain array for a constant while JAX traces.
  lost |= {
    (*path, name)
    for path, layer in nnx.iter_modules(net)
    for name, value in vars(layer).items()
    if isinstance(value, jax.Array)
  }
  if lost:
    names = sorted('.'.join(map(str, path)) for path in lost)
    raise config_utils.UserError(
      f'{type(net).__name__} keeps {", ".join(names)} outside of nnx.Param '
      '(trained) and nnx.BatchStat (state): make it one of them, or compute it '
      'in __call__'
    )


def _by_path(tree) -> dict[tuple[str, ...], Any]:
  """Returns the leaves of a pytree by names that a bundle can write."""
  return {
    tuple(
      jax.tree_util.keystr((part,), simple=True).replace('/', '.')
      for part in path
    ): leaf
    for path, leaf in jax.tree_util.tree_leaves_with_path({NET: tree})
  }


def _described(tree) -> dict[str, str]:
  """Returns what the leaves of a pytree are, by name."""
  return {
    '.'.join(path[1:]): f'{getattr(x, "dtype", "no array")}{list(jnp.shape(x))}'
    for path, x in _by_path(tree).items()
  }


def _to_names(tree) -> Any:
  """Returns a pytree as nested dicts of floating-point arrays; {} if empty.

  Counters and flags become float32, because a state is averaged over devices.
  """
  named = {
    path: x if jnp.issubdtype(x.dtype, jnp.floating) else x.astype(jnp.float32)
    for path, x in _by_path(tree).items()
  }
  return traverse_util.unflatten_dict(named).get(NET, {})


def _from_names(named, like) -> Any:
  """Returns what `_to_names` had, in the structure and dtypes of `like`."""
  found = traverse_util.flatten_dict({NET: named})

  def restored(x, dtype):
    if not jnp.issubdtype(dtype, jnp.floating):
      x = jnp.round(x)
    return x.astype(dtype)

  leaves = [
    restored(found[path], x.dtype) for path, x in _by_path(like).items()
  ]
  return jax.tree.unflatten(jax.tree.structure(like), leaves)
