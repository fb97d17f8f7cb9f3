"""Makes the views of one batch on two and on eight virtual devices.

A process has its number of devices for life, so a test runs this as a child:

  python views_on_devices.py OUT.npz
"""

import pathlib
import sys

import jax
import numpy as np

from ijckd_jax.distillation import steps
from ijckd_jax.training import experiment

ROOT = pathlib.Path(__file__).parents[1]
SEED = 5
NUM_DEVICES = (2, 8)
FIELDS = {
  'dataset.flip': True,
  'augment.inception_crop': True,
  'augment.randaugment_layers': 2,
  'augment.erasing_probability': 0.5,
  'augment.mixup_alpha': 1.0,
  'augment.cutmix_alpha': 1.0,
}


def make_batch():
  """Returns a global batch, some rows without a label."""
  rng = np.random.default_rng(1)
  return {
    'image': rng.integers(0, 256, (48, 8, 8, 1)).astype(np.uint8),
    'label': rng.integers(-1, 10, 48).astype(np.int32),
    'index': np.arange(48, dtype=np.int32),
    'epoch': np.arange(48, dtype=np.int32) // 20,
  }


def make_body():
  """Returns what makes a device's views and labels, as its step does."""
  config = experiment.default_config(
    dataset='digits', teacher='resnet8', student='resnet8', method='ce'
  )
  config.total_epochs = 1.0
  config.update_from_flattened_dict(FIELDS)
  exp = experiment.build(config)

  def body(batch):
    key, place = jax.random.key(SEED), (batch['epoch'], batch['index'])
    stream = jax.random.fold_in(key, steps.AUGMENTATION_STREAM)
    images = exp.augmentation(stream, batch['image'], *place)
    stream = jax.random.fold_in(key, steps.MIXING_STREAM)
    return exp.mixing(stream, images, batch['label'], *place)

  return body


def views(batch):
  """Returns the views and labels of the whole batch, by one device."""
  options = {'xla_backend_optimization_level': 0}  # Compiles faster.
  return jax.device_get(jax.jit(make_body(), compiler_options=options)(batch))


def main(out):
  jax.config.update('jax_num_cpu_devices', max(NUM_DEVICES))
  body = make_body()
  batch, found = make_batch(), {'devices': NUM_DEVICES}
  for number in NUM_DEVICES:
    shards = jax.tree.map(
      lambda x, n=number: x.reshape(n, -1, *x.shape[1:]), batch
    )
    made = jax.pmap(body, devices=jax.devices()[:number])(shards)
    images, labels = jax.tree.map(
      lambda x: np.asarray(x).reshape(-1, *x.shape[2:]), made
    )
    found[f'{number}/images'] = images
    for name in ('own', 'other', 'weight'):
      found[f'{number}/{name}'] = getattr(labels, name)
  np.savez(out, **found)


if __name__ == '__main__':
  main(*sys.argv[1:])
