#!/usr/bin/env bash
# A teacher trained in PyTorch, imported, compared, and distilled from here:
#   pip install -e '.[test,parity]'
#   ijckd prepare fashion_mnist --source DIR
#   experiments/torch_teacher/run.sh runs/torch_teacher
set -euo pipefail
out=$1
python -m experiments.torch_teacher.train "$out"
ijckd weights import --checkpoint "$out/teacher.pth" \
  --mean 0.2860 --std 0.3530 --image_size 28 --output "$out/bundle"
python -m experiments.torch_teacher.compare "$out"
ijckd train --workdir "$out/student" \
  --config fashion_mnist:teacher=resnet20,student=resnet8 \
  --config.teacher.checkpoint="$out/bundle" --config.total_epochs=3
