#!/usr/bin/env bash
# All hosts of a TPU pod slice, from a machine with gcloud:
#   experiments/launch/tpu_pod.sh NAME ZONE --config=configs/imagenet.py:vvt_small --workdir=/shared/runs/small
# The checkout and its .venv (with the extra tpu) lie in ~/vvt_jax on each host, and /shared is a
# file system that all of them mount, such as Filestore.
name=$1 zone=$2
shift 2
printf -v arguments '%q ' "$@"

on_all_hosts() {
  gcloud compute tpus tpu-vm ssh "$name" --zone="$zone" --worker=all --command="$1"
}

for attempt in $(seq 1 10); do
  # What is left of a lost group is ended first (the brackets keep the pattern from itself).
  on_all_hosts "pkill -KILL -u \$USER -f '[v]vt_jax.main'; rm -f ~/vvt_jax/.user_error; sleep 1"
  # jax finds the other hosts by itself.
  on_all_hosts "cd ~/vvt_jax && .venv/bin/python -m vvt_jax.main $arguments
    status=\$?; [ \$status -ne 1 ] || touch .user_error; exit \$status"
  status=$?
  [ $status -eq 0 ] && exit 0
  # gcloud ends with 1 for reasons of its own, too. A mistake would come again.
  on_all_hosts "test -e ~/vvt_jax/.user_error" && exit 1
  echo "Attempt $attempt ended with $status."
  # A spot slice that was taken away has to come back first, e.g. by a queued resource.
  until gcloud compute tpus tpu-vm describe "$name" --zone="$zone" --format='value(state)' |
    grep -q READY; do
    sleep 60
  done
done
exit "$status"
