"""From a config to everything that a run is made of, before anything runs."""

from collections.abc import Callable
from collections.abc import Sequence
import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import optax

from ijckd_jax import models
from ijckd_jax.bundles import pretrained
from ijckd_jax.data import augment
from ijckd_jax.data import datasets
from ijckd_jax.data import mixing as mixing_lib
from ijckd_jax.distillation import binding
from ijckd_jax.distillation import connectors
from ijckd_jax.distillation import distiller as distiller_lib
from ijckd_jax.distillation import methods
from ijckd_jax.distillation import network
from ijckd_jax.distillation import steps
from ijckd_jax.distillation import stored_outputs
from ijckd_jax.distillation import teachers as teachers_lib
from ijckd_jax.runtime import backend
from ijckd_jax.runtime import config_utils
from ijckd_jax.runtime import parallel
from ijckd_jax.training import config_checks
from ijckd_jax.training import durations
from ijckd_jax.training import optim
from ijckd_jax.training import teacher_loading

DTYPES = {'float32': jnp.float32, 'bfloat16': jnp.bfloat16}


def default_config(
  *,
  dataset: str | None,
  teacher: str,
  student: str,
  method: str = 'ijckd',
) -> ml_collections.ConfigDict:
  """Returns a config with every field that there is, each with its default.

  Durations have three fields, of which one is given and the others are 0:
  `<what>_epochs`, `<what>_steps` and `<what>_examples`.

  Args:
    dataset: name or reference (datasets.DATASETS); fills `config.dataset`. None
      for arrays that are given from Python.
    teacher: the teacher's backbone (models.BACKBONES).
    student: the student's backbone.
    method: name or reference (methods.METHODS); fills `config.method`.
  """
  # Long, because a reader looks here for all fields, each with its comment.
  config = ml_collections.ConfigDict()
  config.seed = 0
  if dataset is None:
    config.dataset = {'name': 'arrays', 'fingerprint': 0}
  else:
    config.dataset = config_utils.section(datasets.get(dataset), dataset)
  config.teacher = {
    'backbone': teacher,
    # A bundle, a run or hf:OWNER/NAME@COMMIT; empty: train the teacher first.
    'checkpoint': '',
    # 'fit': a linear head on its features is fitted first, for the classes of
    # the data set; '': its own.
    'head': '',
    'head_views': 0,  # Augmented views of each image that it is fitted on too.
    # 'joint': the head is fitted again, on the features of teacher and student,
    # after each of refit_epochs.
    'refit': '',
    'refit_epochs': (),
    'others': (),  # Further teachers, as `checkpoint` names the first.
    'weights': (),  # Of the teachers' losses; none given: all alike.
    # Class i of a teacher is class i of the data set, whatever their names are.
    'classes_by_number': False,
    'joint': 0,  # Whose head is the joint classifier; 0: that of `checkpoint`.
    'fingerprint': 0,  # Of its arrays; a run fills it in.
    # A bundle whose backbone it starts from, where a run trains it.
    'init_from': '',
    'freeze_statistics': False,  # As student.freeze_statistics.
    'learning_rate': 0.05,
    'seed': 1000,  # Unlike the student's, lest they start alike.
    'total_epochs': 0.0,  # All three 0: as long as the student.
    'total_steps': 0,
    'total_examples': 0,
    'store': {
      'views': 0,  # Of each image, whose outputs are stored; 0: none are.
      'dtype': 'float16',
      'directory': '',  # Empty: in the run's folder.
      'limit_gib': 20.0,
    },
  }
  # `init_from`: a bundle of the same backbone, to start from.
  config.student = {
    'backbone': student,
    'init_from': '',
    'init_parts': ('backbone',),  # Of pretrained.PARTS, what it gives.
    # Where it starts from `init_from`: batch norm normalises by the running
    # statistics of that start, and keeps them. Better where images are few.
    'freeze_statistics': False,
    'drop_path': 0.0,  # Stochastic depth of the last block; see Backbone.
    'dropout': 0.0,  # Of the pooled features, before the student's own head.
    # Parameters of the deployed student, as a multiple of those without a
    # connector, that method.factor=auto keeps to.
    'max_growth': 1.5,
  }
  config.augment = augment.default_config()  # Of what both of them see.
  config.method = methods.section(method)
  config.optimizer = optim.default_config()
  config.batch_size = 64  # Of all devices and processes together.
  config.eval_batch_size = 256
  config.accumulation = 1  # Parts in which a device works through its rows.
  config.ema_decay = 0.0  # 0: no moving average.
  config.sync_batch_norm = False  # False: statistics per device, averaged.
  # What batch norm keeps for inference: True follows the unbiased variance, as
  # PyTorch does, False the biased one, as Flax does.
  config.unbiased_variance = False
  config.dtype = 'float32'
  config.total_epochs = 0.0
  config.total_steps = config.total_examples = 0
  config.log_epochs = 1.0
  config.log_steps = config.log_examples = 0
  config.eval_epochs = 1.0
  config.eval_steps = config.eval_examples = 0
  # Beside the checkpoints that follow each evaluation.
  config.checkpoint_epochs = 0.0
  config.checkpoint_steps = config.checkpoint_examples = 0
  config.keep_checkpoints = 2  # The last ones; the best is kept beside them.
  config.bundle = 'last'  # Or 'best', by the validation split or the test set.
  # Of the report at the end: with what probability any of its limits may fail,
  # and on how many training images the joint head is fitted; 0: on none.
  config.bounds = {'delta': 0.05, 'fit_examples': 5000}
  config.mapper = 'pmap'
  config.num_workers = 0  # Processes that decode images; 0: a thread does.
  # 'host': each step is sent its images. 'device': the training set lies on the
  # devices, and a call makes many steps. 'auto': 'device' on GPUs and TPUs,
  # where it is possible.
  config.feed = 'auto'
  # After which a silent host is taken for dead, and the others are aborted.
  config.heartbeat_timeout_seconds = 30
  config.num_cpu_devices = 1
  # Where commands keep compiled programs: 'default' is a folder in the user's
  # cache directory, '' none.
  config.compilation_cache = 'default'
  # Trackers: wandb, mlflow, trackio, or package.module:Name.
  config.writers = ()
  return config


