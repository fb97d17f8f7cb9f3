#!/usr/bin/env bash
# A frozen ConvNeXt without a head, trained in PyTorch and converted; a head
# fitted on its features; resnet8 distilled through it, and resnet8 alone.
# Usage: study.sh WORKDIR [--config.FIELD=VALUE ...]
# Run again, it goes on where it was stopped. Fashion-MNIST must be prepared.
set -euo pipefail
work=${1:?usage: study.sh WORKDIR [--config.FIELD=VALUE ...]}
mkdir -p "$work"
[ -e "$work/features.pth" ] ||
  python -m experiments.converted.train_torch "$work/features.pth"
[ -e "$work/features" ] ||
  ijckd convert --checkpoint "$work/features.pth" \
    --model experiments.converted.train_torch:Features --name convnext \
    --mean 0.2860 --std 0.3530 --image_size 14x28 --output "$work/features"
config=fashion_pairs_100:resolution=half,num_train=5000
run() { # NAME SEED METHOD [FLAG ...]
  ijckd train --config "$config,method=$3" \
    --workdir "$work/$1_$2" --config.seed="$2" --config.total_epochs=20 \
    --config.eval_epochs=5 "${@:4}"
}
# The teacher was trained without crops, and is lost on them.
teacher=(--config.teacher.checkpoint="$work/features"
  --config.teacher.backbone=convnext --config.teacher.head=fit
  --config.teacher.store.views=1)
for seed in 0 1 2; do
  run alone "$seed" ce "${@:2}"
  run fitted "$seed" ijckd "${teacher[@]}" "${@:2}"
  run pooled "$seed" ijckd "${teacher[@]}" \
    --config.method.feature_site=pooled "${@:2}"
done
python -m experiments.converted.collect "$work"
