"""A model card: what a bundle holds, what it was made of and is good for."""


def describe(bundle) -> str:
  """Returns in a line what a bundle's network is.

  Args:
    bundle: bundles.Bundle.
  """
  info, name = bundle.info, bundle.backbone_name
  method = info.get('method', {}).get('name')
  data = info.get('dataset', {}).get('name')
  if not method:
    origin = info.get('origin', {})
    return f'{name}, imported' + (
      f' from {origin["source"]}' if 'source' in origin else ''
    )
  teacher = info.get('teacher')
  done = f'distilled from {teacher} by {method}' if teacher else f'by {method}'
  return f'{name}, {done} on {data}'
