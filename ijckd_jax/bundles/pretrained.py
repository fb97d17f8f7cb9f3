"""A student that starts from a bundle's weights: backbone, connector, head."""

from collections.abc import Sequence
import dataclasses
from typing import Any

import jax

from ijckd_jax import models
from ijckd_jax.bundles import bundles
from ijckd_jax.data import augment
from ijckd_jax.data import classes
from ijckd_jax.distillation import connectors
from ijckd_jax.distillation import network
from ijckd_jax.models import converted
from ijckd_jax.runtime import config_utils

PARTS = ('backbone', 'connector', 'head')


@dataclasses.dataclass(frozen=True)
class Start:
  """What a student takes of a bundle.

  Attributes:
    path: of the bundle.
    backbone_name: of the bundle.
    backbone: the bundle's.
    size: (H, W) of the images that its weights are for.
    preprocessing: what its weights expect, for the images to come.
    variables: its 'params' and 'batch_stats'; of each, the parts that are taken
      by their names.
    connector: the bundle's; None where it has none.
    origin: of the weights, see teachers.Teacher; None where it is not known.
  """

  path: str
  backbone_name: str
  backbone: models.Backbone
  size: tuple[int, int]
  preprocessing: augment.Preprocessing
  variables: dict[str, Any]
  connector: Any = None
  origin: dict[str, Any] | None = None

  def build_backbone(self, **settings) -> models.Backbone:
    """Returns the student's backbone.

    Args:
      **settings: fields of models.Backbone.

    Raises:
      config_utils.UserError: it cannot be trained.
    """
    if not isinstance(self.backbone, converted.Converted):
      return models.build(self.backbone_name, **settings)
    backbone = self.backbone.clone(**settings)
    backbone.check_trains(self.path)
    return backbone

  @property
  def factor(self) -> int | None:
    """Of the connector that is taken; None where none, or none with one, is."""
    if 'connector' not in self.parts:
      return None
    return getattr(self.connector, 'factor', None)

  @property
  def parts(self) -> tuple[str, ...]:
    """The names of the parts that are taken."""
    return tuple(self.variables['params'])

  def fill(self, variables: dict[str, Any], backbone) -> dict[str, Any]:
    """Returns a network's fresh variables with the parts from here.

    Args:
      variables: 'params' and 'batch_stats' of what is trained, or their shapes.
        A backbone that ends at a stage takes the layers up to that stage.
      backbone: the student's models.Backbone, which may fit the arrays of its
        layers to images of another size.

    Raises:
      config_utils.UserError: the student has no such part, or one that is not
        here, or of another shape.
    """
    for part in self.parts:
      if part not in variables['params']:
        raise config_utils.UserError(
          f'student.init_parts: no {part} is trained here that could start '
          f'from {self.path}: leave it out, or take a method that trains one '
          '(method=ijckd, and for the head method.head=copy)'
        )
    filled = {kind: dict(variables[kind]) for kind in network.COLLECTIONS}
    for kind in network.COLLECTIONS:
      # A head has no statistics, and gets no empty ones.
      for part in [part for part in self.parts if part in variables[kind]]:
        like = variables[kind][part]
        own = self.variables[kind].get(part, {})
        if part == 'backbone' and kind == 'params':
          own = self._fit(own, backbone)
        filled[kind][part] = jax.tree_util.tree_map_with_path(
          lambda path, like, own=own, part=part: self._take(
            own, part, path, like
          ),
          like,
        )
    return filled

  def resizes(self, backbone) -> bool:
    """Returns whether arrays of the backbone are resized for the images."""
    own = self.variables['params'].get('backbone')
    return own is not None and self._fit(own, backbone) is not own

  def _fit(self, params, backbone):
    """Returns the backbone's 'params' for the images to come."""
    return backbone.fit_to_size(params, self.size, self.preprocessing.size)

  def _take(self, own, part, path, like):
    """Returns an array of a part, which must have a shape."""
    value = own
    for key in path:
      value = value.get(key.key, {})
    if getattr(value, 'shape', None) == like.shape:
      return value
    name = f'{part}{jax.tree_util.keystr(path)}'
    if getattr(value, 'shape', None) is None and part == 'backbone':
      raise config_utils.UserError(
        f'{self.path} has no {name}: its backbone ends at '
        f'tap={self.backbone.tap}, and '
        'a student that starts from it must end there or earlier (method.tap; '
        'a method without a connector, such as ce, trains the whole backbone)'
      )
    remedy = {
      'backbone': 'give a bundle of the same backbone',
      'connector': f'take its connector ({self._of_connector()}), the same '
      'tap, and a teacher of the same width',
      'head': 'take a teacher of the same width and classes',
    }[part]
    raise config_utils.UserError(
      f'{self.path}: {name} must be {like.shape}, but is '
      f'{getattr(value, "shape", "not there")}: {remedy}'
    )

  def _of_connector(self):
    """Returns the settings of the bundle's connector, in words."""
    if self.connector is None:
      return 'none'
    name = config_utils.reference(self.connector, connectors.CONNECTORS)
    factor = getattr(self.connector, 'factor', None)
    return f'{name}, factor={factor}' if factor else name


