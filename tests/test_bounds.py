"""The bounds, example by example: by hand, by brute force, by hypothesis."""

import dataclasses
import itertools
import json
import os
import pathlib
import subprocess
import sys
import types

from hypothesis import given
from hypothesis import settings
from hypothesis import strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import special

from ijckd_jax.bounds import statements
from ijckd_jax.evaluation import pointwise
from ijckd_jax.models import losses

# Few shapes: each is compiled. (examples, features, classes)
SHAPES = ((1, 3, 2), (9, 2, 3), (24, 4, 5))
STUDENTS = ('same', 'near', 'far', 'permuted', 'huge')
CLOSE = 1e-5  # Of what is computed in float32; nothing for zeros and ones.


@dataclasses.dataclass
class Case:
  """Features, labels and heads; whole numbers, so that ties are common."""

  z_t: np.ndarray
  z_s: np.ndarray
  labels: np.ndarray
  head: dict
  joint: dict

  def logits(self, z, head=None):
    head = head or self.head
    return (z @ head['kernel'] + head['bias']).astype(np.float64)

  @property
  def rows(self):
    return pointwise.compute(
      self.z_t, self.z_s, self.labels, **self.head, joint=self.joint
    )


@st.composite
def cases(draw, shapes=SHAPES):
  num, width, classes = draw(st.sampled_from(shapes))
  random = np.random.RandomState(draw(st.integers(0, 2**32 - 1)))
  whole = draw(st.booleans())

  def numbers(*shape):
    x = random.randint(-3, 4, shape) if whole else 2 * random.randn(*shape)
    return x.astype(np.float32)

  z_t = numbers(num, width)
  z_s = {
    'same': z_t,
    'near': z_t + numbers(num, width) / 16,
    'far': numbers(num, width),
    'permuted': z_t[random.permutation(num)],
    'huge': 1e4 * numbers(num, width),
  }[draw(st.sampled_from(STUDENTS))]
  heads = [
    {'kernel': numbers(width, classes), 'bias': numbers(classes)}
    for _ in range(2)
  ]
  if draw(st.booleans()):  # Two classes that no feature tells apart.
    heads[0]['kernel'][:, -1] = heads[0]['kernel'][:, 0]
  labels = random.randint(0, classes, num)
  if draw(st.booleans()):  # Mostly right.
    right = (z_t @ heads[0]['kernel'] + heads[0]['bias']).argmax(-1)
    labels = np.where(random.rand(num) < 0.8, right, labels)
  return Case(z_t, z_s, labels.astype(np.int32), *heads)


# --- By hand -----------------------------------------------------------------


def test_one_example_worked_out():
  """Two features, two classes: w_0 = (3, 0), w_1 = (0, 4), b = (1, 0).

  z_t = (2, 1): l_t = (7, 4). z_s = (1, 1.5): l_s = (4, 6).
  """
  rows = pointwise.compute(
    np.array([[2, 1]], np.float32),
    np.array([[1, 1.5]], np.float32),
    np.array([0]),
    np.array([[3, 0], [0, 4]], np.float32),
    np.array([1, 0], np.float32),
    joint={
      'kernel': np.array([[1, 0], [0, 1]], np.float32),
      'bias': np.zeros(2, np.float32),
    },
  )
  assert (rows.teacher[0], rows.student[0]) == (0, 1)
  # r sees (2, 1) and (1, 1.5) themselves.
  assert (rows.joint_teacher[0], rows.joint_student[0]) == (0, 1)
  about = pytest.approx
  assert rows.logit_distance[0] == about(np.sqrt(3**2 + 2**2))
  assert rows.logit_range[0] == about(2 - -3)
  assert rows.logit_margin[0] == about(3, abs=1e-3)
  assert rows.feature_distance[0] == about(np.sqrt(1 + 0.25))
  # (-1, 0.5) along w_0 - w_1 = (3, -4), of length 5.
  assert rows.head_distance[0] == about(abs(-3 - 2) / 5)
  # ||w_0 - w_1|| = 5, and l_0 - l_1 = 3.
  assert rows.label_margin[0] == about(3 / 5, abs=1e-3)
  assert rows.flip_margin[0] == about(3 / 5, abs=1e-3)
  p_t, p_s = 1 / (1 + np.exp(-3)), 1 / (1 + np.exp(2))
  assert rows.teacher_soft[0] == about(1 - p_t, rel=1e-5)
  assert rows.total_variation[0] == about(p_t - p_s, rel=1e-5)
  kl = p_t * np.log(p_t / p_s) + (1 - p_t) * np.log((1 - p_t) / (1 - p_s))
  assert rows.kl[0] == about(kl, rel=1e-5)
  # Bounds: t right, s wrong and another; r right on z_t, wrong on z_s, with h.
  values = {b.key: b for b in statements.BOUNDS}

  def value(key):
    (number,) = values[key].values(rows)
    return number

  assert value('paired') == 0 + 1
  assert value('joint') == 0 + (0 + 1) + (0 - 0)
  assert value('label_margin') == 1  # 0.6 <= 1
  assert value('flip_margin') == 1
  assert value('logit_margin') == 1  # 3 <= 5
  assert value('soft') == about(2 * (1 - p_t) + 2 * (p_t - p_s), rel=1e-5)
  own = rows.replace(own=np.array([0]))
  (number,) = values['own_head'].values(own)
  assert number == 0 + 1 + 1
  assert statements.joint_gap(rows)[0] == 0 + 1 - 0 - 1


