"""What a compiled program costs, by hand; and how the command fails."""

import json
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest

from ijckd_jax import compile as compile_lib
from ijckd_jax import config_utils
from ijckd_jax import cost
from ijckd_jax import parallel
from ijckd_jax import roofline

ROOT = pathlib.Path(__file__).parents[1]
DIGITS = str(ROOT / 'configs' / 'digits.py')

# A map of 64 x 8 x 128 bfloat16 is 131,072 bytes.
PROGRAM = """\
HloModule step, is_scheduled=true, num_partitions=4

%inside (p: bf16[64,8,128]) -> bf16[64,8,128] {
  %p = bf16[64,8,128]{2,1,0} parameter(0)
  ROOT %twice = bf16[64,8,128]{2,1,0} add(%p, %p)
}

%body (state: (s32[], bf16[64,8,128])) -> (s32[], bf16[64,8,128]) {
  %state = (s32[]{:T(128)}, bf16[64,8,128]{2,1,0:T(8,128)(2,1)}) parameter(0)
  %map = bf16[64,8,128]{2,1,0:T(8,128)(2,1)} get-tuple-element(%state), index=1
  ROOT %turned = bf16[64,8,128]{2,1,0:T(8,128)(2,1)} fusion(%map), kind=kLoop, \
calls=%inside
}

%condition (s: (s32[], bf16[64,8,128])) -> pred[] {
  %s = (s32[]{:T(128)}, bf16[64,8,128]{2,1,0:T(8,128)(2,1)}) parameter(0)
  %limit = s32[]{:T(128)} constant(5)
  %counter = s32[]{:T(128)} get-tuple-element(%s), index=0
  ROOT %less = pred[]{:T(512)} compare(%counter, %limit), direction=LT
}

%slices (q: bf16[64,8,128]) -> bf16[16,8,128] {
  %q = bf16[64,8,128]{2,1,0:T(8,128)(2,1)} parameter(0)
  %zero = s32[]{:T(128)} constant(0)
  ROOT %part = bf16[16,8,128]{2,1,0:T(8,128)(2,1)} dynamic-slice(%q, %zero, \
%zero, %zero), dynamic_slice_sizes={16,8,128}
}

ENTRY %main (x: bf16[64,8,128], w: f32[100]) -> bf16[64,8,128] {
  %x = bf16[64,8,128]{2,1,0:T(8,128)(2,1)} parameter(0), metadata={op_name="x"}
  %w = f32[5,100]{1,0:T(8,128)} parameter(1)
"""


def traffic(*lines):
  return roofline.traffic(PROGRAM + '\n'.join(f'  {x}' for x in lines) + '\n}')


MAP = 64 * 8 * 128 * 2
HBM = 'bf16[64,8,128]{2,1,0:T(8,128)(2,1)}'
VMEM = 'bf16[64,8,128]{2,1,0:T(8,128)(2,1)S(1)}'


def test_an_operation_reads_its_operands_and_writes_its_result():
  moved = traffic(f'ROOT %y = {HBM} fusion(%x, %x), kind=kLoop, calls=%inside')
  assert moved == roofline.Traffic(hbm=3 * MAP)


def test_what_lies_on_chip_is_not_hbm():
  moved = traffic(f'ROOT %y = {VMEM} fusion(%x), kind=kLoop, calls=%inside')
  assert moved == roofline.Traffic(hbm=MAP, on_chip=MAP)


def test_an_array_fills_whole_tiles():
  """(5, 100) float32 lies in one tile of (8, 128)."""
  moved = traffic('ROOT %y = f32[5,100]{1,0:T(8,128)} fusion(%w), kind=kLoop')
  assert moved == roofline.Traffic(hbm=2 * 8 * 128 * 4)


