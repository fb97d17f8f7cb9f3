"""Kubernetes jobs: manifests that a cluster takes, and the commands in them."""

import configparser
import copy
import http.server
import os
import pathlib
import re
import socket
import subprocess
import sys
import threading
import time

import pytest
import yaml

from experiments.benchmarks import classifiers

kubernetes_validate = pytest.importorskip(
  'kubernetes_validate', reason="needs pip install -e '.[kubernetes]'"
)
ROOT = pathlib.Path(__file__).parents[1]
FOLDER = ROOT / 'experiments' / 'kubernetes'
# Kubernetes of the first version in which pod failure policies are stable, and
# the newest one whose schemas are known.
VERSIONS = ('1.31', kubernetes_validate.latest_version())
OBJECTS = [
  (path.name, found)
  for path in sorted(FOLDER.glob('*.yaml'))
  for found in yaml.safe_load_all(path.read_text())
]
JOBS = {name: found for name, found in OBJECTS if found['kind'] == 'Job'}
SERVICES = {
  name: found for name, found in OBJECTS if found['kind'] == 'Service'
}
SETUP = configparser.ConfigParser()
SETUP.read(ROOT / 'setup.cfg')


def pod_of(found):
  """Returns the specification of an object's pods."""
  return found['spec'].get('template', found)['spec']


def fields_of(value, path=()):
  """Yields where each named field of nested objects is."""
  if isinstance(value, dict):
    for name in value:
      yield *path, name
      yield from fields_of(value[name], (*path, name))
  elif isinstance(value, list):
    for place, part in enumerate(value):
      yield from fields_of(part, (*path, place))


def flags_of(job):
  """Returns the flags of a job's command by name."""
  [container] = pod_of(job)['containers']
  command, *flags = container['args']
  assert command == 'train' and 'command' not in container
  return dict(flag.split('=', 1) for flag in flags)


def action(job, code=None, condition=None):
  """Returns what a job's failure policy does about a pod that has failed."""
  for rule in job['spec']['podFailurePolicy']['rules']:
    codes = rule.get('onExitCodes')
    if codes:
      assert codes['operator'] == 'In'
      if code in codes['values']:
        return rule['action']
    elif condition in [found['type'] for found in rule['onPodConditions']]:
      return rule['action']
  return 'Count'  # Kubernetes' own.


@pytest.mark.parametrize('version', VERSIONS)
@pytest.mark.parametrize('name, found', OBJECTS)
def test_schema(name, found, version):
  del name
  kubernetes_validate.validate(found, version, strict=True)


@pytest.mark.parametrize('name, job', JOBS.items())
def test_a_misspelt_field_is_seen(name, job):
  """Wherever it is, but in maps whose names are the user's."""
  free = {'limits', 'requests', 'nodeSelector'}
  paths = [path for path in fields_of(job) if not free & set(path[:-1])]
  assert ('spec', 'podFailurePolicy', 'rules', 1, 'onExitCodes') in paths
  for path in paths:
    wrong = copy.deepcopy(job)
    parent = wrong
    for step in path[:-1]:
      parent = parent[step]
    parent[f'{path[-1]}X'] = parent.pop(path[-1])
    with pytest.raises((kubernetes_validate.ValidationError, KeyError)):
      kubernetes_validate.validate(wrong, VERSIONS[-1], strict=True)


@pytest.mark.parametrize('name, found', OBJECTS)
def test_volumes(name, found):
  if found['kind'] not in ('Job', 'Pod'):
    return
  pod = pod_of(found)
  volumes = {volume['name']: volume for volume in pod['volumes']}
  [container] = pod['containers']
  mounts = {m['mountPath']: m['name'] for m in container['volumeMounts']}
  assert sorted(mounts.values()) == sorted(volumes)
  claims = [x for _, x in OBJECTS if x['kind'] == 'PersistentVolumeClaim']
  claim = volumes[mounts['/ijckd']]['persistentVolumeClaim']['claimName']
  assert [claim] == [x['metadata']['name'] for x in claims]
  if found['kind'] == 'Job':
    assert volumes[mounts['/dev/shm']]['emptyDir'] == {'medium': 'Memory'}
    flags = flags_of(found)
    for flag in ('--workdir', '--config.dataset.data_dir'):
      assert flags[flag].startswith('/ijckd/')


def test_names_differ():
  names = [(x['kind'], x['metadata']['name']) for _, x in OBJECTS]
  assert len(set(names)) == len(names)
  assert len(JOBS) == 3 and len(SERVICES) == 2