def test_the_constants_of_a_head():
  kernel = np.array([[3, 0, 3], [0, 4, 0]], np.float32)
  head = pointwise.describe({'kernel': kernel, 'bias': np.zeros(3)})
  expected = [[0, 5, 0], [5, 0, 5], [0, 5, 0]]
  np.testing.assert_allclose(head.distances, expected, rtol=1e-6)
  assert head.largest_weight == 4
  # w_1 - w_0 = (-3, 4) and w_2 - w_0 = 0 lie on a line.
  direction = np.array([3, -4]) / 5
  np.testing.assert_allclose(
    np.linalg.norm(direction @ head.span), 1, rtol=1e-6
  )
  for num_features, num_classes in ((30, 7), (7, 30), (4, 2)):
    wide = np.random.RandomState(0).randn(num_features, num_classes)
    found = pointwise.describe({'kernel': wide, 'bias': np.zeros(num_classes)})
    pairwise = wide[:, :, None] - wide[:, None]
    lengths = np.linalg.norm(pairwise, axis=0)
    np.testing.assert_allclose(found.distances, lengths, rtol=1e-5, atol=1e-6)
    size = min(num_features, num_classes - 1)
    assert found.span.shape == (num_features, size)
    np.testing.assert_allclose(
      found.span.T @ found.span, np.eye(size), atol=1e-6
    )
    seen = np.einsum('dij,dr->rij', pairwise, found.span)
    np.testing.assert_allclose(
      np.linalg.norm(seen, axis=0), lengths, rtol=1e-5, atol=1e-6
    )


def test_each_constant_is_the_smallest():
  """Of an example on the edge, a smaller one would say less than the truth.

  Class 1 by a margin of 1 in logits, moved to a tie, which is class 0's.
  """
  one = dict(
    z_t=np.array([[0, 1]], np.float32),
    z_s=np.array([[0.5, 0.5]], np.float32),
    labels=np.array([1], np.int32),
  )
  identity = {
    'kernel': np.eye(2, dtype=np.float32),
    'bias': np.zeros(2, np.float32),
  }
  rows = Case(**one, head=identity, joint=identity).rows
  assert rows.student[0] == 0
  margin = rows.logit_margin[0]
  assert margin == pytest.approx(1, abs=1e-4)
  # D7b and c: each distance is as large as the margin, not larger.
  for margin, reach in (
    (rows.logit_margin[0], rows.logit_range[0]),
    (rows.label_margin[0], rows.head_distance[0]),
    (rows.flip_margin[0], rows.head_distance[0]),
  ):
    assert margin <= reach
    assert reach == pytest.approx(margin, rel=1e-4)
  for bound in statements.BOUNDS:
    if bound.applies(rows) and bound.key != 'soft':
      assert bound.values(rows) == [1], bound.key


