"""Every inequality of the bounds, broken once: a test must turn red."""

import os
import pathlib
import shutil
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parent.parent
# File below ijckd_jax/, what is there, what it becomes.
MUTATIONS = [
  (
    'bounds/statements.py',
    'rows.student != rows.label)',
    'rows.student == rows.label)',
  ),
  (
    'bounds/statements.py',
    'rows.teacher != rows.label)',
    'rows.teacher == rows.label)',
  ),
  (
    'bounds/statements.py',
    'rows.student != rows.teacher)',
    'rows.student == rows.teacher)',
  ),
  (
    'bounds/statements.py',
    'rows.own != rows.student)',
    'rows.own == rows.student)',
  ),
  (
    'bounds/statements.py',
    'rows.student != rows.joint_student)',
    'rows.student == rows.joint_student)',
  ),
  (
    'bounds/statements.py',
    '_int(rows.student != rows.joint_student) - _int(',
    '_int(rows.student != rows.joint_student) + _int(',
  ),
  (
    'bounds/statements.py',
    'wrong[0] + wrong[1] - wrong[2]',
    'wrong[0] - wrong[1] - wrong[2]',
  ),
  ('bounds/statements.py', 'wrong[2] - wrong[3]', 'wrong[2] + wrong[3]'),
  (
    'bounds/statements.py',
    'label_margin <= _reach',
    'label_margin < 0.9 * _reach',
  ),
  ('bounds/statements.py', 'label_margin <= _reach', 'label_margin >= _reach'),
  ('bounds/statements.py', 'flip_margin <= _reach', 'flip_margin >= _reach'),
  (
    'bounds/statements.py',
    'flip_margin <= _reach',
    'flip_margin <= 0.9 * _reach',
  ),
  (
    'bounds/statements.py',
    '_reach(rows.logit_range)',
    '0.9 * _reach(rows.logit_range)',
  ),
  ('bounds/statements.py', 'logit_margin <= _reach', 'logit_margin >= _reach'),
  ('bounds/statements.py', '2 * rows.teacher_soft', '1.5 * rows.teacher_soft'),
  (
    'bounds/statements.py',
    '2 * rows.total_variation',
    '1.5 * rows.total_variation',
  ),
  (
    'evaluation/pointwise.py',
    'gaps = own - logits - rounding',
    'gaps = own - logits + rounding',
  ),
  (
    'evaluation/pointwise.py',
    'kernel[:, 1:] - kernel[:, :1]',
    'kernel[:, 1:]',
  ),
  (
    'evaluation/pointwise.py',
    'gaps > 0, jnp.inf, -jnp.inf',
    'gaps >= -1, jnp.inf, -jnp.inf',
  ),
  (
    'evaluation/pointwise.py',
    '.sum(axis=-1) / 2, 1.0',
    '.sum(axis=-1) / 3, 1.0',
  ),
  (
    'evaluation/pointwise.py',
    'student_wrong & ~teacher_wrong)',
    'student_wrong & teacher_wrong)',
  ),
  (
    'evaluation/pointwise.py',
    'teacher_wrong & ~student_wrong)',
    'teacher_wrong & student_wrong)',
  ),
  (
    'evaluation/pointwise.py',
    'rows.label_margin > far',
    'rows.label_margin > 0 * far',
  ),
  (
    'bounds/limits.py',
    'count + 1, num - count, 1 - delta',
    'count, num - count, 1 - delta',
  ),
  (
    'bounds/limits.py',
    'count, num - count + 1, delta',
    'count, num - count, delta',
  ),
  ('bounds/limits.py', 'MOST_BET = 0.75', 'MOST_BET = 1.5'),
  ('bounds/limits.py', '(m - x)', '(m - x / 2)'),
  ('bounds/limits.py', 'math.log(delta)', 'math.log(2 * delta)'),
  ('bounds/limits.py', 'variance[:-1]', 'variance[1:]'),
  ('bounds/limits.py', '2 * math.log(1 / delta)', '8 * math.log(1 / delta)'),
  ('bounds/limits.py', 'return max(found, float(x.mean()))', 'return found'),
  ('bounds/limits.py', '1 - scaled, delta', 'scaled, delta'),
  ('bounds/limits.py', 'delta / num_claims', 'delta'),
  ('bounds/shift.py', 'shared(delta, 3)', 'shared(delta, 1)'),
  ('bounds/shift.py', 'teachers + disagreement', 'disagreement'),
  ('bounds/certify.py', "paired['upper'] = min", "paired['upper'] = max"),
  ('bounds/certify.py', '= 2 * len(found)', '= len(found)'),
  ('bounds/certify.py', 'num_claims * choices', 'num_claims'),
  ('bounds/selective.py', 'delta, len(SHARES)', 'delta, 1'),
  ('bounds/selective.py', 'confidence > threshold', 'confidence >= threshold'),
  (
    'bounds/shift.py',
    '(num_source + 4 * num_target)',
    '(num_source + 1 * num_target)',
  ),
  (
    'bounds/shift.py',
    'value = error + discrepancy',
    'value = error - discrepancy',
  ),
]


@pytest.mark.slow
@pytest.mark.parametrize('name, old, new', MUTATIONS)
def test_a_broken_bound_is_noticed(tmp_path, name, old, new):
  shutil.copytree(ROOT / 'ijckd_jax', tmp_path / 'ijckd_jax')
  shutil.copytree(ROOT / 'tests', tmp_path / 'tests')
  shutil.copytree(ROOT / 'experiments', tmp_path / 'experiments')
  path = tmp_path / 'ijckd_jax' / name
  text = path.read_text()
  assert text.count(old) >= 1, f'{old!r} is not in {name} any more'
  path.write_text(text.replace(old, new, 1))
  by_hand = 'few_rows or shift or critic'
  for chosen in (
    ['tests/test_limits.py', 'tests/test_bounds.py'],
    ['tests/test_bound_reports.py', '-k', by_hand],
  ):
    result = subprocess.run(
      [sys.executable, '-m', 'pytest', '-x', '-q', '-p', 'no:xdist', *chosen],
      cwd=tmp_path,
      env={**os.environ, 'PYTHONPATH': str(tmp_path)},
      capture_output=True,
      check=False,
      text=True,
    )
    assert result.returncode in (0, 1), result.stdout + result.stderr
    if result.returncode == 1:
      return
  pytest.fail('no test has noticed')
