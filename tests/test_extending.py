"""What docs/extending.md shows runs as it is shown."""

import pathlib
import re
import sys

import pytest

from ijckd_jax.training import train

PAGE = pathlib.Path(__file__).parents[1] / 'docs' / 'extending.md'


@pytest.fixture
def shown(tmp_path, monkeypatch):
  """Saves the page's code under the names that its commands give."""
  text = PAGE.read_text()
  codes = re.findall(r'```python\n(.*?)```', text, re.DOTALL)
  names = re.findall(r'(?:method|student)=(my_\w+):(\w+)', text)
  assert len(codes) == len(names) == 3
  for (module, _), code in zip(names, codes, strict=True):
    (tmp_path / f'{module}.py').write_text(code)
  monkeypatch.syspath_prepend(tmp_path)
  yield [':'.join(name) for name in names]
  for module, _ in names:
    sys.modules.pop(module, None)


# The first backbone, and the one in Flax NNX.
@pytest.mark.parametrize('number', [1, 2])
def test_what_the_page_shows_trains(number, shown, small_config, tmp_path):
  method, backbone = shown[0], shown[number]
  config = small_config(
    method, **{'student.backbone': backbone, 'total_steps': 5}
  )
  result = train.train_and_evaluate(config, tmp_path / 'run')
  (row,) = (row for row in result.history if 'train/l1' in row)
  assert row['train/l1'] > 0 and row['train/cross_entropy'] > 0
