"""Bundles that hold programs, of functions that were written in JAX."""

import dataclasses
import datetime
import hashlib
import json

from flax import core
import hypothesis
from hypothesis import strategies as st
import jax
import jax.numpy as jnp
import jaxlib.version
import numpy as np
import pytest

from ijckd_jax.bundles import bundles
from ijckd_jax.data import augment
from ijckd_jax.distillation import connectors
from ijckd_jax.distillation import network as network_lib
from ijckd_jax.models import converted
from ijckd_jax.models import programs
from ijckd_jax.runtime import config_utils
from tests import test_bundle_fuzzing as fuzzing
from tests import test_bundles

SHAPE = (8, 8, 1)
PREPROCESSING = augment.Preprocessing((0.3,), (0.3,), SHAPE[:2])


def features(arrays, image):
  """Returns the map (4, 4, 6) of an image (8, 8, 1)."""
  patches = image.reshape(4, 2, 4, 2).transpose(0, 2, 1, 3).reshape(4, 4, 4)
  return jax.nn.relu(patches @ arrays['w'] - arrays['mean'])


def scaled(arrays, average):
  """Returns pooled features (6,) of a map's average (6,)."""
  return average * arrays['scale']


ARRAYS = {
  'w': np.random.default_rng(0).normal(size=(4, 6)).astype(np.float32),
  'mean': np.full(6, 0.1, np.float32),
}
SCALE = {'scale': np.arange(1, 7, dtype=np.float32)}


def shapes_of(arrays):
  return jax.eval_shape(lambda: arrays)


def make_pool():
  return programs.Pool(
    programs.trace(scaled, shapes_of(SCALE), (6,), vjp_order=1)
  )


def make_converted():
  """Returns a bundle whose network and pool are programs."""
  rng = np.random.default_rng(1)
  backbone = converted.Converted(
    features=core.FrozenDict(
      {'float32': programs.trace(features, shapes_of(ARRAYS), SHAPE)}
    ),
    own_pool=make_pool().program,
    map_is_signed=False,
    pooled_is_signed=False,
    buffers=('mean',),
  )
  variables = {
    'params': {
      'backbone': {'w': ARRAYS['w'], **SCALE},
      'head': {
        'kernel': rng.normal(size=(6, 3)).astype(np.float32),
        'bias': np.zeros(3, np.float32),
      },
    },
    'batch_stats': {'backbone': {'mean': ARRAYS['mean']}},
    'pool': {},
  }
  network = network_lib.plain(backbone, PREPROCESSING)
  return bundles.Bundle(
    network, variables, 'mine', programs.PROGRAM, SHAPE, tuple('abc'), {}
  )


def make_student():
  """Returns a bundle of a student that is connected to that pool."""
  bundle = test_bundles.make_bundle(student='resnet8', teacher='resnet8')
  connector = connectors.Conv1x1(features=6)
  network = dataclasses.replace(
    bundle.network,
    connector=connector,
    connect_size=(2, 2),
    pool=make_pool(),
  )
  made = jax.tree.map(
    np.asarray, network.init(jax.random.key(0), bundle.image_shape, None)
  )
  head = {'kernel': np.ones((6, 10), np.float32), 'bias': np.zeros(10)}
  head['bias'] = head['bias'].astype(np.float32)
  return dataclasses.replace(
    bundle,
    network=network,
    variables={
      'params': {**made['params'], 'head': head},
      'batch_stats': made['batch_stats'],
      'pool': {'params': dict(SCALE)},
    },
    pool_name=programs.PROGRAM,
  )


MAKERS = {'converted': make_converted, 'student': make_student}
FORMATS = {make_converted: 4, make_student: 2}


@pytest.fixture(scope='module', params=MAKERS)
def sound(request, tmp_path_factory):
  """Returns the folder of a sound bundle with programs."""
  folder = tmp_path_factory.mktemp('sound') / 'bundle'
  MAKERS[request.param]().save(folder)
  return folder


@pytest.fixture(scope='module')
def place(tmp_path_factory):
  return tmp_path_factory.mktemp('place') / 'bundle'


