"""Writes a user's own folder of pictures as a tfds data set.

Without TensorFlow, and by several processes. All is written beside the data
set's place, into `incomplete.NAME`, where a run that was cut off finds what is
complete; only a whole data set is moved into its place, `NAME/1.0.0`.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import pathlib
import shutil

from ijckd_jax.data import datasets
from ijckd_jax.data.datasets import image_layout
from ijckd_jax.data.datasets import image_report
from ijckd_jax.data.datasets import image_shards
from ijckd_jax.data.datasets import image_table
from ijckd_jax.data.datasets import image_unpack
from ijckd_jax.data.datasets import own_images
from ijckd_jax.data.datasets import photos
from ijckd_jax.data.datasets import prepared
from ijckd_jax.runtime import config_utils
from ijckd_jax.runtime import disk
from ijckd_jax.runtime import workers

VERSION = '1.0.0'
FORMAT = 1  # Of what is written; what has another one is written anew.
PLAN = 'plan.json'
ORIGIN = 'origin.json'  # Source files and options of unpacked pictures.
LOCK = 'lock'


def prepare(
  source: str,
  name: str,
  data_dir: str = '',
  *,
  validation_fraction: float | None = None,
  unlabelled: bool = False,
  columns: image_table.Columns | None = None,
  kind: str = '',
  num_workers: int = 1,
) -> pathlib.Path:
  """Writes a folder of pictures as a tfds data set, and prints what it holds.

  Args:
    source: the folder, as `image_layout.read` takes it; a CSV file of pictures,
      as `image_table.read` does; or files that hold many, as
      `image_unpack.find` takes them.
    name: what the data set is to be called.
    data_dir: tfds's data directory; '' is tfds's default.
    validation_fraction: as `image_layout.read` takes it.
    unlabelled: as `image_layout.read` takes it.
    columns: of a table; None: the usual ones.
    kind: 'csv', 'parquet' or 'npz' where the source must be that; '': whatever
      it is.
    num_workers: processes; 1 works in this one.

  Returns:
    The data set's folder, which holds `report.md` and `report.json` too.

  Raises:
    UserError: the request cannot be met; there is no new data set.
    OSError: reading or writing failed; the same call continues.
  """
  # Long, because it is the order of a request: what costs nothing is checked
  # first, and nothing is in its place before all of it is there.
  workers.check_script()
  root = prepared.data_root(data_dir)
  _check_name(name)
  if num_workers < 1:
    raise config_utils.UserError(f'num_workers={num_workers}: give at least 1')
  final, incomplete = root / name / VERSION, root / f'incomplete.{name}'
  unpacked = root / f'incomplete.{name}.files'
  folder = pathlib.Path(source).expanduser()
  is_csv = folder.suffix.lower() == image_table.SUFFIX and not folder.is_dir()
  if kind == 'csv' and not is_csv:
    raise config_utils.UserError(f'--source {source} is no .csv file')
  files = image_unpack.find(source, image_unpack.SUFFIXES.get(kind, ''))
  if unlabelled and (files or is_csv):
    raise config_utils.UserError(
      f'--source {source}: pictures of a table have classes; of pictures '
      'without them, give their folder'
    )
  if columns is not None and not (files or is_csv):
    raise config_utils.UserError(
      f'--source {source} is no CSV or Parquet file, which alone has columns'
    )
  columns = columns or image_table.Columns()
  origin = [*image_unpack.origin(files, columns), validation_fraction]
  if files:
    if _read_json(final / ORIGIN) == origin:
      _tell(name, 'already prepared', final)
      return final
    image_unpack.check(files, columns)
    _check_free(final)
  with contextlib.ExitStack() as stack:
    if files:
      stack.enter_context(_alone(incomplete))
      table = image_unpack.unpack(files, unpacked, columns)
      layout = image_table.read(
        table, validation_fraction=validation_fraction, called=source
      )
      folder = unpacked
    elif is_csv:
      layout = image_table.read(
        folder, columns=columns, validation_fraction=validation_fraction
      )
      folder = folder.parent
    else:
      layout = _read_folder(folder, root, validation_fraction, unlabelled)
    splits = _divide(incomplete, name, layout)
    plan = _plan(layout, splits)
    if (_read_json(final / PLAN) or {}).get('digest') == plan['digest']:
      _tell(name, 'already prepared', final)
      return final
    _check_free(final)
    if not files:
      stack.enter_context(_alone(incomplete))
    _begin(incomplete, plan)
    _fill(incomplete, name, folder, layout, splits, num_workers)
    if files:
      _write_json(incomplete / ORIGIN, origin)
    final.parent.mkdir(exist_ok=True)
    incomplete.rename(final)
    shutil.rmtree(final / image_shards.NOTES)
    (final / LOCK).unlink()
    shutil.rmtree(unpacked, ignore_errors=True)
  _tell(name, 'written', final)
  return final


def _check_free(final):
  if final.parent.exists() and os.listdir(final.parent):
    raise config_utils.UserError(
      f'{final.parent} holds another data set, or one of other files or '
      'options: choose another --name, or remove that folder'
    )


def _read_folder(folder, root, validation_fraction, unlabelled):
  """Returns what is taken from a folder of pictures."""
  layout = image_layout.read(
    folder, validation_fraction=validation_fraction, unlabelled=unlabelled
  )
  if root.resolve().is_relative_to(folder.resolve()):
    raise config_utils.UserError(
      f'data_dir {root} lies in --source {folder}, where it would be taken for '
      'pictures: give another --data_dir'
    )
  return layout


def _check_name(name):
  import tensorflow_datasets as tfds

  if not own_images.NAME.fullmatch(name):
    raise config_utils.UserError(
      f'--name {name!r}: begin with a small letter and use small letters, '
      'digits and underscores only'
    )
  known = set(tfds.list_builders(with_community_datasets=False))
  if name in known | datasets.DATASETS.keys():
    raise config_utils.UserError(
      f'--name {name}: there is a data set of that name; choose another'
    )


def _divide(folder, name, layout):
  """Returns what each file of each split is to hold."""
  members = {}
  for example in layout.examples:
    members.setdefault(example.split, []).append(example)
  return {
    split: image_shards.divide(folder, name, split, examples)
    for split, examples in members.items()
  }


def _plan(layout, splits):
  """Returns by what a data set is known again, and one that is not complete."""
  content = [FORMAT, layout.class_names, layout.examples]
  return {
    'digest': hashlib.sha256(json.dumps(content).encode()).hexdigest(),
    'num_shards': {split: len(shards) for split, shards in splits.items()},
  }


@contextlib.contextmanager
def _alone(folder):
  """Makes a folder, and holds it against others that would write into it."""
  folder.mkdir(parents=True, exist_ok=True)
  with (folder / LOCK).open('w') as lock:
    try:
      fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
      raise config_utils.UserError(
        f'another process is writing into {folder}'
      ) from error
    yield


def _begin(folder, plan):
  """Clears a folder, unless what it holds is of this plan."""
  if _read_json(folder / PLAN) == plan:
    return
  left = [path for path in folder.iterdir() if path.name != LOCK]
  if left:
    print(f'{folder} is of other files or options: starting anew')
  for path in left:
    if path.is_dir():
      shutil.rmtree(path)
    else:
      path.unlink()
  (folder / image_shards.NOTES).mkdir()
  _write_json(folder / PLAN, plan)


def _fill(folder, name, source, layout, splits, num_workers):
  """Writes whatever the data set lacks."""
  shards = {
    shard: part for split in splits.values() for shard, part in split.items()
  }
  _write_shards(name, source, layout, shards, num_workers)
  report = image_report.summarise(
    layout,
    (
      pair
      for shard, examples in shards.items()
      for pair in zip(
        examples, image_shards.notes(shard)['outcomes'], strict=True
      )
    ),
  )
  _write_json(folder / 'report.json', report)
  try:
    image_report.check(layout, report)
  except config_utils.UserError as error:
    raise config_utils.UserError(
      f'{error}; {folder / "report.json"} lists all'
    ) from error
  disk.write_text(folder / 'report.md', image_report.as_markdown(name, report))
  _write_json(folder / photos.DIGESTS, _digests(splits))
  _write_metadata(folder, name, layout, splits)


def _digests(splits):
  """Returns a hash of each split: of all pictures, their paths and labels."""
  digests = {}
  for split, shards in splits.items():
    content = sorted(
      [example.path, example.label, outcome.get('sha256')]
      for shard, examples in shards.items()
      for example, outcome in zip(
        examples, image_shards.notes(shard)['outcomes'], strict=True
      )
    )
    digests[split] = hashlib.sha256(json.dumps(content).encode()).hexdigest()
  return digests


def _write_shards(name, source, layout, shards, num_workers):
  """Writes those shards that are not complete."""
  import tqdm

  todo = {
    shard: examples
    for shard, examples in shards.items()
    if not image_shards.notes(shard)
  }
  kept = len(shards) - len(todo)
  if kept:
    print(f'{name}: continuing, {kept} of {len(shards)} shards are complete')
  total = len(layout.examples)
  with tqdm.tqdm(
    total=total,
    initial=total - sum(map(len, todo.values())),
    desc=name,
    unit='image',
    disable=None,
  ) as progress:
    image_shards.write(
      image_shards.Writer(source, layout.class_names),
      todo,
      min(num_workers, len(todo)),
      progress.update,
    )


def _write_metadata(folder, name, layout, splits):
  """Writes what tfds has to know of the shards."""
  import tensorflow_datasets as tfds

  infos = []
  for split, shards in splits.items():
    notes = [image_shards.notes(shard) for shard in shards]
    infos.append(
      tfds.core.SplitInfo(
        name=split,
        shard_lengths=[
          sum('skipped' not in outcome for outcome in shard['outcomes'])
          for shard in notes
        ],
        num_bytes=sum(shard['num_bytes'] for shard in notes),
        filename_template=image_shards.template(folder, name, split),
      )
    )
  labelled = bool(layout.class_names)
  tfds.folder_dataset.write_metadata(
    data_dir=folder,
    features=image_shards.features(layout.class_names),
    split_infos=infos,
    version=VERSION,
    check_data=False,  # It reads by TensorFlow.
    description='Pictures from a folder.',
    supervised_keys=('image', 'label') if labelled else None,
  )


def _tell(name, done, folder):
  report = _read_json(folder / 'report.json')
  counts = ', '.join(
    f'{count} {split}' for split, count in report['num_examples'].items()
  )
  print(f'{name}: {done} in {folder} ({counts})')
  for line in image_report.lines(report):
    print(f'  {line}')
  print(f'  more in {folder / "report.md"}')
  print(
    f'  a run takes it by --config image_folder:folder={name}, and a command '
    f'on a bundle by --dataset image_folder --dataset_fields folder={name}'
  )


def _read_json(path):
  """Returns what a JSON file holds, or None where it is not there or whole."""
  try:
    return disk.read_json(path)
  except (OSError, ValueError):
    return None


def _write_json(path, content):
  disk.write_text(path, json.dumps(content, indent=2) + '\n')
