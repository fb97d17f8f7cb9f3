"""Files of PyTorch: every wrapping, and nothing that a file could do."""

import argparse
import collections
import fractions
import hashlib
import io
import os
import pickle
import struct
import subprocess
import sys
import zipfile

import ml_dtypes
import numpy as np
import onnx
import pytest
import safetensors.numpy

from ijckd_jax.pytorch import state_dicts
from ijckd_jax.pytorch import wrappers
from ijckd_jax.runtime import config_utils

ARRAYS = {
  'conv.weight': np.arange(24, dtype=np.float32).reshape(2, 3, 2, 2) / 7,
  'bn.num_batches_tracked': np.array(3, np.int64),
  'fc.bias': np.array([0.5, -1.5], np.float32),
}


@pytest.fixture
def torch():
  return pytest.importorskip(
    'torch', reason="needs PyTorch: pip install -e '.[parity]'"
  )


@pytest.fixture
def save(torch, tmp_path):
  """Returns a function that saves something as training code does."""

  def save_file(content, *, legacy=False, name='model.pth'):
    torch.save(
      content,
      tmp_path / name,
      _use_new_zipfile_serialization=not legacy,
    )
    return tmp_path / name

  return save_file


def tensors(torch, prefix='', arrays=ARRAYS):
  return collections.OrderedDict(
    (prefix + key, torch.from_numpy(value.copy()))
    for key, value in arrays.items()
  )


def check_equal(got, expected):
  """Names, their order, shapes, dtypes and bits."""
  assert list(got) == list(expected)
  for key, value in expected.items():
    assert got[key].dtype == value.dtype, key
    assert got[key].shape == value.shape, key
    assert got[key].tobytes() == value.tobytes(), key


def failure(path, **settings):
  """Returns the one line with which a file is refused."""
  with pytest.raises(config_utils.UserError) as error:
    state_dicts.read(path, **settings)
  message = str(error.value)
  assert str(path) in message
  assert len(message.replace(str(path), '')) < 500
  assert message.isprintable()
  return message


def test_importing_it_loads_neither_torch_nor_jax():
  script = (
    'import sys; from ijckd_jax.pytorch import state_dicts;'
    'print({"torch", "jax"} & set(sys.modules))'
  )
  result = subprocess.run(
    [sys.executable, '-c', script], capture_output=True, check=True, text=True
  )
  assert result.stdout == 'set()\n'


@pytest.mark.parametrize('suffix', ['.safetensors', '.pth', '.pt'])
def test_round_trip(request, tmp_path, suffix):
  if suffix != '.safetensors':
    request.getfixturevalue('torch')
  path = tmp_path / f'weights{suffix}'
  path.write_bytes(b'what was there before')
  state_dicts.write(path, ARRAYS)
  got = state_dicts.read(path)
  # safetensors sorts by the size of the type and the name.
  assert got.arrays.keys() == ARRAYS.keys()
  check_equal({key: got.arrays[key] for key in ARRAYS}, ARRAYS)
  assert (got.other, got.metadata, got.notes) == ({}, {}, ())
  assert got.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
  assert got.sha256 == state_dicts.sha256(path)
  assert list(tmp_path.iterdir()) == [path]


def test_what_is_written_is_as_torch_would(torch, tmp_path):
  path = tmp_path / 'weights.pth'
  arrays = {
    'half': np.array([1.5], np.float16),
    'brain': np.array([1.5, -3], ml_dtypes.bfloat16),
    'double': np.arange(6.0).reshape(2, 3).T,
    'flag': np.array([True, False]),
  }
  state_dicts.write(path, arrays, {'licence': 'mit'})
  content = torch.load(path, weights_only=True)
  assert type(content) is collections.OrderedDict
  expected = {
    'half': torch.tensor([1.5], dtype=torch.float16),
    'brain': torch.tensor([1.5, -3], dtype=torch.bfloat16),
    'double': torch.arange(6, dtype=torch.float64).reshape(2, 3).T,
    'flag': torch.tensor([True, False]),
  }
  assert list(content) == list(expected)
  for key, value in expected.items():
    assert content[key].dtype == value.dtype
    assert torch.equal(content[key], value)
  state_dicts.write(path, arrays, {'licence': 'mit'}, wrap=True)
  content = torch.load(path, weights_only=True)
  assert set(content) == {'state_dict', 'licence'}
  assert torch.equal(content['state_dict']['double'], expected['double'])
  got = state_dicts.read(path)
  assert got.metadata == {'licence': 'mit'}
  assert got.notes[0] == "took 'state_dict'"


def test_safetensors_metadata(tmp_path):
  path = tmp_path / 'weights.safetensors'
  state_dicts.write(path, ARRAYS, {'licence': 'mit', 'a': 'ü'})
  assert state_dicts.read(path).metadata == {'licence': 'mit', 'a': 'ü'}


@pytest.mark.parametrize('name', ['weights.bin', 'weights', 'weights.npz'])
def test_no_other_suffix_is_written(tmp_path, name):
  with pytest.raises(config_utils.UserError, match=r'\.safetensors .* \.pth'):
    state_dicts.write(tmp_path / name, ARRAYS)
  assert not list(tmp_path.iterdir())


