#!/usr/bin/env bash
# Experiments on a SLURM cluster: each is a job on one GPU of one node, which trains all its seeds in one program.
#
#   bash examples/slurm/reproduce.sh --only=atari --seeds=5
#
# Run it in the repository's root on a machine with sbatch, with the Python environment of the jobs active
# (pip install -e '.[cuda13,slurm]'). The runs, saved_runs/reproduce or --root=DIR, must lie where all nodes see them, on
# a file system with flock.
#
# A job that reaches its time limit saves a checkpoint and is queued again. Run the script again to submit what was
# cancelled, preempted or has failed; it resumes. What is done, runs or waits is left alone. Once all are done, it writes
# the table and the figures.
set -euo pipefail

slurm=partition=gpu,gpus_per_node=1,cpus_per_task=16,mem_gb=64,timeout_min=1440 # A partition of your cluster.
python reproduce.py --launcher=slurm --slurm="$slurm" "$@"
python reproduce.py --list "$@"
