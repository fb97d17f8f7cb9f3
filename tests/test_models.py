"""Backbones: published sizes, one contract for all, and numpy's own forward."""

import functools
import pathlib
import re

from flax import traverse_util
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ijckd_jax import models
from ijckd_jax.commands import models as zoo
from ijckd_jax.data import augment
from ijckd_jax.distillation import network
from ijckd_jax.evaluation import cost
from ijckd_jax.models import backbone as backbone_lib
from ijckd_jax.models import layers
from ijckd_jax.models import outputs
from ijckd_jax.models import programs
from ijckd_jax.runtime import config_utils
from tests import marks

X1 = ((16, 32), (16, 32), (32, 16), (64, 8))
X2 = ((16, 32), (32, 32), (64, 16), (128, 8))
X4 = ((32, 32), (64, 32), (128, 16), (256, 8))

CIFAR_VGG = ((64, 32), (128, 16), (256, 8), (512, 4), (512, 4))
IMAGENET_BASIC = ((64, 56), (64, 56), (128, 28), (256, 14), (512, 7))
IMAGENET_DEEP = ((64, 56), (256, 56), (512, 28), (1024, 14), (2048, 7))

# Parameters with a head of 100 classes (1000 for ImageNet), elements of the
# running means and variances, and (channels, size) of each stage at 32x32x3
# (224x224x3), as the PyTorch models of RepDistiller, mdistiller and SimKD have
# them, or torchvision and timm. None is published for wrn_16_4, wrn_28_2 and
# wrn_28_4, torchdistill's and the other widths of ShuffleNetV2: the numbers are
# those of tests/torch_networks.py.
PUBLISHED = {
  'resnet8': (83_892, 672, X1),
  'resnet14': (181_108, 1_120, X1),
  'resnet20': (278_324, 1_568, X1),
  'resnet32': (472_756, 2_464, X1),
  'resnet38': (569_972, 2_912, X1),
  'resnet44': (667_188, 3_360, X1),
  'resnet56': (861_620, 4_256, X1),
  'resnet110': (1_736_564, 8_288, X1),
  'resnet116': (1_833_780, 8_736, X1),
  'resnet14x2': (703_732, 2_272, X2),
  'resnet38x2': (2_255_604, 5_856, X2),
  'resnet110x2': (6_911_220, 16_608, X2),
  'resnet8x4': (1_233_540, 2_752, X4),
  'resnet14x4': (2_783_620, 4_544, X4),
  'resnet32x4': (7_433_860, 9_920, X4),
  'resnet38x4': (8_983_940, 11_712, X4),
  'wrn_16_1': (180_916, 928, X1),
  'wrn_16_2': (703_284, 1_824, X2),
  'wrn_16_4': (2_772_020, 3_616, ((16, 32), (64, 32), (128, 16), (256, 8))),
  'wrn_28_2': (1_479_220, 3_616, X2),
  'wrn_28_4': (5_872_180, 7_200, ((16, 32), (64, 32), (128, 16), (256, 8))),
  'wrn_40_1': (569_780, 2_720, X1),
  'wrn_40_2': (2_255_156, 5_408, X2),
  'torchdistill_wrn_16_8': (
    11_007_540,
    7_200,
    ((16, 32), (128, 32), (256, 16), (512, 8)),
  ),
  'torchdistill_wrn_28_10': (
    36_536_884,
    17_952,
    ((16, 32), (160, 32), (320, 16), (640, 8)),
  ),
  'torchdistill_wrn_40_4': (
    8_972_340,
    10_784,
    ((16, 32), (64, 32), (128, 16), (256, 8)),
  ),
  'vgg8': (3_965_028, 2_944, CIFAR_VGG),
  'vgg11': (9_277_284, 5_504, CIFAR_VGG),
  'vgg13': (9_462_180, 5_888, CIFAR_VGG),
  'vgg16': (14_774_436, 8_448, CIFAR_VGG),
  'vgg19': (20_086_692, 11_008, CIFAR_VGG),
  'resnet18_cifar': (
    11_220_132,
    9_600,
    ((64, 32), (64, 32), (128, 16), (256, 8), (512, 4)),
  ),
  'resnet50_cifar': (
    23_705_252,
    53_120,
    ((64, 32), (256, 32), (512, 16), (1024, 8), (2048, 4)),
  ),
  'mobilenet_v2_cifar_x0_5': (
    812_836,
    18_368,
    ((16, 16), (12, 16), (16, 8), (48, 4), (160, 2)),
  ),
  'mobilenet_v2_cifar_x1_0': (
    2_353_060,
    34_176,
    ((32, 16), (24, 16), (32, 8), (96, 4), (320, 2)),
  ),
  'shufflenet_v1_cifar': (
    949_258,
    23_736,
    ((24, 32), (240, 16), (480, 8), (960, 4)),
  ),
  'shufflenet_v2_cifar_x0_5': (
    443_716,
    7_952,
    ((24, 32), (48, 16), (96, 8), (192, 4)),
  ),
  'shufflenet_v2_cifar_x1_0': (
    1_355_528,
    16_180,
    ((24, 32), (116, 16), (232, 8), (464, 4)),
  ),
  'shufflenet_v2_cifar_x1_5': (
    2_580_548,
    23_440,
    ((24, 32), (176, 16), (352, 8), (704, 4)),
  ),
  'shufflenet_v2_cifar_x2_0': (
    5_549_320,
    33_716,
    ((24, 32), (244, 16), (488, 8), (976, 4)),
  ),
  'resnet18': (11_689_512, 9_600, IMAGENET_BASIC),
  'resnet34': (21_797_672, 17_024, IMAGENET_BASIC),
  'resnet50': (25_557_032, 53_120, IMAGENET_DEEP),
  'resnet101': (44_549_160, 105_344, IMAGENET_DEEP),
  'resnet152': (60_192_808, 151_424, IMAGENET_DEEP),
  'wide_resnet50_2': (68_883_240, 68_224, IMAGENET_DEEP),
  'resnext50_32x4d': (25_028_904, 68_224, IMAGENET_DEEP),
  'mobilenet_v1': (
    4_231_976,
    21_888,
    ((128, 56), (256, 28), (512, 14), (1024, 7)),
  ),
  'mobilenet_v2': (
    3_504_872,
    34_112,
    ((32, 112), (24, 56), (32, 28), (96, 14), (320, 7)),
  ),
  'mobilenet_v3_small': (
    2_542_856,
    12_112,
    ((16, 112), (16, 56), (24, 28), (48, 14), (96, 7)),
  ),
  'shufflenet_v2_x0_5': (
    1_366_792,
    7_952,
    ((24, 56), (48, 28), (96, 14), (192, 7)),
  ),
  'shufflenet_v2_x1_0': (
    2_278_604,
    16_180,
    ((24, 56), (116, 28), (232, 14), (464, 7)),
  ),
  'mobilenetv3_large_100': (
    5_483_032,
    24_400,
    ((16, 112), (24, 56), (40, 28), (112, 14), (160, 7)),
  ),
  'mobilenetv4_conv_small': (
    3_774_024,
    25_088,
    ((32, 112), (32, 56), (64, 28), (96, 14), (128, 7)),
  ),
  'mobilenetv4_conv_medium': (
    9_715_512,
    67_904,
    ((32, 128), (48, 64), (80, 32), (160, 16), (256, 8)),
  ),
  'tf_efficientnet_lite0': (
    4_652_008,
    42_016,
    ((32, 112), (24, 56), (40, 28), (112, 14), (320, 7)),
  ),
  'tf_efficientnet_lite1': (
    5_416_680,
    53_664,
    ((32, 120), (24, 60), (40, 30), (112, 15), (320, 8)),
  ),
  'tf_efficientnet_lite2': (
    6_092_072,
    58_096,
    ((32, 130), (24, 65), (48, 33), (120, 17), (352, 9)),
  ),
  'efficientnet_b0': (
    5_288_548,
    42_016,
    ((32, 112), (24, 56), (40, 28), (112, 14), (320, 7)),
  ),
  'convnext_atto': (3_695_520, 0, ((40, 56), (80, 28), (160, 14), (320, 7))),
  'convnext_femto': (5_217_784, 0, ((48, 56), (96, 28), (192, 14), (384, 7))),
  'regnety_004': (
    4_344_144,
    27_152,
    ((32, 112), (48, 56), (104, 28), (208, 14), (440, 7)),
  ),
  'deit_small_patch16_224': (22_050_664, 0, 4 * ((384, 14),)),
  'deit_tiny_patch16_224': (5_717_416, 0, 4 * ((192, 14),)),
  'vit_tiny_patch16_224': (5_717_416, 0, 4 * ((192, 14),)),
}
IMAGENET = tuple(PUBLISHED)[list(PUBLISHED).index('resnet18') :]
# Sides of the images that weights are published for, where it is not 224.
USUAL_SIZES = {
  'mobilenetv4_conv_medium': 256,
  'tf_efficientnet_lite1': 240,
  'tf_efficientnet_lite2': 260,
}
TRANSFORMERS = ('deit', 'vit')
# Those of one size and kind are too slow to be all run.
ONE_OF_EACH = (
  'resnet8',
  'wrn_16_1',
  'vgg8',
  'mobilenet_v2_cifar_x0_5',
  'shufflenet_v1_cifar',
  'shufflenet_v2_cifar_x0_5',
  'resnet18',
  'mobilenet_v1',
  'mobilenet_v2',
  'mobilenet_v3_small',
  'shufflenet_v2_x0_5',
  'mobilenetv3_large_100',
  'mobilenetv4_conv_small',
  'tf_efficientnet_lite0',
  'convnext_atto',
  'regnety_004',
  'deit_small_patch16_224',
)
# Strides, early activations, pools, groups, squeezes, tokens.
OF_EACH_OPERATOR = (
  *('resnet8', 'wrn_16_1', 'vgg8', 'shufflenet_v1_cifar'),
  *('mobilenet_v3_small', 'mobilenetv4_conv_small', 'convnext_atto'),
  'deit_small_patch16_224',
)
FASTEST = ('resnet8', 'wrn_16_1')


