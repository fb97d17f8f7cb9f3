"""The feature loss in the span of the head's differences."""

import numpy as np

from experiments.head_span import method as head_span
from ijckd_jax.distillation import methods
from tests import test_methods as shared


def test_the_span_alone_counts(monkeypatch):
  student, teacher = shared.arrays(methods.get('ijckd')())
  batch = shared.make_batch()
  width = student.connected.map.shape[-1]
  chosen = head_span.Method()
  whole = methods.get('ijckd')()

  monkeypatch.setattr(head_span, 'span', lambda bundle: np.eye(width))
  total, terms = chosen.loss(student, teacher, batch)
  expected, expected_terms = whole.loss(student, teacher, batch)
  np.testing.assert_allclose(total, expected, rtol=1e-5)
  assert terms.keys() == expected_terms.keys()

  # Of the first dimension alone, over all of them.
  monkeypatch.setattr(head_span, 'span', lambda bundle: np.eye(width)[:, :1])
  _, terms = chosen.loss(student, teacher, batch)
  off = (np.asarray(student.connected.map) - teacher.final)[..., 0]
  np.testing.assert_allclose(
    terms['feature'], (off**2).mean() / width, rtol=1e-5
  )
