"""Classes are compared by name wherever a network meets data."""

import argparse
import dataclasses
import json

import numpy as np
import pytest

from experiments.benchmarks import classifiers
from ijckd_jax.commands import bounds as bounds_command
from ijckd_jax.commands import evaluate
from ijckd_jax.data import classes
from ijckd_jax.data.datasets import digits
from ijckd_jax.data.datasets import imagenet
from ijckd_jax.deploy import checks
from ijckd_jax.runtime import config_utils
from ijckd_jax.training import experiment

ABC = ('cat', 'dog', 'fox')


def match(names, wanted, **fields):
  return classes.match(names, wanted, what='the teacher', **fields)


@pytest.mark.parametrize(
  'names',
  [ABC, ('Cat', 'DOG', ' fox '), np.array(ABC), ['cat', 'dog', 'fox']],
)
def test_the_same_names_in_the_same_order_say_nothing(names):
  assert match(names, ABC) == (None, '')


def test_ice_cream_is_written_in_several_ways():
  assert match(('ice_cream', 'a'), ('ice-cream', 'A')) == (None, '')


def test_letters_of_both_cases_are_classes_of_their_own():
  """As EMNIST has them."""
  order, _ = match(('a', 'A', 'b'), ('A', 'a', 'b'))
  np.testing.assert_array_equal(order, [1, 0, 2])
  with pytest.raises(config_utils.UserError, match="class 2 is 'b' and 'B'"):
    match(('a', 'A', 'b'), ('a', 'A', 'B'))


@pytest.mark.parametrize(
  'names, order',
  [
    (('dog', 'cat', 'fox'), [1, 0, 2]),
    (('dog', 'fox', 'cat'), [2, 0, 1]),
    (('Fox', 'Cat', 'Dog'), [1, 2, 0]),
  ],
)
def test_another_order_is_put_in_order(names, order):
  found, note = match(names, ABC)
  np.testing.assert_array_equal(found, order)
  assert 'in another order' in note
  assert [names[i].casefold() for i in found] == list(ABC)


def test_natural_order_against_sorted_folders():
  """As timm orders class1, class2, ..., class10, and as folders are sorted."""
  natural = [f'class{i}' for i in range(1, 13)]
  found, _ = match(natural, sorted(natural))
  assert [natural[i] for i in found] == sorted(natural)


@pytest.mark.parametrize(
  'names, wanted, said',
  [
    (('no', 'yes', 'fox'), ABC, "class 0 is 'no' and 'cat'; class 1"),
    (('cat', 'dog'), ABC, 'has 2 classes, but the data set has 3'),
    (('cat', 'cat', 'dog'), ('cat', 'dog', 'cat'), 'not all different'),
    (tuple('0123456789') + ('10',), sorted(map(str, range(11))), 'are numbers'),
    (('0', '1', '2'), ('1', '2', '3'), "class 0 is '0' and '1'"),
  ],
)
def test_other_names_are_refused(names, wanted, said):
  with pytest.raises(config_utils.UserError, match=said):
    match(names, wanted)
  if len(names) == len(wanted):
    assert match(names, wanted, by_number=True) == (None, '')


@pytest.mark.parametrize('names', [('0', '1', '2'), ('', '', '')])
def test_numbers_cannot_be_compared(names):
  for one, other in ((names, ABC), (ABC, names)):
    order, note = match(one, other)
    assert order is None and 'could not be compared' in note


def test_identifiers_of_wordnet_are_words():
  """A data set that names ImageNet's classes so has the classes of words."""
  identifiers = imagenet.Imagenet().class_names
  words = imagenet.class_words()
  assert words[:2] == ('tench', 'goldfish')
  assert len(set(map(str.casefold, words))) == 1000
  assert match(words, identifiers) == match(identifiers, words) == (None, '')
  order, note = match(words, identifiers[::-1])
  np.testing.assert_array_equal(order, np.arange(1000)[::-1])
  assert 'put in order by their names' in note
  with pytest.raises(config_utils.UserError, match="'cat' and 'tench'"):
    match(ABC, (*identifiers[:2], 'n00000001'))


def renamed(names):
  """Returns a bundle of random weights with classes so called."""
  bundle = classifiers.alone('resnet8', (8, 8, 1), num_classes=len(names))
  return bundle.in_order(np.arange(len(names)), names)


WORDS = ('zero', 'one', 'two', 'three', 'four', 'five', 'six')


class Words:
  """Seven digits by their English names, as a data set."""

  def __init__(self, data_dir, names=WORDS):
    self.data_dir, self.class_names = data_dir, names

  image_shape, mean, std = (8, 8, 1), (0.3,), (0.4,)
  crop_padding, flip = 0, False

  def load(self, split):
    arrays = digits.Dataset(data_dir=self.data_dir).load(split)
    return arrays.take(np.flatnonzero(arrays.labels < 7))


def test_a_teacher_teaches_the_classes_of_its_names(small_config, data_dir):
  """Its logits, image by image, are in the data set's order."""
  order = np.array([3, 1, 0, 2, 6, 4, 5])
  plain = renamed(WORDS)
  turned = plain.in_order(order, [WORDS[i] for i in order])
  config = small_config('kd')
  data = Words(data_dir)
  images = data.load('test').images[:50]
  found = []
  for bundle in (plain, turned):
    exp = experiment.build(config, dataset=data, teacher=bundle.teacher())
    (teacher,) = exp.distiller.teachers
    found.append(np.asarray(teacher(teacher.arrays, images).logits))
    assert bool(exp.notes) == (bundle is turned)
  np.testing.assert_array_equal(*found)
  own = np.asarray(turned.teacher()(turned.teacher().arrays, images).logits)
  np.testing.assert_array_equal(own, found[0][:, order])
  other = plain.in_order(np.arange(7), list('abcdefg')).teacher()
  with pytest.raises(config_utils.UserError, match='classes_by_number=True'):
    experiment.build(config, dataset=data, teacher=other)
  config.teacher.classes_by_number = True
  assert not experiment.build(config, dataset=data, teacher=other).notes


