#!/usr/bin/env bash
# On a worker: starts run.sh, detached from the connection, unless it runs.
# Usage: start.sh [--dry_run] WORKDIR DATA_DIR COMMAND, see run.sh
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=../lib.sh
source "$(dirname "$0")/../lib.sh"
if [ "$dry_run" = yes ]; then
  echo 'exec 9>run.lock'
else
  cd
  bucket=$(cut -d / -f 1,2 <<<"$1")
  # A folder that is not mounted would take the run, and go with the disk.
  mountpoint -q "$bucket" || die "$bucket is not mounted: run install.sh"
  exec 9>run.lock
fi
# What is started inherits the lock, and holds it until it ends.
run flock --nonblock 9 || {
  echo "$(hostname): already running"
  exit
}
run rm -f run.status
run setsid --fork "$worker/run.sh" "$@"
