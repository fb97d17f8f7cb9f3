"""Checkpoints: nothing damaged is read, nothing is lost on the way."""

import json
import logging
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ijckd_jax.distillation import train_state
from ijckd_jax.runtime import config_utils
from ijckd_jax.runtime import disk
from ijckd_jax.training import checkpoints


@pytest.fixture(autouse=True)
def quiet(monkeypatch):
  """As the commands are; what Orbax says of damage comes in threads."""
  for name in ('absl', 'asyncio'):
    monkeypatch.setattr(logging.getLogger(name), 'level', logging.CRITICAL)


def make_state(step=0):
  key = jax.random.fold_in(jax.random.key(0), step)
  variables = {
    'params': {'head': {'kernel': jax.random.normal(key, (40, 7))}},
    'batch_stats': {'backbone': {'mean': jnp.full(5, float(step))}},
  }
  tx = optax.sgd(0.1, momentum=0.9)
  state = train_state.create(variables, tx, with_ema=True)
  return jax.device_get(state.replace(step=jnp.asarray(step, jnp.int32)))


def assert_same(one, other):
  jax.tree.map(np.testing.assert_array_equal, one, other)


def fill(folder, scores, keep=2):
  """Saves a state for each step of `scores`, and returns the files' names."""
  store = checkpoints.Checkpoints(folder, keep=keep)
  for step, score in scores.items():
    memo = {'sums': {'loss': [0.1 * step, 3.0]}}
    store.save(step, make_state(step), score=score, memo=memo)
  store.close()
  return sorted(path.name for path in folder.iterdir())


@pytest.fixture(scope='module')
def two(tmp_path_factory):
  """Returns a folder with checkpoints of steps 4 and 8."""
  folder = tmp_path_factory.mktemp('two') / 'checkpoints'
  assert fill(folder, {4: 0.5, 8: 0.25}) == ['4', '8']
  return folder


# Without which nothing can be read.
FILES = ('_CHECKPOINT_METADATA', 'manifest.ocdbt', 'd')


def test_state_score_and_memo_come_back(two):
  store = checkpoints.Checkpoints(two, keep=2)
  state, memo = store.restore_newest(make_state())
  assert_same(state, make_state(8))
  assert memo == {'sums': {'loss': [0.8, 3.0]}}
  assert store.best_step == 4
  assert_same(store.restore_best(make_state())[0], make_state(4))


def test_last_ones_and_the_best_are_kept(tmp_path):
  scores = {1: 0.2, 2: 0.9, 3: None, 4: 0.9, 5: 0.1, 6: None, 7: 0.3}
  assert fill(tmp_path / 'a', scores) == ['4', '6', '7']
  assert fill(tmp_path / 'b', scores, keep=1) == ['4', '7']
  assert fill(tmp_path / 'c', {1: None, 2: None, 3: None}) == ['2', '3']


def test_step_that_is_there_is_left_alone(two, tmp_path):
  folder = shutil.copytree(two, tmp_path / 'checkpoints')
  store = checkpoints.Checkpoints(folder, keep=2)
  store.save(8, make_state(3), score=1.0, memo={})
  store.wait()
  assert_same(store.restore(8, make_state())[0], make_state(8))


@pytest.mark.parametrize('change', ['flip', 'truncate', 'empty', 'remove'])
def test_damage_is_named_and_set_aside(two, tmp_path, caplog, change):
  """Each file of the newest in turn: it is read rightly, or not at all."""
  files = [path for path in (two / '8').rglob('*') if path.is_file()]
  set_aside = set()
  for number, file in enumerate(files):
    folder = shutil.copytree(two, tmp_path / str(number))
    damage(folder / file.relative_to(two), change)
    caplog.clear()
    store = checkpoints.Checkpoints(folder, keep=2)
    state, memo = store.restore_newest(make_state())
    assert_same(state, make_state(int(state.step)))
    assert memo == {'sums': {'loss': [0.1 * state.step, 3.0]}}
    if state.step == 8:
      continue
    name = file.relative_to(two / '8').parts[0]
    set_aside.add(name)
    assert 'checkpoint of step 8 is damaged' in caplog.text
    there = {p.name for p in (folder / 'damaged' / '8').rglob('*')}
    assert there >= {p.name for p in files} - {file.name}
    # The step comes again, and is damaged again.
    store.save(8, make_state(8), score=0.25, memo=memo)
    store.close()
    damage(folder / '8' / 'manifest.ocdbt', 'remove')
    store = checkpoints.Checkpoints(folder, keep=2)
    assert store.restore_newest(make_state())[0].step == 4
    assert (folder / 'damaged' / '8.1').exists()
  assert set_aside >= set(FILES)


