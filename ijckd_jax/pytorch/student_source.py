"""Connected students as PyTorch modules: the text of a Python file.

The file needs nothing but PyTorch. It has the definitions of `blocks` that
a network uses, and a class `Student` with the network's numbers as literals.
State dicts have 'backbone.' before the published names, and an nn.Sequential's
indices after 'connector.' and 'pool.'.
"""

import ast
import pathlib
import textwrap

import jax

from ijckd_jax import models
from ijckd_jax.distillation import connectors
from ijckd_jax.distillation import network as network_lib
from ijckd_jax.models import mobilenet_v3
from ijckd_jax.pytorch import backbone_source
from ijckd_jax.runtime import config_utils

# Read, never imported: PyTorch need not be installed.
BLOCKS = pathlib.Path(__file__).with_name('blocks.py')
MAX_LISTED_CHANNELS = 4
# That can be written; an orthogonal one's kernel is not among its variables.
CONNECTORS = tuple(
  name for name in connectors.CONNECTORS if name != 'orthogonal'
)
# How the arrays beside a module are loaded, by the suffix of their file.
LOAD = 'safetensors.torch.load_file(PATH)'
LOAD_TORCH = "torch.load(PATH)['state_dict']"
ABOUT = '''\
"""{name}, {connector} connector, teacher's head of {num_classes} classes.

{end}  student = Student()
  student.load_state_dict({load})

Input ({shape}): (pixels / 255 - mean) / std, for pixels from 0 to 255.
{numbers}"""

'''
STUDENT = """\
class Student(nn.Module):
  def __init__(self):
    super().__init__()
{layers}

  def forward(self, images):
    x = self.backbone(images)
    x = self.connector(self.resize(x))
    return self.head(self.pool(x))
"""


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

  The file defines `Student`, a module that is made without arguments, takes
  normalised images (B, C, H, W) of the network's size and returns logits
  (B, K).

  Args:
    network: has a connector; its backbone is of backbone_source.WRITERS, and
      ends at a stage if it is a DeiT or MobileNetV3Small.
    backbone_name: what the text calls the backbone.
    pool_backbone: whose pool the network has; None: the plain average.
    image_shape: (H, W, C) of the images before preprocessing.
    num_classes: K.
    suffix: of the file with its arrays, which the text says how to load.

  Raises:
    config_utils.UserError: the network has a part that cannot be written.
  """
  connector = network.connector
  if connector is None:
    raise config_utils.UserError(
      'only a connected student is written as a PyTorch module: this network '
      'has no connector, the published module of its backbone runs it'
    )
  connector_name(connector)  # Refuses a connector from elsewhere.
  features, is_map = connector.features, connector.takes == 'map'
  size = tuple(network.connect_size) if is_map else 1
  pool = ['nn.AdaptiveAvgPool2d(1)', 'nn.Flatten()']
  if is_map and pool_name(pool_backbone):
    width = mobilenet_v3.POOLED_WIDTH
    pool += [f'nn.Linear({features}, {width})', 'nn.Hardswish()']
    features = width
  layers = {
    'backbone': backbone_source.write(
      network.backbone, network.preprocessing.size, image_shape[2]
    ),
    'resize': f'nn.AdaptiveAvgPool2d({size})',
    'connector': backbone_source.sequential(_connector(network, image_shape)),
    'pool': backbone_source.sequential(pool),
    'head': f'nn.Linear({features}, {num_classes})',
  }
  lines = '\n'.join(f'self.{name} = {call}' for name, call in layers.items())
  code = _with_definitions(
    STUDENT.format(layers=textwrap.indent(lines, '    '))
  )
  if type(network.backbone) is models.ResNet and network.backbone.cifar:
    # Their blocks are torchvision's, but for this name.
    code = code.replace('downsample', 'shortcut')
  about = _about(network, backbone_name, image_shape[2], num_classes, suffix)
  return about + code


def connector_name(connector: connectors.Connector) -> dict[str, str]:
  """Returns the index in an nn.Sequential of each layer of a connector.

  Raises:
    config_utils.UserError: the connector is none of this package.
  """
  if config_utils.reference(connector, connectors.CONNECTORS) not in CONNECTORS:
    raise config_utils.UserError(
      f'a {type(connector).__name__} connector cannot be written as a PyTorch '
      f'module: that is for {", ".join(CONNECTORS)}'
    )
  convolutions = {f'Conv_{i}': str(3 * i) for i in range(3)}
  return convolutions | {f'BatchNorm_{i}': str(3 * i + 1) for i in range(3)}


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


def _connector(network, image_shape):
  """Returns a connector's layers, which the shapes of its arrays tell."""
  key, layers, channels = jax.random.key(0), [], None
  shapes = jax.eval_shape(lambda: network.init(key, image_shape, None))
  params = shapes['params']['connector']
  for name in sorted(name for name in params if name.startswith('Conv_')):
    kernel, _, narrow, width = params[name]['kernel'].shape
    if 'bias' in params[name]:
      return [f'nn.Conv2d({narrow}, {width}, {kernel})']
    channels = channels or narrow
    numbers = f'{channels}, {width}, {kernel}'
    if channels > narrow:
      numbers += f', groups={channels // narrow}'
    layers += [f'conv({numbers})', f'nn.BatchNorm2d({width})', 'nn.ReLU()']
    channels = width
  if network.connector.signed:
    return layers[:-1]
  return layers or ['nn.ReLU()']


def _about(network, name, channels, num_classes, suffix):
  """Returns a file's docstring."""
  if name not in models.BACKBONES:  # It could be long, or end the docstring.
    name = type(network.backbone).__name__
  preprocessing, numbers, end = network.preprocessing, '', ''
  if network.backbone.num_stages is not None:
    end = f'The backbone ends at {network.backbone.tap}.\n\n'
  if channels <= MAX_LISTED_CHANNELS:
    for key in ('mean', 'std'):
      values = [f'{value:.6g}' for value in getattr(preprocessing, key)]
      numbers += f'  {key} = ({", ".join(values)})\n'
  return ABOUT.format(
    name=name,
    end=end,
    connector=config_utils.reference(network.connector, connectors.CONNECTORS),
    num_classes=num_classes,
    load=LOAD if suffix == '.safetensors' else LOAD_TORCH,
    shape=', '.join(map(str, ('B', channels, *preprocessing.size))),
    numbers=f'\n{numbers}' if numbers else '',
  )


def _with_definitions(code):
  """Returns code below the imports and definitions of BLOCKS that it uses."""
  lines = [*BLOCKS.read_text().splitlines(keepends=True), '\n', '\n']
  end = len(lines)
  # From the last: a definition uses none below it.
  for node in reversed(ast.parse(''.join(lines)).body[1:]):
    start = node.lineno - 1
    is_import = isinstance(node, ast.Import | ast.ImportFrom)
    name = node.names[0].name if is_import else node.name
    used = [x.id for x in ast.walk(ast.parse(code)) if isinstance(x, ast.Name)]
    if name in used:
      code = ''.join(lines[start:end]) + code
    end = start
  return code
