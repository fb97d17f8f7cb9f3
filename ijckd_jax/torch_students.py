"""Connected students as PyTorch modules: the text of a file of forty lines.

What is written is made for one network, whose numbers stand in it as literals,
and needs nothing but PyTorch. State dicts have 'backbone.' before the published
names, and an nn.Sequential's indices after 'connector.' and 'pool.'.
"""

import re
import textwrap

from ijckd_jax import config_utils
from ijckd_jax import connectors
from ijckd_jax import models
from ijckd_jax import network as network_lib
from ijckd_jax import torch_backbones
from ijckd_jax.models import mobilenet_v3

MAX_LINES = 40
# Breaks to give up, one kind after the other, until the text fits.
SPARE = (
  (r'\n\n\n', r'\n\n'),
  (r'\n\n  def', r'\n  def'),
  (r'"""\n\n', r'"""\n'),
  (r'(self, x\):)\n +(return .{,57})\n', r'\1 \2\n'),
  (r'\n\n', r'\n'),
)
MAX_LISTED_CHANNELS = 4
# That can be written; an orthogonal one's kernel is not among its variables.
CONNECTORS = tuple(
  name for name in connectors.CONNECTORS if name != 'orthogonal'
)
# How the arrays beside a module are loaded, by the suffix of their file.
LOAD = 'safetensors.torch.load_file(PATH)'
LOAD_TORCH = "torch.load(PATH)['state_dict']"


def source(
  network: network_lib.Network,
  *,
  backbone_name: str,
  pool_backbone: models.Backbone | None,
  image_shape: tuple[int, int, int],
  num_classes: int,
  suffix: str = '.safetensors',
) -> str:
  """Returns the text of a file that runs and trains a student in PyTorch.

  It defines `Student`, a module that is made without arguments, takes
  normalised images (B, C, H, W) of the network's size and returns logits
  (B, K).

  Args:
    network: has a connector; its backbone is one of this package, and ends at
      its last stage if it is a DeiT or MobileNetV3.
    backbone_name: what the text calls the backbone.
    pool_backbone: whose pool the network has; None: the plain average.
    image_shape: (H, W, C) of the images before preprocessing.
    num_classes: K.
    suffix: of the file with its arrays, which the text says how to load.

  Raises:
    config_utils.UserError: the network has a part that cannot be written.
  """
  connector, size = network.connector, network.preprocessing.size
  if connector is None:
    raise config_utils.UserError(
      'only a connected student is written as a PyTorch module: this network '
      'has no connector, the published module of its backbone runs it'
    )
  helpers, lines, channels = torch_backbones.write(
    network.backbone, size, image_shape[2]
  )
  layers = _layers(connector, channels, helpers)
  if connector.takes == 'pooled':
    size, hidden = 1, False
  else:
    size, hidden = tuple(network.connect_size), bool(pool_name(pool_backbone))
  resize = f'nn.AdaptiveAvgPool2d({size})'
  lines = [
    'super().__init__()',
    *lines,
    *torch_backbones.call(
      f'self.resize, self.connector = {resize}, nn.Sequential', layers
    ),
    *_pool_and_head(connector.features, num_classes, hidden),
  ]
  student = ['class Student(nn.Sequential):', '  def __init__(self):']
  student += [f'    {line}' for line in lines]
  parts = [text.strip() for text in helpers] + ['\n'.join(student)]
  code = '\n\n\n'.join(parts)
  imports = [
    *['from collections import OrderedDict'] * ('OrderedDict' in code),
    *['import torch'] * ('torch.' in code),
    'from torch import nn',
  ]
  about = _docstring(
    network, backbone_name, image_shape[2], num_classes, suffix
  )
  text = '\n'.join([about, '', *imports, '', '', code, ''])
  for spaced, tight in SPARE:
    if text.count('\n') > MAX_LINES:
      text = re.sub(spaced, tight, text)
  return text


def _pool_and_head(features, num_classes, hidden):
  """Returns the lines of the average, of a hidden layer, and of the head."""
  pool = ['nn.AdaptiveAvgPool2d(1)', 'nn.Flatten()']
  if not hidden:
    return [
      *torch_backbones.call('self.pool = nn.Sequential', pool),
      f'self.head = nn.Linear({features}, {num_classes})',
    ]
  width = mobilenet_v3.POOLED_WIDTH
  pool += [f'nn.Linear({features}, {width})', 'nn.Hardswish()']
  end = f'), nn.Linear({width}, {num_classes})'
  return torch_backbones.call('self.pool, self.head = nn.Sequential', pool, end)