def test_nothing_half_written_stays(tmp_path, monkeypatch):
  path = tmp_path / 'weights.safetensors'
  with pytest.raises(FileNotFoundError):
    state_dicts.write(tmp_path / 'nowhere' / path.name, ARRAYS)
  path.write_bytes(b'old')

  def full(*_):
    assert len(list(tmp_path.iterdir())) == 2
    raise OSError('no space left on device')

  monkeypatch.setattr(os, 'replace', full)
  with pytest.raises(OSError, match='no space'):
    state_dicts.write(path, ARRAYS)
  assert list(tmp_path.iterdir()) == [path]
  assert path.read_bytes() == b'old'


@pytest.mark.parametrize('legacy', [False, True])
@pytest.mark.parametrize('key', ['', *wrappers.WRAPPERS])
@pytest.mark.parametrize(
  'prefix', ['', 'module.', '_orig_mod.', 'module._orig_mod.module.']
)
def test_wrappings(torch, save, key, prefix, legacy):
  state = tensors(torch, prefix)
  if key:
    state = {'epoch': 240, key: state, 'best_acc': torch.tensor(79.4)}
  got = state_dicts.read(save(state, legacy=legacy))
  check_equal(got.arrays, ARRAYS)
  notes = [f'took {key!r}', 'left out: epoch, best_acc'] if key else []
  notes += [f'took {prefix} off the names'] if prefix else []
  assert got.notes == tuple(notes)
  assert (got.other, got.metadata) == ({}, {})


def test_a_prefix_of_some_names_is_a_module(torch, save):
  state = tensors(torch, 'module.') | {'module': torch.ones(1)}
  assert 'module.fc.bias' in state_dicts.read(save(state)).arrays


@pytest.mark.parametrize('legacy', [False, True])
def test_everything_that_training_code_saves(torch, save, legacy):
  """The `last` file of RepDistiller, with more beside it."""
  model = torch.nn.Linear(3, 2)
  optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
  model(torch.ones(1, 3)).sum().backward()
  optimizer.step()
  scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
  content = {
    'opt': argparse.Namespace(lr=0.1, trial=None, path=['a'], gpu={'id': 0}),
    'model': tensors(torch, 'module.'),
    'proj': tensors(torch, 'module.transfer.'),
    'arch': 'resnet8x4',
    'epoch': 240,
    'best_acc': torch.tensor(79.4),
    'optimizer': optimizer.state_dict(),
    'lr_scheduler': scheduler.state_dict(),
    7: 'seven',
  }
  got = state_dicts.read(save(content, legacy=legacy))
  check_equal(got.arrays, ARRAYS)
  assert list(got.other) == ['proj']
  check_equal(
    got.other['proj'],
    {f'transfer.{key}': value for key, value in ARRAYS.items()},
  )
  assert got.metadata == {'arch': 'resnet8x4'}
  assert got.notes == (
    "took 'model'",
    'beside it: proj',
    'left out: opt, epoch, best_acc, optimizer, lr_scheduler, (int)',
    'took module. off the names',
  )


@pytest.mark.parametrize('key', wrappers.AVERAGES)
def test_an_average_is_taken_only_alone(torch, save, key):
  average = tensors(torch, 'module.')
  average['n_averaged'] = torch.tensor(9)
  got = state_dicts.read(save({key: average}))
  check_equal(got.arrays, ARRAYS)
  assert got.notes == (
    f'took {key!r}, a moving average, as there is nothing else',
    'left out: n_averaged',
    'took module. off the names',
  )
  weights = {'weight': torch.ones(1)}
  got = state_dicts.read(save({key: average, 'state_dict': weights}))
  assert list(got.arrays) == ['weight']
  assert got.other == {}


def test_an_average_is_taken_where_it_is_named(torch, save):
  average = {key: np.array(value + 1) for key, value in ARRAYS.items()}
  for key in wrappers.AVERAGES:
    path = save(
      {'state_dict': tensors(torch), key: tensors(torch, '', average)}
    )
    got = state_dicts.read(path)
    check_equal(got.arrays, ARRAYS)
    assert got.notes == (
      "took 'state_dict'",
      f'left out {key}, a moving average: --part {key} takes it',
    )
    got = state_dicts.read(path, part=key)
    check_equal(got.arrays, average)
    assert got.notes == (
      f"took '{key}', a moving average",
      'beside it: state_dict',
    )


@pytest.mark.parametrize('part', ['ema', 'ema.module'])
def test_an_average_with_numbers_of_its_own(torch, save, part):
  """As an averaging class saves itself: one level further down."""
  average = {key: np.array(value + 1) for key, value in ARRAYS.items()}
  content = {
    'model': tensors(torch),
    'ema': {'module': tensors(torch, 'module.', average), 'updates': 7},
  }
  path = save(content)
  got = state_dicts.read(path)
  check_equal(got.arrays, ARRAYS)
  assert (
    'left out ema.module, a moving average: --part ema.module takes it'
    in (got.notes)
  )
  got = state_dicts.read(path, part=part)
  check_equal(got.arrays, average)
  assert got.notes[0] == "took 'ema.module', a moving average"


