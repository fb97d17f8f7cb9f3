"""What a converted ResNet50 costs on a TPU, beside the one that is ours.

  python -m experiments.converted.tpu_cost BUNDLE

BUNDLE is a converted timm:resnet50, of any weights. Compiles both alone, for
64 images on a chip that need not be there.
"""

import sys

from ijckd_jax import compile as compile_lib

TOPOLOGY = 'v5e:2x2'
IMAGES = 64
SHAPE = (224, 224, 3)


def cost(teacher, device) -> tuple[float, float, float]:
  """Returns the GFLOP, and MB of HBM and of all memories, of an image."""
  import jax
  import jax.numpy as jnp

  from ijckd_jax import roofline

  place = jax.sharding.SingleDeviceSharding(device)
  arguments = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place),
    (teacher.frozen, jax.ShapeDtypeStruct((IMAGES, *SHAPE), jnp.uint8)),
  )

  def run(frozen, images):
    result = teacher(frozen, images)
    return result.final, result.logits

  compiled = jax.jit(run).lower(*arguments).compile()
  found = compiled.cost_analysis()
  moved = roofline.traffic(compiled.as_text()).hbm
  return (
    found['flops'] / IMAGES / 1e9,
    moved / IMAGES / 1e6,
    found['bytes accessed'] / IMAGES / 1e6,
  )


def main(bundle: str) -> None:
  """Prints both in both dtypes, and their ratios."""
  compile_lib.prepare_environment()
  import jax.numpy as jnp

  from ijckd_jax import bundles
  from ijckd_jax import datasets
  from ijckd_jax import run_teachers

  device = compile_lib.topology_devices(TOPOLOGY)[0]
  for dtype in (jnp.float32, jnp.bfloat16):
    converted = bundles.load(bundle, dtype=dtype, trust_programs=True).teacher()
    native = run_teachers.abstract(
      'resnet50', datasets.get('imagenet2012')(), converted.preprocessing, dtype
    )
    costs = [cost(teacher, device) for teacher in (native, converted)]
    for name, (flops, hbm, moved) in zip(
      ('native', 'converted'), costs, strict=True
    ):
      print(
        f'{jnp.dtype(dtype).name} {name}: {flops:.3f} GFLOP, {hbm:.2f} MB of '
        f'HBM, {moved:.2f} MB by XLA per image'
      )
    ratios = (f'{b / a:.3f}' for a, b in zip(*costs, strict=True))
    print(f'{jnp.dtype(dtype).name} converted/native: {", ".join(ratios)}')


if __name__ == '__main__':
  main(sys.argv[1])
