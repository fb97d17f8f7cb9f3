"""What goes with a version: its changes, its citation, and old names' end."""

import configparser
import datetime
import pathlib
import re

from packaging import version

from ijckd_jax.runtime import moved

ROOT = pathlib.Path(__file__).parents[1]
CHANGES = re.findall(
  r'^## (\d\S*) - (\S+)$', (ROOT / 'CHANGELOG.md').read_text(), re.MULTILINE
)


def current():
  """Returns the version in setup.cfg."""
  config = configparser.ConfigParser()
  config.read(ROOT / 'setup.cfg')
  return version.Version(config['metadata']['version'])


def test_the_newest_version_has_its_changes():
  versions = [version.Version(name) for name, _ in CHANGES]
  assert versions[0] == current()
  assert versions == sorted(versions, reverse=True)
  days = [datetime.date.fromisoformat(day) for _, day in CHANGES]
  assert days == sorted(days, reverse=True)


def test_the_citation_is_of_the_newest_version():
  text = (ROOT / 'CITATION.cff').read_text()
  fields = dict(re.findall(r'^([\w-]+): (.+)$', text, re.MULTILINE))
  assert (fields['version'], fields['date-released']) == CHANGES[0]


def test_old_names_go_when_they_were_said_to():
  assert current() < version.Version(moved.GONE_IN), (
    'the old names of 0.1 are to go: remove runtime/moved.py and its uses'
  )


def test_old_names_are_announced_as_they_warn():
  text = ' '.join((ROOT / 'CHANGELOG.md').read_text().split())
  assert (
    f'until {moved.GONE_IN}, which comes no earlier than {moved.NOT_BEFORE}'
    in text
  )
