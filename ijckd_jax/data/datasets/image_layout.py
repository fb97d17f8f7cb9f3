"""What is taken from a folder of pictures: its classes, and their files."""

import collections
from collections.abc import Mapping
from collections.abc import Sequence
import dataclasses
import os
import pathlib
from typing import NamedTuple
import unicodedata

import numpy as np

from ijckd_jax.data.datasets import image_files
from ijckd_jax.data.datasets import image_splits
from ijckd_jax.runtime import config_utils

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
  content = image_splits.content_of(images)
  prefixes = (
    {}
    if unlabelled
    else image_splits.prefixes_of(source, images, content, folders)
  )
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
      members = hold_out(
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
      f'{source}: no pictures in {image_splits.some(empty)}: fill or remove '
      'each folder'
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
    inner = image_splits.unwrap(content, prefixes['train'][:-1])
    if content[inner] == {''}:
      todo = 'a classifier needs two; add --unlabelled if there are no classes'
    elif len(members) == 1:
      todo = (
        f'if what it holds ({image_splits.some(content[inner])}) are the '
        f'classes or splits, give --source {source / inner}'
      )
    else:
      todo = (
        f'if {inner}/ holds the classes ({image_splits.some(content[inner])}), '
        f'move these to {prefixes["train"]}, and likewise in the other splits'
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
    said = [
      f'{verb} {image_splits.some(names)}'
      for verb, names in wrong.items()
      if names
    ]
    if not train.keys() & classes.keys():
      holds = (
        f'only {image_splits.some(classes)}' if classes else 'no class folders'
      )
      raise config_utils.UserError(
        f'{source}: {prefix} holds {holds}, and not the classes of '
        f'{prefixes["train"]} ({image_splits.some(train)}): sort its pictures '
        f'into {prefix}CLASS/, or move it out of {source} (without another '
        f'split, a part of {prefixes["train"]} is held out)'
      )
    if said:
      raise config_utils.UserError(
        f'{source}: the classes of {prefix} are not those of '
        f'{prefixes["train"]}: it {" and ".join(said)}'
      )


def hold_out(
  classes: Mapping[str, Sequence[str]], fraction: float
) -> dict[str, dict[str, list[str]]]:
  """Splits off a part of every class, at least one file, always the same.

  Args:
    classes: the files of each class.
    fraction: the part that becomes 'test'.

  Raises:
    UserError: it is no part, or a class has one file.
  """
  if not 0 < fraction < 1:
    raise config_utils.UserError(
      f'validation_fraction={fraction}: give a part of the pictures, more than '
      '0 and less than 1'
    )
  single = [name for name, paths in classes.items() if len(paths) < 2]
  if single:
    raise config_utils.UserError(
      f'one picture only in {image_splits.some(single)}: every class needs one '
      'to train on and one to test on'
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
