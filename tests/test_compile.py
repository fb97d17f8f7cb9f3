"""What a compiled step costs, by hand; and how the command fails."""

import json
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest

from ijckd_jax.evaluation import cost
from ijckd_jax.runtime import config_utils
from ijckd_jax.runtime import parallel
from ijckd_jax.training import cost_estimate
from ijckd_jax.training import experiment

ROOT = pathlib.Path(__file__).parents[1]
DIGITS = str(ROOT / 'configs' / 'digits.py')


def budget(**fields):
  """A step of 256 images on each of four v5e chips.

  197 GFLOP take a v5e a millisecond, and 819 MB as well.
  """
  given = dict(flops=197e9, bytes_accessed=819e6, peak_bytes=2e9)
  given |= dict(gradient_bytes=40e6, images=256, run_images=None)
  given |= dict(topology='v5e:2x2', num_chips=4, devices_per_chip=1)
  return cost_estimate.Budget(**given | fields)


def test_the_estimate_is_the_longer_of_arithmetic_and_memory():
  by_memory = budget(bytes_accessed=2 * 819e6)
  assert by_memory.compute_seconds == pytest.approx(1e-3)
  assert by_memory.memory_seconds == pytest.approx(2e-3)
  assert by_memory.seconds == by_memory.memory_seconds
  assert by_memory.limited_by == 'memory'
  assert by_memory.images_per_second == pytest.approx(128_000)
  by_arithmetic = budget(flops=3 * 197e9)
  assert by_arithmetic.seconds == pytest.approx(3e-3)
  assert by_arithmetic.limited_by == 'arithmetic'


def test_a_run_of_256000_steps_of_a_millisecond():
  assert budget().chip_hours is None
  found = budget(run_images=256 * 256_000)
  assert found.chip_hours == pytest.approx(256 / 3600)


def test_a_ring_sends_each_part_twice_but_one():
  """Four devices: three of four parts to sum, and three to spread the sums."""
  assert cost_estimate.ring_bytes(40e6, 4) == pytest.approx(60e6)
  assert cost_estimate.ring_bytes(40e6, 1) == 0
  assert budget().interconnect_bytes == pytest.approx(60e6)
  of_v4 = budget(topology='v4:2x2x1', devices_per_chip=2)
  assert of_v4.interconnect_bytes == pytest.approx(70e6)  # A ring of eight.


def test_the_command_says_what_the_numbers_are():
  said = cost_estimate.describe(
    budget(bytes_accessed=2 * 819e6, run_images=128_000 * 3600)
  )
  assert '4 v5e, 256 images each' in said
  assert '0.770 GFLOP per image, 1.00 ms a step' in said
  assert '6.40 MB accessed per image, 2.00 ms a step' in said
  assert '60.0 MB sent per step and device (gradients of 40.0 MB' in said
  assert 'limited by memory: 128,000 images/s per chip, 512,000 in all' in said
  assert '1.00 chip-hours for 460,800,000 training images' in said
  assert 'nothing was measured' in said and 'on-chip memory included' in said
  assert max(map(len, said.splitlines())) <= 100


@pytest.mark.parametrize(
  'value, said',
  [(22.093, '22.1'), (0.012345, '0.0123'), (105965.0, '105,965'), (0, '0')],
)
def test_numbers_keep_three_digits(value, said):
  assert cost_estimate.number(value) == said


@pytest.mark.parametrize('name', cost_estimate.CHIPS)
def test_a_chip_names_the_page_of_its_numbers(name):
  chip = cost_estimate.CHIPS[name]
  assert chip.source == f'https://cloud.google.com/tpu/docs/{name}'
  # FLOP per byte that balance a chip: all of them lie in the low hundreds.
  assert 100 < chip.flops / chip.hbm_bandwidth < 1000


@pytest.mark.parametrize(
  'topology, said',
  [
    ('v5e', 'give CHIP:SIDES such as v5e:4x4'),
    ('v5e:4', 'give CHIP:SIDES'),
    ('v5x:2x2', "unknown chip 'v5x'; did you mean 'v5"),
  ],
)
def test_no_such_topology(topology, said):
  with pytest.raises(config_utils.UserError, match=said):
    cost_estimate.topology_devices(topology)


def test_without_libtpu_it_says_what_to_install(monkeypatch):
  monkeypatch.setitem(sys.modules, 'libtpu', None)
  with pytest.raises(config_utils.UserError) as error:
    cost_estimate.topology_devices('v5e:2x2')
  assert "pip install 'ijckd_jax[tpu]'" in str(error.value)
  assert '\n' not in str(error.value)


@pytest.mark.parametrize(
  'fields, said',
  [
    ({'batch_size': 50}, '4 devices'),
    ({'batch_size': 60, 'accumulation': 4}, 'the 15 rows'),
  ],
)
def test_devices_that_cannot_share_a_batch(fields, said):
  config = config_utils.load(DIGITS)
  config.update(fields)
  with pytest.raises(config_utils.UserError, match=said):
    cost_estimate.build(config, 4 * jax.devices())


