"""Rejects invalid values of a config before anything is built."""

import math

import jax

from ijckd_jax.data import augment
from ijckd_jax.data import mixing as mixing_lib
from ijckd_jax.distillation import stored_outputs
from ijckd_jax.runtime import config_utils
from ijckd_jax.runtime import parallel
from ijckd_jax.training import durations

# How batches reach the devices, see feeding.
FEEDS = ('auto', 'device', 'host')


def check_values(
  config, *, num_devices: int, teacher_given: bool = False
) -> None:
  """Raises UserError where a value of a config (see experiment) is invalid.

  Args:
    config: the run's.
    num_devices: devices that share a batch.
    teacher_given: whether teachers come from Python, not from the config.
  """
  _check_choices(config)
  augment.check(config.augment)
  _check_store(config)
  _check_teachers(config.teacher, teacher_given)
  _check_devices(config)
  _check_max_growth(config.student)
  check_batches(config, num_devices)


def check_seeds(config) -> None:
  """Raises UserError where a seed does not fit into JAX's 32 bits."""
  seeds = {'seed': config.seed, 'teacher.seed': config.teacher.seed}
  for name, seed in seeds.items():
    if not 0 <= seed < 2**32:
      raise config_utils.UserError(
        f'{name}={seed}: a seed cannot be negative, or above {2**32 - 1}'
      )


def check_num_cpu_devices(config) -> None:
  """Raises UserError where there are fewer than 1."""
  if config.num_cpu_devices < 1:
    raise config_utils.UserError(
      f'num_cpu_devices={config.num_cpu_devices}: it must be at least 1'
    )


def _check_choices(config) -> None:
  """Raises UserError where a field that stands alone is wrong."""
  for what in ('total', 'log', 'eval', 'checkpoint'):
    _, value = durations.duration(config, what)
    if what != 'checkpoint' and not value:
      raise config_utils.UserError(
        f'no {what}_epochs, {what}_steps or {what}_examples: give one'
      )
  if config.mapper not in parallel.MAPPERS:
    raise config_utils.unknown('mapper', config.mapper, parallel.MAPPERS)
  if config.feed not in FEEDS:
    raise config_utils.unknown('feed', config.feed, FEEDS)
  if config.bundle not in ('last', 'best'):
    raise config_utils.unknown('bundle', config.bundle, ('last', 'best'))
  check_seeds(config)
  if not 0 < config.bounds.delta < 1:
    raise config_utils.UserError(
      f'bounds.delta={config.bounds.delta}: give a probability between 0 and 1'
    )
  if config.bounds.fit_examples < 0:
    raise config_utils.UserError(
      f'bounds.fit_examples={config.bounds.fit_examples}: it cannot be '
      'negative; 0 fits nothing'
    )
  if config.num_workers < 0:
    raise config_utils.UserError(
      f'num_workers={config.num_workers}: it cannot be negative'
    )
  config_utils.check_positive(
    'heartbeat_timeout_seconds', config.heartbeat_timeout_seconds
  )
  if not 0 <= config.ema_decay < 1:
    raise config_utils.UserError(
      f'ema_decay={config.ema_decay}: it must be in [0, 1)'
    )
  if config.keep_checkpoints < 1:
    raise config_utils.UserError(
      f'keep_checkpoints={config.keep_checkpoints}: it must be at least 1'
    )


def _check_store(config) -> None:
  """Raises UserError where the settings of stored outputs are invalid."""
  store = config.teacher.store
  if store.views < 0:
    raise config_utils.UserError(
      f'teacher.store.views={store.views}: it cannot be negative; 0 stores '
      'nothing'
    )
  if store.dtype not in stored_outputs.DTYPES:
    raise config_utils.unknown(
      'teacher.store.dtype', store.dtype, list(stored_outputs.DTYPES)
    )
  config_utils.check_positive('teacher.store.limit_gib', store.limit_gib)
  if store.views and mixing_lib.mixes_images(config.augment):
    raise config_utils.UserError(
      f'teacher.store.views={store.views}: mixup and cutmix mix an image with '
      'another one in each epoch, so that no view is seen twice and could be '
      'stored: set it to 0, or augment.mixup_alpha and augment.cutmix_alpha'
    )


def _check_devices(config) -> None:
  """Raises UserError where JAX has other devices than the config says."""
  if config.num_cpu_devices > 1 and (
    jax.default_backend() == 'cpu'
    and config.num_cpu_devices != jax.local_device_count()
  ):
    raise config_utils.UserError(
      f'num_cpu_devices={config.num_cpu_devices}, but JAX has started with '
      f'{jax.local_device_count()}: from Python, set jax_num_cpu_devices by '
      'jax.config.update before anything else'
    )


