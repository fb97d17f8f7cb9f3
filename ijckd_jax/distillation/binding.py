"""From a backbone, a method and teachers to a Distiller, if they fit."""

import bisect
from collections.abc import Sequence
import dataclasses

import jax
import jax.numpy as jnp

from ijckd_jax.data import mixing
from ijckd_jax.distillation import distiller as distiller_lib
from ijckd_jax.distillation import network as network_lib
from ijckd_jax.distillation import teachers
from ijckd_jax.distillation import unlabelled
from ijckd_jax.models import outputs
from ijckd_jax.runtime import config_utils
from ijckd_jax.runtime import parallel


def bind(
  *,
  backbone,
  preprocessing,
  method,
  given: Sequence[teachers.Teacher],
  image_shape: tuple[int, int, int],
  num_classes: int,
  axis_name: str | None,
  dtype,
  mixed: bool = False,
  weights: Sequence[float] | None = None,
  seed: int = 0,
  num_rows: int = 2,
  dropout: float = 0.0,
) -> distiller_lib.Distiller:
  """Returns the Distiller of a student and its teachers, linked by a method.

  Args:
    backbone: the student's.
    preprocessing: the student's.
    method: the objective.
    given: the teachers, that with the joint classifier first; their arrays may
      be shapes. Needed unless the method says `needs_teacher = False`.
    image_shape: (H, W, C) of the shared view.
    num_classes: K of the data set; 0 where its images have no classes.
    axis_name: mapped axis over which batch norm is synchronised, or None.
    dtype: of the connectors' computation.
    mixed: whether its batches hold mixing.MixedLabels.
    weights: of the teachers' losses; None: all alike.
    seed: of the head, where it is random and not trained.
    num_rows: images in a batch that is traced; 1 where a device gets no more.
    dropout: see Distiller.

  Raises:
    config_utils.UserError: the pair does not fit; nothing has been compiled.
  """
  if not num_classes:
    _check_unlabelled(
      backbone=backbone,
      preprocessing=preprocessing,
      method=method,
      given=given,
      image_shape=image_shape,
      axis_name=axis_name,
      dtype=dtype,
      num_rows=num_rows,
    )
  network = network_lib.plain(backbone, preprocessing)
  if not method.needs_teacher:
    given = weights = ()
  weights = weights or (1.0,) * len(given)
  source = _source(network, image_shape) if given else None
  runtime = {
    'axis_name': axis_name,
    'dtype': dtype,
    'unbiased_variance': backbone.unbiased_variance,
  }
  targets = [teacher.shapes(image_shape) for teacher in given]
  links = tuple(
    distiller_lib.Link(
      teacher,
      _connect(network, source, teacher, target, method, runtime),
      weight,
    )
    for teacher, target, weight in zip(given, targets, weights, strict=True)
  )
  if method.predicts_with not in outputs.HEADS:
    raise config_utils.unknown('head', method.predicts_with, outputs.HEADS)
  if method.predicts_with != 'own' and not (
    links and links[0].network.connector
  ):
    raise config_utils.UserError(
      f'{method} predicts behind a connector, but builds none: return one from '
      "build_connector, or say predicts_with = 'own'"
    )
  fixed_head = None
  if method.predicts_with == 'random':
    fixed_head = network_lib.random_head(
      seed, given[0].num_features, num_classes
    )
  elif method.predicts_with == 'own' and not num_classes:
    fixed_head = network_lib.empty_head(source.pooled.shape[-1])
  distiller = distiller_lib.Distiller(
    network,
    method,
    links,
    num_classes,
    fixed_head,
    _auxiliary(source, targets, method, runtime),
    dropout,
    _adapting(given, method, runtime),
  )
  _check_loss(distiller, image_shape, num_rows, mixed=mixed)
  return distiller


def num_connector_params(network, teacher, method, image_shape) -> int:
  """Returns the parameters of the connector that a method would build.

  Args:
    network: the student's, without a connector.
    teacher: the teacher that it would be connected to.
    method: builds a connector.
    image_shape: (H, W, C) of the shared view.
  """
  source, target = _source(network, image_shape), teacher.shapes(image_shape)
  connected = _connect(network, source, teacher, target, method, {})
  made = jax.eval_shape(
    lambda: connected.init_connector(jax.random.key(0), source)
  )
  return teachers.count(made['params'])


def smallest_factor(
  network, teacher, method_of, image_shape, num_classes, max_growth
) -> int:
  """Returns the factor of the largest connector that leaves a student small.

  The deployed student has at most `max_growth` times the parameters of the
  plain one, which has no connector and a head on its own features.

  Args:
    network: the student's, without a connector.
    teacher: the teacher that it is connected to, whose head it reuses.
    method_of: `factor -> method`, which builds the connector.
    image_shape: (H, W, C) of the shared view.
    num_classes: K.
    max_growth: above 1.

  Raises:
    config_utils.UserError: the narrowest connector is still too large.
  """
  shapes = jax.eval_shape(
    lambda: network.init(jax.random.key(0), image_shape, num_classes)
  )
  plain = teachers.count(shapes['params'])
  backbone = teachers.count(shapes['params']['backbone'])
  width = teacher.num_features

  def deployed(factor):
    method = method_of(factor)
    args = network, teacher, method, image_shape
    return backbone + num_connector_params(*args) + (width + 1) * num_classes

  limit = max_growth * plain
  # The number of parameters falls as the factor rises.
  factors = range(1, width + 1)
  found = bisect.bisect_left(factors, True, key=lambda f: deployed(f) <= limit)
  if found == len(factors):
    raise config_utils.UserError(
      f'method.factor=auto: behind the narrowest bottleneck to the '
      f'{width} channels of teacher {teacher.name} the student would have '
      f'{deployed(width):,} parameters, over {max_growth:g} times the '
      f'{plain:,} without a connector: raise student.max_growth, or take '
      "a method that predicts with the student's own head, such as srrl or kd"
    )
  return factors[found]


