"""How large a student will be beside its teacher, said before it is trained."""

from collections.abc import Iterator
from collections.abc import Mapping
import dataclasses

from ijckd_jax.bundles import bundles
from ijckd_jax.distillation import binding
from ijckd_jax.distillation import connectors
from ijckd_jax.distillation import methods
from ijckd_jax.runtime import config_utils

# A student with a larger share of its teacher's parameters is hardly small.
MAX_SHARE = 0.5
# Factors of a bottleneck that a warning may propose, tried in this order.
FACTORS = (4, 8, 16, 32)
# Smaller connectors than the bottleneck, largest first; see connectors.
SMALLER = ('bottleneck_depthwise', 'conv1x1')


@dataclasses.dataclass(frozen=True)
class Sizes:
  """Numbers of parameters: of the deployed student, and of its teacher.

  Attributes:
    student: by 'backbone', 'connector' and 'head'.
    teacher: in total.
  """

  student: Mapping[str, int]
  teacher: int

  @property
  def total(self) -> int:
    """Parameters of the deployed student."""
    return sum(self.student.values())

  @property
  def is_large(self) -> bool:
    """Whether the student has over MAX_SHARE of its teacher's parameters."""
    return self.total > MAX_SHARE * self.teacher

  @property
  def has_large_connector(self) -> bool:
    """Whether the connector has more parameters than the backbone."""
    return self.student['connector'] > self.student['backbone']


def of(exp, variables) -> Sizes:
  """Returns the sizes of a student and of the teacher that it learns from.

  Args:
    exp: experiment.Experiment, which has a teacher.
    variables: the student's 'params' and 'batch_stats', or their shapes.
  """
  deployed = exp.distiller.deployed(variables, exp.frozen)
  teacher = sum(exp.teacher.num_params.values())
  return Sizes(bundles.num_params(deployed), teacher)


def line(exp, sizes: Sizes) -> str:
  """Returns a sentence with the parameters of student and teacher."""
  parts = ', '.join(f'{name} {n:,}' for name, n in sizes.student.items() if n)
  network = exp.distiller.connected_network
  if (
    exp.config.method.get('factor') == config_utils.AUTO
    and network is not None
    and isinstance(network.connector, connectors.Bottleneck)
  ):
    parts += f'; method.factor=auto took {network.connector.factor}'
  return (
    f'the student {exp.config.student.backbone} will be deployed with '
    f'{sizes.total:,} parameters ({parts}), {sizes.total / sizes.teacher:.1%} '
    f'of the {sizes.teacher:,} of its teacher {exp.teacher.name}'
  )


def warning(exp, sizes: Sizes) -> str:
  """Returns what is wrong with the sizes, and a setting that repairs it.

  Empty if the student is small beside its teacher, and its connector beside its
  backbone.
  """
  wrong = []
  itself = exp.config.student.init_from == exp.config.teacher.checkpoint
  if sizes.is_large and not (itself and exp.start is not None):
    wrong.append(f"the student has over {MAX_SHARE:.0%} of its teacher's size")
  if sizes.has_large_connector:
    wrong.append('its connector is larger than its backbone')
  if not wrong:
    return ''
  plain = dataclasses.replace(sizes, student={**sizes.student, 'connector': 0})
  remedy = 'take a smaller student'
  if not plain.is_large:
    remedy = "a method that predicts with the student's own head, such as srrl "
    remedy += 'or kd, deploys no connector'
    for setting, connector in _smaller_connectors(exp):
      student = {**sizes.student, 'connector': connector}
      other = dataclasses.replace(sizes, student=student)
      if not (other.is_large or other.has_large_connector):
        remedy = (
          f'--config.method.{setting} makes it {other.total:,} parameters'
        )
        break
  return f'{" and ".join(wrong)}: {remedy}'


def _smaller_connectors(exp) -> Iterator[tuple[str, int]]:
  """Yields settings FIELD=VALUE, and the parameters of their connector."""
  section = exp.config.method.to_dict()
  candidates = [('factor', f) for f in FACTORS if f > section.get('factor', f)]
  if 'connector' in section:
    candidates += [('connector', name) for name in SMALLER]
  for field, value in candidates:
    method = methods.build({**section, field: value})
    try:
      count = binding.num_connector_params(
        exp.distiller.network,
        exp.teacher,
        method,
        tuple(exp.dataset.image_shape),
      )
    except config_utils.UserError:  # It does not fit this teacher.
      continue
    yield f'{field}={value}', count
