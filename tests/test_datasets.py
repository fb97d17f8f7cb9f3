"""Data sets keep the contract; files go in and come out pixel by pixel."""

import dataclasses
import gzip
import io
import json
import os
import pathlib
import pickle
import re
import shutil
import struct
import subprocess
import sys
import tarfile

import numpy as np
from PIL import Image
import pytest
import sklearn.datasets

from ijckd_jax.commands import prepare
from ijckd_jax.data import datasets
from ijckd_jax.data.datasets import cifar
from ijckd_jax.data.datasets import digits
from ijckd_jax.data.datasets import fashion_mnist
from ijckd_jax.data.datasets import fashion_pairs
from ijckd_jax.data.datasets import originals
from ijckd_jax.data.datasets import photos
from ijckd_jax.data.datasets import prepared
from ijckd_jax.runtime import config_utils


def random_images(seed, *shape):
  """Returns noise, so that every image is known by its pixels."""
  return np.random.RandomState(seed).randint(0, 256, shape, np.uint8)


GARMENTS = {  # 20 and 10 of each kind
  'train': (random_images(0, 200, 28, 28), np.arange(200) % 10),
  't10k': (random_images(1, 100, 28, 28), np.arange(100) % 10),
}


def write_garments(folder, suffix=''):
  """Writes the four IDX files and returns the folder."""
  folder.mkdir(exist_ok=True)
  for split, (images, labels) in GARMENTS.items():
    for kind, array in (('images', images), ('labels', labels)):
      raw = bytes([0, 0, 8, array.ndim])
      raw += struct.pack(f'>{array.ndim}I', *array.shape)
      raw += array.astype(np.uint8).tobytes()
      path = folder / f'{split}-{kind}-idx{array.ndim}-ubyte{suffix}'
      path.write_bytes(gzip.compress(raw) if suffix else raw)
  return folder


class Python2Pickler(pickle._Pickler):
  """Writes what Python 2 wrote: bytes as its str, numpy's old module names."""

  dispatch = dict(pickle._Pickler.dispatch)

  def save_bytes(self, value):
    self.write(pickle.BINSTRING + struct.pack('<i', len(value)) + value)

  dispatch[bytes] = save_bytes

  def save_str(self, value):
    self.save_bytes(value.encode())

  dispatch[str] = save_str

  def save_global(self, value, name=None):
    module = value.__module__.replace('numpy._core', 'numpy.core')
    self.write(pickle.GLOBAL + f'{module}\n{value.__name__}\n'.encode())

  dispatch[type] = save_global
  dispatch[type(len)] = save_global
  dispatch[type(gzip.compress)] = save_global


def python2_pickle(value):
  file = io.BytesIO()
  Python2Pickler(file, protocol=2).dump(value)
  return file.getvalue()


COARSE_NAMES = [f'coarse_{i}' for i in range(20)]