def _source(network, image_shape) -> outputs.Shapes:
  """Returns the shapes of a student's features for images (H, W, C)."""
  backbone = network.backbone
  features = jax.eval_shape(
    lambda x: backbone.init_with_output(
      jax.random.key(0), network.preprocessing(x), train=False
    )[0],
    jax.ShapeDtypeStruct((1, *image_shape), jnp.uint8),
  )
  return outputs.Shapes(
    features.stages,
    features.final,
    features.pooled,
    backbone.signed,
    backbone.pools_map,
    backbone.pooled_signed,
    features.before,
  )


def _connect(
  network, source, teacher, target, method, runtime
) -> network_lib.Network:
  """Returns a student's network connected to a teacher, as the method wants.

  Args:
    network: the student's, without a connector.
    source: outputs.Shapes of the student.
    teacher: whom it is connected to.
    target: outputs.Shapes of the teacher.
    method: see `bind`.
    runtime: fields of the connector that are the run's.
  """
  connector, connect_size = method.build_connector(source, target), None
  if connector is not None:
    connector = connector.clone(**runtime)
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


def _auxiliary(source, targets, method, runtime):
  """Returns the module that a method trains beside the student, or None.

  Args:
    source: outputs.Shapes of the student.
    targets: outputs.Shapes of each teacher.
    method: see `bind`.
    runtime: fields of the module that are the run's.
  """
  if not targets:
    return None
  auxiliary = method.auxiliary(source, targets[0])
  if auxiliary is None:
    return None
  if len(targets) > 1:
    raise config_utils.UserError(
      f'{method} trains a module of its own beside the student, for one '
      'teacher: set teacher.others=()'
    )
  return auxiliary.clone(**runtime)


def _adapting(given, method, runtime):
  """Returns the backbone of the teacher that a method trains, or None.

  Arguments are those of `bind`, and the backbone's fields that are the run's.
  """
  if not method.adapts_teacher:
    return None
  if len(given) > 1:
    raise config_utils.UserError(
      f'{method} trains the teacher too, and takes one: set teacher.others=()'
    )
  if method.predicts_with != 'copy':
    raise config_utils.UserError(
      f'{method} trains the teacher and its head, but another method chooses '
      'the head that predicts: take the one that trains the teacher as '
      'method.name, and add the other one to it'
    )
  network = given[0].apply
  is_network = isinstance(network, network_lib.Network)
  if not is_network or network.connector is not None:
    found = (
      'was distilled, and has a connector' if is_network else 'is a function'
    )
    raise config_utils.UserError(
      f'{method} trains the teacher too, which is possible for a bundle or a '
      f'run of a backbone with its head: teacher {given[0].name} {found}'
    )
  return network.backbone.clone(**runtime)


def _check_unlabelled(*, method, given, **more) -> None:
  """Raises UserError where a method cannot learn without classes.

  Arguments are those of `bind`.
  """
  unlabelled.check_head(method)
  num_classes = unlabelled.NUM_CLASSES
  given = [
    teacher.with_head(
      network_lib.head_shapes(teacher.num_features, num_classes)
    )
    for teacher in given
  ]
  distiller = bind(method=method, given=given, num_classes=num_classes, **more)
  unlabelled.check_reads_features_alone(
    distiller, more['image_shape'], more['num_rows']
  )


def _check_loss(distiller, image_shape, num_rows, *, mixed: bool) -> None:
  """Raises UserError where there is no loss, or none of MixedLabels."""
  if not _trace_terms(distiller, image_shape, num_rows):
    raise config_utils.UserError(
      f'there is nothing to learn: every weight of {distiller.method} is zero'
    )
  if not mixed:
    return
  try:
    _trace_terms(distiller, image_shape, num_rows, mixed=True)
  except Exception as error:  # The method may be anyone's.
    config_utils.raise_outside(error)
    raise config_utils.UserError(
      f'{distiller.method} does not take mixed or smoothed labels '
      f'({config_utils.short(error)}): let it read them by '
      'losses.cross_entropy or losses.single_labels, or set '
      'augment.mixup_alpha=0, augment.cutmix_alpha=0 and '
      'augment.label_smoothing=0'
    ) from error


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
    return distiller.objective(
      variables, frozen, teacher_outputs, batch, jax.random.key(0)
    )[1][0]

  images = jax.ShapeDtypeStruct((num_rows, *image_shape), jnp.uint8)
  frozen, teacher_outputs = distiller.example_teachers(images)
  return parallel.trace(loss, frozen, teacher_outputs, images)[1]
