#!/bin/bash
# One long run on SLURM, in as many jobs as it takes. In the environment:
#
#     sbatch sweeps/slurm-one-run.sh cifar10-random-labels --profile full
#
#SBATCH --job-name=bnnlib
#SBATCH --time=04:00:00
#SBATCH --cpus-per-task=4
#SBATCH --mem=16G
#SBATCH --gres=gpu:1
#SBATCH --requeue              # when its place is taken, or a node fails
#SBATCH --signal=B:USR1@120    # to this shell, two minutes before the end
#SBATCH --open-mode=append     # one log for all of its jobs

python -m bnnlib run "$@" &
run=$!

# The run saves at SIGTERM. When SLURM takes a job back, it sends one to each
# process, and this shell has only to wait for the run.
trap : TERM
trap 'kill -TERM $run' USR1

wait $run
while kill -0 $run 2> /dev/null; do # a signal ends `wait`, not the run
    wait $run
done
wait $run
status=$?

if [ $status = 130 ]; then # stopped, and saved
    scontrol requeue "$SLURM_JOB_ID"
fi
exit $status
