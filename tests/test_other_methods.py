"""The other methods' formulas, written anew in numpy with loops."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

from ijckd_jax.distillation import connectors
from ijckd_jax.distillation import methods
from ijckd_jax.models import losses
from ijckd_jax.runtime import config_utils
from tests import test_methods as shared
from tests import test_models

LABELS = (0, -1, 2, 3, 4, 0)


def cross_entropy(student, labels):
  rows = -scipy.special.log_softmax(student.logits.astype(float), axis=1)
  return sum(rows[i, y] for i, y in enumerate(labels) if y >= 0) / len(labels)


def pool(x, size):
  """Returns the averages of a map (B, H, W, C) over `size` x `size` windows."""
  x = np.asarray(x, np.float64)
  rows, columns = (
    [(i * n // size, -(-(i + 1) * n // size)) for i in range(size)]
    for n in x.shape[1:3]
  )
  pooled = [
    [x[:, a:b, c:d].mean(axis=(1, 2)) for c, d in columns] for a, b in rows
  ]
  return np.moveaxis(np.array(pooled), 2, 0)


def unit(x, axis=-1):
  return x / np.sqrt((x**2).sum(axis=axis, keepdims=True))


def at(student, teacher):
  total = 0.0
  for x, y in zip(student.stages[1:], teacher.stages[1:], strict=True):
    size = min(x.shape[1], y.shape[1])
    maps = []
    for z in (pool(x, size), pool(y, size)):
      maps.append(unit((z**2).mean(axis=3).reshape(len(z), -1)))
    total += ((maps[0] - maps[1]) ** 2).mean()
  return 1000 * total


def sp(student, teacher):
  grams = []
  for z in (student.stages[-1], teacher.stages[-1]):
    flat = np.asarray(z, np.float64).reshape(len(z), -1)
    grams.append(unit(flat @ flat.T))
  return 3000 * ((grams[0] - grams[1]) ** 2).sum() / len(flat) ** 2


def smooth_l1(x, y):
  error = np.abs(x - y)
  return np.where(error < 1, error**2 / 2, error - 0.5).mean()


def rkd(student, teacher):
  distances, angles = [], []
  for z in (student.pooled, teacher.pooled):
    z, rows = np.asarray(z, np.float64), range(len(z))
    between = np.array(
      [[np.linalg.norm(z[i] - z[j]) for j in rows] for i in rows]
    )
    distances.append(between / between[~np.eye(len(z), dtype=bool)].mean())
    cosines = np.zeros((len(z),) * 3)
    for i, j, k in itertools.product(rows, rows, rows):
      if i not in (j, k):
        a, b = z[j] - z[i], z[k] - z[i]
        cosines[i, j, k] = a @ b / np.linalg.norm(a) / np.linalg.norm(b)
    angles.append(cosines)
  return 25 * smooth_l1(*distances) + 50 * smooth_l1(*angles)


def dist(student, teacher):
  p, q = (
    scipy.special.softmax(x.logits.astype(float), axis=1)
    for x in (student, teacher)
  )
  inter = np.mean([np.corrcoef(p[b], q[b])[0, 1] for b in range(len(p))])
  intra = np.mean([np.corrcoef(p[:, k], q[:, k])[0, 1] for k in range(5)])
  return 2 * (1 - inter) + 2 * (1 - intra)


def kl(p, q):
  return sum(a * np.log(a / b) for a, b in zip(p, q, strict=True))


def dkd(student, teacher, labels):
  target = nontarget = 0.0
  for i, y in enumerate(labels):
    if y < 0:
      continue
    q, p = (
      scipy.special.softmax(x.logits[i].astype(float) / 4)
      for x in (student, teacher)
    )
    target += kl([p[y], 1 - p[y]], [q[y], 1 - q[y]])
    others = [k for k in range(5) if k != y]
    nontarget += kl(p[others] / (1 - p[y]), q[others] / (1 - q[y]))
  return 16 * (target + 8 * nontarget) / len(labels) / 20  # Epoch 1 of 20.


def fitnet(student, teacher):
  target = pool(teacher.stages[2], student.auxiliary.shape[1])
  return 100 * ((np.asarray(student.auxiliary) - target) ** 2).mean()


def vid(student, teacher):
  total = 0.0
  for (mean, target, variance), y in zip(
    student.auxiliary, teacher.stages[1:], strict=True
  ):
    np.testing.assert_allclose(target, pool(y, mean.shape[1]), rtol=1e-5)
    for c in range(y.shape[-1]):
      error = (mean - target)[..., c]
      total += (
        0.5 * (error**2 / variance[c] + np.log(variance[c])).mean()
      ) / y.shape[-1]
  return total


def reviewkd(student, teacher):
  total = 0.0
  targets = [
    teacher.pooled[:, None, None],
    teacher.before[2],
    teacher.before[1],
  ]
  for (x, y), target in zip(student.auxiliary, targets, strict=True):
    np.testing.assert_array_equal(y, target)
    level, weight, weights = ((x - y) ** 2).mean(), 1.0, 1.0
    for side in (4, 2, 1):
      if side < x.shape[1]:
        weight /= 2
        weights += weight
        level += weight * ((pool(x, side) - pool(y, side)) ** 2).mean()
    total += level / weights
  return 5 * total / 20  # Epoch 1 of 20.


def vkd(student, teacher):
  total = 0.0
  for x, y in zip(student.connected.pooled, teacher.pooled, strict=True):
    y = np.asarray(y, np.float64)
    total += smooth_l1(x, (y - y.mean()) / np.sqrt(y.var() + 1e-5))
  return total / len(teacher.pooled)


def wttm(student, teacher):
  total = 0.0
  for x, y in zip(student.logits, teacher.logits, strict=True):
    q, p = (scipy.special.softmax(z.astype(float)) for z in (x, y))
    factor = (p**0.2).sum()
    total += factor * kl(p**0.2 / factor, q)
  return 4 * total / len(student.logits)


def pefd(student, teacher):
  pairs = zip(student.auxiliary, teacher.pooled, strict=True)
  return 25 * np.mean(
    [1 - x @ y / np.linalg.norm(x) / np.linalg.norm(y) for x, y in pairs]
  )


def mlkd(student, teacher):
  softmax = scipy.special.softmax
  everything = student.second, teacher.second, student, teacher
  s2, t2, s1, t1 = (x.logits.astype(float) for x in everything)
  sure = softmax(t1, axis=1)
  median = np.sort(sure.max(axis=1))
  images = np.mean(sure.max(axis=1) <= (median[2] + median[3]) / 2)
  of_class = sure.sum(axis=0)
  classes = np.mean(of_class <= np.sort(of_class)[2])

  def divergence(s, t, temperature):
    p, q = (softmax(z / temperature, axis=1) for z in (t, s))
    return temperature**2 * np.mean([*map(kl, p, q)])

  total = 0.1 * cross_entropy(student.second, LABELS)
  # That of the first view, with weight 1, is added for all methods alike.
  total -= 0.9 * cross_entropy(student, LABELS)
  for temperature in (4, 3, 5):
    total += 0.9 * images * divergence(s1, t1, temperature)
    total += 0.9 * divergence(s2, t2, temperature)
  for temperature in (2, 6):
    total += 0.9 * (1 + images) * divergence(s1, t1, temperature)
  for temperature in (4, 3, 5, 2, 6):
    p, q = (softmax(z / temperature, axis=1) for z in (t1, s1))
    total += 0.9 * images * np.sum((p @ p.T - q @ q.T) ** 2) / 6
    total += 0.9 * classes * np.sum((p.T @ p - q.T @ q) ** 2) / 5
  return total


def atsc(student, teacher):
  total = np.mean((student.connected.map - pool(teacher.final, 2)) ** 2)
  total += 0.3  # What the teacher has changed by.
  # Of the teacher, where all other methods have the student's.
  total += cross_entropy(teacher, LABELS) - cross_entropy(student, LABELS)
  return total


def srd(student, teacher):
  features = []
  for z in (student.auxiliary, teacher.pooled):
    z = np.asarray(z, np.float64)
    features.append((z - z.mean(axis=0)) / np.sqrt(z.var(axis=0) + 1e-4))
  distance = 2 * np.log(((features[0] - features[1]) ** 4).sum())
  q, p = (
    scipy.special.softmax(x.logits.astype(float), axis=1)
    for x in (student, teacher)
  )
  return distance + np.mean([*map(kl, p, q)])


def crd(student, batch, method):
  memory, count = batch['memory'], len(batch['memory']['label'])
  places = np.asarray(method._negatives(batch))
  total = 0.0
  for name, other in (('student', 'teacher'), ('teacher', 'student')):
    vectors = np.asarray(memory['vectors'][other], np.float64)
    own = np.asarray(student.auxiliary[name], np.float64)
    scores = np.exp(
      [
        [own[b] @ vectors[i] / 0.07 for i in (batch['index'][b], *places[b])]
        for b in range(len(own))
      ]
    )
    scores /= scores.mean() * count  # The first batch fixes it.
    noise = method.num_negatives / count
    for row in scores:
      total -= np.log(row[0] / (row[0] + noise + 1e-7))
      total -= np.log(noise / (row[1:] + noise + 1e-7)).sum()
  return 0.8 * total / len(own)


BY_HAND = {
  'at': at,
  'atsc': atsc,
  'crd': None,  # Below: it has a memory.
  'dist': dist,
  'dkd': None,  # It is divided by the labels.
  'fitnet': fitnet,
  'mlkd': mlkd,
  'pefd': pefd,
  'reviewkd': reviewkd,
  'rkd': rkd,
  'sp': sp,
  'srd': srd,
  'vid': vid,
  'vkd': vkd,
  'wttm': wttm,
}


@pytest.mark.parametrize('name', BY_HAND)
def test_formula(name):
  method = methods.get(name)()
  if name == 'crd':
    method = methods.get(name)(num_negatives=7)
  student, teacher = shared.arrays(method, teacher_size=4)
  labels = np.array(LABELS)
  batch = shared.complete(method, {'label': labels})
  total, _ = method.loss(student, teacher, batch)
  if name == 'crd':
    expected = crd(student, batch, method)
  elif name == 'dkd':
    expected = dkd(student, teacher, labels)
  else:
    expected = BY_HAND[name](student, teacher)
  expected += cross_entropy(student, labels)
  np.testing.assert_allclose(total, expected, rtol=2e-5)


def test_formulas_cover_all_methods():
  found = {name for name, *_ in shared.TABLE} | set(BY_HAND)
  assert found == set(methods.METHODS)


@pytest.mark.parametrize('name', ['dkd', 'reviewkd'])
def test_weights_grow_over_the_warm_up_and_stay(name):
  method = methods.get(name)(cross_entropy_weight=0.0, warm_up_epochs=4.0)
  student, teacher = shared.arrays(method)

  def total(epoch):
    batch = {'label': np.arange(6) % 5, 'epoch': np.full(6, epoch)}
    return method.loss(student, teacher, batch)[0]

  full = total(3)
  for epoch, share in ((0, 0.25), (1, 0.5), (9, 1.0)):
    np.testing.assert_allclose(total(epoch), share * full, rtol=1e-6)
  none = methods.get(name)(cross_entropy_weight=0.0, warm_up_epochs=0.0)
  np.testing.assert_allclose(
    none.loss(student, teacher, {'label': np.arange(6) % 5})[0], full, rtol=1e-6
  )


@pytest.mark.parametrize('name', ['dkd', 'dist', 'kd', 'ijckd', 'srrl'])
def test_standardised_logits_know_no_scale_and_no_shift(name):
  fields = {'standardize': True, 'cross_entropy_weight': 0.0}
  method = methods.get(name)(**fields)
  student, teacher = shared.arrays(method)
  batch = shared.complete(method, {'label': np.arange(6) % 5})
  moved = teacher.replace(logits=3 * teacher.logits + 7)
  total = method.loss(student, teacher, batch)[0]
  np.testing.assert_allclose(
    method.loss(student, moved, batch)[0], total, rtol=1e-4
  )
  plain = methods.get(name)(cross_entropy_weight=0.0)
  assert abs(plain.loss(student, moved, batch)[0] - total) > 1e-3


def test_stages_are_paired_from_either_end():
  student, teacher = ('stem', 's1', 's2', 's3'), ('stem', 't1', 't2')
  last, first = [('s2', 't1'), ('s3', 't2')], [('s1', 't1'), ('s2', 't2')]
  assert losses.pair_stages(student, teacher) == last
  assert losses.pair_stages(student, teacher, 'first') == first
  for pairing in losses.PAIRINGS:
    # One of another library may have its last map alone.
    assert losses.pair_stages(student, ('t',), pairing) == [('s3', 't')]
    swapped = losses.pair_stages(teacher, student, pairing)
    pairs = losses.pair_stages(student, teacher, pairing)
    assert swapped == [pair[::-1] for pair in pairs]


@pytest.mark.parametrize('name', ['at', 'vid'])
def test_another_pairing_is_refused(name):
  with pytest.raises(config_utils.UserError, match='first, last'):
    methods.get(name)(pairing='middle')


@pytest.mark.parametrize('name', sorted(methods.METHODS))
def test_far_and_dead_features_give_finite_losses_and_gradients(name):
  """Where probabilities are zero or one, norms zero, and images alike."""
  method = methods.get(name)()
  student, teacher = shared.arrays(method)
  batch = shared.complete(method, {'label': np.arange(6) % 5})

  @jax.jit
  @jax.value_and_grad
  def run(scale):
    def scaled(seen):
      aux, seen = seen.auxiliary, seen.replace(auxiliary=None)
      seen = jax.tree.map(lambda x: x * scale, seen)
      return seen.replace(auxiliary=aux)

    return method.loss(scaled(student), scaled(teacher), batch)[0]

  for scale in (1e4, 1e-30, 0.0):
    value, gradient = run(scale)
    assert np.isfinite(value) and np.isfinite(gradient), scale


def test_the_variances_of_vid_start_at_five_and_are_trained():
  method = methods.get('vid')()
  distiller, _ = shared.bind(method)
  init = jax.jit(distiller.init, static_argnums=1)
  variables = init(jax.random.key(0), (8, 8, 1))
  scales = {
    name: rho
    for name, rho in variables['params']['auxiliary'].items()
    if name.startswith('scale_')
  }
  assert len(scales) == 2  # Of each stage but the stem.
  for rho in scales.values():
    np.testing.assert_allclose(np.log1p(np.exp(rho)) + 1e-5, 5.0, rtol=1e-5)
  _, _, trained, _ = shared.value_and_gradients(
    distiller, variables, shared.make_batch()
  )
  for name in scales:
    assert np.all(trained['auxiliary'][name] != 0)


def test_vid_regresses_by_three_layers():
  method = methods.get('vid')()
  distiller, variables = shared.bind(method)
  params = variables['params']['auxiliary']
  student, teacher = shared.arrays(method, teacher_size=4)
  module = distiller.auxiliary
  rng = np.random.RandomState(0)
  params = {
    'mean_0_0': rng.randn(5, 2),
    'mean_0_1': rng.randn(2, 2),
    'mean_0_2': rng.randn(2, 2),
    'mean_1_0': rng.randn(3, 4),
    'mean_1_1': rng.randn(4, 4),
    'mean_1_2': rng.randn(4, 4),
  }
  made = {name: {'kernel': w[None, None]} for name, w in params.items()}
  made |= {'scale_0': np.zeros(2), 'scale_1': np.zeros(4)}
  found = module.apply({'params': made}, student, teacher, train=True)
  for number, (mean, _, variance) in enumerate(found):
    x = np.asarray(student.stages[number + 1], np.float64)
    for layer in range(3):
      x = x if layer == 0 else np.maximum(x, 0)
      x = x @ params[f'mean_{number}_{layer}']
    np.testing.assert_allclose(mean, x, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(variance, np.log(2) + 1e-5, rtol=1e-5)


@pytest.mark.parametrize(
  'ours, theirs, expected',
  [
    ((8, 6), (4, 3), (4, 3)),
    ((4, 3), (8, 6), (8, 6)),
    ((5, 7), (3, 4), (3, 4)),
    ((4, 4), (4, 4), (4, 4)),
    ((3, 3), (4, 4), (3, 3)),  # The teacher's is averaged down.
  ],
  ids=str,
)
def test_fitnets_regressor_reaches_the_teachers_size(ours, theirs, expected):
  method = methods.get('fitnet')()
  student, teacher = shared.arrays(method)

  def with_stage(seen, size, channels):
    stage = jnp.ones((6, *size, channels))
    return seen.replace(stages=(*seen.stages[:2], stage))

  student, teacher = (
    with_stage(student, ours, 3),
    with_stage(teacher, theirs, 4),
  )
  module = method.auxiliary(student, teacher)
  made, _ = module.init_with_output(
    jax.random.key(0), student, teacher, train=False
  )
  assert made.shape == (6, *expected, 4)
  seen = student.replace(auxiliary=made)
  assert np.isfinite(method.loss(seen, teacher, {'label': np.zeros(6, int)})[0])


def test_a_stage_that_is_not_there_is_said():
  method = methods.get('fitnet')(stage=4)
  with pytest.raises(config_utils.UserError, match='stages 0 to 2'):
    shared.bind(method)


def batch_norm(x, params):
  """Returns a map normalised over the batch, as in training."""
  x = (x - x.mean(axis=(0, 1, 2))) / np.sqrt(x.var(axis=(0, 1, 2)) + 1e-5)
  return x * params['scale'] + params['bias']


def conv(x, params):
  """Returns a convolution of stride 1 that keeps the map's size."""
  kernel = np.asarray(params['kernel'], np.float64)
  side, (height, width) = len(kernel), x.shape[1:3]
  margin = side // 2
  padded = np.pad(x, ((0, 0), (margin, margin), (margin, margin), (0, 0)))
  total = params.get('bias', 0.0)
  for i, j in itertools.product(range(side), range(side)):
    total = total + padded[:, i : i + height, j : j + width] @ kernel[i, j]
  return total