@pytest.mark.parametrize('name, service', SERVICES.items())
def test_pods_of_several_find_each_other(name, service):
  """By the names that Kubernetes gives to an Indexed job's pods."""
  job = JOBS[name]
  title, spec = job['metadata']['name'], job['spec']
  assert service['spec']['clusterIP'] == 'None'
  # The job controller labels its pods so.
  assert service['spec']['selector'] == {'job-name': title}
  assert pod_of(job)['subdomain'] == service['metadata']['name']
  assert spec['completionMode'] == 'Indexed'
  assert spec['completions'] == spec['parallelism'] > 1
  flags = flags_of(job)
  if 'google.com/tpu' in resources(job)['limits']:
    assert '--coordinator' not in flags  # JAX finds the processes on GKE.
    return
  host, port = flags['--coordinator'].split(':')
  assert host == f'{title}-0.{service["metadata"]["name"]}'
  assert port.isdecimal()
  assert flags['--num_processes'] == f'{spec["completions"]}'
  assert flags['--process_id'] == '$(JOB_COMPLETION_INDEX)'


def resources(job):
  return pod_of(job)['containers'][0]['resources']


def test_slice():
  """The pods' chips are those of the topology."""
  job = JOBS['tpu.yaml']
  topology = pod_of(job)['nodeSelector']['cloud.google.com/gke-tpu-topology']
  chips = 1
  for side in topology.split('x'):
    chips *= int(side)
  of_host = resources(job)['limits']['google.com/tpu']
  assert of_host * job['spec']['completions'] == chips
  # Kubernetes wants both alike where a resource cannot be shared.
  assert resources(job)['requests']['google.com/tpu'] == of_host


@pytest.mark.parametrize('name, job', JOBS.items())
def test_exit_codes(name, job):
  """As docs/long_runs.md has them."""
  wanted = {1: 'FailJob', 2: 'FailJob', 130: 'Ignore', 143: 'Ignore'}
  wanted |= {134: 'Count', 137: 'Count'}
  assert {code: action(job, code) for code in wanted} == wanted
  for code in (2, 137):  # Whatever a pod ends with that was taken away.
    assert action(job, code, 'DisruptionTarget') == 'Ignore'
  pod = pod_of(job)
  assert pod['restartPolicy'] == 'Never'  # Failure policies need it.
  assert pod['terminationGracePeriodSeconds'] == 300  # As in Slurm's job.
  assert pod['shareProcessNamespace']


def test_image():
  lines = (FOLDER / 'Dockerfile').read_text().splitlines()
  words = [line.split() for line in lines if not line.startswith('#')]
  image = dict(words[0:1])['FROM']
  version = re.fullmatch(r'python:(3\.\d+)-slim', image)[1]
  python = f'Programming Language :: Python :: {version}'
  assert python in SETUP['metadata']['classifiers']
  extras = SETUP['options.extras_require']
  [default] = [word[1] for word in words if word[0] == 'ARG']
  assert default.removeprefix('EXTRA=') in extras
  [program] = [word[1] for word in words if word[0] == 'ENTRYPOINT']
  scripts = SETUP['options.entry_points']['console_scripts'].split()
  assert program.strip('["]') in scripts
  for job in JOBS.values():
    [container] = pod_of(job)['containers']
    assert container['image'].removeprefix('REGISTRY/ijckd:') in extras


def command(job, index, *more):
  """Returns what a pod of a job runs, and the flags that take precedence."""
  args = pod_of(job)['containers'][0]['args']
  args = [arg.replace('$(JOB_COMPLETION_INDEX)', f'{index}') for arg in args]
  return [sys.executable, '-m', 'ijckd_jax', *args, *more]


@pytest.mark.parametrize('name', ['gpu.yaml', 'tpu.yaml'])
def test_command_is_taken(name):
  """Up to what is missing here: the data, at the path in the manifest."""
  done = subprocess.run(
    command(JOBS[name], 0),
    cwd=ROOT,
    # As in every pod.
    env={**os.environ, 'KUBERNETES_SERVICE_HOST': '10.0.0.1'},
    capture_output=True,
    text=True,
    timeout=120,
  )
  assert done.returncode == 2, done.stderr
  *_, last = done.stderr.splitlines()
  assert re.match(r'error: .*/ijckd/tensorflow_datasets', last), done.stderr


class Metadata(http.server.BaseHTTPRequestHandler):
  """Google Cloud's metadata server, which knows of no second slice."""

  def do_GET(self):
    self.send_response(200)
    self.end_headers()

  def log_message(self, *args):
    del args


