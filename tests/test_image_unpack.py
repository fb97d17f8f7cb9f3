"""Parquet's and NumPy's files of pictures become a data set."""

import io
import json
import os

import numpy as np
from PIL import Image
import pyarrow
from pyarrow import parquet
import pytest

from ijckd_jax.commands import prepare
from ijckd_jax.data.datasets import image_folder
from ijckd_jax.data.datasets import image_unpack
from ijckd_jax.runtime import config_utils
from tests import test_image_folder as shared

NAMES = ['zebra', 'ant', 'T-shirt/top']


def picture(level, kind='PNG'):
  data = io.BytesIO()
  Image.new('RGB', (5, 4), (level, 0, 9)).save(data, kind)
  return data.getvalue()


def write_parquet(
  path, labels, *, names=NAMES, image='image', label='label', **more
):
  path.parent.mkdir(parents=True, exist_ok=True)
  pictures = [
    {'bytes': picture(20 * i), 'path': f'{i}.png'} for i in range(len(labels))
  ]
  table = pyarrow.table({image: pictures, label: labels, **more})
  features = {label: {'names': names, '_type': 'ClassLabel'}} if names else {}
  described = json.dumps({'info': {'features': features}})
  table = table.replace_schema_metadata({'huggingface': described})
  parquet.write_table(table, path, row_group_size=2)


def levels(data_dir):
  """Returns {split: [(red of the first pixel, class)]}."""
  found = shared.contents(data_dir)
  return {
    split: sorted((int(x[0, 0, 0]), kind) for x, kind in rows.values())
    for split, rows in found.items()
  }


def test_parquet_files_of_the_hub(tmp_path):
  source = tmp_path / 'hub'
  write_parquet(source / 'data/train-00000-of-00002.parquet', [0, 1, 2])
  write_parquet(source / 'data/train-00001-of-00002.parquet', [2, 1, 0])
  write_parquet(source / 'data/validation-00000-of-00001.parquet', [0, 1, 2])
  for name in (str(source), f'{source}/data/*.parquet'):
    data = tmp_path / f'data{len(name)}'
    shared.run(name, data)
    assert levels(data) == {
      'train': [
        (0, 'T-shirt/top'),
        (0, 'zebra'),
        (20, 'ant'),
        (20, 'ant'),
        (40, 'T-shirt/top'),
        (40, 'zebra'),
      ],
      'test': [(0, 'zebra'), (20, 'ant'), (40, 'T-shirt/top')],
    }
    assert sorted(path.name for path in data.iterdir()) == ['pets']


def test_other_columns_and_labels_without_names(tmp_path, capsys):
  source = tmp_path / 'a.parquet'
  write_parquet(
    source,
    [10, 9, 10, 9],
    names=None,
    image='img',
    label='fine',
    part=['train', 'train', 'test', 'test'],
  )
  flags = ('--image=img', '--label=fine', '--split=part')
  argv = ['--source', str(source), '--name', 'pets']
  argv += ['--data_dir', str(tmp_path / 'data'), '--num_workers=1', *flags]
  assert prepare.main(['parquet', *argv]) == 0
  assert levels(tmp_path / 'data') == {
    'train': [(0, '10'), (20, '9')],
    'test': [(40, '10'), (60, '9')],
  }
  builder = shared.prepared.find('pets', str(tmp_path / 'data'))
  assert builder.info.features['label'].names == ['9', '10']
  capsys.readouterr()
  assert prepare.main(['parquet', *argv]) == 0
  assert 'already prepared' in capsys.readouterr().out
  with pytest.raises(config_utils.UserError, match='holds another data set'):
    prepare.main(['parquet', *argv[:-1]])


