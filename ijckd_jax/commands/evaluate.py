"""Evaluates a bundle on a data set.

ijckd evaluate --bundle runs/digits --dataset digits
"""

import json

from ijckd_jax.commands import bundle_flags
from ijckd_jax.runtime import config_utils

PROG = 'python -m ijckd_jax evaluate'


def main(argv: list[str], prog: str = PROG) -> None:
  """Runs the command."""
  parser = config_utils.ArgumentParser(
    prog=prog, description='Evaluates a bundle, by itself, on a data set.'
  )
  bundle_flags.add_flags(parser)
  parser.add_argument(
    '--split', default='test', choices=('train', 'validation', 'test')
  )
  parser.add_argument('--teacher', help='bundle or run to compare with')
  parser.add_argument('--json', action='store_true', help='print JSON')
  flags = parser.parse_args(argv)

  from ijckd_jax.bounds import pairs
  from ijckd_jax.bundles import bundles
  from ijckd_jax.evaluation import evaluator
  from ijckd_jax.runtime import compilation_cache
  from ijckd_jax.runtime import parallel

  compilation_cache.enable(compilation_cache.DEFAULT)
  bundle = bundles.load(flags.bundle, trust_code=flags.trust_code)
  batch_size = bundle_flags.batch_size_of(bundle, flags)
  dataset = bundle_flags.dataset_of(bundle, flags)
  bundle_flags.check_fits('bundle', bundle, dataset)
  bundle = bundle_flags.in_class_order('the bundle', bundle, dataset, flags)
  teacher, connected = None, None
  if flags.teacher:
    teacher_bundle = bundles.load(flags.teacher, trust_code=flags.trust_code)
    bundle_flags.check_fits('teacher', teacher_bundle, dataset)
    teacher_bundle = bundle_flags.in_class_order(
      'the teacher', teacher_bundle, dataset, flags, beside=bundle.class_names
    )
    teacher = teacher_bundle.teacher()
    if pairs.sees(bundle.network, bundle.variables, teacher):
      connected = bundle.network
  arrays = dataset.load(flags.split)
  if not len(arrays):
    raise config_utils.UserError(f'the split {flags.split!r} is empty')
  mapper = parallel.Mapper()
  evaluate = evaluator.make(
    bundle.network,
    mapper=mapper,
    batch_size=batch_size,
    teacher=teacher,
    connected=connected,
    num_workers=flags.num_workers,
  )
  teacher_arrays = mapper.replicate(teacher.arrays) if teacher else None
  result = evaluate(bundle.variables, teacher_arrays, arrays)
  named = {'student' if teacher else 'network': result.metrics}
  if teacher:
    named['teacher'] = result.teacher.metrics
  if flags.json:
    print(json.dumps({'examples': len(arrays), **named}))
    return
  print(f'{len(arrays)} examples of {flags.split}')
  for name, values in named.items():
    shown = '  '.join(f'{key} {value:.6f}' for key, value in values.items())
    print(f'{name}: {shown}')
