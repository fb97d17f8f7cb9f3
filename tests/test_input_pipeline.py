"""The order of examples is a function of seed and position alone."""

import itertools

import numpy as np
import pytest

from ijckd_jax.data import datasets
from ijckd_jax.data import input_pipeline

NUM = 50


@pytest.fixture(scope='module')
def arrays():
  images = np.arange(NUM, dtype=np.uint8)[:, None, None, None]
  return datasets.Arrays(images, np.arange(NUM, dtype=np.int64) % 7)


def stream(arrays, *, start=0, steps=20, rows=slice(0, 16), seed=3):
  return list(
    input_pipeline.train_batches(
      arrays,
      batch_size=16,
      seed=seed,
      start_step=start,
      stop_step=steps,
      rows=rows,
    )
  )


def joined(batches, name):
  return np.concatenate([batch[name] for batch in batches])


def test_every_epoch_is_a_permutation_in_an_order_of_its_own(arrays):
  batches = stream(arrays)
  indices, epochs = joined(batches, 'index'), joined(batches, 'epoch')
  np.testing.assert_array_equal(epochs, np.arange(20 * 16) // NUM)
  orders = [indices[epochs == epoch] for epoch in range(6)]
  for order in orders:
    np.testing.assert_array_equal(np.sort(order), np.arange(NUM))
  for one, other in itertools.combinations(orders, 2):
    assert not np.array_equal(one, other)
  assert all(len(batch['label']) == 16 for batch in batches)


def test_images_and_labels_belong_to_their_index(arrays):
  batches = stream(arrays)
  indices = joined(batches, 'index')
  np.testing.assert_array_equal(joined(batches, 'image')[:, 0, 0, 0], indices)
  np.testing.assert_array_equal(joined(batches, 'label'), indices % 7)
  assert batches[0]['label'].dtype == np.int32
  assert batches[0]['image'].dtype == np.uint8


def test_a_later_start_continues_the_same_stream(arrays):
  whole, tail = stream(arrays), stream(arrays, start=13)
  np.testing.assert_array_equal(
    joined(whole[13:], 'index'), joined(tail, 'index')
  )
  np.testing.assert_array_equal(
    joined(whole[13:], 'epoch'), joined(tail, 'epoch')
  )


def test_processes_share_out_the_rows(arrays):
  whole = stream(arrays)
  parts = [stream(arrays, rows=slice(r, r + 4)) for r in range(0, 16, 4)]
  for step, batch in enumerate(whole):
    for name, value in batch.items():
      together = np.concatenate([part[step][name] for part in parts])
      np.testing.assert_array_equal(value, together)


def test_seeds_differ(arrays):
  one, other = stream(arrays, seed=3), stream(arrays, seed=4)
  assert not np.array_equal(joined(one, 'index'), joined(other, 'index'))


@pytest.mark.parametrize('num_processes', [1, 2])
def test_evaluation_sees_every_example_once(arrays, num_processes):
  seen = []
  for process in range(num_processes):
    batches = list(
      input_pipeline.eval_batches(
        arrays,
        batch_size=16,
        process_index=process,
        num_processes=num_processes,
      )
    )
    assert {len(batch['mask']) for batch in batches} == {16 // num_processes}
    assert len(batches) == 4  # On every process: collectives must pair up.
    for batch in batches:
      np.testing.assert_array_equal(batch['image'].ravel(), batch['index'])
      seen.extend(batch['index'][batch['mask']])
  assert sorted(seen) == list(range(NUM))
