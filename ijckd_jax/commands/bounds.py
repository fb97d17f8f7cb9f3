"""The bound on the error of a finished student, by command.

ijckd bounds --bundle STUDENT --teacher TEACHER --dataset NAME
"""

import argparse
import copy
import json
import math
import os
import sys

import numpy as np

from ijckd_jax.commands import bundle_flags
from ijckd_jax.runtime import config_utils

PROG = 'python -m ijckd_jax bounds'
OTHER_HEAD = (
  "the student uses another head than this teacher's bundle: it was fitted "
  'again, or this is not its teacher. "Teacher" above means the features of '
  "this teacher, read by the student's head"
)


def _flags(argv: list[str], prog: str) -> argparse.Namespace:
  parser = config_utils.ArgumentParser(
    prog=prog,
    description='Measures how a student and its teacher are aligned, and what '
    "that bounds the student's error by.",
  )
  bundle_flags.add_flags(parser)
  parser.add_argument(
    '--teacher',
    required=True,
    help='bundle, or run, of the teacher that the student learned from',
  )
  parser.add_argument(
    '--split',
    default='test',
    choices=('validation', 'test'),
    help='labelled images on which neither was trained',
  )
  parser.add_argument(
    '--unlabelled',
    help="data set on which the student's error is bounded without labels",
  )
  parser.add_argument(
    '--unlabelled_fields',
    help='key=value,key=value; default: as in training, where the bundle was '
    'trained on that data set',
  )
  parser.add_argument(
    '--unlabelled_split',
    default='test',
    choices=('train', 'validation', 'test'),
  )
  parser.add_argument(
    '--known',
    action='append',
    default=[],
    metavar='FAMILY=DIR[,DIR]',
    help='outputs of this command on other shifts of one kind, whose labels '
    'are known: they calibrate the estimate for --unlabelled; give it once for '
    'each kind',
  )
  parser.add_argument(
    '--delta',
    type=float,
    default=0.05,
    help='probability that any of the limits fails',
  )
  parser.add_argument(
    '--fit_examples',
    type=int,
    default=5000,
    help='training images on which the joint head is fitted; 0: none',
  )
  parser.add_argument('--seed', type=int, default=0, help='of these images')
  parser.add_argument(
    '--output',
    type=config_utils.expand,
    help='folder for report.md, bounds.json and the plots',
  )
  parser.add_argument('--json', action='store_true', help='print JSON')
  flags = parser.parse_args(argv)
  if not 1e-9 < flags.delta < 1:
    parser.error(
      f'--delta {flags.delta}: give a probability between 0 and 1, such as 0.05'
    )
  if flags.fit_examples < 0 or flags.seed < 0:
    parser.error('--fit_examples and --seed cannot be negative')
  if flags.known and not flags.unlabelled:
    parser.error('--known calibrates --unlabelled: give that too')
  return flags


def main(argv: list[str], prog: str = PROG) -> None:
  """Runs the command."""
  flags = _flags(argv, prog)

  from ijckd_jax.bounds import calibration
  from ijckd_jax.bounds import held_out
  from ijckd_jax.bounds import measure
  from ijckd_jax.bounds import pairs
  from ijckd_jax.bundles import bundles
  from ijckd_jax.runtime import compilation_cache
  from ijckd_jax.runtime import parallel

  path = os.path.realpath(bundles.find(flags.bundle))
  known = calibration.read(flags.known, path)
  compilation_cache.enable(compilation_cache.DEFAULT)
  student = bundles.load(flags.bundle, trust_code=flags.trust_code)
  connected = _connected(student, flags)
  teacher_bundle = bundles.load(flags.teacher, trust_code=flags.trust_code)
  dataset = bundle_flags.dataset_of(student, flags)
  batch_size = bundle_flags.batch_size_of(student, flags)
  networks = student, teacher_bundle, connected
  _check_fits(*networks, dataset)
  other = _unlabelled(networks, dataset, flags)
  choices = max(
    math.prod(
      held_out.choices(bundle.info, split)
      for bundle in (student, teacher_bundle)
    )
    for split in (flags.split, flags.unlabelled and flags.unlabelled_split)
  )
  _check_splits((student, teacher_bundle), flags)
  trained = _trained_on({'student': student, 'teacher': teacher_bundle}, flags)
  order = bundle_flags.class_order('the bundle', student, dataset, flags)
  if order is not None:
    student = student.in_order(order, dataset.class_names)
    connected = connected and connected.in_order(order, dataset.class_names)
  if connected is None:
    teacher_bundle = bundle_flags.in_class_order(
      'the teacher', teacher_bundle, dataset, flags, beside=student.class_names
    )
  teacher = teacher_bundle.teacher()
  if connected is not None:
    # The teacher's bundle has another head if one was fitted for this student.
    teacher = teacher.with_head(connected.variables['params']['head'])
  output = _folder(flags)
  measured = measure.measure(
    pairs.Pair(teacher, student.network, connected and connected.network),
    {
      'teacher': teacher.arrays,
      'student': student.variables,
      'connected': connected and connected.variables,
    },
    _splits(dataset, other, connected, flags),
    trained=trained,
    delta=flags.delta,
    fit_examples=flags.fit_examples,
    seed=flags.seed,
    choices=choices,
    relabel=lambda labels: _labels_in_order(labels, dataset, other, flags),
    mapper=parallel.Mapper(),
    batch_size=batch_size,
    num_workers=flags.num_workers,
  )
  found = {'bundle': path, 'teacher': flags.teacher, **measured.report}
  if connected is not None and not _same_head(
    connected.variables['params']['head'],
    _head_in_order(teacher_bundle, dataset, flags),
  ):
    found['left_out']["the teacher's own head"] = OTHER_HEAD
  shifted = found['unlabelled']['shifted'] if known else None
  if shifted is not None:
    found['unlabelled']['calibrated'] = calibration.estimate(
      shifted['value'], known, flags.delta
    )
  _say(found, output, flags)


