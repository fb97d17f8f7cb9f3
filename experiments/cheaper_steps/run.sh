#!/usr/bin/env bash
# What a cheaper step costs in accuracy: one teacher; students of three seeds
# with 1, 4 and 16 stored views, with the live teacher, and with the live one in
# bfloat16, on fashion pairs at half resolution.
# Usage: run.sh WORKDIR [--config.FIELD=VALUE ...]
# Run again, it goes on where it was stopped; the fields are for all runs.
# The crop is what makes views differ (a mirrored pair is another class).
# Fashion-MNIST must be prepared: python -m ijckd_jax prepare ...
set -euo pipefail
work=${1:?usage: run.sh WORKDIR [--config.FIELD=VALUE ...]}
config=${CONFIG:-configs/fashion_pairs_100.py:resolution=half,num_train=5000}
run() { # NAME SEED [FLAG ...]
  python -m ijckd_jax.main --config "$config" --workdir "$work/$1_$2" \
    --config.dataset.crop_padding=2 --config.total_epochs=20 \
    --config.eval_epochs=5 \
    --config.seed="$2" --config.teacher.seed=1000 "${@:3}"
}
run live 0 "${@:2}" # Trains the teacher as well.
teacher=--config.teacher.checkpoint=$work/live_0/teacher
for seed in 0 1 2; do
  if [ "$seed" != 0 ]; then
    run live "$seed" "$teacher" "${@:2}"
  fi
  run bfloat16 "$seed" "$teacher" --config.dtype=bfloat16 "${@:2}"
  for views in 1 4 16; do
    run "views$views" "$seed" "$teacher" \
      --config.teacher.store.views="$views" "${@:2}"
    # Only a run's own epochs read them; all together they are gigabytes.
    rm -rf "$work/views${views}_$seed/teacher_outputs"
  done
done
python experiments/cheaper_steps/collect.py "$work"