def test_processes_of_a_slice_find_each_other(tmp_path):
  """By the variables that GKE gives to the pods of such a job."""
  server = http.server.HTTPServer(('127.0.0.1', 0), Metadata)
  threading.Thread(target=server.serve_forever, daemon=True).start()
  flags = ['--config=digits', f'--workdir={tmp_path / "run"}']
  flags += ['--config.batch_size=7']  # Refused, once they have met.
  pods = [
    subprocess.Popen(
      command(JOBS['tpu.yaml'], index, *flags),
      cwd=ROOT,
      env={
        **os.environ,
        'JAX_PLATFORMS': 'cpu',
        'KUBERNETES_SERVICE_HOST': '10.0.0.1',
        'TPU_WORKER_ID': f'{index}',
        'TPU_WORKER_HOSTNAMES': 'localhost,localhost',
        'JAX_FORCE_TPU_INIT': '1',  # As if there were chips.
        'GCE_METADATA_IP': f'127.0.0.1:{server.server_port}',
      },
      stderr=subprocess.PIPE,
      text=True,
    )
    for index in range(2)
  ]
  said = [pod.communicate(timeout=120)[1] for pod in pods]
  server.shutdown()
  server.server_close()
  assert [pod.returncode for pod in pods] == [2, 2], said
  for text in said:
    assert 'a positive multiple of the 2 devices' in text


class Controller:
  """Starts a job's pods as processes, and again as a cluster would."""

  def __init__(self, job, workdir, *more):
    with socket.socket() as free:
      free.bind(('127.0.0.1', 0))
      here = f'--coordinator=127.0.0.1:{free.getsockname()[1]}'
    self.job = job
    self.more = [*more, f'--workdir={workdir}', here]
    self.logs = workdir.with_name('logs')
    self.logs.mkdir()
    self.codes = [[] for _ in range(job['spec']['completions'])]
    self.pods = [self._start(index) for index in range(len(self.codes))]

  def _start(self, index):
    name = f'{index}.{len(self.codes[index])}'
    with open(self.logs / name, 'w') as log:
      return subprocess.Popen(
        command(self.job, index, *self.more), cwd=ROOT, stdout=log, stderr=log
      )

  def said(self, index, start):
    return (self.logs / f'{index}.{start}').read_text()

  def step(self):
    """Starts each pod again that has failed; returns whether all have ended."""
    for index, pod in enumerate(self.pods):
      code = pod.poll()
      if code is None or self.codes[index][-1:] == [0]:
        continue
      code = 128 - code if code < 0 else code  # As a container's status has it.
      self.codes[index].append(code)
      if code:
        said = self.said(index, len(self.codes[index]) - 1)
        assert action(self.job, code) != 'FailJob', said
        assert sum(map(len, self.codes)) < self.job['spec']['backoffLimit']
        self.pods[index] = self._start(index)
    return all(codes[-1:] == [0] for codes in self.codes)

  def close(self):
    for pod in self.pods:
      pod.kill()
      pod.wait()


@pytest.mark.slow
@pytest.mark.parametrize('dead', [0, 1])
def test_all_start_again_where_one_has_died(tmp_path, dead):
  """Each by itself, while the others may not have noticed yet."""
  teacher = classifiers.alone('resnet8', (8, 8, 1), num_classes=10)
  teacher.save(tmp_path / 'teacher')
  fields = {
    'teacher.checkpoint': tmp_path / 'teacher',
    'total_epochs': 0,
    'total_steps': 120,
    'eval_epochs': 0,
    'eval_steps': 120,
    'batch_size': 48,
    'checkpoint_epochs': 0,
    'checkpoint_steps': 10,
    'dataset.data_dir': '',
  }
  workdir = tmp_path / 'run'
  controller = Controller(
    JOBS['gpu_nodes.yaml'],
    workdir,
    '--config=digits:teacher=resnet8',
    *(f'--config.{name}={value}' for name, value in fields.items()),
  )
  deadline = time.monotonic() + 600
  try:
    # The folder of a step has another name until it is whole.
    while not any(x.name.isdecimal() for x in workdir.glob('checkpoints/*')):
      assert time.monotonic() < deadline
      assert not controller.step()
      time.sleep(0.05)
    controller.pods[dead].kill()
    while not controller.step():
      assert time.monotonic() < deadline, controller.codes
      time.sleep(0.05)
  finally:
    controller.close()
  assert controller.codes[dead][0] == 137
  assert 134 in controller.codes[1 - dead]
  starts = len(controller.codes[0])
  assert 'continues after step' in controller.said(0, starts - 1)
  assert (workdir / 'summary.json').exists()
