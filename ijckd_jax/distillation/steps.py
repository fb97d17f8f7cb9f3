"""Steps of training, on one device; the devices meet over parallel.AXIS."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import optax

from ijckd_jax.distillation import distiller as distiller_lib
from ijckd_jax.distillation import stored_outputs
from ijckd_jax.distillation import train_state as train_state_lib
from ijckd_jax.models import cpu_conv
from ijckd_jax.models import losses
from ijckd_jax.runtime import parallel

# Streams of the run's key.
AUGMENTATION_STREAM = 0
INIT_STREAM = 1
MIXING_STREAM = 2
METHOD_STREAM = 3
DROPOUT_STREAM = 4
SECOND_VIEW_STREAM = 5


@cpu_conv.fast_convolutions()
def train_step(
  state: train_state_lib.TrainState,
  frozen: distiller_lib.Frozen,
  batch: dict[str, jax.Array],
  key: jax.Array,
  *,
  distiller: distiller_lib.Distiller,
  tx: optax.GradientTransformation,
  augmentation,
  ema_decay: float,
  num_pieces: int,
  stored: stored_outputs.Stored | None = None,
  mixing=None,
  returns_rows: bool = False,
):
  """Makes one update from this device's rows of the batch.

  Args:
    state: the state before; its buffers may be taken over.
    frozen: distiller.Frozen; never donated.
    batch: 'image' uint8 (B, H, W, C), 'label', 'index' and 'epoch' int32 (B,);
      and 'teacher', its stored outputs, where it is not to run.
    key: the run's key.
    distiller: the pair and the method.
    tx: the optimizer.
    augmentation: augment.Augmentation; any `(key, images, epochs, indices) ->
      images` will do for a method with one view.
    ema_decay: of the moving average, where the state holds one; less in the
      first steps.
    num_pieces: parts in which the rows are worked through, gradients averaged;
      batch norm sees one part at a time.
    stored: which of the teacher's outputs are stored; None where none are.
    mixing: `(key, images, labels, epochs, indices) -> images, labels` of the
      augmented images, see mixing; None: images and labels stay as they are.
    returns_rows: whether rows come with the result, in a pair: 'index', 'epoch'
      and, where they are stored, the 'teacher' outputs.

  Returns:
    The state after, and (sum, count) of each metric over all devices: 'loss',
    the method's terms, 'accuracy' where there are classes, and 'gradient_norm'
    before the optimizer.
  """
  second_view = distiller.method.second_view
  batch = _augment(batch, key, augmentation, mixing, second_view)
  zeros = jax.tree.map(jnp.zeros_like, state.params)
  (batch_stats, gradients, memory), (sums, outputs) = _over_pieces(
    functools.partial(_piece, state.params, frozen, key, distiller, stored),
    (state.batch_stats, zeros, state.memory),
    batch,
    jax.random.split(_dropout_key(key, state.step), num_pieces),
  )
  gradients, batch_stats = jax.lax.pmean(
    (gradients, batch_stats), parallel.AXIS
  )
  sums = jax.lax.psum(sums, parallel.AXIS)
  # Not summed, because it is the same on every device. The loop stops a run
  # where it, like any other number here, is not finite.
  sums['gradient_norm'] = (optax.tree.norm(gradients), jnp.ones(()))
  state = _update(state, gradients, batch_stats, memory, tx, ema_decay)
  if not returns_rows:
    return state, sums
  rows = {'index': batch['index'], 'epoch': batch['epoch'], 'teacher': outputs}
  return (state, sums), rows


def train_steps(
  step,
  image_shape: tuple[int, int, int],
  state: train_state_lib.TrainState,
  frozen: distiller_lib.Frozen,
  plan: dict[str, jax.Array],
  data: dict[str, jax.Array],
  count: jax.Array,
  key: jax.Array,
):
  """Makes several updates in one call, on images that lie on the device.

  The number of updates is not known to the compiler. So one program serves any
  number, and an update rounds alike in whatever call it is made.

  Args:
    step: `train_step` with its keyword arguments, without rows in its result.
    image_shape: (H, W, C).
    state: the state before; its buffers may be taken over.
    frozen: distiller.Frozen; never donated.
    plan: 'index' and 'epoch' int32 (B, S); column i holds this device's rows of
      the batch of update i.
    data: the whole training set: 'image' uint8 (N, H * W * C) and 'label' int32
      (N,). Images are flat, because a TPU would pad each row of three channels.
    count: int32 scalar, at most S: how many updates to make.
    key: the run's key.

  Returns:
    The state after, and (sum, count) of each metric of `train_step`, (S,) each:
    one for each update, and zeros after the last one.
  """
  # Traced once, for the shapes of its metrics and for the loop.
  step = jax.jit(step, inline=True)

  def batch(number):
    rows = jax.tree.map(lambda x: x[:, number], plan)
    chosen = jax.tree.map(lambda x: x[rows['index']], data)
    images = chosen['image'].reshape(-1, *image_shape)
    return {**chosen, **rows, 'image': images}

  def update(number, carry):
    state, metrics = carry
    state, new = step(state, frozen, batch(number), key)
    metrics = jax.tree.map(lambda all, x: all.at[number].set(x), metrics, new)
    return state, metrics

  _, shapes = jax.eval_shape(step, state, frozen, batch(0), key)
  num_columns = plan['index'].shape[1]
  metrics = jax.tree.map(lambda x: jnp.zeros((num_columns,), x.dtype), shapes)
  return jax.lax.fori_loop(0, count, update, (state, metrics))


def _augment(batch, key, augmentation, mixing, second_view):
  """Returns a batch whose images are what both networks see.

  Where there is a second view, it is 'second', and mixed as the first one is.
  """
  rows = batch['epoch'], batch['index']

  def view(number, augment):
    stream = jax.random.fold_in(key, number)
    images, labels = augment(stream, batch['image'], *rows), batch['label']
    if mixing is None:
      return images, labels
    stream = jax.random.fold_in(key, MIXING_STREAM)
    return mixing(stream, images, labels, *rows)

  images, labels = view(AUGMENTATION_STREAM, augmentation)
  made = {'image': images, 'label': labels}
  if second_view is not None:
    transforms = (*augmentation.transforms, *second_view)
    other = dataclasses.replace(augmentation, transforms=transforms)
    made['second'], _ = view(SECOND_VIEW_STREAM, other)
  return {**batch, **made}


def _dropout_key(key, step):
  """Returns the key of what this device drops at random in a step."""
  for number in (DROPOUT_STREAM, step, jax.lax.axis_index(parallel.AXIS)):
    key = jax.random.fold_in(key, number)
  return key


def _over_pieces(piece, carry, batch, keys):
  """Returns what a piece makes of the batch, part after part.

  That is (statistics, gradients, memory), the gradients averaged over the
  parts, and (sums, stored outputs), the sums added up. There is a key for each
  piece.
  """
  num_pieces = len(keys)
  if num_pieces == 1:
    return piece(carry, (batch, keys[0]))
  pieces = jax.tree.map(
    lambda x: x.reshape(num_pieces, -1, *x.shape[1:]), batch
  )
  (batch_stats, gradients, memory), (sums, outputs) = jax.lax.scan(
    piece, carry, (pieces, keys)
  )
  outputs = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), outputs)
  gradients = jax.tree.map(lambda g: g / num_pieces, gradients)
  sums = jax.tree.map(lambda x: jnp.sum(x, axis=0), sums)
  return (batch_stats, gradients, memory), (sums, outputs)


def _piece(params, frozen, key, distiller, stored, carry, piece):
  """Adds the gradients of some rows; returns their sums and stored outputs."""
  batch_stats, gradients, memory = carry
  rows, dropout_key = dict(piece[0]), piece[1]
  if distiller.remembers:
    rows |= {
      'memory': memory,
      'key': jax.random.fold_in(key, METHOD_STREAM),
    }
  stored_rows = rows.pop('teacher', None)
  if stored_rows is None:
    teacher_outputs = distiller.run_teachers(
      frozen, rows['image'], rows.get('second')
    )
    if stored is not None:
      stored_rows = stored.take(teacher_outputs)
  if stored_rows is not None:
    teacher_outputs = stored.restore(stored_rows)

  def loss_fn(params, batch_stats, teacher_outputs, rows):
    variables = {'params': params, 'batch_stats': batch_stats}
    total, (terms, student, batch_stats) = distiller.objective(
      variables, frozen, teacher_outputs, rows, dropout_key
    )
    notes = None
    if distiller.remembers:
      notes = distiller.method.notes(student, rows)
    return total, (batch_stats, terms, student.logits, notes)

  (total, (batch_stats, terms, logits, notes)), new = jax.value_and_grad(
    loss_fn, has_aux=True
  )(params, batch_stats, teacher_outputs, rows)
  gradients = jax.tree.map(jnp.add, gradients, new)
  if distiller.remembers:
    # The same on every device: all of them note the rows of all.
    notes = jax.lax.all_gather(notes, parallel.AXIS, tiled=True)
    memory = distiller.method.remember(memory, notes)
  sums = _sums({'loss': total, **terms}, logits, rows['label'])
  return (batch_stats, gradients, memory), (sums, stored_rows)


def _update(state, gradients, batch_stats, memory, tx, ema_decay):
  """Returns the state after the optimizer's step."""
  updates, opt_state = tx.update(gradients, state.opt_state, state.params)
  params = optax.apply_updates(state.params, updates)
  ema = state.ema
  if ema is not None:
    # A long memory must not be one of the random start: it grows with the run.
    decay = jnp.minimum(ema_decay, (1 + state.step) / (10 + state.step))
    ema = optax.incremental_update(
      {'params': params, 'batch_stats': batch_stats}, ema, 1 - decay
    )
  return state.replace(
    step=state.step + 1,
    params=params,
    batch_stats=batch_stats,
    opt_state=opt_state,
    ema=ema,
    memory=memory,
  )


def _sums(means, logits, labels):
  """Returns (sum, count) of means over the rows, and of the accuracy."""
  count = jnp.asarray(len(logits), jnp.float32)
  sums = {name: (value * count, count) for name, value in means.items()}
  if not logits.shape[-1]:  # There are no classes.
    return sums
  labels = losses.single_labels(labels)
  labelled = labels >= 0
  correct = labelled & (jnp.argmax(logits, axis=-1) == labels)
  sums['accuracy'] = (
    jnp.sum(correct, dtype=jnp.float32),
    jnp.sum(labelled, dtype=jnp.float32),
  )
  return sums
