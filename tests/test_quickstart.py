"""The notebook runs from its first cell to its last, and shows what it says."""

import pathlib

import nbclient
import nbformat
import pytest

EXPERIMENTS = pathlib.Path(__file__).parents[1] / 'experiments'
NOTEBOOK = EXPERIMENTS / 'quickstart.ipynb'


def words_of(notebook):
  """Returns what the cells print."""
  return ''.join(
    output.get('text', '')
    for cell in notebook.cells
    for output in cell.get('outputs', ())
  )


def pictures_of(notebook):
  return sum(
    'image/png' in output.get('data', {})
    for cell in notebook.cells
    for output in cell.get('outputs', ())
  )


@pytest.fixture(scope='module')
def committed():
  return nbformat.read(NOTEBOOK, 4)


# Teacher, student, export and pictures.
@pytest.mark.slow
def test_it_runs(committed):
  """In a kernel of its own; an error in a cell would be raised here.

  It trains for 4 epochs in place of its 20.
  """
  notebook = nbformat.read(NOTEBOOK, 4)
  shortened = 0
  for cell in notebook.cells:
    if cell.cell_type == 'code':
      cell.outputs, cell.execution_count = [], None
      shortened += cell.source.count("'total_epochs': 20.0")
      cell.source = cell.source.replace(
        "'total_epochs': 20.0", "'total_epochs': 4.0"
      )
  assert shortened == 1
  nbclient.NotebookClient(
    notebook, timeout=600, resources={'metadata': {'path': EXPERIMENTS}}
  ).execute()
  words = words_of(notebook)
  assert 'the same prediction on 100.00%' in words
  assert 'of 360 test images, by onnxruntime alone' in words
  assert 'a 3 is taken for: 3' in words
  assert [line[:5] for line in words.splitlines()][-4:-1] == [
    '0.png',
    '3.png',
    '6.png',
  ]
  # Nobody looks at pictures that are not there.
  assert pictures_of(notebook) >= 3


def test_it_is_kept_as_it_was_run(committed):
  """With its pictures, in order, without errors, and of no machine's paths."""
  counts = [
    cell.execution_count for cell in committed.cells if cell.cell_type == 'code'
  ]
  assert counts == list(range(1, len(counts) + 1))
  assert pictures_of(committed) >= 3
  assert '%' in words_of(committed) and '/' not in words_of(committed)
