#!/usr/bin/env bash
# Starts the same command on every worker, where it goes on when the connection
# ends. Where it is running already, nothing happens.
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=lib.sh
source "$(dirname "$0")/lib.sh"
use_settings "$@"

arguments=("$(mounted "$WORKDIR")" "$(data_folder)" "$COMMAND")
on_workers "$(quoted "$worker/start.sh" "${arguments[@]}")"
if [ "$dry_run" = yes ]; then
  note 'which runs on every worker, in its home directory:'
  "$here/worker/start.sh" --dry_run "${arguments[@]}"
  "$here/worker/run.sh" --dry_run "${arguments[@]}"
fi
