#!/usr/bin/env bash
# A training run on the nodes of a SLURM job, one process for each GPU, or for each node without.
#
#   sbatch --nodes 2 --gpus-per-node 8 --ntasks-per-node 8 scripts/slurm.sh \
#       --config /shared/mine.py --workdir /shared/runs/mine
#
# jax takes the number of processes and the address of the first from SLURM, and gives each process
# the GPU of its index on the node. So give --gpus-per-node, not --gpus-per-task.
#SBATCH --job-name=moe_jax
#SBATCH --open-mode=append
# The state is saved two minutes before the time limit, and after a lost node the job starts again:
# the same command resumes.
#SBATCH --signal=TERM@120
#SBATCH --requeue
set -euo pipefail
exec srun --kill-on-bad-exit=0 moe-jax train "$@" --distributed