def by_default(names, *more):
  """Returns the backbones as parameters, all but `names` marked as slow."""
  return [
    pytest.param(name, *more, marks=[] if name in names else pytest.mark.slow)
    for name in models.BACKBONES
  ]


# Layers after the last stage.
TAILS = {
  'wrn': {'bn1'},
  'torchdistill': {'bn1'},
  'mobilenet_v2_cifar': {'conv2_0', 'conv2_1'},
  'mobilenet_v2': {'features_18_0', 'features_18_1'},
  'mobilenet_v3': {'features_12_0', 'features_12_1', 'pool_hidden'},
  'shufflenet_v2_cifar': {'conv2', 'bn2'},
  'shufflenet_v2': {'conv5_0', 'conv5_1'},
  'mobilenetv3': {'blocks__6__0__conv', 'blocks__6__0__bn1', 'pool_conv_head'},
  'mobilenetv4': {
    *('blocks__4__0__conv', 'blocks__4__0__bn1'),
    *('pool_conv_head', 'pool_norm_head'),
  },
  'tf_efficientnet': {'conv_head', 'bn2'},
  'efficientnet': {'conv_head', 'bn2'},
  'convnext': {'pool_head__norm'},
  'deit': {'norm'},
  'vit': {'norm'},
}


@functools.cache
def shapes_of(name, image_shape, tap='final', dtype=jnp.float32):
  """Returns shapes of the Features and of the variables."""
  backbone = models.build(name, tap=tap, dtype=dtype)
  images = jax.ShapeDtypeStruct((2, *image_shape), jnp.float32)
  return jax.eval_shape(
    lambda x: backbone.init_with_output(jax.random.key(0), x, train=False),
    images,
  )


def usual_size(name):
  return USUAL_SIZES.get(name, 224 if name in IMAGENET else 32)


def num_elements(tree):
  return sum(leaf.size for leaf in jax.tree.leaves(tree))


