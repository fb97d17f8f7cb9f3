"""The hub: pinned, safetensors alone, and the same without a network."""

import collections
import hashlib
import http.server
import json
import os
import pathlib
import subprocess
import sys
import threading

import pytest
import safetensors.numpy

from ijckd_jax.bundles import bundles
from ijckd_jax.data import augment
from ijckd_jax.data import images
from ijckd_jax.pytorch import hub
from ijckd_jax.pytorch import published_names
from ijckd_jax.pytorch import published_weights
from ijckd_jax.runtime import config_utils

COMMIT = '0123456789abcdef' * 2 + '01234567'
OTHER = 'f' * 40
CARD = (
  b'---\nlicense: apache-2.0\ntags: [timm]\n---\n# A network\nlicense: no\n'
)
CONFIG = {'architecture': 'resnet18', 'num_classes': 2}
WEIGHTS = bytes(range(256)) * 20
TIMM = {
  'README.md': CARD,
  'config.json': json.dumps(CONFIG).encode(),
  'model.safetensors': WEIGHTS,
  'pytorch_model.bin': b'a pickle',
}
BUNDLE = {'bundle.json': b'{}', 'variables.safetensors': WEIGHTS}


@pytest.fixture
def library():
  return pytest.importorskip(
    'huggingface_hub', reason="needs the hub: pip install -e '.[hub]'"
  )


class Handler(http.server.BaseHTTPRequestHandler):
  """The few routes of the hub that its client uses."""

  protocol_version = 'HTTP/1.1'

  def log_message(self, *_):
    """Says nothing."""

  def answer(self, status, body=b'', *, promised=None, **headers):
    self.send_response(status)
    self.send_header('Content-Length', str(len(body)))
    if promised is not None:
      self.send_header('X-Linked-Size', str(promised))
    for name, value in headers.items():
      self.send_header(name.replace('_', '-'), value)
    self.end_headers()
    if self.command != 'HEAD':
      self.wfile.write(body)

  def do_GET(self):
    server = self.server
    server.requests.append((self.command, self.path))
    parts = self.path.partition('?')[0].strip('/').split('/')
    info = parts[:2] == ['api', 'models']
    parts = parts[2:] if info else parts
    repo = '/'.join(parts[:2])
    files = server.repos.get(repo)
    if files is None:
      self.answer(404, X_Error_Code='RepoNotFound')
      return
    if repo in server.failing:
      self.answer(server.failing[repo])
      return
    revision = parts[3] if len(parts) > 3 else 'main'
    if revision not in ('main', COMMIT):
      self.answer(404, X_Error_Code='RevisionNotFound')
      return
    lies = server.lies.get(repo, {})
    commit = lies.get('commit', COMMIT)
    if info:
      siblings = [
        {'rfilename': name, **lies.get('siblings', {})} for name in files
      ]
      sha = lies.get('sha', COMMIT)
      content = {'id': repo, 'sha': sha, 'siblings': siblings}
      self.answer(
        200,
        json.dumps(content).encode(),
        Content_Type='application/json',
        X_HF_Warning='unauthenticated; please set a HF_TOKEN',
      )
      return
    name = '/'.join(parts[4:])
    if repo in server.closed:
      self.answer(403, X_Repo_Commit=COMMIT, **server.closed[repo])
    elif name not in files:
      self.answer(404, X_Error_Code='EntryNotFound', X_Repo_Commit=commit)
    else:
      body = files[name]
      etag = lies.get('etag', f'"{hashlib.sha256(body).hexdigest()}"')
      body = lies.get('body', body)
      size = len(body)
      if name in server.short:
        body = body[:100]
      self.answer(
        200,
        body,
        promised=size,
        ETag=etag,
        X_Repo_Commit=commit,
        X_HF_Warning='unauthenticated; please set a HF_TOKEN',
      )

  do_HEAD = do_GET


@pytest.fixture
def server():
  """A hub with no repositories, on a free port."""
  server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), Handler)
  server.daemon_threads = True
  server.repos, server.closed, server.short = {}, {}, set()
  server.failing, server.requests = {}, []
  server.lies = {}  # By repository: what is sent in place of the truth.
  thread = threading.Thread(target=server.serve_forever, args=(0.01,))
  thread.start()
  yield server
  server.shutdown()
  server.server_close()
  thread.join()