@pytest.mark.parametrize('make', MAKERS.values())
def test_a_bundle_comes_back_as_it_was(make, tmp_path):
  bundle = make()
  bundle.save(tmp_path / 'bundle')
  loaded = bundles.load(tmp_path / 'bundle', trust_code=True)
  jax.tree.map(
    np.testing.assert_array_equal, loaded.variables, bundle.variables
  )
  assert loaded.spec() == bundle.spec()
  assert loaded.spec()['format_version'] == FORMATS[make]
  assert loaded.network.programs == bundle.network.programs
  images = np.random.default_rng(0).integers(0, 256, (5, *bundle.image_shape))
  x = bundle.network.preprocessing(jnp.asarray(images))
  given, wanted = (b.network(b.variables, x) for b in (loaded, bundle))
  np.testing.assert_array_equal(given.logits, wanted.logits)
  pooled = np.asarray(given.final).mean((1, 2)) * SCALE['scale']
  np.testing.assert_allclose(given.pooled, pooled, rtol=1e-5)


def test_a_program_is_its_function_and_can_be_differentiated():
  bundle = make_converted()
  images = np.random.default_rng(0).normal(size=(3, *SHAPE))
  images = images.astype(np.float32)
  given = bundle.network(bundle.variables, images)
  wanted = jax.vmap(features, in_axes=(None, 0))(ARRAYS, images)
  np.testing.assert_allclose(given.final, wanted, rtol=1e-5, atol=1e-6)
  # A student is trained through the pool.
  gradient = jax.grad(
    lambda x: bundle.network.pool({'params': SCALE}, x).sum()
  )(wanted)
  np.testing.assert_allclose(
    gradient, np.broadcast_to(SCALE['scale'] / 16, wanted.shape), rtol=1e-6
  )


def test_teacher_of_programs():
  teacher = make_converted().teacher()
  assert teacher.num_params == {'backbone': 30, 'connector': 0, 'head': 21}
  images = np.zeros((2, *SHAPE), np.uint8)
  result = teacher(teacher.arrays, images)
  np.testing.assert_allclose(
    result.logits, result.pooled @ teacher.head['kernel'], rtol=1e-5
  )
  shapes = teacher.shapes((16, 16, 1))  # The view is resized to its size.
  assert shapes.final.shape == (1, 4, 4, 6)


def test_bundles_without_programs_are_as_before(tmp_path):
  """Older versions read them."""
  bundle = test_bundles.make_bundle(student='resnet8', teacher='resnet8')
  assert bundle.spec()['format_version'] == 1
  assert 'programs' not in bundle.spec()


def refused(sound, place, name, data, *, checksum):
  """Returns what is said of a bundle with another program.

  Args:
    sound: folder of the bundle.
    place: where it is copied to.
    name: of the program.
    data: its content.
    checksum: whether the bundle says that this is what was saved.
  """
  spec = fuzzing.spec_of(sound)
  if checksum:
    spec['programs'][name] = hashlib.sha256(data).hexdigest()
  fuzzing.load(sound, place, spec=json.dumps(spec).encode())
  (place / f'{name}.bin').write_bytes(data)
  with pytest.raises(config_utils.UserError) as error:
    bundles.load(place, trust_code=True)
  return str(error.value)


@fuzzing.SETTINGS
@hypothesis.given(**fuzzing.MUTATION)
def test_bytes_of_a_program(sound, place, **mutation):
  """No flipped bit is overlooked: there is a checksum."""
  data = (sound / 'pool.bin').read_bytes()
  changed = fuzzing.mutated(data, **mutation)
  hypothesis.assume(changed != data)
  said = refused(sound, place, 'pool', changed, checksum=False)
  assert 'pool.bin is not the one that was saved' in said


@fuzzing.SETTINGS
@hypothesis.given(data=st.data())
def test_nodes_of_the_description(sound, place, data):
  fuzzing.check_nodes(sound, place, data)


def test_another_program_than_the_arrays_is_refused(sound, place):
  other = programs.trace(lambda arrays, x: x, {}, (6,)).data
  said = refused(sound, place, 'pool', other, checksum=True)
  assert 'do not fit' in said
  wide = programs.trace(
    lambda arrays, x: jnp.concatenate([x, x]) * arrays['scale'][0],
    shapes_of(SCALE),
    (6,),
  ).data
  said = refused(sound, place, 'pool', wide, checksum=True)
  assert 'do not fit' in said


def test_a_missing_program_is_named(sound, place):
  fuzzing.load(sound, place)
  (place / 'pool.bin').unlink()
  with pytest.raises(config_utils.UserError, match='pool.bin'):
    bundles.load(place, trust_code=True)


def test_programs_are_not_read_unless_they_are_trusted(sound, place):
  """XLA's parser may fall over what is wrong in them."""
  fuzzing.load(sound, place)
  (place / 'pool.bin').write_bytes(b'of a stranger')
  with pytest.raises(config_utils.UserError, match='--trust_code'):
    bundles.load(place)


