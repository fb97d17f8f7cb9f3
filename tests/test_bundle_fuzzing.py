"""Bundles from strangers: whatever is in them, there is one clear error."""

import json
import os
import shutil
import struct
import sys

import hypothesis
from hypothesis import strategies as st
import jax
import numpy as np
import pytest

from ijckd_jax.bundles import bundles
from ijckd_jax.runtime import config_utils
from tests import test_bundles

# A name that would do harm if it were imported.
CANARY = 'tests.canary:Name'
SETTINGS = hypothesis.settings(
  deadline=None,
  derandomize=True,
  max_examples=int(os.environ.get('FUZZ_EXAMPLES', '30')),
  suppress_health_check=list(hypothesis.HealthCheck),
)
SCALARS = st.one_of(
  st.none(),
  st.booleans(),
  st.integers(-(2**70), 2**70),
  st.sampled_from([0, -1, 10**9, 2**31, 2**63, 10**400]),
  st.floats(),
  st.text(max_size=20),
  st.sampled_from([CANARY, 'os:system', '../../etc/passwd', '\x00', '\ud800']),
)
JSON = st.recursive(
  SCALARS,
  lambda inner: st.one_of(
    st.lists(inner, max_size=4),
    st.dictionaries(st.text(max_size=8), inner, max_size=4),
  ),
  max_leaves=6,
)


@pytest.fixture(scope='module')
def sound(tmp_path_factory):
  """Returns the folder of a sound bundle."""
  folder = tmp_path_factory.mktemp('sound') / 'bundle'
  test_bundles.make_bundle(student='resnet8', teacher='resnet8').save(folder)
  return folder


@pytest.fixture(scope='module')
def place(tmp_path_factory):
  return tmp_path_factory.mktemp('place') / 'bundle'


def load(sound, place, **files):
  """Loads a copy of a bundle with other contents; returns it, or None.

  Whatever goes wrong must be a UserError of one printable line.
  """
  shutil.rmtree(place, ignore_errors=True)
  shutil.copytree(sound, place)
  names = {'spec': bundles.SPEC_FILE, 'arrays': bundles.ARRAYS_FILE}
  for name, content in files.items():
    (place / names[name]).write_bytes(content)
  return attempt(place)


def attempt(place):
  try:
    return bundles.load(place)
  except config_utils.UserError as error:
    message = str(error)
    assert message.isprintable() and len(message) < 700, message
    return None
  finally:
    assert 'tests.canary' not in sys.modules


def spec_of(sound):
  return json.loads((sound / bundles.SPEC_FILE).read_text())


def arrays_of(sound):
  return (sound / bundles.ARRAYS_FILE).read_bytes()


def mutated(data: bytes, kind: str, at: float, bit: int, more: bytes) -> bytes:
  place = int(at * (len(data) - 1))
  if kind == 'truncate':
    return data[:place]
  if kind == 'insert':
    return data[:place] + more + data[place:]
  changed = bytearray(data)
  changed[place] ^= 1 << bit
  return bytes(changed)


MUTATION = {
  'kind': st.sampled_from(['flip', 'truncate', 'insert']),
  'at': st.floats(0, 1),
  'bit': st.integers(0, 7),
  'more': st.binary(min_size=1, max_size=9),
}


@SETTINGS
@hypothesis.given(**MUTATION)
def test_bytes_of_the_description(sound, place, **mutation):
  data = (sound / bundles.SPEC_FILE).read_bytes()
  load(sound, place, spec=mutated(data, **mutation))


@SETTINGS
@hypothesis.given(**MUTATION)
def test_bytes_of_the_arrays(sound, place, **mutation):
  """No flipped bit is overlooked: there is a checksum."""
  data = arrays_of(sound)
  changed = mutated(data, **mutation)
  found = load(sound, place, arrays=changed)
  assert found is None or changed == data


def paths_in(tree, prefix=()):
  """Yields the path of each node of a JSON value."""
  yield prefix
  if isinstance(tree, dict):
    for key, value in tree.items():
      yield from paths_in(value, (*prefix, key))
  elif isinstance(tree, list):
    for number, value in enumerate(tree[:3]):
      yield from paths_in(value, (*prefix, number))


@SETTINGS
@hypothesis.given(data=st.data())
def test_nodes_of_the_description(sound, place, data):
  check_nodes(sound, place, data)