def damage(path, change):
  data = bytearray(path.read_bytes())
  if change == 'flip' and data:
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
  elif change == 'truncate':
    path.write_bytes(data[: len(data) // 2])
  elif change == 'empty':
    path.write_bytes(b'')
  elif change == 'remove':
    path.unlink()


@pytest.mark.parametrize('name', ['content', 'checksum'])
def test_flipped_bit_of_the_metadata_is_seen(two, tmp_path, name):
  """Such as a digit of a running sum, which would still be JSON."""
  folder = shutil.copytree(two, tmp_path / 'checkpoints')
  path = folder / '8' / '_CHECKPOINT_METADATA'
  metadata = json.loads(path.read_text())
  value = metadata['custom_metadata'][name]
  changed = value + 1 if name == 'checksum' else value.replace('0.25', '0.75')
  assert changed != value
  metadata['custom_metadata'][name] = changed
  path.write_text(json.dumps(metadata))
  store = checkpoints.Checkpoints(folder, keep=2)
  assert store.restore_newest(make_state())[0].step == 4


def test_damaged_best_one_gives_way_to_the_next(two, tmp_path):
  folder = shutil.copytree(two, tmp_path / 'checkpoints')
  damage(max((folder / '4' / 'd').iterdir()), 'flip')
  store = checkpoints.Checkpoints(folder, keep=2)
  assert store.restore_best(make_state())[0].step == 8
  assert store.best_step == 8


def test_without_a_usable_one_there_is_a_stop(two, tmp_path):
  """And never a silent start from scratch, also not at the second try."""
  folder = shutil.copytree(two, tmp_path / 'checkpoints')
  for step in (4, 8):
    damage(folder / str(step) / 'manifest.ocdbt', 'truncate')
  for _ in range(2):
    store = checkpoints.Checkpoints(folder, keep=2)
    with pytest.raises(config_utils.UserError, match='no checkpoint in .*can'):
      store.restore_newest(make_state())
  assert sorted(p.name for p in (folder / 'damaged').iterdir()) == ['4', '8']
  none = checkpoints.Checkpoints(tmp_path / 'none', keep=2)
  assert none.restore_newest(make_state()) is None


def test_other_format_is_refused_by_name_and_left(two, tmp_path):
  folder = shutil.copytree(two, tmp_path / 'checkpoints')
  path = folder / '8' / '_CHECKPOINT_METADATA'
  metadata = json.loads(path.read_text())
  metadata['custom_metadata']['format_version'] = 2
  path.write_text(json.dumps(metadata))
  with pytest.raises(config_utils.UserError, match='step 8 .* has format 2'):
    checkpoints.Checkpoints(folder, keep=2)
  assert (folder / '8').exists() and not (folder / 'damaged').exists()


def test_what_does_not_fit_is_refused_and_left(two, tmp_path):
  folder = shutil.copytree(two, tmp_path / 'checkpoints')
  state = make_state()
  state.params['head']['kernel'] = state.params['head']['kernel'][:, :3]
  store = checkpoints.Checkpoints(folder, keep=2)
  with pytest.raises(config_utils.UserError, match=r'params/head/kernel is'):
    store.restore_newest(state)
  assert (folder / '8').exists() and not (folder / 'damaged').exists()


def test_what_a_killed_process_left_is_removed(two, tmp_path):
  folder = shutil.copytree(two, tmp_path / 'checkpoints')
  shutil.copytree(two / '8', folder / '12.orbax-checkpoint-tmp')
  shutil.copytree(two / '8', folder / '.1.removed')
  (folder / 'notes').mkdir()  # Somebody's own.
  (folder / 'notes.txt').write_text('mine')
  store = checkpoints.Checkpoints(folder, keep=2)
  assert store.restore_newest(make_state())[0].step == 8
  left = sorted(path.name for path in folder.iterdir())
  assert left == ['4', '8', 'notes', 'notes.txt']


def test_disk_that_is_full_for_a_while_costs_nothing(
  tmp_path, monkeypatch, caplog
):
  """A file in the place of the folder to be written fails like a full disk."""
  monkeypatch.setattr(disk, 'RETRY_SECONDS', (0.2,) * 20)
  folder = tmp_path / 'checkpoints'
  fill(folder, {4: 0.5})
  store = checkpoints.Checkpoints(folder, keep=2)
  hidden = folder.rename(tmp_path / 'unmounted')
  store.save(8, make_state(8), score=None, memo={})
  while 'next try' not in caplog.text:
    pass
  assert not folder.exists()  # It is not made anew, on another disk.
  hidden.rename(folder)
  store.close()
  store = checkpoints.Checkpoints(folder, keep=2)
  assert_same(store.restore_newest(make_state())[0], make_state(8))


def test_disk_that_stays_full_is_an_error_with_its_reason(
  tmp_path, monkeypatch
):
  monkeypatch.setattr(disk, 'RETRY_SECONDS', (0.01, 0.01))
  folder = tmp_path / 'checkpoints'
  fill(folder, {4: 0.5})
  store = checkpoints.Checkpoints(folder, keep=1)
  hidden = folder.rename(tmp_path / 'unmounted')
  store.save(8, make_state(8), score=None, memo={})
  with pytest.raises(OSError, match='step 8 .* over 3 tries .*no longer there'):
    store.wait()
  # The old one is there still, since the new one is not.
  store = checkpoints.Checkpoints(hidden, keep=1)
  assert_same(store.restore_newest(make_state())[0], make_state(4))


def test_folder_is_that_of_the_files(two):
  """What the tests above damage is what there is."""
  for name in FILES:
    assert (pathlib.Path(two) / '8' / name).exists(), name