def test_only_the_range_of_a_logit_difference_counts():
  """l_s - l_t = (1, 1, -1): its range is 2."""
  bound = {b.key: b for b in statements.BOUNDS}['logit_margin']
  for margin, value in ((2.2, 0), (1.8, 1)):
    rows = pointwise.compute_from_logits(
      np.array([[margin, 0, 0]], np.float32),
      np.array([[margin + 1, 1, -1]], np.float32),
      np.array([0]),
    )
    assert bound.values(rows)[0] == value


def test_movement_that_no_weight_sees_is_no_distance():
  """Classes differ along the first axis only; z_s moves along the second."""
  head = {
    'kernel': np.array([[1, -1], [5, 5], [2, 2]], np.float32),
    'bias': np.zeros(2, np.float32),
  }
  z_t = np.array([[1, 0, 0]], np.float32)
  z_s = z_t + np.array([[0.25, 70, -30]], np.float32)
  rows = pointwise.compute(z_t, z_s, np.array([0]), **head)
  assert rows.head_distance[0] == pytest.approx(0.25, rel=1e-4)
  assert rows.feature_distance[0] > 70
  bounds = {b.key: b for b in statements.BOUNDS}
  assert bounds['label_margin'].values(rows) == [0]


# --- Zeros and ones: exactly --------------------------------------------------


@settings(deadline=None)
@given(cases())
def test_d1_the_paired_triangle_and_its_identity(case):
  rows = case.rows
  t, s = (f(rows) for f in (statements.teacher_wrong, statements.student_wrong))
  pi = statements.differ(rows)
  assert (s <= t + pi).all() and (t <= s + pi).all() and (pi <= s + t).all()
  harm, help_ = s * (1 - t), t * (1 - s)
  both = t * s * pi
  assert s.sum() == t.sum() + harm.sum() - help_.sum()
  assert pi.sum() == harm.sum() + help_.sum() + both.sum()
  # Against argmax in float64: whole numbers leave no doubt.
  if (case.z_s == np.round(case.z_s)).all():
    np.testing.assert_array_equal(
      rows.teacher, case.logits(case.z_t).argmax(-1)
    )
    np.testing.assert_array_equal(
      rows.student, case.logits(case.z_s).argmax(-1)
    )


@settings(deadline=None)
@given(cases(), st.integers(0, 2**32 - 1))
def test_every_bound_is_above_on_every_example(case, seed):
  """D1, D2, D3, D7a to c, D11: in one, by the table that reports use."""
  classes = len(case.head['bias'])
  own = np.random.RandomState(seed).randint(0, classes, len(case.labels))
  rows = case.rows.replace(own=own.astype(np.int32))
  for bound in statements.BOUNDS:
    assert bound.applies(rows)
    values = bound.values(rows)
    truth = statements.bounded(bound, rows)
    slack = CLOSE if bound.key == 'soft' else 0
    assert (truth <= values + slack).all(), bound.key
    assert (values >= 0).all() and (values <= bound.high).all(), bound.key


@settings(deadline=None)
@given(cases())
def test_d3_d4_the_sandwich(case):
  rows = case.rows
  t, s = statements.teacher_wrong(rows), statements.student_wrong(rows)
  joint = {b.key: b for b in statements.BOUNDS}['joint']
  parts = {part.name: part.values for part in joint.parts(rows)}
  cost, delta = parts['joint head wrong, on both'], parts['discrepancy']
  np.testing.assert_array_equal(parts['teacher wrong'], t)
  np.testing.assert_array_equal(delta, statements.discrepancy(rows))
  assert (np.abs(s - (t + delta)) <= cost).all()
  slack = joint.values(rows) - s
  assert (slack >= 0).all() and (slack <= 2 * cost).all()
  # D6, by the joint head in place of the best one.
  gap = statements.joint_gap(rows)
  np.testing.assert_array_equal(gap, t + s - cost)
  assert (t + s <= 2 * t + statements.differ(rows)).all()