def test_an_average_that_is_not_finite_does_not_matter(torch, save):
  average = {key: np.array(value * np.nan) for key, value in ARRAYS.items()}
  path = save({'model': tensors(torch), 'ema': tensors(torch, '', average)})
  check_equal(state_dicts.read(path).arrays, ARRAYS)


@pytest.mark.parametrize(
  'key, quoted', [('net_g', 'net_g'), ('my net', "'my net'"), ('$x', "'$x'")]
)
def test_a_key_is_named_in_the_flag_that_takes_it(torch, save, key, quoted):
  path = save({key: tensors(torch), 'net_d': {'w': torch.ones(1)}, 'epoch': 1})
  assert f'under {key}, net_d: --part {quoted} takes that one' in failure(path)
  got = state_dicts.read(path, part=key)
  check_equal(got.arrays, ARRAYS)
  assert got.notes == (f"took '{key}'", 'beside it: net_d', 'left out: epoch')


def distiller(torch, *parts):
  state = {}
  for number, part in enumerate(parts):
    state[f'module.{part}.weight'] = torch.full((2,), float(number))
    state[f'module.{part}.fc.bias'] = torch.full((1,), float(number))
  return {'model': state, 'epoch': 1}


@pytest.mark.parametrize(
  'parts, part, taken, notes',
  [
    (
      ('student', 'teacher', 'conv_reg', 'norm'),
      '',
      0,
      (
        'took student.*',
        'left out teacher.* (2 tensors): --part teacher takes it',
        'left out, beside student.*: conv_reg, norm',
      ),
    ),
    (
      ('student', 'teacher'),
      'teacher',
      1,
      (
        'took teacher.*',
        'left out student.* (2 tensors): --part student takes it',
      ),
    ),
    (('student', 'conv_reg'), 'student', 0, ('took student.*', 'left out,')),
    (('teacher.module',), '', 0, ('took teacher.*', 'took module. off')),
    (('student',), '', 0, ('took student.*',)),
    (('teacher', 'student'), '', 1, ('took student.*', 'left out teacher.*')),
  ],
)
def test_parts_of_a_distiller(torch, save, parts, part, taken, notes):
  got = state_dicts.read(save(distiller(torch, *parts)), part=part)
  assert list(got.arrays) == ['weight', 'fc.bias']
  assert set(got.arrays['weight']) == {taken}
  start = ("took 'model'", 'left out: epoch', 'took module. off the names')
  assert got.notes[:3] == start
  assert len(got.notes[3:]) == len(notes)
  for note, expected in zip(got.notes[3:], notes, strict=True):
    assert note.startswith(expected)


def test_a_part_that_is_not_there(torch, save):
  path = save(distiller(torch, 'student', 'conv_reg'))
  message = failure(path, part='teacher')
  assert "has no part 'teacher': its tensors are student.*, conv_reg.*" in (
    message
  )
  many = {f'layer{i}.weight': torch.ones(1) for i in range(20)}
  message = failure(save(many), part='student')
  assert message.endswith('layer6.*, layer7.*, ...')


def test_parts_are_chosen_in_safetensors_too(tmp_path):
  path = tmp_path / 'weights.safetensors'
  arrays = {
    f'module.{part}.{key}': value
    for part in ('student', 'teacher')
    for key, value in ARRAYS.items()
  }
  safetensors.numpy.save_file(arrays, path)
  got = state_dicts.read(path, part='teacher')
  assert got.arrays.keys() == ARRAYS.keys()
  assert len(got.notes) == 3


@pytest.mark.parametrize(
  'content, said',
  [
    ([1, 2], 'but a list'),
    ({}, 'nothing'),
    ({'epoch': 1, 'model': {}}, 'it has epoch, model'),
    ({'model': {'epoch': 1}}, 'it has model'),
    ({'model': {3: 'tensor'}}, 'it has model'),
    ({'net_g': {'w': 'tensor'}}, 'it has state dicts under net_g'),
    ('tensor', 'but a Tensor'),
    ({3: 'tensor'}, 'it has (int)'),
    (argparse.Namespace(model=1), 'but a Namespace'),
    ({'a\nb\x1b[31m' + 'x' * 999: 1}, 'a\\nb\\x1b[31mxx'),
  ],
  ids=lambda value: str(value)[:30],
)
def test_what_holds_no_state_dict(torch, save, content, said):
  def fill(value):
    if isinstance(value, dict):
      return {key: fill(item) for key, item in value.items()}
    return torch.ones(2) if value == 'tensor' else value

  assert said in failure(save(fill(content)))


def test_entries_of_a_state_dict_that_are_no_tensors(torch, save):
  state = {**tensors(torch), 'fc._extra_state': None, 'version': 'v2'}
  got = state_dicts.read(save(state))
  check_equal(got.arrays, ARRAYS)
  assert got.notes == ('left out: fc._extra_state',)
  assert got.metadata == {'version': 'v2'}
  got = state_dicts.read(save({'model': state}))
  check_equal(got.arrays, ARRAYS)
  assert got.notes[1] == 'left out: fc._extra_state, version'


