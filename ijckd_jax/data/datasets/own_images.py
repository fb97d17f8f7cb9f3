"""Your own images, once `datasets.prepare image_folder` has stored them."""

import dataclasses
import functools
import re

from ijckd_jax.data import datasets
from ijckd_jax.data.datasets import photos
from ijckd_jax.runtime import config_utils

# What images can be called; tfds takes no path for a name.
NAME = re.compile('[a-z][a-z0-9_]*')


@dataclasses.dataclass(frozen=True)
class Dataset(photos.PhotoDataset):
  """A folder of images, under the name that it was prepared with.

  Attributes:
    folder: that name. Of images without classes, a student can learn features.
    unlabelled: the same of images without classes, which are mixed in with the
      training images; '' for none. Their labels are -1.
  """

  folder: str = ''
  unlabelled: str = ''

  test_split = 'test'

  def __post_init__(self):
    super().__post_init__()
    if not self.folder:
      raise config_utils.UserError(
        'no dataset.folder: give the name under which the images were '
        'prepared, by --config.dataset.folder=NAME, or to a command on a '
        'bundle by --dataset_fields folder=NAME'
      )
    for field in ('folder', 'unlabelled'):
      name = getattr(self, field)
      if name and not NAME.fullmatch(name):
        raise config_utils.UserError(
          f'dataset.{field}={name}: give the NAME of `ijckd prepare '
          'image_folder --source DIR --name NAME`, which is no path; where it '
          'is stored is data_dir'
        )
    if self.folder == self.unlabelled:
      raise config_utils.UserError(
        f'dataset.folder and dataset.unlabelled are both {self.folder}: leave '
        'the second out'
      )

  @property
  def tfds_name(self) -> str:
    """The name under which tfds stores it."""
    return self.folder

  @functools.cached_property
  def class_names(self) -> tuple[str, ...]:
    """The folders' names; () for images without classes.

    Raises:
      UserError: it is not prepared.
    """
    (source,) = super().sources('train')
    features = source.builder.info.features
    return tuple(features['label'].names) if 'label' in features else ()

  def load(self, split: str) -> photos.Photos:
    """Returns the examples of a split; none is read yet.

    Images without classes are all for training: the other splits are empty.

    Raises:
      UserError: there is no such split, the data set is not prepared, or images
        are to be held out where there are validation images, or no classes.
    """
    (source,) = super().sources('train')
    if not self.class_names:
      if self.validation_fraction:
        raise config_utils.UserError(
          f'{self.folder} has no classes to validate on: leave out '
          'dataset.validation_fraction'
        )
      whole = self.photos(self.sources('train'))
      datasets.check_split(split)
      if split == 'train':
        return whole
      return dataclasses.replace(whole, rows=whole.rows[:0])
    if 'validation' not in source.builder.info.splits:
      return super().load(split)
    if self.validation_fraction:
      raise config_utils.UserError(
        f'{self.folder} has validation images of its own: leave out '
        'dataset.validation_fraction'
      )
    if split != 'validation':
      return super().load(split)
    return self.photos(self.sources(split))

  def sources(self, split: str) -> tuple[photos.Source, ...]:
    """Returns where a split is read: the unlabelled images come last."""
    sources = super().sources(split)
    if split == 'train' and self.unlabelled:
      unlabelled = photos.Source(self.unlabelled, self.data_dir, 'train')
      if 'label' in unlabelled.builder.info.features:
        raise config_utils.UserError(
          f'dataset.unlabelled={self.unlabelled} has labels: prepare its '
          'images without class folders, or leave it out'
        )
      sources += (unlabelled,)
    return sources