def cifar_files(name, version, pickle_fn):
  """Returns the files of a small CIFAR and its (N, 3072) pixels and labels."""
  is_python, k = version == 'python', 10 if name == 'cifar10' else 100
  names = getattr(cifar, name.capitalize()).class_names
  if name == 'cifar10':
    train = [f'data_batch_{i}' for i in range(1, 6)]
    test, keys = 'test_batch', ['labels']
    meta, name_lists = 'batches.meta', {'label_names': list(names)}
    text_files = ['batches.meta.txt']
  else:
    train, test = ['train'], 'test'
    keys = ['coarse_labels', 'fine_labels']
    meta = 'meta'
    name_lists = {
      'coarse_label_names': COARSE_NAMES,
      'fine_label_names': list(names),
    }
    text_files = ['coarse_label_names.txt', 'fine_label_names.txt']
  files, batches = {}, {}
  for seed, file in enumerate([*train, test]):
    num = 5 * k if file == 'train' else k
    pixels = random_images(10 + seed, num, 3072)
    fine = np.arange(num) % k
    labels = [fine] if len(keys) == 1 else [fine // 5, fine]
    batches[file] = pixels, fine
    if is_python:
      content = dict(zip(keys, (part.tolist() for part in labels), strict=True))
      files[file] = pickle_fn({'data': pixels, **content})
    else:
      rows = np.concatenate([np.stack(labels, 1).astype(np.uint8), pixels], 1)
      files[file + '.bin'] = rows.tobytes()
  if is_python:
    files[meta] = pickle_fn(name_lists)
  else:
    for file, lines in zip(text_files, name_lists.values(), strict=True):
      files[file] = ('\n'.join(lines) + '\n').encode()
  expected = {
    'train': [
      np.concatenate(parts)
      for parts in zip(*(batches[file] for file in train), strict=True)
    ],
    'test': batches[test],
  }
  return files, expected


FOLDERS = {
  ('cifar10', 'binary'): 'cifar-10-batches-bin',
  ('cifar10', 'python'): 'cifar-10-batches-py',
  ('cifar100', 'binary'): 'cifar-100-binary',
  ('cifar100', 'python'): 'cifar-100-python',
}


def write_cifar(
  parent, name, version, archived=False, pickle_fn=python2_pickle
):
  """Writes a small CIFAR under `parent` and returns its pixels and labels."""
  files, expected = cifar_files(name, version, pickle_fn)
  folder = parent / FOLDERS[name, version]
  folder.mkdir(parents=True)
  for file, content in files.items():
    (folder / file).write_bytes(content)
  if archived:
    archive = f'{name.replace("cifar", "cifar-")}-{version}.tar.gz'
    with tarfile.open(parent / archive, 'w:gz') as tar:
      tar.add(folder, arcname=folder.name)
    shutil.rmtree(folder)
  return expected


def by_pixels(images, labels):
  """Returns {pixels: label}: tfds keeps records in an order of its own."""
  return {
    image.tobytes(): int(label)
    for image, label in zip(images, labels, strict=True)
  }


def run_prepare(name, source, data_dir):
  prepare.main([name, '--source', str(source), '--data_dir', str(data_dir)])


@pytest.fixture(scope='module')
def data_dir(tmp_path_factory):
  """A tfds directory with a small one of everything that has to be prepared."""
  sources = tmp_path_factory.mktemp('sources')
  data_dir = tmp_path_factory.mktemp('data')
  run_prepare('fashion_mnist', write_garments(sources / 'idx'), data_dir)
  for name in ('cifar10', 'cifar100'):
    write_cifar(sources, name, 'binary')
    run_prepare(name, sources, data_dir)
  return str(data_dir)


# The others are in tests/test_photos.py.
IN_MEMORY = [
  name
  for name in datasets.DATASETS
  if not issubclass(datasets.get(name), photos.PhotoDataset)
]


def small(name, data_dir, **fields):
  if name == 'fashion_pairs_100':
    fields = {'num_train': 200, 'num_test': 100, **fields}
  return datasets.get(name)(data_dir=data_dir, **fields)


@pytest.mark.parametrize('name', IN_MEMORY)
def test_contract(name, data_dir):
  dataset = small(name, data_dir, validation_fraction=0.2)
  num_classes = len(dataset.class_names)
  assert len(set(dataset.class_names)) == num_classes
  height, width, channels = dataset.image_shape
  assert len(dataset.mean) == len(dataset.std) == channels
  assert all(0 < value < 1 for value in (*dataset.mean, *dataset.std))
  assert 0 <= dataset.crop_padding < min(height, width)
  assert isinstance(dataset.flip, bool)
  seen = set()
  for split in datasets.SPLITS:
    arrays = dataset.load(split)
    assert arrays.images.dtype == np.uint8
    assert arrays.images.shape == (len(arrays), *dataset.image_shape)
    assert arrays.labels.dtype == np.int32
    assert arrays.labels.shape == (len(arrays),)
    # Every class is in every split, which is what stratified has to mean.
    assert set(arrays.labels) == set(range(num_classes))
    if name != 'digits':  # It has a few images twice.
      pixels = {image.tobytes() for image in arrays.images}
      assert not pixels & seen
      seen |= pixels
  with pytest.raises(config_utils.UserError, match="did you mean 'validation'"):
    dataset.load('validatoin')
  with pytest.raises(config_utils.UserError, match='validation_fraction=1'):
    dataclasses.replace(dataset, validation_fraction=1)
  with pytest.raises(config_utils.UserError, match='validation_fraction=-0.1'):
    dataclasses.replace(dataset, validation_fraction=-0.1)


@pytest.mark.parametrize('name', IN_MEMORY)
def test_no_validation_unless_asked_for(name, data_dir):
  dataset = small(name, data_dir)
  validation = dataset.load('validation')
  assert validation.images.shape == (0, *dataset.image_shape)
  assert validation.labels.shape == (0,)
  held = small(name, data_dir, validation_fraction=0.2)
  if name != 'fashion_pairs_100':  # It draws as many pairs from fewer garments.
    parts = len(held.load('train')) + len(held.load('validation'))
    assert parts == len(dataset.load('train'))


@pytest.mark.parametrize('name', IN_MEMORY)
def test_no_validation_is_told_without_reading_the_images(name, tmp_path):
  if name == 'digits':
    digits.Dataset(data_dir=str(tmp_path)).prepare()
    for file in tmp_path.glob('*/*/*train*'):
      file.unlink()
  dataset = datasets.get(name)(data_dir=str(tmp_path))
  with pytest.raises((config_utils.UserError, RuntimeError)):
    dataset.load('train')
  assert dataset.load('validation').images.shape == (0, *dataset.image_shape)


@pytest.mark.parametrize('padding', [-1, 2.0, '4', True, None])
@pytest.mark.parametrize(
  'make',
  [
    cifar.Cifar10,
    fashion_pairs.Dataset,
    lambda **fields: array_dataset(**fields),
  ],
  ids=['tfds', 'pairs', 'arrays'],
)
def test_crop_padding_is_a_number_of_pixels(make, padding):
  with pytest.raises(
    config_utils.UserError, match=f'crop_padding={padding!r}:'
  ):
    make(crop_padding=padding)
  assert make(crop_padding=3).crop_padding == 3


def test_hold_out_is_stratified_fixed_and_keeps_order():
  labels = np.repeat([0, 1, 2], [10, 20, 30]).astype(np.int32)
  images = np.arange(60, dtype=np.uint8).reshape(60, 1, 1, 1)
  arrays = datasets.Arrays(images, labels)
  train, validation = prepared.hold_out(arrays, 0.1)
  np.testing.assert_array_equal(np.bincount(validation.labels), [1, 2, 3])
  np.testing.assert_array_equal(np.bincount(train.labels), [9, 18, 27])
  for part in (train, validation):
    assert (np.diff(part.images.ravel().astype(int)) > 0).all()
  np.random.seed(7)
  again = prepared.hold_out(arrays, 0.1)[1]
  np.testing.assert_array_equal(validation.images, again.images)
  for fraction in (0.001, 0.999):
    with pytest.raises(config_utils.UserError, match='leaves none'):
      prepared.hold_out(arrays, fraction)


def test_digits_are_scikit_learns(data_dir):
  dataset = digits.Dataset(data_dir=data_dir)
  train, test = dataset.load('train'), dataset.load('test')
  assert (len(train), len(test)) == (1437, 360)
  original = sklearn.datasets.load_digits()
  expected = sorted(
    np.round(image * 255 / 16).astype(np.uint8).tobytes() + bytes([label])
    for image, label in zip(original.images, original.target, strict=True)
  )
  found = sorted(
    image.tobytes() + bytes([label])
    for split in (train, test)
    for image, label in zip(split.images, split.labels, strict=True)
  )
  assert found == expected
  assert abs(np.bincount(test.labels) - 36).max() <= 1
  pixels = train.images / 255
  np.testing.assert_allclose(pixels.mean(), dataset.mean[0], atol=5e-5)
  np.testing.assert_allclose(pixels.std(), dataset.std[0], atol=5e-5)


def test_digits_build_in_two_processes_alone(tmp_path):
  """Both succeed, seeded alike, with no TensorFlow and no network to reach."""
  program = (
    'import random, socket, sys\n'
    'random.seed(0)\n'
    'def refuse(*args): raise AssertionError(args)\n'
    'socket.socket.connect = socket.getaddrinfo = refuse\n'
    'import sklearn.datasets, tensorflow_datasets\n'
    'from ijckd_jax.data.datasets import digits\n'
    "print('ready', flush=True)\n"
    'sys.stdin.readline()\n'
    "num = len(digits.Dataset(data_dir=sys.argv[1]).load('train'))\n"
    "print(num, 'tensorflow' in sys.modules)\n"
  )
  processes = [
    subprocess.Popen(
      [sys.executable, '-c', program, str(tmp_path)],
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
    )
    for _ in range(2)
  ]
  for process in processes:
    assert process.stdout.readline() == 'ready\n'
  for process in processes:
    process.stdin.write('\n')
    process.stdin.flush()
  for process in processes:
    out, err = process.communicate(timeout=60)
    assert (out, err, process.returncode) == ('1437 False\n', '', 0)
  assert os.listdir(tmp_path) == ['digits']
  assert os.listdir(tmp_path / 'digits') == ['1.0.0']


def test_data_dir_that_cannot_be_written(tmp_path):
  (tmp_path / 'file').touch()
  with pytest.raises(config_utils.UserError, match='cannot write digits'):
    digits.Dataset(data_dir=str(tmp_path / 'file')).load('train')


def test_not_prepared_names_the_command(tmp_path):
  with pytest.raises(config_utils.UserError) as error:
    fashion_pairs.Dataset(data_dir=str(tmp_path)).load('train')
  command = 'ijckd prepare fashion_mnist'
  assert f'{command} --data_dir {tmp_path}' in str(error.value)
  assert '--source DIR' in str(error.value)


def test_stored_for_tensorflow_only(tmp_path, data_dir):
  shutil.copytree(pathlib.Path(data_dir) / 'cifar10', tmp_path / 'cifar10')
  (info,) = tmp_path.glob('*/*/dataset_info.json')
  info.write_text(info.read_text().replace('array_record', 'tfrecord'))
  with pytest.raises(config_utils.UserError, match='stored as tfrecord'):
    cifar.Cifar10(data_dir=str(tmp_path)).load('test')


def test_another_data_set_of_that_name(data_dir):
  with pytest.raises(config_utils.UserError, match='images of'):
    prepared.read('cifar10', data_dir, 'test', (8, 8, 1))


@pytest.mark.parametrize('suffix', ['', '.gz'])
def test_fashion_mnist_from_files(suffix, tmp_path, capsys):
  source = write_garments(tmp_path / 'source', suffix)
  target = tmp_path / 'data'
  # The pairs are made of Fashion-MNIST: preparing them prepares it.
  run_prepare('fashion_pairs_100', source, target)
  folder = target / 'fashion_mnist' / '3.0.1'
  line = f'in {folder} (200 train, 100 test)\n'
  printed = capsys.readouterr()
  assert (printed.out, printed.err) == (f'fashion_mnist: written {line}', '')
  before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
  run_prepare('fashion_mnist', source, target)
  assert capsys.readouterr().out == f'fashion_mnist: already prepared {line}'
  assert before == {path: path.stat().st_mtime_ns for path in folder.iterdir()}
  assert os.listdir(target) == ['fashion_mnist']
  dataset = fashion_mnist.Dataset(data_dir=str(target))
  for split, prefix in (('train', 'train'), ('test', 't10k')):
    arrays = dataset.load(split)
    expected = by_pixels(*GARMENTS[prefix])
    assert by_pixels(arrays.images, arrays.labels) == expected


@pytest.mark.parametrize('archived', [False, True])
@pytest.mark.parametrize('version', ['binary', 'python'])
@pytest.mark.parametrize('name', ['cifar10', 'cifar100'])
def test_cifar_from_files(name, version, archived, tmp_path):
  expected = write_cifar(tmp_path / 'source', name, version, archived)
  run_prepare(name, tmp_path / 'source', tmp_path / 'data')
  dataset = datasets.get(name)(data_dir=str(tmp_path / 'data'))
  for split, (pixels, labels) in expected.items():
    arrays = dataset.load(split)
    channels_first = arrays.images.transpose(0, 3, 1, 2)
    assert by_pixels(channels_first, arrays.labels) == by_pixels(pixels, labels)


def with_bytes(content):
  """Returns a dictionary with bytes for text, as `encoding='bytes'` loads."""
  return {
    key.encode(): [name.encode() for name in value] if 'names' in key else value
    for key, value in content.items()
  }


def with_arrays(content):
  """Returns a dictionary with arrays for lists, one of them by columns."""
  return {
    key: np.asfortranarray(value) if 'names' not in key else value
    for key, value in content.items()
  }


def with_scalars(content):
  """Returns a dictionary with lists of numpy's integers."""
  return {
    key: list(np.array(value)) if 'labels' in key else value
    for key, value in content.items()
  }


@pytest.mark.parametrize(
  ('protocol', 'change'),
  [
    *[(protocol, dict) for protocol in range(6)],
    *[(protocol, with_bytes) for protocol in (2, 4)],
    *[(protocol, with_arrays) for protocol in (2, 5)],
    (4, with_scalars),
  ],
)
def test_cifar_pickled_by_python_3(protocol, change, tmp_path):
  expected = write_cifar(
    tmp_path,
    'cifar100',
    'python',
    pickle_fn=lambda content: pickle.dumps(change(content), protocol=protocol),
  )
  splits, names = originals.READERS['cifar100'](tmp_path)
  for split, (pixels, labels) in expected.items():
    images = splits[split]['image'].transpose(0, 3, 1, 2)
    np.testing.assert_array_equal(images.reshape(-1, 3072), pixels)
    np.testing.assert_array_equal(splits[split]['label'], labels)
    np.testing.assert_array_equal(splits[split]['coarse_label'], labels // 5)
  assert names['coarse_label'] == COARSE_NAMES
  assert tuple(names['label']) == cifar.Cifar100.class_names


def write_parquet(folder, name, columns, change=lambda table: table):
  """Writes a small CIFAR as Hugging Face's hub has it; returns its arrays."""
  import pyarrow
  from pyarrow import parquet

  _, expected = cifar_files(name, 'binary', python2_pickle)
  class_names = {
    'fine_label': cifar.Cifar100.class_names,
    'coarse_label': COARSE_NAMES,
    'label': cifar.Cifar10.class_names,
  }
  features = {
    column: {'names': list(class_names[column]), '_type': 'ClassLabel'}
    for column in columns
  }
  metadata = {'huggingface': json.dumps({'info': {'features': features}})}
  for split, (pixels, labels) in expected.items():
    pictures = []
    for row in np.asarray(pixels):
      stream = io.BytesIO()
      image = row.reshape(3, 32, 32).transpose(1, 2, 0)
      Image.fromarray(image).save(stream, 'png')
      pictures.append({'bytes': stream.getvalue(), 'path': None})
    labels = np.asarray(labels)
    table = {'img': pictures}
    for column in columns:
      coarse = column == 'coarse_label'
      table[column] = labels // 5 if coarse else labels
    table = change(pyarrow.table(table)).replace_schema_metadata(metadata)
    # In two files, as the larger ones are.
    for part, rows in enumerate((table[:7], table[7:])):
      path = folder / name / f'{split}-0000{part}-of-00002.parquet'
      path.parent.mkdir(parents=True, exist_ok=True)
      parquet.write_table(rows, path)
  return expected


@pytest.mark.parametrize(
  ('name', 'columns'),
  [('cifar10', ['label']), ('cifar100', ['fine_label', 'coarse_label'])],
)
def test_cifar_of_the_hub(name, columns, tmp_path):
  expected = write_parquet(tmp_path, name, columns)
  run_prepare(name, tmp_path, tmp_path / 'data')
  dataset = datasets.get(name)(data_dir=str(tmp_path / 'data'))
  for split, (pixels, labels) in expected.items():
    arrays = dataset.load(split)
    channels_first = arrays.images.transpose(0, 3, 1, 2)
    assert by_pixels(channels_first, arrays.labels) == by_pixels(pixels, labels)
  splits, names = originals.READERS[name](tmp_path)
  if name == 'cifar100':
    np.testing.assert_array_equal(
      splits['test']['coarse_label'], np.asarray(expected['test'][1]) // 5
    )
    assert names['coarse_label'] == COARSE_NAMES


def test_damaged_files_of_the_hub_are_refused(tmp_path):
  columns = ['fine_label', 'coarse_label']
  write_parquet(tmp_path, 'cifar100', columns)
  path = tmp_path / 'cifar100' / 'test-00001-of-00002.parquet'
  kept = path.read_bytes()
  path.write_bytes(kept[:-100])
  message = refused('cifar100', tmp_path, tmp_path / 'data')
  assert path.name in message and 'coarse_label, fine_label' in message
  path.unlink()
  message = refused('cifar100', tmp_path, tmp_path / 'data')
  assert 'split test are not all there' in message
  # Those of CIFAR-10 have no coarse labels.
  write_parquet(tmp_path / 'other', 'cifar10', ['label'])
  message = refused('cifar100', tmp_path / 'other', tmp_path / 'data')
  assert 'coarse_label' in message
  # Two snapshots of one data set are no set of twice the size.
  write_parquet(tmp_path / 'two' / 'a', 'cifar100', columns)
  write_parquet(tmp_path / 'two' / 'b', 'cifar100', columns)
  message = refused('cifar100', tmp_path / 'two', tmp_path / 'data')
  assert 'in 2 folders' in message


@pytest.mark.parametrize(
  ('labels', 'said'),
  [([0, None], 'integers'), ([0.5, 1.5], 'integers'), (['a', 'b'], 'integers')],
)
def test_odd_labels_of_the_hub_are_refused(tmp_path, labels, said):
  import pyarrow

  write_parquet(
    tmp_path,
    'cifar100',
    ['fine_label', 'coarse_label'],
    change=lambda table: table.set_column(
      table.column_names.index('fine_label'),
      'fine_label',
      pyarrow.array((labels * len(table))[: len(table)]),
    ),
  )
  assert said in refused('cifar100', tmp_path, tmp_path / 'data')


def test_files_of_the_hub_in_folders_called_like_splits(tmp_path):
  write_parquet(tmp_path / 'test', 'cifar10', ['label'])
  splits, _ = originals.READERS['cifar10'](tmp_path / 'test')
  folder = tmp_path / 'test' / 'cifar10'
  (folder / 'train_notes.parquet').write_bytes(b'')
  for path in folder.glob('*-of-*'):
    split, number = path.name.split('-')[:2]
    (tmp_path / 'numbered' / split).mkdir(parents=True, exist_ok=True)
    path.rename(tmp_path / 'numbered' / split / f'{number[-4:]}.parquet')
  again, _ = originals.READERS['cifar10'](tmp_path / 'numbered')
  for split in ('train', 'test'):
    np.testing.assert_array_equal(splits[split]['image'], again[split]['image'])


def test_names_with_a_byte_order_mark(tmp_path):
  """As editors of Windows save text: the mark is no part of the first name."""
  write_cifar(tmp_path, 'cifar100', 'binary')
  for name in ('coarse_label_names.txt', 'fine_label_names.txt'):
    path = tmp_path / 'cifar-100-binary' / name
    path.write_bytes(b'\xef\xbb\xbf' + path.read_bytes())
  _, names = originals.READERS['cifar100'](tmp_path)
  assert names['coarse_label'] == COARSE_NAMES
  assert tuple(names['label']) == cifar.Cifar100.class_names


def test_tfds_itself_reads_what_was_written(data_dir):
  import tensorflow_datasets as tfds

  source = tfds.data_source('cifar100', split='train', data_dir=data_dir)
  example = source[0]
  assert sorted(example) == ['coarse_label', 'id', 'image', 'label']
  assert example['coarse_label'] == example['label'] // 5
  names = source.dataset_info.features['label'].names
  assert tuple(names) == cifar.Cifar100.class_names
  names = source.dataset_info.features['coarse_label'].names
  assert names == COARSE_NAMES


def refused(name, source, target):
  """Returns the one line that says why; nothing may have been written."""
  with pytest.raises(config_utils.UserError) as error:
    run_prepare(name, source, target)
  assert '\n' not in str(error.value)
  assert not target.exists()
  return str(error.value)


def test_a_pickle_cannot_run_code(tmp_path):
  class Evil:
    def __reduce__(self):
      return os.mkdir, (str(tmp_path / 'owned'),)

  write_cifar(tmp_path, 'cifar100', 'python')
  evil = pickle.dumps(Evil(), protocol=2)
  for file in ('train', 'meta'):
    path = tmp_path / 'cifar-100-python' / file
    kept = path.read_bytes()
    path.write_bytes(evil)
    message = refused('cifar100', tmp_path, tmp_path / 'data')
    assert file in message and 'mkdir' in message
    path.write_bytes(kept)
  assert not (tmp_path / 'owned').exists()
  pickle.loads(evil)  # It is a working one.
  assert (tmp_path / 'owned').exists()


def test_missing_files_are_named(tmp_path):
  source = write_garments(tmp_path / 'idx')
  (source / 't10k-labels-idx1-ubyte').unlink()
  message = refused('fashion_mnist', source, tmp_path / 'data')
  assert 't10k-labels-idx1-ubyte[.gz]. Found t10k-images-idx3-ubyte' in message
  message = refused('cifar10', tmp_path / 'nowhere', tmp_path / 'data')
  assert 'cifar-10-python.tar.gz' in message and 'Found nothing' in message
  write_cifar(tmp_path, 'cifar10', 'binary')
  (tmp_path / 'cifar-10-batches-bin' / 'data_batch_3.bin').unlink()
  message = refused('cifar10', tmp_path, tmp_path / 'data')
  assert 'data_batch_3.bin' in message
  assert 'Found cifar-10-batches-bin, idx' in message


@pytest.mark.parametrize(
  ('file', 'change', 'reason'),
  [
    ('t10k-images-idx3-ubyte', lambda raw: raw[:-1], 'header declares'),
    ('train-labels-idx1-ubyte', lambda raw: raw + b'0', 'header declares'),
    ('train-images-idx3-ubyte', lambda raw: b'PNG' + raw, 'not an IDX file'),
    ('train-images-idx3-ubyte', lambda raw: raw[:9], 'not an IDX file'),
    ('t10k-labels-idx1-ubyte', lambda raw: raw[:-1] + b'\n', 'from 0 to 10'),
    (
      't10k-labels-idx1-ubyte',
      lambda raw: raw[:4] + struct.pack('>I', 99) + raw[8:-1],
      r'images \(100, 28, 28\) and labels \(99,\)',
    ),
  ],
)
def test_damaged_idx_files(file, change, reason, tmp_path):
  source = write_garments(tmp_path / 'source')
  raw = (source / file).read_bytes()
  (source / file).write_bytes(change(raw))
  message = refused('fashion_mnist', source, tmp_path / 'data')
  assert re.search(reason, message)


def test_damaged_gzip(tmp_path):
  source = write_garments(tmp_path / 'source', '.gz')
  path = source / 'train-images-idx3-ubyte.gz'
  raw = path.read_bytes()
  for damaged in (raw[: len(raw) // 2], b'no gzip', raw[:99] + b'\0' * 99):
    path.write_bytes(damaged)
    message = refused('fashion_mnist', source, tmp_path / 'data')
    assert f'{path} is damaged' in message


@pytest.mark.parametrize(
  ('version', 'file', 'change', 'reason'),
  [
    ('binary', 'train.bin', lambda raw: raw[:-1], 'train.bin is damaged'),
    ('binary', 'train.bin', lambda raw: raw[:-3074], '499 training and 100'),
    ('binary', 'test.bin', lambda raw: b'', 'test.bin is damaged'),
    ('binary', 'test.bin', lambda raw: b'\x14' + raw[1:], 'from 0 to 20'),
    ('binary', 'fine_label_names.txt', lambda raw: b'a b', 'no class names'),
    (
      'binary',
      'fine_label_names.txt',
      lambda raw: raw.replace(b'apple', b'pear'),
      'the classes are',
    ),
    ('python', 'train', lambda raw: raw[:-1000], 'train is damaged'),
    ('python', 'test', lambda raw: python2_pickle({}), 'test is damaged'),
    ('python', 'meta', lambda raw: b'hello', 'no class names in meta'),
  ],
)
def test_damaged_cifar_files(version, file, change, reason, tmp_path):
  write_cifar(tmp_path, 'cifar100', version)
  path = tmp_path / FOLDERS['cifar100', version] / file
  path.write_bytes(change(path.read_bytes()))
  assert reason in refused('cifar100', tmp_path, tmp_path / 'data')


def test_damaged_archive(tmp_path):
  write_cifar(tmp_path, 'cifar10', 'python', archived=True)
  path = tmp_path / 'cifar-10-python.tar.gz'
  raw = path.read_bytes()
  path.write_bytes(raw[: len(raw) // 2])
  message = refused('cifar10', path, tmp_path / 'data')
  assert f'{path} is damaged' in message
  path.write_bytes(raw)
  # Whole, but of the other data set.
  assert 'not one of those archives' in refused(
    'cifar100', path, tmp_path / 'data'
  )
  run_prepare('cifar10', path, tmp_path / 'data')


@pytest.mark.parametrize(
  ('args', 'reason'),
  [
    ([], 'required: name'),
    (['fashion_mnits'], "did you mean 'fashion_mnist'?"),
    (['digits', '--source', 'x'], 'leave out --source'),
    (['cifar10', '--sorce', 'x'], 'unrecognized arguments'),
  ],
)
def test_wrong_arguments(args, reason):
  with pytest.raises(config_utils.UserError, match=reason):
    prepare.main(args)


def test_the_command(tmp_path):
  command = [sys.executable, '-m', 'ijckd_jax', 'prepare']
  command += ['--data_dir', str(tmp_path / 'data')]
  result = subprocess.run(
    [*command, 'cifar10', '--source', str(tmp_path)],
    capture_output=True,
    text=True,
    check=False,
  )
  assert (result.returncode, result.stdout) == (2, '')
  assert result.stderr.startswith('error: ')
  assert result.stderr.count('\n') == 1
  result = subprocess.run(
    [*command, 'digits'], capture_output=True, text=True, check=False
  )
  assert (result.returncode, result.stderr) == (0, '')
  assert result.stdout.endswith('(1437 train, 360 test)\n')


def test_download_without_tensorflow(tmp_path, monkeypatch):
  monkeypatch.setattr('importlib.util.find_spec', lambda name: None)
  with pytest.raises(config_utils.UserError, match='ijckd_jax.prepare'):
    prepare.main(['cifar10', '--data_dir', str(tmp_path / 'data')])
  assert not (tmp_path / 'data').exists()


def test_data_sets_import_nothing_heavy():
  modules = {ref.partition(':')[0] for ref in datasets.DATASETS.values()}
  heavy = ['tensorflow_datasets', 'sklearn', 'PIL', 'tensorflow']
  program = (
    f'import sys, {", ".join(modules)}, ijckd_jax.commands.prepare\n'
    f'print([name for name in {heavy} if name in sys.modules])'
  )
  assert subprocess.check_output([sys.executable, '-c', program]) == b'[]\n'


def sides(images):
  """Returns the sets of left and of right halves, by their pixels."""
  width = images.shape[2] // 2
  left = {image.tobytes() for image in images[:, :, :width]}
  return left, {image.tobytes() for image in images[:, :, width:]}


def test_pairs_are_two_garments_of_the_classes(data_dir):
  dataset = small('fashion_pairs_100', data_dir, num_train=300)
  assert dataset.image_shape == (28, 56, 1)
  assert dataset.class_names[8] == 'T-shirt/top + Bag'
  assert dataset.class_names[80] == 'Bag + T-shirt/top'
  for split, prefix in (('train', 'train'), ('test', 't10k')):
    kinds = by_pixels(*GARMENTS[prefix])
    pairs = dataset.load(split)
    for image, label in zip(pairs.images, pairs.labels, strict=True):
      left, right = image[:, :28].tobytes(), image[:, 28:].tobytes()
      assert 10 * kinds[left] + kinds[right] == label
    counts = np.bincount(pairs.labels, minlength=100)
    np.testing.assert_array_equal(counts, len(pairs) // 100)


def test_pairs_of_different_splits_share_no_garment(data_dir):
  dataset = small('fashion_pairs_100', data_dir, validation_fraction=0.2)
  used = [
    set.union(*sides(dataset.load(split).images)) for split in datasets.SPLITS
  ]
  # 40 of the 200 are held out; two hundred pairs meet nearly all of the rest.
  assert 100 < len(used[0]) <= 160
  assert len(used[1]) <= 40
  for a, b in ((0, 1), (0, 2), (1, 2)):
    assert not used[a] & used[b]


def test_validation_pairs_are_balanced_and_not_taken_from_train(data_dir):
  for fraction, num_validation in ((0.1, 100), (0.4, 200)):
    dataset = small(
      'fashion_pairs_100',
      data_dir,
      num_train=500,
      validation_fraction=fraction,
    )
    assert len(dataset.load('train')) == 500
    counts = np.bincount(dataset.load('validation').labels, minlength=100)
    np.testing.assert_array_equal(counts, num_validation // 100)


def test_pairs_follow_from_their_seed(data_dir):
  dataset = small('fashion_pairs_100', data_dir)
  first = dataset.load('train')
  np.random.seed(3)
  # Neither a run's state nor another split's size changes them.
  again = dataclasses.replace(dataset, num_test=300).load('train')
  np.testing.assert_array_equal(first.images, again.images)
  np.testing.assert_array_equal(first.labels, again.labels)
  other = dataclasses.replace(dataset, pairs_seed=1).load('train')
  assert (first.images != other.images).any()
  assert (first.labels != other.labels).any()


def test_half_resolution_is_the_mean_of_blocks(data_dir):
  full = small('fashion_pairs_100', data_dir)
  half = dataclasses.replace(full, resolution='half')
  assert half.image_shape == (14, 28, 1)
  pairs = full.load('test')
  blocks = pairs.images.reshape(-1, 14, 2, 28, 2, 1).astype(float)
  expected = np.floor(blocks.mean(axis=(2, 4)) + 0.5)
  halved = half.load('test')
  np.testing.assert_array_equal(halved.images, expected)
  np.testing.assert_array_equal(halved.labels, pairs.labels)


@pytest.mark.parametrize(
  ('fields', 'reason'),
  [
    ({'num_train': 150}, 'num_train=150'),
    ({'num_test': 0}, 'num_test=0'),
    ({'num_test': -100}, 'num_test=-100'),
    ({'resolution': 'hlaf'}, "did you mean 'half'"),
    ({'pairs_seed': -1}, 'pairs_seed=-1'),
  ],
)
def test_pairs_that_cannot_be(fields, reason):
  with pytest.raises(config_utils.UserError, match=reason):
    fashion_pairs.Dataset(**fields)


def array_dataset(**changes):
  images = random_images(0, 6, 4, 5, 3)
  labels = np.array([0, 1, 2, 0, 1, 2])
  fields = {
    'train': datasets.Arrays(images, labels),
    'test': datasets.Arrays(images, labels),
    'class_names': ('a', 'b', 'c'),
    'mean': (0.5,) * 3,
    'std': (0.2,) * 3,
  }
  return datasets.ArrayDataset(**(fields | changes))


def test_array_dataset():
  dataset = array_dataset()
  assert dataset.image_shape == (4, 5, 3)
  assert (dataset.crop_padding, dataset.flip) == (0, False)
  assert dataset.load('validation').images.shape == (0, 4, 5, 3)
  loaded = dataset.load('train')
  np.testing.assert_array_equal(loaded.images, dataset.train.images)
  assert loaded.labels.dtype == np.int32
  unlabelled = datasets.Arrays(loaded.images, np.full(6, -1))
  assert (array_dataset(train=unlabelled).load('train').labels == -1).all()
  held = array_dataset(validation=dataset.test).load('validation')
  assert len(held) == 6
  with pytest.raises(config_utils.UserError, match='unknown split'):
    dataset.load('all')


def test_fingerprint_is_of_all_that_the_data_set_is():
  dataset = array_dataset()
  same = array_dataset(
    train=datasets.Arrays(
      dataset.train.images.copy(), dataset.train.labels.astype(np.int64)
    ),
    class_names=['a', 'b', 'c'],
    mean=np.full(3, 0.5),
  )
  assert type(dataset.fingerprint()) is int
  assert same.fingerprint() == dataset.fingerprint()
  images, labels = dataset.train.images, dataset.train.labels
  others = [
    {'train': datasets.Arrays(images[::-1], labels)},
    {'test': datasets.Arrays(images, labels[::-1])},
    {'validation': dataset.test},
    {'crop_padding': 1},
    {'flip': True},
    {'mean': (0.5, 0.5, 0.4)},
    {'std': (0.2, 0.2, 0.3)},
    {'class_names': ('a', 'b', 'd')},
  ]
  prints = {array_dataset(**changes).fingerprint() for changes in others}
  assert len(prints | {dataset.fingerprint()}) == len(others) + 1


def test_fingerprint_tells_where_the_splits_are_cut():
  # The same bytes one after the other: all zero, three examples in all.
  def cut(num_train):
    def arrays(num):
      return datasets.Arrays(
        np.zeros((num, 4, 1, 1), np.uint8), np.zeros(num, np.int32)
      )

    return array_dataset(
      train=arrays(num_train),
      test=arrays(3 - num_train),
      mean=(0.5,),
      std=(0.2,),
    )

  assert cut(1).fingerprint() != cut(2).fingerprint()


@pytest.mark.parametrize(
  ('split', 'images', 'labels', 'reason'),
  [
    ('train', np.zeros((6, 4, 5, 3)), np.zeros(6, int), 'float64'),
    ('train', np.zeros((6, 4, 5), np.uint8), np.zeros(6, int), 'N, H, W, C'),
    ('train', random_images(0, 0, 4, 5, 3), np.zeros(0, int), 'at least 1'),
    *[
      ('train', random_images(0, *shape), np.zeros(6, int), 'at least 1')
      for shape in ((6, 0, 5, 3), (6, 4, 0, 3), (6, 4, 5, 0))
    ],
    ('test', random_images(0, 6, 8, 8, 3), np.zeros(6, int), 'those of train'),
    ('test', random_images(0, 6, 4, 5, 3), np.zeros(5, int), 'one for each'),
    ('test', random_images(0, 6, 4, 5, 3), np.zeros(6), 'integers'),
    ('train', random_images(0, 6, 4, 5, 3), np.full(6, -2), 'from -2 to -2'),
    ('train', random_images(0, 6, 4, 5, 3), np.full(6, 3), 'from 3 to 3'),
    ('test', random_images(0, 6, 4, 5, 3), np.full(6, -1), 'from -1 to -1'),
    ('validation', random_images(0, 6, 4, 5, 3), np.full(6, -1), 'from -1'),
  ],
)
def test_wrong_arrays(split, images, labels, reason):
  with pytest.raises(config_utils.UserError, match=f'{split} .*{reason}'):
    array_dataset(**{split: datasets.Arrays(images, labels)})


@pytest.mark.parametrize(
  'fields, said',
  [
    ({'mean': (0.5,)}, 'give 3 numbers'),
    ({'std': 0.5}, 'give 3 numbers'),
    ({'mean': (125.3, 123.0, 113.9)}, 'divide those of pixels from 0 to 255'),
    ({'std': (63.0, 62.1, 66.7)}, 'divide those of pixels from 0 to 255'),
    ({'mean': (-0.1, 0.5, 0.5)}, 'none is negative'),
    ({'mean': (0.5, float('nan'), 0.5)}, 'must be finite'),
    ({'std': (0.2, float('inf'), 0.2)}, 'must be finite'),
    ({'std': (0.2, 0.0, 0.2)}, 'must be positive'),
    ({'std': (0.2, -0.2, 0.2)}, 'must be positive'),
  ],
)
def test_images_cannot_be_normalised_by_all_numbers(fields, said):
  with pytest.raises(config_utils.UserError, match=said):
    array_dataset(**fields)


def test_numbers_at_the_ends_are_taken():
  """Of images that are not normalised, and of constant channels."""
  array_dataset(mean=(0.0, 0.0, 1.0), std=(1.0, 1.0, 1.0))


class Tensor:
  """Refuses to become an array, as PyTorch's tensors on a GPU do."""

  def __array__(self, *args, **kwargs):
    raise TypeError("can't convert cuda:0 device type tensor to numpy")


class Series:
  """A shuffled column of pandas: `column[i]` is by its index, not by place."""

  def __init__(self, values, index):
    self.values = dict(zip(index, values, strict=True))

  def __array__(self, *args, **kwargs):
    return np.array(list(self.values.values()))

  def __getitem__(self, index):
    return self.values[index]

  def __len__(self):
    return len(self.values)


def test_arrays_of_other_libraries_are_converted_at_once():
  labels = np.array([0, 1, 2, 1, 0, 2])
  column = Series(labels, index=[5, 4, 3, 2, 1, 0])
  images = random_images(0, 6, 4, 5, 3)
  arrays = datasets.Arrays(images.tolist(), column)
  assert type(arrays.images) is type(arrays.labels) is np.ndarray
  chosen = arrays.take(np.array([0, 5]))
  np.testing.assert_array_equal(chosen.labels, [0, 2])
  data = array_dataset(train=datasets.Arrays(images, column))
  np.testing.assert_array_equal(data.load('train').labels, labels)
  with pytest.raises(config_utils.UserError, match='images are of type Tensor'):
    datasets.Arrays(Tensor(), labels)
  with pytest.raises(config_utils.UserError, match='labels are of type list'):
    datasets.Arrays(images, [[0], [1, 2]])


def test_class_names_become_text():
  numbers = np.unique([3, 1, 2])
  assert array_dataset(class_names=numbers).class_names == ('1', '2', '3')


def test_what_is_no_arrays_is_told():
  pair = random_images(0, 6, 4, 5, 3), np.zeros(6, np.int32)
  with pytest.raises(config_utils.UserError, match='give ijckd_jax.Arrays'):
    array_dataset(train=pair)
  with pytest.raises(config_utils.UserError, match='looks like .N, C, H, W.'):
    array_dataset(
      train=datasets.Arrays(random_images(0, 6, 3, 8, 8), pair[1]),
      test=datasets.Arrays(random_images(0, 6, 3, 8, 8), pair[1]),
    )


@pytest.mark.slow
def test_real_fashion_mnist(tmp_path):
  """From the files that Debian packages, where they are installed."""
  if not shutil.which('dpkg'):
    pytest.skip('no dpkg')
  listing = subprocess.run(
    ['dpkg', '-L', 'dataset-fashion-mnist'],
    capture_output=True,
    text=True,
    check=False,
  ).stdout.splitlines()
  found = [path for path in listing if 'train-images-idx3' in path]
  if not found:
    pytest.skip('dataset-fashion-mnist is not installed')
  run_prepare('fashion_mnist', pathlib.Path(found[0]).parent, tmp_path)
  dataset = fashion_mnist.Dataset(data_dir=str(tmp_path))
  train, test = dataset.load('train'), dataset.load('test')
  np.testing.assert_array_equal(np.bincount(train.labels), 6000)
  np.testing.assert_array_equal(np.bincount(test.labels), 1000)
  pixels = train.images / np.float32(255)
  np.testing.assert_allclose(pixels.mean(), dataset.mean[0], atol=5e-5)
  np.testing.assert_allclose(pixels.std(), dataset.std[0], atol=5e-5)
  pairs = fashion_pairs.Dataset(data_dir=str(tmp_path)).load('train')
  assert pairs.images.shape == (50_000, 28, 56, 1)