SCRIPT = """
import dataclasses, json, sys
from ijckd_jax.runtime import config_utils
from ijckd_jax.pytorch import hub
for reference in sys.argv[1:]:
  try:
    result = dataclasses.asdict(hub.download(reference))
  except config_utils.UserError as error:
    result = str(error)
  print(json.dumps(result, default=str))
assert not {'jax', 'torch'} & set(sys.modules)
"""


def child(server, tmp_path, *args, **settings):
  """Runs Python in a process that has the server for its hub."""
  clean = {
    key: value
    for key, value in os.environ.items()
    if not key.startswith('HF_') and 'proxy' not in key.lower()
  }
  env = {
    **clean,
    'HF_ENDPOINT': f'http://127.0.0.1:{server.server_port}',
    'HF_HOME': str(tmp_path / 'cache'),
    **settings,
  }
  return subprocess.run(
    [sys.executable, *args],
    cwd=pathlib.Path(__file__).parents[1],
    env=env,
    capture_output=True,
    text=True,
    timeout=120,
  )


@pytest.fixture
def fetch(library, server, tmp_path):
  """Returns a function that downloads: Downloads as dicts, or what is said.

  In a process of its own, as the library reads its settings when imported.
  """

  def run(*references, **settings):
    result = child(server, tmp_path, '-c', SCRIPT, *references, **settings)
    assert (result.returncode, result.stderr) == (0, '')
    results = [json.loads(line) for line in result.stdout.splitlines()]
    assert len(results) == len(references)
    for text in results:
      if isinstance(text, str):
        assert text.isprintable() and len(text) < 400
    return results

  return run


def stop(server):
  """Makes the port refuse connections."""
  server.shutdown()
  server.server_close()


@pytest.mark.parametrize(
  'reference, expected',
  [
    (f'hf:timm/a.b_c-1@{COMMIT}', ('timm/a.b_c-1', COMMIT)),
    ('hf:timm/net@main', ('timm/net', 'main')),
    ('hf:timm/net@refs/pr/1', ('timm/net', 'refs/pr/1')),
    ('hf:timm/net@', ('timm/net', '')),
    ('hf:timm/net', ('timm/net', '')),
  ],
)
def test_parse(reference, expected):
  assert hub.parse(reference) == expected


@pytest.mark.parametrize(
  'reference',
  [
    *('', 'hf:', 'timm/net', 'hf:net', 'hf:a/b/c', 'hf:a/', 'hf:/a', 'HF:a/b'),
    *('hf:../etc', 'hf:a/..', 'hf:a/b@x y', 'hf:a/b@x\n', 'hf:a/b@x@y'),
    *('hf:a b/c', 'hf:a/.b', 'hf://a/b'),
  ],
)
def test_what_is_no_reference(reference):
  with pytest.raises(config_utils.UserError, match='give hf:OWNER/NAME@COMMIT'):
    hub.parse(reference)


def test_without_the_library(monkeypatch):
  monkeypatch.setitem(sys.modules, 'huggingface_hub', None)
  with pytest.raises(config_utils.UserError) as error:
    hub.download(f'hf:timm/net@{COMMIT}')
  assert "pip install 'ijckd_jax[hub]'" in str(error.value)


def test_once_fetched_it_needs_no_network(server, fetch):
  server.repos = {
    'timm/net': TIMM,
    'us/bundle': BUNDLE,  # With neither a card nor a config.
    'us/both': {**TIMM, **BUNDLE},
  }
  references = [f'hf:{repo}@{COMMIT}' for repo in server.repos]
  first = fetch(*references)
  timm, bundle, both = first
  assert (timm['repo'], timm['revision']) == ('timm/net', COMMIT)
  assert timm['config'] == CONFIG
  assert timm['licence'] == 'apache-2.0'
  assert set(timm['files']) == {'config.json', 'model.safetensors'}
  for name, path in timm['files'].items():
    assert pathlib.Path(path).read_bytes() == TIMM[name]
    assert COMMIT in path
  assert set(bundle['files']) == set(BUNDLE)
  assert (bundle['config'], bundle['licence']) == ({}, '')
  assert set(both['files']) == {*timm['files'], *bundle['files']}
  asked = collections.Counter(server.requests)
  assert asked['GET', f'/timm/net/resolve/{COMMIT}/model.safetensors'] == 1
  assert not any(path.endswith('.bin') for _, path in asked)
  # No request, neither of a server that is there nor of one that is not.
  server.requests.clear()
  assert fetch(*references) == first
  assert not server.requests
  stop(server)
  assert fetch(*references) == first
  assert fetch(references[0], HF_HUB_OFFLINE='1') == first[:1]


