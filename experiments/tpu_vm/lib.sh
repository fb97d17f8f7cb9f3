# shellcheck shell=bash
# What the scripts share. To be sourced: it takes --dry_run off the arguments.

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# From a worker's home directory.
# shellcheck disable=SC2034  # For the scripts that source this.
worker=ijckd_jax/experiments/tpu_vm/worker

dry_run=no
if [ "${1:-}" = --dry_run ]; then
  dry_run=yes
  shift
fi

die() { # What the user has to mend.
  echo "error: $*" >&2
  exit 2
}

quoted() { # The arguments as a line that a shell reads back.
  local line
  printf -v line ' %q' "$@"
  printf '%s\n' "${line:1}"
}

run() { # Runs a command, or prints it under --dry_run.
  if [ "$dry_run" = yes ]; then
    quoted "$@"
  else
    "$@"
  fi
}

note() { # What --dry_run says about the commands that follow.
  if [ "$dry_run" = yes ]; then
    echo "# $*"
  fi
}

use_settings() { # Reads the settings, and says what is missing.
  [ $# = 0 ] || die "unknown argument '$1': there is only --dry_run"
  # shellcheck source-path=SCRIPTDIR source=settings.sh
  source "$here/settings.sh"
  local name
  for name in TPU_PROJECT TPU_ZONE BUCKET; do
    [ -n "${!name}" ] || die "$name is not set: edit $here/settings.sh, or" \
      "give it in the environment"
  done
  case $WORKDIR in
    gs://?*/?*) ;;
    *) die "WORKDIR=$WORKDIR: it must be gs://BUCKET/FOLDER, since a TPU's" \
      "disks go when it is preempted" ;;
  esac
  case $DATA_DIR in
    '' | gs://?*/?*) ;;
    *) die "DATA_DIR=$DATA_DIR: it must be gs://BUCKET/FOLDER, or empty" ;;
  esac
  case $TPU_SPOT,$DATA_BY in
    yes,copy | yes,mount | no,copy | no,mount) ;;
    *) die "TPU_SPOT=$TPU_SPOT DATA_BY=$DATA_BY: the first must be yes or no," \
      "the second copy or mount" ;;
  esac
  [ "$dry_run" = yes ] || command -v gcloud >/dev/null ||
    die 'there is no gcloud: see https://cloud.google.com/sdk/docs/install'
  where=(--project="$TPU_PROJECT" --zone="$TPU_ZONE" --quiet)
}

request_tpu() {
  local spot=
  [ "$TPU_SPOT" = no ] || spot=--spot
  run gcloud compute tpus queued-resources create "$TPU_NAME" \
    --node-id="$TPU_NAME" "${where[@]}" --accelerator-type="$TPU_TYPE" \
    --runtime-version="$TPU_RUNTIME" ${spot:+"$spot"}
}

delete_tpu() {
  run gcloud compute tpus queued-resources delete "$TPU_NAME" "${where[@]}" \
    --force
}

tpu_state() {
  run gcloud compute tpus queued-resources describe "$TPU_NAME" \
    "${where[@]}" --format='value(state.state)'
}

state=
poll() { # Sets `state`, and says where it is another one.
  local before=$state
  state=$(tpu_state) || state='not known, since gcloud has failed'
  [ "$state" = "$before" ] || echo "$(date +%T) $TPU_NAME is $state"
}

on_workers() { # Runs a line of shell in every worker's home directory.
  run gcloud compute tpus tpu-vm ssh "$TPU_NAME" "${where[@]}" --worker=all \
    --command="$1"
}

mounted() { # Where a worker has a gs:// folder, from its home directory.
  echo "gs/${1#gs://}"
}

data_folder() { # Where a worker has the data, from its home directory.
  if [ -z "$DATA_DIR" ]; then
    echo
  elif [ "$DATA_BY" = copy ]; then
    echo data
  else
    mounted "$DATA_DIR"
  fi
}