def check_batches(config, num_devices: int) -> None:
  """Raises UserError where batches cannot be divided over the devices."""
  for name in ('batch_size', 'eval_batch_size'):
    if config[name] < 1 or config[name] % num_devices:
      raise config_utils.UserError(
        f'{name}={config[name]}: it must be a positive multiple of the '
        f'{num_devices} devices'
      )
  rows = config.batch_size // num_devices
  if config.accumulation < 1 or rows % config.accumulation:
    raise config_utils.UserError(
      f'accumulation={config.accumulation}: it must divide the {rows} rows '
      'that a device gets of a batch'
    )
  if mixing_lib.mixes_images(config.augment):
    mixing_lib.check_rows(rows)


def _check_teachers(section, given) -> None:
  """Raises UserError where the settings of teachers and heads contradict."""
  if section.checkpoint and section.init_from:
    raise config_utils.UserError(
      'teacher.checkpoint is a teacher that is there, teacher.init_from the '
      'start of one to train: give one of them'
    )
  for name, known in (('head', ('', 'fit')), ('refit', ('', 'joint'))):
    if section[name] not in known:
      raise config_utils.unknown(f'teacher.{name}', section[name], known)
  for_given = section.others or section.joint or section.head
  if for_given and not section.checkpoint and not given:
    raise config_utils.UserError(
      'teacher.others, teacher.joint and teacher.head=fit are for teachers '
      'that are there: give teacher.checkpoint'
    )
  if section.head_views < 0:
    raise config_utils.UserError(
      f'teacher.head_views={section.head_views}: it cannot be negative'
    )
  if section.head_views and not section.head:
    raise config_utils.UserError(
      'teacher.head_views is for a head that is fitted: set teacher.head=fit'
    )
  if bool(section.refit) != bool(section.refit_epochs):
    raise config_utils.UserError(
      "teacher.refit='joint' and teacher.refit_epochs go together: give both, "
      'or neither'
    )
  epochs = tuple(section.refit_epochs)
  if any(epoch <= 0 for epoch in epochs) or list(epochs) != sorted(set(epochs)):
    raise config_utils.UserError(
      f'teacher.refit_epochs={epochs}: give them in their order, above 0'
    )
  if section.refit and section.store.views:
    raise config_utils.UserError(
      "teacher.refit changes the teacher's logits, which are not to be stored: "
      'set teacher.store.views=0'
    )


def _check_max_growth(section) -> None:
  """Raises UserError where a student could not grow at all."""
  if not 1 < section.max_growth < math.inf:
    raise config_utils.UserError(
      f'student.max_growth={section.max_growth}: it must be above 1'
    )


def check_drops(section, backbone, method) -> None:
  """Raises UserError where a student cannot drop what it is to drop.

  Args:
    section: `config.student`.
    backbone: the student's.
    method: the objective.
  """
  for name in ('drop_path', 'dropout'):
    if not 0 <= section[name] < 1:
      raise config_utils.UserError(
        f'student.{name}={section[name]}: it must be in [0, 1)'
      )
  if section.drop_path and not backbone.has_branches:
    raise config_utils.UserError(
      f'student.drop_path={section.drop_path}: a {section.backbone} has no '
      'stochastic depth here: set it to 0'
    )
  if section.dropout and method.predicts_with != 'own':
    raise config_utils.UserError(
      f'student.dropout={section.dropout} is for a student that predicts with '
      f"its own head, but {method} predicts with the head '"
      f"{method.predicts_with}': set it to 0"
    )


def check_unlabelled(config, method, *, teacher_given: bool) -> None:
  """Raises UserError where settings need classes, and the images have none.

  Args:
    config: the run's.
    method: the objective.
    teacher_given: whether teachers come from Python, not from the config.
  """
  section, why = config.teacher, 'the images have no classes'
  if not method.needs_teacher:
    raise config_utils.UserError(
      f'{why}, from which alone {config.method.name} learns: take method simkd '
      'and a teacher'
    )
  if config.student.dropout:
    raise config_utils.UserError(
      f'{why}, and the student no head before which to drop features: set '
      'student.dropout=0'
    )
  if not (section.checkpoint or teacher_given):
    raise config_utils.UserError(
      f'{why}, so that no teacher can be trained on them: give one that is '
      'there, by teacher.checkpoint'
    )
  if section.head or section.refit:
    raise config_utils.UserError(
      f'{why}, so that no head can be fitted on them: set teacher.head= and '
      'teacher.refit='
    )
  if config.bundle == 'best':
    raise config_utils.UserError(
      f'{why}, so that no step is known to be the best: set bundle=last'
    )


def check_refit(config, method) -> None:
  """Raises UserError where a head is refitted that the student does not use."""
  if config.teacher.refit and method.predicts_with != 'teacher':
    raise config_utils.UserError(
      f"teacher.refit is for a student that predicts with the teacher's head, "
      f'as that of {config.method.name} does not: set teacher.refit='
    )
