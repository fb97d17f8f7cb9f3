"""A teacher's outputs: stored as it gave them, and read in its place."""

import dataclasses
import json
import pathlib
import pickle
import re
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ijckd_jax
from ijckd_jax.bundles import bundles
from ijckd_jax.data import augment
from ijckd_jax.data import input_pipeline
from ijckd_jax.distillation import methods
from ijckd_jax.distillation import steps
from ijckd_jax.distillation import stored_outputs
from ijckd_jax.distillation import train_state
from ijckd_jax.models import cpu_conv
from ijckd_jax.models import losses
from ijckd_jax.models import outputs
from ijckd_jax.runtime import config_utils
from ijckd_jax.runtime import workdirs
from ijckd_jax.training import experiment
from ijckd_jax.training import loop
from ijckd_jax.training import output_files
from ijckd_jax.training import output_recorder
from ijckd_jax.training import output_store
from ijckd_jax.training import train
from tests import test_train

VIEWS = 2


@pytest.fixture(scope='module')
def teacher(finished_run):
  return bundles.load(finished_run[0] / 'teacher').teacher()


@pytest.fixture(scope='module')
def config_of(small_config):
  """Returns a function that gives a run's config: seven of 12 steps fill."""

  def make(method='ijckd', **fields):
    config = small_config(method)
    config.dataset.validation_fraction = 0.9  # Leaves 145 to train on.
    config.dataset.crop_padding = 1
    config.dataset.flip = True
    config.eval_steps, config.log_steps = 20, 1
    config.checkpoint_steps = 4
    config.teacher.store.views = VIEWS
    config_utils.override(config, fields)
    return config

  return make


@pytest.fixture(scope='module')
def full(tmp_path_factory, config_of, teacher):
  """The folder of a finished run with a full store, and its Result."""
  workdir = tmp_path_factory.mktemp('runs') / 'stored'
  return workdir, train.train_and_evaluate(
    config_of(), workdir, teacher=teacher
  )


def store_of(config, workdir, teacher):
  """Returns the run's store, loaded, its experiment and training images."""
  exp = experiment.build(config, teacher=teacher)
  arrays = exp.dataset.load('train')
  store = output_recorder._store(exp, workdir, arrays)
  store.load()
  return store, exp, arrays


def batches_of(exp, arrays, num_steps, read=None):
  return input_pipeline.train_batches(
    arrays,
    batch_size=exp.config.batch_size,
    seed=exp.config.seed,
    start_step=0,
    stop_step=num_steps,
    rows=slice(0, exp.config.batch_size),
    teacher=read,
  )


@pytest.fixture(scope='module')
def exact(tmp_path_factory, config_of, teacher):
  """A full store in float32: as `store_of` gives it."""
  workdir = tmp_path_factory.mktemp('runs') / 'exact'
  config = config_of(**{'teacher.store.dtype': 'float32', 'total_steps': 7})
  train.train_and_evaluate(config, workdir, teacher=teacher)
  return store_of(config, workdir, teacher)


# A run fills a store in float32 for this test and the two below.
@pytest.mark.slow
def test_a_loaded_store_crosses_to_processes_that_decode(exact):
  store, _, arrays = exact
  asked = np.arange(len(arrays)), np.zeros(len(arrays), np.int32)
  crossed = pickle.loads(pickle.dumps(store.read))(*asked)
  for name, rows in store.read(*asked).items():
    np.testing.assert_array_equal(crossed[name], rows)


