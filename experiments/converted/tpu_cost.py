"""What a converted ResNet50 costs on a TPU, beside the one that is ours.

  python -m experiments.converted.tpu_cost BUNDLE

BUNDLE is a converted timm:resnet50, of any weights. Compiles both alone, for
64 images on a chip that need not be there.
"""

import sys

from ijckd_jax.commands import estimate

TOPOLOGY = 'v5e:2x2'
IMAGES = 64
SHAPE = (224, 224, 3)


def cost(teacher, device) -> tuple[float, float]:
  """Returns the GFLOP and the accessed MB of an image, by XLA's analysis."""
  import jax
  import jax.numpy as jnp

  from ijckd_jax.training import cost_estimate

  place = jax.sharding.SingleDeviceSharding(device)
  arguments = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place),
    (teacher.arrays, jax.ShapeDtypeStruct((IMAGES, *SHAPE), jnp.uint8)),
  )

  def run(arrays, images):
    result = teacher(arrays, images)
    return result.final, result.logits

  compiled = jax.jit(run).lower(*arguments).compile()
  flops, bytes_accessed = cost_estimate.program_cost(compiled, accumulation=1)
  return flops / IMAGES / 1e9, bytes_accessed / IMAGES / 1e6


def main(bundle: str) -> None:
  """Prints both in both dtypes, and their ratios."""
  estimate.prepare_environment()
  import jax.numpy as jnp

  from ijckd_jax.bundles import bundles
  from ijckd_jax.data import datasets
  from ijckd_jax.training import cost_estimate
  from ijckd_jax.training import teacher_loading

  device = cost_estimate.topology_devices(TOPOLOGY)[0]
  for dtype in (jnp.float32, jnp.bfloat16):
    converted = bundles.load(bundle, dtype=dtype, trust_programs=True).teacher()
    native = teacher_loading.abstract(
      'resnet50', datasets.get('imagenet2012')(), converted.preprocessing, dtype
    )
    costs = [cost(teacher, device) for teacher in (native, converted)]
    for name, (flops, accessed) in zip(
      ('native', 'converted'), costs, strict=True
    ):
      print(
        f'{jnp.dtype(dtype).name} {name}: {flops:.3f} GFLOP, {accessed:.2f} MB '
        'accessed per image'
      )
    ratios = (f'{b / a:.3f}' for a, b in zip(*costs, strict=True))
    print(f'{jnp.dtype(dtype).name} converted/native: {", ".join(ratios)}')


if __name__ == '__main__':
  main(sys.argv[1])
