"""What is compared: pairs, cells, seeds, and the recipe that all of them share.

A cell is a method with its settings on a pair of teacher and student; a run is
a cell with a seed. Runs of one seed and pair start from the same student and
see the same batches.
"""

from collections.abc import Iterator
import dataclasses
import json
import pathlib
from typing import Any

from ijckd_jax.runtime import config_utils
from ijckd_jax.training import experiment

FOLDER = pathlib.Path(__file__).parent
# A resnet20 of these pairs is below its own students (see README.md), which
# leaves nothing to learn from; this one is above them.
TEACHER = 'resnet14x2'
TEACHER_EPOCHS = 25.0
TEACHER_SETTINGS = {'dataset.crop_padding': 2}
NUM_TRAIN = NUM_TEST = 10_000
EPOCHS = 30.0
EVAL_EPOCHS = 3.0
RATES = (0.025, 0.05, 0.1, 0.2)
RATE_SEED = 100  # Of the runs that choose the learning rate, and of no other.
PAIRS = {
  'same': 'resnet8',
  'cross': 'wrn_16_1',
  'mobile': 'shufflenet_v2_cifar_x0_5',
}
STRONG = {
  'dataset.crop_padding': 2,
  'augment.randaugment_layers': 2,
  'augment.erasing_probability': 0.25,
}
NO_TARGET = {'logit_weight': 0.0, 'feature_weight': 0.0}


@dataclasses.dataclass(frozen=True)
class Cell:
  """A method with its settings on a pair.

  Attributes:
    pair: key of PAIRS.
    name: of the cell within the pair.
    method: name in methods.METHODS.
    fields: of the method, other than its defaults.
    settings: of the config, beside the method's.
    parts: of the study that the cell belongs to.
    num_seeds: 0, 1, ... so many.
  """

  pair: str
  name: str
  method: str
  fields: dict[str, Any]
  settings: dict[str, Any]
  parts: tuple[str, ...]
  num_seeds: int

  def config(self, teacher: str, seed: int):
    """Returns the config of a run.

    Args:
      teacher: folder of the teacher's run.
      seed: of the run.
    """
    config = recipe(PAIRS[self.pair], self.method)
    config.seed = seed
    config.optimizer.learning_rate = learning_rate(self.pair)
    config.teacher.backbone = TEACHER
    config.teacher.checkpoint = teacher
    settings = {f'method.{name}': value for name, value in self.fields.items()}
    config_utils.override(config, settings | self.settings)
    return config


def recipe(student: str, method: str):
  """Returns the config that all runs share, of one network."""
  config = experiment.default_config(
    dataset='fashion_pairs_100', teacher='', student=student, method=method
  )
  config.dataset.resolution = 'half'
  config.dataset.num_train = NUM_TRAIN
  config.dataset.num_test = NUM_TEST
  config.total_epochs = EPOCHS
  config.eval_epochs = EVAL_EPOCHS
  config.batch_size = 128
  config.optimizer.schedule = 'cosine'
  config.optimizer.warmup_epochs = 1.0
  config.optimizer.learning_rate = 0.1
  config.bounds.fit_examples = 0
  return config


def teacher_config():
  """Returns the config of the teacher's run."""
  config = recipe(TEACHER, 'ce')
  config.total_epochs = TEACHER_EPOCHS
  config_utils.override(config, TEACHER_SETTINGS)
  config.seed = 1000
  return config


def rate_config(pair: str, rate: float):
  """Returns the config of a run that helps to choose a learning rate.

  It is ranked by validation pairs, of garments that it is not trained on.
  """
  config = recipe(PAIRS[pair], 'ce')
  config.dataset.validation_fraction = 0.2
  config.eval_epochs = EPOCHS
  config.optimizer.learning_rate = rate
  config.seed = RATE_SEED
  return config


def learning_rate(pair: str) -> float:
  """Returns the one that was chosen for a pair's student.

  Raises:
    config_utils.UserError: none was.
  """
  path = FOLDER / 'learning_rates.json'
  chosen = json.loads(path.read_text()) if path.exists() else {}
  if pair not in chosen:
    raise config_utils.UserError(
      f'no learning rate for the pair {pair!r}: python -m '
      f'experiments.compare_methods rates WORKDIR --only {pair}'
    )
  return chosen[pair]['chosen']


