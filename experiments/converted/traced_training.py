"""Trains networks of PyTorch that torchax traced, step by step beside PyTorch.

  python -m experiments.converted.traced_training --output traced_training.json

Each step starts from PyTorch's state, in float64, by SGD with momentum on the
labels. torchax alone would leave out the running statistics and take the biased
variance for them, so every batch norm is written out here, and what it computes
is a result of the trace, which is one of a whole batch.
"""

import argparse
import copy
import json
import pathlib
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import timm
import torch
import torchax

MODELS = ('resnet18', 'efficientnet_b0')
NUM_STEPS, BATCH_SIZE, SIDE, NUM_CLASSES = 20, 8, 32, 10
RATE, MOMENTUM = 0.01, 0.9


def main() -> None:
  """Runs the command."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--output', type=pathlib.Path, required=True)
  flags = parser.parse_args()
  jax.config.update('jax_enable_x64', True)
  torch.set_default_dtype(torch.float64)
  found = {name: compare(name) for name in MODELS}
  flags.output.write_text(json.dumps(found, indent=1) + '\n')


def compare(name: str) -> dict[str, float]:
  """Returns the largest differences over NUM_STEPS steps from PyTorch's state.

  Args:
    name: of timm's network, which starts at random.

  Returns:
    'loss', relative; and 'arrays', of the parameters and the running
    statistics, relative to the largest number of each array but at least to 1.
  """
  torch.manual_seed(0)
  model = timm.create_model(name, num_classes=NUM_CLASSES).train()
  step = _make_step(copy.deepcopy(model))
  optimizer = torch.optim.SGD(model.parameters(), RATE, MOMENTUM)
  random = np.random.RandomState(0)
  found = {'loss': 0.0, 'arrays': 0.0}
  for _ in range(NUM_STEPS):
    images = random.normal(size=(BATCH_SIZE, 3, SIDE, SIDE))
    labels = random.randint(0, NUM_CLASSES, BATCH_SIZE)
    velocity = {
      key: optimizer.state[parameter]['momentum_buffer'].numpy().copy()
      if optimizer.state
      else np.zeros(parameter.shape)
      for key, parameter in model.named_parameters()
    }
    loss, arrays = step(_arrays(model), velocity, images, labels)
    theirs = torch.nn.functional.cross_entropy(
      model(torch.from_numpy(images)), torch.from_numpy(labels)
    )
    optimizer.zero_grad()
    theirs.backward()
    optimizer.step()
    theirs = theirs.item()
    found['loss'] = max(found['loss'], abs(float(loss) - theirs) / theirs)
    for key, wanted in _arrays(model).items():
      error = np.abs(arrays[key] - wanted).max() / max(1, np.abs(wanted).max())
      found['arrays'] = max(found['arrays'], float(error))
  return found


def _arrays(model) -> dict[str, np.ndarray]:
  """Returns parameters and running statistics, without counters."""
  return {
    key: value.numpy().copy()
    for key, value in model.state_dict().items()
    if value.is_floating_point()
  }


def _make_step(model):
  """Returns a training step in JAX, `(arrays, velocity, images, labels)`.

  It gives the loss before the step, and the arrays after it.
  """
  norms = [
    (name, module)
    for name, module in model.named_modules()
    if isinstance(module, torch.nn.BatchNorm2d)
  ]
  for _, module in norms:
    module.num_batches_tracked = None
  _, call = torchax.extract_jax(model, dedup_parameters=False)
  names = {name for name, _ in model.named_parameters()}

  def loss_fn(parameters, buffers, images, labels):
    statistics = []
    with mock.patch.object(
      torch.nn.functional, 'batch_norm', _batch_norm(statistics)
    ):
      logits = call({**parameters, **buffers}, (images,))
    updated = dict(buffers)
    for (name, _), (mean, var) in zip(norms, statistics, strict=True):
      updated[f'{name}.running_mean'] = mean.jax()
      updated[f'{name}.running_var'] = var.jax()
    log_probs = jax.nn.log_softmax(logits)
    return -jnp.mean(log_probs[jnp.arange(len(labels)), labels]), updated

  @jax.jit
  def step(arrays, velocity, images, labels):
    parameters = {key: x for key, x in arrays.items() if key in names}
    buffers = {key: x for key, x in arrays.items() if key not in names}
    (loss, buffers), gradients = jax.value_and_grad(loss_fn, has_aux=True)(
      parameters, buffers, images, labels
    )
    updated = {
      key: x - RATE * (MOMENTUM * velocity[key] + gradients[key])
      for key, x in parameters.items()
    }
    return loss, {**updated, **buffers}

  return step


def _batch_norm(statistics: list):
  """Returns batch norm in training, which notes its new running statistics."""

  def batch_norm(
    x, running_mean, running_var, weight, bias, training, momentum, eps
  ):
    assert training
    count = x.numel() // x.shape[1]
    mean = x.mean((0, 2, 3), keepdim=True)
    var = ((x - mean) ** 2).mean((0, 2, 3), keepdim=True)
    unbiased = var.flatten() * count / (count - 1)
    statistics.append(
      (
        (1 - momentum) * running_mean + momentum * mean.flatten(),
        (1 - momentum) * running_var + momentum * unbiased,
      )
    )
    scaled = (x - mean) / torch.sqrt(var + eps)
    return scaled * weight[:, None, None] + bias[:, None, None]

  return batch_norm


if __name__ == '__main__':
  main()
