"""Bundles: folders that hold a classifier whole, as JSON and arrays.

`bundle.json` says how the parts are built and joined, `variables.safetensors`
holds their arrays, and what was converted from elsewhere is there as programs.
Nothing else is needed to evaluate, export or distil from the network inside.
"""

from collections.abc import Callable
from collections.abc import Mapping
from collections.abc import Sequence
import contextlib
import dataclasses
import hashlib
import json
import logging
import math
import pathlib
from typing import Any

from etils import epath
from flax import traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy

from ijckd_jax import models
from ijckd_jax.bundles import model_card
from ijckd_jax.bundles import specification
from ijckd_jax.data import classes
from ijckd_jax.data import images
from ijckd_jax.distillation import connectors
from ijckd_jax.distillation import network as network_lib
from ijckd_jax.distillation import teachers
from ijckd_jax.models import converted
from ijckd_jax.models import programs as programs_lib
from ijckd_jax.runtime import backend
from ijckd_jax.runtime import config_utils
from ijckd_jax.runtime import disk

logger = logging.getLogger('ijckd_jax')

# 2: those that hold programs. 3: those whose backbone ends at a stage by its
# number, named by `tap`. Of other backbones a bundle says whether they are
# `truncated`, because older versions of ijckd_jax read that. 4: those whose
# backbone was converted, with its pool's arrays among its own.
FORMAT_VERSIONS = (1, 2, 3, 4)
SPEC_FILE = 'bundle.json'
CHECKSUM = 'arrays_sha256'  # Its field for that of ARRAYS_FILE.
ARRAYS_FILE = 'variables.safetensors'
PROGRAM_SUFFIX = '.bin'
EXPORTED = ('.onnx', '.stablehlo')  # Of files that ijckd export alone writes.
FILES = (
  SPEC_FILE,
  ARRAYS_FILE,
  *(f'{name}{PROGRAM_SUFFIX}' for name in specification.PROGRAMS),
  model_card.FILE,
)
# Far more than the names of ImageNet-21k's classes take, or a header of arrays.
MAX_TEXT_BYTES = 16 * 2**20
MAX_PROGRAM_BYTES = 2**28  # Hundreds of times what a network's program takes.


