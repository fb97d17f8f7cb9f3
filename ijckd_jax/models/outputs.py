"""What networks hand to methods: arrays, and the shapes of them."""

import dataclasses
from typing import Any

from flax import struct
import jax

# What can make a student's prediction: its own head, on its own features; or
# behind the connector the teacher's, a copy of that which is trained on, a
# fresh one, or a random one that is not trained.
HEADS = ('own', 'teacher', 'copy', 'fresh', 'random')


@struct.dataclass
class Features:
  """What a backbone returns.

  Attributes:
    stages: the maps at the end of each stage, (B, H, W, C) each.
    final: the map that is pooled, (B, H, W, C).
    pooled: the representation that the head reads, (B, D) float32.
    before: the stages before the ReLU that they end in; () where they end in
      none.
  """

  stages: tuple[jax.Array, ...]
  final: jax.Array
  pooled: jax.Array
  before: tuple[jax.Array, ...] = ()


@struct.dataclass
class Connected:
  """A student seen through its connector and the teacher's pool and head.

  Attributes:
    map: the connector's output (B, H, W, C_t); None where the connector takes
      pooled features.
    pooled: the student's representation in the teacher's space, (B, D_t).
    logits: the teacher's head on `pooled`, (B, K).
  """

  map: jax.Array | None
  pooled: jax.Array
  logits: jax.Array


@struct.dataclass
class Outputs:
  """What a method sees of a network: its features, logits and connection.

  Attributes:
    stages: as in Features.
    final: as in Features.
    pooled: as in Features.
    logits: the network's prediction (B, K) float32, by whichever head makes it.
    connected: a student's Connected to the teacher that it is compared with;
      None for teachers and for students that have no connector.
    before: as in Features.
    auxiliary: a student's, what the method's auxiliary module made of it and of
      the teacher; None where there is none.
    second: the Outputs of the second view of the images; None where there is
      one view.
    change: of a teacher that adapts, the sum of the squared differences of its
      kernels, the head's among them, from those that it started with; None for
      all others.
  """

  stages: tuple[jax.Array, ...]
  final: jax.Array
  pooled: jax.Array
  logits: jax.Array
  connected: Connected | None = None
  before: tuple[jax.Array, ...] = ()
  auxiliary: Any = None
  second: 'Outputs | None' = None
  change: jax.Array | None = None


@dataclasses.dataclass(frozen=True)
class Shapes:
  """What a method may know of a network before anything runs.

  Attributes:
    stages: ShapeDtypeStructs of Features.stages.
    final: ShapeDtypeStruct of the map that is tapped.
    pooled: ShapeDtypeStruct of the pooled features.
    signed: whether `final` can be negative.
    pools_map: whether `pooled` is a function of `final`.
    pooled_signed: whether `pooled` can be negative; None: as `signed`.
    before: ShapeDtypeStructs of Features.before.
  """

  stages: tuple[Any, ...]
  final: Any
  pooled: Any
  signed: bool = False
  pools_map: bool = True
  pooled_signed: bool | None = None
  before: tuple[Any, ...] = ()

  def __post_init__(self) -> None:
    if self.pooled_signed is None:
      object.__setattr__(self, 'pooled_signed', self.signed)