def test_what_is_not_whole_in_the_cache(server, fetch, tmp_path):
  """Another program may have fetched the weights alone."""
  server.repos = {'timm/net': TIMM}
  reference = f'hf:timm/net@{COMMIT}'
  (first,) = fetch(reference)
  snapshot = pathlib.Path(first['files']['config.json']).parent
  (snapshot / 'README.md').unlink()
  offline, elsewhere = [
    fetch(reference, **settings)[0]
    for settings in (
      {'HF_HUB_OFFLINE': '1'},
      {'HF_ENDPOINT': 'http://127.0.0.1:1'},
    )
  ]
  assert 'not whole in the cache, and HF_HUB_OFFLINE' in offline
  assert 'not whole in the cache, and fetching it failed' in elsewhere
  assert 'check the network' in elsewhere
  server.requests.clear()
  assert fetch(reference) == [first]
  assert not any('safetensors' in path for _, path in server.requests)


def test_it_must_be_pinned(server, fetch):
  server.repos = {'timm/net': TIMM}
  results = fetch(
    'hf:timm/net',
    'hf:timm/net@main',
    f'hf:timm/net@{COMMIT[:12]}',
    'hf:timm/nothing',
  )
  for result in results[:2]:
    assert result.endswith(f'pin it to a commit, hf:timm/net@{COMMIT}')
  assert results[1].startswith('hf:timm/net@main may be another')
  assert 'hf:timm/net@COMMIT' in results[2]
  assert 'no such revision' in results[2]
  assert 'no such repository' in results[3]
  assert all(path.startswith('/api/') for _, path in server.requests)


def test_what_cannot_be_fetched(server, fetch):
  server.repos = {
    'us/pickled': {
      'README.md': CARD,
      **{f'pytorch_model-{i}.bin': b'a pickle' for i in range(7)},
    },
    'us/empty': {},
    'us/half': {'bundle.json': b'{}'},
    'us/gated': TIMM,
    'us/closed': TIMM,
    'us/broken': {**TIMM, 'config.json': b'{'},
    'us/list': {**TIMM, 'config.json': b'[]'},
  }
  server.closed = {'us/gated': {'X_Error_Code': 'GatedRepo'}, 'us/closed': {}}
  server.failing = {'us/private': 401, 'us/down': 503}
  server.repos |= dict.fromkeys(server.failing, TIMM)
  said = {
    f'us/pickled@{COMMIT}': 'it has pytorch_model-0.bin, pytorch_model-1.bin, ',
    f'us/empty@{COMMIT}': 'it has no weights (pickles',
    f'us/half@{COMMIT}': 'no model.safetensors and no bundle',
    f'us/nowhere@{COMMIT}': 'no such repository',
    f'us/private@{COMMIT}': 'answered 401: log in',
    f'us/down@{COMMIT}': 'answered 503: try again',
    f'us/list@{OTHER}': 'no such revision',
    f'us/gated@{COMMIT}': 'accept the terms on its page',
    f'us/closed@{COMMIT}': 'answered 403: log in',
    f'us/broken@{COMMIT}': 'config.json cannot be read',
    f'us/list@{COMMIT}': 'config.json is no object',
    f'us/a--b@{COMMIT}': 'Cannot have -- or ..',
  }
  results = fetch(*(f'hf:{name}' for name in said))
  for (name, expected), result in zip(said.items(), results, strict=True):
    assert expected in result
    assert name in result
  assert not any(path.endswith('.bin') for _, path in server.requests)
  assert not any('half/resolve' in path for _, path in server.requests)


def test_a_file_that_ends_early(server, fetch):
  server.repos = {'timm/net': TIMM}
  server.short.add('model.safetensors')
  reference = f'hf:timm/net@{COMMIT}'
  (result,) = fetch(reference)
  assert result == f'{reference}: the download ended early: try again'
  # Nothing of it is taken for the file, neither now nor later.
  server.short.clear()
  (result,) = fetch(reference)
  weights = pathlib.Path(result['files']['model.safetensors'])
  assert weights.read_bytes() == WEIGHTS


def lying(server, lies):
  """Gives a server a repository of weights for each lie: the references."""
  server.lies = {f'us/net{i}': lie for i, lie in enumerate(lies)}
  server.repos = {repo: {'model.safetensors': WEIGHTS} for repo in server.lies}
  return [f'hf:{repo}@{COMMIT}' for repo in server.lies]


