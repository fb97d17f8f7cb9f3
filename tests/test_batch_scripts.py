"""The batch scripts: what they print is what they run, down to the workers."""

import os
import pathlib
import re
import shlex
import shutil
import subprocess
import sys
import tempfile

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
  'POLL_SECONDS': '0.05',
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

# The flags that each command takes, where it has no alpha or beta before it: by
# its definition in gcloud 578.0.0 and, for those of the scripts, by its page,
# cloud.google.com/sdk/gcloud/reference/compute/tpus/queued-resources/create and
# so on. Looked up on 2026-11-30.
SSH = """dry-run force-key-file-overwrite internal-ip plain ssh-key-expiration
  ssh-key-expire-after ssh-key-file strict-host-key-checking worker zone """
FLAGS = {
  'compute tpus queued-resources create': """accelerator-type async boot-disk
    data-disk description guaranteed internal-ips labels metadata
    metadata-from-file network node-count node-id node-prefix range
    reservation-host-folder reservation-host-organization
    reservation-host-project reserved runtime-version scopes service-account
    shielded-secure-boot spot subnetwork tags topology type
    valid-after-duration valid-after-time valid-until-duration valid-until-time
    zone""",
  'compute tpus queued-resources delete': 'async force zone',
  'compute tpus queued-resources describe': 'zone',
  'compute tpus tpu-vm scp': SSH + 'compress recurse scp-flag',
  'compute tpus tpu-vm ssh': SSH + 'command output-directory ssh-flag',
  # Of these, the ones in use and their neighbours.
  'services enable': 'async',
  'storage buckets create': """default-storage-class
    enable-hierarchical-namespace location uniform-bucket-level-access""",
  'storage rsync': """checksums-only delete-unmatched-destination-objects
    dry-run exclude recursive skip-if-dest-has-newer-mtime""",
}
EVERYWHERE = {'format', 'project', 'quiet'}  # "GCLOUD WIDE FLAGS".

# Under the name of each program that the scripts call: it writes down its
# arguments, and does as much as the scripts need. A TPU is a home directory.
FAKE = r"""#!/usr/bin/env bash
cloud=$(dirname "$(readlink -f "$0")") name=${0##*/}
[ "$name" = mountpoint ] ||
  printf '%s\0' "$name" "$@" $'\n' >>"$cloud/calls"
case "$name $4" in
  'gcloud describe')
    read -r state later <"$cloud/states"
    echo "$state"
    [ -z "$later" ] || echo "$later" >"$cloud/states" ;;
  'gcloud create') mkdir "$cloud/home" ;;
  'gcloud delete')
    cd "$cloud/home"
    if ! flock --nonblock run.lock true; then  # What runs goes with it.
      until [ -s group ]; do sleep 0.01; done
      kill -KILL -- "-$(cat group)"
    fi
    rm -r "$cloud/home" ;;
  'gcloud scp') cp "$5" "$cloud/home" ;;
  'gcloud ssh')
    cd "$cloud/home"
    last=${*: -1}
    HOME=$PWD exec bash -c "${last#--command=}" ;;
  python3*) mkdir -p uv/bin && ln -sf ../../../fake uv/bin/pip &&
    ln -sf ../../../fake uv/bin/uv ;;
  gcsfuse*) rmdir "$4" && ln -s "../../$3" "$4" ;;
  mountpoint*) [ -L "$2" ] ;;
  srun*) exit "$SRUN_EXITS" ;;
esac
"""
# Makes a function of each program that only prints its arguments.
RECORD = r"""%s() { printf '%%s\0' %s "$@" $'\n'; }
"""
FAKED = ('gcloud', 'gcsfuse', 'mountpoint', 'python3', 'sudo')
NOT_FAKED = ('bash', 'cp', 'flock', 'git', 'mkdir', 'rm', 'setsid')


def link_programs(folder, names, target=None):
  """Makes a folder of programs: links to those there are, or to one file."""
  folder.mkdir()
  for name in names:
    (folder / name).symlink_to(target or shutil.which(name))
  return folder


def parse(calls):
  """Returns the calls that were written with a zero byte after each word."""
  return [call.split('\0')[:-1] for call in calls.split('\n\0')[:-1]]