@pytest.mark.parametrize(
  'message',
  [
    'XLA:TPU compile permanent error. Ran out of memory in memory space hbm. '
    'Used 27.55G of 15.75G hbm. Exceeded hbm capacity by 11.8G.\n\nTotal:\n',
    'RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required '
    'for HLO temporaries (27.55G) exceeds available HBM (15.75G).',
  ],
)
def test_a_step_that_does_not_fit_is_told_in_one_line(message):
  config = config_utils.load(DIGITS)
  said = str(cost_estimate.does_not_fit(message, config))
  assert '27.55G of the 15.75G' in said
  assert 'accumulation=2' in said and 'bfloat16' in said
  assert '\n' not in said


def test_what_the_compiler_says_else_is_passed_on():
  config = config_utils.load(DIGITS)
  said = str(cost_estimate.does_not_fit('INTERNAL: no\nreason', config))
  assert 'INTERNAL: no reason' in said


@pytest.fixture(scope='module')
def exp():
  """The experiment of digits, to be mapped over what there is."""
  config = config_utils.load(DIGITS)
  config.batch_size = 8
  return cost_estimate.build(config, tuple(jax.devices()))


def test_the_compiled_step_is_the_one_that_trains(exp):
  """It takes what a run would give it, and makes a step."""
  arguments = cost_estimate.step_arguments(exp)
  compiled = cost_estimate.compile_step(exp)
  key = arguments[3]
  zeros = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), arguments[:3])
  state, sums = compiled(
    *zeros, jax.device_put(jax.random.key(0), key.sharding)
  )
  assert state.step == 1
  assert np.isfinite(sums['loss'][0])


@pytest.mark.parametrize(
  'fields',
  [
    {'total_epochs': 1.0, 'optimizer.warmup_epochs': 0.05},
    {'total_epochs': 5.0, 'optimizer.warmup_steps': 500},
  ],
)
def test_a_warm_up_that_fits_the_data_is_taken(fields):
  config = experiment.default_config(
    dataset='digits', teacher='', student='resnet8', method='ce'
  )
  config_utils.override(config, fields)
  tx, schedule = cost_estimate.optimizer(experiment.build(config))
  assert schedule(0) < schedule(1)


def test_its_arithmetic_is_that_of_forward_and_backward(exp):
  """Forward once in the teacher, thrice in the student, as XLA counts it.

  XLA leaves out what meets padding, and counts element-wise work.
  """
  state, frozen, batch, _ = cost_estimate.step_arguments(exp)
  variables = {'params': state.params, 'batch_stats': state.batch_stats}
  counts = [
    cost.multiply_adds(net, *arguments)
    for net, arguments in (
      (exp.distiller.run_student, (variables, frozen, batch['image'])),
      (exp.distiller.run_teachers, (frozen, batch['image'])),
    )
  ]
  expected = 2 * (3 * counts[0] + counts[1])
  counted = cost_estimate.compile_step(exp).cost_analysis()['flops']
  assert 0.6 * expected < counted < 1.3 * expected


def test_work_in_parts_is_counted_as_often_as_it_is_done():
  """XLA counts a loop once, however often it turns."""
  counts = []
  for accumulation in (1, 2, 4):
    config = config_utils.load(DIGITS)
    config.update({'batch_size': 32, 'accumulation': accumulation})
    exp = cost_estimate.build(config, tuple(jax.devices()))
    compiled = cost_estimate.compile_step(exp)
    counts.append(cost_estimate.program_cost(compiled, accumulation)[0])
  assert counts[1:] == pytest.approx(2 * [counts[0]], rel=0.2)


def test_devices_of_a_mapper_are_its_mesh():
  device = jax.devices()[0]
  mapper = parallel.Mapper('shard_map', (device,))
  assert mapper.mesh.devices.tolist() == [device]


@pytest.mark.slow
def test_a_tpu_that_is_not_there(tmp_path):
  pytest.importorskip('libtpu', reason="needs pip install -e '.[tpu]'")
  found = []
  for accumulation in (1, 2):
    out = tmp_path / f'{accumulation}.json'
    command = [
      sys.executable,
      '-m',
      'ijckd_jax',
      'estimate',
      '--config',
      DIGITS,
    ]
    command += ['--topology', 'v4:2x2x1', '--images_per_chip', '32']
    command += [f'--config.accumulation={accumulation}', '--json', out]
    done = subprocess.run(
      command, capture_output=True, check=True, cwd=ROOT, text=True
    )
    assert done.stderr == ''
    assert 'nothing was measured' in done.stdout
    found.append(json.loads(out.read_text()))
  whole, in_parts = found
  assert (whole['num_chips'], whole['devices_per_chip']) == (4, 2)
  # A ring of eight devices.
  assert whole['interconnect_bytes'] == 1.75 * whole['gradient_bytes']
  assert whole['bytes_accessed'] > whole['peak_bytes'] > 0
  assert in_parts['flops'] == pytest.approx(whole['flops'], rel=0.1)
