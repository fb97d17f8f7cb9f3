"""Limits and estimates of students' errors on corrupted Fashion-MNIST.

  python -m experiments.shift_study.measure WORKDIR

WORKDIR as train.py left it. Labelled images are 10,000 that were held out of
training, the others are 4,000 test images, corrupted; their labels only judge.
Each line of results.jsonl is one corruption at one severity; run again, it goes
on where it was stopped.
"""

import argparse
import json
import pathlib

import numpy as np
from scipy import special

from experiments.shift_study import corruptions
from experiments.shift_study import train
from ijckd_jax.bounds import limits
from ijckd_jax.bounds import shift
from ijckd_jax.bundles import bundles
from ijckd_jax.data import datasets
from ijckd_jax.data.datasets import fashion_mnist
from ijckd_jax.evaluation import feature_extraction
from ijckd_jax.runtime import compilation_cache
from ijckd_jax.runtime import parallel

RESULTS = pathlib.Path(__file__).parent / 'results.jsonl'
NUM_LABELLED, NUM_OTHERS = 10_000, 4_000
DELTA = 0.05
CLEAN = 'none'


def confidence(logits: np.ndarray) -> np.ndarray:
  """Returns the largest probability of each row."""
  return np.exp(logits.max(axis=-1) - special.logsumexp(logits, axis=-1))


def average_confidence(logits: np.ndarray) -> float:
  """Returns the error that average confidence estimates."""
  return float(1 - confidence(logits).mean())


def thresholded_confidence(source, wrong, target) -> float:
  """Returns the error that ATC estimates.

  The share below the confidence below which lie as many labelled images as are
  wrong. Source: Garg et al. 2022, https://arxiv.org/abs/2201.04234.
  """
  threshold = np.quantile(confidence(source), wrong.mean())
  return float((confidence(target) < threshold).mean())


class Networks:
  """A teacher and its students, run side by side."""

  def __init__(self, work: pathlib.Path, teacher: str):
    self.bundles = {
      name: bundles.load(work / teacher / name)
      for name in ('teacher', *train.methods(teacher))
    }
    self._mapper = parallel.Mapper()
    self._step = feature_extraction.make_step(self._view, self._mapper)
    self._variables = self._mapper.replicate(
      {name: bundle.variables for name, bundle in self.bundles.items()}
    )

  def _view(self, variables, images):
    seen = {}
    for name, bundle in self.bundles.items():
      net = bundle.network
      seen[name] = net(variables[name], net.preprocessing(images)).logits
    return seen

  def __call__(self, arrays: datasets.Arrays) -> dict[str, np.ndarray]:
    """Returns the logits of each, (N, K)."""
    found = feature_extraction.of_split(
      self._step, self._variables, arrays, mapper=self._mapper, batch_size=250
    )
    return found['rows']


def measure(source, labels, target, truth) -> dict:
  """Returns the limits and estimates of each student, and the truth.

  Args:
    source: logits (n_S, K) on the labelled images, by network.
    labels: of these, (n_S,).
    target: the same on the other images.
    truth: their labels, which only judge.
  """
  predicted = {name: x.argmax(axis=-1) for name, x in target.items()}
  wrong = source['teacher'].argmax(axis=-1) != labels
  found = {}
  for name in source:
    if name == 'teacher':
      continue
    near, far = source[name], target[name]
    differs = predicted[name] != predicted['teacher']
    both, disagreement = (
      shift.by_critic(near, far, labels, delta=DELTA, seed=0, losses=losses)
      for losses in (None, (shift.disagreement_loss,))
    )
    found[name] = {
      'true_error': float((predicted[name] != truth).mean()),
      'disagreement': float(differs.mean()),
      'same_distribution': sum(
        limits.clopper_pearson_upper(int(rows.sum()), len(rows), DELTA / 2)
        for rows in (wrong, differs)
      ),
      'dis2': both['upper'],
      'dis2_value': both['value'],
      'dis2_by_disagreement': disagreement['upper'],
      'average_confidence': average_confidence(far),
      'thresholded_confidence': thresholded_confidence(
        near, near.argmax(axis=-1) != labels, far
      ),
    }
  return found


def conditions(teacher: str) -> list[tuple[str, int]]:
  """Returns what is measured of a teacher's students: kinds and severities."""
  severities = (5, 4, 3, 2, 1) if teacher == train.TEACHERS[0] else (5, 3, 1)
  return [(CLEAN, 0)] + [
    (name, severity)
    for severity in severities
    for name in corruptions.CORRUPTIONS
  ]


def main() -> None:
  """Measures what is not measured yet."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('work', type=pathlib.Path)
  flags = parser.parse_args()
  compilation_cache.enable(compilation_cache.DEFAULT)
  done = set()
  if RESULTS.exists():
    rows = map(json.loads, RESULTS.read_text().splitlines())
    done = {(x['teacher'], x['corruption'], x['severity']) for x in rows}
  data = fashion_mnist.Dataset(validation_fraction=train.HELD_OUT)
  held_out, test = data.load('validation'), data.load('test')
  random = np.random.RandomState(0)
  labelled = held_out.take(random.permutation(len(held_out))[:NUM_LABELLED])
  others = test.take(random.permutation(len(test))[:NUM_OTHERS])
  for teacher in train.TEACHERS:
    networks = Networks(flags.work, teacher)
    source = networks(labelled)
    for name, severity in conditions(teacher):
      if (teacher, name, severity) in done:
        continue
      images = others.images
      if name != CLEAN:
        images = corruptions.corrupt(images, name, severity)
      target = networks(datasets.Arrays(images, others.labels))
      row = {
        'teacher': teacher,
        'corruption': name,
        'severity': severity,
        'found': measure(source, labelled.labels, target, others.labels),
      }
      with RESULTS.open('a') as stream:
        stream.write(json.dumps(row) + '\n')
      print(teacher, name, severity, flush=True)


if __name__ == '__main__':
  main()
