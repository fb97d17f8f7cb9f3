"""Functions of arrays as files: exported by JAX, run wherever it runs.

A program is StableHLO in the envelope of jax.export. It computes, and can do
nothing else: one that calls out of itself is refused. But XLA, which reads it,
was not made for files of strangers: bytes that are wrong can end the process.
"""

import calendar
from collections.abc import Callable
from collections.abc import Mapping
from collections.abc import Sequence
import dataclasses
import datetime
import functools
import re
from typing import Any

import jax
from jax import export
import jax.numpy as jnp
import jaxlib.version

from ijckd_jax.models import losses
from ijckd_jax.runtime import config_utils

POOL = 'pool'  # The name of a pool's program.
# In a student with a connector, its backbone's own: POOL is the teacher's.
OWN_POOL = 'own_pool'
POOL_TRAINING = 'pool_training'
PROGRAM = 'program'  # The name of a pool that is one.
PLATFORMS = ('cpu', 'cuda', 'tpu')
# What jax.export itself puts into a program of free sizes, and XLA takes away.
KNOWN_CALLS = frozenset({'shape_assertion'})
CONVERT = 'convert it again: ijckd convert --again'
# A release of JAX reads the programs of each jaxlib that is at most so much
# older; from 0.11.1 on it refuses others.
# Source: https://docs.jax.dev/en/latest/export/export.html, "Compatibility
# guarantees".
PROMISED_MONTHS = 6
WARNED_MONTHS = 3  # Before the end.


# Days of the upload to PyPI, because no jaxlib says when it was built.
RELEASES = {
  '0.10.0': '2026-04-16',
  '0.10.1': '2026-05-20',
  '0.10.2': '2026-06-17',
  '0.11.0': '2026-07-16',
  '0.11.1': '2026-08-17',
  '0.11.2': '2026-09-17',
  '0.12.0': '2026-10-19',
  '0.12.0.1': '2026-10-21',
}


@dataclasses.dataclass(frozen=True)
class Made:
  """When a program was exported, and by what.

  Attributes:
    day: YYYY-MM-DD; '' where it is not known.
    jaxlib: its version; '' where it is not known.
  """

  day: str = ''
  jaxlib: str = ''

  @property
  def until(self) -> datetime.date:
    """The last day of the releases of JAX that promise to read it.

    They read programs of each jaxlib that is at most six months older. One that
    RELEASES lacks is taken to be as old as the program.
    """
    built = RELEASES.get(self.jaxlib, self.day)
    return _months_after(datetime.date.fromisoformat(built), PROMISED_MONTHS)


@dataclasses.dataclass(frozen=True)
class Program:
  """`(arrays by name, x (B, ...)) -> a tree of (B, ...)`, for any B.

  Running statistics, which a program of training gives, have no B.

  It runs under jit, pmap and shard_map. JAX has no batching rule for it: vmap
  refuses it.

  Attributes:
    data: the file's content.
    made: when it was exported, and by what.
  """

  data: bytes = dataclasses.field(repr=False)
  made: Made = dataclasses.field(default=Made(), compare=False)

  @functools.cached_property
  def _exported(self) -> export.Exported:
    return export.deserialize(bytearray(self.data))

  def __call__(self, arrays: Mapping[str, jax.Array], x: jax.Array) -> Any:
    """Returns what it computes."""
    return self._exported.call(dict(arrays), x)

  @property
  def takes(self) -> tuple[Any, ...]:
    """The shape of `x`; the batch's size, which is free, is its name."""
    _, x = self._avals()
    return (str(x.shape[0]), *x.shape[1:])

  @property
  def arrays(self) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes of the arrays by name."""
    shapes, _ = self._avals()
    return {
      name: jax.ShapeDtypeStruct(aval.shape, aval.dtype)
      for name, aval in shapes.items()
    }

  @property
  def gives(self) -> Any:
    """The dimensions that each result has beside the batch's."""
    exported = self._exported
    return jax.tree.unflatten(
      exported.out_tree, [aval.shape[1:] for aval in exported.out_avals]
    )

  @property
  def has_gradient(self) -> bool:
    """Whether it can be differentiated."""
    return self._exported.has_vjp()

  @property
  def platforms(self) -> tuple[str, ...]:
    """For which it was exported."""
    return tuple(self._exported.platforms)

  def _avals(self):
    """Returns the arguments: arrays by name, and x."""
    exported = self._exported
    arguments, keywords = jax.tree.unflatten(
      exported.in_tree, exported.in_avals
    )
    arrays, x = arguments
    if keywords or not isinstance(arrays, dict):
      raise ValueError('it is no function of arrays by name and of x')
    return arrays, x


