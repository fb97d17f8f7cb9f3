#!/usr/bin/env bash
# Copies what has changed in the run's folder to this machine; needs no TPU.
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=lib.sh
source "$(dirname "$0")/lib.sh"
use_settings "$@"

run mkdir -p "$COLLECT_TO"
run gcloud storage rsync --recursive "$WORKDIR" "$COLLECT_TO"
