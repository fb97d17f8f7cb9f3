"""Encoded images of any size: read, decoded, replaced, shared out."""

import dataclasses
import io
import json
import multiprocessing
import os
import pathlib
import pickle
import signal
import subprocess
import sys
import time

import numpy as np
import PIL.Image
import pytest
import sklearn.datasets
import tensorflow_datasets as tfds

from ijckd_jax.data import datasets
from ijckd_jax.data import images
from ijckd_jax.data import input_pipeline
from ijckd_jax.data.datasets import imagenet
from ijckd_jax.data.datasets import prepared
from ijckd_jax.runtime import config_utils
from ijckd_jax.training import experiment
from ijckd_jax.training import loop
from ijckd_jax.training import train

NUM_TRAIN, NUM_TEST = 40, 13


def jpegs(num, seed):
  """Returns encoded crops of photographs, of many sizes."""
  random = np.random.RandomState(seed)
  pictures = sklearn.datasets.load_sample_images().images
  result = []
  for number in range(num):
    height, width = random.randint(40, 120, 2)
    top, left = random.randint(0, 300, 2)
    pixels = pictures[number % 2][top : top + height, left : left + width]
    file = io.BytesIO()
    PIL.Image.fromarray(pixels).save(file, 'JPEG')
    result.append(file.getvalue())
  return result


def write_imagenet(data_dir, splits):
  """Writes encoded images through tfds's own features of imagenet2012."""
  columns = {
    split: {
      'image': encoded,
      'label': range(len(encoded)),
      'file_name': [f'{split}_{i}.JPEG' for i in range(len(encoded))],
    }
    for split, encoded in splits.items()
  }
  prepared.write(tfds.builder_cls('imagenet2012'), str(data_dir), columns)


@pytest.fixture(scope='module')
def data_dir(tmp_path_factory):
  folder = tmp_path_factory.mktemp('data')
  write_imagenet(
    folder, {'train': jpegs(NUM_TRAIN, 0), 'validation': jpegs(NUM_TEST, 1)}
  )
  return str(folder)


@pytest.fixture(scope='module')
def damaged_dir(tmp_path_factory):
  """Two neighbours among the training images are truncated, and one to test."""
  folder = tmp_path_factory.mktemp('damaged')
  train_images, test_images = jpegs(NUM_TRAIN, 0), jpegs(NUM_TEST, 1)
  train_images[7] = train_images[7][:300]
  train_images[8] = b'no image'
  test_images[3] = test_images[3][:-500]
  write_imagenet(folder, {'train': train_images, 'validation': test_images})
  return str(folder)


def dataset(data_dir, **fields):
  return imagenet.Imagenet(data_dir=data_dir, size=32, resize=36, **fields)


def file_number(arrays, index):
  return int(arrays.name_of(index).partition('_')[2].partition('.')[0])


def test_imagenet_is_what_tfds_and_torchvision_know(data_dir):
  data = dataset(data_dir)
  assert len(data.class_names) == 1000
  assert data.class_names[0] == 'n01440764'  # The tench, torchvision's first.
  assert list(data.class_names) == sorted(data.class_names)
  assert data.image_shape == (32, 32, 3)
  assert [len(data.load(split)) for split in datasets.SPLITS] == [40, 0, 13]


def test_evaluation_views_and_labels(data_dir):
  arrays = dataset(data_dir).load('test')
  chosen = arrays.take(np.array([5, 2]))
  assert chosen.images.shape == (2, 32, 32, 3)
  for row, index in enumerate([5, 2]):
    number = file_number(arrays, index)
    assert chosen.labels[row] == number
    np.testing.assert_array_equal(
      chosen.images[row],
      images.Views(32, 36).evaluation(jpegs(NUM_TEST, 1)[number]),
    )


def test_views_are_functions_of_seed_epoch_and_index(data_dir):
  arrays = dataset(data_dir).load('train')

  def views(indices, epochs, seed=0):
    return arrays.train_views(np.array(indices), np.array(epochs), seed)

  one = views([3, 9, 3], [0, 0, 1])
  np.testing.assert_array_equal(one['image'][0], views([3], [0])['image'][0])
  assert (one['image'][0] != one['image'][2]).any()
  assert (one['image'][0] != views([3], [0], seed=1)['image'][0]).any()
  assert one['label'][0] == file_number(arrays, 3) == one['label'][2]
  assert not one['bad'].any() and one['label'].dtype == np.int32


def stream(arrays, num_workers, rows=slice(0, 8), views=0):
  return list(
    input_pipeline.train_batches(
      arrays,
      batch_size=8,
      seed=3,
      start_step=2,
      stop_step=12,
      rows=rows,
      views=views,
      num_workers=num_workers,
    )
  )


def assert_same(one, other):
  assert len(one) == len(other) == 10
  for batch, twin in zip(one, other, strict=True):
    assert batch.keys() == twin.keys()
    for name, value in batch.items():
      np.testing.assert_array_equal(value, twin[name], err_msg=name)


