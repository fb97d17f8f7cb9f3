"""A CSV file of pictures becomes a data set as a folder of them does."""

import numpy as np
from PIL import Image
import pytest

from ijckd_jax.commands import prepare
from ijckd_jax.data.datasets import image_folder
from ijckd_jax.data.datasets import image_table
from ijckd_jax.runtime import config_utils
from tests import test_image_folder as shared


@pytest.fixture
def pictures(tmp_path):
  """Returns the folder of a.png to f.png, each of a grey level of its own."""
  folder = tmp_path / 'pictures'
  folder.mkdir()
  for number, name in enumerate('abcdef'):
    Image.new('L', (4, 3), 10 * number).save(folder / f'{name}.png')
  return folder


def table(folder, *lines, name='pictures.csv'):
  path = folder / name
  path.write_text('\n'.join(lines) + '\n')
  return path


def test_a_table_with_splits(pictures, tmp_path):
  source = table(
    pictures,
    'id,file,kind,part',
    f'1,{pictures}/a.png,10,train',
    '2,b.png,9,Training',
    '3,c.png,9,val',
    '4,d.png,10,valid',
    '5,e.png,9,test',
    '6,"f.png",10,test',
  )
  flags = ['--image=file', '--label=kind', '--split=part']
  shared.run(source, tmp_path / 'data', *flags)
  found = shared.contents(tmp_path / 'data')
  kinds = {
    split: {name: kind for name, (_, kind) in rows.items()}
    for split, rows in found.items()
  }
  assert kinds == {
    'train': {f'{pictures}/a.png': '10', 'b.png': '9'},
    'validation': {'c.png': '9', 'd.png': '10'},
    'test': {'e.png': '9', 'f.png': '10'},
  }
  np.testing.assert_array_equal(
    found['test']['e.png'][0], shared.pixels_of(pictures / 'e.png')
  )
  builder = shared.prepared.find('pets', str(tmp_path / 'data'))
  # Numbers in their order.
  assert builder.info.features['label'].names == ['9', '10']
  # The same command finds it, and another table is another data set.
  shared.run(source, tmp_path / 'data', *flags)
  source.write_text(source.read_text().replace('6,"f.png",10', '6,f.png,9'))
  with pytest.raises(config_utils.UserError, match='no picture of 10'):
    shared.run(source, tmp_path / 'data', *flags)


def test_a_table_without_splits_has_a_part_held_out(pictures, tmp_path):
  rows = [f'{name}.png,{"cat" if name < "d" else "dog"}' for name in 'abcdef']
  source = table(pictures, 'image,label', *rows)
  shared.run(source, tmp_path / 'data', '--validation_fraction=0.4')
  found = shared.contents(tmp_path / 'data')
  counts = {
    split: sorted(kind for _, kind in rows.values())
    for split, rows in found.items()
  }
  assert counts == {
    'train': ['cat', 'cat', 'dog', 'dog'],
    'test': ['cat', 'dog'],
  }
  as_folder = image_table.read(source, validation_fraction=0.4)
  assert [e.path for e in as_folder.examples if e.split == 'test'] == sorted(
    found['test']
  )


def test_validation_stands_in_for_a_test(pictures):
  source = table(
    pictures,
    'image,label,split',
    *('a.png,x,train', 'b.png,y,train', 'c.png,x,val', 'd.png,y,val'),
  )
  splits = {e.path: e.split for e in image_table.read(source).examples}
  assert splits['c.png'] == splits['d.png'] == 'test'


GOOD = ('a.png,x', 'b.png,y', 'c.png,x', 'd.png,y')


@pytest.mark.parametrize(
  'lines, said',
  [
    (('file,label', *GOOD), "no column 'image', but 'file', 'label'"),
    (('image,kind', *GOOD), 'name them by --image, --label and --split'),
    (('image,label',), 'has no rows'),
    (('image,label', *GOOD, 'nowhere.png,x'), '1 of 5 files are not there'),
    (('image,label', *GOOD, 'e.png,'), "line 6: 'label' is empty"),
    (('image,label', *GOOD, ',x'), "line 6: 'image' is empty"),
    (('image,label', *GOOD, 'e.png'), 'line 6: 1 cells for 2 columns'),
    (('image,label', *GOOD, 'e.png,x, and y'), 'cells with commas in quotes'),
    (('image,label,label', *(f'{row},x' for row in GOOD)), 'have one name'),
    (('image;label', 'a.png;x', 'b.png;y'), 'separate columns by commas'),
    (('image,label', *GOOD, '', './a.png,y'), 'line 7: a.png is in an earl'),
    (('image,label', *GOOD, 'e\0.png,x'), '1 of 5 files are not there'),
    (('image,label', *GOOD, 'a.png,y'), 'line 6: a.png is in an earlier row'),
    (('image,label', 'a.png,x', 'b.png,x'), '1 classes to train on'),
    (('image,label', *GOOD, 'e.png,X'), "'X' and 'x' are the same but for"),
    (
      ('image,label,split', *(f'{row},trian' for row in GOOD)),
      "'trian' is none of the splits",
    ),
    (
      ('image,label,split', *(f'{row},train' for row in GOOD), 'e.png,x,test'),
      'one has no picture of y',
    ),
    (('image,label', '"a.png,x'), 'is no CSV file'),
  ],
)
def test_tables_that_cannot_be(lines, said, pictures, tmp_path):
  source = table(pictures, *lines)
  with pytest.raises(config_utils.UserError, match=said):
    image_folder.prepare(str(source), 'pets', str(tmp_path / 'data'))
  assert not (tmp_path / 'data').exists()


def test_flags_that_do_not_fit(pictures, tmp_path):
  source = table(pictures, 'image,label', *GOOD)
  with pytest.raises(config_utils.UserError, match='have classes'):
    shared.run(source, tmp_path / 'data', '--unlabelled')
  with pytest.raises(config_utils.UserError, match='is no CSV or Parquet'):
    shared.run(pictures, tmp_path / 'data', '--label=kind')
  with pytest.raises(config_utils.UserError, match='does not exist'):
    shared.run(pictures / 'b.csv', tmp_path / 'data', '--label=kind')
  lines = [f'{row},{"train" if row < "c" else "test"}' for row in GOOD]
  source = table(pictures, 'image,label,split', *lines)
  with pytest.raises(config_utils.UserError, match='leave out --validation'):
    shared.run(source, tmp_path / 'data', '--validation_fraction=0.2')
  # A column that is asked for must be there; the usual one need not.
  with pytest.raises(config_utils.UserError, match="no column 'part'"):
    shared.run(source, tmp_path / 'data', '--split=part')
  # What is all for training has a part held out.
  lines = [f'{row}, train' for row in GOOD]
  source = table(pictures, 'image, label , split', *lines)
  shared.run(source, tmp_path / 'data', '--validation_fraction=0.5')
  assert {k: len(v) for k, v in shared.contents(tmp_path / 'data').items()} == {
    'train': 2,
    'test': 2,
  }
  with pytest.raises(config_utils.UserError, match='is no .csv file'):
    prepare.main(['csv', '--source', str(pictures), '--name', 'cats'])
  source.write_bytes(b'image,label\na.png,\xff\n')
  with pytest.raises(config_utils.UserError, match='no CSV file in UTF-8'):
    shared.run(source, tmp_path / 'data')