@pytest.mark.slow
def test_float32_rows_are_what_the_live_teacher_gives(exact):
  store, exp, arrays = exact
  key = jax.random.fold_in(
    jax.random.key(exp.config.seed), steps.AUGMENTATION_STREAM
  )
  indices = np.arange(len(arrays))

  @jax.jit
  @cpu_conv.fast_convolutions()  # As the steps have them.
  def live(epochs):
    views = exp.augmentation(key, arrays.images, epochs, indices)
    return exp.teacher(exp.teacher.arrays, views)

  for epoch in range(2 * VIEWS):
    epochs = np.full(len(arrays), epoch)
    rows, expected = store.read(indices, epochs), live(epochs)
    assert rows.keys() == {'final', 'logits'}
    for name, value in rows.items():
      assert value.dtype == np.float32
      # Other batches, other roundings: of the largest number's size.
      np.testing.assert_allclose(
        value, getattr(expected, name), rtol=0, atol=1e-6 * value.max()
      )
  # It is not one view over and over.
  first, second = (
    store.read(indices, np.full_like(indices, e)) for e in (0, 1)
  )
  assert np.abs(first['logits'] - second['logits']).max() > 0.1


# Twenty steps by each of two programs.
@pytest.mark.slow
def test_twenty_steps_from_the_store_are_those_of_the_live_teacher(exact):
  """Each from the same state: past a ReLU's corner, roundings part two runs."""
  store, exp, arrays = exact
  tx, _ = exp.optimizer(len(arrays))
  init = jax.jit(exp.distiller.init, static_argnums=1)
  state = train_state.create(
    init(jax.random.key(0), (8, 8, 1)), tx, with_ema=False
  )
  live_step, stored_step = (
    exp.mapper.map(
      dataclasses.replace(exp, stored=stored).train_step(tx),
      rows_in=(False, False, True, False),
    )
    for stored in (None, exp.stored)
  )
  frozen, key = exp.frozen, jax.random.key(0)
  totals = []
  for step, batch in enumerate(batches_of(exp, arrays, 20, store.read)):
    rows = exp.mapper.shard(batch)
    _, sums = stored_step(state, frozen, rows, key)
    del rows['teacher']
    state, expected = live_step(state, frozen, rows, key)
    assert expected.keys() > {'loss', 'cross_entropy', 'logit', 'feature'}
    for name in expected.keys() - {'gradient_norm'}:  # It sees the corners.
      np.testing.assert_allclose(
        sums[name], expected[name], rtol=1e-5, err_msg=f'{name} of step {step}'
      )
    totals.append(expected['loss'][0])
  assert totals[-1] < 0.9 * totals[0]


@pytest.mark.parametrize('dtype', ['float32', 'float16', 'bfloat16'])
def test_student_learns_from_the_rounded_values(dtype):
  """In the step that stores them as in those that read them."""
  final = np.random.default_rng(0).normal(size=(4, 2, 2, 8)).astype(np.float32)
  teacher = outputs.Outputs((), final, final[:, 0, 0], final[:, 0, 1])
  stored = stored_outputs.Stored(
    jax.eval_shape(lambda: (teacher,)), ('final',), jnp.dtype(dtype)
  )

  @jax.jit
  def step(teacher):
    rows = stored.take((teacher,))
    return rows, stored.restore(rows)[0]

  rows, seen = step(teacher)
  np.testing.assert_array_equal(
    rows['final'], final.astype(rows['final'].dtype)
  )
  np.testing.assert_array_equal(seen.final, stored.restore(rows)[0].final)
  assert seen.final.dtype == np.float32
  assert not seen.logits.any()  # Whoever reads it has it stored.


def test_view_depends_on_the_epoch_modulo_the_views_and_on_the_seed():
  image = np.random.default_rng(0).integers(0, 256, (8, 8, 1)).astype(np.uint8)
  images = np.broadcast_to(image, (30, 8, 8, 1))

  epochs = np.arange(30)

  def views(epochs, indices=epochs, seed=0, views=4):
    augmentation = augment.Augmentation(2, True, views)
    return augmentation(jax.random.key(seed), images, epochs, indices)

  np.testing.assert_array_equal(views(epochs), views(epochs % 4))
  np.testing.assert_array_equal(views(epochs % 4), views(epochs % 4, views=0))
  assert not np.array_equal(views(epochs), views(epochs, views=0))
  assert not np.array_equal(views(epochs), views(epochs, seed=1))
  assert not np.array_equal(views(epochs), views(epochs, np.zeros(30, int)))