def teacher_config(
  config: ml_collections.ConfigDict,
) -> ml_collections.ConfigDict:
  """Returns the config by which a run trains its own teacher."""
  own = ml_collections.ConfigDict(config.to_dict())
  own.student.backbone = config.teacher.backbone
  own.student.init_from = config.teacher.init_from
  own.student.init_parts = ('backbone',)
  own.student.freeze_statistics = config.teacher.freeze_statistics
  own.student.drop_path = own.student.dropout = 0.0
  own.method = methods.section('ce')
  own.optimizer.learning_rate = config.teacher.learning_rate
  if not config.teacher.init_from:
    own.optimizer.layer_decay = 1.0
  own.seed = config.teacher.seed
  own.ema_decay = 0.0
  if durations.duration(config.teacher, 'total')[1]:
    for unit in durations.UNITS:
      own[f'total_{unit}'] = config.teacher[f'total_{unit}']
  for field in own.teacher:
    if field != 'store':
      own.teacher[field] = type(own.teacher[field])()
  plain = default_config(dataset=None, teacher='', student='', method='ce')
  own.teacher.store = plain.teacher.store
  own.augment = plain.augment
  return own


@dataclasses.dataclass(frozen=True)
class Experiment:
  """What a run is made of, but for arrays.

  Attributes:
    config: the config that it was made from.
    dataset: see datasets.
    distiller: student, teachers and method.
    teachers: those that are given, or trained first, that with the joint
      classifier first; a method that learns without a teacher has the first
      alone. Where they are still to be trained, or their heads to be fitted,
      they have shapes in place of arrays.
    teacher_run: the experiment that trains the teacher first; None where
      teachers are given, or none is needed.
    augmentation: of the training images.
    mapper: see parallel.
    dtype: of the computation.
    stored: which of the teacher's outputs are stored; None where none are.
    start: where the student's backbone starts; None: at random.
    mixing: of the augmented images and their labels; None where neither are
      mixed or smoothed.
    fitted: of each teacher's head that was fitted, what it is worth (JSON).
    notes: on the teachers' classes, in sentences.
  """

  config: ml_collections.ConfigDict
  dataset: Any
  distiller: distiller_lib.Distiller
  teachers: tuple[teachers_lib.Teacher, ...]
  teacher_run: 'Experiment | None'
  augmentation: augment.Augmentation
  mapper: parallel.Mapper
  dtype: Any
  stored: stored_outputs.Stored | None
  start: pretrained.Start | None
  mixing: mixing_lib.Mixing | None
  fitted: tuple[dict[str, Any], ...] = ()
  notes: tuple[str, ...] = ()

  @property
  def teacher(self) -> teachers_lib.Teacher | None:
    """The teacher that the student is compared with at the end.

    It has the joint classifier; None where there is no teacher.
    """
    return self.teachers[0] if self.teachers else None

  @property
  def frozen(self) -> distiller_lib.Frozen:
    """The arrays that are not trained, as a step takes them."""
    arrays = tuple(teacher.arrays for teacher in self.teachers)
    return distiller_lib.Frozen(arrays, self.distiller.fixed_head)

  def with_teachers(
    self, given: Sequence[teachers_lib.Teacher]
  ) -> 'Experiment':
    """Returns the same with teachers whose arrays are there.

    Args:
      given: in the order of `teachers`, of the same shapes.

    Raises:
      config_utils.UserError: a teacher has other shapes.
    """
    teacher_loading.check_same_shapes(given, self.teachers)
    distiller = self.distiller
    if distiller.links:
      distiller = distiller.with_teachers(given)
    return dataclasses.replace(self, teachers=tuple(given), distiller=distiller)

  def init(self, key: jax.Array) -> dict[str, Any]:
    """Returns 'params' and 'batch_stats' with which training starts."""
    variables = jax.jit(self.distiller.init, static_argnums=1)(
      key, tuple(self.dataset.image_shape)
    )
    if self.distiller.method.predicts_with == 'copy':
      variables['params']['head'] = jax.tree.map(
        jnp.array, self.teachers[0].head
      )
    if self.distiller.adapting is not None:
      for kind in network.COLLECTIONS:
        variables[kind]['teacher'] = jax.tree.map(
          jnp.array, self.teachers[0].variables[kind]['backbone']
        )
    if self.start is None:
      return variables
    return self.start.fill(variables, self.distiller.network.backbone)

  def abstract_teacher(self) -> teachers_lib.Teacher:
    """Returns the teacher that this run will leave, with shapes for arrays."""
    return teacher_loading.abstract(
      self.distiller.deployed_network,
      self.config.student.backbone,
      tuple(self.dataset.image_shape),
      self.dataset.class_names,
    )

  def memory(self, key: jax.Array, num_examples: int) -> Any:
    """Returns what the method keeps in the state at the start, or None."""
    if not self.distiller.remembers:
      return None
    key = jax.random.fold_in(key, steps.METHOD_STREAM)
    return self.distiller.method.memory(key, num_examples)

  def total_steps(self, num_examples: int) -> int:
    """Returns the steps of the run."""
    return durations.to_steps(
      self.config,
      'total',
      num_examples=num_examples,
      batch_size=self.config.batch_size,
    )

  def next_due(self, what: str, step: int, num_examples: int) -> float:
    """Returns the first step after `step` at which `what` is due.

    Args:
      what: 'log', 'eval' or 'checkpoint'.
      step: counted from 1.
      num_examples: of the training set.

    Returns:
      A step; infinity where it is never due but after the last step.
    """
    return durations.next_period_end(
      self.config,
      what,
      step,
      num_examples=num_examples,
      batch_size=self.config.batch_size,
    )

  def optimizer(
    self, num_examples: int
  ) -> tuple[optax.GradientTransformation, optax.Schedule]:
    """Returns the optimizer, and its learning rate by step."""
    unit, value = durations.duration(self.config, 'total')
    schedule = optim.make_schedule(
      self.config.optimizer,
      num_examples=num_examples,
      batch_size=self.config.batch_size,
      total_steps=self.total_steps(num_examples),
      total=f'total_{unit}={value}',
    )
    stages = None
    if self.config.optimizer.layer_decay != 1:
      network = self.distiller.network
      size = (*network.preprocessing.size, self.dataset.image_shape[2])
      images = jax.ShapeDtypeStruct((1, *size), jnp.float32)
      stages = network.backbone.stages_of_layers(images)
    tx = optim.make_optimizer(self.config.optimizer, schedule, stages)
    return tx, schedule

  def abstract_batch(
    self, num_rows: int, *, with_teacher: bool
  ) -> dict[str, Any]:
    """Returns the shapes of a batch.

    Args:
      num_rows: of the batch.
      with_teacher: whether it holds stored outputs, as every batch does once
        the run has stored them.
    """
    row = jax.ShapeDtypeStruct((num_rows,), jnp.int32)
    batch: dict[str, Any] = {
      'image': jax.ShapeDtypeStruct(
        (num_rows, *self.dataset.image_shape), jnp.uint8
      ),
      **dict.fromkeys(('label', 'index', 'epoch'), row),
    }
    if with_teacher:
      assert self.stored is not None, 'the run stores no outputs'
      batch['teacher'] = {
        name: jax.ShapeDtypeStruct((num_rows, *shape), self.stored.dtype)
        for name, shape in self.stored.shapes.items()
      }
    return batch

  def train_step(
    self, tx: optax.GradientTransformation, *, returns_rows: bool = False
  ) -> Callable:
    """Returns steps.train_step of one device, as a function of four arrays.

    Args:
      tx: the optimizer.
      returns_rows: see steps.train_step.
    """
    return functools.partial(
      steps.train_step,
      distiller=self.distiller,
      tx=tx,
      augmentation=self.augmentation,
      ema_decay=self.config.ema_decay,
      num_pieces=self.config.accumulation,
      stored=self.stored,
      mixing=self.mixing,
      returns_rows=returns_rows,
    )

  def map_train_step(
    self, step: Callable, *, rows_out: bool = False
  ) -> Callable:
    """Returns a training step compiled and mapped; it donates the state."""
    return self.mapper.map(
      step,
      rows_in=(False, False, True, False),
      rows_out=rows_out,
      donate=0,  # The state; teachers, batch and key stay.
    )

  def map_train_steps(self, step: Callable) -> Callable:
    """Returns a call of many training steps, compiled and mapped.

    It is a function of the arguments of steps.train_steps from the state on,
    and donates the state.
    """
    image_shape = tuple(self.dataset.image_shape)
    return self.mapper.map(
      functools.partial(steps.train_steps, step, image_shape),
      rows_in=(False, False, True, False, False, False),
      donate=0,
    )