VALUES = [1.0, -0.3333, 1e-6, 0.0, 65504.0]


@pytest.mark.parametrize(
  'dtype, precision',
  [
    ('float16', 'half'),
    ('bfloat16', 'half'),
    ('float64', 'double'),
    ('float8_e4m3fn', 'low'),
  ],
)
def test_other_precisions(torch, save, tmp_path, dtype, precision):
  tensor = torch.tensor(VALUES[:4]).to(getattr(torch, dtype))
  note = f'{precision} precision ({dtype}): imported as float32'
  expected = tensor.float().numpy()
  got = state_dicts.read(save({'w': tensor, 'b': torch.ones(1)}))
  check_equal(got.arrays, {'w': expected, 'b': np.ones(1, np.float32)})
  assert got.notes == (note,)
  got = state_dicts.read(
    save({'model': {'b': torch.ones(1)}, 'proj': {'w': tensor}})
  )
  assert note in got.notes
  if dtype.startswith('float8'):
    return
  path = tmp_path / 'weights.safetensors'
  pytest.importorskip(
    'safetensors.torch', reason="needs PyTorch: pip install -e '.[parity]'"
  ).save_file({'w': tensor}, path)
  got = state_dicts.read(path)
  check_equal(got.arrays, {'w': expected})
  assert got.notes == (note,)


def test_precisions_of_safetensors_without_torch(tmp_path):
  path = tmp_path / 'weights.safetensors'
  arrays = {
    'brain': np.array(VALUES, ml_dtypes.bfloat16).reshape(5, 1),
    'double': np.array(1e-30),
    'half': np.array(VALUES, np.float16),
    'none': np.zeros((0, 3), np.float32),
  }
  safetensors.numpy.save_file(arrays, path)
  got = state_dicts.read(path)
  expected = {key: value.astype(np.float32) for key, value in arrays.items()}
  check_equal(dict(sorted(got.arrays.items())), expected)
  assert got.notes == (
    'half precision (bfloat16): imported as float32',
    'half precision (float16): imported as float32',
    'double precision (float64): imported as float32',
  )


@pytest.mark.parametrize(
  'dtype', ['int8', 'uint8', 'int16', 'uint16', 'int32', 'int64', 'bool']
)
def test_integers_stay(torch, save, tmp_path, dtype):
  array = np.array([[0, 1], [1, 1]], dtype)
  got = state_dicts.read(save({'w': torch.from_numpy(array)}))
  check_equal(got.arrays, {'w': array})
  path = tmp_path / 'weights.safetensors'
  safetensors.numpy.save_file({'w': array}, path)
  check_equal(state_dicts.read(path).arrays, {'w': array})


def test_views_of_any_kind(torch, save):
  base = torch.arange(24.0).reshape(2, 3, 4)
  parameter = torch.nn.Parameter(base[1])
  state = {
    'a': base.transpose(0, 2),
    'b': base[:, 1, ::2],
    'c': parameter,
    'd': base.expand(2, 2, 3, 4),
    'e': torch.zeros(0, 3),
    'f': base[0, 0, 2],
    'g': torch.full((1,), 1 + 2j).conj().imag,  # Negated when it is read.
  }
  got = state_dicts.read(save(state))
  check_equal(
    got.arrays,
    {
      key: value.detach().resolve_neg().numpy().copy('C')
      for key, value in state.items()
    },
  )


@pytest.mark.parametrize('value', [np.nan, np.inf, -np.inf])
def test_what_is_not_finite(torch, save, tmp_path, value):
  arrays = {**ARRAYS, 'fc.bias': np.array([1, value], np.float32)}
  said = 'the tensor fc.bias holds numbers that are not finite'
  assert said in failure(save(tensors(torch, '', arrays)))
  path = tmp_path / 'weights.safetensors'
  safetensors.numpy.save_file(arrays, path)
  assert said in failure(path)
  wrapped = {'model': tensors(torch), 'proj': tensors(torch, 'x.', arrays)}
  assert 'the tensor proj: x.fc.bias holds' in failure(save(wrapped))
  # What is not taken does not matter.
  parts = tensors(torch, 'student.') | tensors(torch, 'teacher.', arrays)
  check_equal(state_dicts.read(save(parts)).arrays, ARRAYS)


def test_what_float32_cannot_hold(torch, save, tmp_path, recwarn):
  state = {'w': torch.tensor([1e300], dtype=torch.float64)}
  assert 'not finite in float32' in failure(save(state))
  path = tmp_path / 'weights.safetensors'
  safetensors.numpy.save_file({'w': np.array([1e300])}, path)
  assert 'not finite in float32' in failure(path)
  assert not recwarn