def test_each_of_several_teachers_is_put_in_order(small_config, data_dir):
  order = np.roll(np.arange(7), 1)
  plain = renamed(WORDS)
  turned = plain.in_order(order, [WORDS[i] for i in order])
  exp = experiment.build(
    small_config('kd'),
    dataset=Words(data_dir),
    teacher=(plain.teacher(), turned.teacher()),
  )
  first, second = exp.distiller.teachers
  for name in ('kernel', 'bias'):
    np.testing.assert_array_equal(first.head[name], second.head[name])


def test_a_teachers_own_head_is_known_in_any_order(data_dir):
  """By the bounds, for which it must be that of the student."""
  order = np.array([3, 1, 0, 2, 6, 4, 5])
  plain = renamed(WORDS)
  turned = plain.in_order(order, [WORDS[i] for i in order])
  other = plain.in_order(order, list('abcdefg'))
  flags = argparse.Namespace(classes_by_number=False)
  data = Words(data_dir)
  for bundle, wanted in ((plain, plain), (turned, plain), (other, other)):
    found = bounds_command._head_in_order(bundle, data, flags)
    for name, array in wanted.variables['params']['head'].items():
      np.testing.assert_array_equal(found[name], array)


@dataclasses.dataclass(frozen=True)
class Digits(digits.Dataset):
  """Digits whose classes have names."""

  class_names = tuple(f'digit {name}' for name in range(10))


def run(command, capsys, *argv):
  command(list(map(str, argv)))
  return capsys.readouterr()


def test_evaluation_counts_by_name(tmp_path, data_dir, capsys):
  """Of a bundle with its classes in another order: the same numbers."""
  words = Digits.class_names
  bundle = classifiers.alone('resnet8', (8, 8, 1), num_classes=10)
  order = np.random.RandomState(0).permutation(10)
  bundle.in_order(np.arange(10), words).save(tmp_path / 'plain')
  bundle.in_order(order, [words[i] for i in order]).save(tmp_path / 'turned')
  flags = ('--dataset', f'{__name__}:Digits', '--json')
  flags += ('--dataset_fields', f'data_dir={data_dir}')
  found = {
    name: run(evaluate.main, capsys, '--bundle', tmp_path / name, *flags)
    for name in ('plain', 'turned')
  }
  assert 'in another order' in found['turned'].err
  plain, turned = (json.loads(found[name].out) for name in found)
  assert plain == turned
  bundle.in_order(np.arange(10), list('abcdefghij')).save(tmp_path / 'other')
  with pytest.raises(config_utils.UserError, match='--classes_by_number'):
    run(evaluate.main, capsys, '--bundle', tmp_path / 'other', *flags)
  flags += ('--classes_by_number',)
  other = run(evaluate.main, capsys, '--bundle', tmp_path / 'other', *flags)
  assert json.loads(other.out) == plain


def test_two_bundles_are_compared_where_the_data_have_numbers(
  tmp_path, data_dir, capsys, small_config
):
  words = Digits.class_names
  bundle = classifiers.alone('resnet8', (8, 8, 1), num_classes=10)
  bundle = bundle.in_order(np.arange(10), words)
  order = np.random.RandomState(0).permutation(10)
  bundle.save(tmp_path / 'plain')
  turned = bundle.in_order(order, [words[i] for i in order])
  turned.save(tmp_path / 'turned')
  found = run(
    *(evaluate.main, capsys, '--bundle', tmp_path / 'plain'),
    *('--teacher', tmp_path / 'turned', '--data_dir', data_dir),
    *('--dataset', 'digits', '--json'),
  )
  assert json.loads(found.out)['student']['agreement'] == 1.0
  assert 'the teacher are in another order than those of the bun' in found.err
  given = (bundle.teacher(), turned.teacher())
  exp = experiment.build(small_config('kd'), teacher=given)
  first, second = exp.distiller.teachers
  np.testing.assert_array_equal(first.head['kernel'], second.head['kernel'])


@pytest.mark.parametrize(
  'names, wanted, said',
  [
    (ABC, [0, 1, 2, -1], ''),
    (('fox', 'cat', 'dog'), [2, 0, 1, -1], 'in another order'),
    (('x', 'y', 'z'), [-1, -1, -1, -1], 'its labels are left out'),
  ],
)
def test_labels_of_unlabelled_data_are_those_of_the_classes(
  names, wanted, said, capsys
):
  dataset, other = (argparse.Namespace(class_names=x) for x in (ABC, names))
  found = bounds_command._labels_in_order(
    np.array([0, 1, 2, -1]),
    dataset,
    other,
    argparse.Namespace(classes_by_number=False),
  )
  np.testing.assert_array_equal(found, wanted)
  err = capsys.readouterr().err
  assert said in err and bool(err) == bool(said)


def test_labels_of_a_check_are_the_files(data_dir):
  order = np.array([3, 1, 0, 2, 6, 4, 5])
  data = Words(data_dir)
  plain = list(checks.images(data, 'test', 50))
  turned = list(checks.images(data, 'test', 50, order))
  for one, other in zip(plain, turned, strict=True):
    np.testing.assert_array_equal(other['label'], order[one['label']])
    np.testing.assert_array_equal(other['image'], one['image'])
