#!/usr/bin/env bash
# Copies the last commit to every worker and installs it there, with the bucket
# mounted and the data in place. May be run again.
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=lib.sh
source "$(dirname "$0")/lib.sh"
use_settings "$@"

root=$(cd "$here/../.." && pwd)
[ -z "$(git -C "$root" status --porcelain)" ] ||
  echo 'note: only what is committed is copied' >&2
run mkdir -p "$root/build"
run git -C "$root" archive --prefix=ijckd_jax/ \
  --output="$root/build/ijckd_jax.tar.gz" HEAD
run gcloud compute tpus tpu-vm scp "$root/build/ijckd_jax.tar.gz" \
  "$TPU_NAME:" "${where[@]}" --worker=all
# Not under a command that is running: it may still import.
on_workers "flock --nonblock run.lock true || \
{ echo 'the command is still running here' >&2; exit 1; }; \
tar --recursive-unlink -xzf ijckd_jax.tar.gz && \
$(quoted "$worker/install.sh" "$WORKDIR" "$DATA_DIR" "$DATA_BY")"
if [ "$dry_run" = yes ]; then
  note 'the last of which runs on every worker, in its home directory:'
  "$here/worker/install.sh" --dry_run "$WORKDIR" "$DATA_DIR" "$DATA_BY"
fi
