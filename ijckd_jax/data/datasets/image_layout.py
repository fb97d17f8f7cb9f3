"""What lies in a folder of pictures: its splits, its classes, their files."""

import collections
from collections.abc import Mapping
from collections.abc import Sequence
import dataclasses
import itertools
import os
import pathlib
import re
from typing import NamedTuple
import unicodedata

import numpy as np

from ijckd_jax.data.datasets import image_files
from ijckd_jax.runtime import config_utils

SPLIT_OF = {
  'train': 'train',
  'training': 'train',
  'val': 'validation',
  'valid': 'validation',
  'validation': 'validation',
  'test': 'test',
  'testing': 'test',
}
SHORT = {'train': 'train', 'validation': 'val', 'test': 'test'}
# A word of a name, in any of trainSet, TrainSet, TRAIN_SET and train-set.
WORD = re.compile('[A-Z]+(?![a-z])|[A-Z]?[a-z]+')
AS_CLASSES = (
  'move all of them into a new folder train/, and give the folder that holds it'
)
MACOS = '__MACOSX'  # Where its archives keep what is no picture.
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
  images, folders, ignored = walk(source)
  if not images:
    kinds = collections.Counter(ignored.values()).most_common(5)
    found = ', '.join(f'{count} {kind}' for kind, count in kinds)
    raise config_utils.UserError(
      f'{source} holds no pictures ({" ".join(sorted(image_files.EXTENSIONS))})'
      f'; found: {found or "nothing"}'
    )
  content = _content(images)
  prefixes = {} if unlabelled else _prefixes(source, images, content, folders)
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
    _check_classes(source, members, prefixes, content)
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


def walk(
  source: pathlib.Path,
) -> tuple[dict[str, tuple[int, int]], set[str], dict[str, str]]:
  """Searches a folder and all below it; links are followed.

  Args:
    source: the folder; all paths that are returned are relative to it.

  Returns:
    The pictures, with their bytes and time of change in nanoseconds; the
    folders; and all else, with the reason why it is no picture.

  Raises:
    OSError: a folder cannot be read.
  """
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
        if entry.name.startswith('.') or entry.name == MACOS:
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


def _content(images):
  """Returns what each folder holds: its folders with pictures.

  '' stands for pictures that lie in the folder itself.
  """
  content = collections.defaultdict(set)
  for path in images:
    folder = path.rpartition('/')[0]
    content[folder].add('')
    while folder:
      folder, _, name = folder.rpartition('/')
      content[folder].add(name)
  return dict(content)


def _unwrap(content, folder):
  """Returns the folder below which more than one folder, or pictures, lie."""
  while len(content[folder]) == 1 and '' not in content[folder]:
    (name,) = content[folder]
    folder = f'{folder}/{name}' if folder else name
  return folder


def _folders(content, folder):
  """Returns the folders that lie in one with no picture beside them."""
  found = content[_unwrap(content, folder)]
  return set() if '' in found else found


def _named_split(name):
  """Returns the split that a part of a name stands for, and the other letters.

  ('train', 'asl alphabet') of 'asl_alphabet_train2'; (None, '...') if there is
  none.
  """
  words = [word.casefold() for word in WORD.findall(name)]
  for place, word in enumerate(words):
    split = SPLIT_OF.get(re.sub('(set|data|images?)$', '', word))
    if split:
      return split, ' '.join(words[:place] + words[place + 1 :])
  return None, ' '.join(words)


def _prefixes(source, images, content, folders):
  """Returns where the classes of each split lie: {'train': 'train/', ...}.

  {'train': ''} where they lie in the source itself, {} where there are none.
  """
  named = collections.defaultdict(list)
  for folder in sorted(folders):
    if folder.casefold() in SPLIT_OF:
      named[SPLIT_OF[folder.casefold()]].append(f'{folder}/')
  filled = content[''] - {''}
  if any(content.get(place[:-1], set()) - {''} for place in named['train']):
    for same in named.values():
      if len(same) > 1:
        raise config_utils.UserError(
          f'{source} holds {" and ".join(same)}, which stand for the same '
          'split: keep one'
        )
    splits = {split: same[0] for split, same in named.items() if same}
    if len(splits) == 1:
      _check_alone(source, splits['train'][:-1], filled)
    if len(splits) == 2:
      # A run needs a test split; what else there is serves as one.
      return {'train': splits.pop('train'), 'test': splits.popitem()[1]}
    return splits
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
  _check_no_splits(source, content)
  _check_no_subsets(source, content)
  return {'train': ''}