def nearest(x, size):
  """Returns a map of `size` x `size` by PyTorch's rule for `nearest`."""
  rows, columns = (np.arange(size) * n // size for n in x.shape[1:3])
  return x[:, rows][:, :, columns]


@pytest.mark.parametrize('before', [False, True])
def test_reviewkds_fusions_by_hand(before):
  method = methods.get('reviewkd')(before_relu=before, width=3)
  student, teacher = shared.arrays(method, teacher_size=4)
  student = student.replace(before=tuple(x - 1 for x in student.stages))
  module = method.auxiliary(student, teacher)
  shapes = jax.eval_shape(
    lambda: module.init(jax.random.key(0), student, teacher, train=False)
  )
  variables = shared.noise(shapes, seed=4)
  found, _ = module.apply(
    variables, student, teacher, train=True, mutable=['batch_stats']
  )
  params = variables['params']
  stages = student.before if before else student.stages
  levels = [student.pooled[:, None, None], *stages[:0:-1]]
  assert params['in_0']['kernel'].shape[-1] == 3
  fused = None
  for number, (level, (made, target)) in enumerate(
    zip(levels, found, strict=True)
  ):
    x = conv(np.asarray(level, np.float64), params[f'in_{number}'])
    x = batch_norm(x, params[f'in_norm_{number}'])
    if fused is not None:
      fused = nearest(fused, x.shape[1])
      gates = conv(
        np.concatenate([x, fused], axis=3), params[f'gates_{number}']
      )
      gates = scipy.special.expit(gates)
      x = x * gates[..., :1] + fused * gates[..., 1:]
    fused = x
    x = conv(nearest(x, target.shape[1]), params[f'out_{number}'])
    x = batch_norm(x, params[f'out_norm_{number}'])
    np.testing.assert_allclose(made, x, rtol=2e-3, atol=2e-3)


def test_crds_embeddings_have_length_one():
  method = methods.get('crd')()
  student, _ = shared.arrays(method)
  for vectors in student.auxiliary.values():
    assert vectors.shape == (6, 128)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, rtol=1e-5)