@dataclasses.dataclass(frozen=True)
class Bundle:
  """A classifier that needs nothing else; or features, without a head.

  Attributes:
    network: how its parts are joined.
    variables: their arrays on the host, see there.
    backbone_name: as models.build takes it; of a Converted, what it was called.
    pool_name: 'average', the backbone whose pool it is, or 'program'.
    image_shape: (H, W, C) of the images that it was made for.
    class_names: K names; none where it has no head, which is (D, 0) then.
    info: what else is known of it, JSON: how it was trained and measured.
    crop: how pictures of any size become its images; None: as the data set does
      it that `info` names, if it does.
  """

  network: network_lib.Network
  variables: Any
  backbone_name: str
  pool_name: str
  image_shape: tuple[int, int, int]
  class_names: tuple[str, ...]
  info: dict[str, Any]
  crop: images.CentreCrop | None = None

  def check_head(self, what: str) -> None:
    """Raises UserError where it has no head, and so names no class.

    Args:
      what: how the message calls it.
    """
    if not self.class_names:
      raise config_utils.UserError(
        f'{what}, a {self.backbone_name}, has no head, so that it names no '
        'class: ijckd probe --bundle DIR --dataset NAME --output NEW writes it '
        'with one, fitted on images with classes'
      )

  def teacher(self, name: str | None = None) -> teachers.Teacher:
    """Returns it as a teacher."""
    net, pool_variables = self.network, self.variables['pool']
    pool, pool_name = net.pool, self.pool_name
    if net.connector is None:
      pool_variables = net.backbone.pool_variables(
        network_lib.part(self.variables, 'backbone')
      )
    if self.pool_name == 'average' or (
      # The backbone of that name, whole, may have another pool.
      net.connector is None and net.backbone.truncated
    ):
      pool, pool_name = teachers.average_pool, 'average'
    return teachers.Teacher(
      apply=net,
      variables=self.variables,
      head=self.variables['params']['head'],
      preprocessing=net.preprocessing,
      name=name or self.backbone_name,
      pool=pool,
      pool_name=pool_name,
      pool_variables=pool_variables,
      signed=net.signed,
      pools_map=net.pools_map,
      pooled_signed=net.pooled_signed,
      num_params=num_params(self.variables),
      origin=self.info.get('origin'),
      class_names=tuple(self.class_names),
    )

  def in_order(self, order: np.ndarray, class_names: Sequence[str]) -> 'Bundle':
    """Returns it with its classes in another order, see classes.reorder."""
    params = self.variables['params']
    params = {**params, 'head': classes.reorder(params['head'], order)}
    return dataclasses.replace(
      self,
      variables={**self.variables, 'params': params},
      class_names=tuple(class_names),
    )

  def with_head(
    self,
    head: Mapping[str, Any],
    class_names: Sequence[str],
    dataset: dict[str, Any],
    probe: dict[str, Any],
  ) -> 'Bundle':
    """Returns it with a linear probe as its head, on the same features.

    What is known of the accuracy of its own head is left out.

    Args:
      head: 'kernel' (D, K) and 'bias' (K,).
      class_names: K names.
      dataset: fields of the data set that the head was fitted on, as whose
        images pictures are seen from now on.
      probe: what probes.score says of it.
    """
    params = {**self.variables['params'], 'head': head}
    info = {
      key: value
      for key, value in self.info.items()
      if key not in ('dataset', 'run', 'test', 'which')
    }
    run = self.info.get('run')
    if isinstance(run, dict):
      # The features are still those of the checkpoint that was chosen.
      info['run'] = {
        key: run[key] for key in ('best_by', 'choices') if key in run
      }
    if 'dataset' in self.info:
      info.setdefault('features_dataset', self.info['dataset'])
    return dataclasses.replace(
      self,
      variables={**self.variables, 'params': params},
      class_names=tuple(class_names),
      info={**info, 'dataset': dataset, 'probe': probe},
      crop=None if 'resize' in dataset else self.crop,
    )

  def spec(self) -> dict[str, Any]:
    """Returns all of it but the arrays, as `bundle.json` says it."""
    net = self.network
    more: dict[str, Any] = {}
    connector = None
    if isinstance(net.backbone, converted.Converted):
      more['converted'] = {
        'signed': net.backbone.map_is_signed,
        'pooled_signed': net.backbone.pooled_is_signed,
        'pools_map': net.backbone.map_is_pooled,
        'buffers': net.backbone.buffers,
      }
    if net.backbone.num_stages is None:
      more['truncated'] = net.backbone.truncated
    else:
      more['tap'] = net.backbone.tap
    if net.connector is not None:
      connector = {
        field.name: getattr(net.connector, field.name)
        for field in dataclasses.fields(net.connector)
        if field.name not in specification.CONNECTOR_RUNTIME_FIELDS
      }
      connector['name'] = config_utils.reference(
        net.connector, connectors.CONNECTORS
      )
    spec = {
      'format_version': self._format_version(),
      'backbone': self.backbone_name,
      **more,
      'dtype': jnp.dtype(net.dtype).name,
      'connector': connector,
      'connect_size': connector and net.connect_size,
      'pool': self.pool_name,
      'preprocessing': dataclasses.asdict(net.preprocessing),
      'image_shape': self.image_shape,
      'class_names': [str(name) for name in self.class_names],
      'info': self.info,
    }
    if self.crop is not None:
      spec['crop'] = dataclasses.asdict(self.crop)
    if net.programs:
      spec['programs'] = {
        name: hashlib.sha256(program.data).hexdigest()
        for name, program in net.programs.items()
      }
      made = programs_lib.oldest(net.programs)
      spec['programs_made'] = dataclasses.asdict(made)
    # A mean or std may be of numpy's floats, which JSON does not know.
    return json.loads(json.dumps(spec, default=float))

  def _format_version(self) -> int:
    if isinstance(self.network.backbone, converted.Converted):
      return 4
    if self.network.backbone.num_stages is not None:
      return 3
    return 2 if self.network.programs else 1

  def save(self, directory: config_utils.PathLike) -> None:
    """Writes it; the folder appears whole or not at all."""
    flat = traverse_util.flatten_dict(self.variables, sep='/')
    arrays = safetensors.numpy.save(
      {key: np.asarray(value, order='C') for key, value in flat.items()}
    )
    spec = {**self.spec(), CHECKSUM: hashlib.sha256(arrays).hexdigest()}
    text = json.dumps(spec, indent=2) + '\n'
    card = model_card.as_markdown(self, num_params(self.variables))
    disk.write_folder(
      epath.Path(config_utils.expand(directory)),
      {
        ARRAYS_FILE: arrays,
        **{
          f'{name}{PROGRAM_SUFFIX}': program.data
          for name, program in self.network.programs.items()
        },
        model_card.FILE: card.encode(),
        SPEC_FILE: text.encode(),
      },
    )


