"""What every method is: the whole contract, with its defaults."""

from collections.abc import Callable
from collections.abc import Mapping
import functools
from typing import Any

import jax

from ijckd_jax.distillation import connectors
from ijckd_jax.distillation.methods import auxiliary as auxiliary_lib
from ijckd_jax.models import outputs


class Method:
  """An objective: its terms, their weights, and which head predicts.

  A method is a frozen dataclass whose fields are its hyper-parameters; a config
  names it, or another class as `package.module:Name`. It must have `loss`, and
  to predict with another head than 'own' also `build_connector`; the rest is
  as here unless it says otherwise. The weight of the labels, if it has one, is
  called `cross_entropy_weight`: `method.add` sets it to 0 in methods it adds.

  Attributes:
    predicts_with: of outputs.HEADS, the head that makes the student's
      prediction: mostly 'teacher' or 'own'.
    tap: the map that the student ends at, and that is connected. 'stage' is its
      last stage and 'stageN' is Features.stages[N], counted from 0, which in a
      ResNet is the stem: its second group of blocks is 'stage2'. The student
      is trained and deployed without the layers after its tap. 'final' is the
      map that the whole backbone pools. A method with a connector has `tap` as
      a field; a student without one is whole.
    needs_teacher: whether it learns from one.
    remembers: whether it keeps arrays from step to step, in TrainState.memory:
      then it has `memory`, `notes` and `remember`.
    second_view: transforms `(key, image) -> image`, uint8 (H, W, C), that make
      the second view of an image: they follow the run's own augmentation, which
      is drawn anew for it. None: there is no second view. Else both networks
      see both views: `student.second` and `teacher.second` are the Outputs of
      the second one.
    adapts_teacher: whether the teacher is trained too, from where it stands,
      beside the student. Then the outputs of the teacher in a loss have
      gradients; `teacher.change` says how far it has moved.
  """

  predicts_with: str = 'own'
  tap: str = 'final'
  needs_teacher = True
  remembers = False
  second_view: Callable[[jax.Array, jax.Array], jax.Array] | None = None
  adapts_teacher = False

  def build_connector(
    self, student: outputs.Shapes, teacher: outputs.Shapes
  ) -> connectors.Connector | None:
    """Returns the connectors.Connector of a student to a teacher, or None.

    Args:
      student: outputs.Shapes of the student.
      teacher: outputs.Shapes of the teacher.
    """
    del student, teacher
    return None

  def auxiliary(
    self, student: outputs.Shapes, teacher: outputs.Shapes
  ) -> auxiliary_lib.Auxiliary | None:
    """Returns what is trained beside the student, an Auxiliary, or None.

    What it gives is `student.auxiliary` in a loss. Arguments are those of
    `build_connector`.
    """
    del student, teacher
    return None

  def loss(
    self,
    student: outputs.Outputs,
    teacher: outputs.Outputs,
    batch: Mapping[str, Any],
  ) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Returns the total, and the unweighted terms by name.

    Args:
      student: outputs.Outputs of the student; `connected` is what the connector
        has made of it.
      teacher: outputs.Outputs of the teacher.
      batch: of one device. Its 'label' is for losses.cross_entropy: with mixup,
        cutmix or label smoothing it is a mixing.MixedLabels. 'second' is the
        second view, where there is one. Where the method remembers, it has
        'memory', and 'key', the run's, for what is drawn by example.
    """
    raise NotImplementedError

  def memory(self, key: jax.Array, num_examples: int) -> Any:
    """Returns the memory at the start of a run on `num_examples` images."""
    raise NotImplementedError

  def notes(self, student: outputs.Outputs, batch: Mapping[str, Any]) -> Any:
    """Returns what a batch adds to the memory: a row for each image.

    They are gathered from all devices. Arguments are those of `loss`.
    """
    raise NotImplementedError

  def remember(self, memory: Any, notes: Any) -> Any:
    """Returns the memory after that, as a pure function."""
    raise NotImplementedError


@functools.cache
def complete(cls: type) -> type:
  """Returns a class of methods; one without this base has its defaults too."""
  if issubclass(cls, Method):
    return cls
  names = ('__module__', '__qualname__', '__doc__')
  return type(
    cls.__name__,
    (cls, Method),
    {
      'remembers': hasattr(cls, 'memory'),
      **{name: getattr(cls, name) for name in names},
    },
  )
