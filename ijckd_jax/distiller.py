"""Student, connector, head, teacher and method, bound into pure functions."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from ijckd_jax import config_utils
from ijckd_jax import losses
from ijckd_jax import network as network_lib
from ijckd_jax import outputs
from ijckd_jax import parallel
from ijckd_jax import teachers


@dataclasses.dataclass(frozen=True)
class Distiller:
  """What a step needs to know, apart from arrays.

  Attributes:
    network: the student's parts.
    method: the objective, see methods.
    teacher: whom it learns from; None for a method that needs none.
    num_classes: K.
  """

  network: network_lib.Network
  method: Any
  teacher: teachers.Teacher | None
  num_classes: int

  @property
  def reuses_head(self) -> bool:
    """Whether the teacher's head makes the student's prediction."""
    return self.method.predicts_with == 'teacher'

  def init(
    self, key: jax.Array, image_shape: tuple[int, int, int]
  ) -> dict[str, Any]:
    """Returns fresh 'params' and 'batch_stats' of what is trained."""
    num_classes = None if self.reuses_head else self.num_classes
    return self.network.init(key, image_shape, num_classes)

  def student(self, variables, frozen, images: jax.Array):
    """Runs the student in training on the shared view.

    Args:
      variables: its 'params' and 'batch_stats'.
      frozen: the teacher's arrays (Teacher.frozen); None without a teacher.
      images: (B, H, W, C) uint8, or float32 of 0 to 255.

    Returns:
      outputs.Outputs and the updated batch statistics.
    """
    net = self.network
    features, backbone_stats = network_lib.run(
      net.backbone,
      network_lib.part(variables, 'backbone'),
      net.preprocessing(images),
      train=True,
    )
    batch_stats = {'backbone': backbone_stats}
    connected = None
    if net.connector is not None:
      connected, batch_stats['connector'] = net.connect(
        network_lib.part(variables, 'connector'),
        features,
        frozen['pool'],
        frozen['head'],
        train=True,
      )
    if self.reuses_head:
      logits = connected.logits
    else:
      head = variables['params']['head']
      logits = network_lib.classify(head, features.pooled)
    result = outputs.Outputs(
      features.stages, features.final, features.pooled, logits, connected
    )
    return result, batch_stats

  @property
  def deployed_network(self) -> network_lib.Network:
    """The network that predicts alone.

    A connector that only served training is not in it.
    """
    if self.reuses_head:
      return self.network
    return dataclasses.replace(
      self.network,
      connector=None,
      connect_size=None,
      pool=network_lib.pool_of(self.network.backbone),
      pool_signed=False,
    )

  def deployed(self, variables, frozen) -> dict[str, Any]:
    """Returns the variables of `deployed_network`.

    Args:
      variables: the student's 'params' and 'batch_stats'.
      frozen: the teacher's arrays, whose head and pool become the student's
        where its head is reused.
    """
    if self.reuses_head:
      return {
        'params': {**variables['params'], 'head': frozen['head']},
        'batch_stats': variables['batch_stats'],
        # A connector on pooled features stands behind the pool.
        'pool': frozen['pool'] if self.network.pools_map else {},
      }
    kept = {
      kind: {k: v for k, v in variables[kind].items() if k != 'connector'}
      for kind in network_lib.COLLECTIONS
    }
    return {**kept, 'pool': {}}


def bind(
  *,
  backbone,
  preprocessing,
  method,
  teacher: teachers.Teacher | None,
  image_shape: tuple[int, int, int],
  num_classes: int,
  axis_name: str | None,
  dtype,
  mixed: bool = False,
) -> Distiller:
  """Returns the Distiller of a pair, with the connector that the method wants.

  Args:
    backbone: the student's.
    preprocessing: the student's.
    method: the objective.
    teacher: required unless the method says `needs_teacher = False`.
    image_shape: (H, W, C) of the shared view.
    num_classes: K of the data set.
    axis_name: mapped axis over which batch norm is synchronised, or None.
    dtype: of the connector's computation.
    mixed: whether its batches hold losses.MixedLabels.

  Raises:
    config_utils.UserError: the pair does not fit; nothing has been compiled.
  """
  connector, connect_size = None, None
  pool, pool_signed = teachers.average_pool, False
  if teacher is not None:
    target = teacher.shapes(image_shape)
    images = jax.ShapeDtypeStruct((1, *image_shape), jnp.uint8)
    features = jax.eval_shape(
      lambda x: backbone.init_with_output(
        jax.random.key(0), preprocessing(x), train=False
      )[0],
      images,
    )
    source = outputs.Shapes(
      features.stages,
      features.final,
      features.pooled,
      backbone.signed,
      backbone.pools_map,
      backbone.pooled_signed,
    )
    connector = method.build_connector(source, target)
    pool, pool_signed = teacher.pool, teacher.pooled_signed
  if method.predicts_with == 'teacher' and connector is None:
    raise config_utils.UserError(
      f"{method} predicts with the teacher's head, but builds no connector to "
      "it: return one from build_connector, or say predicts_with = 'own'"
    )
  if connector is not None:
    connector = connector.clone(
      axis_name=axis_name,
      dtype=dtype,
      unbiased_variance=backbone.unbiased_variance,
    )
    if connector.takes == 'map':
      if not teacher.pools_map:
        raise config_utils.UserError(
          f'teacher {teacher.name} does not pool its map, so a student cannot '
          'be matched there, only on pooled features: take method ijckd with '
          "connector='mlp' and feature_site='pooled', srrl with "
          "connects='pooled', or kd"
        )
      sizes = zip(source.final.shape[1:3], target.final.shape[1:3], strict=True)
      connect_size = tuple(min(pair) for pair in sizes)
  network = network_lib.Network(
    backbone, preprocessing, connector, connect_size, pool, pool_signed
  )
  distiller = Distiller(network, method, teacher, num_classes)
  if not _trace_terms(distiller, image_shape):
    raise config_utils.UserError(
      f'there is nothing to learn: every weight of {method} is zero'
    )
  if mixed:
    try:
      _trace_terms(distiller, image_shape, mixed=True)
    except Exception as error:  # The method may be anyone's.
      raise config_utils.UserError(
        f'{method} does not take the labels of mixed images '
        f'({config_utils.short(error)}): let it read them by '
        'losses.cross_entropy or losses.single_labels, or set '
        'augment.mixup_alpha=0 and augment.cutmix_alpha=0'
      ) from error
  return distiller


def _trace_terms(distiller, image_shape, *, mixed=False):
  """Traces a loss and returns its terms' shapes.

  What does not fit is said now, not after its teacher has been trained.
  """

  def loss(frozen, images):
    teacher = None
    if distiller.teacher is not None:
      teacher = distiller.teacher(frozen, images)
    variables = distiller.init(jax.random.key(0), image_shape)
    student, _ = distiller.student(variables, frozen, images)
    rows = jnp.zeros(images.shape[0], jnp.int32)
    batch = {'image': images, 'label': rows, 'index': rows, 'epoch': rows}
    if mixed:
      weights = jnp.ones(rows.shape)
      batch['label'] = losses.MixedLabels(rows, rows, weights)
    return distiller.method.loss(student, teacher, batch)[1]

  return jax.eval_shape(
    jax.vmap(loss, in_axes=(None, 0), axis_name=parallel.AXIS),
    None if distiller.teacher is None else distiller.teacher.frozen,
    jax.ShapeDtypeStruct((1, 2, *image_shape), jnp.uint8),
  )
