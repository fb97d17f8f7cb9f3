"""Networks on the Hugging Face hub, pinned to a commit.

Only safetensors and JSON are fetched, which hold no code, and they must be what
the hub says of them: of that commit, with those hashes. What is in the cache of
huggingface_hub is taken from there, without a network.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import pathlib
import re
from typing import Any
import warnings

from ijckd_jax.runtime import config_utils

PREFIX = 'hf:'
# In this order: weights last, as the others are small.
WANTED = (
  'config.json',
  'bundle.json',
  'variables.safetensors',
  'model.safetensors',
)
CARD = 'README.md'
_TIMEOUT_SECONDS = 10
_COMMIT = re.compile('[0-9a-f]{40}')
# Files in LFS are named by SHA-256, files in Git by SHA-1. A mirror may send
# other tags, which say nothing about a file's content.
_HASH = re.compile('[0-9a-f]{40}|[0-9a-f]{64}')
# The library makes it the name of a file, after taking off W/ and the quotes.
_TAG = re.compile(r'(?:W/)?"?([A-Za-z0-9][A-Za-z0-9+=:._-]{0,199})"?')


@dataclasses.dataclass(frozen=True)
class Download:
  """What was fetched.

  Attributes:
    repo: OWNER/NAME.
    revision: the commit, 40 hexadecimal digits.
    files: where those of WANTED lie that there are, by name.
    config: what is in config.json; {} if there is none.
    licence: as the model card states it; '' if it states none.
  """

  repo: str
  revision: str
  files: dict[str, pathlib.Path]
  config: dict[str, Any]
  licence: str


def parse(reference: str) -> tuple[str, str]:
  """Returns the repository and the revision of `hf:OWNER/NAME@REVISION`.

  The revision is '' where none is given.

  Raises:
    config_utils.UserError: it is of another form.
  """
  name = r'[A-Za-z0-9_](?:[A-Za-z0-9._-]*[A-Za-z0-9_])?'
  match = re.fullmatch(rf'{PREFIX}({name}/{name})(?:@([^\s@]*))?', reference)
  if not match:
    raise config_utils.UserError(
      f'{reference!r}: give {PREFIX}OWNER/NAME@COMMIT'
    )
  return match[1], match[2] or ''


def download(reference: str) -> Download:
  """Returns a network's files on the hub, fetched unless they are cached.

  Args:
    reference: `hf:OWNER/NAME@COMMIT`.

  Raises:
    config_utils.UserError: it names no commit, there is no such repository or
      commit, it has no weights as safetensors, it cannot be reached, or it
      sends something else than was asked for.
  """
  repo, revision = parse(reference)
  try:
    import huggingface_hub
    import huggingface_hub.errors
    import huggingface_hub.utils
  except ImportError as error:
    raise config_utils.UserError(
      f'huggingface_hub is needed to fetch {reference}: '
      "pip install 'ijckd_jax[hub]'"
    ) from error
  with _quiet(huggingface_hub):
    if not _COMMIT.fullmatch(revision):
      raise _unpinned(huggingface_hub, repo, revision)
    try:
      paths = _fetch(huggingface_hub, repo, revision)
    except config_utils.UserError:
      raise
    except Exception as error:  # Of several libraries, and of the disk.
      config_utils.raise_outside(error)
      raise config_utils.UserError(f'{reference}: {_reason(error)}') from error
    licence = _licence(huggingface_hub, paths.pop(CARD, None))
  return Download(repo, revision, paths, _config(reference, paths), licence)


@contextlib.contextmanager
def _quiet(huggingface_hub):
  """Silences the library: what goes wrong is raised as well.

  Its progress bars are silent by themselves where no one watches.
  """
  verbosity = huggingface_hub.utils.logging.get_verbosity()
  huggingface_hub.utils.logging.set_verbosity_error()
  try:
    with warnings.catch_warnings():
      warnings.simplefilter('ignore')
      yield
  finally:
    huggingface_hub.utils.logging.set_verbosity(verbosity)


def _unpinned(huggingface_hub, repo, revision):
  """Returns the error for a reference without a commit."""
  given = f'{PREFIX}{repo}' + (f'@{revision}' if revision else '')
  message = (
    f'{given} may be another network tomorrow: pin it to a commit, '
    f'{PREFIX}{repo}@'
  )
  try:
    now = huggingface_hub.HfApi().model_info(
      repo, revision=revision or None, timeout=_TIMEOUT_SECONDS
    )
  except Exception as error:
    return config_utils.UserError(
      f'{message}COMMIT (40 digits; the one of now is unknown: '
      f'{_reason(error)})'
    )
  return config_utils.UserError(f'{message}{config_utils.short(now.sha)}')


@contextlib.contextmanager
def _checked_answers(huggingface_hub, what, revision):
  """Checks what the hub says of files, before the library believes it.

  Commit and tag become names of folders and files in the cache.

  Args:
    huggingface_hub: the library.
    what: reference, for messages.
    revision: the commit that was asked for.

  Yields:
    A list; the tags of the answers are added to it.
  """
  tags = []

  def check(response):
    headers = response.headers
    commit = headers.get('X-Repo-Commit', revision)
    if commit != revision:
      raise config_utils.UserError(
        f'{what}: the hub sent another commit, {config_utils.short(commit)}; '
        'nothing of it is taken'
      )
    tag = headers.get('X-Linked-ETag') or headers.get('ETag')
    if response.request.method != 'HEAD' or tag is None:
      return
    found = _TAG.fullmatch(tag)
    if not found:
      raise config_utils.UserError(
        f'{what}: the hub sent the ETag {config_utils.short(tag)}, which '
        'cannot be the name of a file; nothing of it is taken'
      )
    tags.append(found[1])

  hooks = huggingface_hub.utils.get_session().event_hooks['response']
  hooks.append(check)
  try:
    yield tags
  finally:
    hooks.remove(check)


def _check_content(what, path, wanted):
  """Raises unless a file just fetched has the hashes that the hub names.

  Args:
    what: reference and file, for the message.
    path: in the cache; it is removed from there if it is another file.
    wanted: hashes, each a SHA-256, or a SHA-1 as Git has it or of the content.
  """
  size = path.stat().st_size
  digests = (
    hashlib.sha256(),
    hashlib.sha1(usedforsecurity=False),
    hashlib.sha1(b'blob %d\0' % size, usedforsecurity=False),
  )
  with path.open('rb') as stream:
    while chunk := stream.read(2**20):
      for digest in digests:
        digest.update(chunk)
  there = {digest.hexdigest() for digest in digests}
  if set(wanted) <= there:
    return
  # Otherwise it would be taken from the cache the next time, unseen.
  if path.is_symlink():
    (path.parent / os.readlink(path)).unlink(missing_ok=True)
  path.unlink()
  raise config_utils.UserError(
    f'{what} is not the file that the hub describes: its hash differs; try '
    'again'
  )


def _fetch(huggingface_hub, repo, revision):
  """Returns where the wanted files of a commit lie, by name."""
  reference = f'{PREFIX}{repo}@{revision}'
  with _checked_answers(huggingface_hub, reference, revision) as tags:
    return _fetch_checked(huggingface_hub, repo, revision, tags)


def _fetch_checked(huggingface_hub, repo, revision, tags):
  """Does what `_fetch` does, and checks each file against the last tag."""
  reference, hashes = f'{PREFIX}{repo}@{revision}', {}
  paths = {
    name: huggingface_hub.try_to_load_from_cache(repo, name, revision=revision)
    for name in (CARD, *WANTED)
  }
  if None in paths.values():
    # Asked first, as it says at once what is wrong, and without retries.
    info = huggingface_hub.HfApi().model_info(
      repo, revision=revision, timeout=_TIMEOUT_SECONDS, files_metadata=True
    )
    if info.sha != revision:
      raise config_utils.UserError(
        f'{reference}: the hub sent another commit, '
        f'{config_utils.short(info.sha)}; nothing of it is taken'
      )
    siblings = info.siblings or ()
    _check(repo, revision, [sibling.rfilename for sibling in siblings])
    # Of what lies in LFS, Git's own hash is that of a pointer to it.
    hashes = {
      sibling.rfilename: sibling.lfs.sha256 if sibling.lfs else sibling.blob_id
      for sibling in siblings
    }
  for name, path in paths.items():
    if path is None:
      # Also asked for what is not there: the cache then remembers that, which
      # is how this works without a network the next time.
      tags.clear()
      with contextlib.suppress(huggingface_hub.errors.RemoteEntryNotFoundError):
        paths[name] = huggingface_hub.hf_hub_download(
          repo, name, revision=revision
        )
        _check_content(
          f'{reference}: {name}',
          pathlib.Path(paths[name]),
          filter(_HASH.fullmatch, filter(None, [hashes.get(name), *tags[-1:]])),
        )
  # What the cache knows not to be there is a marker.
  found = {
    name: pathlib.Path(path)
    for name, path in paths.items()
    if isinstance(path, str)
  }
  _check(repo, revision, found)
  return found


def _check(repo, revision, names):
  """Raises unless there are weights among the names of files."""
  if 'model.safetensors' in names:
    return
  if {'bundle.json', 'variables.safetensors'} <= set(names):
    return
  weights = sorted(
    name
    for name in names
    if name.endswith(('.bin', '.pt', '.pth', '.safetensors', '.h5', '.msgpack'))
  )
  there = ', '.join(repr(name)[1:-1][:80] for name in weights[:5])
  raise config_utils.UserError(
    f'{PREFIX}{repo}@{revision} has no model.safetensors and no bundle; '
    f'it has {there or "no weights"}'
    + (', ...' if len(weights) > 5 else '')
    + ' (pickles such as .bin can run code and are not fetched: if you trust '
    'one, fetch it yourself and give its path)'
  )


def _config(reference, paths):
  """Returns what is in config.json."""
  path = paths.get('config.json')
  if path is None:
    return {}
  try:
    config = json.loads(path.read_bytes())
  except (OSError, ValueError, RecursionError) as error:
    raise config_utils.UserError(
      f'{reference}: its config.json cannot be read: '
      f'{config_utils.short(error)}'
    ) from error
  if not isinstance(config, dict):
    raise config_utils.UserError(f'{reference}: its config.json is no object')
  return config


def _licence(huggingface_hub, card):
  """Returns the licence that a model card states."""
  if card is None:
    return ''
  try:
    fields = huggingface_hub.metadata_load(card) or {}
  except Exception:  # A card that cannot be read states nothing.
    return ''
  licence, name = fields.get('license'), fields.get('license_name')
  if isinstance(licence, list):
    licence = ', '.join(item for item in licence if isinstance(item, str))
  if licence == 'other' and isinstance(name, str):
    licence = name
  return (
    config_utils.short(licence) if isinstance(licence, str) and licence else ''
  )


def _reason(error):
  """Returns what went wrong at the hub, and what to do."""
  from huggingface_hub import errors

  if isinstance(error, errors.LocalEntryNotFoundError) and error.__cause__:
    error = error.__cause__
  # The more special ones first: some are subclasses of others.
  for kind, reason in (
    (
      errors.GatedRepoError,
      'its owner asks for consent: accept the terms on its page and log in '
      'with `hf auth login`, or set HF_TOKEN',
    ),
    (
      errors.RepositoryNotFoundError,
      'there is no such repository, or it is private: check the name, or log '
      'in with `hf auth login`',
    ),
    (
      errors.RevisionNotFoundError,
      'the repository has no such revision: check it on its page',
    ),
    (
      errors.OfflineModeIsEnabled,
      'it is not whole in the cache, and HF_HUB_OFFLINE forbids to fetch it',
    ),
  ):
    if isinstance(error, kind):
      return reason
  if isinstance(error, errors.HfHubHTTPError):
    status = getattr(error.response, 'status_code', '?')
    if status in (401, 403):
      return f'the hub answered {status}: log in with `hf auth login`'
    return f'the hub answered {status}: try again later'
  if 'Consistency check' in str(error):
    return 'the download ended early: try again'
  return (
    'it is not whole in the cache, and fetching it failed '
    f'({type(error).__name__}: {config_utils.short(error)}): check the network '
    'and the disk, and try again'
  )
