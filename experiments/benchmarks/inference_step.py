"""Inference of a classifier in one runtime, as a process that is timed."""

import argparse

import jax
import numpy as np

from experiments.benchmarks import classifiers
from experiments.benchmarks import worker
from ijckd_jax.deploy import deployed as deployed_lib
from ijckd_jax.deploy import onnx_files
from ijckd_jax.runtime import cpu_memory

MAX_ERROR = 1e-3  # Of the largest logit: else it is another network.


def with_jax(bundle, num_threads):
  """Returns the bundle as it was trained."""
  del num_threads  # XLA takes all cores.
  network = bundle.network

  @jax.jit
  def call(variables, images):
    return network(variables, network.preprocessing(images)).logits

  variables = jax.device_put(bundle.variables)
  return lambda images: np.asarray(call(variables, images))


def with_jax_folded(bundle, num_threads):
  """Returns the bundle with its batch norms folded."""
  del num_threads
  deployed = deployed_lib.deploy(bundle)
  call, arrays = jax.jit(deployed.logits), jax.device_put(deployed.arrays)
  return lambda images: np.asarray(call(arrays, images))


def with_onnxruntime(bundle, num_threads):
  """Returns the exported file."""
  data = onnx_files.encode(deployed_lib.deploy(bundle))
  session = onnx_files.Session(data, 'model', num_threads)
  return lambda images: session(images)[0]


def with_torch(bundle, num_threads, *, is_compiled=False):
  """Returns the same network in PyTorch."""
  import torch

  from ijckd_jax.pytorch import published_names
  from tests import torch_networks

  torch.set_num_threads(num_threads)
  height, width, channels = bundle.image_shape
  if bundle.network.connector is None:
    net = torch_networks.build(
      bundle.backbone_name, len(bundle.class_names), channels
    )
  else:
    names = {}
    exec(published_names.module_source(bundle), names)
    net = names['Student']()
  state = published_names.state_dict(bundle)
  net.load_state_dict({k: torch.from_numpy(x) for k, x in state.items()})
  net = net.eval().to(memory_format=torch.channels_last)
  preprocessing = bundle.network.preprocessing
  mean, std = (
    torch.tensor(x).reshape(-1, 1, 1)
    for x in (preprocessing.mean, preprocessing.std)
  )

  def forward(images):
    return net((images.permute(0, 3, 1, 2).float() / 255 - mean) / std)

  if is_compiled:
    # Folds batch norms and packs weights, as for a network that only predicts.
    torch._inductor.config.freezing = True
    forward = torch.compile(forward)

  def call(images):
    with torch.no_grad():
      return forward(torch.from_numpy(images)).numpy()

  return call


def with_torch_compiled(bundle, num_threads):
  """Returns the same, compiled."""
  return with_torch(bundle, num_threads, is_compiled=True)


RUNTIMES = {
  'JAX': with_jax,
  'JAX, folded': with_jax_folded,
  'onnxruntime': with_onnxruntime,
  'PyTorch': with_torch,
  'PyTorch, compiled': with_torch_compiled,
}


def main():
  """Serves batches of each size."""
  parser = argparse.ArgumentParser()
  parser.add_argument('case', choices=classifiers.CASES)
  parser.add_argument('which')
  parser.add_argument('runtime', choices=RUNTIMES)
  parser.add_argument('num_threads', type=int)
  args = parser.parse_args()
  case = classifiers.CASES[args.case]
  bundle = case.bundle(args.which)
  call = RUNTIMES[args.runtime](bundle, args.num_threads)
  # Not before: what building took would stay with the process.
  cpu_memory.keep_freed()
  random, steps = np.random.RandomState(0), {}
  for size in classifiers.BATCH_SIZES:
    images = random.randint(0, 256, (size, *case.image_shape)).astype(np.uint8)
    steps[str(size)] = lambda images=images: call(images)
  wanted = with_jax(bundle, 0)(images[:4])
  del bundle
  error = np.abs(call(images)[:4] - wanted).max() / np.abs(wanted).max()
  if not error < MAX_ERROR:
    raise RuntimeError(f'{args}: logits are off by {error}')
  worker.serve_kinds(steps, lambda: None)


if __name__ == '__main__':
  main()
