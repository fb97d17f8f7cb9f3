"""Student, connector, head, teacher and method, bound into pure functions."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from ijckd_jax.distillation import network as network_lib
from ijckd_jax.distillation import teachers
from ijckd_jax.distillation.methods import auxiliary as auxiliary_lib
from ijckd_jax.models import outputs
from ijckd_jax.runtime import parallel

# Of the key of an auxiliary module's start; connectors have 1, 2, ...
AUXILIARY_STREAM = 2**31 - 1
# In an example of a memory.
EXAMPLES = 4


@dataclasses.dataclass(frozen=True)
class Other:
  """A further teacher, whose head is not the joint classifier.

  Attributes:
    teacher: it.
    network: the student's parts, as they are connected to it.
  """

  teacher: teachers.Teacher
  network: network_lib.Network


@dataclasses.dataclass(frozen=True)
class Distiller:
  """What a step needs to know, apart from arrays.

  Attributes:
    network: the student's parts.
    method: the objective, see methods.
    teacher: whom it learns from; None for a method that needs none. Of several,
      the one whose head is the joint classifier.
    num_classes: K.
    others: further teachers, each with a connector of its own in training.
    weights: of the teachers' losses, which are averaged by them.
    random_head: of a student that predicts with a random one, which is not
      trained; None for all others.
    auxiliary: auxiliary.Auxiliary of the method, trained beside the student;
      None for most.
  """

  network: network_lib.Network
  method: Any
  teacher: teachers.Teacher | None
  num_classes: int
  others: tuple[Other, ...] = ()
  weights: tuple[float, ...] = (1.0,)
  random_head: Any = None
  auxiliary: auxiliary_lib.Auxiliary | None = None

  @property
  def reuses_head(self) -> bool:
    """Whether the teacher's head, as it is, makes the student's prediction."""
    return self.method.predicts_with == 'teacher'

  @property
  def through_connector(self) -> bool:
    """Whether the student's prediction is made behind the connector."""
    return self.method.predicts_with != 'own'

  @property
  def trains_head(self) -> bool:
    """Whether the head that makes the prediction is trained."""
    return self.method.predicts_with not in ('teacher', 'random')

  def init(
    self, key: jax.Array, image_shape: tuple[int, int, int]
  ) -> dict[str, Any]:
    """Returns fresh 'params' and 'batch_stats' of what is trained."""
    width = None
    if self.through_connector:
      width = self.teacher.num_features
    num_classes = self.num_classes if self.trains_head else None
    variables = self.network.init(key, image_shape, num_classes, width)
    if self.others:
      features = jax.eval_shape(
        lambda: network_lib.run(
          self.network.backbone,
          network_lib.part(variables, 'backbone'),
          self.network.preprocessing(jnp.zeros((1, *image_shape), jnp.uint8)),
          train=False,
        )[0]
      )
    made = {
      _connector(number): other.network.init_connector(
        jax.random.fold_in(key, number), features
      )
      for number, other in enumerate(self.others, 1)
      if other.network.connector is not None
    }
    if self.auxiliary is not None:
      images = jax.ShapeDtypeStruct((2, *image_shape), jnp.uint8)
      shapes = jax.eval_shape(lambda: (variables, self.frozen))
      # Where batch norm is synchronised, its training has collectives.
      _, given = parallel.trace(
        lambda variables, frozen, images: (
          self.student(variables, frozen, images)[0],
          self.teach(frozen, images),
        ),
        *shapes,
        images,
      )
      zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), given)
      own_key = jax.random.fold_in(key, AUXILIARY_STREAM)
      _, made['auxiliary'] = network_lib.init(self.auxiliary, own_key, *zeros)
    for name, part in made.items():
      for kind, tree in part.items():
        variables[kind][name] = tree
    return variables

  @property
  def teachers(self) -> tuple[teachers.Teacher, ...]:
    """All of them, the one with the joint classifier first."""
    if self.teacher is None:
      return ()
    return (self.teacher, *(other.teacher for other in self.others))

  @property
  def teacher_arrays(self) -> dict[str, Any] | None:
    """The arrays of all teachers: the first one's, and 'others'."""
    if self.teacher is None or not self.others:
      return self.teacher and self.teacher.frozen
    others = tuple(other.teacher.frozen for other in self.others)
    return {**self.teacher.frozen, 'others': others}

  @property
  def frozen(self) -> dict[str, Any] | None:
    """All that is not trained: `teacher_arrays`, and a 'random_head'."""
    if self.random_head is None:
      return self.teacher_arrays
    return {**self.teacher_arrays, 'random_head': self.random_head}

  def teach(self, frozen, images: jax.Array):
    """Returns the teacher's Outputs of the shared view; of several, a tuple."""
    first = self.teacher(frozen, images)
    if not self.others:
      return first
    pairs = zip(self.others, frozen['others'], strict=True)
    return (first, *(other.teacher(own, images) for other, own in pairs))

  def objective(self, variables, frozen, teacher_outputs, batch):
    """Runs the student in training, and the method on both.

    Args:
      variables: the student's 'params' and 'batch_stats'.
      frozen: see `student`.
      teacher_outputs: as `teach` gives it; None without a teacher.
      batch: of the step.

    Returns:
      The total; and the terms, the student's outputs.Outputs and the updated
      batch statistics.
    """
    student, batch_stats = self.student(variables, frozen, batch['image'])
    if self.auxiliary is not None:
      made, batch_stats['auxiliary'] = network_lib.run(
        self.auxiliary,
        network_lib.part(variables, 'auxiliary'),
        student,
        teacher_outputs,
        train=True,
      )
      student = student.replace(auxiliary=made)
    total, terms = self.loss(student, teacher_outputs, batch)
    return total, (terms, student, batch_stats)

  def loss(self, student: outputs.Outputs, teacher_outputs, batch):
    """Returns the method's total and terms; over several teachers, the mean.

    The prediction is the same for all of them; each is compared with the
    student as it is connected to that one.

    Args:
      student: as `student` gives it.
      teacher_outputs: as `teach` gives it.
      batch: of the step.
    """
    if not self.others:
      return self.method.loss(student, teacher_outputs, batch)
    total, terms = 0.0, {}
    connected = (student.connected, *student.others)
    for weight, own, teacher in zip(
      self.weights, connected, teacher_outputs, strict=True
    ):
      share = weight / sum(self.weights)
      one = student.replace(connected=own, others=())
      value, found = self.method.loss(one, teacher, batch)
      total += share * value
      for name, term in found.items():
        terms[name] = terms.get(name, 0.0) + share * term
    return total, terms

  def example_batch(self, images: jax.Array) -> dict[str, Any]:
    """Returns a batch of images for tracing: all that a method may read."""
    rows = jnp.zeros(len(images), jnp.int32)
    batch = {'image': images, 'label': rows, 'index': rows, 'epoch': rows}
    if self.remembers:
      key = jax.random.key(0)
      batch |= {'memory': self.method.memory(key, EXAMPLES), 'key': key}
    return batch

  @property
  def remembers(self) -> bool:
    """Whether the method keeps arrays in the state."""
    return self.method.remembers

  def student(self, variables, frozen, images: jax.Array):
    """Runs the student in training on the shared view.

    Args:
      variables: its 'params' and 'batch_stats'.
      frozen: the teacher's arrays (Teacher.frozen); None without a teacher.
      images: (B, H, W, C) uint8, or float32 of 0 to 255.

    Returns:
      outputs.Outputs and the updated batch statistics.
    """
    net = self.network
    features, backbone_stats = network_lib.run(
      net.backbone,
      network_lib.part(variables, 'backbone'),
      net.preprocessing(images),
      train=True,
    )
    batch_stats = {'backbone': backbone_stats}
    connected = None
    if net.connector is not None:
      connected, batch_stats['connector'] = net.connect(
        network_lib.part(variables, 'connector'),
        features,
        frozen['pool'],
        frozen['head'],
        train=True,
      )
    others = []
    for number, other in enumerate(self.others, 1):
      if other.network.connector is None:
        others.append(None)
        continue
      own, name = frozen['others'][number - 1], _connector(number)
      connected_to, batch_stats[name] = other.network.connect(
        network_lib.part(variables, name),
        features,
        own['pool'],
        own['head'],
        train=True,
      )
      others.append(connected_to)
    if self.reuses_head:
      logits = connected.logits
    else:
      predicting = connected if self.through_connector else features
      logits = network_lib.classify(
        self._head(variables, frozen), predicting.pooled
      )
    result = outputs.Outputs(
      features.stages,
      features.final,
      features.pooled,
      logits,
      connected,
      tuple(others),
      features.before,
    )
    return result, batch_stats

  @property
  def connected_network(self) -> network_lib.Network | None:
    """The student through the teacher's head; None: it has no connector to it.

    It is `deployed_network` itself where that is how it predicts.
    """
    return None if self.network.connector is None else self.network

  @property
  def deployed_network(self) -> network_lib.Network:
    """The network that predicts alone.

    A connector that only served training is not in it.
    """
    if self.reuses_head:
      return self.network
    if self.through_connector:
      # A copy: `evaluator` asks whether this is the very `connected_network`,
      # and with another head it is not.
      return dataclasses.replace(self.network)
    return dataclasses.replace(
      self.network,
      connector=None,
      connect_size=None,
      pool=network_lib.pool_of(self.network.backbone),
      pool_signed=False,
    )

  def deployed(self, variables, frozen) -> dict[str, Any]:
    """Returns the variables of `deployed_network`.

    Args:
      variables: the student's 'params' and 'batch_stats'.
      frozen: the teacher's arrays, whose head and pool become the student's
        where its head is reused.
    """
    if self.through_connector:
      return self._connected(variables, frozen, self._head(variables, frozen))
    kept = _parts(variables, 'backbone', 'head')
    return {**kept, 'pool': {}}

  def _head(self, variables, frozen) -> dict[str, jax.Array]:
    """Returns the head that makes the student's prediction."""
    if self.trains_head:
      return variables['params']['head']
    return frozen['head' if self.reuses_head else 'random_head']

  def connected_variables(self, variables, frozen) -> dict[str, Any] | None:
    """Returns the variables of `connected_network`, where it is not deployed.

    Args:
      variables: as `deployed` takes them.
      frozen: as `deployed` takes it.
    """
    if self.reuses_head or self.network.connector is None:
      return None
    return self._connected(variables, frozen, frozen['head'])

  def _connected(self, variables, frozen, head) -> dict[str, Any]:
    """Returns the variables of the student through the connector and a head."""
    kept = _parts(variables, 'backbone', 'connector')
    kept['params']['head'] = head
    # A connector on pooled features stands behind the pool.
    return {**kept, 'pool': frozen['pool'] if self.network.pools_map else {}}


def _parts(variables, *names: str) -> dict[str, Any]:
  """Returns 'params' and 'batch_stats' of some parts, in dicts of their own."""
  return {
    kind: {
      name: tree for name, tree in variables[kind].items() if name in names
    }
    for kind in network_lib.COLLECTIONS
  }


def _connector(number: int) -> str:
  """Returns what the connector to another teacher is called."""
  return f'connector_{number}'