def _say(found, output, flags: argparse.Namespace) -> None:
  """Writes and prints the report."""
  from ijckd_jax.reports import bound_wording
  from ijckd_jax.reports import report

  if output is not None:
    try:
      report.write_bounds(output, found)
    except OSError as error:
      raise _unwritable(flags, error) from error
  if flags.json:
    print(json.dumps(found))
    return
  parts = [bound_wording.brief(found), bound_wording.full(found)]
  if 'unlabelled' in found:
    parts.append(bound_wording.unlabelled(found['unlabelled']))
  print('\n\n'.join(parts))


def _folder(flags: argparse.Namespace):
  """Returns the folder of --output, which is made; None without one."""
  from etils import epath

  from ijckd_jax.runtime import workdirs

  if not flags.output:
    return None
  output = epath.Path(flags.output)
  if (output / workdirs.CONFIG).exists():
    raise config_utils.UserError(
      f'--output {flags.output} holds a run, whose report would be lost: give '
      'another folder'
    )
  try:
    output.mkdir(parents=True, exist_ok=True)
  except OSError as error:
    raise _unwritable(flags, error) from error
  return output


def _unwritable(flags: argparse.Namespace, error: OSError):
  return config_utils.UserError(
    f'--output {flags.output} cannot be written: {config_utils.reason(error)}'
  )


def _splits(dataset, other, connected, flags: argparse.Namespace):
  """Returns the images by 'test', and where they are needed the other kinds."""
  splits = {'test': dataset.load(flags.split)}
  if not len(splits['test']):
    raise config_utils.UserError(f'the split {flags.split!r} is empty')
  if connected is not None and flags.fit_examples:
    splits['train'] = dataset.load('train')
  if other is not None:
    splits['unlabelled'] = other.load(flags.unlabelled_split)
    if not len(splits['unlabelled']):
      raise config_utils.UserError(
        f'--unlabelled: the split {flags.unlabelled_split!r} is empty: give '
        '--unlabelled_split (images without classes are all in train)'
      )
    if splits['unlabelled'].digest() == splits['test'].digest():
      raise config_utils.UserError(
        '--unlabelled: these are the labelled images; give others'
      )
  return splits


def _unlabelled(networks, dataset, flags: argparse.Namespace):
  """Returns the data set of --unlabelled; None without one.

  Args:
    networks: arguments of `_check_fits` but for the data set.
    dataset: of the labelled images.
    flags: of the command.
  """
  if not flags.unlabelled:
    return None
  about = _about_unlabelled(flags)
  other = bundle_flags.dataset_of(networks[0], about)
  _check_fits(*networks, other, has_classes=False)
  if tuple(other.image_shape) != tuple(dataset.image_shape):
    raise config_utils.UserError(
      f'--unlabelled: images are {tuple(other.image_shape)}, those of '
      f'--dataset {tuple(dataset.image_shape)}'
    )
  return other


