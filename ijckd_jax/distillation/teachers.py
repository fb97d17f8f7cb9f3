"""Teachers: frozen classifiers with a linear head, whoever wrote them."""

from collections.abc import Callable
from collections.abc import Mapping
from collections.abc import Sequence
import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ijckd_jax.data import augment
from ijckd_jax.data import classes
from ijckd_jax.distillation import network
from ijckd_jax.models import losses
from ijckd_jax.models import outputs
from ijckd_jax.runtime import config_utils


def count(tree: Any) -> int:
  """Returns the number of elements in a tree of arrays or their shapes."""
  return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


def average_pool(variables: Any, final: jax.Array) -> jax.Array:
  """Returns the global average of a map; it has no variables."""
  del variables
  return jnp.mean(losses.at_least_float32(final), axis=(1, 2))


@dataclasses.dataclass(frozen=True)
class Teacher:
  """A pure function with a linear head, and what a student must know of it.

  Attributes:
    apply: `(variables, images) -> outputs.Outputs` in inference mode, on images
      that `preprocessing` made. Its logits are ignored: the head's on
      `pooled` are taken.
    variables: its arrays, a pytree; `head` and `pool_variables` apart.
    head: 'kernel' (D, K) and 'bias' (K,); K is 0 where it has none.
    preprocessing: from the shared view to its input.
    name: what reports call it.
    pool: `(pool_variables, map) -> pooled`.
    pool_name: 'average', the name of the backbone whose pool it is, or
      'program': by it, a student's bundle finds the pool again.
    pool_variables: arrays of the pool.
    signed: whether its `final` can be negative.
    pools_map: whether `pooled` is `pool(final)`.
    pooled_signed: whether its `pooled` can be negative; None: as `signed`.
    num_params: by 'backbone', 'connector' and 'head'; empty: all `variables`
      are counted as the backbone's.
    origin: where its weights come from (file or repository, hash, licence),
      JSON; None where they were trained here.
    class_names: K names; () where they are not known.
  """

  apply: Callable[[Any, jax.Array], outputs.Outputs]
  variables: Any
  head: dict[str, jax.Array]
  preprocessing: augment.Preprocessing
  name: str = 'teacher'
  pool: Callable[[Any, jax.Array], jax.Array] = average_pool
  pool_name: str = 'average'
  pool_variables: Any = dataclasses.field(default_factory=dict)
  signed: bool = True
  pools_map: bool = True
  pooled_signed: bool | None = None
  num_params: dict[str, int] = dataclasses.field(default_factory=dict)
  origin: dict[str, str] | None = None
  class_names: tuple[str, ...] = ()

  def __post_init__(self) -> None:
    if self.pool is not average_pool and self.pool_name == 'average':
      raise config_utils.UserError(
        f'teacher {self.name}: its pool is not teachers.average_pool, so its '
        "students' bundles would be loaded with another one: give as pool_name "
        'the backbone whose pool it is (its name, or package.module:Name)'
      )
    if self.pooled_signed is None:
      object.__setattr__(self, 'pooled_signed', self.signed)
    if not self.num_params:
      counts = {'backbone': count(self.variables), 'connector': 0}
      counts['head'] = count(self.head)
      object.__setattr__(self, 'num_params', counts)

  @property
  def num_classes(self) -> int:
    """K, of the head."""
    return self.head['bias'].shape[0]

  @property
  def num_features(self) -> int:
    """D, of the head."""
    return self.head['kernel'].shape[0]

  def with_head(self, head: dict[str, Any]) -> 'Teacher':
    """Returns it with another head on the same features."""
    counts = {**self.num_params, 'head': count(head)}
    return dataclasses.replace(self, head=head, num_params=counts)

  def without_head(self) -> 'Teacher':
    """Returns it with an empty head, for images that have no classes."""
    head = network.empty_head(self.num_features)
    return dataclasses.replace(self.with_head(head), class_names=())

  def in_order(
    self, order: np.ndarray, class_names: Sequence[str]
  ) -> 'Teacher':
    """Returns it with its classes in another order, see classes.reorder."""
    return dataclasses.replace(
      self,
      head=classes.reorder(self.head, order),
      class_names=tuple(class_names),
    )

  @property
  def arrays(self) -> dict[str, Any]:
    """All its arrays, as a step takes them."""
    return {
      'network': self.variables,
      'head': self.head,
      'pool': self.pool_variables,
    }

  def __call__(
    self, arrays: Mapping[str, Any], images: jax.Array
  ) -> outputs.Outputs:
    """Returns the Outputs of the view (B, H, W, C), of 0 to 255.

    Args:
      arrays: `self.arrays`, or others of the same shapes.
      images: of the shared view.

    Raises:
      config_utils.UserError: the head is not as wide as the features.
    """
    result = self.apply(arrays['network'], self.preprocessing(images))
    width = result.pooled.shape[-1]
    if arrays['head']['kernel'].shape[0] != width:
      raise config_utils.UserError(
        f'teacher {self.name}: its head is {arrays["head"]["kernel"].shape}, '
        f'but its pooled features are {width} wide'
      )
    logits = network.classify(arrays['head'], result.pooled)
    result = dataclasses.replace(result, logits=logits)
    return jax.lax.stop_gradient(result)

  def shapes(self, image_shape: tuple[int, int, int]) -> outputs.Shapes:
    """Returns the shapes of its outputs for images (H, W, C), unrun."""
    images = jax.ShapeDtypeStruct((1, *image_shape), jnp.uint8)
    # Not `self`: JAX would write out all of its arrays, for messages.
    result = jax.eval_shape(
      lambda arrays, images: self(arrays, images), self.arrays, images
    )
    return outputs.Shapes(
      result.stages,
      result.final,
      result.pooled,
      self.signed,
      self.pools_map,
      self.pooled_signed,
      result.before,
    )
