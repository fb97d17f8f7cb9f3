#!/usr/bin/env bash
# Keeps the command going until it has finished: asks for a new TPU where it was
# preempted, and installs and starts where nothing runs.
# Exits with 0 when the command has ended well on every worker, with 1 when it
# has failed on one. Either way the TPU stays, and costs: see delete.sh.
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=lib.sh
source "$(dirname "$0")/lib.sh"
use_settings "$@"

worker_states() { # A line of each: running, stopped or exited CODE.
  on_workers "if flock --nonblock run.lock true; \
then cat run.status 2>/dev/null || echo stopped; else echo running; fi"
}

if [ "$dry_run" = yes ]; then
  note "every $POLL_SECONDS seconds:"
  tpu_state
  note 'where it is SUSPENDED:'
  delete_tpu
  request_tpu
  note 'where it is ACTIVE:'
  worker_states
  note 'where a worker is stopped:'
  "$here/install.sh" --dry_run
  "$here/start.sh" --dry_run
  exit
fi
while true; do
  poll
  case $state in
    SUSPENDED)
      delete_tpu
      request_tpu
      ;;
    FAILED)
      echo 'error: there will be no TPU; delete.sh, then create.sh asks' \
        'again' >&2
      exit 1
      ;;
    ACTIVE)
      workers=$(worker_states) || workers='do not answer'
      echo "$(date +%T) workers: ${workers//$'\n'/, }"
      # 130 and 143: told to stop; 134: ended by JAX, since another one died.
      # Where one still runs, it is about to end: that is tried again.
      failed=$(grep -E 'exited [0-9]' <<<"$workers" |
        grep -Ev 'exited (0|130|134|143)$' || true)
      case ${failed:+failed}$workers in
        failed*)
          echo 'error: the command has failed; run.log on the worker says' \
            'why, and start.sh starts it again' >&2
          exit 1
          ;;
        *stopped* | *'exited 1'[34]*)
          "$here/install.sh" && "$here/start.sh" ||
            echo 'that has failed, and is tried again' >&2
          ;;
        *running*) ;;
        *'exited 0'*) exit ;;
      esac
      ;;
  esac
  sleep "$POLL_SECONDS"
done