@pytest.mark.filterwarnings('ignore')  # Of torch's, about what is deprecated.
def test_tensors_that_are_no_arrays(torch, save):
  ones = torch.ones(2, 2)
  for kind, tensor in (
    ('complex', ones.to(torch.complex64)),
    ('sparse', ones.to_sparse()),
    ('quantized', torch.quantize_per_tensor(ones, 0.1, 0, torch.qint8)),
    ('without data', torch.empty(2, device='meta')),
    ('larger than the file', torch.ones(1).expand(10**6, 10**6)),
  ):
    message = failure(save({'fine': ones, 'odd.weight': tensor}))
    assert f'the tensor odd.weight is {kind}' in message


def test_types_of_safetensors_that_are_no_arrays(tmp_path):
  path = tmp_path / 'weights.safetensors'
  safetensors.numpy.save_file({'odd': np.ones(2, np.complex64)}, path)
  assert 'the tensor odd is of type C64' in failure(path)
  safetensors.numpy.save_file({}, path)
  assert 'holds no tensors' in failure(path)


def repacked(source, target, compression=zipfile.ZIP_STORED, edit=bytes):
  """Packs the members of a zip archive again, each after an edit."""
  with (
    zipfile.ZipFile(source) as old,
    zipfile.ZipFile(target, 'w', compression) as new,
  ):
    for name in old.namelist():
      new.writestr(name, edit(old.read(name)), compress_type=compression)
  return target


def test_a_file_that_would_grow(torch, save, tmp_path, monkeypatch):
  """It is refused before anything of it is unpacked."""
  path = save({'w': torch.zeros(10**6)})
  small = repacked(path, tmp_path / 'small.pth', zipfile.ZIP_DEFLATED)
  assert small.stat().st_size < 10_000
  torch.load(small)  # It is no dud.
  monkeypatch.setattr(torch, 'load', None)
  monkeypatch.setattr(zipfile.ZipFile, 'testzip', None)
  assert 'would become 4,000,' in failure(small)


def test_members_that_overlap(torch, save, tmp_path):
  """A hundred names of one stored member, as a zip bomb has them."""
  data = save({'w': torch.zeros(10**5)}).read_bytes()
  end = data.rindex(b'PK\5\6')
  size, start = struct.unpack('<II', data[end + 12 : end + 20])
  directory = data[start : start + size]
  count = 100 * struct.unpack('<H', data[end + 10 : end + 12])[0]
  path = tmp_path / 'overlap.pth'
  path.write_bytes(
    data[:start]
    + 100 * directory
    + struct.pack(
      '<4s4HIIH', b'PK\5\6', 0, 0, count, count, 100 * size, start, 0
    )
  )
  assert 'would become 40,' in failure(path)


def test_a_file_packed_again_without_compression(torch, save, tmp_path):
  path = save(tensors(torch))
  stored = repacked(path, tmp_path / 'stored.pth', zipfile.ZIP_STORED)
  check_equal(state_dicts.read(stored).arrays, ARRAYS)


@pytest.mark.parametrize(
  'view',
  [
    lambda base: base[:1].expand(2**18),
    lambda base: base.reshape(512, 512).t(),
    lambda base: base.reshape(4, -1)[:, ::2],
    lambda base: base.view(2, -1).mT,
  ],
)
def test_many_views_of_few_numbers(torch, save, view):
  base = torch.zeros(2**18)
  state = {f'w{i}': view(base) for i in range(100)}
  message = failure(save(state))
  assert 'they are views of the same numbers' in message
  few = dict(list(state.items())[:3])
  assert len(state_dicts.read(save(few)).arrays) == 3


def test_names_of_the_same_tensor(torch, save):
  """They take no memory of their own, however many they are."""
  shared = torch.arange(2.0**18)
  got = state_dicts.read(save({f'w{i}': shared for i in range(100)}))
  assert all(array.sum() == shared.sum() for array in got.arrays.values())


BESIDE = {
  'epoch': np.float64(3.5),
  'best_acc': np.int64(7),
  'lr': np.float32(0.1),
  'done': np.bool_(True),
  'when': np.datetime64('2020-01-01'),
  'who': np.str_('me'),
  'curve': np.arange(6).reshape(2, 3)[:, ::2],
  'names': np.array(['a', 'bc']),
  'dtype': np.dtype([('a', 'f4'), ('b', 'i2', (2,))]),
  'nested': {'list': [np.float64(1), (np.int32(2), np.zeros(()))]},
}


@pytest.mark.parametrize('legacy', [False, True])
@pytest.mark.parametrize('core', ['core', '_core'])
def test_numbers_of_numpy_beside_the_weights(
  torch, save, tmp_path, legacy, core
):
  path = save({'state_dict': tensors(torch), **BESIDE}, legacy=legacy)
  # NumPy 1 has it in numpy.core, NumPy 2 in numpy._core.
  here = np.float64(1).__reduce__()[0].__module__

  def edit(data):
    return data.replace(here.encode(), f'numpy.{core}.multiarray'.encode())

  if legacy:
    path.write_bytes(edit(path.read_bytes()))
  else:
    path = repacked(path, tmp_path / 'edited.pth', edit=edit)
  got = state_dicts.read(path)
  check_equal(got.arrays, ARRAYS)
  assert got.notes == (
    "took 'state_dict'",
    f'left out: {", ".join(BESIDE)}',
  )


