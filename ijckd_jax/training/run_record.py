"""What a run is made of beside its config: its data, its code, the versions.

The record lies in the run's folder. A run goes on, or is shown, on the data
that it began with only, and goes on with the teachers that it began with only;
it may go on with other code, and says so.
"""

from collections.abc import Mapping
from collections.abc import Sequence
import dataclasses
import hashlib
import importlib.metadata
import importlib.util
import json
import pathlib
import platform
from typing import Any
import zlib

from etils import epath
import jax
import ml_collections
import numpy as np

from ijckd_jax.runtime import config_utils
from ijckd_jax.runtime import disk
from ijckd_jax.runtime import hosts
from ijckd_jax.runtime import workdirs

PACKAGES = ('ijckd_jax', 'jax', 'flax', 'optax', 'orbax-checkpoint')
# JAX's settings that change numbers, with their defaults.
SETTINGS = {
  'jax_default_matmul_precision': None,
  'jax_default_prng_impl': 'threefry2x32',
  'jax_enable_x64': False,
  'jax_numpy_dtype_promotion': 'standard',
  'jax_threefry_partitionable': True,
}


def versions() -> dict[str, str]:
  """Returns the versions that a run's numbers may depend on.

  Those of packages, and JAX's settings that are not the default.
  """
  settings = {name: getattr(jax.config, name) for name in SETTINGS}
  return {
    'python': platform.python_version(),
    **{name: importlib.metadata.version(name) for name in PACKAGES},
    **{
      name: str(value)
      for name, value in settings.items()
      if value != SETTINGS[name]
    },
  }


def make(
  dataset: Any, splits: Mapping[str, Any], config: ml_collections.ConfigDict
) -> dict[str, Any]:
  """Returns the record of a run, as JSON.

  Args:
    dataset: see datasets.
    splits: its examples by split.
    config: the run's, which may name modules outside the package.
  """
  return {
    'data': {
      'splits': {
        split: {'images': len(arrays), 'digest': arrays.digest()}
        for split, arrays in splits.items()
      },
      'class_names': [str(name) for name in dataset.class_names],
      'image_shape': list(map(int, dataset.image_shape)),
      'mean': list(map(float, dataset.mean)),
      'std': list(map(float, dataset.std)),
      'crop_padding': getattr(dataset, 'crop_padding', None),
      'flip': getattr(dataset, 'flip', None),
    },
    'code': {'ijckd_jax': hosts.digest_of_code(), **modules(config)},
    'versions': versions(),
    'files': list(workdirs.CONTENTS),
  }


def modules(config) -> dict[str, str]:
  """Returns a hash of each module's file that a config names."""
  found = {}
  for value in config_utils.flatten(config.to_dict()).values():
    for name in value if isinstance(value, list | tuple) else (value,):
      module, separator, _ = str(name).partition(':')
      if not separator or not all(map(str.isidentifier, module.split('.'))):
        continue
      try:
        path = importlib.util.find_spec(module).origin
        data = pathlib.Path(path).read_bytes()
      except (AttributeError, ImportError, OSError, TypeError, ValueError):
        continue  # A path with a colon, say.
      found[module] = hashlib.sha256(data).hexdigest()[:16]
  return found


def data_changes(folder: epath.Path, record: Mapping[str, Any]) -> list[str]:
  """Returns a sentence for each difference of a run's data from a record."""
  old, new = _read(folder).get('data'), record['data']
  if not isinstance(old, dict):
    return []
  changes = []
  for split, now in new['splits'].items():
    was = old.get('splits', {}).get(split, {})
    if was.get('images') != now['images']:
      changes.append(
        f'{split} had {was.get("images")} images and has {now["images"]}'
      )
    elif was.get('digest') != now['digest']:
      changes.append(f'{split} has other images or labels')
  for field in new.keys() - {'splits'}:
    # Records of older versions lack the last ones.
    was = old.get(field, new[field])
    if was != new[field]:
      was, now = config_utils.short(was), config_utils.short(new[field])
      changes.append(f'{field} was {was} and is {now}')
  return changes


def check_data(folder: epath.Path, record: Mapping[str, Any]) -> None:
  """Raises UserError where a folder's run has been made on other data."""
  changes = data_changes(folder, record)
  if changes:
    raise config_utils.UserError(
      f'{folder} holds a run on other data ({"; ".join(changes)}): put its '
      'data back, take another --workdir, or start anew with --overwrite'
    )


def code_changes(folder: epath.Path, record: Mapping[str, Any]) -> list[str]:
  """Returns `name: old -> new` for each change of a run's code and versions.

  Empty where the folder has no record.
  """
  old = _read(folder)
  if not old:
    return []
  parts = ('code', 'versions')
  return config_utils.differences(
    {part: old.get(part) or {} for part in parts},
    {part: record[part] for part in parts},
  )


def of_teachers(
  given: Sequence[Any],
) -> list[dict[str, str | int]]:
  """Returns what tells a run's teachers from others, as JSON."""
  return [
    {
      'name': str(teacher.name),
      'arrays': checksum(teacher.variables),
      'preprocessing': str(dataclasses.astuple(teacher.preprocessing)),
      'pool': teacher.pool_name,
    }
    for teacher in given
  ]


def arrays_of(given: Sequence[Any]) -> Any:
  """Returns the arrays of a run's teachers, as checksums read them.

  The tree has the shape that it had in the first version, whose runs and stored
  outputs are known by it.
  """
  first, *others = given
  if not others:
    return first.arrays
  return {**first.arrays, 'others': tuple(one.arrays for one in others)}


def checksum(tree: Any) -> int:
  """Returns a checksum of a tree's arrays, those that are shapes left out."""
  found = 0
  for leaf in jax.tree.leaves(tree):
    if not isinstance(leaf, jax.ShapeDtypeStruct):
      found = zlib.crc32(np.ascontiguousarray(leaf), found)
  return found


def check_teachers(folder: epath.Path, record: Mapping[str, Any]) -> None:
  """Raises UserError where a folder's run began with other teachers."""
  old = _read(folder).get('teachers')
  changes = (
    []
    if old is None
    else config_utils.differences(
      {'teachers': dict(enumerate(old))},
      {'teachers': dict(enumerate(record['teachers']))},
    )
  )
  if changes:
    raise config_utils.UserError(
      f'{folder} holds a run that began with another teacher '
      f'({"; ".join(changes)}): put it back, take another --workdir, or start '
      'anew with --overwrite'
    )


def exists(folder: epath.Path) -> bool:
  """Returns whether a folder has a record: runs of older versions have none."""
  return (folder / workdirs.RECORD).exists()


def _read(folder) -> dict[str, Any]:
  """Returns the record in a folder; {} where there is none.

  Raises:
    config_utils.UserError: it is damaged.
  """
  if not exists(folder):
    return {}
  try:
    found = disk.read_json(folder / workdirs.RECORD)
    # Raises where the parts that are read are no objects, or no list.
    for split in found.get('data', {}).get('splits', {}).values():
      split.keys()
    list(found.get('teachers') or ())
  except (AttributeError, OSError, TypeError, ValueError) as error:
    raise config_utils.UserError(
      f'the {workdirs.RECORD} in {folder} is damaged, so that it cannot be '
      'told whether the data are those that the run began with: put back a '
      'sound copy, or remove it if they are'
    ) from error
  return found


def write(folder: epath.Path, record: Mapping[str, Any]) -> None:
  """Writes the record of a run into its folder."""
  text = json.dumps(record, indent=2) + '\n'
  disk.write_text(folder / workdirs.RECORD, text)
