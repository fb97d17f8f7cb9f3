"""Text from outside is shown as it is, read by another Markdown."""

import markdown_it
import pytest

from ijckd_jax.data.datasets import image_report
from ijckd_jax.runtime import markdown


@pytest.mark.parametrize(
  'text',
  [
    *('![a](b)', '[a](b)', '<b>', '<!-- c', '`c`', '*e*', '_e_', '__e__'),
    *('a_b', 'a_', '_a b_', '~~s~~', '&amp;', '&#65;', 'A & B', 'a|b', '\\'),
    *('\\|', '\\*e*', '$x$', '> q', '# h', 'C #', 'a\\nb'),
  ],
)
def test_escaped_text_is_text(text):
  parser = markdown_it.MarkdownIt('commonmark', {'html': True})
  parser.enable(['table', 'strikethrough'])
  escaped = markdown.escape(text)
  page = f'# {escaped}\n\n{escaped}\n\n- {escaped}\n\n' + markdown.grid(
    [['title', escaped], [escaped, 'x']]
  )
  inline = [token for token in parser.parse(page) if token.type == 'inline']
  assert {child.type for token in inline for child in token.children} <= {
    'text',
    'text_special',
  }
  said = [''.join(x.content for x in token.children) for token in inline]
  assert said == [*3 * [text], 'title', text, text, 'x']


def test_what_needs_no_escape_stays_readable():
  for text in (
    'mobilenet_v2',
    'package.module:Name',
    "it's 3 + 4 (b), c-d",
  ):
    assert markdown.escape(text) == text


def test_names_in_the_report_are_text():
  """Of classes and of files, whatever Markdown would take them for."""
  names = ['![c](x)', '<b>', '*e*', '`c`', '\x1b[2J', 'two\nlines', 'a|b']
  report = {
    'num_examples': {'train': 70},
    'classes': {name: {'train': 10} for name in names},
    'width': {'min': 1, 'median': 1, 'max': 1},
    'height': {'min': 1, 'median': 1, 'max': 1},
    'formats': {'PNG': 70},
    'changes': {},
    'in_several_splits': {name: name for name in names[:3]},
    'skipped': {name: 'cut off' for name in names},
    'converted': {},
    'ignored': {},
  }
  page = image_report.as_markdown('<i>', report)
  parser = markdown_it.MarkdownIt('commonmark', {'html': True}).enable('table')
  inline = [token for token in parser.parse(page) if token.children]
  kinds = {child.type for token in inline for child in token.children}
  assert kinds == {'text'}
  said = [''.join(x.content for x in token.children) for token in inline]
  shown = ['![c](x)', '<b>', '*e*', '`c`', '?[2J', 'two lines', 'a|b']
  assert said[0] == '<i>'
  found = ', '.join(f'{name}: cut off' for name in shown).replace(', ', '; ')
  assert f'skipped: 7 ({found})' in said
  for name in shown:
    assert said.count(name) >= 2  # Among the classes and among the skipped.


def test_a_table_of_narrow_columns_is_a_table():
  lines = markdown.grid([['', 'n'], ['5', '7']]).splitlines()
  assert lines == ['|    |  n |', '| :- | -: |', '| 5  |  7 |']