def test_names_for_what_is_there_move_nothing():
  moved = traffic(
    f'%t = ({HBM}, /*index=1*/{VMEM}) tuple(%x, %x)',
    f'%g = {HBM} get-tuple-element(%t), index=0',
    f'%b = {HBM} bitcast(%g)',
    f'ROOT %c = {VMEM} custom-call(%b), custom_call_target="ConcatBitcast"',
  )
  assert moved == roofline.Traffic()


def test_bringing_a_map_on_chip_is_one_read_of_hbm():
  moved = traffic(
    f'%start = ({VMEM}, {HBM}, u32[]{{:S(2)}}) copy-start(%x)',
    f'%done = {VMEM} copy-done(%start)',
    f'ROOT %y = {VMEM} fusion(%done), kind=kLoop, calls=%inside',
  )
  assert moved == roofline.Traffic(hbm=MAP, on_chip=3 * MAP)


def test_bringing_a_slice_on_chip_reads_the_slice():
  quarter = 'bf16[16,8,128]{2,1,0:T(8,128)(2,1)S(1)}'
  moved = traffic(
    f'%start = (({HBM}), {quarter}, s32[]{{:S(2)}}) slice-start(%x), '
    'slice={[0:16], [0:8], [0:128]}',
    f'ROOT %done = {quarter} slice-done(%start)',
  )
  assert moved == roofline.Traffic(hbm=MAP / 4, on_chip=MAP / 4)


@pytest.mark.parametrize(
  'known', ['', ', backend_config={"known_trip_count":{"n":"5"}}']
)
def test_a_loop_counts_as_often_as_it_turns(known):
  """By XLA's word, or by what its condition counts up to."""
  shapes = f'(s32[]{{:T(128)}}, {HBM})'
  lines = [
    f'%t = {shapes} tuple(%x)',
    f'ROOT %loop = {shapes} while(%t), condition=%condition, body=%body{known}',
  ]
  assert traffic(*lines) == roofline.Traffic(hbm=5 * 2 * MAP)
  text = PROGRAM + '\n'.join(f'  {line}' for line in lines) + '\n}'
  assert roofline.loop_turns(text) == [5]


def test_a_fusion_that_takes_a_slice_reads_the_slice():
  result = HBM.replace('64', '16')
  moved = traffic(f'ROOT %y = {result} fusion(%x), kind=kLoop, calls=%slices')
  assert moved == roofline.Traffic(hbm=2 * MAP / 4)


@pytest.mark.parametrize(
  'lines',
  [
    [f'ROOT %sum = ({HBM}, {HBM}) all-reduce(%x, %x), to_apply=%inside'],
    [
      f'%sum = ({HBM}, {HBM}) all-reduce-start(%x, %x), to_apply=%inside',
      f'ROOT %done = ({HBM}, {HBM}) all-reduce-done(%sum)',
    ],
  ],
)
def test_an_all_reduce_is_one_whether_it_waits_or_not(lines):
  """Of two maps on a ring of four, by hand: 2 x 3/4 of both."""
  moved = traffic(*lines)
  assert moved.collectives == 1
  assert moved.reduced == 2 * MAP
  assert moved.interconnect == 1.5 * 2 * MAP


def test_gathering_sends_a_part_to_all_others():
  whole = HBM.replace('64', '256')
  moved = traffic(f'ROOT %y = {whole} all-gather(%x), dimensions={{0}}')
  assert moved.interconnect == 3 * MAP


def test_the_roofline_by_hand():
  """197 GFLOP take a v5e a millisecond, and 819 MB as well."""
  chip = roofline.CHIPS['v5e']
  by_memory = roofline.bound(197e9, 2 * 819e6, chip)
  assert by_memory.compute_seconds == pytest.approx(1e-3)
  assert by_memory.seconds == pytest.approx(2e-3)
  assert by_memory.side == 'memory'
  assert roofline.bound(394e9, 819e6, chip).side == 'arithmetic'


@pytest.mark.parametrize(
  'value, said',
  [(22.093, '22.1'), (0.012345, '0.0123'), (105965.0, '105,965'), (0, '0')],
)
def test_numbers_keep_three_digits(value, said):
  assert roofline.number(value) == said