@pytest.mark.parametrize('style', ['{}_images {}_labels', 'x_{} y_{}'])
def test_arrays_of_numpy(style, tmp_path):
  rng = np.random.default_rng(0)
  arrays, expected = {}, {}
  images_name, labels_name = style.split()
  for split, count in (('train', 6), ('test', 4)):
    images = rng.integers(0, 256, (count, 3, 4, 3)).astype(np.uint8)
    labels = np.arange(count)[:, None] % 2
    arrays[images_name.format(split)] = images
    arrays[labels_name.format(split)] = labels
    expected[split] = sorted(
      (int(x[0, 0, 0]), NAMES[y])
      for x, y in zip(images, labels.ravel(), strict=True)
    )
  np.savez(tmp_path / 'a.npz', **arrays, class_names=np.array(NAMES))
  shared.run(tmp_path / 'a.npz', tmp_path / 'data')
  assert levels(tmp_path / 'data') == expected


@pytest.mark.parametrize('shape', [(8, 1, 4), (8, 1, 4, 1)])
def test_grey_arrays_without_splits(shape, tmp_path):
  images = np.arange(32).reshape(shape).astype(np.uint8)
  np.savez_compressed(
    tmp_path / 'a.npz', images=images, labels=np.array(['x', 'y'] * 4)
  )
  shared.run(tmp_path / 'a.npz', tmp_path / 'data', '--validation_fraction=0.5')
  found = levels(tmp_path / 'data')
  assert {split: len(rows) for split, rows in found.items()} == {
    'train': 4,
    'test': 4,
  }
  assert sorted(found['train'] + found['test']) == [
    (4 * i, 'xy'[i % 2]) for i in range(8)
  ]


def test_what_was_cut_off_is_continued(tmp_path, monkeypatch):
  source = tmp_path / 'hub'
  for number in range(2):
    path = source / f'train-{number:05}-of-00002.parquet'
    write_parquet(path, [0, 1, 2, 0, 1, 2])
  read, seen = image_unpack._parquet, []

  def cut_off(path, columns):
    for number, row in enumerate(read(path, columns)):
      seen.append((path.name, number))
      if len(seen) == 9:
        raise OSError('no space left')
      yield row

  monkeypatch.setattr(image_unpack, '_parquet', cut_off)
  args = str(source), 'pets', str(tmp_path / 'data')
  with pytest.raises(OSError, match='no space left'):
    image_folder.prepare(*args)
  image_folder.prepare(*args)
  # The first file was complete, the second one is read again.
  assert [name for name, _ in seen].count('train-00000-of-00002.parquet') == 6
  assert len(seen) == 9 + 6
  counts = [len(rows) for rows in levels(tmp_path / 'data').values()]
  assert sorted(counts) == [3, 9]
  # A changed file is another one.
  os.utime(source / 'train-00000-of-00002.parquet', ns=(1, 1))
  with pytest.raises(config_utils.UserError, match='holds another data set'):
    image_folder.prepare(*args)


def bad_parquet(path, **changes):
  write_parquet(path, **{'labels': [0, 1, 2], **changes})


def columns_of(path, **columns):
  parquet.write_table(pyarrow.table(columns), path)


LABELS = np.arange(4) % 2
GREY = np.zeros((4, 3, 3), np.uint8)