def noise(shapes, seed=0):
  """Returns variables that leave no layer without effect."""
  rng = np.random.RandomState(seed)
  flat = traverse_util.flatten_dict(shapes)
  for path, leaf in flat.items():
    values = rng.randn(*leaf.shape)
    if path[-1] in ('scale', 'var'):
      values = 1 + np.abs(values) / 2
    elif path[-1] == 'kernel':
      values *= np.sqrt(2 / np.prod(leaf.shape[:-1]))
    flat[path] = values.astype(np.float32)
  return traverse_util.unflatten_dict(flat)


def small(name):
  """Returns the shape of the smallest images that a backbone is tried on."""
  return (32, 32, 3) if name in IMAGENET else (8, 8, 1)


@functools.cache
def filled(name, image_shape, tap='final'):
  """Returns noisy variables and an input of a backbone."""
  _, shapes = shapes_of(name, image_shape, tap)
  x = np.random.RandomState(1).randn(2, *image_shape).astype(np.float32)
  return noise(shapes), x


def run(name, image_shape=None, **settings):
  """Returns Features, variables and input of a backbone full of noise."""
  backbone = models.build(name, **settings)
  variables, x = filled(
    name, image_shape or small(name), settings.get('tap', 'final')
  )
  forward = jax.jit(functools.partial(backbone.apply, train=False))
  return forward(variables, x), variables, x


@pytest.mark.parametrize('name', models.BACKBONES)
def test_sizes_are_the_published_ones(name):
  num_params, num_stats, stages = PUBLISHED[name]
  backbone = models.build(name)
  size, num_classes = usual_size(name), 1000 if name in IMAGENET else 100
  assert backbone.usual_size == size
  features, variables = shapes_of(name, (size, size, 3))
  head = jax.eval_shape(
    lambda: backbone.init_head(
      jax.random.key(0), features.pooled.shape[-1], num_classes
    )
  )
  assert num_elements(variables['params']) + num_elements(head) == num_params
  assert num_elements(variables.get('batch_stats', {})) == num_stats
  assert set(variables) <= {'params', 'batch_stats'}
  assert [stage.shape for stage in features.stages] == [
    (2, size, size, channels) for channels, size in stages
  ]
  assert features.pooled.shape == (2, head['kernel'].shape[0])


