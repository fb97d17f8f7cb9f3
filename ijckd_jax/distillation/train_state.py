"""What training changes, and nothing else."""

from typing import Any

from flax import struct
import jax
import jax.numpy as jnp
import optax


@struct.dataclass
class TrainState:
  """Arrays only; this is what a checkpoint holds.

  Attributes:
    step: updates made, int32 scalar.
    params: {'backbone', 'connector', 'head', 'auxiliary', 'teacher'}, of these
      what is trained.
    batch_stats: {'backbone', 'connector', 'auxiliary', 'teacher'}, likewise.
    opt_state: of the optax transformation.
    ema: None, or {'params', 'batch_stats'} as moving averages.
    memory: arrays of the method's own; None for most.
  """

  step: jax.Array
  params: Any
  batch_stats: Any
  opt_state: optax.OptState
  ema: Any = None
  memory: Any = None

  @property
  def evaluated(self) -> dict[str, Any]:
    """The 'params' and 'batch_stats' that are evaluated and deployed."""
    if self.ema is not None:
      return self.ema
    return {'params': self.params, 'batch_stats': self.batch_stats}


def create(
  variables: Any,
  tx: optax.GradientTransformation,
  *,
  with_ema: bool,
  memory: Any = None,
) -> TrainState:
  """Returns the state before the first step, from fresh variables."""
  return TrainState(
    step=jnp.zeros((), jnp.int32),
    params=variables['params'],
    batch_stats=variables['batch_stats'],
    opt_state=tx.init(variables['params']),
    # Copies: a buffer cannot be donated twice.
    ema=jax.tree.map(jnp.copy, dict(variables)) if with_ema else None,
    memory=memory,
  )