@settings(deadline=None)
@given(cases())
def test_d5_discrepancy_is_at_most_disagreement(case):
  rows = case.rows
  pi_r = (rows.joint_teacher != rows.joint_student).astype(int)
  most = statements.differ(rows) + pi_r
  assert (np.abs(statements.discrepancy(rows)) <= most).all()


@settings(deadline=None)
@given(cases())
def test_cheap_invariants(case):
  same = dataclasses.replace(case, z_s=case.z_t).rows
  assert not statements.differ(same).any()
  assert not statements.discrepancy(same).any()
  assert not same.feature_distance.any() and not same.head_distance.any()
  np.testing.assert_array_equal(
    statements.teacher_wrong(same), statements.student_wrong(same)
  )
  own = dataclasses.replace(case, joint=case.head).rows
  assert not statements.joint_gap(own).any()
  assert not statements.discrepancy(own).any()
  swapped = dataclasses.replace(case, z_s=case.z_t, z_t=case.z_s).rows
  np.testing.assert_array_equal(
    statements.discrepancy(swapped), -statements.discrepancy(case.rows)
  )


@settings(deadline=None)
@given(cases())
def test_d7_margins_against_brute_force(case):
  """No point within the margin is read otherwise; one just beyond it is."""
  head = case.head
  rows = case.rows
  kernel = head['kernel'].astype(np.float64)
  for i, z in enumerate(case.z_t.astype(np.float64)):
    logits = z @ kernel + head['bias']
    for own, found in (
      (case.labels[i], rows.label_margin[i]),
      (rows.teacher[i], rows.flip_margin[i]),
    ):
      margins = []
      for j in range(len(logits)):
        if j == own:
          continue
        apart = np.linalg.norm(kernel[:, own] - kernel[:, j])
        gap = logits[own] - logits[j]
        if apart:
          margins.append(gap / apart)
        else:
          margins.append(np.inf if gap > 0 else -np.inf)
      exact = min(margins)
      assert found <= exact
      if np.isfinite(exact) and np.isfinite(found):
        largest = np.linalg.norm(kernel, axis=0).max()
        norms = np.linalg.norm(z) + np.linalg.norm(case.z_s[i])
        off = 2e-5 * (norms * largest + np.abs(head['bias']).max())
        apart = pointwise.describe(head).distances
        assert exact - found <= 1e-5 + off / apart[apart > 0].min()


# --- Smooth losses: to rounding -----------------------------------------------


def below(smaller, larger, size=0.0):
  """Asserts smaller <= larger, but for the rounding of numbers of a size."""
  smaller, larger = (np.asarray(x, np.float64) for x in (smaller, larger))
  slack = CLOSE * (1 + np.abs(smaller) + np.abs(larger) + size)
  assert (smaller <= larger + slack).all(), (smaller - larger).max()


def logit_size(case):
  return np.abs(np.stack([case.logits(z) for z in (case.z_t, case.z_s)])).max()


def log_softmax(case, z, head=None):
  return special.log_softmax(case.logits(z, head), axis=-1)


def nll_of(case, z):
  return -log_softmax(case, z)[np.arange(len(z)), case.labels]


def largest_distance(head):
  """Returns L_D."""
  return pointwise.describe(head).distances.max()


@settings(deadline=None)
@given(cases())
def test_d9_lipschitz(case):
  rows, size = case.rows, logit_size(case)
  far, off = rows.head_distance, rows.logit_distance
  most = largest_distance(case.head)
  norm = np.linalg.norm(case.head['kernel'], 2)
  spread = rows.logit_range
  below(far, rows.feature_distance, size)
  below(off, norm * rows.feature_distance, size)
  below(spread, most * far, size)
  below(spread, 2**0.5 * off, size)
  p_t, p_s = (np.exp(log_softmax(case, z)) for z in (case.z_t, case.z_s))
  below(np.linalg.norm(p_s - p_t, axis=-1), off / 2, size)
  below(rows.total_variation, spread / 4, size)
  apart = np.abs(nll_of(case, case.z_s) - nll_of(case, case.z_t))
  below(apart, spread, size)


