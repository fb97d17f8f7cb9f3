"""Student, teachers and method, bound into pure functions."""

import dataclasses
from typing import Any

from flax import struct
import jax
import jax.numpy as jnp

from ijckd_jax import models
from ijckd_jax.distillation import network as network_lib
from ijckd_jax.distillation import teachers
from ijckd_jax.distillation.methods import auxiliary as auxiliary_lib
from ijckd_jax.models import outputs
from ijckd_jax.runtime import parallel

# Of the key of an auxiliary module's start; connectors have 1, 2, ...
AUXILIARY_STREAM = 2**31 - 1
# Of a step's key. Flax folds in hashes of names, which differ from it.
HEAD_STREAM = 0
SECOND_PASS_STREAM = 1
# In an example of a memory.
EXAMPLES = 4


@struct.dataclass
class Frozen:
  """The arrays that a step reads and does not train.

  No gradient: `steps._piece` differentiates the parameters alone, and
  `Teacher.__call__` stops what would flow through it. No optimizer and no
  checkpoint: `Distiller.init`, which fills the state, gives no teacher. (What a
  method adapts is a copy in the state; these arrays are its start.) No
  running statistics: a teacher runs with `train=False`. Not donated:
  `Experiment.map_train_step` donates the state alone.

  Attributes:
    teachers: Teacher.arrays of each teacher, the joint classifier's first.
    fixed_head: of a student whose own head is not trained; None for all others.
  """

  teachers: tuple[dict[str, Any], ...] = ()
  fixed_head: dict[str, jax.Array] | None = None

  @property
  def joint(self) -> dict[str, Any] | None:
    """Arrays of the teacher with the joint classifier; None: no teacher."""
    return self.teachers[0] if self.teachers else None

  def with_joint_head(self, head: dict[str, jax.Array]) -> 'Frozen':
    """Returns the same arrays, but for another joint classifier."""
    first, *others = self.teachers
    return self.replace(teachers=({**first, 'head': head}, *others))


@dataclasses.dataclass(frozen=True)
class Link:
  """A teacher and the student's connection to it.

  Attributes:
    teacher: the teacher.
    network: the student's backbone, the connector to the teacher (None: the
      method wants none) and the teacher's pool.
    weight: of the teacher's loss; the losses of several are averaged by it.
  """

  teacher: teachers.Teacher
  network: network_lib.Network
  weight: float = 1.0