@pytest.mark.parametrize(
  'name, make, said',
  [
    (
      'a.parquet',
      lambda p: bad_parquet(p, image='img'),
      "no column 'image', but 'img', 'label': name them by --image",
    ),
    (
      'a.parquet',
      lambda p: columns_of(p, image=['a.png'], label=[1]),
      'no pictures but string; of paths, give a CSV file',
    ),
    (
      'a.parquet',
      lambda p: columns_of(p, image=[{'path': 'a'}], label=[1]),
      'no pictures but struct',
    ),
    (
      'a.parquet',
      lambda p: bad_parquet(p, labels=[0.5, 1.0, 2.0]),
      'holds double: a class is a whole number or a name',
    ),
    (
      'a.parquet',
      lambda p: bad_parquet(p, labels=[0, 1, -1]),
      'row 2 has the label -1, which is no class',
    ),
    (
      'a.parquet',
      lambda p: bad_parquet(p, labels=[0, 1, None]),
      'row 2 has the label None',
    ),
    (
      'a.parquet',
      lambda p: bad_parquet(p, labels=[0, 1, 3]),
      'the label 3, of 3 classes',
    ),
    (
      'a.parquet',
      lambda p: columns_of(p, image=[b'x', None], label=[0, 1]),
      'row 1 has no picture',
    ),
    ('a.parquet', lambda p: p.write_bytes(b'PAR1 and no more'), 'is damaged'),
    ('a.npz', lambda p: p.write_bytes(b'PK and no more'), 'is damaged'),
    (
      'a.npz',
      lambda p: np.savez(p, images=GREY, targets=LABELS),
      'holds images, targets: call the arrays images and labels',
    ),
    (
      'a.npz',
      lambda p: np.savez(
        p, train_images=GREY, train_labels=LABELS, test_images=GREY
      ),
      'leave out all others but class_names',
    ),
    (
      'a.npz',
      lambda p: np.savez(
        p, train_images=GREY, train_labels=LABELS, x_train=GREY, y_train=LABELS
      ),
      'call the arrays images',
    ),
    (
      'a.npz',
      lambda p: np.savez(
        p, images=GREY, labels=LABELS, class_names=np.array([b'x', b'y'])
      ),
      'give one text for each class',
    ),
    (
      'a.npz',
      lambda p: np.savez(
        p, images=GREY, labels=LABELS, class_names=np.array(['x', 'x'])
      ),
      'all different',
    ),
    (
      'a.parquet',
      lambda p: bad_parquet(p, names=['x', 'y', 'x']),
      'all different',
    ),
    (
      'a.parquet',
      lambda p: bad_parquet(p, split=['train', 'dev', 'test']),
      "row 1: 'dev' is none of the splits",
    ),
    (
      'a.parquet',
      lambda p: bad_parquet(p, labels=['x', '', 'y'], names=None),
      "row 1: the label '' is no name",
    ),
    (
      'a.parquet',
      lambda p: bad_parquet(p, labels=[0, 0, 0]),
      r'a.parquet has 1 classes to train on',
    ),
    (
      'a.npz',
      lambda p: np.savez(p, images=GREY[..., None].repeat(4, 3), labels=LABELS),
      'one channel or three',
    ),
    (
      'a.npz',
      lambda p: np.savez(p, images=GREY.astype(np.uint16), labels=LABELS),
      'images is uint16; give uint8',
    ),
    (
      'a.npz',
      lambda p: np.savez(p, images=GREY, labels=LABELS[:3]),
      'give one label for each',
    ),
    (
      'a.npz',
      lambda p: np.savez(p, images=GREY, labels=LABELS / 2),
      'labels is float64; a class is a whole number',
    ),
    (
      'a.npz',
      lambda p: np.savez(p, images=np.array([{}] * 4), labels=LABELS),
      'is damaged or truncated: Object arrays cannot be loaded',
    ),
  ],
)
def test_files_that_cannot_be(name, make, said, tmp_path):
  make(tmp_path / name)
  with pytest.raises(config_utils.UserError, match=said):
    image_folder.prepare(str(tmp_path / name), 'pets', str(tmp_path / 'data'))
  assert not (tmp_path / 'data/pets').exists()


def test_siblings_that_differ_and_patterns_that_fit_nothing(tmp_path):
  write_parquet(tmp_path / 'train-0.parquet', [0, 1, 2])
  write_parquet(tmp_path / 'train-1.parquet', [0, 1], names=['ant', 'bee'])
  with pytest.raises(
    config_utils.UserError, match='train-1.parquet is not like'
  ):
    image_folder.prepare(
      f'{tmp_path}/*.parquet', 'pets', str(tmp_path / 'data')
    )
  assert not (tmp_path / 'data').exists()
  with pytest.raises(config_utils.UserError, match='there is no .npz file'):
    image_folder.prepare(f'{tmp_path}/*.npz', 'pets', str(tmp_path / 'data'))
  write_parquet(tmp_path / 'one/train.parquet', [0, 1, 2, 0, 1, 2])
  with pytest.raises(config_utils.UserError, match='have classes'):
    shared.run(tmp_path / 'one', tmp_path / 'data', '--unlabelled')
  assert not (tmp_path / 'data').exists()


