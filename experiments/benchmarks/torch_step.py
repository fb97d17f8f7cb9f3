"""The same step in PyTorch, as a process that `train_step` and `gpu` time.

The official objective with its weights of 1 (cross-entropy, logits and maps
through a bottleneck connector of factor 2, into the teacher's head), memory
laid out channels_last, SGD with PyTorch's fused kernel. On a GPU: cuDNN's best
algorithms, autocast for bfloat16, TF32 for float32, and the whole step, from
the crop to the update, as one CUDA graph.
"""

import argparse
import copy
import itertools

import torch
from torch import nn
import torch.nn.functional as F

from experiments.benchmarks import pairs
from experiments.benchmarks import worker
from ijckd_jax.runtime import cpu_memory
from tests import torch_networks

MODES = ('eager', 'compile', 'graph', 'compile_graph', 'reduce_overhead')
# Layers after the last stage, which a student that is connected there lacks.
AFTER_STAGES = {'wrn': 'bn1', 'mobilenet_v2_cifar': 'conv2'}
# CUDA graphs are captured after a few steps on a stream beside the main one.
WARM_UP = 4
PRODUCT_SIDE = 2048


def random_views(images: torch.Tensor, pad: int) -> torch.Tensor:
  """Returns crops out of zero padding, mirrored at random: uint8 (B, C, H, W).

  Gathered for the whole batch at once, which is faster than image by image.

  Args:
    images: uint8 (B, H, W, C); the result is laid out so too.
    pad: pixels of zeros on each side; 0 for no crop.
  """
  batch, height, width, _ = images.shape
  device = images.device
  mirrored = torch.rand(batch, 1, device=device) < 0.5
  if not pad:
    views = torch.where(mirrored[..., None, None], images.flip(2), images)
    return views.permute(0, 3, 1, 2)
  images = F.pad(images, (0, 0, pad, pad, pad, pad))
  row, column = torch.randint(0, 2 * pad + 1, (2, batch, 1), device=device)
  rows = row + torch.arange(height, device=device)
  columns = column + torch.arange(width, device=device)
  columns = torch.where(mirrored, columns.flip(1), columns)
  numbers = torch.arange(batch, device=device)[:, None, None]
  views = images[numbers, rows[:, :, None], columns[:, None, :]]
  return views.permute(0, 3, 1, 2)