def _cells() -> Iterator[Cell]:
  """Yields the cells in the order in which they are run."""

  def cell(parts, name, method, seeds, pair='same', settings=None, **fields):
    settings = dict(settings or {})
    plain = not any(key in settings for key in STRONG)
    if (
      _reads_teacher(method, fields)
      and plain
      and 'teacher.refit' not in settings
    ):
      settings['teacher.store.views'] = 1
    return Cell(
      pair, name, method, fields, settings, tuple(parts.split()), seeds
    )

  control = {'head': 'fresh', **NO_TARGET}
  yield cell('methods losses', 'ijckd', 'ijckd', 10)
  yield cell('methods', 'srrl', 'srrl', 10)
  yield cell('methods losses', 'simkd', 'simkd', 10)
  yield cell('methods', 'control', 'ijckd', 10, **control)
  yield cell('methods', 'ce', 'ce', 10)
  yield cell('methods', 'kd', 'kd', 10)

  # (b) Which head, under all three losses and under the labels alone.
  for head in ('own', 'copy', 'random', 'fresh'):
    yield cell('heads', f'head {head}', 'ijckd', 3, head=head)
  refit = {'teacher.refit': 'joint', 'teacher.refit_epochs': (10.0, 20.0)}
  yield cell('heads', 'head refit', 'ijckd', 3, settings=refit)
  for head in ('copy', 'random'):
    name = f'head {head}, labels'
    yield cell('heads', name, 'ijckd', 3, head=head, **NO_TARGET)
  # And which losses: all three are ijckd, features alone simkd.
  names = ('cross_entropy', 'logit', 'feature')
  for chosen in ((0,), (1,), (0, 1), (0, 2), (1, 2)):
    weights = {
      f'{name}_weight': 0.0 for i, name in enumerate(names) if i not in chosen
    }
    label = ' + '.join(names[i].replace('_', ' ') for i in chosen)
    yield cell('losses', label, 'ijckd', 3, **weights)

  for pair in ('mobile', 'cross'):
    yield cell('pairs', 'ijckd', 'ijckd', 3, pair)
    yield cell('pairs', 'srrl', 'srrl', 3, pair)
    yield cell('pairs', 'control', 'ijckd', 3, pair, **control)
    yield cell('pairs', 'ce', 'ce', 3, pair)
    yield cell('pairs', 'simkd', 'simkd', 3, pair)

  for connector, factor in (
    ('linear', 2),
    ('conv1x1', 2),
    ('bottleneck', 4),
    ('bottleneck', 8),
    ('bottleneck_depthwise', 2),
  ):
    name = connector + (f' {factor}' if connector == 'bottleneck' else '')
    yield cell(
      'connectors', name, 'ijckd', 3, connector=connector, factor=factor
    )

  # What the defaults of these two were when they were run.
  weights = {
    'dist': {'inter_weight': 1.0, 'intra_weight': 1.0},
    'reviewkd': {'weight': 1.0},
  }
  for name in (
    *('dkd', 'dist', 'vkd', 'reviewkd', 'at', 'fitnet', 'sp', 'vid', 'rkd'),
    'crd',
  ):
    yield cell('others', name, name, 3, **weights.get(name, {}))
  # 20 epochs of warm-up are of 240; so many are of 30.
  for name in ('dkd', 'reviewkd'):
    fields = {'warm_up_epochs': 2.5, **weights.get(name, {})}
    yield cell('others', f'{name}, warm-up 2.5', name, 3, **fields)
  standard = {'standardize': True, 'weight': 9.0, 'temperature': 2.0}
  yield cell('others', 'kd, standardised', 'kd', 3, **standard)

  for name in ('ce', 'srrl', 'simkd', 'ijckd'):
    yield cell('augmentation', f'{name}, strong', name, 3, settings=STRONG)


def _reads_teacher(method: str, fields) -> bool:
  """Returns whether a loss reads outputs of the teacher, which are stored."""
  labels_alone = all(fields.get(name) == 0.0 for name in NO_TARGET)
  return method != 'ce' and not labels_alone


CELLS = tuple(_cells())
PARTS = tuple(dict.fromkeys(part for cell in CELLS for part in cell.parts))


def find(pair: str, name: str) -> Cell:
  """Returns the cell of that name."""
  return next(c for c in CELLS if (c.pair, c.name) == (pair, name))


def runs() -> list[tuple[Cell, int]]:
  """Returns all runs: part by part, and the seeds of a part in their order."""
  order, seen = [], set()
  for part in PARTS:
    cells = [c for c in CELLS if part in c.parts]
    for seed in range(max(c.num_seeds for c in cells)):
      for c in cells:
        if seed < c.num_seeds and (key := run_name(c, seed)) not in seen:
          seen.add(key)
          order.append((c, seed))
  return order


def run_name(cell: Cell, seed: int) -> str:
  """Returns what a run is called, which is also its folder."""
  return f'{cell.pair}/{cell.name}/{seed}'.replace(' ', '_')
