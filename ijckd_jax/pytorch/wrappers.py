"""Where in a file of PyTorch its state dict is, and under which names."""

import collections
from collections.abc import Mapping
import shlex

from ijckd_jax.runtime import config_utils

# Where training code puts the state dict in its files, the likeliest first.
WRAPPERS = ('model', 'state_dict', 'model_state_dict', 'net')
AVERAGES = ('state_dict_ema', 'model_ema', 'ema')
# What DataParallel and torch.compile put before every name.
PREFIXES = ('module.', '_orig_mod.')
PARTS = ('student', 'teacher')


def unwrap(path, content, part, is_tensor, notes):
  """Returns the tensors of a file, its other state dicts and its strings.

  Args:
    path: of the file, for messages.
    content: what the file holds.
    part: key of the state dict to take; one that the file does not have may
      still be a part of what is taken, see `choose`.
    is_tensor: whether a value is a tensor.
    notes: is added to: what was taken and what was left.

  Returns:
    The tensors, the other state dicts by key, the strings by key, and the part
    that is still to be chosen: '' or `part`.

  Raises:
    config_utils.UserError: there is no state dict in it.
  """
  if not isinstance(content, Mapping):
    raise config_utils.UserError(
      f'{path} holds no state dict, but a {type(content).__name__}'
    )
  found = _state_dicts(content, is_tensor)
  # Such as {'ema': {'module': ..., 'updates': 7}}.
  deeper = {
    f'{key}.{inner}': state
    for key, value in content.items()
    if isinstance(key, str) and isinstance(value, Mapping) and key not in found
    for inner, state in _state_dicts(value, is_tensor).items()
  }
  networks = {**found, **deeper}
  taken = _asked_for(part, found, deeper)
  if taken is None:
    alone = ', as there is nothing else'
    taken = next((key for key in (*WRAPPERS, *AVERAGES) if key in found), None)
  else:
    part, alone = '', ''
  if taken is not None:
    state = networks.pop(taken)
    left = [
      key for key in content if key not in (taken, taken.partition('.')[0])
    ]
    average = f', a moving average{alone}' if _is_average(taken) else ''
    notes.append(f'took {taken!r}{average}')
  elif _is_state_dict(content, is_tensor):
    state = content
    left = [key for key, value in content.items() if not is_tensor(value)]
  else:
    raise _no_state_dict(path, content, networks)
  _note_others(networks, notes)
  others = {
    key: value
    for key, value in networks.items()
    if key in found and key not in (*WRAPPERS, *AVERAGES)
  }
  metadata = {
    key: content[key]
    for key in left
    if isinstance(key, str) and isinstance(content[key], str)
  }
  told = {*metadata, *(key.partition('.')[0] for key in networks)}
  left = [key for key in left if key not in told]
  if state is not content:
    left += [key for key, value in state.items() if not is_tensor(value)]
  if left:
    notes.append(f'left out: {", ".join(word(key) for key in left)}')

  def tensors(mapping):
    return {key: value for key, value in mapping.items() if is_tensor(value)}

  others = {key: tensors(value) for key, value in others.items()}
  return tensors(state), others, metadata, part


def _asked_for(part, found, deeper):
  """Returns the key of the state dict that a part names; None if none is."""
  beneath = [key for key in deeper if key.startswith(f'{part}.')]
  if part in found or part in deeper:
    return part
  return beneath[0] if part and len(beneath) == 1 else None


def _no_state_dict(path, content, networks):
  """Returns the UserError for a file without a state dict in a usual place."""
  keys = ', '.join(word(key) for key in list(networks or content)[:8])
  return config_utils.UserError(
    f'{path} holds no state dict, bare or under {", ".join(WRAPPERS)}; it '
    + (
      f'has state dicts under {keys}: {_choice(next(iter(networks)))} takes '
      'that one'
      if networks
      else f'has {keys or "nothing"}'
    )
  )


def _note_others(networks, notes):
  """Adds to the notes which other state dicts a file has."""
  for key in networks:
    if _is_average(key):
      notes.append(
        f'left out {word(key)}, a moving average: {_choice(key)} takes it'
      )
  beside = [word(key) for key in networks if not _is_average(key)]
  if beside:
    notes.append(f'beside it: {", ".join(beside)}')


def _state_dicts(content, is_tensor):
  """Returns those values that are state dicts, by key."""
  return {
    key: value
    for key, value in content.items()
    if isinstance(key, str) and _is_state_dict(value, is_tensor)
  }


def _is_average(key) -> bool:
  return key.partition('.')[0] in AVERAGES


def _choice(key) -> str:
  """Returns the flag that takes a part of a file."""
  return f'--part {shlex.quote(word(key))}'


def _is_state_dict(value, is_tensor):
  return (
    isinstance(value, Mapping)
    and all(isinstance(key, str) for key in value)
    and any(is_tensor(item) for item in value.values())
  )


def strip(tensors, notes):
  """Returns tensors without what DataParallel and the like put before names.

  Args:
    tensors: by name.
    notes: is added to: what was taken off.
  """
  if len(tensors) > 1 and 'n_averaged' in tensors:
    # How many models torch's AveragedModel has averaged; the rest is wrapped.
    notes.append('left out: n_averaged')
    tensors = {key: tensors[key] for key in tensors if key != 'n_averaged'}
  stripped = ''
  while prefix := next(
    (
      prefix
      for prefix in PREFIXES
      if tensors and all(name.startswith(prefix) for name in tensors)
    ),
    '',
  ):
    stripped += prefix
    tensors = {
      name.removeprefix(prefix): value for name, value in tensors.items()
    }
  if stripped:
    notes.append(f'took {stripped} off the names')
  return tensors


def choose(path, tensors, part, notes):
  """Returns the tensors of one part of a distiller, or all if it is none.

  Args:
    path: of the file, for messages.
    tensors: by name.
    part: 'student', 'teacher' or another prefix; '' for the student, if there
      is one.
    notes: is added to: what was taken and what was left.

  Raises:
    config_utils.UserError: there is no such part.
  """
  groups = collections.Counter(name.partition('.')[0] for name in tensors)
  there = [
    name for name in PARTS if any(key.startswith(f'{name}.') for key in tensors)
  ]
  part = part or (there[0] if there else '')
  if not part:
    return tensors
  chosen = {
    name.removeprefix(f'{part}.'): value
    for name, value in tensors.items()
    if name.startswith(f'{part}.')
  }
  if not chosen:
    names = ', '.join(f'{word(name)}.*' for name in list(groups)[:8])
    raise config_utils.UserError(
      f'{path} has no part {part!r}: its tensors are {names}'
      + (', ...' if len(groups) > 8 else '')
    )
  notes.append(f'took {part}.*')
  for name in there:
    if name != part:
      notes.append(
        f'left out {name}.* ({groups[name]} tensors): --part {name} takes it'
      )
  beside = [word(name) for name in groups if name not in (part, *there)]
  if beside:
    notes.append(f'left out, beside {part}.*: {", ".join(beside)}')
  return strip(chosen, notes)


def word(key) -> str:
  """Returns a name out of a file as it may be printed."""
  if not isinstance(key, str):
    return f'({type(key).__name__})'
  text = repr(key)[1:-1]
  return text if len(text) <= 80 else f'{text[:77]}...'
