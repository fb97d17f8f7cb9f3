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
    distinct: (N,) bool, False for copies of an earlier image and for images
      that were trained on.
    repeated: number of copies of an earlier image.
    trained: number of distinct images that are training images too; None where
      they were not compared.
  """

  distinct: np.ndarray
  repeated: int
  trained: int | None

  def report(self) -> dict[str, int | None]:
    """Returns 'images', 'repeated', 'trained' and 'distinct', JSON."""
    return {
      'images': len(self.distinct),
      'repeated': self.repeated,
      'trained': self.trained,
      'distinct': int(self.distinct.sum()),
    }


def find(arrays, trained: Sequence = ()) -> Found:
  """Returns the copies among the images of a split.

  Args:
    arrays: datasets.Arrays, or photos.Photos, of the split.
    trained: the same of each split that a network was trained on. One that
      cannot be compared (see `comparable`) is left out.
  """
  hashes = fingerprints(arrays)
  distinct = np.zeros(len(hashes), bool)
  distinct[np.unique(hashes, return_index=True)[1]] = True
  repeated = int((~distinct).sum())
  num_trained = None
  for other in trained:
    if comparable(arrays, other):
      seen = distinct & np.isin(hashes, fingerprints(other))
      num_trained = (num_trained or 0) + int(seen.sum())
      distinct &= ~seen
  return Found(distinct, repeated, num_trained)


def comparable(arrays, other) -> bool:
  """Returns whether copies between two splits can be found.

  Pixels are compared with pixels, and files with files.
  """
  if arrays.in_memory != other.in_memory:
    return False
  if arrays.in_memory:
    return arrays.images.shape[1:] == other.images.shape[1:]
  return len(other) <= MAX_ENCODED


def fingerprints(arrays) -> np.ndarray:
  """Returns a hash of each image, (N,) uint64.

  Of the pixels of images in memory, and of the encoded bytes of others.

  Args:
    arrays: datasets.Arrays, or photos.Photos.
  """
  if arrays.in_memory:
    images = iter(np.ascontiguousarray(arrays.images))
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