@dataclasses.dataclass(frozen=True)
class Distiller:
  """What a step needs to know, apart from arrays.

  Attributes:
    network: the student's backbone, pool and head, without a connector.
    method: the objective, see methods.
    links: to the teachers, that to the joint classifier's first; () for a
      method that needs no teacher.
    num_classes: K; 0 where the images have no classes, so that features alone
      are learned, and every head is empty.
    fixed_head: of a student whose own head is not trained, because it is random
      or empty; None for all others.
    auxiliary: auxiliary.Auxiliary of the method, trained beside the student;
      None for most.
    dropout: share of the pooled features that the student's own head does not
      see in a training step.
    adapting: the backbone of the teacher, where the method trains it too.
  """

  network: network_lib.Network
  method: Any
  links: tuple[Link, ...]
  num_classes: int
  fixed_head: Any = None
  auxiliary: auxiliary_lib.Auxiliary | None = None
  dropout: float = 0.0
  adapting: models.Backbone | None = None

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
    return self.num_classes > 0 and self.method.predicts_with not in (
      'teacher',
      'random',
    )

  @property
  def remembers(self) -> bool:
    """Whether the method keeps arrays in the state."""
    return self.method.remembers

  @property
  def teachers(self) -> tuple[teachers.Teacher, ...]:
    """The teachers that the student learns from, in the order of the links."""
    return tuple(link.teacher for link in self.links)

  @property
  def frozen(self) -> Frozen:
    """The arrays that are not trained."""
    arrays = tuple(teacher.arrays for teacher in self.teachers)
    return Frozen(arrays, self.fixed_head)

  def with_teachers(self, given) -> 'Distiller':
    """Returns the same for teachers of the same shapes, in the same order."""
    links = tuple(
      dataclasses.replace(
        link,
        teacher=teacher,
        network=dataclasses.replace(link.network, pool=teacher.pool),
      )
      for link, teacher in zip(self.links, given, strict=True)
    )
    return dataclasses.replace(self, links=links)

  def init(
    self, key: jax.Array, image_shape: tuple[int, int, int]
  ) -> dict[str, Any]:
    """Returns fresh 'params' and 'batch_stats' of what is trained.

    A head or a teacher that is to start as a copy is fresh here too.
    """
    width = None
    if self.through_connector:
      width = self.links[0].teacher.num_features
    num_classes = self.num_classes if self.trains_head else None
    network = self.links[0].network if self.links else self.network
    variables = network.init(key, image_shape, num_classes, width)
    made = {}
    if len(self.links) > 1:
      features = jax.eval_shape(
        lambda: network_lib.run(
          network.backbone,
          network_lib.part(variables, 'backbone'),
          network.preprocessing(jnp.zeros((1, *image_shape), jnp.uint8)),
          train=False,
        )[0]
      )
      made = {
        _connector(number): link.network.init_connector(
          jax.random.fold_in(key, number), features
        )
        for number, link in enumerate(self.links[1:], 1)
        if link.network.connector is not None
      }
    if self.auxiliary is not None:
      images = jax.ShapeDtypeStruct((2, *image_shape), jnp.uint8)
      shapes = jax.eval_shape(lambda: (variables, self.frozen))
      # Where batch norm is synchronised, its training has collectives.
      _, given = parallel.trace(
        lambda variables, frozen, images: (
          self.run_student(variables, frozen, images, key)[0][0],
          self.run_teachers(frozen, images)[0],
        ),
        *shapes,
        images,
      )
      zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), given)
      own_key = jax.random.fold_in(key, AUXILIARY_STREAM)
      _, made['auxiliary'] = network_lib.init(self.auxiliary, own_key, *zeros)
    if self.adapting is not None:
      x = self.links[0].teacher.preprocessing(
        jnp.zeros((1, *image_shape), jnp.uint8)
      )
      _, made['teacher'] = network_lib.init(self.adapting, key, x)
    for name, part in made.items():
      for kind, tree in part.items():
        variables[kind][name] = tree
    return variables

  def run_teachers(
    self, frozen: Frozen, images: jax.Array, second: jax.Array | None = None
  ) -> tuple[outputs.Outputs, ...]:
    """Returns each teacher's Outputs of the shared view.

    Args:
      frozen: the arrays that are not trained.
      images: of the shared view.
      second: of the second view, if there is one.
    """
    found = tuple(
      link.teacher(frozen.teachers[number], images)
      for number, link in enumerate(self.links)
    )
    if second is None:
      return found
    return _with_second(found, self.run_teachers(frozen, second))

  def run_student(
    self,
    variables,
    frozen: Frozen,
    images: jax.Array,
    key: jax.Array | None = None,
    second: jax.Array | None = None,
  ) -> tuple[tuple[outputs.Outputs, ...], dict[str, Any]]:
    """Runs the student in training on the shared view.

    Args:
      variables: its 'params' and 'batch_stats'.
      frozen: the arrays that are not trained.
      images: (B, H, W, C) uint8, or float32 of 0 to 255.
      key: for what the student drops at random in training; None for one that
        drops nothing.
      second: the second view, if there is one: of the same shape. It is run
        after the first: each has batch statistics of its own.

    Returns:
      The student's Outputs for each link, which differ in `connected` alone
      (one, without `connected`, where there are no links); and the updated
      batch statistics.
    """
    features, backbone_stats = network_lib.run(
      self.network.backbone,
      network_lib.part(variables, 'backbone'),
      self.network.preprocessing(images),
      train=True,
      key=key,
    )
    batch_stats = {'backbone': backbone_stats}
    connected = [None] * max(1, len(self.links))
    for number, link in enumerate(self.links):
      if link.network.connector is not None:
        name, teacher = _connector(number), frozen.teachers[number]
        connected[number], batch_stats[name] = link.network.connect(
          network_lib.part(variables, name),
          features,
          teacher['pool'],
          teacher['head'],
          train=True,
        )
    if self.reuses_head:
      logits = connected[0].logits
    else:
      predicting = connected[0] if self.through_connector else features
      pooled = predicting.pooled
      if self.dropout:
        head_key = jax.random.fold_in(key, HEAD_STREAM)
        pooled = network_lib.drop_features(pooled, self.dropout, head_key)
      logits = network_lib.classify(self._head(variables, frozen), pooled)
    found = tuple(
      outputs.Outputs(
        features.stages,
        features.final,
        features.pooled,
        logits,
        connected=one,
        before=features.before,
      )
      for one in connected
    )
    if second is None:
      return found, batch_stats
    if key is not None:
      key = jax.random.fold_in(key, SECOND_PASS_STREAM)
    variables = {'params': variables['params'], 'batch_stats': batch_stats}
    others, batch_stats = self.run_student(variables, frozen, second, key)
    return _with_second(found, others), batch_stats

  def objective(
    self, variables, frozen: Frozen, teacher_outputs, batch, key=None
  ):
    """Runs the student in training, and the method on student and teachers.

    Args:
      variables: the student's 'params' and 'batch_stats'.
      frozen: the arrays that are not trained.
      teacher_outputs: as `run_teachers` gives them.
      batch: of the step.
      key: as `run_student` takes it.

    Returns:
      The total; and the terms, the student's outputs.Outputs and the updated
      batch statistics.
    """
    students, teacher_outputs, batch_stats = self.what_loss_reads(
      variables, frozen, teacher_outputs, batch, key
    )
    total, terms = self.loss(students, teacher_outputs, batch)
    return total, (terms, students[0], batch_stats)

  def what_loss_reads(
    self, variables, frozen: Frozen, teacher_outputs, batch, key=None
  ):
    """Returns the student's and the teachers' outputs, and batch statistics.

    Arguments are those of `objective`. Where the method adapts its teacher,
    `teacher_outputs` is not read.
    """
    images = batch['image']
    students, batch_stats = self.run_student(
      variables, frozen, images, key, batch.get('second')
    )
    if self.adapting is not None:  # There is one link then.
      adapted, batch_stats['teacher'] = self._adapt(
        network_lib.part(variables, 'teacher'),
        self._head(variables, frozen),
        frozen.joint,
        images,
        batch.get('second'),
      )
      teacher_outputs = (adapted,)
    if self.auxiliary is not None:  # There is one link then.
      made, batch_stats['auxiliary'] = network_lib.run(
        self.auxiliary,
        network_lib.part(variables, 'auxiliary'),
        students[0],
        teacher_outputs[0],
        train=True,
      )
      students = (students[0].replace(auxiliary=made),)
    return students, teacher_outputs, batch_stats

  def _adapt(self, variables, head, start, images, second=None):
    """Returns a training teacher's Outputs, and its batch statistics.

    Its logits have a gradient by the bias of the trained head alone. They are
    made behind the pool that the student is deployed with, which is frozen.

    Args:
      variables: of the backbone that is trained.
      head: the trained copy of its head.
      start: arrays of the teacher as it was given.
      images: of the shared view.
      second: of the second view, if there is one.
    """
    teacher = self.links[0].teacher
    features, batch_stats = network_lib.run(
      self.adapting, variables, teacher.preprocessing(images), train=True
    )
    kernel, pooled = jax.lax.stop_gradient(
      (head['kernel'], teacher.pool(start['pool'], features.final))
    )
    given = start['network']['params']['backbone'], start['head']
    found = outputs.Outputs(
      features.stages,
      features.final,
      features.pooled,
      network_lib.classify({**head, 'kernel': kernel}, pooled),
      before=features.before,
      change=_change((variables['params'], head), jax.lax.stop_gradient(given)),
    )
    if second is None:
      return found, batch_stats
    variables = {**variables, 'batch_stats': batch_stats}
    other, batch_stats = self._adapt(variables, head, start, second)
    return found.replace(second=other), batch_stats

  def loss(self, students, teacher_outputs, batch):
    """Returns the method's total and terms: the links' weighted mean.

    The prediction is the same for all links; each teacher is compared with the
    student's outputs for its link.

    Args:
      students: as `run_student` gives them.
      teacher_outputs: as `run_teachers` gives them.
      batch: of the step.
    """
    if not self.links:
      return self.method.loss(students[0], None, batch)
    total, terms = 0.0, {}
    whole = sum(link.weight for link in self.links)
    for link, student, teacher in zip(
      self.links, students, teacher_outputs, strict=True
    ):
      share = link.weight / whole
      value, found = self.method.loss(student, teacher, batch)
      total += share * value
      for name, term in found.items():
        terms[name] = terms.get(name, 0.0) + share * term
    return total, terms

  def example_batch(self, images: jax.Array) -> dict[str, Any]:
    """Returns a batch of images for tracing: all that a method may read."""
    rows = jnp.zeros(len(images), jnp.int32)
    batch = {'image': images, 'label': rows, 'index': rows, 'epoch': rows}
    if self.method.second_view is not None:
      batch['second'] = images
    if self.remembers:
      key = jax.random.key(0)
      batch |= {'memory': self.method.memory(key, EXAMPLES), 'key': key}
    return batch

  def example_teachers(self, images):
    """Returns the frozen arrays, and the teachers' outputs as shapes.

    Args:
      images: ShapeDtypeStruct, of each view.
    """
    views = (images,) * (1 if self.method.second_view is None else 2)
    frozen = self.frozen
    return frozen, jax.eval_shape(self.run_teachers, frozen, *views)

  @property
  def connected_network(self) -> network_lib.Network | None:
    """The student through the teacher's head; None: it has no connector to it.

    It is the same object as `deployed_network` if the student predicts that
    way.
    """
    if not self.links or self.links[0].network.connector is None:
      return None
    return self.links[0].network

  @property
  def deployed_network(self) -> network_lib.Network:
    """The network that predicts alone.

    A connector that only served training is not in it.
    """
    if self.reuses_head:
      return self.connected_network
    if self.through_connector:
      # A copy: `evaluator` asks whether this is the very `connected_network`,
      # and with another head it is not.
      return dataclasses.replace(self.connected_network)
    return self.network

  def deployed(self, variables, frozen: Frozen) -> dict[str, Any]:
    """Returns the variables of `deployed_network`.

    Args:
      variables: the student's 'params' and 'batch_stats'.
      frozen: the arrays that are not trained: the teacher's head and pool
        become the student's where its head is reused.
    """
    if self.through_connector:
      return self._connected(variables, frozen, self._head(variables, frozen))
    kept = _parts(variables, 'backbone')
    kept['params']['head'] = self._head(variables, frozen)
    return {**kept, 'pool': {}}

  def connected_variables(
    self, variables, frozen: Frozen
  ) -> dict[str, Any] | None:
    """Returns the variables of `connected_network`, where it is not deployed.

    Args:
      variables: as `deployed` takes them.
      frozen: as `deployed` takes it.
    """
    if self.reuses_head or self.connected_network is None:
      return None
    return self._connected(variables, frozen, frozen.joint['head'])

  def _head(self, variables, frozen: Frozen) -> dict[str, jax.Array]:
    """Returns the head that makes the student's prediction."""
    if self.trains_head:
      return variables['params']['head']
    return frozen.joint['head'] if self.reuses_head else frozen.fixed_head

  def _connected(self, variables, frozen: Frozen, head) -> dict[str, Any]:
    """Returns the variables of the student through the connector and a head."""
    kept = _parts(variables, 'backbone', 'connector')
    kept['params']['head'] = head
    # A connector on pooled features stands behind the pool.
    pools_map = self.connected_network.pools_map
    return {**kept, 'pool': frozen.joint['pool'] if pools_map else {}}


def _parts(variables, *names: str) -> dict[str, Any]:
  """Returns 'params' and 'batch_stats' of some parts, in dicts of their own."""
  return {
    kind: {
      name: tree for name, tree in variables[kind].items() if name in names
    }
    for kind in network_lib.COLLECTIONS
  }


def _with_second(first, second) -> tuple[outputs.Outputs, ...]:
  """Returns Outputs of the first view that hold those of the second one."""
  return tuple(
    one.replace(second=other) for one, other in zip(first, second, strict=True)
  )


def _change(now, start) -> jax.Array:
  """Returns the sum of the squared differences of two trees' kernels."""
  squares = jax.tree.map(
    lambda x, y: jnp.sum(jnp.square(x - y)) if x.ndim > 1 else 0.0, now, start
  )
  return sum(jax.tree.leaves(squares))


def _connector(number: int) -> str:
  """Returns what the connector of a link is called among the variables."""
  return f'connector_{number}' if number else 'connector'
