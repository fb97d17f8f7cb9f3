#!/usr/bin/env bash
# One teacher; students by CE and IJCKD with three seeds each, on fashion pairs
# at half resolution. Half an hour on two cores. Usage: run.sh WORKDIR
# Fashion-MNIST must be prepared: ijckd prepare ...
set -euo pipefail
work=${1:?usage: run.sh WORKDIR}
config=fashion_pairs_100:resolution=half,num_train=10000
run() {
  ijckd train --config "$config,method=$1" --workdir "$work/$1_$2" \
    --config.seed="$2" --config.teacher.seed=0 --config.total_epochs=20 "${@:3}"
}
run ijckd 0 # Trains the teacher as well.
teacher=$work/ijckd_0/teacher
run ce 0 --config.teacher.checkpoint="$teacher"
for seed in 1 2; do
  run ijckd "$seed" --config.teacher.checkpoint="$teacher"
  run ce "$seed" --config.teacher.checkpoint="$teacher"
done