def test_tags_that_name_another_place(server, fetch, tmp_path):
  (tmp_path / 'cache').mkdir()
  tags = (
    *('"../../../../../x"', f'W/"/{tmp_path}/x"', f'"{tmp_path}/x"', '".."'),
    *('"."', '"a/b"', '""', f'"{"a" * 300}"'),
  )
  for result in fetch(*lying(server, [{'etag': tag} for tag in tags])):
    assert 'the hub sent the ETag' in result
  assert [path.name for path in tmp_path.iterdir()] == ['cache']
  # It notes of the other files that they are not there, each empty.
  assert not [path for path in tmp_path.rglob('*') if path.is_symlink()]
  files = [path for path in tmp_path.rglob('*') if path.is_file()]
  assert {path.parent.parent.name for path in files} == {'.no_exist'}


def test_tags_of_mirrors(server, fetch):
  """They say nothing of the content, and are names all the same."""
  tags = ('"d41d8cd98f00b204e9800998ecf8427e"', '"a-12"', 'W/"abc"', 'abc')
  for result in fetch(*lying(server, [{'etag': tag} for tag in tags])):
    weights = pathlib.Path(result['files']['model.safetensors'])
    assert weights.read_bytes() == WEIGHTS


def test_another_commit(server, fetch, tmp_path):
  lies = [
    {where: commit}
    for where in ('commit', 'sha')
    for commit in (OTHER, '../../../x', 'main')
  ]
  results = fetch(*lying(server, lies))
  for lie, result in zip(lies, results, strict=True):
    (commit,) = lie.values()
    assert f'the hub sent another commit, {commit}' in result
  assert not [path for path in tmp_path.rglob('*') if path.is_file()]


def git_hash(content):
  """Returns the name that Git gives a file's content."""
  result = subprocess.run(
    ['git', 'hash-object', '--stdin'],
    input=content,
    capture_output=True,
    check=True,
  )
  return result.stdout.decode().strip()


def test_content_that_is_not_what_the_hub_names(server, fetch):
  """Also of the same length, and neither now nor from the cache."""
  lfs = {
    'sha256': hashlib.sha256(WEIGHTS).hexdigest(),
    'size': len(WEIGHTS),
    'pointerSize': 130,
  }
  other = '"of-a-mirror"'
  truths = [
    {},
    {'etag': f'"{git_hash(WEIGHTS)}"'},
    {
      'etag': f'"{hashlib.sha1(WEIGHTS).hexdigest()}"'
    },  # As Artifactory has it.
    {'etag': other, 'siblings': {'blobId': git_hash(WEIGHTS)}},
    {'etag': other, 'siblings': {'blobId': git_hash(b'pointer'), 'lfs': lfs}},
  ]
  lies = [{**truth, 'body': WEIGHTS[::-1]} for truth in truths]
  references = lying(server, lies)
  for _ in range(2):
    for reference, result in zip(references, fetch(*references), strict=True):
      assert result == (
        f'{reference}: model.safetensors is not the file that the hub '
        'describes: its hash differs; try again'
      )
  lying(server, truths)
  for result in fetch(*references):
    weights = pathlib.Path(result['files']['model.safetensors'])
    assert weights.read_bytes() == WEIGHTS


def test_a_hub_that_is_down(server, fetch):
  stop(server)
  pinned, unpinned = fetch(f'hf:timm/net@{COMMIT}', 'hf:timm/net')
  assert 'ConnectError' in pinned and 'check the network' in pinned
  assert 'hf:timm/net@COMMIT' in unpinned and 'ConnectError' in unpinned


@pytest.mark.parametrize(
  'card, licence',
  [
    (b'---\nlicense: mit\n---\n', 'mit'),
    (b'---\nlicense: [mit, gpl]\n---\n', 'mit, gpl'),
    (b'---\nlicense: other\nlicense_name: our-own\n---\n', 'our-own'),
    (b'---\nlicense: other\n---\n', 'other'),
    (b'---\nlicense: no\n---\n', ''),
    (b'---\nlicense:\n---\n', ''),
    (b'---\ntags: [a]\n---\n', ''),
    (b'---\n[broken\n---\n', ''),
    (b'license: mit\n', ''),
    (b'\xff', ''),
    (b'', ''),
    (None, ''),
  ],
)
def test_licences(library, tmp_path, card, licence):
  path = None
  if card is not None:
    path = tmp_path / 'README.md'
    path.write_bytes(card)
  assert hub._licence(library, path) == licence