@pytest.mark.parametrize(
  'day, jaxlib, end',
  [
    # By the jaxlib's own day, and by the program's where that is not known.
    ('2026-11-29', '0.10.2', '2026-12-17'),
    ('2026-11-29', '0.99.9', '2027-05-29'),
    ('2026-08-31', '', '2027-02-28'),
  ],
)
def test_programs_are_promised_for_six_months(day, jaxlib, end):
  assert programs.Made(day, jaxlib).until.isoformat() == end


@pytest.mark.parametrize(
  'today, said, is_near',
  [
    ('2026-11-29', 'until 2027-05-29 promise to read them', False),
    ('2027-02-28', 'until 2027-05-29 promise to read them', False),
    ('2027-03-01', 'until 2027-05-29 promise to read them', True),
    ('2027-05-29', 'until 2027-05-29 promise to read them', True),
    ('2027-05-30', 'until 2027-05-29 promised to read them', True),
  ],
)
def test_a_warning_comes_three_months_before_the_end(today, said, is_near):
  today = datetime.date.fromisoformat(today)
  made = programs.Made('2026-11-29', '0.99.9')
  found = programs.lifetime(made, today)
  assert found[0].endswith(said) and 'by jaxlib 0.99.9' in found[0]
  assert found[1] == is_near
  # The jaxlib that wrote them goes on reading them.
  made = dataclasses.replace(made, jaxlib=jaxlib.version.__version__)
  assert not programs.lifetime(made, today)[1]


def test_the_oldest_program_counts():
  new, old, unknown = (
    programs.Program(b'', programs.Made(*made))
    for made in (('2026-11-29', '9'), ('2026-11-29', '0.10.2'), ('', ''))
  )
  assert programs.oldest({'a': new, 'b': old}) is old.made
  assert programs.oldest({'a': new, 'b': unknown}) is unknown.made


def test_a_bundle_says_until_when_its_programs_are_read(tmp_path, caplog):
  caplog.set_level('INFO', logger='ijckd_jax')
  make_converted().save(tmp_path / 'new')
  today = datetime.date.today().isoformat()
  made = programs.Made(today, jaxlib.version.__version__)
  spec = json.loads((tmp_path / 'new/bundle.json').read_text())
  assert spec['programs_made'] == dataclasses.asdict(made)
  said = f'releases of JAX until {made.until} promise'
  assert said in (tmp_path / 'new/README.md').read_text()
  bundle = bundles.load(tmp_path / 'new', trust_programs=True)
  assert {p.made for p in bundle.network.programs.values()} == {made}
  (record,) = caplog.records
  assert record.levelname == 'INFO' and said in record.getMessage()


@pytest.mark.parametrize(
  'made, said',
  [
    (None, 'its programs were exported on an unknown day'),
    ({'day': '2020-02-29', 'jaxlib': '0.1'}, 'until 2020-08-29 promised to'),
  ],
)
def test_a_bundle_of_old_programs_is_warned_of(tmp_path, caplog, made, said):
  make_converted().save(tmp_path / 'old')
  path = tmp_path / 'old/bundle.json'
  spec = json.loads(path.read_text())
  del spec['programs_made']
  path.write_text(json.dumps(spec | ({'programs_made': made} if made else {})))
  bundles.load(tmp_path / 'old', trust_programs=True)
  (record,) = caplog.records
  assert record.levelname == 'WARNING' and said in record.getMessage()
  command = f'ijckd convert --again {tmp_path / "old"} --output NEW'
  assert record.getMessage().endswith(command)


@pytest.mark.parametrize(
  'made',
  [
    '2026-11-29',
    {'day': '2026-11-29'},
    {'day': '2026-13-01', 'jaxlib': ''},
    {'day': 5, 'jaxlib': ''},
    {'day': '9999-12-31', 'jaxlib': ''},
    {'day': '', 'jaxlib': 'x' * 41},
  ],
)
def test_a_day_that_is_none_is_refused(tmp_path, made):
  make_converted().save(tmp_path / 'new')
  path = tmp_path / 'new/bundle.json'
  spec = {**json.loads(path.read_text()), 'programs_made': made}
  path.write_text(json.dumps(spec))
  with pytest.raises(
    config_utils.UserError,
    match='programs_made must|year 10000',
  ):
    bundles.load(tmp_path / 'new', trust_programs=True)