def pasted(printed):
  """Returns the commands that a shell sees in what was printed."""
  names = (*FAKED, *NOT_FAKED, 'uv/bin/pip', 'uv/bin/uv')
  functions = [RECORD % (name, name.rpartition('/')[2]) for name in names]
  with tempfile.TemporaryDirectory() as home:
    done = subprocess.run(
      ['bash', '-euc', ''.join(functions) + printed],
      cwd=home,
      capture_output=True,
      text=True,
    )
  assert (done.returncode, done.stderr) == (0, '')
  return parse(done.stdout)


class Cloud:
  """Runs scripts where gcloud and a worker's programs are fakes."""

  def __init__(self, folder, scripts):
    self.folder = folder
    self.scripts = scripts
    self.path = f'{folder / "bin"}:{os.environ["PATH"]}'

  @classmethod
  def create(cls, folder, scripts):
    """Makes one with a bucket and without a TPU."""
    folder.mkdir()
    (folder / 'fake').write_text(FAKE)
    (folder / 'fake').chmod(0o755)
    link_programs(folder / 'bin', FAKED + ('srun', 'scontrol'), '../fake')
    (folder / 'bucket' / 'tensorflow_datasets').mkdir(parents=True)
    (folder / 'bucket' / 'tensorflow_datasets' / 'records').write_text('data')
    return cls(folder, scripts)

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
    return parse((self.folder / 'calls').read_text())

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
  return Cloud.create(tmp_path / 'cloud', scripts)


@pytest.fixture(scope='module')
def installed(tmp_path_factory, scripts):
  """A Cloud with a TPU on which everything is installed, to be copied."""
  made = Cloud.create(tmp_path_factory.mktemp('installed') / 'cloud', scripts)
  for script in ('create', 'install'):
    done = made.run(script)
    assert done.returncode == 0, done.stderr
  return made


@pytest.fixture
def tpu(tmp_path, installed):
  """A Cloud with a TPU on which everything is installed."""
  shutil.copytree(installed.folder, tmp_path / 'cloud', symlinks=True)
  return Cloud(tmp_path / 'cloud', installed.scripts)


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


def test_dry_run_prints_every_command(cloud, scripts):
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


def unknown_flags(call):
  """Returns a gcloud command, and the flags given that it does not take."""
  line = shlex.join(call[1:])
  [command] = [name for name in FLAGS if f'{line} '.startswith(f'{name} ')]
  given = {word.split('=')[0] for word in call if word.startswith('--')}
  known = {*FLAGS[command].split(), *EVERYWHERE}
  return command, given - {f'--{name}' for name in known}


def test_gcloud_knows_the_flags(cloud):
  """Of what the scripts run, and of what their README says."""
  calls = []
  for script in SCRIPTS:
    calls += pasted(cloud.run(script, '--dry_run').stdout)
  calls = [call for call in calls if call[0] == 'gcloud']
  text = (ROOT / 'experiments' / 'tpu_vm' / 'README.md').read_text()
  text = text.replace('\\\n', '')
  said = re.findall('^    (gcloud .*)|`(gcloud [^`]*)`', text, re.MULTILINE)
  assert len(said) == 4
  calls += [shlex.split(block or inline) for block, inline in said]
  found = [unknown_flags(call) for call in calls]
  assert {command for command, _ in found} == FLAGS.keys()
  for command, flags in found:
    assert not flags, command


@pytest.mark.parametrize('script', ['create', 'install', 'start', 'collect'])
def test_what_is_printed_is_what_runs(tpu, script):
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


@pytest.mark.parametrize(
  'codes, code', [('143 0', 0), ('134 0', 0), ('130 3', 1), ('134 1', 1)]
)
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
  'code, restarts, requeued',
  [(0, 0, False), (130, 9, True), (143, 9, True), (1, 0, False)]
  + [(2, 0, False), (134, 0, True), (134, 2, True), (134, 3, False)],
)
def test_slurm_job(cloud, code, restarts, requeued):
  args = ['--config', "it's one.py", '--workdir', 'two  words']
  done = subprocess.run(
    ['bash', ROOT / 'experiments' / 'slurm' / 'train.sbatch', *args],
    env={
      'PATH': cloud.path,
      'SLURM_JOB_ID': '7',
      'SLURM_RESTART_COUNT': str(restarts),
      'SRUN_EXITS': str(code),
    },
    capture_output=True,
    text=True,
  )
  assert done.returncode == code
  expected = [['srun', 'python', '-m', 'ijckd_jax.main', *args]]
  expected += [['scontrol', 'requeue', '7']] * requeued
  assert cloud.calls == expected