@pytest.mark.parametrize('inputs, features', [(5, 9), (9, 5), (6, 6)])
def test_an_orthogonal_connector_keeps_lengths_or_forgets_directions(
  inputs, features
):
  module = connectors.get('orthogonal')(features=features)
  x = jnp.eye(inputs)[:, None, None]
  kernel, _ = module.init_with_output(jax.random.key(0), x, train=False)
  kernel = np.asarray(kernel)[:, 0, 0]
  product = kernel @ kernel.T if inputs <= features else kernel.T @ kernel
  np.testing.assert_allclose(product, np.eye(min(inputs, features)), atol=1e-5)
  assert module.signed and module.takes == 'pooled'


def test_the_teacher_is_in_inference_mode():
  """Its outputs of an image do not depend on the others in the batch."""
  distiller, _ = shared.bind(methods.get('kd')())
  images = shared.make_batch()['image']
  run = jax.jit(distiller.run_teachers)
  (together,) = run(distiller.frozen, images)
  (alone,) = run(distiller.frozen, images[:1])
  np.testing.assert_allclose(
    together.logits[:1], alone.logits, rtol=1e-4, atol=1e-4
  )


@pytest.mark.parametrize(
  'name', ['resnet8', 'resnet18_cifar', 'vgg8', 'shufflenet_v1_cifar']
)
def test_stages_are_their_preactivations_activated(name):
  found, *_ = test_models.run(name, (16, 16, 3))
  assert len(found.before) == len(found.stages)
  for before, stage in list(zip(found.before, found.stages, strict=True))[1:]:
    # Compiled, both may be computed anew, and be rounded otherwise.
    np.testing.assert_allclose(np.maximum(before, 0), stage, atol=1e-5)
    assert np.any(np.asarray(before) < 0)


