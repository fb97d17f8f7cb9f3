"""Which of a teacher's outputs are stored: those that the loss reads."""

from collections.abc import Mapping
import dataclasses
from typing import Any

import jax
from jax.interpreters import partial_eval
import jax.numpy as jnp

from ijckd_jax.runtime import config_utils
from ijckd_jax.runtime import parallel

DTYPES = {
  'float32': jnp.float32,
  'float16': jnp.float16,
  'bfloat16': jnp.bfloat16,
}


@dataclasses.dataclass(frozen=True)
class Stored:
  """The outputs that are stored, out of all.

  Attributes:
    like: what Distiller.run_teachers gives for two images, as
      ShapeDtypeStructs.
    names: which of its leaves are stored.
    dtype: in which they are.
  """

  like: Any
  names: tuple[str, ...]
  dtype: Any

  def take(self, teacher_outputs: Any) -> dict[str, jax.Array]:
    """Returns the rows to be stored, rounded."""
    # A plain cast there and back may be optimised away.
    info = jnp.finfo(self.dtype)
    return {
      name: jax.lax.reduce_precision(leaf, info.nexp, info.nmant).astype(
        self.dtype
      )
      for name, leaf in _leaves(teacher_outputs).items()
      if name in self.names
    }

  def restore(self, rows: Mapping[str, jax.Array]) -> Any:
    """Returns the Outputs of rows; what was not stored is zero."""
    num_rows = len(next(iter(rows.values())))
    leaves = [
      rows[name].astype(leaf.dtype)
      if name in rows
      else jnp.zeros((num_rows, *leaf.shape[1:]), leaf.dtype)
      for name, leaf in _leaves(self.like).items()
    ]
    return jax.tree.unflatten(jax.tree.structure(self.like), leaves)

  @property
  def shapes(self) -> dict[str, tuple[int, ...]]:
    """Shape of a row by name."""
    leaves = _leaves(self.like)
    return {name: tuple(leaves[name].shape[1:]) for name in self.names}


def _leaves(tree: tuple[Any, ...]) -> dict[str, Any]:
  """Returns the leaves of the teachers' outputs by name.

  Those of a single teacher are 'final', 'logits', 'stages/0', ...; of several,
  the teacher's number comes first: '0/final'.
  """
  if len(tree) == 1:
    (tree,) = tree
  return {
    jax.tree_util.keystr(path, simple=True, separator='/'): leaf
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
  }


def plan(distiller, image_shape: tuple[int, int, int], dtype: str) -> Stored:
  """Returns what a run stores: the outputs that its method's loss reads.

  Args:
    distiller: the pair and the method; its teacher's arrays may be shapes.
    image_shape: (H, W, C) of the shared view.
    dtype: one of DTYPES.

  Raises:
    config_utils.UserError: there is nothing to store.
  """
  if not distiller.links:
    raise _nothing_to_store(distiller)
  images = jax.ShapeDtypeStruct((2, *image_shape), jnp.uint8)
  frozen, like = distiller.example_teachers(images)

  def loss(teacher_outputs, frozen, images):
    variables = distiller.init(jax.random.key(0), image_shape)
    batch = distiller.example_batch(images)
    total, (terms, *_) = distiller.objective(
      variables, frozen, teacher_outputs, batch, jax.random.key(0)
    )
    return total, terms

  traced = parallel.trace(loss, like, frozen, images)[0].jaxpr
  _, read = partial_eval.dce_jaxpr(traced, [True] * len(traced.outvars))
  # The teacher's outputs are the first of the inputs.
  names = tuple(
    name for name, is_read in zip(_leaves(like), read, strict=False) if is_read
  )
  if not names:
    raise _nothing_to_store(distiller)
  return Stored(like, names, jnp.dtype(DTYPES[dtype]))


def _nothing_to_store(distiller) -> config_utils.UserError:
  return config_utils.UserError(
    f'{distiller.method} reads no outputs of a frozen teacher, so there is '
    'nothing to store: set teacher.store.views=0'
  )