def _num_normalised(config, num_devices: int) -> int:
  """Returns how many images a batch norm sees in a training step."""
  images = config.batch_size // config.accumulation
  return images if config.sync_batch_norm else images // num_devices


def build(
  config: ml_collections.ConfigDict,
  *,
  dataset: Any = None,
  teacher: teachers_lib.Teacher | Sequence[teachers_lib.Teacher] | None = None,
  devices: Sequence[Any] | None = None,
) -> Experiment:
  """Returns the experiment that a config describes; nothing runs or compiles.

  Args:
    config: see `default_config`.
    dataset: overrides `config.dataset`.
    teacher: overrides `config.teacher`; one, or several as they are listed
      there.
    devices: that share a batch; None: all that JAX has. Devices that the step
      is only compiled for take `config.mapper='shard_map'`.

  Raises:
    config_utils.UserError: something in the config is wrong.
  """
  # Long, because it is the order in which a config is resolved: whatever fails
  # here costs nothing, and later parts take what earlier ones made.
  backend.start()
  if config.dtype not in DTYPES:
    raise config_utils.unknown('dtype', config.dtype, list(DTYPES))
  dtype = DTYPES[config.dtype]
  if dataset is None:
    dataset = config_utils.instantiate(
      'dataset', datasets.get(config.dataset.name), config.dataset
    )
  image_shape = tuple(dataset.image_shape)
  method = methods.build(config.method)
  num_devices = jax.device_count() if devices is None else len(devices)
  config_checks.check_values(
    config, num_devices=num_devices, teacher_given=teacher is not None
  )
  config_checks.check_refit(config, method)
  mixing = mixing_lib.build(config.augment)
  datasets.check_statistics(dataset.mean, dataset.std, image_shape[-1])
  axis_name = parallel.AXIS if config.sync_batch_norm else None
  start, preprocessing = _start(config, dataset)
  settings = {
    'tap': method.tap,
    'axis_name': axis_name,
    'dtype': dtype,
    'unbiased_variance': config.unbiased_variance,
    'drop_path': config.student.drop_path,
    'freeze_statistics': config.student.freeze_statistics and start is not None,
  }
  if start is None:
    backbone = models.build(config.student.backbone, **settings)
  else:
    backbone = start.build_backbone(**settings)
  config_checks.check_drops(config.student, backbone, method)
  if not datasets.has_classes(dataset):
    config_checks.check_unlabelled(
      config, method, teacher_given=teacher is not None
    )
  teacher_run = None
  if method.needs_teacher and teacher is None and not config.teacher.checkpoint:
    teacher_run = build(
      teacher_config(config), dataset=dataset, devices=devices
    )
    teacher = teacher_run.abstract_teacher()
  given, weights, notes = _teachers(config, dataset, teacher, dtype)
  if given and _asks_for_factor(config.method):
    student = network.plain(backbone, preprocessing)
    method = _with_factor(config, dataset, given, student, start)
  distiller = binding.bind(
    backbone=backbone,
    preprocessing=preprocessing,
    method=method,
    given=given,
    weights=weights,
    image_shape=image_shape,
    num_classes=len(dataset.class_names),
    axis_name=axis_name,
    dtype=dtype,
    mixed=mixing is not None,
    seed=config.seed,
    num_rows=min(2, _num_normalised(config, num_devices)),
    dropout=config.student.dropout,
  )
  if start is not None:  # Raises where the weights do not fit.
    start.fill(
      jax.eval_shape(lambda: distiller.init(jax.random.key(0), image_shape)),
      backbone,
    )
  stored, views = None, config.teacher.store.views
  if views:
    stored = stored_outputs.plan(
      distiller, image_shape, config.teacher.store.dtype
    )
  return Experiment(
    config=config,
    dataset=dataset,
    distiller=distiller,
    teachers=given if method.needs_teacher else given[:1],
    teacher_run=teacher_run,
    augmentation=augment.build(config.augment, dataset, views),
    mapper=parallel.Mapper(config.mapper, tuple(devices or ()) or None),
    dtype=dtype,
    stored=stored,
    start=start,
    mixing=mixing,
    notes=notes,
  )


