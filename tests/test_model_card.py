"""Model cards: in each bundle, and of the numbers that the run found."""

import dataclasses
import itertools
import json

import markdown_it
import pytest

from ijckd_jax.bundles import bundles
from ijckd_jax.bundles import model_card
from ijckd_jax.training import train


@pytest.fixture
def card(finished_run):
  return (finished_run[0] / 'bundle' / model_card.FILE).read_text()


def row_of(card, name):
  """Returns the cell beside a name in the card's first table."""
  (found,) = (x for x in card.splitlines() if x.startswith(f'| {name} |'))
  return found.split(' | ', 1)[1].removesuffix(' |')


def test_of_a_run(card, finished_run):
  workdir, result = finished_run
  summary, config = result.summary, result.summary['config']
  assert '# plain, distilled from plain by ijckd on digits\n' in card
  assert row_of(card, 'classes') == '10: 0, 1, 2, 3, 4, 5, 6, 7, 8, 9'
  assert row_of(card, 'images').startswith('8x8, grey, uint8')
  for part, count in summary['parameters']['student'].items():
    assert f'{part} {count:,}' in row_of(card, 'parameters')
  assert 'connector=bottleneck' in row_of(card, 'method')
  top1 = summary['teacher']['top1']
  assert (
    row_of(card, 'teacher') == f'plain, top-1 {top1:.2%} on the same images'
  )
  recipe = row_of(card, 'recipe')
  assert recipe.startswith(f'{summary["steps"]:,} steps; ')
  rate = config['optimizer']['learning_rate']
  for said in (f'optimizer.learning_rate={rate}', 'batch_size=48'):
    assert said in recipe
  assert 'augment' not in recipe  # As by default.
  for which in ('last', 'best'):
    step = summary['steps' if which == 'last' else 'best_step']
    metrics = summary['student'][which]
    (line,) = (
      x for x in card.splitlines() if x.startswith(f'| {which} step ({step})')
    )
    assert f' {100 * metrics["top1"]:.2f} ' in line
    assert f' {metrics["nll"]:.4f} ' in line
  assert f'On {summary["test_examples"]:,} test images' in card
  assert "'Best' was chosen on the test images, so it flatters." in card
  assert 'The last step is the one in this bundle.' in card
  assert str(workdir) not in card and 'data_dir' not in card


def test_zero_weights_are_said(finished_run):
  """A loss that was left out is no default that need not be mentioned."""
  bundle = bundles.load(finished_run[0])
  method = {**bundle.info['method'], 'feature_weight': 0.0}
  changed = dataclasses.replace(bundle, info={**bundle.info, 'method': method})
  card = model_card.as_markdown(changed, {'backbone': 1})
  assert 'feature_weight=0.0' in row_of(card, 'method')


def test_imported_weights_have_their_licence(finished_run, tmp_path):
  bundle = bundles.load(finished_run[0])
  origin = {'hub': 'owner/name', 'revision': 40 * '0', 'licence': 'apache-2.0'}
  imported = dataclasses.replace(bundle, info={'origin': origin})
  imported.save(tmp_path / 'bundle')
  card = (tmp_path / 'bundle' / model_card.FILE).read_text()
  assert '\nlicense: "apache-2.0"\n' in card.split('---')[1]
  assert '# plain, imported from owner/name\n' in card
  found = row_of(card, 'weights from')
  assert 'owner/name' in found and found.endswith('licence: apache-2.0')
  assert '## Accuracy' not in card
  assert 'its accuracy was not measured here' in card
  unknown = dataclasses.replace(bundle, info={'origin': {'file': 'a.pth'}})
  card = model_card.as_markdown(unknown, {'backbone': 1})
  assert row_of(card, 'weights from') == 'file=a.pth; licence: not stated'
  assert 'license' not in card