@pytest.mark.slow
def test_teacher_of_the_hub(library, server, tmp_path, published_run, data_dir):
  """A run takes it, and says what it took; timm's config.json is believed."""
  workdir, _ = published_run
  teacher = bundles.load(workdir / 'teacher')
  config = {
    'architecture': 'resnet8',
    'pretrained_cfg': {
      'mean': [0.25],
      'std': [0.5],
      'input_size': [1, 16, 16],
      'interpolation': 'bicubic',
    },
  }
  weights = safetensors.numpy.save(published_names.state_dict(teacher))
  server.repos['us/net'] = {
    'README.md': CARD,
    'config.json': json.dumps(config).encode(),
    'model.safetensors': weights,
  }
  command = (
    *('-m', 'ijckd_jax.main', '--workdir', str(tmp_path / 'run')),
    *('--config', 'configs/digits.py:teacher=resnet8'),
    *('--config.total_epochs=0', '--config.total_steps=2'),
    '--config.optimizer.warmup_epochs=0',
    f'--config.dataset.data_dir={data_dir}',
    f'--config.teacher.checkpoint=hf:us/net@{COMMIT}',
  )
  result = child(server, tmp_path, *command)
  assert result.returncode == 0, result.stderr
  assert f'the teacher is of hub us/net, revision {COMMIT}' in result.stderr
  summary = json.loads((tmp_path / 'run' / 'summary.json').read_text())
  assert summary['teacher_origin'] == {
    'hub': 'us/net',
    'revision': COMMIT,
    'licence': 'apache-2.0',
    'sha256': hashlib.sha256(weights).hexdigest(),
  }
  assert 'licence apache-2.0' in (tmp_path / 'run' / 'report.md').read_text()
  result = child(server, tmp_path, *command[:-1], f'{command[-1]}0')
  assert result.returncode == 2
  assert 'pin it to a commit' in result.stderr


PRETRAINED = {
  'mean': [0.5],
  'std': [0.25],
  'input_size': [1, 8, 8],
  'interpolation': 'bicubic',
}


@pytest.mark.parametrize(
  'more, resize',
  [
    ({}, 9),  # 8 / 0.875 is 9.1.
    ({'crop_pct': 0.9}, 8),
    ({'crop_pct': 0.75, 'crop_mode': 'center'}, 10),
    ({'crop_pct': 1, 'crop_mode': None}, 8),
  ],
)
def test_images_as_timm_prepares_them(more, resize):
  config = {**PRETRAINED, **more}
  found = published_weights.of_timm('net', {'pretrained_cfg': config})
  wanted = augment.Preprocessing((0.5,), (0.25,), (8, 8), 'bicubic')
  assert found.preprocessing == wanted
  assert found.crop == images.CentreCrop(resize, 'bicubic')
  assert published_weights.of_timm('net', {}) is None


@pytest.mark.parametrize(
  'names, wanted',
  [(['cat', 'dog'], ['cat', 'dog']), ({'0': 'cat'}, []), ([0, 1], [])],
)
def test_names_of_the_hub(names, wanted):
  config = {'pretrained_cfg': PRETRAINED, 'label_names': names}
  assert list(published_weights.of_timm('net', config).class_names()) == wanted


@pytest.mark.parametrize(
  'config, said',
  [
    ({'mean': [0.5]}, 'does not say how images are prepared'),
    ({**PRETRAINED, 'crop_pct': 'all'}, 'does not say how images are prepared'),
    (
      {**PRETRAINED, 'interpolation': 'lanczos'},
      "resizes its images by 'lanczos'",
    ),
    (
      {**PRETRAINED, 'interpolation': 'random'},
      'none of bilinear, bicubic: give',
    ),
    (
      {**PRETRAINED, 'crop_pct': 0},
      'cuts 0.0 of a picture out .* at most 1: give',
    ),
    ({**PRETRAINED, 'crop_pct': 1.15}, 'cuts 1.15 of a picture'),
    ({**PRETRAINED, 'crop_pct': float('nan')}, 'cuts nan of a picture'),
    (
      {**PRETRAINED, 'crop_mode': 'squash'},
      "fits pictures to its size by 'squash'",
    ),
  ],
)
def test_images_that_cannot_be_prepared_as_timm_does(config, said):
  with pytest.raises(config_utils.UserError, match=said):
    published_weights.of_timm('net', {'pretrained_cfg': config})
