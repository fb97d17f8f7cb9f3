"""A deployable classifier: backbone, connector, pool and head."""

from collections.abc import Callable
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ijckd_jax import models
from ijckd_jax.data import augment
from ijckd_jax.distillation import connectors
from ijckd_jax.models import losses
from ijckd_jax.models import outputs
from ijckd_jax.models import programs as programs_lib

COLLECTIONS = ('params', 'batch_stats')


def classify(head: dict[str, jax.Array], pooled: jax.Array) -> jax.Array:
  """Returns the logits (B, K) float32 of a linear head on (B, D)."""
  # The default precision of a TPU's product is bfloat16's.
  return (
    jnp.dot(
      losses.at_least_float32(pooled), head['kernel'], precision='highest'
    )
    + head['bias']
  )


def drop_features(pooled: jax.Array, rate: float, key: jax.Array) -> jax.Array:
  """Returns (B, D) with a share `rate` of its numbers dropped at random.

  The others are scaled up, so that the mean stays as it is.

  Source: Srivastava et al. 2014, "Dropout".
  """
  kept = 1 - rate
  return pooled * jax.random.bernoulli(key, kept, pooled.shape) / kept


def head_shapes(width: int, num_classes: int) -> dict[str, Any]:
  """Returns the shapes of a linear head's arrays."""
  return {
    'kernel': jax.ShapeDtypeStruct((width, num_classes), jnp.float32),
    'bias': jax.ShapeDtypeStruct((num_classes,), jnp.float32),
  }


def random_head(
  seed: int, width: int, num_classes: int
) -> dict[str, np.ndarray]:
  """Returns a linear head uniform in +-1/sqrt(D), as PyTorch's layer starts."""
  random, bound = np.random.RandomState(seed), 1 / np.sqrt(width)
  return {
    name: random.uniform(-bound, bound, shape.shape).astype(np.float32)
    for name, shape in head_shapes(width, num_classes).items()
  }


def empty_head(width: int) -> dict[str, np.ndarray]:
  """Returns the head of a network that names no class: (D, 0) and (0,)."""
  return {
    name: np.zeros(shape.shape, np.float32)
    for name, shape in head_shapes(width, 0).items()
  }


def run(module, variables, *x, train: bool, key: jax.Array | None = None):
  """Applies a backbone, connector or auxiliary module.

  Args:
    module: called as `module(*x, train=train)`.
    variables: its 'params' and 'batch_stats'.
    *x: its input.
    train: whether batch norm uses, and updates, the batch's statistics.
    key: of Flax's stream 'dropout' in training; None for a module that draws
      nothing.

  Returns:
    What the module returns, and its batch statistics (updated in training).
  """
  if not train:
    return module.apply(variables, *x, train=False), variables['batch_stats']
  result, changed = module.apply(
    variables,
    *x,
    train=True,
    mutable=['batch_stats'],
    rngs={} if key is None else {'dropout': key},
  )
  return result, changed.get('batch_stats', {})


def init(module, key: jax.Array, *x):
  """Returns what a module returns in inference, and its fresh collections."""
  result, variables = module.init_with_output(key, *x, train=False)
  return result, {kind: variables.get(kind, {}) for kind in COLLECTIONS}


def pool_of(backbone: models.Backbone):
  """Returns a backbone's pool as `(variables of the pool, map) -> pooled`."""
  program = backbone.programs.get(programs_lib.OWN_POOL)
  if program is not None and not backbone.truncated:
    return programs_lib.Pool(program)
  return lambda variables, final: backbone.apply(
    variables, final, method='pool'
  )


def part(variables, name: str):
  """Returns one part's collections out of a network's variables."""
  return {kind: variables[kind].get(name, {}) for kind in COLLECTIONS}