def _about_unlabelled(flags: argparse.Namespace) -> argparse.Namespace:
  """Returns flags that say of --unlabelled what others say of --dataset."""
  about = copy.copy(flags)
  about.dataset = flags.unlabelled
  about.dataset_fields = flags.unlabelled_fields
  about.split = flags.unlabelled_split
  return about


def _trained_on(named, flags: argparse.Namespace) -> list:
  """Returns the training images of the networks; None for unknown ones.

  A note names each network whose training images are not known.

  Args:
    named: bundles by their names in messages.
    flags: of the command.
  """
  from ijckd_jax.bounds import held_out

  splits = {}
  for what, bundle in named.items():
    for split, reason in held_out.trained_on(
      bundle.info, flags.data_dir, flags.trust_code
    ):
      if split is None:
        print(
          f'note: the training images of the {what} are not known ({reason}): '
          'make sure that none is among those that are measured',
          file=sys.stderr,
        )
      splits[split and split.digest()] = split
  return list(splits.values())


def _check_splits(bundles, flags: argparse.Namespace) -> None:
  """Raises where other fields would hold out other training images."""
  from ijckd_jax.bounds import held_out

  asked = [flags]
  if flags.unlabelled:
    asked.append(_about_unlabelled(flags))
  for about in asked:
    fields = bundle_flags.dataset_fields(bundles[0], about).to_dict()
    for bundle in bundles:
      held_out.check_fields(bundle.info, fields, about.split)


def _labels_in_order(labels, dataset, other, flags: argparse.Namespace):
  """Returns labels of --unlabelled as numbers of --dataset's classes.

  All are -1 where the classes are others, or none.
  """
  from ijckd_jax.data import classes
  from ijckd_jax.data import datasets

  if not datasets.has_classes(other):
    return labels
  if labels.max() >= len(other.class_names):
    raise config_utils.UserError(
      f'--unlabelled: labels go up to {labels.max()}, but there are '
      f'{len(other.class_names)} classes: mend the data set'
    )
  try:
    order, note = classes.match(
      dataset.class_names,
      other.class_names,
      what='--dataset',
      of='--unlabelled',
      by_number=flags.classes_by_number,
    )
  except config_utils.UserError as error:
    print(f'note: its labels are left out: {error}', file=sys.stderr)
    return np.full_like(labels, -1)
  if note:
    print(f'note: {note}', file=sys.stderr)
  return labels if order is None else np.where(labels < 0, -1, order[labels])


def _head_in_order(teacher_bundle, dataset, flags: argparse.Namespace):
  """Returns the teacher's own head, in the data set's order if it has one."""
  from ijckd_jax.data import classes

  head = teacher_bundle.variables['params']['head']
  try:
    order, _ = classes.match(
      teacher_bundle.class_names,
      dataset.class_names,
      what='the teacher',
      by_number=flags.classes_by_number,
    )
  except config_utils.UserError:  # A head for other classes.
    return head
  return head if order is None else classes.reorder(head, order)


def _same_head(ours, theirs) -> bool:
  return all(
    np.array_equal(ours[name], theirs[name]) for name in ('kernel', 'bias')
  )


def _check_fits(
  student, teacher_bundle, connected, dataset, *, has_classes: bool = True
) -> None:
  """Raises where the pair does not belong together, or to a data set."""
  from ijckd_jax.bounds import pairs

  for what, bundle, has_head in (
    ('bundle', student, True),
    ('teacher', teacher_bundle, connected is None),
  ):
    bundle_flags.check_fits(
      what,
      bundle,
      dataset,
      has_head=has_head and has_classes,
      has_classes=has_classes,
    )
  teacher = teacher_bundle.teacher()
  if connected is not None and not pairs.sees(
    connected.network, connected.variables, teacher
  ):
    raise config_utils.UserError(
      f"the student's connector is not to this teacher, whose features are "
      f'{teacher.num_features} wide: give the teacher that it learned from'
    )


def _connected(student, flags: argparse.Namespace):
  """Returns the student as the teacher's head sees it, where that is known.

  Of a student with a head of its own, its run keeps that beside the bundle.
  """
  from ijckd_jax.bundles import bundles
  from ijckd_jax.runtime import workdirs

  if student.network.connector is not None:
    return student
  folder = bundles.find(flags.bundle).parent / workdirs.CONNECTED
  if not (folder / bundles.SPEC_FILE).exists():
    return None
  return bundles.load(folder, trust_code=flags.trust_code)