def test_any_number_of_workers_and_processes_sees_the_same(data_dir):
  arrays = dataset(data_dir).load('train')
  alone = stream(arrays, 0)
  assert_same(alone, stream(arrays, 3))
  parts = [stream(arrays, 0, slice(r, r + 4)) for r in (0, 4)]
  assert_same(
    alone,
    [
      {name: np.concatenate([a[name], b[name]]) for name in a}
      for a, b in zip(*parts, strict=True)
    ],
  )


def test_workers_outlive_the_signals_that_stop_a_run(data_dir):
  """A terminal's Ctrl-C and a batch system's SIGTERM reach them as well."""
  arrays = dataset(data_dir).load('train')
  batches = input_pipeline.train_batches(
    arrays,
    batch_size=8,
    seed=3,
    start_step=2,
    stop_step=12,
    rows=slice(0, 8),
    num_workers=2,
  )
  seen = [next(batches)]
  workers = multiprocessing.active_children()
  assert len(workers) == 2
  for number in (signal.SIGINT, signal.SIGTERM):
    for worker in workers:
      os.kill(worker.pid, number)
  assert_same([*seen, *batches], stream(arrays, 0))
  assert not any(worker.is_alive() for worker in workers)


ORPHANS = """
import multiprocessing, sys, time
from tests import test_photos
if __name__ == '__main__':
  arrays = test_photos.dataset(sys.argv[1]).load('train')
  batches = test_photos.input_pipeline.train_batches(
    arrays, batch_size=8, seed=0, start_step=0, stop_step=10**6,
    rows=slice(0, 8), num_workers=1)
  next(batches)
  print(*[child.pid for child in multiprocessing.active_children()], flush=True)
  time.sleep(600)
"""


def test_workers_end_with_a_run_that_was_killed(data_dir, tmp_path):
  (tmp_path / 'run.py').write_text(ORPHANS)
  root = str(pathlib.Path(__file__).parents[1])
  with subprocess.Popen(
    [sys.executable, tmp_path / 'run.py', data_dir],
    stdout=subprocess.PIPE,
    env={**os.environ, 'PYTHONPATH': root},
    text=True,
  ) as run:
    (worker,) = map(int, run.stdout.readline().split())
    os.kill(worker, 0)
    run.kill()
    run.wait()
    for _ in range(300):
      try:
        os.kill(worker, 0)
      except ProcessLookupError:
        return
      time.sleep(0.1)
  pytest.fail('the worker lives on')


def test_so_many_views_come_again(data_dir):
  arrays = dataset(data_dir).load('train')
  seen = {}
  for batch in stream(arrays, 0, views=2):
    for index, epoch, image in zip(
      batch['index'], batch['epoch'], batch['image'], strict=True
    ):
      seen[index, epoch] = image
  assert {epoch for _, epoch in seen} == {0, 1, 2}
  again = [key for key in seen if key[1] == 2 and (key[0], 0) in seen]
  assert again
  for index, _ in again:
    np.testing.assert_array_equal(seen[index, 2], seen[index, 0])


@pytest.mark.parametrize(
  'num_workers, num_processes',
  [
    *((0, 1), (2, 2)),
    *(pytest.param(*pair, marks=pytest.mark.slow) for pair in ((0, 2), (2, 1))),
  ],
)
def test_evaluation_counts_each_once(data_dir, num_workers, num_processes):
  arrays, seen = dataset(data_dir).load('test'), []
  for process in range(num_processes):
    for batch in input_pipeline.eval_batches(
      arrays,
      batch_size=4,
      process_index=process,
      num_processes=num_processes,
      num_workers=num_workers,
    ):
      for index, image in zip(
        batch['index'][batch['mask']],
        batch['image'][batch['mask']],
        strict=True,
      ):
        seen.append(index)
        np.testing.assert_array_equal(
          image, arrays.take(np.array([index])).images[0]
        )
  assert sorted(seen) == list(range(NUM_TEST))


def test_validation_is_held_out_of_training(data_dir):
  data = dataset(data_dir, validation_fraction=0.25)
  names = {
    split: {arrays.name_of(index) for index in range(len(arrays))}
    for split in ('train', 'validation')
    for arrays in [data.load(split)]
  }
  assert len(names['train']) == 30 and len(names['validation']) == 10
  assert not names['train'] & names['validation']
  again = data.load('validation')
  assert {again.name_of(i) for i in range(10)} == names['validation']


@pytest.mark.parametrize('fraction', [0.001, 0.999])
@pytest.mark.parametrize('split', ['train', 'validation'])
def test_a_part_that_leaves_nothing_is_refused(data_dir, fraction, split):
  """Of 40 images: round(0.04) and round(39.96)."""
  data = dataset(data_dir, validation_fraction=fraction)
  with pytest.raises(config_utils.UserError, match=f'{fraction} of 40 train'):
    data.load(split)


