"""The objectives by name, and what each must be.

A method is a frozen dataclass, in a module of its own as `Method`, whose fields
are its hyper-parameters. It has

  predicts_with: 'teacher' or 'own', whose head makes the student's prediction.
  tap: 'stage' or 'final', the student's map that is connected; a student that
    is tapped at its last stage is built without the layers after it.
  build_connector(student, teacher): the module that connects the two (see
    connectors.py), from their outputs.Shapes, or None.
  loss(student, teacher, batch): the total and the unweighted terms by name,
    from their outputs.Outputs and the batch of one device. Its labels are for
    losses.cross_entropy: with mixup and cutmix they are losses.MixedLabels.

A method that learns without a teacher says `needs_teacher = False`.
"""

from ijckd_jax import config_utils

METHODS = {
  'ce': 'ijckd_jax.methods.ce:Method',
  'ijckd': 'ijckd_jax.methods.ijckd:Method',
  'kd': 'ijckd_jax.methods.kd:Method',
  'simkd': 'ijckd_jax.methods.simkd:Method',
  'srrl': 'ijckd_jax.methods.srrl:Method',
}


def get(name: str) -> type:
  """Returns the method class called `name`, or at `package.module:Name`."""
  return config_utils.resolve('method', name, METHODS)