@dataclasses.dataclass(frozen=True)
class Pool:
  """A pool that is a program, `(its variables, map) -> pooled`.

  Attributes:
    program: `(arrays, x) -> (B, D) float32`, where x is the map (B, H, W, C) in
      float32, or its average (B, C).
  """

  program: Program

  def __call__(self, variables, final: jax.Array) -> jax.Array:
    """Returns `pooled` (B, D) float32 of a map.

    Raises:
      config_utils.UserError: the pool takes maps of another size.
    """
    x, takes = losses.at_least_float32(final), self.program.takes
    if len(takes) == 2:
      x = jnp.mean(x, axis=(1, 2))
    elif takes[1:] != x.shape[1:]:
      raise config_utils.UserError(
        f"the teacher's pool takes maps of {_shape(takes[1:])}, but gets one "
        f'of {_shape(x.shape[1:])}: a student that is connected before it '
        "needs a map as large as the teacher's; or match pooled features "
        "(method ijckd with connector='mlp' and feature_site='pooled', srrl "
        "with connects='pooled')"
      )
    return self.program(variables.get('params', {}), x)

  @property
  def shapes(self) -> dict[str, Any]:
    """Shapes of its variables."""
    return {'params': self.program.arrays} if self.program.arrays else {}


def oldest(programs: Mapping[str, Program]) -> Made:
  """Returns when the program was made that is the first to expire."""
  made = [program.made for program in programs.values()]
  return min(made, key=lambda m: (bool(m.day), m.day and m.until))


def of_pool(pool: Any) -> dict[str, Program]:
  """Returns a pool's program by name, if it is one."""
  return {POOL: pool.program} if isinstance(pool, Pool) else {}


def trace(
  fn: Callable[[Mapping[str, jax.Array], jax.Array], Any],
  arrays: Mapping[str, jax.ShapeDtypeStruct],
  shape: Sequence[int],
  *,
  vjp_order: int = 0,
  out_axes: Any = 0,
) -> Program:
  """Returns a function of one example as a program for any number of them.

  Args:
    fn: `(arrays, x) -> a tree of arrays`, of an example without its batch.
    arrays: shapes of its arrays by name.
    shape: of the example, in float32.
    vjp_order: how often it can be differentiated.
    out_axes: of jax.vmap; None for a result that all examples share.
  """
  (batch,) = export.symbolic_shape('b')
  exported = export.export(
    jax.jit(jax.vmap(fn, in_axes=(None, 0), out_axes=out_axes)),
    platforms=PLATFORMS,
  )(dict(arrays), jax.ShapeDtypeStruct((batch, *shape), jnp.float32))
  data = bytes(exported.serialize(vjp_order=vjp_order))
  today = datetime.date.today().isoformat()
  return Program(data, Made(today, jaxlib.version.__version__))


def lifetime(
  made: Made, today: datetime.date | None = None
) -> tuple[str, bool]:
  """Returns a sentence on how long programs can be read.

  Args:
    made: when they were exported, and by what.
    today: None for the day it is.

  Returns:
    The sentence, and whether something should be done about it: not where the
    jaxlib that runs is the one that wrote them.
  """
  today = today or datetime.date.today()
  by = f'by jaxlib {made.jaxlib or "(unknown)"}'
  if not made.day:
    return (
      f'its programs were exported on an unknown day, {by}, and JAX promises '
      f'to read them for {PROMISED_MONTHS} months'
    ), True
  is_near = _months_after(today, WARNED_MONTHS) > made.until
  promises = 'promise' if today <= made.until else 'promised'
  return (
    f'its programs were exported on {made.day} {by}: releases of JAX until '
    f'{made.until} {promises} to read them'
  ), is_near and made.jaxlib != jaxlib.version.__version__


def _months_after(day: datetime.date, months: int) -> datetime.date:
  """Returns the same day of a later month, or the last one of that month."""
  years, month = divmod(day.month - 1 + months, 12)
  year, month = day.year + years, month + 1
  last = calendar.monthrange(year, month)[1]
  return datetime.date(year, month, min(day.day, last))


def load(data: bytes, what: str, made: Made | None = None) -> Program:
  """Returns a program.

  Args:
    data: the file's content, which must be trusted.
    what: the file, for the message.
    made: see Program; None where that is not known.

  Raises:
    config_utils.UserError: it is damaged, of another JAX, for other platforms,
      or calls out of itself.
  """
  program = Program(data, made or Made())
  try:
    exported = program._exported
    version, newest = (
      exported.calling_convention_version,
      export.maximum_supported_calling_convention_version,
    )
    if version > newest:
      raise ValueError(f'its calling convention is {version}, above {newest}')
    text = exported.mlir_module()
    program.takes, program.gives  # noqa: B018 (they raise where it is none)
  except Exception as error:  # Whatever a parser may raise.
    config_utils.raise_outside(error)
    raise config_utils.UserError(
      f'{what} cannot be read by jax {jax.__version__} '
      f'({config_utils.short(error)}): {CONVERT}, under the JAX that is to run '
      'it, or an older one'
    ) from error
  calls = set(re.findall(r'custom_call\s+@([^\s(]+)', text))
  calls |= set(re.findall(r'call_target_name\s*=\s*"([^"]*)"', text))
  if unknown := sorted(calls - KNOWN_CALLS):
    raise config_utils.UserError(
      f'{what} is not run: it calls {config_utils.short(unknown[0])}, which is '
      'outside of it'
    )
  platform = jax.default_backend()
  platform = {'gpu': 'cuda'}.get(platform, platform)
  if platform not in program.platforms:
    raise config_utils.UserError(
      f'{what} was converted for {", ".join(program.platforms)}, not for '
      f'{platform}: {CONVERT}'
    )
  return program


def _shape(sizes: Sequence[Any]) -> str:
  return 'x'.join(map(str, sizes))