def connector_name(connector: connectors.Connector) -> dict[str, str]:
  """Returns the index in an nn.Sequential of each layer of a connector.

  Raises:
    config_utils.UserError: the connector is none of this package.
  """
  names = {}
  for i in range(len(_convolutions(connector, 1))):
    names[f'Conv_{i}'] = str(3 * i)
    if type(connector) is not connectors.Linear:
      names[f'BatchNorm_{i}'] = str(3 * i + 1)
  return names


def pool_name(backbone: models.Backbone | None) -> dict[str, str]:
  """Returns the index in an nn.Sequential of each layer of a backbone's pool.

  Raises:
    config_utils.UserError: the pool is neither the average nor a MobileNetV3's.
  """
  if backbone is None or type(backbone).pool is models.Backbone.pool:
    return {}
  if type(backbone) is models.MobileNetV3Small:
    return {} if backbone.truncated else {'pool_hidden': '2'}
  raise config_utils.UserError(
    f'the pool of a {type(backbone).__name__} cannot be written as a PyTorch '
    "module: that is for the global average and MobileNetV3Small's pool"
  )


def _docstring(network, name, channels, num_classes, suffix):
  """Returns what the file says of itself, mostly in three lines."""
  if name not in models.BACKBONES:  # It could be long, or end the docstring.
    name = type(network.backbone).__name__
  connector = config_utils.reference(network.connector, connectors.CONNECTORS)
  preprocessing = network.preprocessing
  mean, std = 'mean', 'std'
  if channels <= MAX_LISTED_CHANNELS:
    mean, std = (
      f'({", ".join(f"{value:.6g}" for value in values)})'
      for values in (preprocessing.mean, preprocessing.std)
    )
  load = LOAD if suffix == '.safetensors' else LOAD_TORCH
  shape = ', '.join(map(str, ('B', channels, *preprocessing.size)))
  return textwrap.fill(
    f'"""{name}, {connector} connector, teacher\'s head of {num_classes} '
    f'classes. Load: Student().load_state_dict({load}). '
    f'Input ({shape}): (pixels / 255 - {mean}) / {std}."""',
    torch_backbones.MAX_COLUMNS,
    break_long_words=False,
    break_on_hyphens=False,
  )


def _convolutions(connector, channels):
  """Returns (channels, width, kernel, groups) of a connector's convolutions."""
  kind, features = type(connector), connector.features
  first = (channels, features, 1, 1)
  if kind is connectors.Identity:
    return []
  if kind in (connectors.Conv1x1, connectors.Linear):
    return [first]
  if kind is connectors.Mlp:
    return [first, (features, features, 1, 1)]
  if kind in (connectors.Bottleneck, connectors.DepthwiseBottleneck):
    inner = features // connector.factor
    middle = (inner, inner, 3, inner if connector.depthwise else 1)
    return [(channels, inner, 1, 1), middle, (inner, features, 1, 1)]
  raise config_utils.UserError(
    f'a {kind.__name__} connector cannot be written as a PyTorch module: that '
    f'is for {", ".join(CONNECTORS)}'
  )


def _layers(connector, channels, helpers):
  """Returns a connector's layers, by the `step` that its backbone needs."""
  convolutions = _convolutions(connector, channels)
  if type(connector) is connectors.Linear:
    return [f'nn.Conv2d({channels}, {connector.features}, 1)']
  acts = ['nn.ReLU()'] * max(1, len(convolutions))
  if connector.signed:
    acts[-1] = ''
  layers = []
  for (narrow, width, kernel, groups), act in zip(
    convolutions, acts, strict=False
  ):
    size, is_wide = f'{narrow}, {width}', kernel > 1
    if torch_backbones.STEP in helpers:
      more = f', {kernel}' if is_wide else ''
      more += f', 1, {groups}' if groups > 1 else ''
      layers += [f'*step({size}{more})', act]
    elif torch_backbones.STEP_V3 in helpers:
      act = act.removesuffix('()') or 'nn.Identity'
      more = f'{kernel}, 1, {groups}, ()' if is_wide else 'norm=()'
      layers.append(f'*step({size}, {act}, {more})')
    else:
      more = ', padding=1' if is_wide else ''
      more = f', 1, 1, 1, {groups}' if groups > 1 else more
      conv = f'nn.Conv2d({size}, {kernel}{more}, bias=False)'
      layers += [conv, f'nn.BatchNorm2d({width})', act]
  return [layer for layer in layers or acts if layer]