def load(
  directory: config_utils.PathLike,
  *,
  dtype: Any = None,
  trust_code: bool | str = False,
  trust_programs: bool | None = None,
) -> Bundle:
  """Returns the bundle in a folder, or in a run's folder.

  Args:
    directory: holds `bundle.json`, or `bundle/` with it.
    dtype: of the computation; None: as in the run that made it.
    trust_code: whether it may name backbones and connectors outside this
      package, as `package.module:Name`. They are imported: their code runs.
      Such a name in place of True allows code of that package alone.
    trust_programs: whether it may hold programs, which XLA reads (see the
      module programs); None: as `trust_code`.

  Raises:
    config_utils.UserError: there is no bundle, it is damaged or too new, or it
      names code, or holds programs, that are not trusted.
  """
  directory = find(directory)
  if trust_programs is None:
    trust_programs = bool(trust_code)
  unreadable = f'the bundle in {directory} cannot be read'
  with config_utils.blame(unreadable):
    spec = json.loads(_read(directory, SPEC_FILE, MAX_TEXT_BYTES))
  network, pool_backbone = build(
    spec,
    directory,
    dtype=dtype,
    trust_code=trust_code,
    read=lambda name: _read_program(
      directory, spec, name, is_trusted=trust_programs
    ),
  )
  if spec.get('programs'):
    _say_lifetime(directory, spec)
  with config_utils.blame(
    f'the {SPEC_FILE} in {directory} does not fit together'
  ):
    wanted = specification.shapes(network, pool_backbone, spec)
  with config_utils.blame(unreadable):
    leaves = jax.tree.leaves(wanted)
    size = sum(math.prod(x.shape) * x.dtype.itemsize for x in leaves)
    data = _read(directory, ARRAYS_FILE, size + MAX_TEXT_BYTES)
    arrays = safetensors.numpy.load(data)
    arrays = specification.upgraded_arrays(spec, arrays)
  with config_utils.blame(
    f'the arrays in {directory} do not fit its {SPEC_FILE}'
  ):
    specification.check_arrays(arrays, network, wanted)
    # Bundles of earlier versions have no checksum.
    if spec.get(CHECKSUM, '') not in ('', hashlib.sha256(data).hexdigest()):
      raise ValueError('they are not those that were saved')
    variables = specification.nested(arrays)
  return Bundle(
    network=network,
    variables=variables,
    backbone_name=spec['backbone'],
    pool_name=spec['pool'],
    image_shape=tuple(spec['image_shape']),
    class_names=tuple(spec['class_names']),
    info=spec['info'],
    crop=specification.crop_of(spec),
  )


def _read_program(
  directory: epath.Path, spec: Mapping[str, Any], name: str, *, is_trusted: bool
) -> programs_lib.Program:
  """Returns one of a bundle's programs.

  Raises:
    config_utils.UserError: it is not trusted, damaged, or cannot be run here.
  """
  if not is_trusted:
    raise config_utils.UserError(
      f'the bundle in {directory} holds programs, as its network or its pool '
      'was converted; XLA reads them, and was not made for files of strangers: '
      'load it with trust_code=True (--trust_code) if you trust it'
    )
  file = f'{name}{PROGRAM_SUFFIX}'
  with config_utils.blame(f'the bundle in {directory} cannot be read'):
    data = _read(directory, file, MAX_PROGRAM_BYTES)
    if hashlib.sha256(data).hexdigest() != spec['programs'][name]:
      raise ValueError(f'{file} is not the one that was saved')
  made = specification.programs_made(spec)
  return programs_lib.load(data, f'{directory / file}', made)


def _say_lifetime(directory: epath.Path, spec: Mapping[str, Any]) -> None:
  """Logs until when a bundle's programs can be read, with what repairs it."""
  said, is_near = programs_lib.lifetime(specification.programs_made(spec))
  if is_near:
    remedy = 'train it again, when what it came from is converted again'
    if spec.get('converted') and spec['connector'] is None:
      remedy = 'convert it again, under a new JAX, by ijckd convert --again '
      remedy += f'{directory} --output NEW'
    logger.warning('%s: %s: %s', directory, said, remedy)
  else:
    logger.info('%s: %s', directory, said)