@settings(deadline=None)
@given(cases())
def test_d10_risks(case):
  rows, size = case.rows, logit_size(case)
  square = np.square(rows.logit_distance.astype(np.float64))
  p_t = np.exp(log_softmax(case, case.z_t))
  residual = p_t - np.eye(p_t.shape[-1])[case.labels]
  difference = case.logits(case.z_s) - case.logits(case.z_t)
  tilt = (residual * difference).sum(-1)
  student, teacher = (nll_of(case, z) for z in (case.z_s, case.z_t))
  below(student, teacher + tilt + square / 4, size)
  brier = np.square(residual).sum(-1).mean()
  below(
    student.mean(),
    teacher.mean() + np.sqrt(brier * square.mean()) + square.mean() / 4,
    size,
  )
  below(rows.kl, square / 4, size)
  below(rows.total_variation.mean(), np.sqrt(max(rows.kl.mean(), 0) / 2), size)
  below(statements.student_wrong(rows), student / np.log(2))


@settings(deadline=None)
@given(cases())
def test_d11_soft_errors_and_the_soft_joint_head(case):
  rows, size = case.rows, logit_size(case)

  def soft(z, head=None):
    p = np.exp(log_softmax(case, z, head))
    return 1 - p[np.arange(len(z)), case.labels]

  student = soft(case.z_s)
  below(student, rows.teacher_soft + rows.total_variation)
  most = largest_distance(case.head)
  below(student, rows.teacher_soft + most * rows.head_distance / 4, size)
  below(statements.student_wrong(rows), 2 * student)
  # With a joint head q: how far p and q are on z_t and z_s.
  apart = [
    pointwise.compute_from_logits(
      case.logits(z).astype(np.float32),
      case.logits(z, case.joint).astype(np.float32),
      case.labels,
    ).total_variation
    for z in (case.z_t, case.z_s)
  ]
  discrepancy = apart[1] - apart[0]
  joint = soft(case.z_t, case.joint) + soft(case.z_s, case.joint)
  below(student, rows.teacher_soft + joint + discrepancy)


@settings(deadline=None)
@given(st.integers(0, 2**32 - 1), st.sampled_from([(4, 4), (2, 4), (2, 2)]))
def test_d12_the_loss_of_maps_bounds_the_distance_of_their_averages(seed, size):
  """C times the loss is at least ||z_s - z_t||^2, where bins divide the map."""
  random = np.random.RandomState(seed)
  taught, ours = (
    random.randn(1, *shape, 5).astype(np.float32) for shape in ((4, 4), size)
  )
  teacher = types.SimpleNamespace(final=taught)
  loss = losses.feature_distance(
    types.SimpleNamespace(map=ours), teacher, 'map'
  )
  far = np.square(ours.mean((1, 2)) - taught.mean((1, 2))).sum()
  below(far, 5 * loss)


