"""Flags of the commands that run a bundle on a data set."""

import argparse
import sys

from ijckd_jax.runtime import config_utils


def add_flags(parser: argparse.ArgumentParser) -> None:
  """Adds what says which network is run, on what, and how."""
  add_data_flags(parser)
  parser.add_argument(
    '--batch_size', type=int, help='default: as in the run that made the bundle'
  )
  parser.add_argument(
    '--num_workers',
    type=int,
    default=0,
    help='processes that decode images which do not lie in memory',
  )


def add_data_flags(parser: argparse.ArgumentParser) -> None:
  """Adds what says which network is run, and on what."""
  parser.add_argument(
    '--bundle', required=True, help='folder of a bundle, or of a finished run'
  )
  parser.add_argument(
    '--dataset',
    help='name or package.module:Name; default: what the bundle was trained on',
  )
  parser.add_argument(
    '--dataset_fields', help='key=value,key=value; default: as in training'
  )
  parser.add_argument('--data_dir', help='where the data sets lie')
  parser.add_argument(
    '--classes_by_number',
    action='store_true',
    help="class i is the data set's class i, whatever their names are",
  )
  parser.add_argument(
    '--trust_code',
    action='store_true',
    help='the bundle may name code outside the package, which is imported, or '
    'hold programs',
  )


def batch_size_of(bundle, flags: argparse.Namespace) -> int:
  """Returns the rows of a batch, which the devices share."""
  import jax

  batch_size = flags.batch_size
  if batch_size is None:
    batch_size = bundle.info.get('eval_batch_size', 256)
  num_devices = jax.local_device_count()
  if batch_size < 1 or batch_size % num_devices:
    raise config_utils.UserError(
      f'--batch_size {batch_size}: it must be a positive multiple of the '
      f'{num_devices} devices'
    )
  return batch_size


def check_fits(
  what: str,
  bundle,
  dataset,
  *,
  has_head: bool = True,
  has_classes: bool = True,
) -> None:
  """Raises where a bundle cannot be evaluated on a data set.

  Args:
    what: how messages call it.
    bundle: bundles.Bundle.
    dataset: see datasets.
    has_head: whether its own head is to predict.
    has_classes: whether the data set must have classes.
  """
  num_classes = len(dataset.class_names)
  if has_head:
    bundle.check_head(f'the {what}')
  if has_classes and not num_classes:
    raise config_utils.UserError(
      'the images of the data set have no classes, so that nothing is right or '
      'wrong on them: give --dataset with classes'
    )
  if has_head and num_classes and num_classes != len(bundle.class_names):
    raise config_utils.UserError(
      f'the {what} tells {len(bundle.class_names)} classes apart, but the data '
      f'set has {num_classes}'
    )
  if dataset.image_shape[-1] not in (1, bundle.image_shape[-1]):
    raise config_utils.UserError(
      f'the {what} reads images of {bundle.image_shape[-1]} channels, but the '
      f"data set's have {dataset.image_shape[-1]}"
    )


def in_class_order(
  what: str, bundle, dataset, flags: argparse.Namespace, *, beside=()
):
  """Returns a bundle with its classes in the data set's order.

  A note is printed if the order was changed, or could not be compared.

  Args:
    what: how messages call the bundle.
    bundle: bundles.Bundle that `check_fits` has passed.
    dataset: see datasets.
    flags: of `add_data_flags`.
    beside: class names of the bundle that it is compared with, which count
      where the data set's classes have none.

  Raises:
    config_utils.UserError: its classes are others.
  """
  from ijckd_jax.data import classes

  order = class_order(what, bundle, dataset, flags, beside=beside)
  if order is None:
    return bundle
  names = classes.first_named(dataset.class_names, beside)
  return bundle.in_order(order, names)


def class_order(
  what: str, bundle, dataset, flags: argparse.Namespace, *, beside=()
):
  """Returns what classes.match does; see `in_class_order`."""
  from ijckd_jax.data import classes

  names = classes.first_named(dataset.class_names, beside)
  of = 'the data set' if names is dataset.class_names else 'the bundle'
  order, note = classes.match(
    bundle.class_names,
    names,
    what=what,
    of=of,
    by_number=flags.classes_by_number,
  )
  if note:
    print(f'note: {note}', file=sys.stderr)
  return order


def dataset_of(bundle, flags: argparse.Namespace):
  """Returns the data set that the flags ask for."""
  from ijckd_jax.data import datasets

  fields = dataset_fields(bundle, flags)
  return config_utils.instantiate('dataset', datasets.get(fields.name), fields)


def dataset_fields(bundle, flags: argparse.Namespace):
  """Returns the fields of the data set that the flags ask for.

  Those that the flags do not name are the bundle's data set's own, if it is the
  same one; of another, pictures become as large as the bundle takes them.
  """
  from ijckd_jax.data import datasets

  made_on = bundle.info.get('dataset', {})
  name = flags.dataset or made_on.get('name')
  if not name or not isinstance(name, str):
    raise config_utils.UserError('the bundle names no data set: give --dataset')
  if not flags.dataset:
    if name == 'arrays':
      raise config_utils.UserError(
        'the bundle was trained on arrays from Python, which it does not hold: '
        'give --dataset'
      )
    if name not in datasets.DATASETS and not flags.trust_code:
      raise config_utils.UserError(
        f'the bundle was trained on {name!r}, which is code outside the '
        'package: give --trust_code to import it, or --dataset'
      )
  cls = datasets.get(name)
  fields = config_utils.section(cls, name)
  if name == made_on.get('name'):
    config_utils.override(fields, made_on)
    if 'unlabelled' in fields:  # They teach, but nothing is right or wrong.
      fields.unlabelled = ''
  elif 'resize' in fields:
    from ijckd_jax.deploy import deployed

    fields.size = bundle.image_shape[0]
    fields.resize = deployed.crop_of(bundle).resize
  try:
    _set_fields(fields, flags.dataset_fields)
  except config_utils.UserError as error:
    raise config_utils.UserError(f'--dataset_fields: {error}') from error
  if flags.data_dir is not None:
    fields.data_dir = flags.data_dir
  return fields


def _set_fields(fields, arg: str | None) -> None:
  """Sets the fields that `key=value,key=value` names, by their types."""
  unset = {key: None for key in fields if key != 'name'}
  for key, text in config_utils.parse_arg(arg, **unset).items():
    if text is None:
      continue
    try:
      fields[key] = config_utils.parse_value(text, like=fields[key])
    except (TypeError, ValueError) as error:
      kind = type(fields[key]).__name__
      raise config_utils.UserError(
        f'{key}={text!r} is not of type {kind}'
      ) from error
