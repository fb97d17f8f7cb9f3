"""A process that reads batches of 64 training views, for `input_pipeline`.

Each library is imported where it is used, since one may not be there. All do
the same: a random resized crop to 224 pixels, antialiased, uint8.
"""

import os
import pathlib
import sys

from experiments.benchmarks import worker

BATCH, SIZE = 64, 224
AREA, ASPECT = (0.08, 1.0), (3 / 4, 4 / 3)


def ours(num_workers, folder, *, resize=None, decode=None):
  """Yields batches of this package's pipeline."""
  from ijckd_jax.data import images
  from ijckd_jax.data import input_pipeline
  from ijckd_jax.data.datasets import imagenet

  if resize is not None:
    images.Views.train = resize
  if decode is not None:
    images.decode = decode
  yield from input_pipeline.train_batches(
    imagenet.Imagenet(data_dir=str(folder)).load('train'),
    batch_size=BATCH,
    seed=0,
    start_step=0,
    stop_step=10**6,
    rows=slice(0, BATCH),
    num_workers=num_workers,
  )


def ours_pil(num_workers, folder):
  """Ours, with PIL's resize."""
  import numpy as np
  import PIL.Image

  from ijckd_jax.data import images

  def train(self, encoded, random):
    image = images.decode(encoded)
    top, left, height, width = self.crop_box(*image.shape[:2], random)
    crop = PIL.Image.fromarray(image[top : top + height, left : left + width])
    bilinear = PIL.Image.Resampling.BILINEAR
    return np.asarray(crop.resize((self.size, self.size), bilinear))

  return ours(num_workers, folder, resize=train)


def simplejpeg(num_workers, folder):
  """Ours, decoded at a half or a quarter where that leaves enough pixels."""
  import numpy as np
  import simplejpeg as library

  from ijckd_jax.data import images

  def train(self, encoded, random):
    height, width, *_ = library.decode_jpeg_header(encoded)
    top, left, crop_height, crop_width = self.crop_box(height, width, random)
    scale = min(crop_height, crop_width) / self.size
    image = library.decode_jpeg(
      encoded,
      min_height=int(height / max(1, scale)),
      min_width=int(width / max(1, scale)),
    )
    top, crop_height = (
      round(x * image.shape[0] / height) for x in (top, crop_height)
    )
    left, crop_width = (
      round(x * image.shape[1] / width) for x in (left, crop_width)
    )
    return images.resize(
      np.ascontiguousarray(
        image[top : top + crop_height, left : left + crop_width]
      ),
      self.size,
    )

  return ours(num_workers, folder, resize=train)


def torch(num_workers, folder):
  """Yields batches of PyTorch's DataLoader and torchvision on PIL."""
  import torch as library

  # Gives torchvision also where its operators do not fit this PyTorch.
  from tests.torch_networks import torchvision

  datasets, transforms = torchvision.datasets, torchvision.transforms
  library.set_num_threads(1)
  data = datasets.ImageFolder(
    folder / 'files',
    transforms.Compose(
      [
        transforms.RandomResizedCrop(SIZE, AREA, ASPECT),
        transforms.PILToTensor(),
      ]
    ),
  )
  # One endless epoch: between two, the workers would start anew.
  sampler = library.utils.data.RandomSampler(
    data, replacement=True, num_samples=10**9
  )
  yield from library.utils.data.DataLoader(
    data, BATCH, sampler=sampler, num_workers=num_workers
  )


def tensorflow(num_workers, folder):
  """Yields batches of tf.data, which decodes no more than the crop."""
  del num_workers
  import tensorflow as tf

  num_cores = len(os.sched_getaffinity(0))
  tf.config.threading.set_intra_op_parallelism_threads(num_cores)
  tf.config.threading.set_inter_op_parallelism_threads(num_cores)

  def read(path):
    encoded = tf.io.read_file(path)
    shape = tf.io.extract_jpeg_shape(encoded)
    begin, size, _ = tf.image.sample_distorted_bounding_box(
      shape,
      tf.constant([[[0.0, 0.0, 1.0, 1.0]]]),
      area_range=AREA,
      aspect_ratio_range=ASPECT,
      max_attempts=10,
      min_object_covered=0.0,
    )
    top, left, _ = tf.unstack(begin)
    height, width, _ = tf.unstack(size)
    image = tf.image.decode_and_crop_jpeg(
      encoded, tf.stack([top, left, height, width]), channels=3
    )
    image = tf.image.resize(image, [SIZE, SIZE], antialias=True)
    return tf.cast(tf.round(image), tf.uint8)

  paths = sorted(str(path) for path in (folder / 'files').glob('*/*.jpg'))
  data = tf.data.Dataset.from_tensor_slices(paths).shuffle(len(paths)).repeat()
  data = data.map(read, num_parallel_calls=num_cores).batch(BATCH).prefetch(2)
  return iter(data)


READERS = {
  'ours': ours,
  'ours_pil': ours_pil,
  'simplejpeg': simplejpeg,
  'torch': torch,
  'tensorflow': tensorflow,
}


def main():
  """Serves batches."""
  library, num_workers, folder = sys.argv[1:]
  batches = READERS[library](int(num_workers), pathlib.Path(folder))
  worker.serve(lambda: next(batches), lambda: None)


if __name__ == '__main__':
  main()
