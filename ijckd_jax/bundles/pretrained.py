"""A backbone that starts from a bundle's weights, under a fresh head."""

import dataclasses
from typing import Any

import jax

from ijckd_jax.bundles import bundles
from ijckd_jax.data import augment
from ijckd_jax.distillation import network
from ijckd_jax.runtime import config_utils


@dataclasses.dataclass(frozen=True)
class Start:
  """A bundle's backbone.

  Attributes:
    path: of the bundle.
    backbone_name: in models.BACKBONES.
    preprocessing: what its weights expect.
    variables: its 'params' and 'batch_stats'.
  """

  path: str
  backbone_name: str
  preprocessing: augment.Preprocessing
  variables: dict[str, Any]

  def fill(self, variables: dict[str, Any]) -> dict[str, Any]:
    """Returns a network's fresh variables with the backbone's from here.

    Args:
      variables: 'params' and 'batch_stats' of what is trained, or their shapes.
        A backbone that ends at a stage takes the layers up to that stage.

    Raises:
      config_utils.UserError: the backbone has what is not here, or of another
        shape.
    """

    def take(path, like):
      value = self.variables
      for key in path:
        value = value.get(key.key, {})
      if getattr(value, 'shape', None) != like.shape:
        raise config_utils.UserError(
          f'{self.path}: {jax.tree_util.keystr(path)} must be {like.shape}, '
          f'but is {getattr(value, "shape", "not there")}: give a bundle of '
          'the same backbone for the same size of images, which ends at the '
          'same tap or later'
        )
      return value

    mine = {kind: variables[kind]['backbone'] for kind in network.COLLECTIONS}
    mine = jax.tree_util.tree_map_with_path(take, mine)
    return {
      kind: {**variables[kind], 'backbone': mine[kind]}
      for kind in network.COLLECTIONS
    }


def load(
  path: str, backbone_name: str, image_shape: tuple[int, int, int]
) -> Start:
  """Returns the backbone of a bundle or a run.

  Args:
    path: of the bundle or the run.
    backbone_name: that it must have.
    image_shape: (H, W, C) of the images to come.

  Raises:
    config_utils.UserError: there is none, or another backbone, or it reads
      images of other channels.
  """
  # A config is code already: what it names, it trusts.
  bundle = bundles.load(path, trust_code=backbone_name, trust_programs=True)
  if bundle.backbone_name != backbone_name:
    raise config_utils.UserError(
      f'{path} holds a {bundle.backbone_name}, and cannot start a '
      f'{backbone_name}: name the same backbone'
    )
  own = bundle.network.preprocessing
  if len(own.mean) != image_shape[-1]:
    raise config_utils.UserError(
      f'{path} reads images of {len(own.mean)} channels, but those of the data '
      f'set have {image_shape[-1]}'
    )
  return Start(
    path=path,
    backbone_name=backbone_name,
    preprocessing=dataclasses.replace(own, size=tuple(image_shape[:2])),
    variables=network.part(bundle.variables, 'backbone'),
  )
