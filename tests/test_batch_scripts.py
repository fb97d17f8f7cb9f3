"""The batch scripts: what they print is what they run, down to the workers."""

import json
import os
import pathlib
import shutil
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]
SCRIPTS = ('create', 'install', 'start', 'watch', 'collect', 'delete')
WORKDIR = 'gs://bucket/runs/it\'s a "run"'
# Writes words that a shell would take apart, and what it was given.
COMMAND = """\
mkdir -p "$WORKDIR"; printf '%s\\n' "it's" 'two  "spaces"' '$HOME' \\
  "$WORKDIR" "$DATA_DIR" >"$WORKDIR/words"; echo said"""
SETTINGS = {
  'TPU_PROJECT': "it's a project",
  'TPU_ZONE': 'us-west4-a',
  'TPU_NAME': 'mine',
  'POLL_SECONDS': '0.01',
  'BUCKET': 'bucket',
  'WORKDIR': WORKDIR,
  'COMMAND': COMMAND,
}
WHERE = [f'--project={SETTINGS["TPU_PROJECT"]}', '--zone=us-west4-a', '--quiet']
TPUS = ['gcloud', 'compute', 'tpus']
CREATE = [*TPUS, 'queued-resources', 'create', 'mine', '--node-id=mine', *WHERE]
CREATE += ['--accelerator-type=v5litepod-8']
CREATE += ['--runtime-version=v2-alpha-tpuv5-lite']
STATE = [*TPUS, 'queued-resources', 'describe', 'mine', *WHERE]
STATE += ['--format=value(state.state)']
DELETE = [*TPUS, 'queued-resources', 'delete', 'mine', *WHERE, '--force']

# Under the name of each program that the scripts call: it writes down its
# arguments, and does as much as the scripts need. A TPU is a home directory.
FAKE = """#!PYTHON -IS
import json, os, shutil, signal, subprocess, sys
cloud = CLOUD
home = os.path.join(cloud, 'home')
name, *args = os.path.basename(sys.argv[0]), *sys.argv[1:]
if name != 'mountpoint':
  with open(os.path.join(cloud, 'calls'), 'a') as file:
    print(json.dumps([name, *args]), file=file)
if name == 'gcloud' and 'describe' in args:
  states = open(os.path.join(cloud, 'states')).read().split()
  print(states[0])
  with open(os.path.join(cloud, 'states'), 'w') as file:
    print(*(states[1:] or states), file=file)
elif name == 'gcloud' and 'create' in args:
  os.mkdir(home)
elif name == 'gcloud' and 'delete' in args:
  if os.path.exists(home + '/group'):
    os.killpg(int(open(home + '/group').read()), signal.SIGKILL)
  shutil.rmtree(home)
elif name == 'gcloud' and 'scp' in args:
  shutil.copy(args[4], home)
elif name == 'gcloud' and 'ssh' in args:
  command = args[-1].removeprefix('--command=')
  environ = os.environ | {'HOME': home}
  done = subprocess.run(['bash', '-c', command], cwd=home, env=environ)
  sys.exit(done.returncode)
elif name == 'python3':
  os.makedirs('uv/bin', exist_ok=True)
  for program in ('pip', 'uv'):
    if not os.path.exists('uv/bin/' + program):
      os.symlink(os.path.join(cloud, 'bin', 'gcloud'), 'uv/bin/' + program)
elif name == 'gcsfuse':
  os.rmdir(args[-1])
  os.symlink(os.path.join(cloud, args[-2]), args[-1])
elif name == 'mountpoint':
  sys.exit(not os.path.islink(args[-1]))
elif name == 'srun':
  sys.exit(int(os.environ['SRUN_EXITS']))
"""
FAKED = ('gcloud', 'gcsfuse', 'mountpoint', 'python3', 'sudo')
NOT_FAKED = ('bash', 'cp', 'flock', 'git', 'mkdir', 'rm', 'setsid')


def link_programs(folder, names, target=None):
  """Makes a folder of programs: links to those there are, or to one file."""
  folder.mkdir()
  for name in names:
    (folder / name).symlink_to(target or shutil.which(name))
  return folder


