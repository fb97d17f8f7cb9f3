#!/usr/bin/env bash
# Deletes the TPU and its place in the queue. What is in the bucket stays.
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=lib.sh
source "$(dirname "$0")/lib.sh"
use_settings "$@"

delete_tpu