@settings(deadline=None)
@given(st.integers(0, 2**32 - 1), st.sampled_from(STUDENTS))
def test_d14_the_chain_of_ben_david_by_brute_force(seed, kind):
  """Over a finite class, each step is above the one before; K = 3."""
  random = np.random.RandomState(seed)
  z_t = random.randint(-2, 3, (12, 2)).astype(np.float32)
  z_s = z_t[random.permutation(12)] if kind == 'permuted' else z_t.copy()
  if kind in ('near', 'far', 'huge'):
    moved = random.rand(12) < 0.3
    z_s[moved] = random.randint(-2, 3, (moved.sum(), 2))
  labels = random.randint(0, 3, 12)
  heads = [
    {
      'kernel': random.randint(-2, 3, (2, 3)).astype(np.float32),
      'bias': random.randint(-1, 2, 3).astype(np.float32),
    }
    for _ in range(6)
  ]
  read = [
    tuple((z @ h['kernel'] + h['bias']).argmax(-1) for z in (z_t, z_s))
    for h in heads
  ]
  errors = [((t != labels).mean(), (s != labels).mean()) for t, s in read]
  best = min(range(6), key=lambda i: sum(errors[i]))
  joint_error = sum(errors[best])

  def dis(i, j, which):
    return (read[i][which] != read[j][which]).mean()

  both = max(
    abs(dis(i, j, 1) - dis(i, j, 0))
    for i, j in itertools.product(range(6), repeat=2)
  )
  points = np.unique(np.concatenate([z_t, z_s]), axis=0)
  masses = [
    np.array([(z == point).all(-1).mean() for point in points])
    for z in (z_t, z_s)
  ]
  variation = np.abs(masses[0] - masses[1]).sum() / 2
  for h in range(6):
    source, target = errors[h]
    rows = pointwise.compute(
      z_t[:12], z_s, labels, **heads[h], joint=heads[best]
    )
    delta = statements.discrepancy(rows).mean()
    assert delta == pytest.approx(dis(h, best, 1) - dis(h, best, 0))
    disparity = max(dis(h, j, 1) - dis(h, j, 0) for j in range(6))
    chain = [
      target,
      source + joint_error + delta,
      source + joint_error + disparity,
      source + joint_error + both,
      source + joint_error + variation,
      source + joint_error + (z_t != z_s).any(-1).mean(),
    ]
    for smaller, larger in itertools.pairwise(chain):
      assert smaller <= larger + 1e-12
    # The smallest of D3 over any finite set of references holds too.
    joint = {b.key: b for b in statements.BOUNDS}['joint']
    values = [
      joint.values(
        pointwise.compute(z_t, z_s, labels, **heads[h], joint=reference)
      ).mean()
      for reference in heads
    ]
    assert target <= min(values) + 1e-12
    # D5 over the class.
    pis = [(t != s).mean() for t, s in read]
    assert both <= 2 * max(pis) + 1e-12


# --- Many rows, and many devices ----------------------------------------------


def many(num=3000, width=6, classes=4, seed=0):
  random = np.random.RandomState(seed)
  z_t = random.randn(num, width).astype(np.float32)
  head = {
    'kernel': random.randn(width, classes).astype(np.float32),
    'bias': random.randn(classes).astype(np.float32),
  }
  labels = (z_t @ head['kernel'] + head['bias']).argmax(-1).astype(np.int32)
  wrong = random.rand(num) < 0.2
  labels[wrong] = random.randint(0, classes, wrong.sum())
  labels[::9] = -1
  z_s = z_t + 0.3 * random.randn(num, width).astype(np.float32)
  return z_t, z_s, labels, head


def test_chunks_are_rows_of_the_whole():
  z_t, z_s, labels, head = many()
  rows = pointwise.compute(z_t, z_s, labels, **head, joint=head)
  assert len(rows) == 3000
  whole = jax.jit(pointwise.from_features)(
    z_t, z_s, labels, pointwise.describe(head), head
  )
  for name, value in vars(rows).items():
    if value is not None:
      other = np.asarray(getattr(whole, name))
      np.testing.assert_allclose(value, other, rtol=2e-4, atol=1e-5)
  assert rows.own is None
  with pytest.raises(ValueError, match='3000 and 2999 rows for 3000 labels'):
    pointwise.compute(z_t, z_s[1:], labels, **head)
  with pytest.raises(ValueError, match='at least one'):
    pointwise.compute(z_t[:0], z_s[:0], labels[:0], **head)


def test_what_depends_on_a_label_is_no_number_without_one():
  z_t, z_s, labels, head = many(9)
  rows = pointwise.compute(z_t, z_s, np.full(9, -1), **head)
  known = pointwise.compute(z_t, z_s, np.abs(labels), **head)
  missing = set()
  for name, value in vars(rows).items():
    if value is None or name == 'label':
      continue
    other = getattr(known, name)
    if np.isnan(value).all():
      missing.add(name)
      assert np.isfinite(other).all()
    else:
      np.testing.assert_array_equal(value, other)
  assert missing == {'label_margin', 'logit_margin', 'teacher_soft'}
  assert len(known.labelled) == 9 and not len(rows.labelled)