class Cloud:
  """Runs scripts where gcloud and a worker's programs are fakes."""

  def __init__(self, folder, scripts):
    self.folder = folder
    self.scripts = scripts
    fake = folder / 'fake'
    fake.write_text(
      FAKE.replace('PYTHON', sys.executable).replace('CLOUD', repr(str(folder)))
    )
    fake.chmod(0o755)
    self.fake = fake
    link_programs(folder / 'bin', FAKED + ('srun', 'scontrol'), fake)
    (folder / 'bucket' / 'tensorflow_datasets').mkdir(parents=True)
    (folder / 'bucket' / 'tensorflow_datasets' / 'records').write_text('data')
    self.path = f'{folder / "bin"}:{os.environ["PATH"]}'

  def run(self, script, *args, states='ACTIVE', path=None, **settings):
    """Runs experiments/tpu_vm/SCRIPT.sh."""
    (self.folder / 'calls').write_text('')
    (self.folder / 'states').write_text(states)
    return subprocess.run(
      [self.scripts / f'{script}.sh', *args],
      cwd=self.folder,
      env=SETTINGS | settings | {'PATH': path or self.path},
      capture_output=True,
      text=True,
      timeout=60,
    )

  @property
  def calls(self):
    """The arguments of each call of a fake in the last run."""
    lines = (self.folder / 'calls').read_text().splitlines()
    return [json.loads(line) for line in lines]

  @property
  def verbs(self):
    """What gcloud was asked for: describe, ssh, ..."""
    return [
      call[call.index('mine') - 1] if 'mine' in call else call[4]
      for call in self.calls
      if call[0] == 'gcloud'
    ]


@pytest.fixture(scope='module')
def scripts(tmp_path_factory):
  """The scripts' folder in a repository where they are committed."""
  root = tmp_path_factory.mktemp('checkout')
  folder = pathlib.Path('experiments', 'tpu_vm')
  shutil.copytree(ROOT / folder, root / folder)
  (root / '.gitignore').write_text('build/\n')
  git = ['git', '-c', 'user.name=test', '-c', 'user.email=test@test']
  for command in (
    ['init', '--quiet'],
    ['add', '.'],
    ['-c', 'commit.gpgsign=false', 'commit', '--quiet', '--message=test'],
  ):
    subprocess.run([*git, *command], cwd=root, check=True)
  return root / folder


@pytest.fixture
def cloud(tmp_path, scripts):
  """A Cloud without a TPU."""
  return Cloud(tmp_path, scripts)


@pytest.fixture
def tpu(cloud):
  """A Cloud with a TPU on which everything is installed."""
  assert cloud.run('create').returncode == 0
  done = cloud.run('install')
  assert done.returncode == 0, done.stderr
  return cloud


@pytest.fixture
def pasted(cloud, tmp_path):
  """Returns a function: the commands that a shell sees in what was printed."""
  programs = (*FAKED, *NOT_FAKED)
  folder = link_programs(tmp_path / 'paste', programs, cloud.fake)
  (folder / 'uv').mkdir()
  link_programs(folder / 'uv' / 'bin', ('pip', 'uv'), cloud.fake)
  silent = cloud.fake.read_text().partition("if name == 'gcloud'")[0]

  def paste(printed):
    acts = cloud.fake.read_text()
    cloud.fake.write_text(silent)
    (cloud.folder / 'calls').write_text('')
    done = subprocess.run(
      [shutil.which('bash'), '-euc', printed],
      cwd=folder,
      env={'PATH': str(folder)},
      capture_output=True,
      text=True,
    )
    cloud.fake.write_text(acts)
    assert (done.returncode, done.stderr) == (0, '')
    return cloud.calls

  return paste


def test_shellcheck():
  scripts = [ROOT / '.ci' / 'run']
  for pattern in ('**/*.sh', '**/*.sbatch'):
    scripts += (ROOT / 'experiments').glob(pattern)
  assert len(scripts) > 10
  shellcheck = pathlib.Path(sys.executable).with_name('shellcheck')
  done = subprocess.run(
    [shellcheck, '--external-sources', *scripts],
    capture_output=True,
    text=True,
  )
  assert done.returncode == 0, done.stdout + done.stderr