@pytest.mark.parametrize('name', by_default(ONE_OF_EACH))
def test_images_may_have_any_size_and_any_number_of_channels(name):
  image_shape = (65, 47, 4)
  _, _, stages = PUBLISHED[name]
  if name.startswith(TRANSFORMERS):
    with pytest.raises(
      config_utils.UserError, match='65x47: sides must be multiples'
    ):
      shapes_of(name, image_shape)
    return
  features, _ = shapes_of(name, image_shape)
  usual = usual_size(name)
  for i, (stage, (channels, size)) in enumerate(
    zip(features.stages, stages, strict=True)
  ):
    height, width = image_shape[:2]
    for _ in range(round(np.log2(usual / size))):
      if name.startswith(('vgg', 'convnext')):
        height, width = height // 2, width // 2
      else:
        height, width = -(-height // 2), -(-width // 2)
    assert stage.shape == (2, height, width, channels), i


@pytest.mark.parametrize('name', ONE_OF_EACH)
@pytest.mark.parametrize('size', [32, 64, 224])
def test_sizes_of_maps(name, size):
  """Each net works at each size; its maps shrink in proportion."""
  features, _ = shapes_of(name, (size, size, 3))
  _, _, stages = PUBLISHED[name]
  usual = usual_size(name)
  expected = [stage_size * size / usual for _, stage_size in stages]
  if name.startswith('vgg') and size >= 64:
    expected[-1] /= 2  # The pool that smaller images do without.
  sizes = [stage.shape[1] for stage in features.stages]
  assert sizes == [max(1, round(side)) for side in expected]
  assert features.final.shape[1:3] == features.stages[-1].shape[1:3]


@pytest.mark.parametrize('name', by_default(ONE_OF_EACH))
def test_frozen_statistics_are_those_of_inference(name):
  """In a training step too, and they stay."""
  backbone = models.build(name, freeze_statistics=True)
  x = np.random.default_rng(0).normal(size=(2, 32, 32, 3)).astype(np.float32)
  variables = backbone.init(jax.random.key(0), x, train=False)
  stats = variables.get('batch_stats', {})
  variables = {'params': variables['params'], 'batch_stats': stats}

  @jax.jit
  def run(variables, x):
    return [
      network.run(backbone, variables, x, train=train)
      for train in (True, False)
    ]

  (trained, after), (wanted, _) = run(variables, x)
  np.testing.assert_allclose(trained.pooled, wanted.pooled, rtol=1e-5)
  jax.tree.map(np.testing.assert_array_equal, after, stats)


def test_images_that_are_too_small():
  with pytest.raises(config_utils.UserError, match='4x9 are too small'):
    shapes_of('vgg8', (4, 9, 3))


@pytest.mark.parametrize(
  'name, tap',
  [
    *by_default(OF_EACH_OPERATOR, 'final'),
    *by_default((*FASTEST, 'mobilenet_v3_small'), 'stage'),
  ],
)
def test_contract(name, tap):
  """The head of the pooled final map gives the logits, in every backbone."""
  backbone = models.build(name, tap=tap)
  variables, x = filled(name, small(name), tap)
  shapes, _ = shapes_of(name, small(name), tap)
  rng = np.random.RandomState(2)
  head = {
    'kernel': rng.randn(shapes.pooled.shape[-1], 7).astype(np.float32),
    'bias': rng.randn(7).astype(np.float32),
  }
  net = network.Network(
    backbone,
    augment.Preprocessing((0.5,), (0.5,), x.shape[1:3]),
    connector=None,
    connect_size=None,
    pool=lambda _, final: backbone.pool(final),
  )
  kinds = {**variables, 'batch_stats': variables.get('batch_stats', {})}
  parts = {kind: {'backbone': tree} for kind, tree in kinds.items()}
  parts['params']['head'] = head

  @jax.jit
  def both(variables, parts, x):
    features = backbone.apply(variables, x, train=False)
    pooled = backbone.apply(variables, features.final, method='pool')
    return features, net(parts, x), pooled

  features, out, pooled = both(variables, parts, x)
  final = np.asarray(features.final)
  assert final.std() > 0
  assert (final.min() < 0) == backbone.signed
  assert (features.pooled.min() < 0) == backbone.pooled_signed
  assert features.pooled.dtype == jnp.float32
  if backbone.pools_map:
    np.testing.assert_allclose(features.pooled, pooled, rtol=1e-5, atol=1e-6)
  else:
    assert features.pooled.shape == pooled.shape
    assert not np.allclose(features.pooled, pooled, rtol=0.1)
  # Compiled in one program, and yet not always rounded alike.
  for name in ('final', 'pooled'):
    mine, theirs = getattr(out, name), getattr(features, name)
    np.testing.assert_allclose(mine, theirs, atol=5e-6 * np.abs(theirs).max())
  assert len(out.stages) == len(features.stages)
  expected = np.asarray(features.pooled, np.float64) @ head['kernel']
  np.testing.assert_allclose(
    out.logits, expected + head['bias'], atol=1e-5 * np.abs(expected).max()
  )
  if tap == 'stage':
    np.testing.assert_array_equal(final, features.stages[-1])
  assert net.signed == backbone.signed
  assert net.pooled_signed == backbone.pooled_signed
  assert net.pools_map == backbone.pools_map
  assert out.connected is None


@pytest.mark.parametrize('name', by_default(ONE_OF_EACH))
def test_a_backbone_ends_at_its_last_stage(name):
  features, cut = shapes_of(name, small(name), 'stage')
  assert features.final.shape == features.stages[-1].shape
  assert features.pooled.shape == (2, features.final.shape[-1])
  _, full = shapes_of(name, small(name))
  full, cut = (
    {path: leaf.shape for path, leaf in traverse_util.flatten_dict(v).items()}
    for v in (full, cut)
  )
  assert cut.items() <= full.items()
  dropped = {path[1] for path in full.keys() - cut.keys()}
  families = [family for family in TAILS if name.startswith(family)]
  assert dropped == TAILS.get(max(families, key=len, default=None), set())


@pytest.mark.parametrize('name', by_default((*FASTEST, 'mobilenet_v3_small')))
def test_a_backbone_that_ends_at_a_stage_is_the_start_of_the_whole_one(name):
  """The same layers with the same start and results, and none after them."""
  whole, key = models.build(name), jax.random.key(4)
  variables, x = filled(name, small(name))
  num_stages = len(shapes_of(name, small(name))[0].stages)
  cuts = [models.build(name, tap=f'stage{i}') for i in range(num_stages)]
  flat = traverse_util.flatten_dict(variables)

  def own(cut):
    shapes = jax.eval_shape(lambda: cut.init(key, x, train=False))
    paths = traverse_util.flatten_dict(shapes)
    return traverse_util.unflatten_dict({path: flat[path] for path in paths})

  @jax.jit
  def run(key, x):
    started = [b.init(key, x, train=False) for b in (whole, *cuts)]
    features = [
      b.apply(v, x, train=False)
      for b, v in zip((whole, *cuts), (variables, *map(own, cuts)), strict=True)
    ]
    return started, features

  (start, *starts), (expected, *found) = run(key, x)
  start, *starts = map(traverse_util.flatten_dict, (start, *starts))
  for number, (cut, features) in enumerate(zip(cuts, found, strict=True)):
    cut.check_tap(features.stages)
    assert (
      starts[number].keys() < starts[number + 1].keys()
      if (number + 1 < num_stages)
      else starts[number].keys()
      == traverse_util.flatten_dict(
        shapes_of(name, small(name), 'stage')[1]
      ).keys()
    )
    for path, value in starts[number].items():
      np.testing.assert_array_equal(value, start[path], err_msg=str(path))
    assert len(features.stages) == number + 1
    # A wide net's take the batch norm after the stage, which is not there.
    has_before = expected.before and not name.startswith('wrn')
    assert len(features.before) == (number + 1 if has_before else 0)
    for kind in ('stages', 'before'):
      pairs = zip(
        getattr(features, kind), getattr(expected, kind), strict=False
      )
      for mine, theirs in pairs:
        np.testing.assert_array_equal(mine, theirs)
    np.testing.assert_array_equal(features.final, features.stages[-1])
    np.testing.assert_allclose(
      features.pooled, features.final.mean((1, 2)), rtol=1e-5, atol=1e-5
    )
    assert (features.final.min() < 0) == cut.signed
    assert (features.pooled.min() < 0) == cut.pooled_signed
    assert cut.pools_map


@pytest.mark.parametrize(
  'name, tap, said',
  [
    ('resnet8', 'stages', "unknown tap 'stages'; did you mean 'stage'"),
    (
      'resnet8',
      'stage4',
      'known: final, stage, stage0, stage1, stage2, stage3',
    ),
    ('resnet8', 'stage01', "did you mean 'stage1'.*, stage3$"),
    ('resnet8', 'stage-1', "did you mean 'stage1'"),
    ('resnet8', '1', "unknown tap '1'; known: .*, stage3$"),
    ('resnet18', 'stage5', ', stage4$'),
    ('mobilenet_v1', 'stage4', ', stage3$'),
    (
      f'{__name__}:NeverEnds',
      'stage0',
      'a NeverEnds does not end at stage0, but goes on to stage1: .*num_stages',
    ),
  ],
)
def test_a_tap_that_is_not_there(name, tap, said):
  backbone = models.build(name, tap=tap)
  net = network.Network(
    backbone, augment.Preprocessing((0.5,), (0.5,), (8, 8)), None, None, None
  )
  with pytest.raises(config_utils.UserError) as error:
    jax.eval_shape(lambda: net.init(jax.random.key(0), (8, 8, 1), 5))
  assert re.search(said, str(error.value))


class NeverEnds(backbone_lib.Backbone):
  """Two stages, whatever its tap."""

  @nn.compact
  def __call__(self, images, *, train):
    x = self.conv(4, 3)(images)
    y = self.conv(4, 3)(x)
    return outputs.Features((x, y), y, self.pool(y))


@pytest.mark.parametrize(
  'name, tap',
  [
    *by_default(FASTEST, 'final'),
    *by_default(FASTEST, 'stage'),
    *by_default(FASTEST, 'stage0'),
    *by_default(FASTEST, 'stage1'),
  ],
)
def test_every_parameter_has_an_effect(name, tap):
  shapes, _ = shapes_of(name, small(name), tap)
  variables, x = filled(name, small(name), tap)
  backbone = models.build(name, tap=tap)
  rng = np.random.RandomState(3)
  weights = [rng.randn(*y.shape) for y in (shapes.final, shapes.pooled)]

  @jax.jit
  def gradient(params):
    def score(params):
      moving = {**variables, 'params': params}
      features = backbone.apply(moving, x, train=False)
      found = (features.final, features.pooled)
      return sum(jnp.sum(y * w) for y, w in zip(found, weights, strict=True))

    return jax.grad(score)(params)

  gradients = traverse_util.flatten_dict(gradient(variables['params']))
  assert (
    gradients.keys() == traverse_util.flatten_dict(variables['params']).keys()
  )
  assert not [path for path, g in gradients.items() if not np.any(g)]


@pytest.mark.parametrize('name', ONE_OF_EACH)
def test_bfloat16_keeps_parameters_and_pooled_in_float32(name):
  features, variables = shapes_of(name, small(name), dtype=jnp.bfloat16)
  assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {
    jnp.dtype(jnp.float32)
  }
  assert features.final.dtype == jnp.bfloat16
  assert features.pooled.dtype == jnp.float32


@pytest.mark.parametrize(
  'name', marks.slow_but(FASTEST, [*FASTEST, 'deit_small_patch16_224'])
)
def test_bfloat16_is_near(name):
  exact, _, _ = run(name)
  low, _, _ = run(name, dtype=jnp.bfloat16)
  error = np.abs(low.pooled - exact.pooled).mean()
  assert 0 < error < 0.03 * np.abs(exact.pooled).mean()
  if name in FASTEST:
    pooled = np.asarray(low.final.astype(jnp.float32)).mean(axis=(1, 2))
    np.testing.assert_allclose(low.pooled, pooled, rtol=1e-6)


def test_unknown_name_names_the_nearest():
  with pytest.raises(
    config_utils.UserError,
    match="unknown backbone 'resnet8x5'; did you mean 'resnet8x4'.*known: ",
  ):
    models.build('resnet8x5')


def test_build_reaches_outside_and_passes_settings_on():
  backbone = models.build(
    'ijckd_jax.models:WideResNet', tap='stage', axis_name='a'
  )
  assert backbone == models.WideResNet(tap='stage', axis_name='a')


@pytest.mark.parametrize(
  'name, said',
  [
    ('json:loads', 'does not make a backbone: loads'),
    ('json:__name__', 'does not make a backbone: .* not callable'),
    (
      'collections:OrderedDict',
      'makes a OrderedDict: a backbone is',
    ),
    ('flax.linen:Module', 'does not make a backbone: '),
  ],
)
def test_what_is_no_backbone(name, said):
  with pytest.raises(
    config_utils.UserError, match=f"^'{name}' {said}"
  ) as error:
    models.build(name, tap='stage')
  assert '\n' not in str(error.value)


@pytest.mark.parametrize(
  'name, own',
  [
    ('timm:resnet18', 'resnet18'),
    ('timm:swin_tiny', None),
    ('torchvision.models:mobilenet_v2', 'mobilenet_v2'),
    ('hf:timm/swin_tiny', None),
    ('hf:timm/resnet50.a1_in1k@0123', 'resnet50'),
  ],
)
def test_a_network_of_pytorch_is_not_built(name, own, monkeypatch):
  """It is said how it teaches or starts, and whether it is here as well."""
  monkeypatch.setattr(config_utils, 'resolve', None)  # Nothing is imported.
  with pytest.raises(config_utils.UserError) as error:
    models.build(name)
  said = str(error.value)
  assert said.startswith(f"'{name}' is a network of PyTorch: 'ijckd convert' ")
  assert 'teacher.checkpoint=DIR' in said and 'student.init_from=DIR' in said
  assert said.endswith('reads') == (own is not None)
  assert (f'take {own}, the same network here' in said) == (own is not None)


@pytest.mark.parametrize('name', ['TorchNet', 'torch_net'])
def test_a_module_of_pytorch_is_not_built(name):
  pytest.importorskip('torch', reason='needs PyTorch')
  with pytest.raises(config_utils.UserError, match='is a network of PyTorch'):
    models.build(f'tests.pytorch_modules:{name}')


@pytest.mark.parametrize(
  'name, depth', [('CifarResNet', 21), ('WideResNet', 20)]
)
def test_depth_that_cannot_be(name, depth):
  backbone = getattr(models, name)(depth=depth)
  with pytest.raises(ValueError, match=f'depth {depth} is not 6n'):
    backbone.init(jax.random.key(0), jnp.ones((1, 8, 8, 1)), train=False)


class OneConv(backbone_lib.Backbone):
  """A single convolution."""

  features: int = 1
  kernel: int = 3
  stride: int = 1

  @nn.compact
  def __call__(self, x, *, train):
    return self.conv(self.features, self.kernel, self.stride, name='conv')(x)


def test_strided_convolution_is_padded_on_both_sides():
  x = jnp.arange(1.0, 17.0).reshape(1, 4, 4, 1)
  ones = {'params': {'conv': {'kernel': jnp.ones((3, 3, 1, 1))}}}
  y = OneConv(stride=2).apply(ones, x, train=False)
  # Rows and columns (-1, 0, 1) and (1, 2, 3) of 1 2 3 4 / 5 6 7 8 / ...
  assert y.shape == (1, 2, 2, 1)
  np.testing.assert_array_equal(
    y[0, :, :, 0],
    [
      [1 + 2 + 5 + 6, 2 + 3 + 4 + 6 + 7 + 8],
      [5 + 6 + 9 + 10 + 13 + 14, 6 + 7 + 8 + 10 + 11 + 12 + 14 + 15 + 16],
    ],
  )


def convolve(x, kernel, stride=1):
  """Convolves as PyTorch does with padding (k-1)/2, window by window."""
  size = kernel.shape[0]
  pad = (size - 1) // 2
  x = np.pad(x, ((0, 0), (pad, pad), (pad, pad), (0, 0)))
  rows = range(0, x.shape[1] - size + 1, stride)
  columns = range(0, x.shape[2] - size + 1, stride)
  return np.stack(
    [
      np.stack(
        [
          np.tensordot(x[:, i : i + size, j : j + size], kernel, 3)
          for j in columns
        ],
        axis=1,
      )
      for i in rows
    ],
    axis=1,
  )


class Numpy:
  """Layers in float64 numpy, with a network's variables by layer name."""

  def __init__(self, variables):
    self.params = variables['params']
    self.stats = variables['batch_stats']

  def conv(self, x, name, stride=1):
    kernel = np.asarray(self.params[name]['kernel'], np.float64)
    return convolve(x, kernel, stride)

  def norm(self, x, name):
    stats, params = self.stats[name], self.params[name]
    x = (x - stats['mean']) / np.sqrt(stats['var'] + 1e-5)
    return x * params['scale'] + params['bias']


@pytest.mark.parametrize('size, stride', [(3, 1), (3, 2), (1, 2), (1, 1)])
@pytest.mark.parametrize('shape', [(5, 5), (4, 7)])
def test_convolution_by_brute_force(size, stride, shape):
  rng = np.random.RandomState(0)
  x = rng.randn(2, *shape, 3).astype(np.float32)
  kernel = rng.randn(size, size, 3, 4).astype(np.float32)
  y = OneConv(features=4, kernel=size, stride=stride).apply(
    {'params': {'conv': {'kernel': kernel}}}, x, train=False
  )
  expected = convolve(x, kernel, stride)
  np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-4)


