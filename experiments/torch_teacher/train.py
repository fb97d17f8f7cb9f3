"""Trains a teacher in PyTorch alone, and writes what it predicts.

  python -m experiments.torch_teacher.train OUT

OUT/teacher.pth is a file such as RepDistiller leaves, OUT/predictions.npy what
the network in it says of Fashion-MNIST's test images.
"""

import pathlib
import sys

import numpy as np
import torch
from torch import nn

from ijckd_jax.data.datasets import fashion_mnist
from tests import torch_networks

EPOCHS = 2
BATCH_SIZE = 128


def batches(arrays, order):
  """Yields normalised images (B, 1, 28, 28) and labels."""
  data = fashion_mnist.Dataset
  for start in range(0, len(order), BATCH_SIZE):
    chosen = arrays.take(order[start : start + BATCH_SIZE])
    images = chosen.images.transpose(0, 3, 1, 2).astype(np.float32) / 255
    images = (images - np.float32(data.mean)) / np.float32(data.std)
    yield torch.from_numpy(images), torch.from_numpy(chosen.labels).long()


def main(out):
  """Trains, tests and writes."""
  torch.manual_seed(0)
  torch.set_num_threads(2)
  folder = pathlib.Path(out)
  folder.mkdir(parents=True, exist_ok=True)
  data = fashion_mnist.Dataset()
  train, test = data.load('train'), data.load('test')
  net = torch_networks.build('resnet20', num_classes=10, channels=1)
  net = net.to(memory_format=torch.channels_last)
  optimizer = torch.optim.SGD(
    net.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4
  )
  num_steps = EPOCHS * -(-len(train) // BATCH_SIZE)
  schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, num_steps)
  for epoch in range(EPOCHS):
    net.train()
    order = np.random.default_rng(epoch).permutation(len(train))
    for images, labels in batches(train, order):
      loss = nn.functional.cross_entropy(net(images), labels)
      optimizer.zero_grad()
      loss.backward()
      optimizer.step()
      schedule.step()
    print(f'epoch {epoch + 1} of {EPOCHS}: loss {loss.item():.4f}', flush=True)
  net.eval()
  with torch.no_grad():
    predictions = torch.cat(
      [net(x).argmax(1) for x, _ in batches(test, np.arange(len(test)))]
    ).numpy()
  print(f'top-1 in PyTorch: {np.mean(predictions == test.labels):.6f}')
  np.save(folder / 'predictions.npy', predictions)
  torch.save(
    {'epoch': EPOCHS, 'model': net.state_dict()}, folder / 'teacher.pth'
  )


if __name__ == '__main__':
  main(*sys.argv[1:])
