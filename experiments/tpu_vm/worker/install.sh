#!/usr/bin/env bash
# On a worker: installs the checkout, mounts the buckets, copies the data.
# Usage: install.sh [--dry_run] WORKDIR DATA_DIR copy|mount
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=../lib.sh
source "$(dirname "$0")/../lib.sh"
workdir=$1 data_dir=$2 data_by=$3
[ "$dry_run" = yes ] || cd

apt=https://packages.cloud.google.com/apt
key=/usr/share/keyrings/cloud.google.asc
run sudo curl -fsS -o "$key" "$apt/doc/apt-key.gpg"
# shellcheck disable=SC2016  # The worker's release, not that of a dry run.
source_line='deb [signed-by=$0] $1 gcsfuse-$VERSION_CODENAME main'
run sudo bash -c ". /etc/os-release && \
echo \"$source_line\" >/etc/apt/sources.list.d/gcsfuse.list" "$key" "$apt"
run sudo apt-get update -qq
# A new machine updates itself first, and holds the lock meanwhile.
run sudo apt-get -o DPkg::Lock::Timeout=600 install -qq gcsfuse python3-venv

# The system's Python is older than the package allows; uv brings another.
run python3 -m venv uv
run uv/bin/pip install --quiet uv
run uv/bin/uv venv --quiet --allow-existing --python 3.12 venv
run uv/bin/uv pip install --quiet --python venv/bin/python \
  --editable './ijckd_jax[tpu]'

buckets=$(printf '%s\n' "$workdir" "$data_dir" | cut -d / -f 3 | sort -u)
for bucket in $buckets; do
  run mkdir -p "gs/$bucket"
  # Written when it is flushed, not only when it is closed: metrics and events
  # stay open as long as the run.
  mountpoint -q "gs/$bucket" 2>/dev/null ||
    run gcsfuse --implicit-dirs --enable-streaming-writes=false "$bucket" \
      "gs/$bucket"
done
if [ -n "$data_dir" ] && [ "$data_by" = copy ]; then
  run mkdir -p data
  run cp --recursive --update "$(mounted "$data_dir")/." data
fi