def _asks_for_factor(section) -> bool:
  """Returns whether a method's `factor` is auto, and its connector has one."""
  return section.get('factor') == config_utils.AUTO and connectors.has_factor(
    section.get('connector', 'bottleneck')
  )


def _with_factor(config, dataset, given, student, start):
  """Returns the method, with a factor in place of `auto`.

  That is the one of the connector that the student starts from, if it does.

  Args:
    config: the run's.
    dataset: see datasets.
    given: the teachers, that with the joint classifier first.
    student: network.Network without a connector.
    start: pretrained.Start, or None.
  """

  def method_of(factor):
    return methods.build({**config.method, 'factor': factor})

  if start is not None and start.factor is not None:
    return method_of(start.factor)
  factor = binding.smallest_factor(
    student,
    given[0],
    method_of,
    tuple(dataset.image_shape),
    len(dataset.class_names),
    config.student.max_growth,
  )
  return method_of(factor)


def _start(config, dataset):
  """Returns where the student's backbone starts, and its preprocessing."""
  height, width, _ = dataset.image_shape
  if not config.student.init_from:
    return None, augment.Preprocessing(
      tuple(dataset.mean), tuple(dataset.std), (height, width)
    )
  start = pretrained.load(
    config.student.init_from,
    config.student.backbone,
    tuple(dataset.image_shape),
    parts=tuple(config.student.init_parts),
    class_names=dataset.class_names,
  )
  return start, start.preprocessing


def _teachers(config, dataset, given, dtype):
  """Returns the teachers of a run, their weights, and notes on their classes.

  Args:
    config: the run's.
    dataset: see datasets.
    given: a teacher, or several as the config lists them; None: those that the
      config names, if any.
    dtype: of the computation.
  """
  section = config.teacher
  if isinstance(given, teachers_lib.Teacher):
    given = (given,)
  if given is None:
    given = teacher_loading.load(section, dtype) if section.checkpoint else ()
  given, weights = teacher_loading.order(given, section)
  if not datasets.has_classes(dataset):
    given = tuple(teacher.without_head() for teacher in given)
  if section.head == 'fit':
    num_classes = len(dataset.class_names)
    given = tuple(
      teacher.with_head(network.head_shapes(teacher.num_features, num_classes))
      for teacher in given
    )
  for teacher in given:
    teacher_loading.check(teacher, dataset)
  notes: tuple[str, ...] = ()
  if section.head != 'fit':
    given, notes = teacher_loading.in_class_order(
      given, dataset, by_number=section.classes_by_number
    )
  return given, weights, notes
