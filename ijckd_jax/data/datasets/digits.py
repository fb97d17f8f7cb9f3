"""scikit-learn's handwritten digits: 1797 images of 8x8, ten classes.

They come with scikit-learn, and are written as a tfds data set on first use.
"""

import dataclasses

import numpy as np

from ijckd_jax.data import datasets
from ijckd_jax.data.datasets import prepared


@dataclasses.dataclass(frozen=True)
class Dataset(prepared.TfdsDataset):
  """1437 training and 360 test images, each class split alike."""

  tfds_name = 'digits'
  image_shape = (8, 8, 1)
  class_names = tuple('0123456789')
  # Measured on the training images.
  mean = (0.3054,)
  std = (0.3760,)

  def load(self, split: str) -> datasets.Arrays:
    """Returns the images and labels of a split; builds the data if need be."""
    self.prepare()
    return super().load(split)

  def prepare(self) -> None:
    """Writes the data set, unless it is there.

    Raises:
      UserError: the data directory cannot be written.
    """
    if prepared.find(self.tfds_name, self.data_dir):
      return
    import sklearn.datasets
    import sklearn.model_selection
    import tensorflow_datasets as tfds

    with tfds.core.registered.skip_registration():

      class Digits(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version('1.0.0')

        def _info(self):
          return tfds.core.DatasetInfo(
            builder=self,
            description="scikit-learn's digits, pixels scaled to 0..255.",
            features=tfds.features.FeaturesDict(
              {
                'image': tfds.features.Image(shape=(8, 8, 1)),
                'label': tfds.features.ClassLabel(num_classes=10),
              }
            ),
            supervised_keys=('image', 'label'),
          )

    digits = sklearn.datasets.load_digits()
    # A pixel counts the black ones in a 4x4 block: 0 to 16.
    images = np.round(digits.images[..., None] * (255 / 16)).astype(np.uint8)
    train, test = sklearn.model_selection.train_test_split(
      np.arange(len(images)),
      test_size=360,
      stratify=digits.target,
      random_state=0,
    )
    splits = {
      split: {'image': images[indices], 'label': digits.target[indices]}
      for split, indices in (('train', train), ('test', test))
    }
    prepared.write(Digits, self.data_dir, splits)
