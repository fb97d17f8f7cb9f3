"""Trains a small ConvNeXt in PyTorch alone, and keeps it without its head.

  python -m experiments.converted.train_torch OUT.pth

On fashion_pairs_100 at half resolution, 20,000 pairs: more than its student
will see, as is usual of such teachers. OUT.pth has no entry of the head.
"""

import sys

import numpy as np
from timm.layers import norm
from timm.models import convnext
import torch
from torch import nn

from ijckd_jax.data.datasets import fashion_pairs

NUM_TRAIN = 20_000
EPOCHS = 10
BATCH_SIZE = 128
DEPTHS = (2, 4)
DIMS = (64, 128)


class Features(nn.Module):
  """A ConvNeXt of two stages for small grey images, without a head.

  It says where it can be cut, as timm's networks do.
  """

  def __init__(self):
    super().__init__()
    self.stem = nn.Conv2d(1, DIMS[0], 2, stride=2)
    self.stages = nn.Sequential(
      *(
        convnext.ConvNeXtStage(
          DIMS[max(0, number - 1)],
          DIMS[number],
          depth=DEPTHS[number],
          stride=1 if number == 0 else 2,
          norm_layer=norm.LayerNorm2d,
        )
        for number in range(len(DIMS))
      )
    )
    self.norm = nn.LayerNorm(DIMS[-1])

  def forward_features(self, x):
    """Returns the map (B, C, H, W)."""
    return self.stages(self.stem(x))

  def forward_head(self, x, pre_logits=False):
    """Returns the pooled features."""
    return self.norm(x.mean((2, 3)))

  def get_classifier(self):
    """Returns the head: there is none."""
    return nn.Identity()

  def forward(self, x):
    """Returns the pooled features."""
    return self.forward_head(self.forward_features(x))


def batches(arrays, order):
  """Yields normalised images (B, 1, H, W) and labels."""
  data = fashion_pairs.Dataset
  for start in range(0, len(order), BATCH_SIZE):
    chosen = arrays.take(order[start : start + BATCH_SIZE])
    images = chosen.images.transpose(0, 3, 1, 2).astype(np.float32) / 255
    images = (images - np.float32(data.mean)) / np.float32(data.std)
    yield torch.from_numpy(images), torch.from_numpy(chosen.labels).long()


def main(out: str) -> None:
  """Trains, tests and writes."""
  torch.manual_seed(0)
  torch.set_num_threads(2)
  data = fashion_pairs.Dataset(
    resolution='half', num_train=NUM_TRAIN, num_test=10_000
  )
  train, test = data.load('train'), data.load('test')
  features = Features()
  net = nn.Sequential(features, nn.Linear(DIMS[-1], len(data.class_names)))
  net = net.to(memory_format=torch.channels_last)
  optimizer = torch.optim.AdamW(net.parameters(), lr=2e-3, weight_decay=0.05)
  num_steps = EPOCHS * -(-len(train) // BATCH_SIZE)
  schedule = torch.optim.lr_scheduler.OneCycleLR(
    optimizer, 2e-3, total_steps=num_steps
  )
  for epoch in range(EPOCHS):
    net.train()
    order = np.random.default_rng(epoch).permutation(len(train))
    for images, labels in batches(train, order):
      images = images.to(memory_format=torch.channels_last)
      loss = nn.functional.cross_entropy(net(images), labels)
      optimizer.zero_grad()
      loss.backward()
      optimizer.step()
      schedule.step()
    print(f'epoch {epoch + 1} of {EPOCHS}: loss {loss.item():.4f}', flush=True)
  net.eval()
  with torch.no_grad():
    right = sum(
      (net(images).argmax(1) == labels).sum().item()
      for images, labels in batches(test, np.arange(len(test)))
    )
  print(f'top-1 in PyTorch, by its own head: {100 * right / len(test):.2f}')
  torch.save(features.state_dict(), out)


if __name__ == '__main__':
  main(*sys.argv[1:])