def _read(directory: epath.Path, name: str, limit: int) -> bytes:
  """Returns the content of one of the bundle's files.

  Raises:
    ValueError: it is none of the folder's own, or too large.
    OSError: it cannot be read.
  """
  path = directory / name
  if not disk.is_remote(path):
    real = pathlib.Path(path).resolve(strict=True)
    if real.parent != pathlib.Path(directory).resolve() or not real.is_file():
      raise ValueError(f'{name} is no file of that folder')
  size = path.stat().length
  if size > limit:
    raise ValueError(f'{name} has {size:,} bytes, at most {limit:,} make sense')
  return path.read_bytes()


def build(
  spec: Any,
  where: config_utils.PathLike,
  *,
  dtype: Any = None,
  trust_code: bool | str = False,
  read: Callable[[str], programs_lib.Program] | None = None,
) -> tuple[network_lib.Network, models.Backbone | None]:
  """Returns the network that a spec describes, and the backbone of its pool.

  Args:
    spec: as `Bundle.spec` gives it; nothing in it is believed.
    where: the file or folder that it came from, for the message.
    dtype: see `load`.
    trust_code: see `load`.
    read: gives a program by its name; None where there are none.

  Raises:
    config_utils.UserError: it is no spec, or names code that is not trusted.
  """
  if not isinstance(spec, dict) or 'format_version' not in spec:
    raise config_utils.UserError(f'{where} is not a bundle')
  if spec['format_version'] not in FORMAT_VERSIONS:
    version = config_utils.short(spec['format_version'])
    raise config_utils.UserError(
      f'the bundle in {where} has format {version}; this version of ijckd_jax '
      f'reads {", ".join(map(str, FORMAT_VERSIONS))}'
    )
  spec = specification.upgraded(spec)
  with config_utils.blame(f"{where}: the bundle's description is damaged"):
    specification.check(spec)
    outside = [
      name
      for name in specification.names_outside(spec)
      if not _is_trusted(name, trust_code)
    ]
  if outside:
    raise config_utils.UserError(
      f'the bundle in {where} names code outside the package '
      f'({config_utils.short(outside[0])}); load it with trust_code=True '
      '(--trust_code) if you trust it'
    )
  backend.start()
  programs = {}
  if read is not None:
    programs = {name: read(name) for name in spec.get('programs', {})}
  with config_utils.blame(f'{where}: what its bundle names cannot be built'):
    dtype = dtype or getattr(jnp, spec['dtype'])
    return specification.build(spec, dtype, programs)


def _is_trusted(name: str, trust_code: bool | str) -> bool:
  """Returns whether code outside the package may be imported; see `load`."""
  if isinstance(trust_code, bool):
    return trust_code
  package, another = (
    reference.partition(':')[0].partition('.')[0] if ':' in reference else ''
    for reference in (name, trust_code)
  )
  return package == another


def find(directory: config_utils.PathLike) -> epath.Path:
  """Returns the folder that holds the bundle: the one given, or its `bundle/`.

  Raises:
    config_utils.UserError: neither does.
  """
  folder = epath.Path(config_utils.expand(directory))
  for candidate in (folder, folder / 'bundle'):
    with contextlib.suppress(OSError):
      if (candidate / SPEC_FILE).exists():
        return candidate
  with contextlib.suppress(OSError):
    if folder.exists() and not folder.is_dir():
      if folder.suffix in EXPORTED:
        raise config_utils.UserError(
          f'{folder} is an exported file and no bundle: ijckd predict reads '
          'it; elsewhere, give the bundle or run that it was exported from'
        )
      raise config_utils.UserError(
        f'{folder} is a file and no bundle; if ijckd export wrote it, ijckd '
        'predict reads it, and if it holds weights of PyTorch, import it '
        f'first: ijckd weights import --checkpoint {folder} --output DIR'
      )
  raise config_utils.UserError(
    f'there is no bundle in {folder}: give the folder of a finished run, or '
    f'one that holds {SPEC_FILE}'
  )


def num_params(variables: Mapping[str, Any]) -> dict[str, int]:
  """Returns the parameters of 'backbone', 'connector' and 'head', 0 if none.

  A pool that came with the teacher's head is counted there.
  """
  params = variables['params']
  parts = {
    **params,
    'head': [params['head'], variables['pool'].get('params', {})],
  }
  return {
    part: teachers.count(parts.get(part, {}))
    for part in ('backbone', 'connector', 'head')
  }
