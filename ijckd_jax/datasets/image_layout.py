"""What lies in a folder of pictures: its splits, its classes, their files."""

import collections
from collections.abc import Mapping
from collections.abc import Sequence
import dataclasses
import os
import pathlib
from typing import NamedTuple
import unicodedata

import numpy as np

from ijckd_jax import config_utils
from ijckd_jax.datasets import image_files

SPLIT_OF = {
  'train': 'train',
  'training': 'train',
  'val': 'validation',
  'valid': 'validation',
  'validation': 'validation',
  'test': 'test',
  'testing': 'test',
}
HELD_OUT = 0.1  # The part of every class that becomes 'test', unless given.


class Example(NamedTuple):
  """A picture's file and its place in the data set."""

  path: str  # Within the source.
  num_bytes: int
  mtime_ns: int
  split: str
  label: int  # -1 without classes.


@dataclasses.dataclass(frozen=True)
class Layout:
  """All that is taken from a folder.

  Attributes:
    class_names: in the order of their labels; empty without classes.
    examples: sorted by path.
    ignored: path and reason of what is no picture of any class.
  """

  class_names: Sequence[str]
  examples: Sequence[Example]
  ignored: Mapping[str, str]


def read(
  source: pathlib.Path,
  *,
  validation_fraction: float | None = None,
  unlabelled: bool = False,
) -> Layout:
  """Returns the splits, classes and files of a folder.

  Args:
    source: holds `train/CLASS/...` and perhaps `val/CLASS/...` and
      `test/CLASS/...`; or a folder for each class; or pictures alone.
    validation_fraction: part of every class to hold out as the split 'test'
      where the folder holds no other split than 'train'; None is HELD_OUT.
    unlabelled: whether folders, if there are any, are no classes.

  Raises:
    UserError: it is no such folder, or classes are empty, missing, or alike.
    OSError: it cannot be read.
  """
  if not source.is_dir():
    what = 'is not a folder' if source.exists() else 'does not exist'
    raise config_utils.UserError(f'--source {source} {what}')
  images, folders, ignored = _walk(source)
  if not images:
    kinds = collections.Counter(ignored.values()).most_common(5)
    found = ', '.join(f'{count} {kind}' for kind, count in kinds)
    raise config_utils.UserError(
      f'{source} holds no pictures ({" ".join(sorted(image_files.EXTENSIONS))})'
      f'; found: {found or "nothing"}'
    )
  prefixes = {} if unlabelled else _prefixes(source, images, folders)
  if len(prefixes) != 1 and validation_fraction is not None:
    why = ', '.join(sorted(prefixes.values())) or 'unlabelled pictures'
    raise config_utils.UserError(
      f'{source} holds {why}: leave out --validation_fraction'
    )
  if not prefixes:
    members = {'train': {'': sorted(images)}}
    class_names = []
  else:
    members = {
      split: _classes(source, images, folders, prefix)
      for split, prefix in prefixes.items()
    }
    _check_classes(source, members, prefixes)
    if len(members) == 1:
      fraction = validation_fraction
      members = _hold_out(
        members['train'], HELD_OUT if fraction is None else fraction
      )
    class_names = sorted(members['train'])
  labels = {name: label for label, name in enumerate(class_names)}
  examples = [
    Example(path, *images[path], split, labels.get(name, -1))
    for split, classes in members.items()
    for name, paths in classes.items()
    for path in paths
  ]
  for path in images.keys() - {example.path for example in examples}:
    ignored[path] = 'outside of the class folders'
  return Layout(class_names, sorted(examples), dict(sorted(ignored.items())))


def _walk(source):
  """Returns files {path: (bytes, mtime)}, folders, and the rest {path: why}."""
  images, folders, ignored = {}, set(), {}
  pending = [('', frozenset())]
  while pending:
    folder, above = pending.pop()
    status = os.stat(source / folder)
    inode = status.st_dev, status.st_ino
    if inode in above:
      ignored[folder] = 'link to a folder above it'
      continue
    folders.add(folder)
    with os.scandir(source / folder) as entries:
      for entry in entries:
        path = f'{folder}/{entry.name}' if folder else entry.name
        suffix = pathlib.PurePath(entry.name).suffix.lower()
        if entry.name.startswith('.') or entry.name == '__MACOSX':
          ignored[path] = 'hidden'
        elif entry.is_dir():
          pending.append((path, above | {inode}))
        elif suffix not in image_files.EXTENSIONS:
          ignored[path] = suffix or 'no extension'
        elif not entry.is_file():
          ignored[path] = 'no file'  # A broken link, a socket, ...
        else:
          status = entry.stat()
          images[path] = status.st_size, status.st_mtime_ns
  return images, folders, ignored