def test_another_augmentation_is_another_store(config_of, teacher):
  def identity(**fields):
    exp = experiment.build(config_of(**fields), teacher=teacher)
    return exp.augmentation.identity

  # As it was known before there was more of it.
  known = f'Augmentation(crop_padding=1, flip=True, views={VIEWS})'
  assert identity() == known
  others = {
    identity(**{f'augment.{name}': value})
    for name, value in (
      ('randaugment_layers', 1),
      ('erasing_probability', 0.1),
      ('inception_crop', True),
    )
  }
  assert len(others) == 3 and known not in others
  layers = {'augment.randaugment_layers': 1}
  assert identity(**layers) != identity(
    **layers, **{'augment.randaugment_magnitude': 5}
  )
  for name in ('augment.mixup_alpha', 'augment.cutmix_alpha'):
    with pytest.raises(config_utils.UserError, match='no view is seen twice'):
      identity(**{name: 1.0})


def test_outputs_of_another_second_view_are_not_taken(
  config_of, teacher, tmp_path
):
  folder = {'teacher.store.directory': str(tmp_path / 'outputs')}

  def run(name, **fields):
    config = config_of('mlkd', **folder, **fields)
    train.train_and_evaluate(config, tmp_path / name, teacher=teacher)

  run('first')
  stored = experiment.build(config_of('mlkd'), teacher=teacher).stored
  assert set(stored.names) == {'logits', 'second/logits'}
  with pytest.raises(config_utils.UserError, match='second_view'):
    run('other', **{'method.randaugment_magnitude': 3})


@pytest.mark.parametrize(
  'stop_at',
  [
    pytest.param(3, id='filling', marks=pytest.mark.slow),
    pytest.param(7, id='full', marks=pytest.mark.slow),
    pytest.param(9, id='after', marks=pytest.mark.slow),
  ],
)
def test_stopped_run_continues_to_the_same_bits(
  stop_at, full, config_of, teacher, tmp_path
):
  reference_dir, reference = full
  with pytest.raises(loop.Interrupted):
    train.train_and_evaluate(
      config_of(),
      tmp_path,
      teacher=teacher,
      writers=[test_train.StopAt(stop_at)],
    )
  result = train.train_and_evaluate(config_of(), tmp_path, teacher=teacher)
  test_train.assert_same_bits(result.state, reference.state)
  assert test_train.rows_without_times(
    tmp_path
  ) == test_train.rows_without_times(reference_dir)
  indices, epochs = np.arange(145).repeat(VIEWS), np.arange(145 * VIEWS) % VIEWS
  test_train.assert_same_bits(
    *(
      store_of(config_of(), workdir, teacher)[0].read(indices, epochs)
      for workdir in (tmp_path, reference_dir)
    )
  )


@pytest.mark.slow
def test_files_beyond_the_checkpoint_are_written_again(
  full, config_of, teacher, tmp_path
):
  """A process that is killed may have closed files since it saved."""
  reference_dir, reference = full
  with pytest.raises(loop.Interrupted):
    train.train_and_evaluate(
      config_of(), tmp_path, teacher=teacher, writers=[test_train.StopAt(3)]
    )
  folder = tmp_path / workdirs.TEACHER_OUTPUTS
  beyond = folder / output_files.File(144, 240, 1, 0).name
  beyond.write_bytes(b'of a killed process')
  (folder / '.00000.partial').write_bytes(b'half')
  result = train.train_and_evaluate(config_of(), tmp_path, teacher=teacher)
  test_train.assert_same_bits(result.state, reference.state)
  assert not list(folder.glob('.*'))


