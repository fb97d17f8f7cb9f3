"""A network of PyTorch, as a class and as a function that makes one."""

import torch


class TorchNet(torch.nn.Module):
  """Does nothing."""


def torch_net(**fields):
  """Returns the network."""
  del fields
  return TorchNet()
