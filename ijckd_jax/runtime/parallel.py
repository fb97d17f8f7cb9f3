"""How a per-device step is mapped over devices; nothing else knows.

A body takes per-device arguments, and its collectives go over AXIS. `pmap` is
the default; `shard_map` under `jit` is its twin.
"""

import collections
from collections.abc import Callable
from collections.abc import Iterable
from collections.abc import Iterator
from collections.abc import Sequence
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

AXIS = 'devices'
MAPPERS = ('pmap', 'shard_map')


def ahead(results: Iterable[Any], num: int = 2) -> Iterator[Any]:
  """Yields the same, with the `num` results that come next already asked for.

  What a transfer or a mapped body returns is there later than it is returned:
  so there is work under way while the first is waited for.
  """
  queue = collections.deque()
  for result in results:
    queue.append(result)
    if len(queue) > num:
      yield queue.popleft()
  yield from queue


def trace(body: Callable, *arguments: Any) -> tuple[Any, Any]:
  """Returns the jaxpr of a per-device body, and the shapes that it returns.

  Args:
    body: its collectives go over AXIS.
    *arguments: arrays of one device, or their shapes.
  """
  return jax.make_jaxpr(body, axis_env=[(AXIS, 1)], return_shape=True)(
    *arguments
  )


@dataclasses.dataclass(frozen=True)
class Mapper:
  """Places arrays on devices and maps bodies over them.

  Attributes:
    kind: 'pmap' or 'shard_map'.
    devices: for 'shard_map', of the mesh, such as those of a machine that is
      not there but compiled for; None: all that there are.
  """

  kind: str = 'pmap'
  devices: tuple[Any, ...] | None = None

  @property
  def mesh(self) -> jax.sharding.Mesh:
    """This process's devices under pmap, all devices under shard_map."""
    local = self.kind == 'pmap'
    devices = jax.local_devices() if local else self.devices or jax.devices()
    return jax.sharding.Mesh(np.array(devices), (AXIS,))

  @property
  def replicated(self) -> jax.sharding.NamedSharding:
    """The sharding of state: a whole copy on every device."""
    return jax.sharding.NamedSharding(self.mesh, jax.P())

  @property
  def cut(self) -> jax.sharding.NamedSharding:
    """The sharding of a batch under shard_map: its rows cut over devices."""
    return jax.sharding.NamedSharding(self.mesh, jax.P(AXIS))

  def replicate(self, tree: Any) -> Any:
    """Returns arrays as arrays on every device, in buffers of their own.

    An array that a step donates must not share its buffer with the caller's.
    Those that are on the devices of all hosts already are returned as they are.
    """
    if self.replicated.is_fully_addressable:
      return jax.device_put(tree, self.replicated, may_alias=False)
    return jax.tree.map(self._on_all_hosts, tree)

  def _on_all_hosts(self, x: Any) -> jax.Array:
    """Returns an array that every process has, as one over all devices."""
    if isinstance(x, jax.Array) and not x.is_fully_addressable:
      return x
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
      data = self._on_all_hosts(jax.random.key_data(x))
      return jax.random.wrap_key_data(data, impl=jax.random.key_impl(x))
    return jax.make_array_from_process_local_data(
      self.replicated, np.asarray(x)
    )

  def shard(self, batch: Any) -> Any:
    """Returns this process's rows of a batch, cut over the devices.

    It does not wait: the rows may still be on their way.
    """
    if self.kind == 'pmap':
      count = jax.local_device_count()
      batch = jax.tree.map(
        lambda x: x.reshape(count, x.shape[0] // count, *x.shape[1:]), batch
      )
    return jax.make_array_from_process_local_data(self.cut, batch)

  def map(
    self,
    body: Callable,
    *,
    rows_in: Sequence[bool],
    rows_out: bool = False,
    donate: int | None = None,
  ) -> Callable:
    """Returns `body` compiled and mapped.

    Args:
      body: per-device function of positional arguments. It returns replicated
        values, or with `rows_out` a pair (replicated values, rows).
      rows_in: for each argument, whether it is a batch, cut over the devices,
        or whole on each.
      rows_out: whether there is a second result, cut over the devices as the
        batch is.
      donate: an argument whose buffers the result may take over.
    """
    donated = () if donate is None else (donate,)
    if self.kind == 'pmap':
      whole, cut, call = None, 0, jax.pmap
    else:
      whole, cut, call = jax.P(), jax.P(AXIS), jax.jit
    arguments = tuple(cut if is_rows else whole for is_rows in rows_in)
    results = (whole, cut) if rows_out else whole
    if self.kind == 'pmap':
      return call(
        body,
        axis_name=AXIS,
        in_axes=arguments,
        out_axes=results,
        donate_argnums=donated,
      )
    # With the default check_vma=True a body that does its own pmean would
    # silently take a gradient that is too large by the number of devices.
    mapped = jax.shard_map(
      body,
      mesh=self.mesh,
      in_specs=arguments,
      out_specs=results,
      check_vma=False,
    )
    return call(mapped, donate_argnums=donated)

  def rows(self, tree: Any) -> Any:
    """Returns this process's rows of a mapped body's `rows_out` on the host."""
    if self.kind == 'pmap':
      return jax.tree.map(
        lambda x: np.asarray(x).reshape(-1, *x.shape[2:]), tree
      )
    return jax.tree.map(
      lambda x: np.concatenate(
        [np.asarray(shard.data) for shard in x.addressable_shards]
      ),
      tree,
    )