def test_a_number_of_numpy_is_no_way_to_code(forge):
  """Neither by its arguments nor by its state; objects are looked up first."""
  for opcodes in (
    # scalar(dtype, os.system) and ndarray with a state of os.system.
    b'cnumpy._core.multiarray\nscalar\n(cposix\nsystem\ntR.',
    b'cnumpy.dtype\n(cposix\nsystem\ntR.',
    b'cnumpy\ndtype\n)\x81cposix\nsystem\nb.',
    # Other functions of NumPy stay out.
    b'cnumpy\nload\n(X\x01\0\0\0xtR.',
    b'cnumpy\nfromfile\n(X\x01\0\0\0xtR.',
  ):
    message = failure(forge(opcodes))
    assert 'needs more than weights' in message or 'damaged' in message


def test_weights_of_numpy_are_no_weights(torch, save):
  """They are not read, so a file of them alone has none."""
  assert 'holds no state dict' in failure(save({'model': {'w': np.ones(2)}}))


def run_me(path):
  """Stands for whatever a pickle could call."""
  open(path, 'w').close()


class Malicious:
  def __init__(self, path):
    self.path = path

  def __reduce__(self):
    return run_me, (str(self.path),)


@pytest.mark.parametrize('legacy', [False, True])
@pytest.mark.parametrize(
  'place', ['bare', 'beside', 'inside', 'namespace', 'key']
)
def test_code_is_never_run(torch, save, tmp_path, place, legacy):
  mark = tmp_path / 'was_here'
  bad = Malicious(mark)
  path = save(
    {
      'bare': bad,
      'beside': {'model': tensors(torch), 'opt': bad},
      'inside': {'model': tensors(torch) | {'x': bad}},
      'namespace': {'model': tensors(torch), 'opt': argparse.Namespace(x=bad)},
      'key': {bad: tensors(torch)},
    }[place],
    legacy=legacy,
  )
  message = failure(path)
  assert f'needs more than weights: {__name__}.run_me;' in message
  assert 'weights_only=False' in message and '.safetensors' in message
  assert not mark.exists()
  torch.load(path, weights_only=False)  # It is no dud.
  assert mark.exists()


@pytest.mark.parametrize('protocol', range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_bare_pickle_is_never_run(torch, tmp_path, protocol, recwarn):
  mark = tmp_path / 'was_here'
  path = tmp_path / 'model.pth'
  path.write_bytes(pickle.dumps({'w': Malicious(mark)}, protocol))
  failure(path)
  assert not mark.exists()
  assert not recwarn  # Torch warns of the protocol, before it refuses.
  pickle.loads(path.read_bytes())
  assert mark.exists()


def test_a_pickle_of_others(torch, tmp_path):
  path = tmp_path / 'model.pkl'
  path.write_bytes(pickle.dumps({'w': 1}, 2))
  assert 'is a pickle, but not one that torch.save wrote' in failure(path)
  path.write_bytes(pickle.dumps({'w': np.ones(2)}))
  assert 'not a checkpoint that torch.save wrote' in failure(path)


def test_all_that_a_file_wants_is_named(torch, save):
  content = {'a': os.getcwd, 'b': fractions.Fraction(1, 2)}
  message = failure(save(content))
  assert 'posix.getcwd' in message and 'fractions.Fraction' in message
  model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.ReLU())
  message = failure(save(model))
  assert 'torch.nn.modules.linear.Linear' in message
  assert 'x.state_dict()' in message


@pytest.mark.filterwarnings('ignore')  # TorchScript is deprecated.
def test_a_program(torch, tmp_path):
  path = tmp_path / 'model.pt'
  torch.jit.trace(torch.nn.ReLU(), torch.ones(1)).save(path)
  message = failure(path)
  assert 'is a program (TorchScript)' in message
  assert 'torch.jit.load(FILE).state_dict()' in message


@pytest.fixture
def forge(save, torch):
  """Returns a function that puts any pickle in a file of torch.save."""

  def forge_file(opcodes):
    path = save({'w': torch.ones(1)})
    with zipfile.ZipFile(path) as archive:
      content = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, 'w') as archive:
      for name, data in content.items():
        data = opcodes if name.endswith('data.pkl') else data
        archive.writestr(name, data)
    return path

  return forge_file


def text(value):
  return b'X' + len(value).to_bytes(4, 'little') + value.encode()


NAMESPACE = b'cargparse\nNamespace\n'


def attempt(attribute, value, argument):
  """Returns a pickle that gives a Namespace an attribute, and builds again."""
  return (
    b'\x80\x02'
    + (NAMESPACE + b')\x81')
    + (b'}' + text(attribute) + value + b's' + b'b')
    + (argument + b'b')
    + b'.'
  )