@dataclasses.dataclass(frozen=True)
class Network:
  """How a classifier's parts are joined; its arrays are kept apart.

  Variables are `{'params': {'backbone', 'connector', 'head'}, 'batch_stats':
  {'backbone', 'connector'}, 'pool'}`; without a connector there is none.

  Attributes:
    backbone: from images to a map and a representation.
    preprocessing: from uint8 images to the backbone's input.
    connector: from the backbone's features to the head's, or None.
    connect_size: (h, w) to which the map is averaged before the connector.
    pool: `(variables of the pool, map) -> pooled`; of the teacher's backbone
      where there is a connector.
    pool_signed: whether the teacher's `pooled` can be negative; only asked for
      where there is a connector.
  """

  backbone: models.Backbone
  preprocessing: augment.Preprocessing
  connector: connectors.Connector | None
  connect_size: tuple[int, int] | None
  pool: Callable[[Any, jax.Array], jax.Array]
  pool_signed: bool = False

  def init(
    self,
    key: jax.Array,
    image_shape: tuple[int, int, int],
    num_classes: int | None,
    width: int | None = None,
  ) -> dict[str, Any]:
    """Returns fresh 'params' and 'batch_stats' of what is trained.

    Args:
      key: random key.
      image_shape: (H, W, C) of the uint8 images.
      num_classes: K of a head that is trained; None: none is.
      width: of what that head reads; None: of the backbone's own features.
    """
    backbone_key, connector_key, head_key = jax.random.split(key, 3)
    x = self.preprocessing(jnp.zeros((1, *image_shape), jnp.uint8))
    features, parts = init(self.backbone, backbone_key, x)
    self.backbone.check_tap(features.stages)
    modules = {'backbone': parts}
    if self.connector is not None:
      modules['connector'] = self.init_connector(connector_key, features)
    params = {name: part['params'] for name, part in modules.items()}
    if num_classes is not None:
      params['head'] = self.backbone.init_head(
        head_key, width or features.pooled.shape[-1], num_classes
      )
    return {
      'params': params,
      'batch_stats': {
        name: part['batch_stats'] for name, part in modules.items()
      },
    }

  def init_connector(self, key: jax.Array, features) -> dict[str, Any]:
    """Returns a connector's fresh 'params' and 'batch_stats'.

    Args:
      key: random key.
      features: outputs.Features of the backbone, or their shapes.
    """
    x = jnp.zeros(self.connector_shape(features))
    return init(self.connector, key, x)[1]

  def connector_shape(self, features) -> tuple[int, int, int, int]:
    """Returns the shape of what a connector takes of one image.

    Args:
      features: outputs.Features of the backbone, or their shapes.
    """
    if self.connector.takes == 'pooled':
      return (1, 1, 1, features.pooled.shape[-1])
    return (1, *self.connect_size, features.final.shape[-1])

  def connect(self, variables, features, pool_variables, head, *, train):
    """Returns outputs.Connected and the connector's batch statistics."""
    if self.connector.takes == 'pooled':
      x = features.pooled[:, None, None, :]
    else:
      x = losses.adaptive_average_pool(features.final, self.connect_size)
    x, batch_stats = run(self.connector, variables, x, train=train)
    if self.connector.takes == 'pooled':
      x, pooled = None, losses.at_least_float32(x[:, 0, 0, :])
    else:
      pooled = self.pool(pool_variables, x)
    logits = classify(head, pooled)
    return outputs.Connected(x, pooled, logits), batch_stats

  def __call__(self, variables, images: jax.Array) -> outputs.Outputs:
    """Returns the Outputs of preprocessed images, in inference.

    Of a network with a connector, `final` and `pooled` are those after it: what
    its head reads.
    """
    head = variables['params']['head']
    features, _ = run(
      self.backbone, part(variables, 'backbone'), images, train=False
    )
    if self.connector is None:
      logits = classify(head, features.pooled)
      return outputs.Outputs(
        features.stages,
        features.final,
        features.pooled,
        logits,
        before=features.before,
      )
    connected, _ = self.connect(
      part(variables, 'connector'),
      features,
      variables['pool'],
      head,
      train=False,
    )
    final = features.final if connected.map is None else connected.map
    return outputs.Outputs(
      features.stages,
      final,
      connected.pooled,
      connected.logits,
      before=features.before,
    )

  @property
  def dtype(self) -> Any:
    """Of the computation."""
    return self.backbone.dtype

  @property
  def programs(self) -> dict[str, programs_lib.Program]:
    """The programs that it runs, by name."""
    found = dict(self.backbone.programs)
    if self.connector is None:  # Its pool is the backbone's.
      found.pop(programs_lib.OWN_POOL, None)
    return {**found, **programs_lib.of_pool(self.pool)}

  @property
  def signed(self) -> bool:
    """Whether `final` can be negative."""
    if self.connector is None:
      return self.backbone.signed
    return self.connector.signed

  @property
  def pooled_signed(self) -> bool:
    """Whether `pooled` can be negative."""
    if self.connector is None:
      return self.backbone.pooled_signed
    if self.connector.takes == 'pooled':
      return self.connector.signed
    return self.connector.signed or self.pool_signed

  @property
  def pools_map(self) -> bool:
    """Whether `pooled` is a function of `final`."""
    if self.connector is None:
      return self.backbone.pools_map
    return self.connector.takes == 'map'


def plain(backbone, preprocessing) -> Network:
  """Returns the classifier of a backbone with a head on its own features."""
  return Network(backbone, preprocessing, None, None, pool_of(backbone))
