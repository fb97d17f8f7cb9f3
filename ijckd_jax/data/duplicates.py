"""Exact copies of images, within a split and between splits."""

from collections.abc import Sequence
import dataclasses
import hashlib

import numpy as np

from ijckd_jax.runtime import progress

# Encoded images are read from disk to be compared. More of them than this take
# longer than the evaluation, and are not compared.
MAX_ENCODED = 100_000


@dataclasses.dataclass(frozen=True)
class Found:
  """Copies among the images of a split.

  Attributes:
    kept: (N,) bool, one of each group of equal images, unless it was trained
      on.
    num_repeated: number of images that are left out because they repeat
      another one.
    num_trained: number of distinct images that were trained on.
    num_unknown: number of training splits that could not be compared.
  """

  kept: np.ndarray
  num_repeated: int
  num_trained: int
  num_unknown: int

  def report(self) -> dict[str, int]:
    """Returns the numbers of images, as JSON."""
    return {
      'images': len(self.kept),
      'repeated': self.num_repeated,
      'trained': self.num_trained,
      'kept': int(self.kept.sum()),
      'unknown': self.num_unknown,
    }


def find(arrays, trained: Sequence, others: Sequence = ()) -> Found:
  """Returns the copies among the images of a split.

  Args:
    arrays: datasets.Arrays, or photos.Photos, of the split.
    trained: the same of each split that a network was trained on; None for one
      that is not known.
    others: the same of splits whose copies count as repeated.
  """
  hashes = fingerprints(arrays)
  # One of equal images is drawn: the first in a file may have a certain label.
  order = np.random.RandomState(0).permutation(len(hashes))
  kept = np.zeros(len(hashes), bool)
  kept[order[np.unique(hashes[order], return_index=True)[1]]] = True
  for other in others:
    if comparable(arrays, other):
      kept &= ~np.isin(hashes, fingerprints(other))
  num_repeated = int((~kept).sum())
  num_trained = num_unknown = 0
  for other in trained:
    if other is None:
      num_unknown += 1
      continue
    if of_one_source(arrays, other):
      seen = np.isin(arrays.rows, other.rows)
    elif comparable(arrays, other):
      seen = np.isin(hashes, fingerprints(other))
    else:
      num_unknown += 1
      continue
    num_trained += int((kept & seen).sum())
    kept &= ~seen
  return Found(kept, num_repeated, num_trained, num_unknown)


def of_one_source(arrays, other) -> bool:
  """Returns whether two splits are parts of the same files.

  Their rows then say which images they share, and nothing is read.
  """
  if arrays.in_memory or other.in_memory:
    return False
  ours, theirs = arrays.sources, other.sources
  num = min(len(ours), len(theirs))
  return ours[:num] == theirs[:num]


def comparable(arrays, other) -> bool:
  """Returns whether copies between two splits can be found.

  Pixels are compared with pixels of the same shape, and files with files.
  """
  if arrays.in_memory != other.in_memory:
    return False
  if arrays.in_memory:
    return arrays.images.shape[1:] == other.images.shape[1:]
  return len(other) <= MAX_ENCODED


def fingerprints(arrays) -> np.ndarray:
  """Returns a hash of each image, (N,) uint64.

  Images in memory are hashed by their pixels, others by their encoded bytes.

  Args:
    arrays: datasets.Arrays, or photos.Photos.
  """
  if arrays.in_memory:
    # Those of a data set from elsewhere may have another type.
    pixels = np.asarray(arrays.images).astype(np.uint8, copy=False)
    images = iter(np.ascontiguousarray(pixels))
  else:
    images = progress.watched(
      (arrays.read(index)['image'] for index in range(len(arrays))),
      'looking for copies',
      'images',
      len(arrays),
    )
  hashes = [
    int.from_bytes(hashlib.blake2b(image, digest_size=8).digest(), 'little')
    for image in images
  ]
  return np.array(hashes, np.uint64)