@pytest.mark.slow
def test_another_run_reads_a_full_store_from_its_first_step(
  full, config_of, teacher, tmp_path
):
  folder = shutil.copytree(
    full[0] / workdirs.TEACHER_OUTPUTS, tmp_path / 'shared'
  )
  before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}

  def run(workdir, method, **fields):
    fields |= {'teacher.store.directory': str(folder)}
    config = config_of(method, **fields)
    return train.train_and_evaluate(
      config, tmp_path / workdir, teacher=teacher
    ).history

  # The same targets, whether they are live or stored.
  for one, other in zip(run('same', 'ijckd'), full[1].history, strict=True):
    if 'train/loss' in one:
      np.testing.assert_allclose(
        one['train/loss'], other['train/loss'], rtol=1e-3
      )
  run('fewer', 'kd', total_steps=4)  # Less than it would take to fill it.
  assert before == {path: path.stat().st_mtime_ns for path in folder.iterdir()}
  # It is read indeed.
  for path in folder.glob('*.array_record'):
    data = bytearray(path.read_bytes())
    used = np.flatnonzero(np.frombuffer(data, np.uint8))
    data[used[len(used) // 2]] ^= 1
    path.write_bytes(data)
  with pytest.raises(config_utils.UserError, match='array_record is damaged'):
    run('damaged', 'kd')
  with pytest.raises(config_utils.UserError, match="leaves.pooled: '.none.'"):
    run('more', 'srrl')
  assert not (tmp_path / 'more').exists()


@pytest.mark.parametrize(
  'field, value, said',
  [
    ('seed', 1, 'seed: 0 -> 1'),
    ('dataset.flip', False, 'flip=True.* -> .*flip=False'),
    ('dataset.validation_fraction', 0.8, 'examples: .*num_examples: 145'),
    ('teacher.store.dtype', 'float32', "dtype: 'float16' -> 'float32'"),
    ('teacher.store.views', 1, 'views: 2 -> 1'),
    ('dtype', 'bfloat16', "compute_dtype: 'float32' -> 'bfloat16'"),
  ],
)
def test_other_outputs_are_not_taken(
  field, value, said, full, config_of, teacher, tmp_path
):
  fields = {
    'teacher.store.directory': str(full[0] / workdirs.TEACHER_OUTPUTS),
    'total_steps': 12,
    field: value,
  }
  with pytest.raises(config_utils.UserError, match=said):
    train.train_and_evaluate(
      config_of(**fields), tmp_path / 'run', teacher=teacher
    )
  assert not (tmp_path / 'run').exists()


def test_outputs_of_another_teacher_are_not_taken(
  full, finished_run, config_of, tmp_path
):
  bundle = bundles.load(finished_run[0] / 'teacher')
  head = bundle.variables['params']['head']
  head['bias'] = np.asarray(head['bias']) + 1e-6
  fields = {'teacher.store.directory': str(full[0] / 'teacher_outputs')}
  with pytest.raises(config_utils.UserError, match="teacher: 'plain .* -> "):
    train.train_and_evaluate(
      config_of(**fields), tmp_path / 'run', teacher=bundle.teacher()
    )
  assert not (tmp_path / 'run').exists()


class Jitted(methods.base.Method):
  """A method outside the package, whose loss reads a stage and the logits."""

  def __str__(self):  # Names the test, the same in every process.
    return 'jitted'

  def loss(self, student, teacher, batch):
    @jax.jit
    def read(student, teacher):
      unused = jnp.mean(teacher.final) + jnp.mean(batch['label'])
      del unused
      attention = jnp.mean(jnp.square(teacher.stages[0]))
      logit = losses.mean_squared_error(student.logits, teacher.logits)
      return logit + attention * jnp.mean(student.logits)

    total = read(student, teacher)
    return total, {'total': total}


@pytest.mark.parametrize(
  'method, names',
  [
    ('simkd', ('final',)),
    ('kd', ('logits',)),
    ('srrl', ('pooled', 'logits')),
    ('ijckd', ('final', 'logits')),
    ({'feature_site': 'pooled'}, ('pooled', 'logits')),
    ({'logit_weight': 0.0}, ('final',)),
    (Jitted(), ('stages/0', 'logits')),
  ],
  ids=str,
)
def test_what_the_loss_reads_is_what_is_stored(
  method, names, config_of, teacher
):
  if isinstance(method, str):
    exp = experiment.build(config_of(method), teacher=teacher)
  elif isinstance(method, dict):
    fields = {f'method.{name}': value for name, value in method.items()}
    exp = experiment.build(config_of(**fields), teacher=teacher)
  else:
    exp = experiment.build(config_of('kd'), teacher=teacher)
    distiller = dataclasses.replace(exp.distiller, method=method)
    stored = stored_outputs.plan(distiller, (8, 8, 1), 'float16')
    exp = dataclasses.replace(exp, stored=stored)
  assert exp.stored.names == names
  batch = exp.abstract_batch(48, with_teacher=True)
  assert batch['teacher'].keys() == set(names)
  for leaf in batch['teacher'].values():
    assert leaf.dtype == np.float16


@pytest.mark.parametrize(
  'method, fields, said',
  [
    ('ce', {}, 'nothing to store'),
    (
      'ijckd',
      {'method.logit_weight': 0.0, 'method.feature_weight': 0.0},
      'reads',
    ),
    ('kd', {'teacher.store.views': -1}, 'cannot be negative'),
    ('kd', {'teacher.store.dtype': 'float15'}, "did you mean 'float16'"),
    ('kd', {'teacher.store.limit_gib': 0.0}, 'limit_gib=0'),
    (
      'kd',
      {'teacher.store.limit_gib': 1e-9},
      'would take .*fewer teacher.store',
    ),
    ('kd', {'teacher.store.views': 5}, 'shorter than so many epochs'),
    ('kd', {'teacher.store.directory': 'tests'}, 'no store of teacher outputs'),
  ],
  ids=str,
)
def test_mistakes_are_said_before_anything_is_written(
  method, fields, said, config_of, tmp_path
):
  if 'teacher.store.directory' in fields:
    fields = {'teacher.store.directory': str(tmp_path)}
    (tmp_path / 'thesis.tex').touch()
  with pytest.raises(config_utils.UserError, match=said) as error:
    train.train_and_evaluate(config_of(method, **fields), tmp_path / 'run')
  assert '\n' not in str(error.value)
  assert not (tmp_path / 'run').exists()


def test_disk_that_is_too_full(config_of, teacher, tmp_path, monkeypatch):
  usage = shutil.disk_usage(tmp_path)._replace(free=1000)
  monkeypatch.setattr(shutil, 'disk_usage', lambda path: usage)
  with pytest.raises(config_utils.UserError, match='GiB left'):
    train.train_and_evaluate(config_of(), tmp_path / 'run', teacher=teacher)


def quarters(variables, images):
  """A teacher whose logits are far too large for float16."""
  del variables
  pooled = images.reshape(-1, 2, 4, 2, 4, 1).mean(axis=(2, 4, 5)).reshape(-1, 4)
  final = jnp.broadcast_to(pooled[:, None, None, :], (*images.shape[:3], 4))
  return outputs.Outputs((final,), final, pooled, 1e6 * pooled)


@pytest.mark.slow
def test_overflow_says_what_to_take_and_a_teacher_may_be_a_function(tmp_path):
  rng = np.random.default_rng(0)

  def arrays(num):
    images = rng.integers(0, 256, (num, 8, 8, 1)).astype(np.uint8)
    return ijckd_jax.Arrays(images, rng.integers(0, 4, num))

  def distill(dtype):
    return ijckd_jax.distill(
      teacher=ijckd_jax.Teacher(
        apply=quarters,
        variables={},
        head={'kernel': 1e6 * jnp.eye(4), 'bias': jnp.zeros(4)},
        preprocessing=augment.Preprocessing((0.0,), (1.0,), (8, 8)),
      ),
      student='resnet8',
      data=ijckd_jax.ArrayDataset(
        train=arrays(64),
        test=arrays(32),
        class_names='abcd',
        mean=(0.5,),
        std=(0.25,),
      ),
      method='kd',
      workdir=tmp_path / dtype,
      settings={
        'total_steps': 4,
        'batch_size': 32,
        'eval_batch_size': 32,
        'teacher.store.views': 1,
        'teacher.store.dtype': dtype,
      },
    )

  with pytest.raises(config_utils.UserError, match='logits.*float16.*bfloat16'):
    distill('float16')
  assert not (tmp_path / 'float16' / 'summary.json').exists()
  assert distill('bfloat16').history[-1]['step'] == 4


@pytest.mark.slow
@pytest.mark.parametrize('mapper', ['pmap', 'shard_map'])
def test_eight_devices_and_pieces_store_the_same_rows(
  mapper, exact, finished_run, tmp_path
):
  """A process has its devices for life, so a child makes the run."""
  store, exp, arrays = exact
  config = exp.config.copy_and_resolve_references()
  config.teacher.checkpoint = str(finished_run[0] / 'teacher')
  config.total_steps = 12
  config.mapper, config.num_cpu_devices, config.accumulation = mapper, 8, 2
  file = tmp_path / 'config.py'
  file.write_text(
    'import json\nimport ml_collections\n'
    'from experiments.extension_example.backbone import PlainNet\n'
    'from ijckd_jax import models\n\n'
    "models.BACKBONES['plain'] = PlainNet\n\n\n"  # See tests/conftest.py.
    'def get_config():\n'
    f'  text = {json.dumps(config.to_json())}\n'
    '  return ml_collections.ConfigDict(json.loads(text))\n'
  )
  root = pathlib.Path(__file__).parents[1]
  subprocess.run(
    [sys.executable, '-m', 'ijckd_jax.main', '--config', str(file)]
    + ['--workdir', str(tmp_path / 'run')],
    check=True,
    cwd=root,
  )
  config.num_cpu_devices = 1
  other, _, _ = store_of(config, tmp_path / 'run', exp.teacher)
  indices = np.arange(len(arrays))
  for epoch in range(VIEWS):
    epochs = np.full_like(indices, epoch)
    one, two = (each.read(indices, epochs) for each in (store, other))
    for name, value in one.items():
      np.testing.assert_allclose(value, two[name], rtol=1e-5, atol=1e-5)


@pytest.fixture
def make_store(tmp_path):
  """Returns a function that gives a process's store of 2 views of 10 images."""

  def make(process=0, num_processes=1, owner='a run', **identity):
    layout = output_store.Layout(
      10, 2, np.dtype(np.float32), {'final': (2, 1, 3), 'logits': (4,)}
    )
    return output_store.Store(
      tmp_path / 'store',
      layout,
      identity,
      owner=owner,
      process=process,
      num_processes=num_processes,
    )

  return make


ORDER = np.concatenate(
  [np.random.default_rng(epoch).permutation(10) for epoch in range(3)]
)


def value_of(indices, epochs):
  """Returns rows that tell which they are."""
  keys = (100.0 * np.asarray(epochs) + indices).astype(np.float32)
  return {
    'final': keys.reshape(-1, 1, 1, 1) + np.arange(6).reshape(2, 1, 3) / 8,
    'logits': -keys.reshape(-1, 1) - np.arange(4) / 8,
  }


def fill(stores, batch_size=4, steps=(0, 5), close=()):
  """Lets processes write their rows of the steps, 5 of 4 rows for them all."""
  part = batch_size // len(stores)
  for step in range(*steps):
    for number, store in enumerate(stores):
      first = step * batch_size + number * part
      positions = np.arange(first, first + part)
      indices, epochs = ORDER[positions], positions // 10
      rows = {
        name: value.astype(np.float32)
        for name, value in value_of(indices, epochs).items()
      }
      start = step * batch_size
      store.write(start, start + batch_size, indices, epochs, rows)
      if step in close:
        store.close_file()
  for store in stores:
    store.close_file()


def assert_full(store):
  store.load()
  indices, epochs = np.tile(np.arange(10), 4), np.arange(40) // 10
  rows = store.read(indices, epochs)
  for name, value in value_of(indices, epochs % 2).items():
    np.testing.assert_array_equal(rows[name], value)


@pytest.mark.parametrize('batch_size', [4, 6])
def test_processes_write_their_rows_and_read_all(make_store, batch_size):
  """With 6 rows a step, the last one goes past the last view."""
  stores = [make_store(process, 2) for process in range(2)]
  stores[0].open(0)
  last = -(-20 // batch_size)
  fill(stores, batch_size, (0, last), close=(1,))
  assert len(list(stores[0].directory.glob('*.array_record'))) == 4
  for store in (*stores, make_store(0, 1), make_store(2, 4)):
    assert_full(store)


def test_large_files_are_closed(make_store, monkeypatch):
  store = make_store()
  record_bytes = store.layout.record_bytes
  monkeypatch.setattr(output_files, 'MAX_BYTES', 8 * record_bytes)
  store.open(0)
  fill([store])
  assert len(list(store.directory.glob('*.array_record'))) == 3
  assert_full(store)


def test_what_is_missing_is_named(make_store):
  stores = [make_store(process, 2) for process in range(2)]
  stores[0].open(0)
  fill(stores, close=(0, 2))
  names = sorted(path.name for path in stores[0].directory.glob('0*'))
  assert len(names) == 6
  store, aside = make_store(), stores[0].directory.parent / 'aside'
  (store.directory / names[3]).rename(aside)
  with pytest.raises(config_utils.UserError, match=re.escape(names[3])):
    store.load()
  with pytest.raises(config_utils.UserError, match=re.escape(names[3])):
    store.open(12)
  # Nothing is lost by asking; what goes beyond is removed.
  assert len(list(store.directory.glob('0*'))) == 5
  store.open(4)
  assert sorted(path.name for path in store.directory.glob('0*')) == names[:2]
  (store.directory / names[0]).unlink()
  (store.directory / names[1]).unlink()
  with pytest.raises(config_utils.UserError, match='images 0 to 4 of the'):
    store.open(4)


def test_half_a_store_belongs_to_its_run(make_store):
  store = make_store()
  store.open(0)
  fill([store], steps=(0, 3))
  with pytest.raises(
    config_utils.UserError, match='filled by the run in a run'
  ):
    make_store(owner='another').check()
  make_store().open(12)
  fill([store], steps=(3, 5))
  make_store(owner='another').open(0)
  assert_full(make_store(owner='another'))
  with pytest.raises(config_utils.UserError, match=r'teacher: .*x'):
    make_store(teacher='x').check()
  make_store(teacher='x').check(ignore=['teacher'])


def test_damage_is_found_and_its_file_named(make_store):
  store = make_store()
  store.open(0)
  fill([store])
  (path,) = store.directory.glob('*.array_record')
  good = path.read_bytes()
  used = np.flatnonzero(np.frombuffer(good, np.uint8))  # The rest is padding.
  changed = {'half': good[: len(good) // 2], 'start': good[:100], 'none': b''}
  for position in used[:: len(used) // 100]:
    flipped = bytearray(good)
    flipped[position] ^= 1
    changed[position] = bytes(flipped)
  refused = 0
  for change, data in changed.items():
    path.write_bytes(data)
    try:
      assert_full(make_store())  # What is read is right.
      assert change not in ('half', 'start', 'none')
    except config_utils.UserError as error:
      refused += 1
      assert f'{path} is damaged' in str(error)
      assert '\n' not in str(error)
  assert refused > 0.9 * len(changed)
  path.write_bytes(good)
  manifest = store.directory / output_store.MANIFEST
  manifest.write_text('{"half')
  with pytest.raises(config_utils.UserError, match='manifest.json is damaged'):
    make_store().check()


def test_full_disk_is_an_error_of_the_system(make_store, tmp_path):
  store = make_store()
  store.open(0)
  shutil.rmtree(store.directory)  # Cannot be written any more.
  with pytest.raises(OSError, match='teacher outputs could not be written'):
    fill([store])
