"""A teacher and its student, side by side on the same images."""

import dataclasses
from typing import Any

import jax

from ijckd_jax.distillation import network as network_lib
from ijckd_jax.distillation import teachers


@dataclasses.dataclass(frozen=True)
class Pair:
  """A teacher, and a student as it predicts and as the teacher's head sees it.

  Attributes:
    teacher: it.
    student: predicts alone.
    connected: the student through the teacher's pool and head; the same as
      `student` where that is how it predicts, and None where it has no
      connector to the teacher.
  """

  teacher: teachers.Teacher
  student: network_lib.Network
  connected: network_lib.Network | None

  @property
  def reuses_head(self) -> bool:
    """Whether the teacher's head makes the student's prediction."""
    return self.connected is self.student

  def view(self, variables, images: jax.Array) -> dict[str, Any]:
    """Returns both of them on the images; arrays of (B, ...).

    Args:
      variables: 'teacher' (Teacher.arrays), and of the networks 'student' and
        'connected'.
      images: of 0 to 255.

    Returns:
      'z_t' (B, D), and where the student is seen in the teacher's space 'z_s'
      (B, D); and unless it reuses the head, its own logits 'l_own' (B, K).
    """
    taught = self.teacher(variables['teacher'], images)
    result = {'z_t': taught.pooled}
    if not self.reuses_head:
      net = self.student
      seen = net(variables['student'], net.preprocessing(images))
      result['l_own'] = seen.logits
    if self.connected is not None:
      net = self.connected
      seen = net(variables['connected'], net.preprocessing(images))
      result['z_s'] = seen.pooled
    return result


def sees(network, variables, teacher: teachers.Teacher) -> bool:
  """Returns whether a network reads a teacher's space, by its connector.

  Args:
    network: network.Network.
    variables: of it.
    teacher: it.
  """
  width = variables['params']['head']['kernel'].shape[0]
  return network.connector is not None and width == teacher.num_features
