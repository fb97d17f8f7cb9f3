"""Links lead somewhere, and the pages make a site without a warning."""

import itertools
import pathlib
import re
import subprocess
import sys

import markdown_it
import pytest

import ijckd_jax

ROOT = pathlib.Path(__file__).parents[1]
PAGES = sorted(
  path.relative_to(ROOT)
  for path in (
    *ROOT.glob('*.md'),
    *ROOT.glob('docs/*.md'),
    *ROOT.glob('experiments/**/*.md'),
  )
)


def tokens_of(page):
  for token in markdown_it.MarkdownIt().enable('table').parse(page.read_text()):
    yield token
    yield from token.children or ()


def anchors_of(page):
  """Returns the anchors that a forge and the site make of a page's titles."""
  tokens = list(tokens_of(page))
  titles = [
    after.content
    for token, after in itertools.pairwise(tokens)
    if token.type == 'heading_open' and token.tag in ('h1', 'h2', 'h3')
  ]
  return {
    re.sub(r'[^\w\- ]', '', title.lower()).replace(' ', '-') for title in titles
  }


@pytest.mark.parametrize('page', PAGES, ids=str)
def test_links_lead_to_files_and_titles(page):
  for token in tokens_of(ROOT / page):
    link = token.attrs.get('href') or token.attrs.get('src')
    if not link or re.match('[a-z]+:', link):
      continue
    path, _, anchor = link.partition('#')
    target = ROOT / page.parent / path if path else ROOT / page
    assert target.exists(), link
    assert not anchor or anchor in anchors_of(target), link


def test_site(tmp_path):
  """Needs the extra `docs`."""
  pytest.importorskip('sphinx', reason="needs pip install -e '.[docs]'")
  build = subprocess.run(
    [
      *(sys.executable, '-m', 'sphinx', '--fail-on-warning'),
      *('--quiet', '-c', 'docs', '.', str(tmp_path)),
    ],
    cwd=ROOT,
    capture_output=True,
    text=True,
    check=False,
  )
  assert build.returncode == 0, build.stderr
  # Formulas are there before any script runs, and no page fetches anything.
  assert '<mi>ε</mi>' in (tmp_path / 'docs/theory.html').read_text()
  for page in tmp_path.glob('**/*.html'):
    assert not re.search(
      r'<(script|img|link)[^>]*(src|href)="?http', page.read_text()
    )
  assert 'docs/index.html' in (tmp_path / 'index.html').read_text()


def test_the_reference_has_every_public_name():
  page = (ROOT / 'docs/reference.md').read_text()
  found = re.findall(r':: ijckd_jax\.(\w+)$', page, re.MULTILINE)
  assert {*found} - {'models'} == {*ijckd_jax.__all__}
  modules = re.findall(r'^\.\. automodule:: (.*)$', page, re.MULTILINE)
  assert modules and all(f'`{name}`' in ijckd_jax.__doc__ for name in modules)
  assert len(modules) == ijckd_jax.__doc__.count('`ijckd_jax.')