def relu(x):
  return np.maximum(x, 0)


def resnet_by_hand(net, x, num_blocks):
  """Conv-BN-ReLU-conv-BN, add, ReLU; 1x1 conv and BN where shapes change."""
  x = relu(net.norm(net.conv(x, 'conv1'), 'bn1'))
  stages = [x]
  for stage in (1, 2, 3):
    for block in range(num_blocks):
      stride = 2 if stage > 1 and block == 0 else 1
      name = f'layer{stage}_{block}'
      y = relu(net.norm(net.conv(x, f'{name}_conv1', stride), f'{name}_bn1'))
      y = net.norm(net.conv(y, f'{name}_conv2'), f'{name}_bn2')
      if y.shape != x.shape:
        x = net.conv(x, f'{name}_downsample_conv', stride)
        x = net.norm(x, f'{name}_downsample_bn')
      x = relu(x + y)
    stages.append(x)
  return stages, x


def wrn_by_hand(net, x, num_blocks):
  """BN-ReLU-conv-BN-ReLU-conv, add; a 1x1 shortcut is of the activated."""
  x = net.conv(x, 'conv1')
  stages = [x]
  for stage in (1, 2, 3):
    for block in range(num_blocks):
      stride = 2 if stage > 1 and block == 0 else 1
      name = f'block{stage}_{block}'
      activated = relu(net.norm(x, f'{name}_bn1'))
      y = net.conv(activated, f'{name}_conv1', stride)
      y = net.conv(relu(net.norm(y, f'{name}_bn2')), f'{name}_conv2')
      if y.shape != x.shape:
        x = net.conv(activated, f'{name}_shortcut', stride)
      x = x + y
    stages.append(x)
  return stages, relu(net.norm(x, 'bn1'))


