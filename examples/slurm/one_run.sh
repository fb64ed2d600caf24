#!/usr/bin/env bash
# One run on several hosts of a SLURM cluster: a process for each GPU, which have the same number of environments each.
#
#   sbatch examples/slurm/one_run.sh --config=configs/pong_dvrl.py --config.num_envs=128 --workdir=saved_runs/large
#
# Submit it in the repository's root, with the Python environment of the job active (pip install -e '.[cuda13]'). The
# directory of the run must lie where all nodes see it. --config.num_envs must be a multiple of the number of processes.
#
# At the time limit the processes save a checkpoint and stop, and if one of them ends, so do the others. Submit the same
# again to resume, with as many nodes as you like.
#SBATCH --partition=gpu
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=4
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=16
#SBATCH --mem=256G
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@120
set -euo pipefail

# Each process takes the GPU of its number on the node: all must see all of them, so not --gpus-per-task.
srun --kill-on-bad-exit=0 python train.py --distributed "$@"
