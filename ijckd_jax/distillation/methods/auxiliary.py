"""What a method trains beside the student, and what is never deployed."""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from ijckd_jax.models import layers


class Auxiliary(layers.Joins, nn.Module):
  """`__call__(student, teacher, *, train)`: of outputs.Outputs, anything.

  What it returns is the method's `student.auxiliary`. A subclass with fields
  that have no default is declared with `kw_only=True`.

  Attributes:
    axis_name: mapped axis over which batch norm is synchronised, or None.
    dtype: dtype of the computation.
    unbiased_variance: see models.layers.BatchNorm.
  """

  axis_name: str | None = None
  dtype: Any = jnp.float32
  unbiased_variance: bool = False
