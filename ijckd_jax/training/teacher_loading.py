"""The teachers that a config names: loaded, ordered and checked."""

from collections.abc import Sequence
import math

import jax
import ml_collections

from ijckd_jax.bundles import bundles
from ijckd_jax.data import classes
from ijckd_jax.distillation import network as network_lib
from ijckd_jax.distillation import teachers
from ijckd_jax.pytorch import hub
from ijckd_jax.pytorch import importer
from ijckd_jax.runtime import config_utils


def load(
  section: ml_collections.ConfigDict, dtype
) -> tuple[teachers.Teacher, ...]:
  """Returns the teachers that `config.teacher` points at, as they stand there.

  Args:
    section: `config.teacher`.
    dtype: of the computation.

  Raises:
    config_utils.UserError: there is none, or the first has another backbone.
  """
  paths = (section.checkpoint, *section.others)
  # A config is code already: what it names, it trusts.
  loaded = []
  for path in paths:
    if path.startswith(hub.PREFIX):
      bundle, _ = importer.read(path, importer.Request(dtype=dtype))
    else:
      bundle = bundles.load(
        path,
        dtype=dtype,
        trust_code=section.backbone,
        trust_programs=True,
      )
    loaded.append(bundle)
  name = loaded[0].backbone_name
  if section.backbone not in ('', name):
    raise config_utils.UserError(
      f'the teacher in {paths[0]} is a {name}, but the config says '
      f'teacher.backbone={section.backbone}: set '
      f'--config.teacher.backbone={name} to take it'
    )
  return tuple(bundle.teacher() for bundle in loaded)


def order(
  given: Sequence[teachers.Teacher], section: ml_collections.ConfigDict
) -> tuple[tuple[teachers.Teacher, ...], tuple[float, ...]]:
  """Returns the teachers, that with the joint classifier first, and weights.

  Args:
    given: as they are listed.
    section: `config.teacher`.

  Raises:
    config_utils.UserError: there are other weights than teachers, or no such
      teacher.
  """
  weights = tuple(section.weights) or (1.0,) * len(given)
  if len(weights) != len(given):
    raise config_utils.UserError(
      f'teacher.weights has {len(weights)} numbers, for {len(given)} teachers: '
      'give one for each, or none'
    )
  fits = all(math.isfinite(weight) and weight >= 0 for weight in weights)
  if not fits or (given and not sum(weights)):
    raise config_utils.UserError(
      f'teacher.weights={weights}: none may be negative or infinite, and not '
      'all zero'
    )
  if not given:
    return (), ()
  if not 0 <= section.joint < len(given):
    raise config_utils.UserError(
      f'teacher.joint={section.joint}: there are {len(given)} teachers, '
      'counted from 0'
    )
  order = sorted(range(len(given)), key=lambda i: i != section.joint)
  return tuple(given[i] for i in order), tuple(weights[i] for i in order)


def abstract(
  network: network_lib.Network,
  name: str,
  image_shape: tuple[int, int, int],
  class_names: Sequence[str],
) -> teachers.Teacher:
  """Returns a teacher that is yet to be trained, with shapes for arrays.

  Args:
    network: the teacher's, which has no connector.
    name: of its backbone.
    image_shape: (H, W, C) of the images.
    class_names: K names.
  """
  variables = jax.eval_shape(
    lambda: network.init(jax.random.key(0), image_shape, len(class_names))
  )
  return bundles.Bundle(
    network=network,
    variables={**variables, 'pool': {}},
    backbone_name=name,
    pool_name=network.backbone.pool_name(name),
    image_shape=image_shape,
    class_names=tuple(class_names),
    info={},
  ).teacher()


def check_same_shapes(
  given: Sequence[teachers.Teacher], wanted: Sequence[teachers.Teacher]
) -> None:
  """Raises UserError where a teacher is not of the shapes that are wanted."""
  for teacher, other in zip(given, wanted, strict=True):
    shapes = (
      jax.tree.map(lambda x: (x.shape, str(x.dtype)), one.arrays)
      for one in (teacher, other)
    )
    if next(shapes) != next(shapes):
      raise config_utils.UserError(
        f'teacher {teacher.name} has arrays of other shapes than the config '
        'describes: remove its run (teacher/ in the workdir) or its fitted '
        'head (heads/), and it is made again'
      )


def in_class_order(
  given: Sequence[teachers.Teacher], dataset, *, by_number: bool
) -> tuple[tuple[teachers.Teacher, ...], tuple[str, ...]]:
  """Returns teachers whose class i is the data set's, and what is to be said.

  Args:
    given: checked.
    dataset: see datasets.
    by_number: `config.teacher.classes_by_number`.

  Raises:
    config_utils.UserError: a teacher's classes are others.
  """
  of, wanted = 'the data set', tuple(dataset.class_names)
  ordered, notes = [], []
  for teacher in given:
    order, note = classes.match(
      teacher.class_names or ('',) * teacher.num_classes,
      wanted,
      what=f'teacher {teacher.name}',
      of=of,
      by_number=by_number,
      flag='--config.teacher.classes_by_number=True',
    )
    if order is not None:
      teacher = teacher.in_order(order, wanted)
    ordered.append(teacher)
    if not classes.are_names(wanted) and classes.are_names(teacher.class_names):
      # Those after it are compared with it: the data set says nothing.
      of, wanted = f'teacher {teacher.name}', teacher.class_names
    notes += [note] * bool(note)
  return tuple(ordered), tuple(notes)


def check(teacher: teachers.Teacher, dataset) -> None:
  """Raises UserError where a teacher cannot teach on a data set."""
  num_classes = len(dataset.class_names)
  if num_classes and not teacher.num_classes:
    raise config_utils.UserError(
      f'teacher {teacher.name} has no head: --config.teacher.head=fit fits one '
      'on its features'
    )
  if teacher.num_classes != num_classes:
    raise config_utils.UserError(
      f'teacher {teacher.name} tells {teacher.num_classes} classes apart, but '
      f'the data set has {num_classes}: take a teacher trained on it, or let '
      '--config.teacher.head=fit fit it a head for these classes'
    )
  num_channels = len(teacher.preprocessing.mean)
  # A network of colours sees a grey image in all of its channels.
  if dataset.image_shape[-1] not in (1, num_channels):
    raise config_utils.UserError(
      f'teacher {teacher.name} reads images of {num_channels} channels, but '
      f"the data set's have {dataset.image_shape[-1]}"
    )