@pytest.mark.parametrize(
  'name',
  [
    *('builtins\nexec', 'os\nsystem', 'posix\nsystem', 'builtins\ngetattr'),
    *('argparse\n_sys', 'argparse\nNamespace.__init__', 'argparse\nFileType'),
    *('argparse\nNamespace.__init__.__globals__', 'sys\nmodules'),
    *('builtins\nopen', 'torch\nload', 'torch.serialization\nload'),
  ],
)
def test_a_namespace_gets_at_no_function(forge, name):
  """It may have a `__setstate__`, which the unpickler would call."""
  message = failure(
    forge(attempt('__setstate__', f'c{name}\n'.encode(), text('argument')))
  )
  # Python 2's names are translated to today's.
  wanted = name.replace('\n', '.').replace('builtins.', '')
  assert wanted in message and 'needs more than weights' in message


def test_a_namespace_calls_only_what_any_file_may(forge):
  """Which has no effect but in memory: here an array of bytes."""
  path = forge(attempt('__setstate__', b'cbuiltins\nbytearray\n', b'K\x04'))
  assert 'but a Namespace' in failure(path)


@pytest.mark.parametrize(
  'opcodes',
  [
    b'\x80\x02' + NAMESPACE + text('x') + b'\x85R.',  # Called with 'x'.
    b'\x80\x02' + NAMESPACE + b')\x81K\x01b.',  # Built with 1.
    b'\x80\x02' + NAMESPACE + b'}' + text('x') + b'K\x01sb.',  # The class.
    b'\x80\x02' + NAMESPACE + b')\x81' + text('x') + b'K\x01s.',  # An item.
    b'\x80\x02}' + NAMESPACE + b')\x81K\x01s.',  # A key, though unhashable.
    attempt('__class__', b'ccollections\nOrderedDict\n', b'K\x01'),
    b'\x80\x02)Q.',
    b'\x80\x02}Q.',
    b'\x80\x02' + b'(' * 9 + b'.',
    b'\x80\x02(l.',
    b'\x80\x02' + b']' + b'\x85' * 200_000 + b'.',
    b'\x80\x02cbuiltins\nbytearray\n\x8a\x07' + b'\x7f' * 7 + b'\x85R.',
    b'\x80\x02ctorch\nTensor\n\x8a\x07' + b'\x7f' * 7 + b'\x85R.',
    b'\x80\x02cnowhere\x1b[31m\nx\n.',
    b'\x80\x02c\xff\nx\n.',
    b'.',
    b'',
  ],
  ids=lambda opcodes: repr(opcodes[:30]),
)
def test_nonsense(forge, opcodes):
  failure(forge(opcodes))