def _prefixes(source, images, folders):
  """Returns where the classes of each split lie: {'train': 'train/', ...}.

  {'train': ''} where they lie in the source itself, {} where there are none.
  """
  named = collections.defaultdict(list)
  for folder in sorted(folders):
    if folder.casefold() in SPLIT_OF:
      named[SPLIT_OF[folder.casefold()]].append(f'{folder}/')
  if any(
    path.startswith(tuple(named['train'])) and path.count('/') > 1
    for path in images
  ):
    for same in named.values():
      if len(same) > 1:
        raise config_utils.UserError(
          f'{source} holds {" and ".join(same)}, which stand for the same '
          'split: keep one'
        )
    splits = {split: same[0] for split, same in named.items() if same}
    if len(splits) == 2:
      # A run needs a test split; what else there is serves as one.
      return {'train': splits.pop('train'), 'test': splits.popitem()[1]}
    return splits
  filled = {path.partition('/')[0] for path in images if '/' in path}
  if not filled:
    return {}
  as_splits = {name for name in filled if name.casefold() in SPLIT_OF}
  if len(as_splits) > 1 or as_splits == filled:
    raise config_utils.UserError(
      f'{source} holds {", ".join(sorted(as_splits))}, but no train/ with a '
      'folder for each class; of pictures without classes, give one folder as '
      '--source, or all of them with --unlabelled'
    )
  loose = sorted(path for path in images if '/' not in path)
  if loose:
    raise config_utils.UserError(
      f'{source} holds pictures ({_some(loose)}) beside folders with pictures '
      f'({_some(filled)}): move them into the folder of their class, or add '
      '--unlabelled if the folders are no classes'
    )
  return {'train': ''}


def _classes(source, images, folders, prefix):
  """Returns the files of each class below a prefix, sorted: {name: paths}."""
  paths = {
    folder: []
    for folder in sorted(folders)
    if folder.startswith(prefix) and folder.count('/') == prefix.count('/')
  }
  paths.pop('', None)  # The source itself.
  for path in sorted(images):
    folder = '/'.join(path.split('/')[: prefix.count('/') + 1])
    if folder in paths:
      paths[folder].append(path)
  empty = [folder for folder, files in paths.items() if not files]
  if empty:
    raise config_utils.UserError(
      f'{source}: no pictures in {_some(empty)}: fill or remove each folder'
    )
  classes, folder_of = {}, {}
  for folder, files in paths.items():
    name = unicodedata.normalize('NFC', folder.removeprefix(prefix))
    # tfds keeps names one a line, without white space around them.
    kept = name.encode(errors='replace').decode().strip()
    if kept.splitlines() != [name]:
      raise config_utils.UserError(
        f'{source}: {folder!r} cannot be a class name: rename it, without '
        'white space around it, line breaks and bytes that are not UTF-8'
      )
    other = folder_of.setdefault(name.casefold(), folder)
    if other != folder:
      raise config_utils.UserError(
        f'{source}: {other!r} and {folder!r} are the same name but for case '
        'or Unicode form: rename or merge them'
      )
    classes[name] = files
  return classes


def _check_classes(source, members, prefixes):
  """Raises unless there are classes, and the same ones in every split."""
  train = members['train']
  for split, classes in members.items():
    wrong = {
      'lacks': sorted(train.keys() - classes.keys()),
      'adds': sorted(classes.keys() - train.keys()),
    }
    said = [f'{verb} {_some(names)}' for verb, names in wrong.items() if names]
    if said:
      raise config_utils.UserError(
        f'{source}: the classes of {prefixes[split]} are not those of '
        f'{prefixes["train"]}: it {" and ".join(said)}'
      )
  if len(train) < 2:
    place = source / prefixes['train']
    raise config_utils.UserError(
      f'{place} holds one class folder only ({_some(train)}): give the folder '
      'in which the folders of the classes lie as --source, or add '
      '--unlabelled if there are no classes'
    )


def _hold_out(classes, fraction):
  """Splits off a part of every class, at least one file, always the same."""
  if not 0 < fraction < 1:
    raise config_utils.UserError(
      f'validation_fraction={fraction}: give a part of the pictures, more than '
      '0 and less than 1'
    )
  single = [name for name, paths in classes.items() if len(paths) < 2]
  if single:
    raise config_utils.UserError(
      f'one picture only in {_some(single)}: every class needs one to train on '
      'and one to test on'
    )
  # RandomState's streams, unlike Generator's, are promised never to change.
  random = np.random.RandomState(0)
  members = {'train': {}, 'test': {}}
  for name in sorted(classes):
    paths = classes[name]
    order = random.permutation(len(paths))
    count = min(max(round(fraction * len(paths)), 1), len(paths) - 1)
    members['test'][name] = [paths[i] for i in order[:count]]
    members['train'][name] = [paths[i] for i in order[count:]]
  return members


def _some(names, most=5):
  """Returns the first names of many, in order."""
  names = sorted(names)
  more = f', and {len(names) - most} more' if len(names) > most else ''
  return ', '.join(map(config_utils.short, names[:most])) + more