def load(
  path: str,
  backbone_name: str,
  image_shape: tuple[int, int, int],
  *,
  parts: Sequence[str] = ('backbone',),
  class_names: Sequence[str] = (),
) -> Start:
  """Returns parts of the student of a bundle or a run.

  Args:
    path: of the bundle or the run.
    backbone_name: that it must have.
    image_shape: (H, W, C) of the images to come.
    parts: of PARTS, what is taken.
    class_names: of the data set, in whose order the head's classes are put.

  Raises:
    config_utils.UserError: there is none, or another backbone, or it reads
      images of other channels, or has no such part, or other classes.
  """
  for part in parts:
    if part not in PARTS:
      raise config_utils.unknown('part in student.init_parts', part, PARTS)
  if not parts:
    raise config_utils.UserError(
      f'student.init_parts=(): name what {path} is to give, of '
      f'{", ".join(PARTS)}'
    )
  # A config is code already: what it names, it trusts.
  bundle = bundles.load(path, trust_code=backbone_name, trust_programs=True)
  if bundle.backbone_name != backbone_name:
    raise config_utils.UserError(
      f'{path} holds a {bundle.backbone_name}, and cannot start a '
      f'{backbone_name}: name the same backbone'
    )
  own, backbone = bundle.network.preprocessing, bundle.network.backbone
  if isinstance(backbone, converted.Converted) and 'backbone' not in parts:
    raise config_utils.UserError(
      f'student.init_parts: {path} holds a converted network, which cannot '
      'start at random: add backbone'
    )
  if len(own.mean) != image_shape[-1]:
    raise config_utils.UserError(
      f'{path} reads images of {len(own.mean)} channels, but those of the data '
      f'set have {image_shape[-1]}'
    )
  if 'head' in parts:
    if not len(class_names):
      raise config_utils.UserError(
        'the images have no classes: leave head out of student.init_parts'
      )
    bundle.check_head(path)
    order, _ = classes.match(bundle.class_names, class_names, what=path)
    if order is not None:
      bundle = bundle.in_order(order, class_names)
  variables = {
    kind: {
      part: bundle.variables[kind][part]
      for part in parts
      if part in bundle.variables[kind]
    }
    for kind in network.COLLECTIONS
  }
  for part in parts:
    if part not in variables['params']:
      raise config_utils.UserError(
        f'student.init_parts: {path} holds no {part}, but '
        f'{", ".join(bundle.variables["params"])}'
      )
  size = tuple(own.size)
  if not isinstance(backbone, converted.Converted):  # It has one size.
    own = dataclasses.replace(own, size=tuple(image_shape[:2]))
  return Start(
    path=path,
    backbone_name=backbone_name,
    backbone=backbone,
    size=size,
    preprocessing=own,
    variables=variables,
    connector=bundle.network.connector,
    origin=bundle.info.get('origin'),
  )
