"""Pages that are one file: Markdown and pictures, readable on a phone."""

import base64
from collections.abc import Mapping
import html
import itertools

STYLE = """
:root { color-scheme: light dark; --ink: #1c1c1c; --paper: #ffffff;
  --line: #d9d9d9; --pale: #f4f5f7; --link: #0059b3; }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e4e4; --paper: #16181c;
  --line: #3a3d44; --pale: #22252b; --link: #7ab8ff; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1rem; max-width: 62rem; color: var(--ink);
  background: var(--paper); font: 1rem/1.5 system-ui, sans-serif;
  overflow-wrap: anywhere; }
h1 { font-size: 1.6rem; line-height: 1.25; } h2 { margin-top: 2.5rem; }
a { color: var(--link); }
.wide { display: block; overflow-x: auto; margin: 1rem 0;
  overflow-wrap: normal; }
table { border-collapse: collapse; font-size: .875rem;
  font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .7rem; border-bottom: 1px solid var(--line); }
th { text-align: left; } td:first-child, th:first-child { min-width: 6rem;
  overflow-wrap: break-word; }
@media (max-width: 40rem) { th, td { padding: .3rem; } }
img { display: block; max-width: min(100%, 36rem); height: auto;
  background: #ffffff; border-radius: .3rem; }
@media (prefers-color-scheme: dark) { img.plot {
  filter: invert(.91) hue-rotate(180deg); } }
pre { overflow-x: auto; padding: .7rem; background: var(--pale);
  font-size: .8rem; overflow-wrap: normal; }
summary { cursor: pointer; }
"""


def page(
  text: str,
  pictures: Mapping[str, bytes],
  photos: frozenset[str],
  details: Mapping[str, str],
) -> str:
  """Returns an HTML page that needs nothing else.

  Args:
    text: Markdown; no HTML in it is taken for such.
    pictures: PNG files by the path that the text has for them.
    photos: those that keep their colours where the page is dark.
    details: Markdown that is folded away at the end, by title.
  """
  import markdown_it

  parser = markdown_it.MarkdownIt('commonmark', {'html': False})
  parser.enable('table')

  def image(renderer, tokens, index, options, env):
    token = tokens[index]
    path = str(token.attrs['src'])
    alt = renderer.renderInlineAsText(token.children, options, env)
    if path not in pictures:  # Nothing is fetched from elsewhere.
      return html.escape(alt)
    data = base64.b64encode(pictures[path]).decode()
    token.attrs['src'] = f'data:image/png;base64,{data}'
    token.attrs['alt'] = alt
    if path not in photos:
      token.attrs['class'] = 'plot'
    return renderer.renderToken(tokens, index, options, env)

  parser.add_render_rule('image', image)
  parser.add_render_rule('table_open', lambda *_: '<div class="wide"><table>\n')
  parser.add_render_rule('table_close', lambda *_: '</table></div>\n')
  env = {}
  tokens = parser.parse(text, env)
  title = next(
    (
      parser.renderer.renderInlineAsText(heading.children, parser.options, env)
      for mark, heading in itertools.pairwise(tokens)
      if mark.type == 'heading_open'
    ),
    'Report',
  )
  body = parser.renderer.render(tokens, parser.options, env)
  for name, words in details.items():
    body += (
      f'<details><summary>{html.escape(name)}</summary>'
      f'{parser.render(words)}</details>\n'
    )
  return (
    '<!doctype html>\n<html lang="en">\n<meta charset="utf-8">\n'
    '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
    f'<title>{html.escape(title)}</title>\n<style>{STYLE}</style>\n{body}</html>\n'
  )
