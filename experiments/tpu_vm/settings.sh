# shellcheck shell=bash
# The settings of all scripts here. Edit them, or give some of them in the
# environment: TPU_NAME=b TPU_TYPE=v6e-8 experiments/tpu_vm/create.sh

: "${TPU_PROJECT:=}"                        # The Google Cloud project.
: "${TPU_ZONE:=}"                           # Such as us-west4-a.
: "${TPU_NAME:=ijckd}"                      # Of queued resource and TPU.
: "${TPU_TYPE:=v5litepod-8}"                # The accelerator type.
: "${TPU_RUNTIME:=v2-alpha-tpuv5-lite}"     # The software version that fits it.
: "${TPU_SPOT:=yes}"                        # yes, or no for on-demand.
: "${POLL_SECONDS:=60}"                     # Between two looks at the state.

: "${BUCKET:=}"                             # Its name, without gs://.
: "${WORKDIR:=gs://$BUCKET/runs/$TPU_NAME}" # The run's folder.
: "${COLLECT_TO:=runs/$TPU_NAME}"           # Its copy on this machine.
# The data sets, as tfds keeps them; empty where the command needs none.
: "${DATA_DIR=gs://$BUCKET/tensorflow_datasets}"
: "${DATA_BY:=copy}"                        # copy to each worker, or mount.

# What every worker runs: a shell command. It starts in the checkout, where
# python is the one installed, and WORKDIR and DATA_DIR are the worker's paths.
# shellcheck disable=SC2016  # The worker expands them.
default_command='python -m ijckd_jax.main --config configs/cifar100.py'\
' --config.dataset.data_dir="$DATA_DIR" --workdir "$WORKDIR"'
: "${COMMAND:=$default_command}"
