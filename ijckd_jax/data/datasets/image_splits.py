"""Which folders of pictures are splits, and which are classes."""

import collections
from collections.abc import Iterable
from collections.abc import Mapping
from collections.abc import Set
import itertools
import pathlib
import re

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


def content_of(images: Iterable[str]) -> dict[str, set[str]]:
  """Returns what each folder holds: the names of its folders with pictures.

  The name '' stands for pictures that lie in the folder itself.
  """
  content = collections.defaultdict(set)
  for path in images:
    folder = path.rpartition('/')[0]
    content[folder].add('')
    while folder:
      folder, _, name = folder.rpartition('/')
      content[folder].add(name)
  return dict(content)


def unwrap(content: Mapping[str, Set[str]], folder: str) -> str:
  """Returns the folder below which more than one folder, or pictures, lie."""
  while len(content[folder]) == 1 and '' not in content[folder]:
    (name,) = content[folder]
    folder = f'{folder}/{name}' if folder else name
  return folder


def _folders(content, folder):
  """Returns the folders that lie in one with no picture beside them."""
  found = content[unwrap(content, folder)]
  return set() if '' in found else found


def split_of_name(name: str) -> str | None:
  """Returns the split that a part of a name stands for; None: there is none."""
  return _named_split(name)[0]


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


def prefixes_of(
  source: pathlib.Path,
  images: Iterable[str],
  content: Mapping[str, Set[str]],
  folders: Iterable[str],
) -> dict[str, str]:
  """Returns where the classes of each split lie: {'train': 'train/', ...}.

  {'train': ''} where they lie in the source itself, {} where there are none.

  Args:
    source: the folder, for messages.
    images: paths of the pictures within it.
    content: as `content_of` returns it.
    folders: all folders within it.

  Raises:
    UserError: a folder could be a split as well as a class.
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
      f'{source} holds pictures ({some(loose)}) beside folders with pictures '
      f'({some(filled)}): move them into the folder of their class, or add '
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
      f'folders with pictures ({some(others)}): if the classes lie in '
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
  places = {unwrap(content, name): split for name, split in splits.items()}
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
    outer = some(name for name in inner if both <= inner[name])
    if len({_named_split(name)[0] for name in both} - {None}) > 1:
      raise config_utils.UserError(
        f'{source}: {outer} hold {some(both)}, which seem to be splits: put '
        'these outside, so that one folder holds train/CLASS/ and test/CLASS/'
      )
    raise config_utils.UserError(
      f'{source}: {outer} hold the same folders ({some(both)}): if the inner '
      'ones are the classes, give one of the outer ones as --source '
      f'({source / unwrap(content, one)}), or rename two of them train/ and '
      f'test/; if all are pictures of the outer ones, {AS_CLASSES}'
    )


def some(names: Iterable[str], most: int = 5) -> str:
  """Returns the first names of many, in order."""
  names = sorted(names)
  more = f', and {len(names) - most} more' if len(names) > most else ''
  return ', '.join(map(config_utils.short, names[:most])) + more