def _check_alone(source, train, filled):
  """Raises where other folders lie beside a train/ that holds folders."""
  others = filled - {train}
  splits = {name: _named_split(name)[0] for name in sorted(others)}
  seeming = [
    f'{config_utils.short(name)}/ seems to be the split {split}: rename it '
    f'{SHORT[split]}/'
    for name, split in splits.items()
    if split
  ]
  if seeming:
    raise config_utils.UserError(
      f'{source}: beside {train}/, {"; ".join(seeming)}; or give --source '
      f'{source / train}, a part of which is held out'
    )
  if others:
    raise config_utils.UserError(
      f'{source} holds {train}/, which has folders of its own, beside other '
      f'folders with pictures ({_some(others)}): if the classes lie in '
      f'{train}/, give --source {source / train}; if {train} is a class as '
      f'well, {AS_CLASSES}'
    )


def _check_no_splits(source, content):
  """Raises where names of class folders sound like splits.

  One can be a class: a train beside a car. They are taken for splits where two
  names differ in the split alone (seg_train and seg_test), where every name
  sounds so, and where there are several folders in one.
  """
  splits, alike = {}, collections.defaultdict(set)
  for name in sorted(content['']):
    split, rest = _named_split(name)
    if split:
      splits[name] = split
      alike[rest].add(split)
  if splits.keys() != content[''] or len(set(splits.values())) < 2:
    splits = {
      name: split
      for name, split in splits.items()
      if len(alike[_named_split(name)[1]]) > 1 or _folders(content, name)
    }
  if not splits:
    return
  places = {_unwrap(content, name): split for name, split in splits.items()}
  places = dict(
    sorted(places.items(), key=lambda item: list(SHORT).index(item[1]))
  )
  said = ', '.join(
    f'{config_utils.short(place)}/ seems to be the split {split}'
    for place, split in places.items()
  )
  best = next(iter(places))
  if content[best] == {''}:
    todo = (
      'they hold no class folders: sort the pictures into train/CLASS/ and '
      'test/CLASS/; of pictures without classes, give one folder as --source, '
      'or all of them with --unlabelled'
    )
  else:
    todo = (
      'rename or link them, so that one folder holds train/CLASS/ and '
      f'test/CLASS/, and give it as --source; or give --source {source / best}'
      f', a part of which is held out; if they are classes, {AS_CLASSES}'
    )
  raise config_utils.UserError(f'{source}: {said}; {todo}')


def _check_no_subsets(source, content):
  """Raises where class folders hold pictures in the same two folders or more.

  Either those are the classes, or they are splits, or images and their masks.
  """
  inner = {}
  for name in sorted(content['']):
    folders = _folders(content, name)
    if folders:
      inner[name] = folders
  for one, other in itertools.combinations(inner, 2):
    both = inner[one] & inner[other]
    if len(both) < 2:
      continue
    outer = _some(name for name in inner if both <= inner[name])
    if len({_named_split(name)[0] for name in both} - {None}) > 1:
      raise config_utils.UserError(
        f'{source}: {outer} hold {_some(both)}, which seem to be splits: put '
        'these outside, so that one folder holds train/CLASS/ and test/CLASS/'
      )
    raise config_utils.UserError(
      f'{source}: {outer} hold the same folders ({_some(both)}): if the inner '
      'ones are the classes, give one of the outer ones as --source '
      f'({source / _unwrap(content, one)}), or rename two of them train/ and '
      f'test/; if all are pictures of the outer ones, {AS_CLASSES}'
    )


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


def _check_classes(source, members, prefixes, content):
  """Raises unless there are classes, and the same ones in every split."""
  train = members['train']
  if len(train) < 2:
    place = source / prefixes['train']
    (only,) = train
    inner = _unwrap(content, prefixes['train'][:-1])
    if content[inner] == {''}:
      todo = 'a classifier needs two; add --unlabelled if there are no classes'
    elif len(members) == 1:
      todo = (
        f'if what it holds ({_some(content[inner])}) are the classes or '
        f'splits, give --source {source / inner}'
      )
    else:
      todo = (
        f'if {inner}/ holds the classes ({_some(content[inner])}), move these '
        f'to {prefixes["train"]}, and likewise in the other splits'
      )
    raise config_utils.UserError(
      f'{place} holds one class folder only ({config_utils.short(only)}): '
      f'{todo}'
    )
  for split, classes in members.items():
    prefix = prefixes[split]
    wrong = {
      'lacks': sorted(train.keys() - classes.keys()),
      'adds': sorted(classes.keys() - train.keys()),
    }
    said = [f'{verb} {_some(names)}' for verb, names in wrong.items() if names]
    if not train.keys() & classes.keys():
      holds = f'only {_some(classes)}' if classes else 'no class folders'
      raise config_utils.UserError(
        f'{source}: {prefix} holds {holds}, and not the classes of '
        f'{prefixes["train"]} ({_some(train)}): sort its pictures into '
        f'{prefix}CLASS/, or move it out of {source} (without another split, a '
        f'part of {prefixes["train"]} is held out)'
      )
    if said:
      raise config_utils.UserError(
        f'{source}: the classes of {prefix} are not those of '
        f'{prefixes["train"]}: it {" and ".join(said)}'
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
