"""Learning from images that have no classes: by features alone."""

import jax
from jax.interpreters import partial_eval
import jax.numpy as jnp

from ijckd_jax.distillation.methods import added
from ijckd_jax.runtime import config_utils
from ijckd_jax.runtime import parallel

# With as many stand-ins a loss is traced that would read labels or logits.
NUM_CLASSES = 2
# What there is only where there are classes, by the names in the batch and in
# outputs.Outputs.
OF_CLASSES = ('label', 'logits')


def check_head(method) -> None:
  """Raises UserError where a method trains or draws a head, which has no use.

  Args:
    method: the objective.
  """
  if method.predicts_with not in ('own', 'teacher'):
    raise config_utils.UserError(
      f"the method predicts with the head '{method.predicts_with}', but the "
      'images have no classes, so that there is none: set method.head=teacher'
    )


def check_reads_features_alone(distiller, image_shape, num_rows: int) -> None:
  """Raises UserError where a loss reads labels or logits.

  Args:
    distiller: the pair and the method, with heads of NUM_CLASSES stand-ins.
    image_shape: (H, W, C) of the shared view.
    num_rows: images in a batch that is traced.
  """
  found = _of_classes(distiller, image_shape, num_rows)
  if not found:
    return
  method = distiller.method
  weights = [
    f'method.{name}_weight=0'
    for name in found
    if hasattr(method, f'{name}_weight')
  ]
  remedy = 'take method simkd, which learns from features alone'
  if not all(teacher.pools_map for teacher in distiller.teachers):
    remedy = (
      "take method ijckd with connector='mlp', feature_site='pooled', "
      'cross_entropy_weight=0 and logit_weight=0'
    )
  if len(weights) == len(found):
    remedy = f'set {" and ".join(weights)}'
  elif isinstance(method, added.Sum):
    remedy = 'leave out of method.add what reads them'
  raise config_utils.UserError(
    f'the images have no classes, but the method reads labels or logits in '
    f'{", ".join(found)}: {remedy}'
  )


def _of_classes(distiller, image_shape, num_rows) -> list[str]:
  """Returns the terms of a loss that read labels or logits.

  'the total' is one of them if it alone does.
  """
  images = jax.ShapeDtypeStruct((num_rows, *image_shape), jnp.uint8)
  frozen, teacher_outputs = distiller.example_teachers(images)

  def read(frozen, teacher_outputs, images):
    key, batch = jax.random.key(0), distiller.example_batch(images)
    variables = distiller.init(key, image_shape)
    students, teacher_outputs, _ = distiller.what_loss_reads(
      variables, frozen, teacher_outputs, batch, key
    )
    return students, teacher_outputs, batch

  _, inputs = parallel.trace(read, frozen, teacher_outputs, images)
  jaxpr, (_, terms) = parallel.trace(distiller.loss, *inputs)
  of_classes = [
    jax.tree_util.keystr(path[-1:], simple=True) in OF_CLASSES
    for path, _ in jax.tree_util.tree_leaves_with_path(inputs)
  ]
  # As the results are flattened: dicts in the order of their keys.
  names = ['the total', *sorted(terms)]
  found = []
  for name in names:
    wanted = [other == name for other in names]
    _, is_read = partial_eval.dce_jaxpr(jaxpr.jaxpr, wanted)
    if any(a and b for a, b in zip(is_read, of_classes, strict=True)):
      found.append(name)
  return found[1:] or found
