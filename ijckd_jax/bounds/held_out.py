"""Whether images were held out from a network: copies, and choices on them."""

from collections.abc import Iterator
import json
from typing import Any

from ijckd_jax.data import datasets
from ijckd_jax.data import duplicates
from ijckd_jax.runtime import config_utils

# Published test sets have copies of training images, which are left out. With
# more than a tenth, the split is not held out. Source: CIFAR-100 has 10%
# near-copies (Barz and Denzler 2020, https://arxiv.org/abs/1902.00423).
MOST_TRAINED = 0.1
MOST_CHOICES = 2**53  # Whole numbers that a float can hold.


def check(found: duplicates.Found, what: str) -> None:
  """Raises UserError where a split is largely one that was trained on.

  Args:
    found: copies in the split.
    what: name of the split in the message.
  """
  num = int(found.kept.sum()) + found.num_trained
  if not num:
    raise config_utils.UserError(
      f'{what}: none is left, because each one repeats another: give others'
    )
  if found.num_trained > MOST_TRAINED * num:
    raise config_utils.UserError(
      f'{what}: the student or its teacher was trained on '
      f'{found.num_trained:,} of the {num:,} images, where errors are no '
      'estimate of those elsewhere: give images that neither was trained on'
    )


def choices(info: dict[str, Any], split: str) -> int:
  """Returns among how many checkpoints a bundle was chosen by a split.

  Limits that are computed at delta divided by this number hold for whichever
  checkpoint was chosen. The data set is not asked for, because it may go by
  other names.

  Args:
    info: of the bundle.
    split: on which limits are measured.

  Raises:
    config_utils.UserError: the bundle's numbers are damaged.
  """
  run = _section(info, 'run')
  if run.get('best_by') != split:
    return 1
  number = run.get('choices')
  if number is None:
    if info.get('which') != 'best':
      return 1
    # An older bundle: there was at most one evaluation in each step.
    number = run.get('steps')
  if type(number) is not int or not 0 < number < MOST_CHOICES:
    raise config_utils.UserError(
      f'the bundle says that it is the best of {number!r} checkpoints, which '
      'is no whole number: it is damaged'
    )
  return number


def check_fields(
  info: dict[str, Any], fields: dict[str, Any], split: str
) -> None:
  """Raises UserError where a split would hold images that were trained on.

  That is a part of the training images, by other fields than in training.

  Args:
    info: of a bundle.
    fields: of the data set whose split is asked for, with its 'name'.
    split: 'train', 'validation' or 'test'.
  """
  made_on = _section(info, 'dataset')
  if split == 'test' or made_on.get('name') != fields['name']:
    return
  other = [
    name
    for name, value in made_on.items()
    if name not in ('data_dir', 'unlabelled')
    and json.dumps(fields.get(name)) != json.dumps(value)
  ]
  if other:
    raise config_utils.UserError(
      f'the split {split!r} of {fields["name"]} is taken from the training '
      f'images, and with another {", ".join(other)} than in training it would '
      'hold images that were trained on: leave the fields as they were'
    )


def trained_on(
  info: dict[str, Any], data_dir: str | None, trust_code: bool
) -> Iterator[tuple[Any, str]]:
  """Yields the training images that a bundle records.

  Args:
    info: of the bundle.
    data_dir: folder of the data sets, where they are not as recorded.
    trust_code: whether a data set outside the package may be imported.

  Yields:
    A split and ''; or None, and the reason why it is not known.
  """
  # Of a probe, the features were trained on other images than the head.
  names = [name for name in ('dataset', 'features_dataset') if name in info]
  if not names:
    yield None, 'it names no data set'
  for name in names:
    yield _training_images(_section(info, name), data_dir, trust_code)


def _training_images(made_on, data_dir, trust_code):
  name = made_on.get('name')
  if not isinstance(name, str):
    return None, 'it names no data set'
  if name not in datasets.DATASETS and not (trust_code and ':' in name):
    return None, f'its data set is {name!r}'
  reason = ''
  for folder in dict.fromkeys((None, data_dir)):
    try:
      cls = datasets.get(name)
      fields = config_utils.section(cls, name)
      config_utils.override(fields, made_on)
      if folder is not None:
        fields.data_dir = folder
      return config_utils.instantiate('dataset', cls, fields).load('train'), ''
    except config_utils.UserError as error:
      reason = config_utils.short(error)
  return None, reason


def _section(info, name: str) -> dict[str, Any]:
  """Returns a part of a bundle's info, which may be anything."""
  part = info.get(name)
  return part if isinstance(part, dict) else {}
