"""The GPU benchmark's table, and what README says of its results."""

import json
import pathlib
import statistics

import pytest

from experiments.benchmarks import gpu

FOLDER = pathlib.Path(gpu.__file__).parent
RESULTS = FOLDER / 'results' / 'gpu.json'


def candidate(*images_per_second, **facts):
  return {
    'images_per_second': images_per_second,
    'device_memory': 2**30,
  } | facts


def content(candidates):
  item = {'pair': 'a -> b', 'dtype': 'bfloat16', 'candidates': candidates}
  return {'card': 'NVIDIA H200', 'items': {'a': item}}


def cells(table):
  return [cell.strip() for cell in table.splitlines()[-1].strip('|').split('|')]


def test_table_by_hand():
  """The median of the windows, over the better of PyTorch's."""
  rows = {
    'PyTorch, graph': candidate(50, 40, 60),
    'PyTorch, compiled, graph': candidate(90, 80, 85),
    'ours': candidate(170, 10, 160, flops=989.4e9),
    'ours, shard_map': candidate(80),
  }
  assert cells(gpu.steps_table(content(rows))) == [
    'a -> b',
    'bfloat16',
    '85 (compiled, graph)',
    '160',
    f'{160 / 85:.2f}',
    '16.0%',  # 160 times 989.4e9 of 989.4e12.
    '1.00',
    '1.00',
    'shard_map 0.50',
  ]


def test_a_candidate_that_failed_is_left_out_and_named():
  rows = {
    'PyTorch, compiled, graph': {'error': 'no graph'},
    'PyTorch, graph': candidate(40),
    'ours': {'error': 'no memory'},
  }
  found = content(rows)
  assert cells(gpu.steps_table(found))[2:5] == ['40 (graph)', '', '']
  said = gpu.other_lines(found)
  assert 'a, ours: failed: no memory' in said
  assert 'a, PyTorch, compiled, graph: failed: no graph' in said


def test_readme_has_the_results():
  """Its table's numbers are the medians of the file's windows."""
  text = (FOLDER / 'README.md').read_text()
  lines = [tuple(cells(line)) for line in text.splitlines() if line]
  results = json.loads(RESULTS.read_text())
  assert results['card'] in ' '.join(text.split())
  for item in results['items'].values():
    if 'candidates' not in item:
      continue
    speeds = {
      title: statistics.median(row['images_per_second'])
      for title, row in item['candidates'].items()
    }
    theirs = max(x for title, x in speeds.items() if 'PyTorch' in title)
    ours = speeds['ours']
    numbers = f'{theirs:,.0f}', f'{ours:,.0f}', f'{ours / theirs:.2f}'
    expected = item['pair'], item['dtype'], *numbers
    assert expected in {line[:5] for line in lines}


def test_an_unfinished_item_shows_what_it_has():
  rows = {'ours': candidate(10, flops=1), 'PyTorch, graph': candidate()}
  assert cells(gpu.steps_table(content(rows)))[2:5] == ['', '10', '']


def test_stacked_students_have_a_line_each():
  times = {'separate': 1234.56, 'shared': 20, 'stacked': 3}
  row = {'pair': 'a -> b', 'students': 4, 'milliseconds': times}
  found = {'items': {'stacked': {'rows': [row]}}}
  assert gpu.other_lines(found) == [
    'a -> b, 4 students: separate 1,234.6 ms, shared 20.0 ms, stacked 3.0 ms'
  ]


def test_an_unknown_item_is_refused(capsys, tmp_path):
  with pytest.raises(SystemExit):
    gpu.main(['--json', str(tmp_path / 'x.json'), 'resnet99'])
  assert 'unknown items: resnet99' in capsys.readouterr().err
  with pytest.raises(SystemExit):
    gpu.main(['--json', str(tmp_path / 'x.json'), '--table'])
  assert 'there is no' in capsys.readouterr().err
  assert not list(tmp_path.iterdir())
