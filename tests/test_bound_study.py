"""The arithmetic of choosing without labels, on numbers made by hand."""

import pytest

from experiments.bound_study import choice


def student(name, disagreement, error, seed=0, right=0.0):
  return {
    'pair': ('here', 'pair'),
    'name': name,
    'seed': seed,
    'disagreement': disagreement,
    'error': error,
    'help': right,
  }


def test_regret_is_what_the_least_disagreement_costs():
  students = [
    student('ijckd', 0.20, 0.25),
    student('a', 0.10, 0.30),  # The least disagreement, chosen.
    student('b', 0.30, 0.20),  # The best.
    student('c', 0.05, 0.90),  # Not to be chosen from.
    student('ijckd', 0.10, 0.25, seed=1),
    student('a', 0.20, 0.30, seed=1),  # Without b: no group.
  ]
  lost = choice.regrets(students, ('ijckd', 'a', 'b'))
  assert lost['disagreement'] == pytest.approx([10.0])
  assert lost['default'] == pytest.approx([5.0])
  assert lost['chance'] == pytest.approx([5.0])
  assert choice.regrets(students, ('ijckd', 'd')) is None


def test_a_line_is_judged_by_what_it_was_not_fitted_on():
  # All on one line, but for the last, which is 3 points above it.
  students = [student(str(i), 0.1 + i / 100, 0.2 + i / 200) for i in range(20)]
  students[-1]['error'] += 0.03
  row = choice.line(students)
  assert row[:2] == ['20', '20']
  assert row[3] == '3.00'
  assert choice.line(students[:9]) is None


def test_wrong_where_they_agree_and_where_they_differ():
  # Of 100 images: 20 differ, on 5 of which only the student is right; of the 80
  # others 8 are wrong. The student errs on 8 + 15.
  students = [
    student(str(i), 0.2 + 1e-9 * i, 0.23, right=0.05) for i in range(10)
  ]
  assert choice.line(students)[-2:] == ['10.0', '75.0']
