#!/usr/bin/env bash
# Two nodes of eight GPUs, one process a GPU:
#   sbatch experiments/launch/slurm.sh --config=configs/imagenet.py:vvt_small --workdir=/shared/runs/small
#SBATCH --job-name=vvt
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=12
#SBATCH --time=24:00:00
# Two minutes before the time is up all processes get SIGTERM, and save at one step.
#SBATCH --signal=TERM@120
# A preempted job, or one whose node is lost, waits in the queue again.
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=vvt-%j.log

# srun does not take this from sbatch since Slurm 22.05, and would give each task one core.
export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK

# jax takes the GPU whose number is the task's number on its node. So each task has to see all of
# its node's: no --gpus-per-task, no --gpu-bind.
for attempt in $(seq 1 10); do
  # After one process has failed, the others end by themselves, with its message and status. What
  # is still running seven minutes later (more than config.distributed.start_timeout) is killed: no
  # process can do anything without the others.
  srun --kill-on-bad-exit=0 --wait=420 .venv/bin/python -m vvt_jax.main "$@"
  status=$?
  case $status in
    0) exit 0 ;;
    1) exit 1 ;;                                           # a mistake that would come again
    143) scontrol requeue "$SLURM_JOB_ID"; exit $status ;; # saved: time was up
  esac
  echo "Attempt $attempt ended with $status." # 70: an unexpected error; above 128: a signal
done
exit "$status"
