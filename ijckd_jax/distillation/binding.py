"""From backbones, a method and teachers to a Distiller, if they fit."""

from collections.abc import Sequence
import dataclasses

import jax
import jax.numpy as jnp

from ijckd_jax.data import mixing
from ijckd_jax.distillation import distiller as distiller_lib
from ijckd_jax.distillation import network as network_lib
from ijckd_jax.distillation import teachers
from ijckd_jax.models import outputs
from ijckd_jax.runtime import config_utils
from ijckd_jax.runtime import parallel


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
  others: Sequence[teachers.Teacher] = (),
  weights: Sequence[float] = (1.0,),
  seed: int = 0,
  num_rows: int = 2,
) -> distiller_lib.Distiller:
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
    mixed: whether its batches hold mixing.MixedLabels.
    others: further teachers.
    weights: see Distiller.
    seed: of the head, where it is random and not trained.
    num_rows: images in a batch that is traced; 1 where a device gets no more.

  Raises:
    config_utils.UserError: the pair does not fit; nothing has been compiled.
  """
  source = None
  if teacher is not None:
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
      features.before,
    )

  def connected(teacher):
    return _connect(
      teacher,
      source,
      network_lib.Network(
        backbone, preprocessing, None, None, teachers.average_pool
      ),
      method=method,
      image_shape=image_shape,
      axis_name=axis_name,
      dtype=dtype,
    )

  network = connected(teacher)
  if method.predicts_with not in outputs.HEADS:
    raise config_utils.unknown('head', method.predicts_with, outputs.HEADS)
  if method.predicts_with != 'own' and network.connector is None:
    raise config_utils.UserError(
      f'{method} predicts behind a connector, but builds none: return one from '
      "build_connector, or say predicts_with = 'own'"
    )
  auxiliary = None
  if teacher is not None:
    auxiliary = method.auxiliary(source, teacher.shapes(image_shape))
  if auxiliary is not None:
    if others:
      raise config_utils.UserError(
        f'{method} trains a module of its own beside the student, for one '
        'teacher: set teacher.others=()'
      )
    auxiliary = auxiliary.clone(
      axis_name=axis_name,
      dtype=dtype,
      unbiased_variance=backbone.unbiased_variance,
    )
  random_head = None
  if method.predicts_with == 'random':
    random_head = network_lib.random_head(
      seed, teacher.num_features, num_classes
    )
  distiller = distiller_lib.Distiller(
    network,
    method,
    teacher,
    num_classes,
    tuple(distiller_lib.Other(other, connected(other)) for other in others),
    tuple(weights),
    random_head,
    auxiliary,
  )
  if not _trace_terms(distiller, image_shape, num_rows):
    raise config_utils.UserError(
      f'there is nothing to learn: every weight of {method} is zero'
    )
  if mixed:
    try:
      _trace_terms(distiller, image_shape, num_rows, mixed=True)
    except Exception as error:  # The method may be anyone's.
      config_utils.raise_outside(error)
      raise config_utils.UserError(
        f'{method} does not take the labels of mixed images '
        f'({config_utils.short(error)}): let it read them by '
        'losses.cross_entropy or losses.single_labels, or set '
        'augment.mixup_alpha=0 and augment.cutmix_alpha=0'
      ) from error
  return distiller


def _connect(
  teacher, source, network, *, method, image_shape, axis_name, dtype
) -> network_lib.Network:
  """Returns a student's network connected to a teacher, as the method wants.

  Args:
    teacher: it, or None.
    source: outputs.Shapes of the student.
    network: the student's, without a connector.
    method: as `bind` takes it, like the others.
    image_shape: (H, W, C) of the shared view.
    axis_name: see `bind`.
    dtype: see `bind`.
  """
  if teacher is None:
    return network
  target = teacher.shapes(image_shape)
  connector, connect_size = method.build_connector(source, target), None
  if connector is not None:
    connector = connector.clone(
      axis_name=axis_name,
      dtype=dtype,
      unbiased_variance=network.backbone.unbiased_variance,
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
  return dataclasses.replace(
    network,
    connector=connector,
    connect_size=connect_size,
    pool=teacher.pool,
    pool_signed=teacher.pooled_signed,
  )


def _trace_terms(distiller, image_shape, num_rows, *, mixed=False):
  """Traces a loss and returns its terms' shapes.

  What does not fit is said now, not after its teacher has been trained.
  """

  def loss(frozen, teacher_outputs, images):
    variables = distiller.init(jax.random.key(0), image_shape)
    batch = distiller.example_batch(images)
    if mixed:
      labels, weights = batch['label'], jnp.ones(len(images))
      batch['label'] = mixing.MixedLabels(labels, labels, weights)
    return distiller.objective(variables, frozen, teacher_outputs, batch)[1][0]

  images = jax.ShapeDtypeStruct((num_rows, *image_shape), jnp.uint8)
  frozen, teacher_outputs = distiller.frozen, None
  if distiller.teacher is not None:
    teacher_outputs = jax.eval_shape(distiller.teach, frozen, images)
  return parallel.trace(loss, frozen, teacher_outputs, images)[1]
