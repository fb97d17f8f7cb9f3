"""What a data set's folder says of itself, checked before tfds believes it.

tfds imports the classes that a folder names for its features, and opens the
files that it names for its images. Folders may come from strangers.
"""

import json
import pathlib
import string

from ijckd_jax.runtime import config_utils

FEATURES, INFO = 'features.json', 'dataset_info.json'
# tfds's features for images, labels, boxes, texts and numbers. They run no code
# but their own, as far as is known.
_MODULES = 'tensorflow_datasets.core.features.'
ALLOWED = frozenset(
  _MODULES + name
  for name in (
    'bounding_boxes.BBoxFeature',
    'class_label_feature.ClassLabel',
    'features_dict.FeaturesDict',
    'image_feature.Image',
    'labeled_image.LabeledImage',
    'scalar.Scalar',
    'sequence_feature.Sequence',
    'tensor_feature.Tensor',
    'text_feature.Text',
  )
)
# ImageNet's, of two thousand shards, take less than a hundredth.
MAX_BYTES = 2**24


def check(folder: pathlib.Path) -> None:
  """Raises UserError unless a folder of tfds names only what is its own.

  Args:
    folder: of one version of a data set; files are read, nothing is imported.
  """
  for path in folder.iterdir():
    # Beside the shards, tfds reads all of a file at once.
    if path.suffix in ('.json', '.txt') and path.stat().st_size > MAX_BYTES:
      raise config_utils.UserError(
        f'{path} has {path.stat().st_size:,} bytes, and tfds writes no more '
        f'than {MAX_BYTES:,} there: it is damaged, or none of tfds'
      )

  from tensorflow_datasets.core.proto import dataset_info_pb2
  from tensorflow_datasets.core.proto import feature_pb2

  _parse(folder / FEATURES, feature_pb2.Feature())
  info = _parse(folder / INFO, dataset_info_pb2.DatasetInfo())
  for split in info.splits:
    _check_shards(folder, info, split)


def check_shards(builder, split: str) -> None:
  """Raises UserError unless a split's files can hold what is said of them.

  Args:
    builder: tfds's builder of a folder that was checked.
    split: that the folder should have.
  """
  if split not in builder.info.splits:
    raise config_utils.UserError(
      f'{builder.data_dir} has no split {split!r}, but '
      f'{", ".join(builder.info.splits)}'
    )
  info = builder.info.splits[split]
  for path, length in zip(info.filepaths, info.shard_lengths, strict=True):
    try:
      size = path.stat().length
    except OSError as error:
      raise config_utils.UserError(
        f'{path} is missing: prepare the data set again, or copy all of its '
        'files'
      ) from error
    # An example takes a byte at the very least.
    if not 0 <= length <= size:
      raise config_utils.UserError(
        f'{path} has {size:,} bytes, which cannot be the {length:,} examples '
        f'that {INFO} says: it is cut off, or of another data set'
      )


def _parse(path, message):
  """Returns a message of a JSON file, all of whose classes are allowed."""
  from google.protobuf import json_format

  try:
    content = json.loads(path.read_text())
    if not isinstance(content, dict):
      raise ValueError('it is no JSON object')
    # Before tfds 4.5 features were no message. Those can name files, too.
    if 'type' in content:
      raise ValueError('it is of a tfds older than 4.5: prepare it again')
    json_format.ParseDict(content, message)
  except (OSError, ValueError, RecursionError, json_format.Error) as error:
    raise config_utils.UserError(
      f'{path} cannot be read: {config_utils.short(error)}'
    ) from error
  for kind in _classes(message):
    if kind not in ALLOWED:
      raise config_utils.UserError(
        f'{path} names the class {config_utils.short(kind)}, whose module '
        'tfds would run: only features of tfds for images, texts and numbers '
        'are read here'
      )
  return message


def _classes(message):
  """Yields the class of each feature in a message, however deep.

  A feature whose content is JSON, not a message, has features in it that tfds
  builds as well. It counts as a class of its own, as tfds's own classes no
  longer write it.
  """
  if message.DESCRIPTOR.name == 'Feature':
    yield message.python_class_name or '(none)'
  for field, value in message.ListFields():
    if field.name == 'json_feature':
      yield field.name
    if field.message_type is None:
      continue
    if field.message_type.GetOptions().map_entry:
      value = value.values()
    for item in [value] if hasattr(value, 'DESCRIPTOR') else value:
      if hasattr(item, 'DESCRIPTOR'):
        yield from _classes(item)


def _check_shards(folder, info, split):
  """Raises unless the files of a split lie in the folder."""
  known = {
    'DATASET': info.name,
    'SPLIT': split.name,
    'FILEFORMAT': info.file_format,
    'SHARD_INDEX': '0',
    'NUM_SHARDS': '1',
    'SHARD_X_OF_Y': '0-of-1',
  }
  name = ''
  template = split.filepath_template
  try:
    for literal, field, spec, conversion in string.Formatter().parse(template):
      if spec or conversion:
        raise ValueError('it formats its fields')
      name += literal + (known[field] if field is not None else '')
  except (KeyError, ValueError) as error:
    raise config_utils.UserError(
      f'{folder / INFO}: {config_utils.short(template)} is no name of files: '
      f'{config_utils.short(error)}'
    ) from error
  # What tfds takes where there is no template has the other two in it.
  for text in (name, info.name, split.name):
    path = pathlib.PurePosixPath(text)
    if path.is_absolute() or '..' in path.parts or '\0' in text:
      raise config_utils.UserError(
        f'{folder / INFO}: the files of {config_utils.short(split.name)} would '
        f'lie outside of the folder, at {config_utils.short(text)}'
      )
