"""Fashion-MNIST: 70,000 images of 28x28, ten kinds of garment.

Source: Xiao et al. 2017, "Fashion-MNIST: a Novel Image Dataset for Benchmarking
Machine Learning Algorithms", https://arxiv.org/abs/1708.07747.
"""

import dataclasses

from ijckd_jax.data.datasets import prepared


@dataclasses.dataclass(frozen=True)
class Dataset(prepared.TfdsDataset):
  """60,000 training and 10,000 test images.

  Crop and flip are those of published recipes rather than tuned here (Zhong et
  al. 2017, "Random Erasing Data Augmentation", https://arxiv.org/abs/1708.04896).
  """

  crop_padding: int = 4
  flip: bool = True

  tfds_name = 'fashion_mnist'
  image_shape = (28, 28, 1)
  class_names = (
    'T-shirt/top',
    'Trouser',
    'Pullover',
    'Dress',
    'Coat',
    'Sandal',
    'Shirt',
    'Sneaker',
    'Bag',
    'Ankle boot',
  )
  # Measured on the training images.
  mean = (0.2860,)
  std = (0.3530,)