def check_nodes(sound, place, data):
  """Loads a bundle of which one or two nodes say something else."""
  spec = spec_of(sound)
  for _ in range(data.draw(st.integers(1, 2))):
    path = data.draw(st.sampled_from(list(paths_in(spec))[1:]))
    parent = spec
    for key in path[:-1]:
      parent = parent[key]
    if data.draw(st.integers(0, 4)) == 0:
      del parent[path[-1]]
    else:
      parent[path[-1]] = data.draw(JSON)
  found = load(sound, place, spec=json.dumps(spec).encode())
  if found is not None:  # Such as with another name for a class.
    shapes = jax.tree.map(np.shape, found.variables)
    assert shapes == jax.tree.map(np.shape, bundles.load(sound).variables)


@SETTINGS
@hypothesis.given(data=st.data())
def test_header_of_the_arrays(sound, place, data):
  """Shapes, offsets and dtypes that the file does not have, in any size."""
  content = arrays_of(sound)
  (length,) = struct.unpack('<Q', content[:8])
  header = json.loads(content[8 : 8 + length])
  name = data.draw(st.sampled_from(sorted(header)))
  number = st.one_of(
    st.integers(-2, 2**64), st.sampled_from([0, 2**31, 2**62, 2**63])
  )
  change = data.draw(st.sampled_from(['shape', 'data_offsets', 'dtype', 'all']))
  if change == 'dtype':
    header[name]['dtype'] = data.draw(
      st.sampled_from(['F64', 'F16', 'BF16', 'I8', 'BOOL', 'X', '', 'U64'])
    )
  elif change == 'all':
    header[name] = data.draw(JSON)
  else:
    header[name][change] = data.draw(st.lists(number, max_size=4))
  text = json.dumps(header).encode()
  declared = data.draw(st.one_of(st.just(len(text)), number)) % 2**64
  changed = struct.pack('<Q', declared) + text + content[8 + length :]
  before = json.loads(content[8 : 8 + length])
  found = load(sound, place, arrays=changed)
  assert found is None or (header == before and declared == len(text))


def as_pipe(path):
  os.mkfifo(path)  # Which would be waited for.


def as_endless(path):
  path.symlink_to('/dev/zero')


def as_folder(path):
  path.mkdir()


def as_link_outside(path):
  outside = path.parent.parent / f'outside_{path.name}'
  outside.write_bytes(path.with_name('kept').read_bytes())
  path.symlink_to(outside)


def as_dangling(path):
  path.symlink_to('nowhere')


def as_loop(path):
  path.symlink_to(path.name)


@pytest.mark.parametrize('name', [bundles.SPEC_FILE, bundles.ARRAYS_FILE])
@pytest.mark.parametrize(
  'make',
  [as_pipe, as_endless, as_folder, as_link_outside, as_dangling, as_loop],
)
def test_what_is_no_file_of_the_folder(sound, tmp_path, name, make):
  folder = shutil.copytree(sound, tmp_path / 'bundle')
  (folder / name).rename(folder / 'kept')
  make(folder / name)
  with pytest.raises(config_utils.UserError):
    bundles.load(folder)


def test_link_within_the_folder_is_followed(sound, tmp_path):
  folder = shutil.copytree(sound, tmp_path / 'bundle')
  arrays = folder / bundles.ARRAYS_FILE
  arrays.rename(folder / 'kept')
  arrays.symlink_to('kept')
  assert attempt(folder) is not None
  # And where the folder itself is a link.
  (tmp_path / 'link').symlink_to(folder)
  assert attempt(tmp_path / 'link') is not None


@pytest.mark.parametrize('name', [bundles.SPEC_FILE, bundles.ARRAYS_FILE])
def test_huge_files_are_not_read(sound, tmp_path, name):
  """A sparse file of a TiB takes no room, and would fill the memory."""
  folder = shutil.copytree(sound, tmp_path / 'bundle')
  os.truncate(folder / name, 2**40)
  with pytest.raises(config_utils.UserError, match='1,099,511,627,776 bytes'):
    bundles.load(folder)


def test_huge_descriptions_are_refused_or_abstract(sound, place):
  """Arrays of any size may be described; without the arrays that is all."""
  spec = spec_of(sound)
  spec['class_names'] = ['x'] * 300_000
  assert load(sound, place, spec=json.dumps(spec).encode()) is None
  spec = spec_of(sound)
  spec['connector']['features'] = 2**31
  assert load(sound, place, spec=json.dumps(spec).encode()) is None


def test_bundles_of_before_have_no_checksum(sound, place):
  spec = spec_of(sound)
  assert len(spec.pop(bundles.CHECKSUM)) == 64
  assert load(sound, place, spec=json.dumps(spec).encode()) is not None
