"""Whether images were held out from a network: copies, and choices on them."""

from typing import Any

from ijckd_jax.data import datasets
from ijckd_jax.data import duplicates
from ijckd_jax.runtime import config_utils

# Published test sets have copies of training images, which are left out. With
# more than a tenth, the split is not held out. Source: CIFAR-100 has 10%
# near-copies (Barz and Denzler 2020, https://arxiv.org/abs/1902.00423).
MOST_TRAINED = 0.1


def check(found: duplicates.Found, what: str) -> None:
  """Raises UserError where a split is largely one that was trained on.

  Args:
    found: copies in the split.
    what: name of the split in the message.
  """
  num = len(found.distinct)
  if found.trained is not None and found.trained > MOST_TRAINED * num:
    raise config_utils.UserError(
      f'{what}: {found.trained:,} of the {num:,} images are images that the '
      'student or its teacher was trained on, where errors are no estimate of '
      'those elsewhere: give images that neither was trained on'
    )


def choices(info: dict[str, Any], split: str, dataset: str) -> int:
  """Returns among how many checkpoints a bundle was chosen by a split.

  Limits hold for each of them by itself. If each takes its share of delta, they
  hold for the best one.

  Args:
    info: of the bundle.
    split: on which limits are measured.
    dataset: name of its data set.
  """
  run, made_on = (info.get(name) or {} for name in ('run', 'dataset'))
  if run.get('best_by') != split or made_on.get('name') != dataset:
    return 1
  if 'choices' in run:
    return max(1, int(run['choices']))
  # An older bundle: there was at most one evaluation for each step.
  return max(1, int(run['steps'])) if info.get('which') == 'best' else 1


def trained_on(info: dict[str, Any], data_dir: str | None, trust_code: bool):
  """Returns the training images that a bundle records.

  Args:
    info: of the bundle.
    data_dir: folder of the data sets; None: as recorded.
    trust_code: whether a data set outside the package may be imported.

  Returns:
    The split, and ''; or None, and the reason why it is not known.
  """
  made_on = info.get('dataset') or {}
  name = made_on.get('name')
  if name not in datasets.DATASETS and not (trust_code and name):
    return None, f'its data set is {name!r}' if name else 'it names no data set'
  try:
    cls = datasets.get(name)
    fields = config_utils.section(cls, name)
    config_utils.override(fields, made_on)
    if data_dir is not None:
      fields.data_dir = data_dir
    return config_utils.instantiate('dataset', cls, fields).load('train'), ''
  except config_utils.UserError as error:
    return None, config_utils.short(error)
