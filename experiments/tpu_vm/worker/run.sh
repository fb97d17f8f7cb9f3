#!/usr/bin/env bash
# On a worker: runs the command, with a log and its exit status in files.
# Usage: run.sh [--dry_run] WORKDIR DATA_DIR COMMAND
# The folders are the worker's, from its home directory.
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=../lib.sh
source "$(dirname "$0")/../lib.sh"
if [ "$dry_run" = yes ]; then
  quoted bash -c "$3"
  exit
fi
cd
exec </dev/null >>run.log 2>&1
export PATH=$HOME/venv/bin:$PATH WORKDIR=$HOME/$1 DATA_DIR=${2:+$HOME/$2}
# Told to stop, it waits for the command, which saves.
trap : TERM
code=0
(cd ijckd_jax && exec bash -c "$3") || code=$?
echo "exited $code" >run.status
mkdir -p "$WORKDIR/logs"
cp run.log "$WORKDIR/logs/$(hostname).log"
