"""A teacher and its student, side by side on the same images."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

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
      (B, D); unless it reuses the head, its own 'z_own' and 'l_own' (B, K); and
      'map_square' (B,), where the maps can be compared, with 'off_average', by
      how much z is not the average of its map.
    """
    taught = self.teacher(variables['teacher'], images)
    result = {'z_t': taught.pooled}
    if not self.reuses_head:
      net = self.student
      seen = net(variables['student'], net.preprocessing(images))
      result |= {'z_own': seen.pooled, 'l_own': seen.logits}
    if self.connected is None:
      return result
    net = self.connected
    seen = net(variables['connected'], net.preprocessing(images))
    result['z_s'] = seen.pooled
    return result | _compare_maps(taught, seen, net)


def sees(network, variables, teacher: teachers.Teacher) -> bool:
  """Returns whether a network reads a teacher's space, by its connector.

  Args:
    network: network.Network.
    variables: of it.
    teacher: it.
  """
  width = variables['params']['head']['kernel'].shape[0]
  return network.connector is not None and width == teacher.num_features


def _compare_maps(taught, seen, net) -> dict[str, jax.Array]:
  """Returns the rows of D12, where the maps' positions can be compared."""
  if not net.pools_map:
    return {}
  ours, theirs = (x.final.astype(jnp.float32) for x in (seen, taught))
  if theirs.ndim != 4 or ours.shape[-1] != theirs.shape[-1]:
    return {}
  (height, width), (h, w) = theirs.shape[1:3], ours.shape[1:3]
  if height % h or width % w:
    return {}  # Bins that overlap: their average is not that of the map.
  binned = theirs.reshape(-1, h, height // h, w, width // w, ours.shape[-1])
  off = [
    jnp.abs(final.mean(axis=(1, 2)) - x.pooled).max(axis=-1)
    if x.pooled.shape[-1] == final.shape[-1]
    else jnp.full(len(final), jnp.inf)
    for final, x in ((ours, seen), (theirs, taught))
  ]
  square = jnp.square(ours - binned.mean(axis=(2, 4))).sum(axis=-1)
  return {
    'map_square': square.mean(axis=(1, 2)),
    'off_average': jnp.maximum(*off),
  }