@pytest.mark.parametrize('name', ['shufflenet_v2_cifar_x0_5'])
def test_a_shuffled_stage_is_its_preactivation_activated_and_shuffled(name):
  found, *_ = test_models.run(name, (16, 16, 3))
  assert len(found.before) == len(found.stages)
  for before, stage in list(zip(found.before, found.stages, strict=True))[1:]:
    half = before.shape[-1] // 2
    shuffled = np.empty_like(stage)
    shuffled[..., ::2] = before[..., :half]
    shuffled[..., 1::2] = before[..., half:]
    np.testing.assert_allclose(np.maximum(shuffled, 0), stage, atol=1e-5)
    assert np.any(np.asarray(before) < 0)


def test_a_wide_nets_stages_go_through_the_next_batch_norm():
  found, variables, *_ = test_models.run('wrn_16_1', (16, 16, 3))
  assert len(found.before) == len(found.stages)
  np.testing.assert_allclose(
    np.maximum(found.before[-1], 0), found.final, atol=1e-5
  )
  names = ('block2_0_bn1', 'block3_0_bn1', 'bn1')
  for number, name in enumerate(names, 1):
    params = variables['params'][name]
    running = variables['batch_stats'][name]
    scale = params['scale'] / np.sqrt(running['var'] + 1e-5)
    expected = (found.stages[number] - running['mean']) * scale + params['bias']
    np.testing.assert_allclose(found.before[number], expected, atol=1e-4)
