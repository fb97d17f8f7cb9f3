"""The same step in PyTorch, as a process that `train_step` times.

The official objective with its weights of 1 (cross-entropy, logits and maps
through a bottleneck connector of factor 2, into the teacher's head), memory
laid out channels_last, SGD with PyTorch's fused kernel.
"""

import argparse
import copy
import itertools

import torch
from torch import nn
import torch.nn.functional as F

from experiments.benchmarks import pairs
from experiments.benchmarks import worker
from ijckd_jax import cpu_memory
from tests import torch_networks


def random_views(images: torch.Tensor) -> torch.Tensor:
  """Returns crops out of zero padding, mirrored at random: uint8 (B, C, H, W).

  Gathered for the whole batch at once, which is faster than image by image.
  """
  batch, channels, height, width = images.shape
  pad = pairs.CROP_PADDING
  padded = F.pad(images, (pad, pad, pad, pad))
  row, column = torch.randint(0, 2 * pad + 1, (2, batch, 1))
  rows = row + torch.arange(height)
  columns = column + torch.arange(width)
  mirrored = torch.rand(batch, 1) < 0.5
  columns = torch.where(mirrored, columns.flip(1), columns)
  return padded[
    torch.arange(batch)[:, None, None, None],
    torch.arange(channels)[:, None, None],
    rows[:, None, :, None],
    columns[:, None, None, :],
  ]


class Pair(nn.Module):
  """A student and its connector, beside a frozen teacher."""

  def __init__(self, pair: pairs.Pair):
    super().__init__()
    self.pair = pair
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

  def maps(self, net, name, images):
    """Returns the stages, and the map that is averaged."""
    return torch_networks._maps(net, name, images)

  def forward(self, images, labels):
    """Returns the loss; images are uint8 (B, C, H, W)."""
    x = images.contiguous(memory_format=torch.channels_last)
    x = (x.float() / 255 - pairs.MEAN) / pairs.STD
    with torch.no_grad():
      _, target = self.maps(self.teacher, self.pair.teacher, x)
      logits = self.head(target.mean((2, 3)))
    stages, _ = self.maps(self.backbone, self.pair.student, x)
    connected = self.connector(F.adaptive_avg_pool2d(stages[-1], self.size))
    predicted = self.head(connected.mean((2, 3)))
    return (
      F.cross_entropy(predicted, labels)
      + F.mse_loss(predicted, logits)
      + F.mse_loss(connected, F.adaptive_avg_pool2d(target, self.size))
    )


def main():
  """Serves steps."""
  parser = argparse.ArgumentParser()
  parser.add_argument('pair')
  parser.add_argument('mode', choices=['eager', 'compile'])
  parser.add_argument('num_threads', type=int)
  args = parser.parse_args()
  torch.set_num_threads(args.num_threads)
  cpu_memory.keep_freed()
  pair = pairs.PAIRS[args.pair]
  model = Pair(pair).to(memory_format=torch.channels_last)
  model.train()
  model.teacher.eval()
  model.head.requires_grad_(False)
  parameters = [
    *model.backbone.parameters(),
    *model.connector.parameters(),
  ]
  optimizer = torch.optim.SGD(
    parameters, 0.05, 0.9, weight_decay=5e-4, fused=True
  )
  loss_fn = torch.compile(model) if args.mode == 'compile' else model
  batches = []
  for seed in range(pairs.NUM_BATCHES):
    images, labels = (torch.from_numpy(x) for x in pair.batch(seed))
    batches.append((images.permute(0, 3, 1, 2), labels.long()))
  batches = itertools.cycle(batches)

  def step():
    images, labels = next(batches)
    optimizer.zero_grad()
    loss_fn(random_views(images), labels).backward()
    optimizer.step()

  worker.serve(step, lambda: None)


if __name__ == '__main__':
  main()
