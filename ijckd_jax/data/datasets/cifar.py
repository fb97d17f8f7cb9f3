"""CIFAR-10 and CIFAR-100: 60,000 colour images of 32x32.

Source: Krizhevsky 2009, "Learning Multiple Layers of Features from Tiny
Images", https://www.cs.toronto.edu/~kriz/cifar.html.
"""

import dataclasses

from ijckd_jax.data.datasets import prepared


@dataclasses.dataclass(frozen=True)
class Cifar10(prepared.TfdsDataset):
  """50,000 training and 10,000 test images of ten classes."""

  crop_padding: int = 4
  flip: bool = True

  tfds_name = 'cifar10'
  train_split_size = 50_000
  image_shape = (32, 32, 3)
  class_names = tuple(
    'airplane automobile bird cat deer dog frog horse ship truck'.split()
  )
  # Over all pixels of the training images, as for CIFAR-100. The often seen std
  # of (0.2023, 0.1994, 0.2010) is the mean of the stds of single images.
  mean = (0.4914, 0.4822, 0.4465)
  std = (0.2470, 0.2435, 0.2616)


@dataclasses.dataclass(frozen=True)
class Cifar100(prepared.TfdsDataset):
  """50,000 training and 10,000 test images of a hundred classes.

  Crop, flip, mean and std are those of RepDistiller, whose protocol most
  distillation tables use: https://github.com/HobbitLong/RepDistiller.
  """

  crop_padding: int = 4
  flip: bool = True

  tfds_name = 'cifar100'
  train_split_size = 50_000
  image_shape = (32, 32, 3)
  class_names = tuple(
    """
    apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy
    bridge bus butterfly camel can castle caterpillar cattle chair chimpanzee
    clock cloud cockroach couch crab crocodile cup dinosaur dolphin elephant
    flatfish forest fox girl hamster house kangaroo keyboard lamp lawn_mower
    leopard lion lizard lobster man maple_tree motorcycle mountain mouse
    mushroom oak_tree orange orchid otter palm_tree pear pickup_truck pine_tree
    plain plate poppy porcupine possum rabbit raccoon ray road rocket rose sea
    seal shark shrew skunk skyscraper snail snake spider squirrel streetcar
    sunflower sweet_pepper table tank telephone television tiger tractor train
    trout tulip turtle wardrobe whale willow_tree wolf woman worm
    """.split()
  )
  mean = (0.5071, 0.4867, 0.4408)
  std = (0.2675, 0.2565, 0.2761)