class Pair(nn.Module):
  """A student and its connector, beside a frozen teacher."""

  def __init__(
    self,
    pair: pairs.Pair,
    dtype: torch.dtype,
    memory_format: torch.memory_format,
  ):
    super().__init__()
    self.pair, self.dtype = pair, dtype
    self.memory_format = memory_format
    channels = pair.image_shape[-1]
    self.teacher, self.backbone = (
      torch_networks.build(name, pair.num_classes, channels)
      for name in (pair.teacher, pair.student)
    )
    self.teacher.requires_grad_(False)
    images = torch.zeros(2, channels, *pair.image_shape[:2])
    with torch.no_grad():
      _, final = self.maps(self.teacher.eval(), pair.teacher, images)
      stages, _ = self.maps(self.backbone.eval(), pair.student, images)
    for start, name in AFTER_STAGES.items():
      if pair.student.startswith(start):
        self.backbone.set_submodule(name, nn.Identity())
    self.head = copy.deepcopy(list(self.teacher.children())[-1])
    if isinstance(self.head, nn.Sequential):
      self.head = self.head[-1]
    sizes = zip(final.shape[2:], stages[-1].shape[2:], strict=True)
    self.size = [min(size) for size in sizes]
    inputs, width = stages[-1].shape[1], final.shape[1]
    self.connector = nn.Sequential()
    for features, kernel in ((width // 2, 1), (width // 2, 3), (width, 1)):
      self.connector.extend(
        [
          nn.Conv2d(inputs, features, kernel, padding=kernel // 2, bias=False),
          nn.BatchNorm2d(features),
          nn.ReLU(),
        ]
      )
      inputs = features
    # Autocast would cast the weights of a frozen network anew in every step.
    for module in (*self.teacher.modules(), self.head):
      if isinstance(module, nn.Conv2d | nn.Linear):
        module.to(dtype)
    # Nothing reads these counts, and each would be a kernel in every step.
    for module in self.modules():
      if isinstance(module, nn.BatchNorm2d):
        module.num_batches_tracked = None

  def maps(self, net, name, images):
    """Returns the stages, and the map that is averaged."""
    return torch_networks._maps(net, name, images)

  def fit(self, feature_map):
    """Returns a map pooled to the smaller of both sizes."""
    if list(feature_map.shape[2:]) == self.size:
      return feature_map
    return F.adaptive_avg_pool2d(feature_map, self.size)

  def prepare(self, images):
    """Returns the networks' input (B, C, H, W) of uint8 images likewise."""
    # In few kernels, and cast once for both networks.
    x = (images - 255 * pairs.MEAN) / (255 * pairs.STD)
    x = x.to(self.dtype)
    # A view of channels that come last already, but for a single channel.
    return x.contiguous(memory_format=self.memory_format)

  def teach(self, x):
    """Returns the teacher's map and logits."""
    with torch.no_grad():
      _, target = self.maps(self.teacher, self.pair.teacher, x)
      return target, self.head(target.mean((2, 3)))

  def study(self, x):
    """Returns the connected map and the student's logits."""
    stages, _ = self.maps(self.backbone, self.pair.student, x)
    connected = self.connector(self.fit(stages[-1]))
    return connected, self.head(connected.mean((2, 3)))

  def loss(self, taught, studied, labels):
    """Returns the objective."""
    (target, logits), (connected, predicted) = taught, studied
    return (
      F.cross_entropy(predicted.float(), labels)
      + F.mse_loss(predicted.float(), logits.float())
      + F.mse_loss(connected.float(), self.fit(target).float())
    )

  def forward(self, images, labels):
    """Returns the loss of uint8 images (B, H, W, C)."""
    x = self.prepare(random_views(images, self.pair.crop_padding))
    low = self.dtype != torch.float32
    # Each weight is read once: to keep what it was cast to would serve nothing.
    with torch.autocast(
      x.device.type, self.dtype, enabled=low, cache_enabled=False
    ):
      taught, studied = self.teach(x), self.study(x)
    return self.loss(taught, studied, labels)


def make_batches(pair, device):
  """Returns random batches on the device: images (B, H, W, C) and labels."""
  batches = []
  for seed in range(pairs.NUM_BATCHES):
    images, labels = map(torch.from_numpy, pair.batch(seed))
    batches.append((images.to(device), labels.long().to(device)))
  return batches


def make_model(pair, device, dtype, memory_format):
  """Returns the networks, ready to train."""
  model = Pair(pair, dtype, memory_format)
  model.to(device, memory_format=memory_format)
  model.train()
  model.teacher.eval()
  model.head.requires_grad_(False)
  return model


def make_parts(pair, mode):
  """Returns functions that make a part of a step by name, and that wait.

  As jax_step.make_parts; and 'product', of two square matrices of side
  PRODUCT_SIDE. On a CPU, in float32.
  """
  model = make_model(pair, 'cpu', torch.float32, torch.channels_last)
  images, labels = make_batches(pair, 'cpu')[0]
  views = images.permute(0, 3, 1, 2)
  with torch.no_grad():
    taught = model.teach(model.prepare(views))

  def teacher(views):
    return model.teach(model.prepare(views))

  def student(views):
    with torch.no_grad():
      return model.study(model.prepare(views))

  def loss(views, labels):
    return model.loss(taught, model.study(model.prepare(views)), labels)

  if mode == 'compile':
    teacher, student, loss = map(torch.compile, (teacher, student, loss))

  def gradient():
    model.zero_grad()
    loss(views, labels).backward()

  matrix = torch.randn(PRODUCT_SIDE, PRODUCT_SIDE)
  return {
    'teacher': lambda: teacher(views),
    'student': lambda: student(views),
    'gradient': gradient,
    'product': lambda: matrix @ matrix,
  }, lambda: None


def make_step(pair, mode, device, dtype, memory_format):
  """Returns functions that make a step, that wait, and that describe it."""
  model = make_model(pair, device, dtype, memory_format)
  parameters = [
    *model.backbone.parameters(),
    *model.connector.parameters(),
  ]
  optimizer = torch.optim.SGD(
    parameters, pairs.LEARNING_RATE, 0.9, weight_decay=5e-4, fused=True
  )
  loss_fn = model
  if mode.startswith('compile'):
    loss_fn = torch.compile(model)
  elif mode == 'reduce_overhead':
    loss_fn = torch.compile(model, mode='reduce-overhead')
  turns, last = itertools.cycle(make_batches(pair, device)), None

  def update(images, labels):
    optimizer.zero_grad()
    loss = loss_fn(images, labels)
    loss.backward()
    optimizer.step()
    return loss.detach()

  def call():
    return update(*next(turns))

  if mode.endswith('graph'):
    call = capture(update, turns)

  def step():
    nonlocal last
    last = call()

  def wait():
    assert torch.isfinite(last), last  # Waits for the device.

  def facts():
    peak = torch.cuda.max_memory_allocated() if device == 'cuda' else 0
    return {'device_memory': peak}

  return step, wait, facts


def capture(update, turns):
  """Returns a step that replays `update` as a CUDA graph on a copied batch."""
  images, labels = (x.clone() for x in next(turns))
  stream = torch.cuda.Stream()
  stream.wait_stream(torch.cuda.current_stream())
  with torch.cuda.stream(stream):
    for _ in range(WARM_UP):
      update(images, labels)
  torch.cuda.current_stream().wait_stream(stream)
  torch.cuda.synchronize()
  # What cuDNN tried out before it chose does not count.
  torch.cuda.reset_peak_memory_stats()
  graph = torch.cuda.CUDAGraph()
  # On the same stream, in case autograd kept nodes that are tied to it.
  with torch.cuda.graph(graph, stream=stream):
    loss = update(images, labels)

  def step():
    new_images, new_labels = next(turns)
    images.copy_(new_images)
    labels.copy_(new_labels)
    graph.replay()
    return loss

  return step


def main():
  """Serves steps."""
  parser = argparse.ArgumentParser()
  parser.add_argument('pair', choices=pairs.ALL_PAIRS)
  parser.add_argument('mode', choices=MODES)
  parser.add_argument('num_threads', type=int)
  parser.add_argument('--device', default='cpu', choices=['cpu', 'cuda'])
  parser.add_argument(
    '--dtype', default='float32', choices=['float32', 'bfloat16']
  )
  parser.add_argument(
    '--channels_first', action='store_true', help='in memory; else last'
  )
  parser.add_argument(
    '--small', action='store_true', help='few small images, to rehearse'
  )
  parser.add_argument(
    '--parts', action='store_true', help='serve the parts of a step, on a CPU'
  )
  args = parser.parse_args()
  torch.set_num_threads(args.num_threads)
  if args.device == 'cuda':
    torch.backends.cudnn.benchmark = True
    torch.set_float32_matmul_precision('high')  # TF32, as convolutions take.
  else:
    cpu_memory.keep_freed()
  pair, dtype = pairs.ALL_PAIRS[args.pair], getattr(torch, args.dtype)
  pair = pair.small() if args.small else pair
  if args.parts:
    worker.serve_kinds(*make_parts(pair, args.mode))
    return
  memory_format = torch.channels_last
  if args.channels_first:
    memory_format = torch.contiguous_format
  worker.serve(*make_step(pair, args.mode, args.device, dtype, memory_format))


if __name__ == '__main__':
  main()