@pytest.mark.parametrize('name', roofline.CHIPS)
def test_a_chip_says_where_its_numbers_stand(name):
  chip = roofline.CHIPS[name]
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
    compile_lib.topology_devices(topology)


def test_without_libtpu_it_says_what_to_install(monkeypatch):
  monkeypatch.setitem(sys.modules, 'libtpu', None)
  with pytest.raises(config_utils.UserError) as error:
    compile_lib.topology_devices('v5e:2x2')
  assert "pip install -e '.[tpu]'" in str(error.value)
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
    compile_lib.build(config, 4 * jax.devices())


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
  said = str(compile_lib.does_not_fit(message, config))
  assert '27.55G of the 15.75G' in said
  assert 'accumulation=2' in said and 'bfloat16' in said
  assert '\n' not in said


def test_what_the_compiler_says_else_is_passed_on():
  config = config_utils.load(DIGITS)
  said = str(compile_lib.does_not_fit('INTERNAL: no\nreason', config))
  assert 'INTERNAL: no reason' in said


@pytest.fixture(scope='module')
def exp():
  """The experiment of digits, to be mapped over what there is."""
  config = config_utils.load(DIGITS)
  config.batch_size = 8
  return compile_lib.build(config, tuple(jax.devices()))


def test_the_compiled_step_is_the_one_that_trains(exp):
  """It takes what a run would give it, and makes a step."""
  arguments = compile_lib.step_arguments(exp)
  compiled = compile_lib.compile_step(exp)
  key = arguments[3]
  zeros = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), arguments[:3])
  state, sums = compiled(
    *zeros, jax.device_put(jax.random.key(0), key.sharding)
  )
  assert state.step == 1
  assert np.isfinite(sums['loss'][0])


def test_its_arithmetic_is_that_of_forward_and_backward(exp):
  """Forward once in the teacher, thrice in the student, as XLA counts it.

  XLA leaves out what meets padding, and counts element-wise work.
  """
  state, frozen, batch, _ = compile_lib.step_arguments(exp)
  variables = {'params': state.params, 'batch_stats': state.batch_stats}
  counts = [
    cost.multiply_adds(net, *arguments)
    for net, arguments in (
      (exp.distiller.student, (variables, frozen, batch['image'])),
      (exp.distiller.teacher, (frozen, batch['image'])),
    )
  ]
  expected = 2 * (3 * counts[0] + counts[1])
  counted = compile_lib.compile_step(exp).cost_analysis()['flops']
  assert 0.6 * expected < counted < 1.3 * expected


def test_devices_of_a_mapper_are_its_mesh():
  device = jax.devices()[0]
  mapper = parallel.Mapper('shard_map', (device,))
  assert mapper.mesh.devices.tolist() == [device]


@pytest.mark.slow
def test_a_tpu_that_is_not_there(tmp_path):
  pytest.importorskip('libtpu', reason="needs pip install -e '.[tpu]'")
  out = tmp_path / 'budget.json'
  command = [sys.executable, '-m', 'ijckd_jax.compile', '--config', DIGITS]
  command += ['--topology', 'v4:2x2x1', '--images_per_chip', '32']
  done = subprocess.run(
    [*command, '--json', out],
    capture_output=True,
    check=True,
    cwd=ROOT,
    text=True,
  )
  assert done.stderr == ''
  assert 'not a measurement' in done.stdout
  found = json.loads(out.read_text())
  assert (found['num_chips'], found['devices_per_chip']) == (4, 2)
  assert found['collectives'] == 1
  # A ring of eight, and two devices a chip: 2 x 2 x 7/8 of what is summed.
  assert found['interconnect_bytes'] == pytest.approx(
    3.5 * found['reduced_bytes']
  )
  assert found['reduced_bytes'] > found['gradient_bytes']