ON_DEVICES = """
import json, sys
import jax, numpy as np
from ijckd_jax.runtime import parallel
from ijckd_jax.evaluation import pointwise
from tests import test_bounds
z_t, z_s, labels, head = test_bounds.many(2400)
batch = {'z_t': z_t, 'z_s': z_s, 'label': labels,
         'mask': np.arange(2400) % 13 != 0}
def step(head, batch):
  rows = pointwise.from_features(
    batch['z_t'], batch['z_s'], batch['label'], head)
  return jax.lax.psum(pointwise.sums(rows, batch['mask']), parallel.AXIS)
for kind in parallel.MAPPERS:
  mapper = parallel.Mapper(kind)
  placed = mapper.replicate(pointwise.describe(head))
  sums = mapper.map(step, rows_in=(False, True))(placed, mapper.shard(batch))
  print(json.dumps({k: float(v) for k, v in sums.items()}))
assert jax.device_count() == 8
"""


def test_sums_over_devices_are_the_same_integers():
  """However rows are cut; and the identity of D1 balances in them."""
  z_t, z_s, labels, head = many(2400)
  described = pointwise.describe(head)
  mask = np.arange(2400) % 13 != 0

  def sums(z_t, z_s, labels, mask):
    rows = pointwise.from_features(z_t, z_s, labels, described)
    return pointwise.sums(rows, mask)

  whole = jax.jit(sums)(z_t, z_s, labels, mask)
  cut = [x.reshape(8, 300, *x.shape[1:]) for x in (z_t, z_s, labels, mask)]
  summed = jax.jit(
    jax.vmap(lambda *x: jax.lax.psum(sums(*x), 'd'), axis_name='d')
  )(*cut)
  for name, total in whole.items():
    if total.dtype == jnp.int32:
      assert (summed[name] == total).all(), name
    else:
      np.testing.assert_allclose(summed[name], total, rtol=1e-5)
  result = subprocess.run(
    [sys.executable, '-c', ON_DEVICES],
    cwd=pathlib.Path(__file__).parents[1],
    env={**os.environ, 'JAX_NUM_CPU_DEVICES': '8', 'PYTHONPATH': '.'},
    capture_output=True,
    check=False,
    text=True,
  )
  assert not result.returncode, result.stderr
  by_mapper = list(map(json.loads, result.stdout.splitlines()))
  assert len(by_mapper) == 2
  for name, total in whole.items():
    for found in by_mapper:
      if total.dtype == jnp.int32:
        assert found[name] == total, name
      else:
        assert found[name] == pytest.approx(float(total), rel=1e-5)
  rows = pointwise.compute(z_t, z_s, labels, **head).where(mask)
  known = rows.labelled
  t, s = statements.teacher_wrong(known), statements.student_wrong(known)
  counts = {
    name: int(total)
    for name, total in whole.items()
    if total.dtype == jnp.int32
  }
  assert counts == {
    'examples': mask.sum(),
    'labelled': (mask & (labels >= 0)).sum(),
    'disagreement': statements.differ(rows).sum(),
    'teacher_wrong': t.sum(),
    'student_wrong': s.sum(),
    'harm': (s * (1 - t)).sum(),
    'help': (t * (1 - s)).sum(),
    'certified': (known.label_margin > known.head_distance).sum(),
    'certified_agreement': (rows.flip_margin > rows.head_distance).sum(),
  }
  assert whole['student_wrong'] == (
    whole['teacher_wrong'] + whole['harm'] - whole['help']
  )
  means = pointwise.summarize(whole, 6, 4)
  assert means['student_error'] == s.mean()
  assert means['feature_mse'] == pytest.approx(
    np.square(z_s - z_t)[mask].mean(), rel=1e-5
  )
  logits = (z_s - z_t)[mask] @ head['kernel']
  assert means['logit_mse'] == pytest.approx(np.square(logits).mean(), rel=1e-4)
  # Of a student with its own head, it is that which counts.
  rows = pointwise.from_features(z_t, z_s, labels, described)
  own = rows.replace(own=rows.teacher)
  found = pointwise.sums(own, mask)
  assert not found['disagreement'] and not found['harm']
  assert found['certified'] == whole['certified']
  # Without features there is nothing of them; without labels, of labels.
  plain = pointwise.from_logits(logits, logits, np.full(len(logits), -1))
  found = pointwise.summarize(
    pointwise.sums(plain, np.ones(len(logits), bool)), 6, 4
  )
  assert found == {'logit_mse': 0.0}
