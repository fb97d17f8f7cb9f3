"""Whether what is shipped is what was trained: compared on real images."""

from collections.abc import Callable
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from ijckd_jax.bundles import bundles
from ijckd_jax.data import input_pipeline
from ijckd_jax.runtime import config_utils

# Of the largest logit: float32's rounding over some hundred layers; and that of
# weights of 11 bits. Eight bits have no such limit.
MAX_ERROR = {'float32': 1e-4, 'float16': 0.02}
# Images of which the prediction may differ, as two logits are nearly equal.
MIN_AGREEMENT = {'float32': 0.999, 'float16': 0.99}
BATCH_SIZE = 64


def images(
  dataset, split: str, count: int, order: np.ndarray | None = None
) -> Iterator[dict[str, np.ndarray]]:
  """Yields up to `count` examples of a split, taken evenly from all of it.

  Args:
    dataset: see datasets.
    split: its name.
    count: at most so many.
    order: (K,) of each of the data set's classes, its number in the labels;
      None: the same.

  Yields:
    'image' uint8 and 'label', of up to BATCH_SIZE examples each.

  Raises:
    config_utils.UserError: the split is empty.
  """
  arrays = dataset.load(split)
  if not len(arrays):
    raise config_utils.UserError(f'the split {split!r} is empty')
  rows = evenly(len(arrays), count)
  for batch in input_pipeline.eval_batches(
    arrays.subset(rows),
    batch_size=min(BATCH_SIZE, len(rows)),
    process_index=0,
    num_processes=1,
    what='checking the export',
  ):
    image, label = (batch[key][batch['mask']] for key in ('image', 'label'))
    if order is not None:
      label = np.where(label < 0, -1, order[label])
    yield {'image': image, 'label': label}


def evenly(total: int, count: int) -> np.ndarray:
  """Returns up to `count` of the rows of `total` examples, taken evenly."""
  return np.linspace(0, total - 1, min(count, total)).round().astype(np.int32)


def as_taken(pixels: np.ndarray, takes: str) -> np.ndarray:
  """Returns uint8 pixels as a function takes them, see deployed.PIXELS."""
  return pixels if takes == 'uint8' else np.float32(pixels) / np.float32(255)


def compare(
  bundle: bundles.Bundle,
  session: Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]],
  batches: Iterator[dict[str, np.ndarray]],
) -> dict[str, Any]:
  """Returns how far a file, in its own runtime, is from JAX and the bundle.

  Args:
    bundle: computes in float32, with its batch norms.
    session: of one of the files.
    batches: as `images` gives them.

  Returns:
    'images', 'max_logit', 'max_error' of a logit, 'max_probability_error',
    'agreement' of predictions, and 'top1' of 'jax' and 'file'; None where no
    image has a label.
  """
  network = bundle.network

  @jax.jit
  def trained(variables, images):
    logits = network(variables, network.preprocessing(images)).logits
    return logits, jax.nn.softmax(logits)

  rows = []
  for batch in batches:
    wanted, likely = trained(bundle.variables, batch['image'])
    found, shown = session(as_taken(batch['image'], session.takes))
    differences = np.abs(shown - np.asarray(likely)).max(1)
    rows.append((np.asarray(wanted), found, differences, batch['label']))
  wanted, found, differences, labels = (
    np.concatenate(x) for x in zip(*rows, strict=True)
  )
  predicted = {'jax': wanted.argmax(1), 'file': found.argmax(1)}
  known = labels >= 0
  return {
    'images': len(labels),
    'max_logit': float(np.abs(wanted).max()),
    'max_error': float(np.abs(wanted - found).max()),
    'max_probability_error': float(differences.max()),
    'agreement': float(np.mean(predicted['jax'] == predicted['file'])),
    'top1': {
      name: float(np.mean(classes[known] == labels[known]))
      for name, classes in predicted.items()
    }
    if known.any()
    else None,
  }


def judge(result: dict[str, Any], weights: str, max_drop: float) -> None:
  """Raises where a file is not the network that it was made of.

  Args:
    result: of `compare`.
    weights: 'float32', 'float16' or 'int8'.
    max_drop: part of the images by which int8's top-1 may be lower; without
      labels, by which its predictions may differ.

  Raises:
    config_utils.UserError: it differs by more than it may.
  """
  said = describe(result)
  if weights == 'int8':
    drop = 1 - result['agreement']
    if result['top1']:
      drop = result['top1']['jax'] - result['top1']['file']
    if drop > max_drop:
      raise config_utils.UserError(
        f'eight bits cost {drop:.2%} of the images, more than --max_drop '
        f'{max_drop:g}; nothing was written ({said})'
      )
    return
  limit = MAX_ERROR[weights] * max(1.0, result['max_logit'])
  # Written such that NaN fails.
  if not (
    result['max_error'] <= limit
    and result['agreement'] >= MIN_AGREEMENT[weights]
  ):
    raise config_utils.UserError(
      f'the file does not do what the bundle does; nothing was written ({said})'
    )


def describe(result: dict[str, Any]) -> str:
  """Returns a result in a line."""
  top1 = result['top1']
  accuracy = f', top-1 {top1["jax"]:.2%} and {top1["file"]:.2%}' if top1 else ''
  return (
    f'{result["images"]} images, JAX and file: logits differ by at most '
    f'{result["max_error"]:.2g} (of {result["max_logit"]:.3g}), probabilities '
    f'by {result["max_probability_error"]:.2g}, the same prediction on '
    f'{result["agreement"]:.2%}{accuracy}'
  )