def test_taught_by_imported_weights(finished_run):
  bundle = bundles.load(finished_run[0])
  origin = {'file': 'a.pth', 'licence': 'bsd-3-clause'}
  info = {**bundle.info, 'teacher_origin': origin}
  card = model_card.as_markdown(
    dataclasses.replace(bundle, info=info), {'backbone': 1}
  )
  found = row_of(card, "the teacher's weights from")
  assert found == 'file=a.pth; licence: bsd-3-clause'


def test_a_judge_is_no_teacher(finished_run, small_config, tmp_path):
  """What learns from labels alone was not distilled from what judges it."""
  config = small_config('ce')
  config.teacher.checkpoint = str(finished_run[0] / 'teacher')
  bundle = train.train_and_evaluate(config, tmp_path).bundle
  card = (tmp_path / 'bundle' / model_card.FILE).read_text()
  assert model_card.describe(bundle) == 'plain, by ce on digits'
  assert row_of(card, 'teacher').startswith('plain, to compare with only')
  assert 'It was taught by' not in card


def test_a_bundle_whose_accuracy_is_not_stated(finished_run):
  bundle = bundles.load(finished_run[0])
  info = {k: v for k, v in bundle.info.items() if k not in ('test', 'run')}
  card = model_card.as_markdown(
    dataclasses.replace(bundle, info=info), {'backbone': 1}
  )
  assert 'imported' not in card
  assert 'How often it is right is not known of this bundle.' in card


def test_names_are_text(finished_run):
  """Read by another Markdown: cells are as names, fields and origins are."""
  bundle = bundles.load(finished_run[0])
  info = {
    'method': {'name': '<b>', 'note': '![a](b)'},
    'dataset': {'name': '# d\x1b[2J'},
    'teacher': '`t`\n\n# t',
    'origin': {'file': '[f](x)|\udcff', 'licence': '*l*'},
  }
  names = ('![c0](x)', '<script>', 'a|b', '\x00', 'x\ny', 'n' * 5000)
  changed = dataclasses.replace(bundle, info=info, class_names=names)
  card = model_card.as_markdown(changed, {'backbone': 1})
  assert card.encode().isascii() and '\x1b' not in card
  parser = markdown_it.MarkdownIt('commonmark', {'html': True}).enable('table')
  tokens = parser.parse(card.split('---', 2)[2])
  inner = [x for token in tokens for x in token.children or ()]
  # Our own code, and nothing of theirs.
  assert {x.type for x in inner} == {'text', 'code_inline'}
  (code,) = (x.content for x in inner if x.type == 'code_inline')
  assert code == 'ijckd_jax.load_bundle(DIR)'
  said = [''.join(x.content for x in t.children) for t in tokens if t.children]
  cells = dict(itertools.pairwise(said))
  short = f'{"n" * 117}...'
  assert cells['classes'] == f'6: ![c0](x), <script>, a|b, ?, x y, {short}'
  assert cells['method'] == '<b> (note=![a](b))'
  assert cells['data'] == '# d?[2J'
  assert cells['teacher'] == '`t` # t'
  assert cells['weights from'] == 'file=[f](x)|?; licence: *l*'
  assert said[0] == 'plain, distilled from `t` # t by <b> on # d?[2J'
  assert sum(token.type == 'heading_open' for token in tokens) == 3


def test_whatever_a_stranger_says(finished_run):
  """It is written all the same, and breaks no table."""
  bundle = bundles.load(finished_run[0])
  for info in (
    {'run': 3, 'method': [], 'teacher_origin': 'x'},
    {'run': {'test': {'last': []}}, 'dataset': {'name': 'a | b\n# c'}},
    {'method': {'name': 'a\n| b'}, 'dataset': {}},
  ):
    changed = dataclasses.replace(bundle, info=json.loads(json.dumps(info)))
    card = model_card.as_markdown(changed, {'backbone': 1})
    table = card.split('\n\n')[2].splitlines()
    assert all(x.startswith('| ') and x.endswith(' |') for x in table[1:])
    assert card.count('\n# ') == 1