@pytest.mark.parametrize(
  'train, test',
  [
    ('cifar-train.parquet', 'cifar-test.parquet'),
    ('seg_train.parquet', 'seg_test.parquet'),
    ('train/p1/0.parquet', 'test/p1/0.PARQUET'),
    ('TrainSet.parquet', 'testing-0-of-1.parquet'),
  ],
)
def test_the_split_is_in_the_name(train, test, tmp_path):
  source = tmp_path / 'test_run'  # What is above does not count.
  write_parquet(source / train, [0, 1, 2])
  write_parquet(source / test, [2, 1, 0])
  write_parquet(source / '.cache/train.parquet', [0, 1, 2])
  (source / 'cover.png').write_bytes(picture(0))
  argv = ['--source', str(source), '--name', 'pets', '--num_workers=1']
  assert (
    prepare.main(['parquet', *argv, '--data_dir', str(tmp_path / 'd')]) == 0
  )
  assert levels(tmp_path / 'd') == {
    'train': [(0, 'zebra'), (20, 'ant'), (40, 'T-shirt/top')],
    'test': [(0, 'T-shirt/top'), (20, 'ant'), (40, 'zebra')],
  }


@pytest.mark.parametrize(
  'names, said',
  [
    (('train.parquet', 'dev.parquet'), 'dev.parquet: the name says no split'),
    (('test/train.parquet', 'val/0.parquet'), 'says test and train: rename it'),
  ],
)
def test_names_that_leave_the_split_open(names, said, tmp_path):
  for name in names:
    write_parquet(tmp_path / 'source' / name, [0, 1, 2])
  with pytest.raises(config_utils.UserError, match=said):
    image_folder.prepare(
      str(tmp_path / 'source'), 'pets', str(tmp_path / 'data')
    )
  assert not (tmp_path / 'data').exists()


def test_a_split_column_in_one_of_two_files(tmp_path):
  write_parquet(tmp_path / 'a.parquet', [0, 1, 2])
  write_parquet(tmp_path / 'b.parquet', [0, 1, 2], split=['train'] * 3)
  with pytest.raises(config_utils.UserError, match='b.parquet is not like'):
    image_folder.prepare(str(tmp_path), 'pets', str(tmp_path / 'data'))


def test_arrays_in_a_file_for_each_split(tmp_path):
  for split, level in (('train', 10), ('test', 20)):
    images = np.full((4, 3, 3), level, np.uint8)
    np.savez(tmp_path / f'{split}.npz', images=images, labels=LABELS)
  shared.run(f'{tmp_path}/*.npz', tmp_path / 'data')
  assert levels(tmp_path / 'data') == {
    'train': [(10, '0'), (10, '0'), (10, '1'), (10, '1')],
    'test': [(20, '0'), (20, '0'), (20, '1'), (20, '1')],
  }


def test_a_file_beside_a_folder_of_its_name_and_a_second_start(
  tmp_path, monkeypatch, capsys
):
  source = tmp_path / 'hub'
  write_parquet(source / 'a.parquet', [0, 1, 2, 0, 1, 2])
  write_parquet(source / 'a/b.parquet', [0, 1, 2, 0, 1, 2])
  shared.run(source, tmp_path / 'data')
  assert sum(map(len, levels(tmp_path / 'data').values())) == 12
  # A relative path and the usual names are the same request.
  monkeypatch.chdir(tmp_path)
  shared.run('hub', tmp_path / 'data', '--image=image', '--label=label')
  assert 'already prepared' in capsys.readouterr().out
