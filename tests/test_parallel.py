"""The same step by pmap, shard_map and vmap, on one and on eight devices."""

import os
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest

from tests import steps_on_devices


@pytest.fixture(scope='module')
def on_devices(tmp_path_factory):
  """Returns a function that makes the steps on devices of a child process."""
  folder = tmp_path_factory.mktemp('steps')
  script = pathlib.Path(steps_on_devices.__file__)

  def run(num_devices, mapper, sync_batch_norm):
    out = folder / f'{num_devices}_{mapper}_{sync_batch_norm}.npz'
    if not out.exists():
      subprocess.run(
        [sys.executable, script, out, str(num_devices), mapper]
        + [str(sync_batch_norm)],
        check=True,
        cwd=script.parents[1],
        env={**os.environ, 'PYTHONPATH': str(script.parents[1])},
      )
    return dict(np.load(out))

  return run


def assert_close(one, other, tolerance=2e-5):
  assert one.keys() == other.keys()
  for name, value in one.items():
    scale = max(1e-3, np.abs(value).max())
    np.testing.assert_allclose(
      value, other[name], atol=tolerance * scale, rtol=0, err_msg=name
    )


def one_device(mapper='pmap', sync_batch_norm=True, **fields):
  exp = steps_on_devices.make_experiment(mapper, sync_batch_norm, **fields)
  batches = steps_on_devices.make_batches()
  return steps_on_devices.flatten(*steps_on_devices.mapped_steps(exp, batches))


@pytest.mark.parametrize(
  'mapper', ['pmap', pytest.param('shard_map', marks=pytest.mark.slow)]
)
def test_eight_devices_give_what_one_gives(on_devices, mapper):
  """With batch norm over all devices, how many there are does not matter."""
  assert_close(on_devices(8, mapper, True), one_device())


@pytest.mark.slow
def test_shard_map_is_pmap_on_one_device():
  assert_close(one_device('shard_map'), one_device('pmap'))


@pytest.mark.slow
def test_per_device_batch_norm_is_the_same_by_every_mapper(on_devices):
  exp = steps_on_devices.make_experiment('pmap', sync_batch_norm=False)
  batches = steps_on_devices.make_batches()
  expected = steps_on_devices.flatten(
    *steps_on_devices.vmapped_steps(exp, batches, 8)
  )
  assert_close(on_devices(8, 'pmap', False), expected)
  assert_close(on_devices(8, 'shard_map', False), expected)


@pytest.mark.slow
def test_per_device_batch_norm_normalises_each_devices_rows_by_themselves(
  on_devices,
):
  """One step: the mean over shards of what each would have done alone."""
  exp = steps_on_devices.make_experiment('pmap', sync_batch_norm=False)
  batch = steps_on_devices.make_batches()[0]
  alone = []
  for shard in range(8):
    rows = slice(shard * 6, (shard + 1) * 6)
    part = {name: value[rows] for name, value in batch.items()}
    state, _ = steps_on_devices.mapped_steps(exp, [part])
    alone.append({'params': state.params, 'batch_stats': state.batch_stats})
  # The update of SGD without momentum is linear in the gradient.
  expected = jax.tree.map(lambda *parts: np.mean(parts, axis=0), *alone)
  state, _ = steps_on_devices.vmapped_steps(exp, [batch], 8)
  together = {'params': state.params, 'batch_stats': state.batch_stats}
  assert_close(
    steps_on_devices.flatten(together, {}),
    steps_on_devices.flatten(expected, {}),
  )
  synchronised = on_devices(8, 'pmap', True)
  per_device = on_devices(8, 'pmap', False)
  with pytest.raises(AssertionError):
    assert_close(per_device, synchronised)


def test_accumulated_pieces_give_the_mean_gradient():
  """A batch of one piece four times over, in one go and piece by piece."""
  batch = {
    name: np.tile(value[:12], (4,) + (1,) * (value.ndim - 1))
    for name, value in steps_on_devices.make_batches()[0].items()
  }
  results = []
  for pieces in (1, 4):
    exp = steps_on_devices.make_experiment('pmap', True, accumulation=pieces)
    state, sums = steps_on_devices.mapped_steps(exp, [batch])
    results.append(steps_on_devices.flatten(state.params, sums))
  assert_close(*results)