@pytest.mark.parametrize(
  'name, by_hand, num_blocks',
  [
    ('resnet8', resnet_by_hand, 1),
    ('resnet14x2', resnet_by_hand, 2),
    ('wrn_16_1', wrn_by_hand, 2),
    ('wrn_16_2', wrn_by_hand, 2),
  ],
)
def test_forward_by_hand(name, by_hand, num_blocks):
  features, variables, x = run(name, image_shape=(6, 9, 2))
  stages, final = by_hand(Numpy(variables), x.astype(np.float64), num_blocks)
  for stage, expected in zip(
    (*features.stages, features.final), (*stages, final), strict=True
  ):
    np.testing.assert_allclose(
      stage, expected, rtol=1e-3, atol=1e-4 * np.abs(expected).max()
    )
  expected = final.mean((1, 2))
  np.testing.assert_allclose(
    features.pooled, expected, rtol=1e-4, atol=1e-6 * expected.max()
  )


def test_batch_norm_has_pytorchs_momentum_and_epsilon():
  class OneNorm(backbone_lib.Backbone):
    @nn.compact
    def __call__(self, x, *, train):
      return self.norm(train, name='bn')(x)

  x = np.random.RandomState(0).randn(4, 3, 3, 2).astype(np.float32) / 100 + 1
  variables = OneNorm().init(jax.random.key(0), x, train=False)
  y, changed = OneNorm().apply(
    variables, x, train=True, mutable=['batch_stats']
  )
  mean, var = x.mean((0, 1, 2)), x.var((0, 1, 2))
  np.testing.assert_allclose(
    y, (x - mean) / np.sqrt(var + 1e-5), rtol=1e-2, atol=1e-3
  )
  stats = changed['batch_stats']['bn']
  np.testing.assert_allclose(stats['mean'], 0.1 * mean, rtol=1e-4)
  np.testing.assert_allclose(stats['var'], 0.9 + 0.1 * var, rtol=1e-5)


def assert_normal(leaf, std, path):
  # Six standard errors of an estimated standard deviation and mean.
  assert abs(leaf.std() / std - 1) < 6 / np.sqrt(2 * leaf.size), path
  assert abs(leaf.mean() / std) < 6 / np.sqrt(leaf.size), path
  if leaf.size > 30_000:  # A normal has 4.6 % beyond 2, and is not cut.
    assert abs(np.mean(np.abs(leaf) > 2 * std) - 0.0455) < 0.01, path
    assert np.abs(leaf).max() > 3.5 * std, path


