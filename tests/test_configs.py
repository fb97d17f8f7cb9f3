"""Every config can be loaded and built; nothing is trained."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ijckd_jax import models
from ijckd_jax.data import mixing
from ijckd_jax.data import transforms
from ijckd_jax.distillation import train_state
from ijckd_jax.runtime import config_utils
from ijckd_jax.runtime import parallel
from ijckd_jax.training import experiment
from ijckd_jax.training import train
from tests import marks

ROOT = pathlib.Path(__file__).parents[1]
IMAGE_FOLDER = ROOT / 'configs/image_folder.py'
NUM_EXAMPLES = 50_000


def trace(config):
  """Traces a whole training step on one device; returns state and sums."""
  exp = experiment.build(config)
  tx, _ = exp.optimizer(NUM_EXAMPLES)
  shape = tuple(exp.dataset.image_shape)

  def step():
    key = jax.random.key(0)
    state = train_state.create(
      exp.distiller.init(key, shape), tx, with_ema=config.ema_decay > 0
    )
    rows = jnp.zeros(config.batch_size, jnp.int32)
    batch = {name: rows for name in ('label', 'index', 'epoch')}
    batch['image'] = jnp.zeros((config.batch_size, *shape), jnp.uint8)
    frozen = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), exp.frozen)
    return jax.vmap(
      exp.train_step(tx),
      in_axes=(None, None, 0, None),
      out_axes=None,
      axis_name=parallel.AXIS,
    )(state, frozen, jax.tree.map(lambda x: x[None], batch), key)

  return jax.eval_shape(step)


# A folder's classes are known once it is prepared: tests/test_own_images.py.
PATHS = sorted(set((ROOT / 'configs').glob('*.py')) - {IMAGE_FOLDER})


@pytest.mark.parametrize('path', PATHS, ids=lambda path: path.stem)
def test_config_builds(path):
  config = config_utils.load(str(path))
  state, sums = trace(config)
  reuses_head = config.method.name == 'ijckd'
  terms = {'feature', 'logit'} if reuses_head else {'distillation'}
  assert {'loss', 'accuracy'} | terms <= sums.keys()
  # Where the teacher's is reused, it is not carried.
  assert ('head' in state.params) != reuses_head
  experiment.build(experiment.teacher_config(config))


@pytest.mark.slow
@pytest.mark.parametrize(
  'arg',
  [
    'teacher=resnet56,student=resnet20,method=kd',
    'teacher=resnet110,student=resnet32,method=ce',
    'teacher=wrn_40_2,student=wrn_16_2,method=srrl',
    'teacher=wrn_40_2,student=wrn_40_1,method=simkd',
    'teacher=resnet38x2,student=resnet38,method=simkd',
    'teacher=resnet32x4,student=wrn_16_2',
    'teacher=vgg13,student=mobilenet_v2_cifar_x0_5',
    'teacher=wrn_40_2,student=shufflenet_v1_cifar,method=srrl',
    'teacher=resnet50_cifar,student=vgg8,method=simkd',
  ],
)
def test_cifar100_takes_pairs_and_methods(arg):
  config = config_utils.load(f'{ROOT}/configs/cifar100.py:{arg}')
  state, _ = trace(config)
  own_head = config.method.name in ('kd', 'ce', 'srrl')
  assert ('head' in state.params) == own_head


# One whose pool is the average, one with a pool of its own, one without maps;
# with each of the others it takes minutes.
KINDS = ('vgg8', 'mobilenet_v3_small', 'deit_small_patch16_224')


@pytest.mark.parametrize('name', marks.slow_but(KINDS, models.BACKBONES))
def test_every_backbone_teaches_and_learns(name):
  for teacher, student in ((name, 'resnet8'), ('resnet8', name)):
    config = experiment.default_config(
      dataset='cifar100', teacher=teacher, student=student
    )
    config.total_epochs = 1.0
    if teacher.startswith('deit'):
      with pytest.raises(
        config_utils.UserError, match='does not pool its map.*mlp'
      ):
        experiment.build(config)
      config.method.connector = 'mlp'
      config.method.feature_site = 'pooled'
    exp = experiment.build(config)
    connector = exp.distiller.connected_network.connector
    assert connector.signed == exp.teacher.signed
    assert exp.distiller.network.backbone.truncated


@pytest.mark.parametrize('unbiased', [False, True])
def test_unbiased_variance_reaches_backbone_and_connector(unbiased):
  config = experiment.default_config(
    dataset='digits', teacher='resnet8', student='resnet8'
  )
  assert not config.unbiased_variance
  config.total_epochs, config.unbiased_variance = 1.0, unbiased
  for own in (config, experiment.teacher_config(config)):
    network = experiment.build(own).distiller.network
    for module in (network.backbone, network.connector):
      assert module is None or module.unbiased_variance == unbiased


def test_cifar100_is_the_recipe_of_the_tables():
  config = config_utils.load(f'{ROOT}/configs/cifar100.py')
  exp = experiment.build(config)
  assert exp.total_steps(50_000) == 187_500
  _, schedule = exp.optimizer(50_000)
  assert [
    round(float(schedule(round(epoch * 50_000 / 64) + past)), 8)
    for epoch in (150, 180, 210)
    for past in (-1, 0)
  ] == [0.05, 0.005, 0.005, 0.0005, 0.0005, 0.00005]


def test_function_matching_is_long_mixed_and_without_labels():
  config = config_utils.load(f'{ROOT}/configs/function_matching.py')
  exp = experiment.build(config)
  assert exp.total_steps(50_000) == 117_188
  _, schedule = exp.optimizer(50_000)
  np.testing.assert_allclose(
    [float(schedule(step)) for step in (0, 1465, 117_188)], [0, 1e-3, 0]
  )
  assert exp.distiller.method.cross_entropy_weight == 0
  assert exp.augmentation.crop_padding == 0 and exp.augmentation.flip
  assert exp.augmentation.transforms == (
    transforms.InceptionCrop((0.05, 1.0), (3 / 4, 4 / 3)),
  )
  assert exp.mixing == mixing.Mixing(mixup_alpha=1.0, cutmix_alpha=0.0)
  # A teacher that it trains itself learns from plain images.
  own = experiment.build(experiment.teacher_config(config))
  assert own.mixing is None and not own.augmentation.transforms
  assert own.augmentation.crop_padding == 4


def test_cifar100_exceptions_by_student():
  """Only their rates are looked at: these backbones may be your own."""
  for student, rate in (('mobilenet_v2', 0.01), ('resnet8', 0.05)):
    config = config_utils.load(f'{ROOT}/configs/cifar100.py:student={student}')
    assert config.optimizer.learning_rate == rate
    assert config.teacher.learning_rate == 0.05


def test_extension_example_runs(tmp_path, data_dir, monkeypatch):
  monkeypatch.syspath_prepend(ROOT)
  config = config_utils.load(f'{ROOT}/experiments/extension_example/config.py')
  config.dataset.data_dir = data_dir
  config.total_epochs = 0.0
  config.total_steps = 12
  config.bounds.fit_examples = 0
  config.teacher.backbone = 'plain'
  result = train.train_and_evaluate(config, tmp_path)
  assert result.bundle.class_names == tuple('01234')
  rows = [row for row in result.history if 'train/cosine' in row]
  assert rows
  # It is found again by name: the finished run is loaded from its bundle.
  again = train.train_and_evaluate(config, tmp_path)
  assert again.bundle.backbone_name.endswith('backbone:PlainNet')
  assert type(again.bundle.network.connector).__name__ == 'Gated'


@pytest.mark.parametrize(
  'arg, epochs, batch_size, rate',
  [
    ('teacher=resnet34,student=resnet18', 120.0, 256, 0.1),
    ('teacher=resnet50,student=mobilenet_v1', 100.0, 512, 0.2),
    ('teacher=resnet34,student=resnet18,recipe=pod', 120.0, 4096, 1.6),
  ],
)
def test_imagenets_recipes(arg, epochs, batch_size, rate):
  config = config_utils.load(f'{ROOT}/configs/imagenet.py:{arg}')
  assert (config.total_epochs, config.batch_size) == (epochs, batch_size)
  exp = experiment.build(config)
  assert exp.dataset.image_shape == (224, 224, 3)
  num_examples = 1_281_167
  _, schedule = exp.optimizer(num_examples)
  steps_per_epoch = num_examples / batch_size
  for epoch, factor in ((29.9, 1), (30.1, 0.1), (60.1, 0.01), (90.1, 0.001)):
    step = round(epoch * steps_per_epoch)
    np.testing.assert_allclose(schedule(step), rate * factor, rtol=1e-5)


def test_imagenets_recipe_is_known():
  with pytest.raises(config_utils.UserError, match="did you mean 'official'"):
    config_utils.load(f'{ROOT}/configs/imagenet.py:recipe=oficial')
