"""Settings of the site that Sphinx makes of the pages.

sphinx-build --fail-on-warning -c docs . runs/site
"""

import configparser
import pathlib

from docutils import nodes
from docutils.utils.math import latex2mathml

ROOT = pathlib.Path(__file__).parents[1]
metadata = configparser.ConfigParser()
metadata.read(ROOT / 'setup.cfg')

project = metadata['metadata']['name']
release = metadata['metadata']['version']
html_show_copyright = False
root_doc = 'docs/index'
include_patterns = ['CHANGELOG.md', 'docs/*.md', 'experiments/**/*.md']
extensions = [
  'myst_parser',
  'sphinx.ext.autodoc',
  'sphinx.ext.napoleon',
  'sphinx_copybutton',
]
myst_enable_extensions = ['dollarmath']
myst_heading_anchors = 3
# Blocks that are indented and name no language are commands, trees and logs.
highlight_language = 'text'
autodoc_member_order = 'bysource'
autodoc_typehints_format = 'short'
napoleon_use_ivar = True
html_theme = 'furo'
html_title = f'{project} {release}'
html_extra_path = ['site']  # The page at the root leads to docs/.
html_copy_source = False
html_math_renderer = 'mathml'


def _inline(translator, node):
  translator.body.append(latex2mathml.tex2mathml(node.astext()))
  raise nodes.SkipNode


def _block(translator, node):
  formula = latex2mathml.tex2mathml(node.astext(), as_block=True)
  translator.body.append(f'<div class="math">{formula}</div>')
  raise nodes.SkipNode


def setup(app):
  """Has formulas written as MathML, which browsers draw without a script."""
  app.add_html_math_renderer('mathml', (_inline, None), (_block, None))
