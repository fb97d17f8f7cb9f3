"""Pages that are one file, and take nobody's word for HTML."""

import base64
import re

import pytest

from ijckd_jax.reports import web_page
from ijckd_jax.runtime import workdirs

TEXT = """# A & B

| | x |
| :-- | --: |
| a \\| b | 1 |

![the <plot>](plots/a.png)
![pictures](plots/b.png)

A class <script>alert(1)</script>, and [another page](teacher/report.html).
"""


@pytest.fixture
def page():
  return web_page.page(
    TEXT,
    {'plots/a.png': b'plot', 'plots/b.png': b'photos'},
    frozenset({'plots/b.png'}),
    {'More': 'x < *y*'},
  )


def test_is_whole(page):
  """Pictures are inside, and nothing is fetched from anywhere."""
  for data in (b'plot', b'photos'):
    assert f'data:image/png;base64,{base64.b64encode(data).decode()}' in page
  sources = re.findall(r'(?:src|href)="([^"]*)"', page)
  assert {x.split(':')[0] for x in sources} == {'data', 'teacher/report.html'}
  assert 'url(' not in page and '@import' not in page
  assert page.count('class="plot"') == 1  # Photos keep their colours.


def test_text_stays_text(page):
  assert '<script' not in page
  assert '&lt;script&gt;' in page and 'alt="the &lt;plot&gt;"' in page
  assert '<summary>More</summary><p>x &lt; <em>y</em></p>' in page
  assert '<title>A &amp; B</title>' in page
  assert '>a | b</td>' in page


def test_tables_keep_their_alignment(page):
  assert '<td style="text-align:right">1</td>' in page


def test_of_a_run(finished_run):
  """All that report.md says and shows, in one file."""
  workdir, _ = finished_run
  page = (workdir / workdirs.WEB_REPORT).read_text()
  text = (workdir / workdirs.REPORT).read_text()
  assert page.count('<h2>') == text.count('\n## ') > 5
  pictures = re.findall(r'!\[.*\]\((plots/.*\.png)\)', text)
  assert page.count('src="data:image/png') == len(pictures) > 4
  for picture in pictures:
    data = base64.b64encode((workdir / picture).read_bytes()).decode()
    assert data in page
  assert 'optimizer.learning_rate = ' in page
  assert '&lt;details&gt;' not in page
  link = 'teacher/report.html'
  assert f'href="{link}"' in page and (workdir / link).exists()