@pytest.mark.parametrize('kind', ['zip', 'legacy', 'safetensors'])
def test_a_file_that_ends_early(request, tmp_path, kind):
  whole = tmp_path / 'whole.safetensors'
  if kind == 'safetensors':
    safetensors.numpy.save_file(ARRAYS, whole)
  else:
    torch = request.getfixturevalue('torch')
    content = {'model': tensors(torch), 'opt': argparse.Namespace(lr=0.1)}
    whole = request.getfixturevalue('save')(content, legacy=kind == 'legacy')
  state_dicts.read(whole)
  data = whole.read_bytes()
  path = tmp_path / f'cut{whole.suffix}'
  said = collections.Counter()
  lengths = range(0, len(data), max(1, len(data) // 150))
  for length in {*lengths, *range(40), len(data) - 1}:
    path.write_bytes(data[:length])
    said['cut off' in failure(path)] += 1
  # But for none to eight bytes, which could be those of anything.
  assert said[False] <= 9


@pytest.mark.parametrize('kind', ['zip', 'legacy', 'safetensors'])
def test_bytes_that_changed(request, tmp_path, kind):
  """What is wrong is said in one line; what is read is finite."""
  path = tmp_path / 'whole.safetensors'
  if kind == 'safetensors':
    safetensors.numpy.save_file(ARRAYS, path)
  else:
    torch = request.getfixturevalue('torch')
    content = {'model': tensors(torch), 'opt': argparse.Namespace(lr=0.1)}
    path = request.getfixturevalue('save')(content, legacy=kind == 'legacy')
  data = path.read_bytes()
  rng = np.random.default_rng(0)
  refused = 0
  for _ in range(150):
    changed = np.frombuffer(data, np.uint8).copy()
    where = rng.integers(0, len(data), 3)
    changed[where] = rng.integers(0, 256, 3)
    path.write_bytes(changed.tobytes())
    try:
      arrays = state_dicts.read(path).arrays
    except config_utils.UserError as error:
      assert str(error).isprintable()
      refused += 1
    else:
      assert all(np.isfinite(array).all() for array in arrays.values())
  assert 20 < refused < 150


def zipped(*names):
  """Returns a zip archive with empty files of these names."""
  stream = io.BytesIO()
  with zipfile.ZipFile(stream, 'w') as archive:
    for name in names:
      archive.writestr(name, b'')
  return stream.getvalue()


def onnx_model(**fields):
  """Returns a model that computes nothing."""
  graph = onnx.helper.make_graph([], 'graph', [], [])
  return onnx.helper.make_model(graph, **fields).SerializeToString()


def test_what_is_no_checkpoint(torch, tmp_path):
  path = tmp_path / 'model.pth'
  np.savez(tmp_path / 'arrays.npz', w=np.ones(2))
  for content, said in (
    (b'', 'is empty'),
    (b'hello, world\n', 'it is a text'),
    (('x' + 'ö' * 300).encode(), 'it is a text'),
    (b'{"mode":{"w": 1}}', 'it is a text'),
    (b'P', 'it has only 1 bytes'),
    (b'\n<!DOCTYPE html>\n<html>', 'it is a web page'),
    (b'version https://git-lfs.github.com/spec/v1\n', 'git lfs pull'),
    (b'\x89PNG\r\n\x1a\n' + b'\0' * 50, 'it is a PNG image'),
    (b'\x1f\x8b\x08' + b'\0' * 50, 'compressed by gzip'),
    (b'x.pth' + b'\0' * 252 + b'ustar' + b'\0' * 99, 'it is a tar archive'),
    (b'\x93NUMPY' + b'\xff' * 50, 'an array of NumPy'),
    (b'\xef\xbb\xbf<!DOCTYPE html><html>', 'it is a web page'),
    (b'<!-- a comment -->\n<html lang="en">', 'it is a web page'),
    (b'<?xml version="1.0"?><Error><Code>AccessDenied', 'it is a web page'),
    (b'<head><title>Sign in</title>', 'it is a web page'),
    (b'version https://git-lfs.github.com/spec/v1\n', 'a Git LFS pointer'),
    (b'\x89HDF\r\n\x1a\n' + b'\0' * 50, 'such as Keras writes'),
    (b'\x1c\0\0\0TFL3' + b'\0' * 50, 'a model of TensorFlow Lite'),
    (onnx_model(), 'it is an ONNX model'),
    (onnx_model(producer_name='pytorch'), 'it is an ONNX model'),
    # saved_model_schema_version: 1, meta_graphs: {...}
    (b'\x08\x01\x12\xa0\x0b\n' + b'\0' * 50, 'a SavedModel of TensorFlow'),
    (zipped('model.weights.h5', 'config.json'), 'it is a model of Keras'),
    (
      zipped('a/net.pth', 'a/readme.txt'),
      'unpack it first, it holds a/net.pth',
    ),
    (zipped('word/document.xml'), 'it holds word/document.xml'),
    (zipped(), 'it holds nothing'),
    (bytes(range(200)), 'no known format'),
    ((tmp_path / 'arrays.npz').read_bytes(), 'it is an .npz file of NumPy'),
  ):
    path.write_bytes(content)
    assert said in failure(path)
    safe = path.with_suffix('.safetensors')
    safe.write_bytes(content)
    assert said in failure(safe)
  assert 'is a folder' in failure(tmp_path)
  assert 'there is no file' in failure(tmp_path / 'nowhere.pth')
  assert 'there is no file' in failure(tmp_path / 'nowhere.safetensors')


def test_the_content_counts_not_the_suffix(torch, save, tmp_path):
  path = save(tensors(torch), name='weights.safetensors')
  check_equal(state_dicts.read(path).arrays, ARRAYS)
  path = tmp_path / 'weights.bin'
  safetensors.numpy.save_file(ARRAYS, path)
  assert state_dicts.read(path).arrays.keys() == ARRAYS.keys()


def test_without_torch(tmp_path, monkeypatch):
  monkeypatch.setitem(sys.modules, 'torch', None)
  path = tmp_path / 'weights.safetensors'
  state_dicts.write(path, ARRAYS)
  assert state_dicts.read(path).arrays.keys() == ARRAYS.keys()
  for start in (b'PK\x03\x04', b'\x80\x02\x8a'):
    path = tmp_path / 'weights.pth'
    path.write_bytes(start + b'\0' * 99)
    message = failure(path)
    assert "pip install 'ijckd_jax[torch]'" in message
    assert 'give a .safetensors file' in message
  with pytest.raises(config_utils.UserError, match='PyTorch is needed'):
    state_dicts.write(tmp_path / 'other.pth', ARRAYS)
  assert not (tmp_path / 'other.pth').exists()


def test_with_a_torch_that_strangers_can_fool(torch, save, monkeypatch):
  path = save(tensors(torch))
  version = torch.torch_version.TorchVersion('2.9.1')
  monkeypatch.setattr(torch, '__version__', version)
  assert 'torch >= 2.10' in failure(path)


def test_what_a_user_allowed_stays_allowed(torch, save):
  """Only Namespace is allowed, and only while a file is read."""
  before = set(torch.serialization.get_safe_globals())
  state_dicts.read(save(tensors(torch)))
  failure(save(Malicious('nowhere')))
  assert set(torch.serialization.get_safe_globals()) == before


@pytest.mark.parametrize('offset', [0.3, 0.5, 0.7])
def test_flipped_bits_of_a_tensor_are_seen(torch, tmp_path, offset):
  """torch.load would not look at the archive's checksums."""
  path = tmp_path / 'net.pth'
  torch.save({'weight': torch.ones(4000), 'bias': torch.ones(4000)}, path)
  data = bytearray(path.read_bytes())
  data[int(offset * len(data))] ^= 1
  path.write_bytes(data)
  with pytest.raises(config_utils.UserError, match='another checksum'):
    state_dicts.read(path)