# Depthwise and grouped convolutions of timm's networks.
GROUPED = re.compile('conv_dw|dw_start|dw_mid|conv2__conv')


def assert_uniform(leaf, bound, path):
  assert np.abs(leaf).max() <= bound, path
  std = bound / np.sqrt(3)
  assert abs(leaf.std() / std - 1) < 6 / np.sqrt(2 * leaf.size), path
  assert abs(leaf.mean() / std) < 6 / np.sqrt(leaf.size), path


@pytest.mark.slow
@pytest.mark.parametrize(
  'name',
  by_default(
    (*FASTEST, 'vgg8', 'mobilenet_v1', 'deit_small_patch16_224'),
  ),
)
def test_start_of_backbones(name):
  """Convolutions start as the originals', batch norms as the identity."""
  uniform = name.startswith(('shufflenet', 'mobilenet_v1', *TRANSFORMERS))
  init = functools.partial(models.build(name).init, train=False)
  image = jnp.ones((1, 16, 16, 3))
  variables = jax.jit(init)(jax.random.key(0), image)
  for path, leaf in traverse_util.flatten_dict(variables).items():
    leaf = np.asarray(leaf)
    if path[1:] == ('patch_embed_proj', 'bias'):
      assert_uniform(leaf, 1 / np.sqrt(16 * 16 * 3), path)
    elif leaf.ndim == 1:
      expected = 1.0 if path[-1] in ('scale', 'var') else 0.0
      if path[-1].endswith('gamma'):  # Layer scale.
        expected = 1e-6
      elif name.startswith('regnet') and 'conv3__bn' in path[-2]:
        expected = float(path[-1] == 'var')  # A block starts as its shortcut.
      np.testing.assert_allclose(leaf, expected, err_msg=str(path))
    elif path[-1] == 'cls_token':
      assert_normal(leaf, 1e-6, path)
    elif name.startswith(TRANSFORMERS) and leaf.ndim < 4:
      assert_normal(leaf, 0.02, path)
    elif path[-2] == 'pool_hidden':
      assert_normal(leaf, 0.01, path)
    else:
      height, width, inputs, channels = leaf.shape
      if GROUPED.search(path[-2]):  # As many outputs as inputs of a group.
        channels = inputs
      if name.startswith('convnext'):
        assert_normal(leaf, 0.02, path)
      elif uniform:
        assert_uniform(leaf, 1 / np.sqrt(height * width * inputs), path)
      else:
        std = np.sqrt(2 / (height * width * channels))
        assert_normal(leaf, std, path)


@pytest.mark.parametrize('name', models.BACKBONES)
def test_start_of_heads(name):
  """Heads are U(+-1/sqrt(D)), or start as the original without a bias."""
  head = models.build(name).init_head(jax.random.key(0), 64, 100)
  kernel, bias = np.asarray(head['kernel']), np.asarray(head['bias'])
  assert kernel.shape == (64, 100) and bias.shape == (100,)
  assert kernel.dtype == bias.dtype == np.float32
  if name.startswith(('tf_', 'efficientnet', 'mobilenetv')):
    assert not bias.any()
    assert_uniform(kernel, 1 / 10, name)
    assert np.abs(kernel).max() > 0.9 / 10
    return
  wider = (*TRANSFORMERS, 'convnext')
  normal = name.startswith(
    ('vgg', 'mobilenet_v2', 'mobilenet_v3', 'regnet', *wider)
  )
  assert bias.any() != (normal or 'wrn' in name)
  if normal:
    assert_normal(kernel, 0.02 if name.startswith(wider) else 0.01, name)
    return
  assert_uniform(kernel, 1 / 8, name)
  assert np.abs(kernel).max() > 0.9 / 8
  if bias.any():
    assert_uniform(bias, 1 / 8, name)


@pytest.mark.parametrize('synchronised', [False, True])
def test_unbiased_running_variance(synchronised):
  """It follows n/(n-1) times the biased one; outputs are the same."""
  x = np.random.RandomState(0).randn(2, 3, 2, 1, 4).astype(np.float32)
  settings = {'use_running_average': False}
  if synchronised:
    settings['axis_name'] = 'a'

  def apply(unbiased):
    norm = layers.BatchNorm(unbiased=unbiased, **settings)
    start = {
      'params': {'scale': jnp.ones(4), 'bias': jnp.zeros(4)},
      'batch_stats': {'mean': jnp.zeros(4), 'var': jnp.full(4, 3.0)},
    }
    return jax.vmap(
      lambda part: norm.apply(start, part, mutable=['batch_stats']),
      axis_name='a',
    )(x)

  (y, biased), (same, unbiased) = apply(False), apply(True)
  np.testing.assert_array_equal(y, same)
  biased, unbiased = (changed['batch_stats'] for changed in (biased, unbiased))
  np.testing.assert_array_equal(biased['mean'], unbiased['mean'])
  values = x.reshape(-1, 4) if synchronised else x.reshape(2, -1, 4)
  var = values.var(axis=-2, ddof=1)
  np.testing.assert_allclose(
    unbiased['var'], np.broadcast_to(2.7 + 0.1 * var, (2, 4)), rtol=1e-5
  )
  assert not np.allclose(unbiased['var'], biased['var'], rtol=1e-3)


@pytest.mark.parametrize('shape', [(1, 3), (1, 1, 1, 3)])
def test_a_single_value_has_no_variance(shape):
  """In training, of one device; of two or in inference it is normalised."""
  x, values = jnp.ones(shape), jnp.ones((2, *shape))
  norm = layers.BatchNorm(use_running_average=False, axis_name='a')
  variables = layers.BatchNorm(use_running_average=True).init(
    jax.random.key(0), x
  )

  def apply(norm):
    return jax.vmap(
      lambda x: norm.apply(variables, x, mutable=['batch_stats'])[0],
      axis_name='a',
    )(values)

  assert not np.any(apply(norm))
  with pytest.raises(config_utils.UserError, match='a single value in each'):
    apply(norm.clone(axis_name=None))
  assert np.all(apply(norm.clone(axis_name=None, use_running_average=True)))