def test_a_damaged_training_image_is_replaced_by_the_next(damaged_dir):
  arrays = dataset(damaged_dir).load('train')
  by_number = {file_number(arrays, i): i for i in range(len(arrays))}
  for number in (7, 8):
    index = by_number[number]
    batch = arrays.train_views(np.array([index]), np.array([0]), 0)
    assert batch['bad'].tolist() == [True]
    following = index + 1
    while file_number(arrays, following % len(arrays)) in (7, 8):
      following += 1
    assert batch['label'][0] == file_number(arrays, following % len(arrays))
  assert_same(stream(arrays, 0), stream(arrays, 2))


@pytest.mark.parametrize('num_workers', [0, 2])
def test_a_damaged_test_image_stops(damaged_dir, num_workers):
  arrays = dataset(damaged_dir).load('test')
  with pytest.raises(config_utils.UserError, match=r'validation_3\.JPEG'):
    list(
      input_pipeline.eval_batches(
        arrays,
        batch_size=4,
        process_index=0,
        num_processes=1,
        num_workers=num_workers,
      )
    )


def test_photos_cross_to_other_processes(data_dir):
  arrays = dataset(data_dir).load('train')
  arrays.take(np.array([0]))  # Opens the files, which cannot cross.
  copy = pickle.loads(pickle.dumps(arrays))
  np.testing.assert_array_equal(
    copy.take(np.array([4])).images, arrays.take(np.array([4])).images
  )


def test_a_digest_tells_data_and_views_apart(data_dir, damaged_dir):
  digests = [
    dataset(data_dir).load('train').digest(),
    dataset(data_dir).load('test').digest(),
    dataset(damaged_dir).load('train').digest(),
    dataset(data_dir, min_area=0.5).load('train').digest(),
    dataset(data_dir, validation_fraction=0.1).load('train').digest(),
  ]
  assert len(set(digests)) == len(digests)
  assert dataset(data_dir).load('train').digest() == digests[0]


@pytest.mark.parametrize(
  'fields',
  [
    dict(size=40, resize=36),
    dict(size=0),
    dict(size=-1),
    dict(size=63.5),
    dict(size=float('nan')),
    dict(resize=256.5),
    dict(resize=float('nan')),
    dict(min_area=0.0),
    dict(min_area=1.5),
    dict(min_area=float('nan')),
    dict(validation_fraction=1.0),
    dict(validation_fraction=float('nan')),
    dict(max_bad_fraction=-0.1),
    dict(max_bad_fraction=float('nan')),
  ],
)
def test_wrong_fields_are_refused(fields):
  with pytest.raises(config_utils.UserError, match=next(iter(fields))):
    imagenet.Imagenet(**fields)


def test_buckets_are_refused_with_the_way_out():
  with pytest.raises(config_utils.UserError, match='gcsfuse'):
    imagenet.Imagenet(data_dir='gs://bucket/data').load('train')


def test_unprepared_says_what_to_run(tmp_path):
  with pytest.raises(config_utils.UserError, match='prepare imagenet2012'):
    imagenet.Imagenet(data_dir=str(tmp_path)).load('train')


def config_of(data_dir, **settings):
  config = experiment.default_config(
    dataset='imagenet2012', teacher='resnet8', student='resnet8', method='ce'
  )
  config_utils.override(
    config,
    {
      'dataset.data_dir': data_dir,
      'dataset.size': 32,
      'dataset.resize': 36,
      'dataset.max_bad_fraction': 0.05,
      'batch_size': 8,
      'eval_batch_size': 8,
      'total_epochs': 2.0,
      'optimizer.schedule': 'cosine',
      **settings,
    },
  )
  return config


def test_a_run_names_what_was_damaged(data_dir, damaged_dir, tmp_path, caplog):
  """Trained with two damaged images, evaluated on what is whole."""
  data = dataset(damaged_dir, max_bad_fraction=0.05)
  whole = dataset(data_dir).load('test')

  @dataclasses.dataclass(frozen=True)
  class Mixed:
    image_shape = data.image_shape
    class_names = data.class_names
    mean, std, crop_padding, flip = data.mean, data.std, 0, True

    def load(self, split):
      return whole if split == 'test' else data.load(split)

  train.train_and_evaluate(
    config_of(damaged_dir), tmp_path / 'run', dataset=Mixed()
  )
  summary = json.loads((tmp_path / 'run/summary.json').read_text())
  assert sorted(summary['damaged_images']) == ['train_7.JPEG', 'train_8.JPEG']
  warned = [r.getMessage() for r in caplog.records if 'decoded' in r.message]
  assert len(warned) == 2  # Once each, though seen in both epochs.


def test_too_many_damaged_images_stop_a_run(damaged_dir, tmp_path):
  config = config_of(damaged_dir, **{'dataset.max_bad_fraction': 0.03})
  with pytest.raises(config_utils.UserError, match=r'train_[78]\.JPEG'):
    train.train_and_evaluate(config, tmp_path / 'run')
  assert not (tmp_path / 'run/summary.json').exists()


def test_progress_is_read_from_older_memos():
  assert loop.Progress(sums={}, examples=3, seconds=1.0).damaged == []
