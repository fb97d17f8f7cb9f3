#!/usr/bin/env bash
# Queues for a TPU, and waits until it is there.
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=lib.sh
source "$(dirname "$0")/lib.sh"
use_settings "$@"

request_tpu
if [ "$dry_run" = yes ]; then
  note "every $POLL_SECONDS seconds, until it says ACTIVE:"
  tpu_state
  exit
fi
while true; do
  poll
  case $state in
    ACTIVE) exit ;;
    FAILED | SUSPENDED)
      echo "error: there will be no TPU; delete.sh, then create.sh asks" \
        "again" >&2
      exit 1
      ;;
  esac
  sleep "$POLL_SECONDS"
done