def test_channel_shuffle():
  x = jnp.arange(6).reshape(1, 1, 1, 6)
  shuffled = layers.channel_shuffle(x, 2)
  np.testing.assert_array_equal(shuffled[0, 0, 0], [0, 3, 1, 4, 2, 5])


DOCS = pathlib.Path(__file__).parents[1] / 'docs'


@pytest.mark.parametrize('name', ONE_OF_EACH)
def test_the_zoo_is_documented_as_it_is(name):
  cells = zoo.row(name)
  num_params, _, stages = PUBLISHED[name]
  assert cells[3] == f'{num_params:,}'
  channels, size = stages[-1]
  assert cells[5] == f'{size}x{size}x{channels}'
  lines = [
    [cell.strip() for cell in line.strip('| ').split('|')]
    for line in (DOCS / 'models.md').read_text().splitlines()
  ]
  assert cells in lines


def test_the_zoo_documents_all(capsys):
  text = (DOCS / 'models.md').read_text()
  for name in PUBLISHED:
    assert f'\n| {name} ' in text
  zoo.main(['resnet8', 'vgg8'])
  assert len(capsys.readouterr().out.splitlines()) == 4
  with pytest.raises(config_utils.UserError, match="did you mean 'resnet8'"):
    zoo.main(['resnet9'])


# In 10^9, as torchvision's weights state them (meta['_ops']).
@pytest.mark.parametrize(
  'name, expected',
  [
    ('resnet18', 1.814),
    ('resnext50_32x4d', 4.23),
    ('mobilenet_v2', 0.301),
    ('mobilenet_v3_small', 0.057),
    ('shufflenet_v2_x1_0', 0.145),
  ],
)
def test_multiply_adds_are_torchvisions(name, expected):
  millions = float(zoo.row(name)[4].replace(',', ''))
  assert abs(millions / 1e3 - expected) < 6e-4


def test_multiply_adds_by_hand():
  """A strided grouped convolution and a product, in a function of its own."""

  @jax.jit
  def inner(x, kernel, matrix):
    x = jax.lax.conv_general_dilated(
      x,
      kernel,
      (2, 2),
      'VALID',
      feature_group_count=2,
      dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
    )
    return x.reshape(3, -1) @ matrix

  found = cost.multiply_adds(
    inner, jnp.ones((3, 5, 5, 4)), jnp.ones((3, 3, 2, 6)), jnp.ones((24, 7))
  )
  convolution = 3 * (2 * 2 * 6) * (3 * 3 * 2)
  assert found == convolution + 3 * 24 * 7


def test_multiply_adds_in_vain_are_not_counted():
  square = jax.ShapeDtypeStruct((2, 2), jnp.float32)

  def last_product(x):
    x @ x  # Its result is not used.
    return x @ x[:, :1]

  assert cost.multiply_adds(last_product, square) == 4


def test_cost_of_a_network_by_hand():
  """Arrays that are not read do not count."""
  arrays = {
    'kernel': np.ones((12, 5), np.float32),
    'other': np.ones((9, 9), np.float32),
    'scale': np.ones(5, np.float16),
  }

  def network(arrays, images):
    logits = images.reshape(len(images), -1) @ arrays['kernel']
    return logits * arrays['scale']

  found = cost.of_network(network, arrays, (2, 2, 3), 8)
  assert found['multiply_adds'] == 12 * 5
  assert found['weight_bytes'] == 4 * 12 * 5 + 2 * 5
  assert [*found['milliseconds']] == ['1', '8']
  assert min(found['milliseconds'].values()) > 0


def test_multiply_adds_of_loops_and_programs():
  """A scan's are counted for each turn; of a program nobody can tell."""
  square = jnp.ones((2, 2))

  def turns(x):
    return jax.lax.scan(lambda x, _: (x @ square, None), x, length=5)[0]

  assert cost.multiply_adds(turns, square) == 5 * 8
  program = programs.trace(lambda _, x: x @ square, {}, (2,))
  assert cost.multiply_adds(lambda x: program({}, x), square) is None

  def until(x):
    return jax.lax.while_loop(lambda x: x.sum() < 9, lambda x: x @ square, x)

  assert cost.multiply_adds(until, square) is None


@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16])
def test_a_pool_before_the_normalisation_is_one_after_it(dtype):
  """Also of channels whose scale is negative, in values and in gradients."""
  rng = np.random.default_rng(0)
  x = jnp.asarray(rng.normal(size=(4, 8, 8, 6)), dtype)
  weight = jnp.asarray(rng.normal(size=(4, 4, 4, 6)))
  norm = layers.BatchNorm(use_running_average=False, dtype=dtype, unbiased=True)
  variables = norm.init(jax.random.key(0), x)
  params = {
    'scale': jnp.asarray([1.0, -0.5, 0.3, -2.0, 0.1, 3.0]),
    'bias': jnp.asarray(rng.normal(size=6), jnp.float32),
  }

  def pool(x):
    return nn.max_pool(x, (2, 2), (2, 2))

  def loss(params, x, first):
    y, changed = norm.apply(
      {**variables, 'params': params},
      x,
      pool if first else None,
      mutable='batch_stats',
    )
    y = y if first else pool(y)
    return jnp.sum(y * weight), (y, changed)

  first, after = (
    jax.value_and_grad(loss, (0, 1), has_aux=True)(params, x, flag)
    for flag in (True, False)
  )
  for one, other in zip(
    jax.tree.leaves(first[0]), jax.tree.leaves(after[0]), strict=True
  ):
    np.testing.assert_allclose(one, other, rtol=1e-5)
  if dtype == jnp.float32:  # In bfloat16 equal values tie only once rounded.
    for one, other in zip(
      jax.tree.leaves(first[1]), jax.tree.leaves(after[1]), strict=True
    ):
      np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)
