"""Says what a bundle's features are worth on a labelled data set.

  ijckd probe --bundle DIR --dataset digits

Its head, if it has one, is left out. A linear head is fitted on the features of
the training images (a linear probe), and the training images whose features are
most like an image's vote on its class (nearest neighbours). With --output, the
network is written with the linear probe as its head: a classifier for the data
set's classes, which can teach.
"""

import argparse
import json

from etils import epath

from ijckd_jax.commands import bundle_flags
from ijckd_jax.commands import output_flags
from ijckd_jax.runtime import config_utils

PROG = 'python -m ijckd_jax probe'


def main(argv: list[str], prog: str = PROG) -> None:
  """Runs the command."""
  parser = config_utils.ArgumentParser(
    prog=prog,
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  bundle_flags.add_flags(parser)
  parser.add_argument(
    '--neighbours', type=int, default=20, help='how many vote; default: 20'
  )
  parser.add_argument('--json', action='store_true', help='print JSON')
  parser.add_argument(
    '--output',
    type=config_utils.expand,
    help='folder of a bundle with the linear probe as its head',
  )
  output_flags.add_overwrite(parser)
  flags = parser.parse_args(argv)
  config_utils.check_positive('--neighbours', flags.neighbours)
  output = flags.output and epath.Path(flags.output)
  if output:
    output_flags.check_bundle(output, flags.overwrite)

  from ijckd_jax.bundles import bundles
  from ijckd_jax.data import datasets
  from ijckd_jax.evaluation import probes
  from ijckd_jax.runtime import compilation_cache

  compilation_cache.enable(compilation_cache.DEFAULT)
  bundle = bundles.load(flags.bundle, trust_code=flags.trust_code)
  batch_size = bundle_flags.batch_size_of(bundle, flags)
  dataset = bundle_flags.dataset_of(bundle, flags)
  bundle_flags.check_fits('bundle', bundle, dataset, has_head=False)
  splits = {split: dataset.load(split) for split in datasets.SPLITS}
  if not len(splits['test']):
    raise config_utils.UserError('the split test is empty')
  found, fitted = probes.score(
    bundle.network,
    bundle.variables,
    splits,
    len(dataset.class_names),
    batch_size=batch_size,
    num_workers=flags.num_workers,
    neighbours=flags.neighbours,
  )
  if output:
    made = bundle.with_head(
      fitted.head,
      dataset.class_names,
      bundle_flags.dataset_fields(bundle, flags).to_dict(),
      found,
    )
    output_flags.write(lambda: made.save(output), output)
  if flags.json:
    print(json.dumps(found))
    return
  size = 'x'.join(map(str, dataset.image_shape[:2]))
  print(
    f'{found["train"]} labelled training images, {found["test"]} of test, '
    f'of {size} pixels'
  )
  for name, what in (
    ('linear', 'linear probe'),
    ('nearest', f'{flags.neighbours} nearest neighbours'),
  ):
    print(f'{what}: top1 {found[name]["top1"]:.6f}')
  if output:
    print(f'written to {output}, with the linear probe as its head')