def test_dry_run_prints_every_command(cloud, pasted, scripts):
  commands = {
    script: pasted(cloud.run(script, '--dry_run').stdout) for script in SCRIPTS
  }
  assert commands['create'] == [[*CREATE, '--spot'], STATE]
  assert commands['delete'] == [DELETE]
  copy = ['gcloud', 'storage', 'rsync', '--recursive', WORKDIR, 'runs/mine']
  assert commands['collect'] == [['mkdir', '-p', 'runs/mine'], copy]
  archive = str(scripts.parents[1] / 'build' / 'ijckd_jax.tar.gz')
  scp, ssh = commands['install'][2:4]
  assert scp == [*TPUS, 'tpu-vm', 'scp', archive, 'mine:', *WHERE] + [
    '--worker=all'
  ]
  assert ssh[:-1] == [*TPUS, 'tpu-vm', 'ssh', 'mine', *WHERE, '--worker=all']
  worker = commands['install'][4:]
  assert [*'mkdir -p gs/bucket'.split()] in worker
  assert worker[-1] == (
    'cp --recursive --update gs/bucket/tensorflow_datasets/. data'.split()
  )
  assert ['bash', '-c', COMMAND] in commands['start']
  assert commands['watch'][:3] == [STATE, DELETE, [*CREATE, '--spot']]
  assert commands['watch'][4:] == commands['install'] + commands['start']
  on_demand = cloud.run('create', '--dry_run', TPU_SPOT='no').stdout
  assert pasted(on_demand) == [CREATE, STATE]


@pytest.mark.parametrize('script', ['create', 'install', 'start', 'collect'])
def test_what_is_printed_is_what_runs(tpu, pasted, script):
  printed = tpu.run(script, '--dry_run')
  assert printed.returncode == 0 and not tpu.calls
  if script == 'create':
    tpu.run('delete')
    assert tpu.calls == [DELETE]
  if script == 'install':  # As on a new machine: what is mounted stays so.
    (tpu.folder / 'home' / 'gs' / 'bucket').unlink()
    (tpu.folder / 'home' / 'gs' / 'bucket').mkdir()
  done = tpu.run(script)
  assert done.returncode == 0, done.stderr
  ran = tpu.calls
  assert ran == [
    call for call in pasted(printed.stdout) if call[0] not in NOT_FAKED
  ]


def test_the_command_reaches_the_worker_unharmed(tpu):
  done = tpu.run('start')
  assert (done.returncode, done.stdout, done.stderr) == (0, '', '')
  home = tpu.folder / 'home'
  assert tpu.run('watch').returncode == 0  # Returns when it has finished.
  run_folder = tpu.folder / 'bucket' / 'runs' / 'it\'s a "run"'
  assert (run_folder / 'words').read_text().splitlines() == [
    "it's",
    'two  "spaces"',
    '$HOME',
    str(home / 'gs' / 'bucket' / 'runs' / 'it\'s a "run"'),
    str(home / 'data'),
  ]
  assert (home / 'data' / 'records').read_text() == 'data'
  [log] = (run_folder / 'logs').iterdir()
  assert log.read_text() == 'said\n'


def test_data_can_be_mounted_or_left_out(tpu):
  for data, seen in (
    ({'DATA_BY': 'mount'}, f'{tpu.folder}/home/gs/bucket/tensorflow_datasets'),
    ({'DATA_DIR': ''}, ''),
  ):
    printed = tpu.run('install', '--dry_run', **data).stdout
    assert 'gcsfuse' in printed and 'cp --recursive' not in printed
    tpu.run('start', **data)
    tpu.run('watch')
    words = tpu.folder / 'bucket' / 'runs' / 'it\'s a "run"' / 'words'
    assert words.read_text().splitlines()[-1] == seen


def test_a_second_start_or_install_leaves_the_command_alone(tpu):
  command = """for _ in $(seq 1000)
  do [ -e ~/go_on ] || break; sleep 0.01; done; echo end >>~/ends"""
  home = tpu.folder / 'home'
  (home / 'go_on').touch()
  tpu.run('start', COMMAND=command)
  done = tpu.run('start', COMMAND=command)
  assert (done.returncode, done.stderr) == (0, '')
  assert 'already running' in done.stdout
  done = tpu.run('install')
  assert done.returncode == 1 and 'still running' in done.stderr
  (home / 'go_on').unlink()
  assert tpu.run('watch').returncode == 0
  assert (home / 'ends').read_text() == 'end\n'


def test_nothing_starts_beside_the_mount(tpu):
  (tpu.folder / 'home' / 'gs' / 'bucket').unlink()
  done = tpu.run('start')
  assert (done.returncode, done.stdout) == (2, '')
  assert done.stderr == 'error: gs/bucket is not mounted: run install.sh\n'


def test_watch_resumes_after_preemption(cloud):
  command = """echo start >>"${WORKDIR%/*}/starts"
  [ "$(wc -l <"${WORKDIR%/*}/starts")" = 1 ] || exit 0
  echo $PPID >~/group; exec sleep 60"""
  (cloud.folder / 'bucket' / 'runs').mkdir()
  cloud.run('create')
  done = cloud.run(
    'watch',
    states='ACTIVE ACTIVE SUSPENDING SUSPENDED PROVISIONING ACTIVE',
    COMMAND=command,
  )
  assert done.returncode == 0, done.stderr
  anew = ['describe', 'ssh', 'scp', 'ssh', 'ssh']
  resumed = [*anew, 'describe', 'ssh', 'describe', 'describe', 'delete']
  resumed += ['create', 'describe', *anew]
  assert cloud.verbs[: len(resumed)] == resumed
  assert set(cloud.verbs[len(resumed) :]) == {'describe', 'ssh'}
  starts = cloud.folder / 'bucket' / 'runs' / 'starts'
  assert starts.read_text() == 'start\nstart\n'
  for said in ('SUSPENDING', 'PROVISIONING', 'stopped', 'running', 'exited 0'):
    assert said in done.stdout


@pytest.mark.parametrize('codes, code', [('130 143 0', 0), ('130 3', 1)])
def test_watch_starts_again_what_was_told_to_stop(tpu, codes, code):
  (tpu.folder / 'home' / 'codes').write_text(codes.replace(' ', '\n') + '\n')
  command = 'read -r code <~/codes; sed -i 1d ~/codes; exit "$code"'
  done = tpu.run('watch', COMMAND=command)
  assert done.returncode == code
  assert (tpu.folder / 'home' / 'codes').read_text() == ''
  assert ('the command has failed' in done.stderr) == (code == 1)


@pytest.mark.parametrize('script', ['create', 'watch'])
def test_a_request_that_fails_ends_the_wait(cloud, script):
  done = cloud.run(script, states='WAITING_FOR_RESOURCES FAILED')
  assert done.returncode == 1
  assert 'WAITING_FOR_RESOURCES' in done.stdout
  assert done.stderr.count('\n') == 1 and 'no TPU' in done.stderr


@pytest.mark.parametrize('script', SCRIPTS)
def test_mistakes_get_one_line(cloud, tmp_path, script):
  programs = ('bash', 'cut', 'dirname', 'git', 'sort')
  bare = str(link_programs(tmp_path / 'bare', programs))
  done = cloud.run(script, '--dry_run', path=bare)
  assert (done.returncode, done.stderr) == (0, '')
  for settings, args, said in (
    ({'path': bare}, [], 'there is no gcloud'),
    ({'TPU_PROJECT': ''}, [], 'TPU_PROJECT is not set'),
    ({'BUCKET': ''}, ['--dry_run'], 'BUCKET is not set'),
    ({'WORKDIR': 'runs/mine'}, [], 'WORKDIR=runs/mine: it must be gs://'),
    ({'DATA_DIR': 'data'}, [], 'DATA_DIR=data: it must be gs://'),
    ({'DATA_BY': 'cpoy'}, [], 'copy or mount'),
    ({}, ['--dryrun'], "unknown argument '--dryrun'"),
  ):
    done = cloud.run(script, *args, **settings)
    assert (done.returncode, done.stdout) == (2, '')
    assert done.stderr.count('\n') == 1, done.stderr
    assert said in done.stderr
    assert not cloud.calls


@pytest.mark.parametrize(
  'tasks, srun_exits, code, requeued',
  [('1', '0', 0, False), ('1', '130', 130, True), ('1', '1', 1, False)]
  + [('2', '0', 2, False)],
)
def test_slurm_job(cloud, tasks, srun_exits, code, requeued):
  args = ['--config', "it's one.py", '--workdir', 'two  words']
  done = subprocess.run(
    ['bash', ROOT / 'experiments' / 'slurm' / 'train.sbatch', *args],
    env={
      'PATH': cloud.path,
      'SLURM_JOB_ID': '7',
      'SLURM_NTASKS': tasks,
      'SRUN_EXITS': srun_exits,
    },
    capture_output=True,
    text=True,
  )
  assert done.returncode == code
  if tasks != '1':
    assert done.stderr.count('\n') == 1
    assert not (cloud.folder / 'calls').exists()
    return
  expected = [['srun', 'python', '-m', 'ijckd_jax.main', *args]]
  expected += [['scontrol', 'requeue', '7']] * requeued
  assert cloud.calls == expected
